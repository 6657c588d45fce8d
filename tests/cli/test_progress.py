"""Progress on stderr."""

import sys

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
