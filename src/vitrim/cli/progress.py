"""Progress on stderr: bars with the time left on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from vitrim.cli import tables
from vitrim.foreign import printable

if TYPE_CHECKING:
    from rich.progress import Progress as Drawn
    from rich.progress import TaskID

    from vitrim.progress import Progress


LINE_SECONDS = 5.0
"""Between two lines where there is no terminal."""


HIDDEN = ("seconds_left", "epoch", "phase", "lr", "grad_norm")
"""Facts that stand in metrics.jsonl and would only crowd the line."""


def facts_text(facts: dict[str, Any]) -> str:
    """Facts in a few characters: {"loss": 0.51234} -> "loss 0.5123"."""
    facts = {key: value for key, value in facts.items() if key not in HIDDEN}
    return "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in facts.items() if v is not None)


def duration_text(seconds: float) -> str:
    """Seconds for people: 75 -> "1:15"."""
    whole = round(seconds)
    hours, minutes = whole // 3600, whole % 3600 // 60
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


class Bars:
    """One bar for each stage, drawn by rich."""

    def __init__(self, progress: Drawn):
        self.progress = progress
        self.tasks: dict[str, TaskID] = {}

    def __call__(self, stage: str, done: int, total: int, **facts: Any) -> None:
        if stage not in self.tasks:
            self.tasks[stage] = self.progress.add_task(printable(stage), total=total, facts="")
        elif done < self.progress.tasks[self.tasks[stage]].completed:  # the stage starts over, such as the next build
            self.progress.reset(self.tasks[stage], total=total)
        self.progress.update(self.tasks[stage], completed=done, total=total, facts=printable(facts_text(facts)))


class Lines:
    """A line when a stage begins and ends, and every few seconds between."""

    def __init__(self) -> None:
        self.started: dict[str, float] = {}
        self.done: dict[str, int] = {}
        self.last = time.monotonic()
        self.printed: dict[str, float] = {}
        self.finished: set[str] = set()

    def __call__(self, stage: str, done: int, total: int, **facts: Any) -> None:
        now = time.monotonic()
        if done < self.done.get(stage, 0):  # the stage starts over, such as the next build
            del self.started[stage]
            self.printed.pop(stage, None)
        begun = self.started.setdefault(stage, self.last if done else now)  # its first part took the time since then
        self.done[stage], self.last = done, now
        whole = total > 0 and done >= total
        if whole and stage in self.finished:
            return
        if not whole:
            self.finished.discard(stage)
            if now - self.printed.get(stage, float("-inf")) < LINE_SECONDS:
                return
        else:
            self.finished.add(stage)
        self.printed[stage] = now
        spent = now - begun
        if whole:
            left = f"done in {duration_text(spent)}"
        else:
            left = f"{duration_text(spent / done * (total - done))} left" if done and total else ""
        parts = [f"{stage}: {done}/{total}", left, facts_text(facts)]
        tables.note("  ".join(part for part in parts if part))


@contextmanager
def progress_on_stderr(quiet: bool) -> Iterator[Progress | None]:
    """Gives the callable for long work; None when quiet."""
    if quiet:
        yield None
    elif not sys.stderr.isatty():
        yield Lines()
    else:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Drawn

        columns = (
            TextColumn("{task.description:<10}", markup=False),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn("{task.fields[facts]}", markup=False),
        )
        with Drawn(*columns, console=tables.console(stderr=True)) as progress:
            yield Bars(progress)
