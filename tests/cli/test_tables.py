"""Tables and numbers for people."""

import json
from functools import partial

import pytest

from tests.cli.kit import DEIT_S, run
from vitrim.cli import progress, tables
from vitrim.foreign import printable


def test_no_color_is_honoured() -> None:
    assert "\x1b[" not in run("cost", DEIT_S, env={"NO_COLOR": "1", "FORCE_COLOR": "1"}).stdout.replace(
        "\x1b[1m", ""
    ).replace("\x1b[0m", "")


def test_counts_are_scaled_for_people() -> None:
    assert tables.count_text(4_598_882_304) == "4.599 G"
    assert tables.count_text(22_050_664) == "22.05 M"
    assert tables.share_text(1, 2) == "50.0 %"
    assert progress.duration_text(3661) == "1:01:01"


HOSTILE = "[/] [bold]:smile: \x1b[31m\u202e\udcff"
SHOWN = "[/] [bold]:smile: \\x1b[31m\\u202e\\udcff"


def test_markup_and_control_bytes_in_a_table_are_shown_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    tables.show_table(HOSTILE, ["name"], [[HOSTILE]])
    assert capsys.readouterr().out.count(SHOWN) == 2


def test_json_holds_foreign_names_without_a_byte_that_a_terminal_obeys(capsys: pytest.CaptureFixture[str]) -> None:
    tables.show_json({HOSTILE: ["\x9b", "\U000e0041", "é"]})
    said = capsys.readouterr().out
    assert json.loads(said) == {HOSTILE: ["\x9b", "\U000e0041", "é"]}
    assert "é" in said
    assert all(printable(line) == line for line in said.splitlines())


def test_a_long_title_is_not_broken_to_the_width_of_its_table(capsys: pytest.CaptureFixture[str]) -> None:
    title = "a long path/" * 20 + "cat.jpg"
    tables.show_table(title, ["class"], [["cat"]])
    assert capsys.readouterr().out.splitlines()[0] == title


@pytest.mark.parametrize("columns", ["1", "30", "80"])
def test_a_narrow_terminal_takes_no_number_apart_and_drops_none(
    columns: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setattr(tables, "console", partial(tables.console, force_terminal=True))
    heads = [f"column {i}" for i in range(9)]
    tables.show_table("cost", heads, [["stem", *(f"26.{i:02d} k" for i in range(8))]])
    tables.show_table("settings", ["name", "what"], [["a_setting", "some words about it " * 9]], text=True)
    said = capsys.readouterr().out
    assert all(f"26.{i:02d} k" in said for i in range(8))
    assert "a_setting" in said
    assert {"some", "words", "about"} <= set(said.split())


def test_a_row_may_end_early(capsys: pytest.CaptureFixture[str]) -> None:
    tables.show_table("t", ["a", "b"], [["1"], ["2", "3"]])
    assert capsys.readouterr().out.split()[-3:] == ["1", "2", "3"]


def test_a_stream_that_is_closed_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout", None)
    tables.say("é")
    tables.show_json({"é": 1})
    tables.show_table("é", ["name"], [["é"]])
