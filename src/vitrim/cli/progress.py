"""Progress on stderr: bars with the time left on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from vitrim.cli import tables
from vitrim.foreign import printable

if TYPE_CHECKING:
    from rich.progress import Progress as Drawn
    from rich.progress import TaskID

    from vitrim.progress import Progress


LINE_SECONDS = 5.0
"""Between two lines where there is no terminal."""


HIDDEN = ("seconds_left", "epoch", "phase", "lr", "grad_norm", "this_s", "later_s")
"""Facts that stand in metrics.jsonl, or are said otherwise, and would only crowd the line."""

RUN = "stages"
"""The phase that counts the stages of a run, which are unlike each other: what is left of it is forecast, never extrapolated."""

FEW = 8
"""Parts of a phase up to which the first one tells of the others. The first of many compiles, opens and warms."""


def facts_text(facts: dict[str, Any]) -> str:
    """Facts in a few characters: {"loss": 0.51234} -> "loss 0.5123"."""
    facts = {key: value for key, value in facts.items() if key not in HIDDEN}
    return "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in facts.items() if v is not None)


def duration_text(seconds: float) -> str:
    """Seconds for people: 75 -> "1:15"."""
    whole = round(seconds)
    hours, minutes = whole // 3600, whole % 3600 // 60
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


class Times(NamedTuple):
    """Seconds. begins: whether a phase begins, or starts over. left, run: of the phase and of the run; None: nobody can say."""

    begins: bool
    spent: float
    left: float | None
    run: float | None


class Clock:
    """What each phase has taken and has left, and the run that it belongs to."""

    def __init__(self) -> None:
        self.began: dict[str, float] = {}
        self.first: dict[str, tuple[float, int]] = {}
        self.done: dict[str, int] = {}
        self.last = time.monotonic()
        self.stage, self.stage_began = "", self.last
        self.this_s: float | None = None
        self.later_s: float | None = None

    def at(self, phase: str, done: int, total: int, facts: dict[str, Any]) -> Times:
        """The times of a phase of which so much is done."""
        now = time.monotonic()
        begins = done < self.done.get(phase, done + 1)
        if begins:
            self.began[phase] = self.last if done else now  # what is done already took the time since the last word
            self.first.pop(phase, None)
        self.done[phase], self.last = done, now
        if done:
            self.first.setdefault(phase, (now, done))
        if phase == RUN:
            self.stage, self.stage_began = str(facts.get("now", "")), now
            self.this_s, self.later_s = facts.get("this_s"), facts.get("later_s")
        left = None if phase == RUN else self._left(phase, now, done, total)
        return Times(begins, now - self.began[phase], left, self._run(phase, now, left))

    def _left(self, phase: str, now: float, done: int, total: int) -> float | None:
        since, before = (self.began[phase], 0) if total <= FEW else self.first.get(phase, (now, done))
        return (now - since) / (done - before) * (total - done) if done > before else None

    def _run(self, phase: str, now: float, left: float | None) -> float | None:
        """A recovery is as long as its training, whose steps tell more than the forecast."""
        if self.later_s is None:
            return None
        if self.stage == "recover" and phase == "train" and left is not None:
            return left + self.later_s
        here = None if self.this_s is None else self.this_s - (now - self.stage_began)
        return None if here is None or here < 0 else here + self.later_s  # longer than foretold: nobody can say

    def text(self, phase: str, times: Times) -> str:
        """What is left, in words; empty where nobody can say."""
        own = "" if times.left is None else f"{duration_text(times.left)} left"
        if phase == RUN:
            if times.run is not None:
                return f"about {duration_text(times.run)} left"
            return f"then about {duration_text(self.later_s)}" if self.later_s else ""
        run = "" if times.run is None else f"of the run about {duration_text(times.run)}"
        return ", ".join(part for part in (own, run) if part)


class Bars:
    """One bar for each phase, drawn by rich."""

    def __init__(self, progress: Drawn):
        self.progress = progress
        self.tasks: dict[str, TaskID] = {}
        self.clock = Clock()

    def __call__(self, stage: str, done: int, total: int, **facts: Any) -> None:
        times = self.clock.at(stage, done, total, facts)
        left = self.clock.text(stage, times) if done < total else ""
        if stage not in self.tasks:
            self.tasks[stage] = self.progress.add_task(printable(stage), total=total, facts="", left="")
        elif times.begins:
            self.progress.reset(self.tasks[stage], total=total)
        self.progress.update(
            self.tasks[stage], completed=done, total=total, facts=printable(facts_text(facts)), left=left
        )


class Lines:
    """A line when a phase begins and ends, and every few seconds between."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.printed: dict[str, float] = {}
        self.finished: set[str] = set()

    def __call__(self, stage: str, done: int, total: int, **facts: Any) -> None:
        times, now = self.clock.at(stage, done, total, facts), self.clock.last
        whole = total > 0 and done >= total
        if whole and stage in self.finished and not times.begins:
            return
        if whole:
            self.finished.add(stage)
        else:
            self.finished.discard(stage)
            if not (times.begins or stage == RUN) and now - self.printed[stage] < LINE_SECONDS:
                return
        self.printed[stage] = now
        said = f"done in {duration_text(times.spent)}" if whole else self.clock.text(stage, times)
        told = [facts_text(facts), said] if stage == RUN else [said, facts_text(facts)]
        parts = [f"{stage}: {done}/{total}", *told]
        tables.note("  ".join(part for part in parts if part))


@contextmanager
def progress_on_stderr(quiet: bool) -> Iterator[Progress | None]:
    """Gives the callable for long work; None when quiet."""
    if quiet:
        yield None
    elif not sys.stderr.isatty():
        yield Lines()
    else:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Drawn

        columns = (
            TextColumn("{task.description:<10}", markup=False),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            TextColumn("{task.fields[facts]}", markup=False),
        )
        with Drawn(*columns, console=tables.console(stderr=True)) as progress:
            yield Bars(progress)
