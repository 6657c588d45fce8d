"""What long work calls as it goes. Standard library only."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called with the stage, how much of it is done, and facts such as the current loss."""

    def __call__(self, stage: str, done: int, total: int, **facts: object) -> None: ...
