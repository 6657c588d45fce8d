"""The processes of one run, as torchrun counts them in the environment, and how many threads each may have. Standard
library only."""

from __future__ import annotations

import os

from .errors import ConfigError


def count() -> int:
    """How many processes torchrun started; 1 without it. Raises ConfigError where the environment says nonsense."""
    return _number("WORLD_SIZE", default=1, least=1)


def count_here() -> int:
    """How many of them run on this machine."""
    return _number("LOCAL_WORLD_SIZE", default=count(), least=1)


def not_told() -> list[str]:
    """What torchrun would have set beside, and is not there: without it processes wait for each other in vain."""
    return [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]


def index() -> int:
    """Which of them this is, from 0: alone, the first, whatever else the environment says. Raises ConfigError."""
    return _number("RANK", default=0, least=0) if count() > 1 else 0


def is_first() -> bool:
    """Whether this is the one that writes and prints."""
    return index() == 0


def refuse_threads(threads: int | None) -> None:
    """Raise ConfigError for more threads than a machine can start: that ends the process without a word.

    Four for each processor are allowed, and 64 anywhere.
    """
    most = max(64, 4 * (os.cpu_count() or 1))
    if threads is not None and not 1 <= threads <= most:
        raise ConfigError(
            f"threads={threads}: expected 1 to {most} on this machine, which has {os.cpu_count()} processors. "
            "More than one for each makes nothing faster."
        )


def _number(name: str, *, default: int, least: int) -> int:
    text = os.environ.get(name, str(default))
    if not (text.isascii() and text.isdigit()) or int(text) < least:
        raise ConfigError(
            f"the environment says {name}={text!r}; expected a whole number from {least}, as torchrun sets it. "
            "Start by torchrun, or unset it."
        )
    return int(text)
