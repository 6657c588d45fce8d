"""What comes from outside: shown safely, quoted for a shell."""

import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitrim.foreign import command, one_line, printable

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
