"""What comes from outside: shown safely, quoted for a shell; JSON and numbers within bounds."""

import json
import math
import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitrim.errors import VitrimError
from vitrim.foreign import command, number, one_line, parse_json, printable, read_json

ANY_NAME = st.text(st.characters(exclude_characters="\0", exclude_categories=[]), min_size=1, max_size=12)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("cat[bold]/[/].jpg", "cat[bold]/[/].jpg"),
        ("a\x1b[31mb", "a\\x1b[31mb"),
        ("\x9b31m", "\\x9b31m"),
        ("one\ntwo\r", "one\\ntwo\\r"),
        ("gpj\u202e.exe", "gpj\\u202e.exe"),
        ("\udcff.jpg", "\\udcff.jpg"),
        ("日本\u3000語 é 👩\u200d👧", "日本\u3000語 é 👩\u200d👧"),
        ("C:\\new", "C:\\new"),
    ],
)
def test_what_a_terminal_would_obey_is_shown_as_an_escape(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_a_stream_without_unicode_gets_escapes() -> None:
    assert printable("é 日", ascii_only=True) == "\\xe9 \\u65e5"


def test_a_message_over_several_lines_becomes_one() -> None:
    assert one_line("Error(s):\n\tsize mismatch\n") == "Error(s): size mismatch"


@given(ANY_NAME)
def test_whatever_is_printed_is_one_line_in_utf8_without_control_bytes(name: str) -> None:
    shown = printable(name)
    assert shown.encode()
    assert len(shown.splitlines()) == 1
    assert not any(ord(char) < 32 or 127 <= ord(char) < 160 or "\u202a" <= char <= "\u202e" for char in shown)


@pytest.mark.parametrize(
    "name", ["plain", "two words", "$(touch x)", "it's", "; rm -rf /", "a\nb", "\x1b[31m'\\", "\udcff", "é\u202e"]
)
def test_a_printed_command_is_read_back_by_a_shell_as_the_same_words(name: str, tmp_path: Path) -> None:
    said = command("printf", "%s", name)
    assert printable(said) == said
    done = subprocess.run(["bash", "-c", said], capture_output=True, check=True, cwd=tmp_path)
    assert done.stdout == name.encode("utf-8", "surrogateescape")
    assert not list(tmp_path.iterdir())


class Wrong(VitrimError):
    """What the readers are told to raise."""


def parsed(text: str | bytes, *, finite: bool = True) -> object:
    return parse_json(text, named="x.json:", error=Wrong, mend="Write it again.", finite=finite)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "is not JSON"),
        ("{'a': 1}", "is not JSON"),
        (b"\xff\xfe\xfa", "is not JSON"),
        ('{"a": NaN}', "NaN is no number of JSON"),
        ("[-Infinity]", "-Infinity is no number of JSON"),
        ("1e999", "the number 1e999 is beyond what a float holds"),
        (str(2**63), "is beyond 64 bits"),
        ("9" * 5000, "99999999... of 5000 digits is beyond 64 bits"),
        ("[" * 101 + "]" * 101, "is nested deeper than 100 levels"),
        ('{"a":' * 10**5 + "1" + "}" * 10**5, "is nested deeper than 100 levels"),
    ],
    ids=range(10),
)
def test_json_that_no_reader_can_take_is_refused_in_one_sentence(text: str | bytes, why: str) -> None:
    with pytest.raises(Wrong) as refused:
        parsed(text)
    assert str(refused.value).startswith("x.json:")
    assert str(refused.value).endswith("Write it again.")
    assert why in str(refused.value)


def test_json_within_the_bounds_is_what_it_says() -> None:
    value = {"a": [1, -2.5, None, True, "é"], "b": {"c": 2**63 - 1}, "d": json.loads("[" * 98 + "]" * 98)}
    assert parsed(json.dumps(value)) == value
    assert math.isnan(parsed("[NaN]", finite=False)[0])  # type: ignore[index]


def test_a_file_that_is_no_object_too_large_or_no_file_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "a.json"

    def refusal() -> str:
        with pytest.raises(Wrong) as refused:
            read_json(place, error=Wrong, mend="Write it again.")
        return str(refused.value)

    assert "cannot be read (No such file or directory)" in refusal()
    place.write_text("[1]")
    assert "holds a list; expected a JSON object" in refusal()
    monkeypatch.setattr("vitrim.foreign.JSON_BYTES", 2)
    assert "has 3 bytes; expected at most 2" in refusal()
    place.unlink()
    os.mkfifo(place)
    assert "is no regular file" in refusal()


@pytest.mark.parametrize(("text", "value"), [("12", 12), (" -3 ", -3), (str(2**63 - 1), 2**63 - 1)])
def test_whole_numbers_are_read(text: str, value: int) -> None:
    assert number(text, int) == value


@pytest.mark.parametrize("text", ["", "1.5", "1e3", "nan", "1_000", "٣", "0x10", str(2**63), "9" * 5000, "None"])
def test_what_is_no_whole_number_of_64_bits_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not a whole number|is beyond 64 bits"):
        number(text, int)


@pytest.mark.parametrize("text", ["", "one", "nan", "inf", "-Infinity", "1e999", "9" * 5000, "1_0"])
def test_what_is_no_finite_number_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not a number|is not finite|is beyond 64 bits"):
        number(text, float)
