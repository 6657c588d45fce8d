"""The command `vitrim`: parse, call, print. Each verb is a few lines; the work is elsewhere.

Exit codes: 0 done, 1 failed, 2 misuse. Results go to stdout, progress and errors to stderr.
Neither help, nor `cost` of a name or a folder, nor a usage error imports torch.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import click

from vitrim import __version__, processes
from vitrim.cli import options, tables
from vitrim.cli.options import Failed
from vitrim.errors import CapacityError, VitrimError, did_you_mean, is_out_of_memory
from vitrim.files import names_in
from vitrim.foreign import one_line

VERBS = (
    "cost", "methods", "plan", "compress", "recover", "train", "evaluate", "predict", "measure", "report", "export", "push",
    "doctor", "demo",
)  # fmt: skip
"""In the order of the work; each is a function of a module of that name, which is imported when it is asked for."""

SHARED = ("train", "recover")
"""Verbs that several processes may run together."""


class Verbs(click.Group):
    """The group of all verbs: in the order of the work, with near misses, and with one sentence for each failure."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return getattr(import_module(f"vitrim.cli.{cmd_name}"), cmd_name) if cmd_name in VERBS else None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if not name.startswith("-") and self.get_command(ctx, name) is None and not ctx.resilient_parsing:
            hint = did_you_mean(name, VERBS) or "."
            ctx.fail(f"no such verb {name!r}; expected one of {', '.join(VERBS)}{hint}")
        if name not in SHARED and processes.count() > 1:
            ctx.fail(
                f"{name} runs in one process, and torchrun started {processes.count()}; expected one of {', '.join(SHARED)}, "
                "whose training shares its batches. Start it without torchrun."
            )
        return super().resolve_command(ctx, args)

    def make_context(self, *args: Any, **extra: Any) -> click.Context:
        with _in_one_sentence():
            return super().make_context(*args, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        with _in_one_sentence(), _said_on_stderr(), _ended_by_signals():
            try:
                return super().invoke(ctx)
            except (KeyboardInterrupt, Terminated):
                if (place := ctx.meta.get(options.RESUMABLE)) is not None and names_in(place):
                    tables.note(f"stopped; the same command with --resume (and without --force) goes on from {place}")
                raise


@contextmanager
def _in_one_sentence() -> Iterator[None]:
    """Whatever goes wrong leaves as click's own exception, with one line that a terminal shows as it is."""
    try:
        yield
    except click.ClickException as error:
        error.message = one_line(error.message)  # type: ignore[misc]  # shown by click, which takes any text
        raise
    except BrokenPipeError:  # the reader of our output went away; click leaves quietly
        raise
    except (VitrimError, OSError) as error:
        raise Failed(error) from error
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise Failed(
            CapacityError(
                "out of memory; take fewer images at a time, a smaller model, or another device (--device cpu)."
            )
        ) from error


class Terminated(SystemExit):
    """The system asked the process to end."""


REMIND_S = 1.0
"""How long an end that was asked for may not have begun."""


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP end a run as an error would: scratch folders, locks and workers go with it.

    The exception may be lost where Python discards one, as in a destructor; so it is raised anew until it ends the run. A second
    signal from outside ends the process at once.
    """
    asked, reminded, over = (threading.Event() for _ in range(3))

    def remind(number: int) -> None:
        while not over.wait(REMIND_S):
            reminded.set()
            os.kill(os.getpid(), number)

    def end(number: int, _: Any) -> None:
        if asked.is_set() and not reminded.is_set():
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        reminded.clear()
        if _is_ending():
            return
        if not asked.is_set():
            asked.set()
            threading.Thread(target=remind, args=(number,), daemon=True).start()
        raise Terminated(128 + number)

    told = sys.unraisablehook

    def unraisable(lost: sys.UnraisableHookArgs) -> None:
        if not isinstance(lost.exc_value, Terminated):  # that one comes again
            told(lost)

    kept = {}
    if threading.current_thread() is threading.main_thread():
        sys.unraisablehook = unraisable
        for name in ("SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) is signal.SIG_DFL:
                kept[number] = signal.signal(number, end)
    try:
        yield
    finally:
        over.set()
        if sys.unraisablehook is unraisable:
            sys.unraisablehook = told
        for number, before in kept.items():
            signal.signal(number, signal.SIG_IGN if asked.is_set() else before)  # a late reminder does no harm


def _is_ending() -> bool:
    """Whether the exception of a signal is on its way already: what cleans up behind it is left alone."""
    error = sys.exc_info()[1]
    while error is not None and not isinstance(error, Terminated):
        error = error.__context__
    return error is not None


class _Said(logging.Handler):
    """What the package logs, as a line on stderr; once, though data is opened anew for each split."""

    def __init__(self) -> None:
        super().__init__()
        self.said: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        if (text := record.getMessage()) not in self.said:
            self.said.add(text)
            tables.note(text)


@contextmanager
def _said_on_stderr() -> Iterator[None]:
    """Shows what the package says beside its results, such as which classifier was kept; the caller's logging stays."""
    logger, handler = logging.getLogger("vitrim"), _Said()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO if processes.is_first() else logging.ERROR)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="vitrim")
def main() -> None:
    """Compress Vision Transformers to a budget, recover them, and hand over ordinary networks.

    MODEL is timm:NAME, hf:NAME (transformers), torchvision:NAME, t2t:NAME, hf-hub:NAME, builtin:NAME, a folder that vitrim
    saved, or USER/NAME on the Hugging Face Hub.
    DATA is an image folder, a Parquet file or folder of shards, hf:NAME, or sample (built in).

    First steps: vitrim demo; vitrim cost timm:deit_small_patch16_224.
    """
