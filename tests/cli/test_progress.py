"""Progress on stderr."""

import sys
from typing import Any

import pytest

from vitrim.cli import progress


def test_lines_come_at_the_start_and_the_end_of_a_stage(capsys: pytest.CaptureFixture[str]) -> None:
    show = progress.Lines()
    for done in range(1, 101):
        show("train", done, 100, loss=0.25)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("train: 1/100")
    assert "loss 0.25" in lines[0]
    assert "100/100" in lines[1]


class Told:
    """`Lines` under a clock that the test moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.now, self.capsys = 100.0, capsys
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)
        self.show = progress.Lines()

    def after(self, seconds: float, *what: Any, **facts: Any) -> str:
        """The line that is printed for this, so much later; empty without one."""
        self.now += seconds
        self.show(*what, **facts)
        return self.capsys.readouterr().err.removesuffix("\n")


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Told:
    return Told(monkeypatch, capsys)


def test_a_first_step_is_announced_and_foretells_nothing(told: Told) -> None:
    assert told.after(0, "train", 0, 100) == "train: 0/100"
    assert told.after(3600, "train", 1, 100) == "train: 1/100"  # it compiled, opened files, warmed up
    assert told.after(10, "train", 2, 100, loss=0.5) == "train: 2/100  16:20 left  loss 0.5"
    assert told.after(1, "train", 3, 100) == ""


def test_a_run_says_what_is_left_of_it_as_a_whole(told: Told) -> None:
    assert told.after(0, "stages", 0, 7, now="compress", later_s=130.0) == "stages: 0/7  now compress  then about 2:10"
    assert told.after(5, "build", 1, 3) == "build: 1/3  0:10 left"  # what a method takes nobody can say
    said = told.after(90, "stages", 1, 7, now="recover", this_s=100.0, later_s=30.0)
    assert said == "stages: 1/7  now recover  about 2:10 left"
    assert told.after(20, "train", 0, 50) == "train: 0/50  of the run about 1:50"
    assert told.after(9, "train", 1, 50) == "train: 1/50  of the run about 1:41"
    assert told.after(10, "train", 2, 50) == "train: 2/50  8:00 left, of the run about 8:30"  # slower than foretold
    told.after(500, "stages", 2, 7, now="measure", this_s=20.0, later_s=0.0)
    assert told.after(50, "measure", 1, 9) == "measure: 1/9"  # longer than foretold
    assert told.after(1, "stages", 7, 7) == "stages: 7/7  done in 11:25"


def test_stages_are_never_extrapolated_from_each_other(told: Told) -> None:
    told.after(0, "stages", 0, 7, now="plan")
    assert told.after(9999, "stages", 2, 7, now="recover") == "stages: 2/7  now recover"


def test_quiet_gives_no_progress_at_all() -> None:
    with progress.progress_on_stderr(quiet=True) as show:
        assert show is None


def test_a_stage_that_starts_over_is_timed_from_its_new_beginning(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two builds of three blocks, ten seconds each: the first line of either says twenty seconds left."""
    clock = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    show = progress.Lines()
    for _ in range(2):
        for done in (1, 2, 3):
            clock[0] += 10
            show("build", done, 3)
    said = capsys.readouterr().err.splitlines()
    assert said == ["build: 1/3  0:20 left", "build: 2/3  0:10 left", "build: 3/3  done in 0:30"] * 2


@pytest.mark.parametrize("terminal", [False, True])
def test_names_of_stages_are_no_markup(
    terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    with progress.progress_on_stderr(quiet=False) as show:
        assert show is not None
        show("[/] [bold]a\x1b[31m", 1, 2, name="[/]\x9b")
    said = capsys.readouterr().err
    assert "[/] [bold]a\\x1b[31m" in said
    assert "[/]\\x9b" in said
