"""What comes from outside: names and texts that are printed, and commands that carry them. Standard library only.

A file name, a class name, a tensor's name or a key of somebody's JSON may hold anything. Whoever prints one passes it
through `printable`, so that it neither colours a terminal, moves its cursor, forges a line nor turns the text around.
"""

from __future__ import annotations

import os
import re
import shlex
import unicodedata
from os import PathLike

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
