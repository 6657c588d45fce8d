"""What the verbs share: their options, the types of their values, and how those become budgets, lists and devices."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from vitrim.errors import ConfigError, MeasureError, VitrimError, did_you_mean

if TYPE_CHECKING:
    from vitrim.budget import Budget
    from vitrim.model import Vit

Verb = TypeVar("Verb", bound=Callable[..., Any])


class Listed(click.ParamType):
    """A comma-separated list of numbers, each checked: "1,8" -> (1, 8)."""

    def __init__(self, kind: type[int] | type[float], *, low: float, high: float | None = None, open_low: bool = False):
        self.kind, self.low, self.high, self.open_low = kind, low, high, open_low
        self.name = "number[,number...]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        if isinstance(value, tuple):
            return value
        low = f"above {self.low:g}" if self.open_low else f"{self.low:g} or more"
        range_text = low if self.high is None else f"{low} and at most {self.high:g}"
        word = "a whole number" if self.kind is int else "a number"
        numbers: list[float] = []
        for part in str(value).split(","):
            try:
                number = self.kind(part.strip())
            except ValueError:
                self.fail(
                    f"{part.strip()!r} is not {word}; expected numbers separated by commas, as in 1,8.", param, ctx
                )
            inside = number > self.low if self.open_low else number >= self.low
            if not inside or (self.high is not None and number > self.high):
                self.fail(f"{part.strip()} is out of range; expected {word} {range_text}.", param, ctx)
            numbers.append(number)
        return tuple(numbers)


class Named(click.ParamType):
    """One of a few names; a near miss is pointed out."""

    def __init__(self, *names: str):
        self.names = names
        self.name = "|".join(names)

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        """The names as they are typed; click would print them in capitals."""
        return self.name

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if value not in self.names:
            hint = did_you_mean(str(value), self.names) or "."
            self.fail(f"{value!r} is not known; expected one of {', '.join(self.names)}{hint}", param, ctx)
        return str(value)


SHARE = Listed(float, low=0, high=1, open_low=True)
COUNTS = Listed(int, low=1, open_low=False)
POSITIVE = click.FloatRange(min=0, min_open=True)


def stack(*options: Callable[[Verb], Verb]) -> Callable[[Verb], Verb]:
    """Several click options as one decorator, listed in the help in this order."""

    def decorate(verb: Verb) -> Verb:
        for option in reversed(options):
            verb = option(verb)
        return verb

    return decorate


OUTPUT = stack(
    click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout."),
    click.option("--quiet", is_flag=True, help="Show no progress."),
)
DEVICE = click.option("--device", metavar="DEVICE", help="cpu, cuda, cuda:N, mps, or auto (default): the fastest.")
COMPUTE = stack(
    DEVICE,
    click.option("--threads", type=click.IntRange(min=1), help="CPU threads; all by default."),
)
AMP = click.option("--amp", type=Named("no", "bf16", "fp16"), help="Mixed precision; no by default.")
WORKERS = click.option("--workers", type=click.IntRange(min=0), help="Decoding processes; none by default.")
SEED = click.option("--seed", type=click.IntRange(min=0), help="Of every random draw; 0 by default.")
SOURCE = stack(
    click.option(
        "--checkpoint", type=click.Path(path_type=Path), help="Weights for a named model: .safetensors, .pth, .pt."
    ),
    click.option("--no-pretrained", is_flag=True, help="Random weights instead of the published ones."),
    click.option("--no-verify", is_flag=True, help="Do not compare with the source's own network on a random image."),
)
FORCE = click.option("--force", is_flag=True, help="Replace what is already at --out.")
DATA = click.option("--data", metavar="DATA", help="Images; the built-in sample for built-in models.")
BUDGET = stack(
    click.option("--keep-macs", type=SHARE, metavar="SHARE", help="Share of the MACs to keep, in (0, 1]."),
    click.option("--keep-params", type=SHARE, metavar="SHARE", help="Share of the parameters to keep, in (0, 1]."),
    click.option("--max-macs", type=click.IntRange(min=1), help="At most so many MACs, at batch 1."),
    click.option("--max-params", type=click.IntRange(min=1), help="At most so many parameters."),
    click.option("--max-memory-mb", type=POSITIVE, help="At most so much resident weights plus activations."),
    click.option("--max-file-mb", type=POSITIVE, help="At most such a file."),
)
TRAINING = stack(
    click.option("--epochs", type=POSITIVE, help="Passes over the training images."),
    click.option("--steps", type=click.IntRange(min=1), help="Optimiser steps, instead of epochs."),
    click.option("--batch-size", type=click.IntRange(min=1), help="Images of one step."),
    click.option("--lr", type=POSITIVE, help="Learning rate at the top of the schedule."),
)


def data_for(data: str | None, model: str) -> str:
    """The data that was named, or the sample where the model is built in."""
    if data is not None:
        return data
    if model.startswith("builtin:"):
        return "sample"
    raise click.UsageError(
        "--data is missing; pass an image folder, a Parquet file, hf:NAME, or sample (the built-in images)."
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """The budget flags as given; keep_* may hold several values."""

    keep_macs: tuple[float, ...] | None = None
    keep_params: tuple[float, ...] | None = None
    max_macs: int | None = None
    max_params: int | None = None
    max_memory_mb: float | None = None
    max_file_mb: float | None = None

    def __bool__(self) -> bool:
        return any(getattr(self, f.name) is not None for f in fields(self))

    def budgets(self) -> list[Budget]:
        """One budget for each value of the one list given; the other limits hold for all of them."""
        from vitrim.budget import Budget

        fixed: dict[str, Any] = {
            "max_macs": self.max_macs,
            "max_params": self.max_params,
            "max_memory_mb": self.max_memory_mb,
            "max_file_mb": self.max_file_mb,
        }
        if not (self.keep_macs or self.keep_params or any(value is not None for value in fixed.values())):
            raise click.UsageError(
                "no budget was given; pass one, for example --keep-macs 0.5 to halve the operations."
            )
        macs: Sequence[float | None] = self.keep_macs or (None,)
        params: Sequence[float | None] = self.keep_params or (None,)
        if len(macs) > 1 and len(params) > 1:
            raise click.UsageError("--keep-macs and --keep-params are both lists; give a list to one of them only.")
        return [Budget(keep_macs=a, keep_params=b, **fixed) for a in macs for b in params]

    def budget(self) -> Budget:
        """The one budget; several values are a misuse."""
        budgets = self.budgets()
        if len(budgets) > 1:
            raise click.UsageError(
                "several budgets were given; one run takes one. To compare them, use `vitrim plan`; to make them, run once for each."
            )
        return budgets[0]


def device_named(name: str | None) -> str:
    """The device to compute on, checked to be there. auto, or None: cuda, else mps, else cpu."""
    import torch

    name = name or "auto"
    kind = name.split(":")[0]
    kinds = ("auto", "cpu", "cuda", "mps")
    if kind not in kinds:
        hint = did_you_mean(kind, kinds) or "."
        raise MeasureError(f"device {name!r} is not known; expected one of auto, cpu, cuda, cuda:N, mps{hint}")
    has_mps = bool(torch.backends.mps.is_available())
    if kind == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    missing = (kind == "cuda" and not torch.cuda.is_available()) or (kind == "mps" and not has_mps)
    if missing:
        raise MeasureError(
            f"device {name!r} was asked for, but torch finds none here. Pass --device cpu, or install a torch build for it."
        )
    if kind == "cuda" and ":" in name:
        index = name.partition(":")[2]
        if not index.isdigit() or int(index) >= torch.cuda.device_count():
            raise MeasureError(
                f"device {name!r} is not there; expected cuda:0 to cuda:{torch.cuda.device_count() - 1}."
            )
    return name


def use_threads(threads: int | None) -> None:
    """Sets torch's CPU threads for this process."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def load_model(
    name: str, *, checkpoint: Path | None = None, no_pretrained: bool = False, no_verify: bool = False
) -> Vit:
    """A model by name or folder, with the flags that say where its weights come from."""
    if checkpoint is not None and no_pretrained:
        raise click.UsageError("--checkpoint and --no-pretrained contradict each other; pass one of them.")
    from vitrim.sources import load

    return load(name, pretrained=not no_pretrained, checkpoint=checkpoint, verify=not no_verify)


