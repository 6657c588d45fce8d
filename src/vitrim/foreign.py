"""What comes from outside: names that are printed, commands that carry them, JSON, numbers. Standard library only.

A file name, a class name, a tensor's name or a key of somebody's JSON may hold anything. Whoever prints one passes it
through `printable`, so that it neither colours a terminal, moves its cursor, forges a line nor turns the text around.
All JSON is read by `parse_json` and `read_json`, all numbers that are typed by `number`: what they let through is finite,
fits 64 bits, and is nested no deeper than recursion goes. Whatever else there is, is refused in one sentence.
"""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import stat
import unicodedata
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

from .errors import VitrimError

Real = TypeVar("Real", int, float)

JSON_BYTES = 64 << 20
"""Most that a JSON file may hold: selections and samples of the largest models take a few megabytes."""
JSON_DEPTH = 100
"""Most levels of lists and objects; ours have about ten."""
MOST = 2**63 - 1
"""The largest whole number: what a signed integer of 64 bits holds, as torch and Parquet have it."""

_JOINERS = "\u200c\u200d"  # of Persian, of Indian scripts and of emoji: they hide nothing


def printable(text: object, *, ascii_only: bool = False) -> str:
    r"""A text as one line that a terminal shows as it is: control bytes, line ends, bidi marks and broken UTF-8 as escapes.

    >>> print(printable("cat\x1b[31m.jpg"))
    cat\x1b[31m.jpg

    ascii_only: for a stream that can say no more.
    """
    whole = str(text)
    if whole.isascii() and whole.isprintable():
        return whole
    return "".join(char if _shows(char) and not (ascii_only and char > "\x7e") else _escape(char) for char in whole)


def one_line(text: object) -> str:
    """The same for a message that another library wrote over several lines: they are joined by spaces."""
    return printable(re.sub(r"\s*[\r\n]+\s*", " ", str(text).strip()))


def command(*words: str | PathLike[str]) -> str:
    """A command to copy from the terminal into a shell: each word quoted where a shell would take it apart."""
    return " ".join(_quoted(os.fspath(word)) for word in words)


def _quoted(word: str) -> str:
    if printable(word) == word:
        return shlex.quote(word)
    plain = (char if _shows(char) and char not in "'\\" else _bytes(char) for char in word)
    return f"$'{''.join(plain)}'"  # what bash and zsh read back as the same bytes


def _bytes(char: str) -> str:
    return "".join(f"\\x{byte:02x}" for byte in os.fsencode(char))


def _shows(char: str) -> bool:
    return char.isprintable() or unicodedata.category(char) == "Zs" or char in _JOINERS


def _escape(char: str) -> str:
    return char.encode("unicode_escape", "surrogatepass").decode("ascii")


# ---------------------------------------------------------------------------------------------------------------- numbers


def is_finite(value: object) -> bool:
    """Whether a value is a number that arithmetic can take: no bool, NaN or infinity, no integer beyond 64 bits."""
    if isinstance(value, int):
        return not isinstance(value, bool) and -MOST <= value <= MOST
    return isinstance(value, float) and math.isfinite(value)


def number(text: Any, kind: type[Real]) -> Real:
    """A number as it was typed. Raises ValueError, which says what it is not: "'1e999' is not finite"."""
    word = "a whole number" if kind is int else "a number"
    shown = repr(text) if len(str(text)) <= 40 else f"{str(text)[:20]!r}... ({len(str(text))} characters)"
    if isinstance(text, str) and ("_" in text or not text.isascii()):
        raise ValueError(f"{shown} is not {word}")  # Python's own spelling, which no other program reads
    try:
        value = kind(text)
    except OverflowError:
        raise ValueError(f"{shown} is beyond 64 bits") from None
    except (ValueError, TypeError):
        long = isinstance(text, str) and text.strip().lstrip("+-").isdigit()
        raise ValueError(f"{shown} is beyond 64 bits" if long else f"{shown} is not {word}") from None
    if not is_finite(value):
        raise ValueError(f"{shown} is beyond 64 bits" if kind is int else f"{shown} is not finite")
    return value


# ------------------------------------------------------------------------------------------------------------------- JSON


def parse_json(text: str | bytes, *, named: str, error: type[VitrimError], mend: str, finite: bool = True) -> Any:
    """The value of a JSON text.

    named: what it is, as the sentence begins: "FILE:" or "--config FILE".  mend: how the sentence ends.
    finite: refuse NaN and Infinity, which are no JSON; False for what a training wrote of its own losses.
    """

    def real(digits: str) -> float:
        if not math.isfinite(value := float(digits)):
            raise ValueError(f"the number {_short(digits)} is beyond what a float holds")
        return value

    def whole(digits: str) -> int:
        if len(digits) > 20 or not is_finite(value := int(digits)):
            raise ValueError(f"the number {_short(digits)} is beyond 64 bits")
        return value

    def constant(name: str) -> float:
        if finite:
            raise ValueError(f"{name} is no number of JSON")
        return float(name)

    try:
        value = json.loads(text, parse_float=real, parse_int=whole, parse_constant=constant)
    except RecursionError:
        raise error(f"{named} is nested deeper than {JSON_DEPTH} levels. {mend}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as wrong:
        raise error(f"{named} is not JSON ({wrong}). {mend}") from None
    except ValueError as wrong:
        raise error(f"{named} is not read: {wrong}. {mend}") from None
    if _deeper(value, JSON_DEPTH):
        raise error(f"{named} is nested deeper than {JSON_DEPTH} levels. {mend}")
    return value


def read_json(
    path: Path, *, error: type[VitrimError], mend: str, named: str | None = None, finite: bool = True
) -> dict[str, Any]:
    """The object in a JSON file. named: how a sentence about it begins, "FILE:" where it is None."""
    named = f"{path}:" if named is None else named
    try:
        state = path.stat()
        if not stat.S_ISREG(state.st_mode):
            raise error(f"{named} is no regular file. {mend}")
        if state.st_size > JSON_BYTES:
            raise error(f"{named} has {state.st_size} bytes; expected at most {JSON_BYTES}. {mend}")
        text = path.read_bytes()
    except OSError as wrong:
        raise error(f"{named} cannot be read ({wrong.strerror or wrong}). {mend}") from wrong
    value = parse_json(text, named=named, error=error, mend=mend, finite=finite)
    if not isinstance(value, dict):
        raise error(f"{named} holds a {type(value).__name__}; expected a JSON object. {mend}")
    return value


def _short(digits: str) -> str:
    return digits if len(digits) <= 24 else f"{digits[:8]}... of {len(digits)} digits"


def _deeper(value: Any, levels: int) -> bool:
    """Whether lists and objects lie within each other more than so many times; asked without recursion."""
    level = [value]
    for _ in range(levels):
        level = [
            inner
            for held in level
            if isinstance(held, dict | list)
            for inner in (held.values() if isinstance(held, dict) else held)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return False
    return True