def check_place(folder: Path) -> None:
    """Refuses a folder that the process may not write; the nearest one that exists is asked."""
    nearest = folder
    while not nearest.exists():
        nearest = nearest.parent
    if not nearest.is_dir():
        raise ConfigError(f"--out {str(folder)!r} cannot be made: {str(nearest)!r} is a file. Choose another place.")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigError(
            f"--out {str(folder)!r} cannot be written: no permission in {str(nearest)!r}. Choose another place."
        )


def check_out(out: Path, *, force: bool, resume: bool = False) -> None:
    """Refuses an --out that cannot be used, before any work is done. Creates nothing."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {str(out)!r} is a file; expected a folder, new or empty. Choose another name.")
    if resume and not out.is_dir():
        raise ConfigError(
            f"--resume found no run at {str(out)!r}; expected the folder of a run that was begun. To start one, leave --resume out."
        )
    if out.is_dir() and any(out.iterdir()) and not (force or resume):
        raise ConfigError(
            f"--out {str(out)!r} is not empty. Pass --force to replace it, --resume to go on with it, or another folder."
        )
    check_place(out)


def read_json(path: Path | None) -> dict[str, Any]:
    """The object in a --config file; empty without one. Its keys are checked where they are used."""
    if path is None:
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--config {str(path)!r} cannot be read: {error.strerror}. Expected a JSON file.") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(
            f'--config {str(path)!r} is not JSON ({error}). Expected an object such as {{"seed": 1}}.'
        ) from error
    if not isinstance(values, dict):
        raise ConfigError(
            f'--config {str(path)!r} holds a {type(values).__name__}; expected an object such as {{"seed": 1}}.'
        )
    return values


def section(values: dict[str, Any], name: str) -> dict[str, Any]:
    """One part of a config, as a copy; empty where it is not there."""
    part = values.get(name) or {}
    if not isinstance(part, dict):
        raise ConfigError(f"config: {name!r} holds a {type(part).__name__}; expected an object.")
    return dict(part)


def budget_in(settings: dict[str, Any]) -> Budget | None:
    """The budget of a config's settings; None where explicit ranks stand for it."""
    from vitrim.budget import Budget
    from vitrim.config import read

    values = section(settings, "budget")
    if not values:
        return None if settings.get("ranks") else Limits().budget()
    return read(Budget, values, where="budget")


def check_keys(values: dict[str, Any], known: Sequence[str], *, place: str) -> None:
    """Refuses keys that are not known."""
    for key in values:
        if key not in known:
            hint = did_you_mean(key, known) or "."
            raise ConfigError(f"{place}: unknown key {key!r}; expected some of {', '.join(known)}{hint}")


def given(flags: dict[str, Any]) -> dict[str, Any]:
    """The flags that were passed: those that are not None."""
    return {name: value for name, value in flags.items() if value is not None}


class Failed(click.ClickException):
    """A VitrimError on its way out: one sentence on stderr; exit code 1, or 2 for a misuse."""

    exit_code: int  # type: ignore[misc]  # click calls it a class variable, and reads the instance's

    def __init__(self, error: VitrimError | OSError):
        if isinstance(error, VitrimError):
            message = str(error)
        else:
            place = f" {str(error.filename)!r}" if error.filename else ""
            message = f"cannot read or write{place}: {error.strerror or error}. Check the path, its permissions and the free space."
        super().__init__(message)
        self.exit_code = 2 if isinstance(error, ConfigError) else 1
