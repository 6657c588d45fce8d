"""What the verbs share: their options, the types of their values, and how those become budgets, lists and devices."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click

from vitrim import processes
from vitrim.cli import tables
from vitrim.errors import ConfigError, MeasureError, VitrimError, did_you_mean
from vitrim.files import names_in, refuse_locked
from vitrim.foreign import MOST, number, one_line
from vitrim.foreign import read_json as reading

if TYPE_CHECKING:
    from vitrim.budget import Budget
    from vitrim.model import Vit

RESUMABLE = "vitrim.resumable"
"""Where a click context keeps the folder that --resume would go on in."""
Verb = TypeVar("Verb", bound=Callable[..., Any])


class Number(click.ParamType):  # type: ignore[type-arg]
    """A finite number of 64 bits within bounds.  above: an open lower bound, in place of the closed one `least`."""

    def __init__(
        self, kind: type[int] | type[float], *, least: float = -MOST, above: float | None = None, most: float = MOST
    ):
        self.kind, self.least, self.above, self.most = kind, least, above, most
        self.name = "integer" if kind is int else "number"
        low = f"above {above:g}" if above is not None else f"{least:g} or more"
        bounds = low if most == MOST else f"{low} and at most {most:,}"
        self.wanted = f"{'a whole number' if kind is int else 'a number'}, {bounds}"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            return self.read(value)
        except ValueError as error:
            self.fail(f"{error}.", param, ctx)

    def read(self, value: Any) -> float:
        """The number. Raises ValueError with what was expected."""
        try:
            found: float = number(value, self.kind)
        except ValueError as error:
            raise ValueError(f"{error}; expected {self.wanted}") from None
        if found < self.least or found > self.most or (self.above is not None and found <= self.above):
            raise ValueError(f"{value} is out of range; expected {self.wanted}")
        return found


class Listed(click.ParamType):  # type: ignore[type-arg]
    """A comma-separated list of numbers, each checked: "1,8" -> (1, 8)."""

    name = "number[,number...]"

    def __init__(self, each: Number, example: str = "1,8"):
        self.each, self.example = each, example

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(self.each.read(part.strip()) for part in str(value).split(","))
        except ValueError as error:
            self.fail(f"{error}; several with commas between, as in {self.example}.", param, ctx)


class Named(click.ParamType):  # type: ignore[type-arg]
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


class Place(click.Path):
    """A file or folder; no text at all, as a shell makes of a variable that is not set, is none."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "":
            self.fail("it is empty; expected the name of a file or folder.", param, ctx)
        return super().convert(value, param, ctx)


PLACE = Place(path_type=Path)
COUNT = Number(int, least=1)
COUNT_OR_NONE = Number(int, least=0)
POSITIVE = Number(float, above=0)
MEGABYTES = Number(float, above=0, most=MOST // 10**6)


class Sides(click.ParamType):  # type: ignore[type-arg]
    """Height and width in pixels, or one number for both: "224" or "224,448" -> (224, 448)."""

    name = "PX[,PX]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        found = value if isinstance(value, tuple) else COUNTS.convert(value, param, ctx)
        if len(found) > 2:
            self.fail(f"{value!r} is more than height and width; expected 224, or 224,448.", param, ctx)
        return int(found[0]), int(found[-1])


SHARE = Listed(Number(float, above=0, most=1), "0.5,0.3")
COUNTS = Listed(COUNT)


def stack(*options: Callable[[Verb], Verb]) -> Callable[[Verb], Verb]:
    """Several click options as one decorator, listed in the help in this order."""

    def decorate(verb: Verb) -> Verb:
        for option in reversed(options):
            verb = option(verb)
        return verb

    return decorate


def bundle(name: str, kind: type, *options: Callable[[Verb], Verb]) -> Callable[[Verb], Verb]:
    """The same, of whose values the verb gets one dataclass, as `name`."""

    def decorate(verb: Verb) -> Verb:
        @wraps(verb)
        def call(**flags: Any) -> Any:
            own = {field.name: flags.pop(field.name) for field in fields(kind)}
            return verb(**flags, **{name: kind(**own)})

        return stack(*options)(cast("Verb", call))

    return decorate


@dataclass(frozen=True, kw_only=True)
class Output:
    """How a verb tells its result."""

    as_json: bool
    quiet: bool

    def tell(self, value: Any, *lines: str) -> None:
        """The result on stdout: the value as JSON, or the lines. Of several processes the first tells it."""
        if not processes.is_first():
            return
        if self.as_json:
            tables.show_json(value)
        else:
            for line in lines:
                tables.say(line)


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Where a model's weights come from."""

    checkpoint: Path | None = None
    checkpoint_key: str | None = None
    no_pretrained: bool = False
    no_verify: bool = False

    def load(self, name: str, image_px: tuple[int, int] | None = None) -> Vit:
        """A model by name or folder, at the size asked for or its own."""
        if self.checkpoint is not None and self.no_pretrained:
            raise click.UsageError("--checkpoint and --no-pretrained contradict each other; pass one of them.")
        if self.checkpoint_key is not None and self.checkpoint is None:
            raise click.UsageError(
                "--checkpoint-key says which weights of a file are meant; pass --checkpoint PATH too."
            )
        from vitrim.sources import load

        return load(
            name,
            pretrained=not self.no_pretrained,
            checkpoint=self.checkpoint,
            checkpoint_key=self.checkpoint_key,
            image_px=image_px,
            verify=not self.no_verify,
        )


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """How the model's images are prepared, where that was said."""

    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    size: int | None

    @property
    def asked(self) -> bool:
        """Whether anything was said."""
        return any(value is not None for value in (self.mean, self.std, self.size))

    def on(self, model: Vit) -> Vit:
        """The same model, told."""
        if not self.asked:
            return model
        from vitrim.data import prepare

        return prepare(model, mean=self.mean, std=self.std, size=self.size)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The budget flags as given; keep_* may hold several values."""

    keep_macs: tuple[float, ...] | None
    keep_params: tuple[float, ...] | None
    max_macs: int | None
    max_params: int | None
    max_memory_mb: float | None
    max_file_mb: float | None

    def budgets(self) -> list[Budget]:
        """One budget for each value of the one list given; the other limits hold for all of them. Empty without flags."""
        fixed = given(asdict(self))
        if not fixed:
            return []
        macs, params = fixed.pop("keep_macs", (None,)), fixed.pop("keep_params", (None,))
        if len(macs) > 1 and len(params) > 1:
            raise click.UsageError("--keep-macs and --keep-params are both lists; give a list to one of them only.")
        from vitrim.budget import Budget

        return [Budget(keep_macs=a, keep_params=b, **fixed) for a in macs for b in params]


OUTPUT = bundle(
    "output",
    Output,
    click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout."),
    click.option("--quiet", is_flag=True, help="Show no progress."),
)


def product(help: str) -> Callable[[Verb], Verb]:
    """--product, with what it says here."""
    return click.option("--product", type=Named("output", "tokens"), help=help)


DEVICE = click.option("--device", metavar="DEVICE", help="cpu, cuda, cuda:N, mps, or auto (default): the fastest.")
COMPUTE = stack(
    DEVICE,
    click.option("--threads", type=COUNT, help="CPU threads; all by default."),
)
SEED = click.option("--seed", type=COUNT_OR_NONE, help="Of every random draw; 0 by default.")
MACHINE = stack(
    COMPUTE,
    click.option("--amp", type=Named("no", "bf16", "fp16"), help="Mixed precision; no by default."),
    click.option("--workers", type=COUNT_OR_NONE, help="Decoding processes; none by default."),
    SEED,
)
OUT = click.option("--out", type=PLACE, required=True, metavar="FOLDER", help="What it becomes.")
SOURCE = bundle(
    "weights",
    Weights,
    click.option("--checkpoint", type=PLACE, help="Weights for a named model: .safetensors, .pth, .pt."),
    click.option(
        "--checkpoint-key", metavar="KEY", help="Which weights of it, where it holds several sets: teacher, model_ema."
    ),
    click.option("--no-pretrained", is_flag=True, help="Random weights instead of the published ones."),
    click.option("--no-verify", is_flag=True, help="Do not compare with the source's own network on a random image."),
)
IMAGE_PX = click.option(
    "--image-px",
    type=Sides(),
    metavar="H,W",
    help="Size of the images it runs at, or one number for both sides; its positions are resized once. Its own by default.",
)
PREPARED = bundle(
    "prepared",
    Prepared,
    click.option(
        "--mean",
        type=Listed(Number(float, least=0, most=1), "0.5,0.5,0.5"),
        metavar="R,G,B",
        help="Of the model's images, in [0, 1].",
    ),
    click.option(
        "--std",
        type=Listed(Number(float, above=0, most=1), "0.5,0.5,0.5"),
        metavar="R,G,B",
        help="Their standard deviation.",
    ),
    click.option("--size", type=COUNT, help="Shorter side before the crop to the model's size; that size by default."),
)
FORCE = click.option("--force", is_flag=True, help="Replace what is already at --out.")
BROKEN = click.option(
    "--on-broken",
    type=Named("raise", "skip"),
    help="An image that cannot be read: raise (default) stops, skip leaves it out.",
)
DATA = click.option("--data", metavar="DATA", help="Images; the built-in sample for built-in models.")
BUDGET = bundle(
    "limits",
    Limits,
    click.option("--keep-macs", type=SHARE, metavar="SHARE", help="Share of the MACs to keep, in (0, 1]."),
    click.option("--keep-params", type=SHARE, metavar="SHARE", help="Share of the parameters to keep, in (0, 1]."),
    click.option("--max-macs", type=COUNT, help="At most so many MACs, at batch 1."),
    click.option("--max-params", type=COUNT, help="At most so many parameters."),
    click.option("--max-memory-mb", type=MEGABYTES, help="At most so much resident weights plus activations."),
    click.option("--max-file-mb", type=MEGABYTES, help="At most such a file."),
)
TRAINING = stack(
    click.option("--epochs", type=POSITIVE, help="Passes over the training images."),
    click.option("--steps", type=COUNT, help="Optimiser steps, instead of epochs."),
    click.option("--batch-size", type=COUNT, help="Images of one step."),
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


def no_budget() -> click.UsageError:
    return click.UsageError("no budget was given; pass one, for example --keep-macs 0.5 to halve the operations.")


def device_named(name: str | None) -> str:
    """The device to compute on, checked to be there. auto, or None: cuda, else mps, else cpu."""
    import torch

    kind, colon, index = ("auto" if name is None else name).partition(":")
    found = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available()), "cpu": 1}
    if kind == "auto" and not colon:
        return next(kind for kind, count in found.items() if count)
    if kind not in found:
        hint = did_you_mean(kind, ("auto", *found)) or "."
        raise ConfigError(f"device {name!r} is not known; expected one of auto, cpu, cuda, cuda:N, mps{hint}")
    if not found[kind]:
        raise MeasureError(
            f"device {name!r} was asked for, but torch finds none here. Pass --device cpu, or install a torch build for it."
        )
    if kind != "cuda" and colon:
        raise ConfigError(f"device {name!r} is not there; expected {kind} without a number, since there is one of it.")
    if kind == "cuda" and ":" in str(name) and not (index.isdigit() and int(index) < found["cuda"]):
        raise MeasureError(f"device {name!r} is not there; expected cuda:0 to cuda:{found['cuda'] - 1}.")
    return str(name)


def use_threads(threads: int | None) -> None:
    """Sets torch's CPU threads for this process."""
    if threads is not None:
        processes.refuse_threads(threads)
        import torch

        torch.set_num_threads(threads)


def for_training(config: Path | None, flags: Mapping[str, Any], threads: int | None, **base: Any) -> dict[str, Any]:
    """A training's settings: of `base`, the file, and the flags, the later before the earlier. The device has to be there."""
    values = {"world_size": processes.count(), **base, **read_json(config), **given(flags)}
    if flags["epochs"] is not None and flags["steps"] is None:
        values.pop("steps", None)
    use_threads(threads)
    device = values.get("device")
    device_named(device if isinstance(device, str) else None)  # of another kind: refused when the config is read
    return values


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
    context = click.get_current_context(silent=True)
    flags = set() if context is None else {param.name for param in context.command.params}
    if context is not None and "resume" in flags:
        context.meta[RESUMABLE] = out
    if not processes.is_first():
        return  # the first process has perhaps begun to write there
    refuse_locked(out)
    if resume and not out.is_dir():
        raise ConfigError(
            f"--resume found no run at {str(out)!r}; expected the folder of a run that was begun. To start one, leave --resume out."
        )
    if names_in(out) and not (force or resume):
        ways = {"force": "--force to replace it", "resume": "--resume to go on with it"}
        offered = ", ".join(words for flag, words in ways.items() if flag in flags)
        raise ConfigError(f"--out {str(out)!r} is not empty. Pass {offered}, or another folder.")
    check_place(out)


def read_json(path: Path | None) -> dict[str, Any]:
    """The object in a --config file; empty without one. Its keys are checked where they are used."""
    if path is None:
        return {}
    return reading(
        path, error=ConfigError, named=f"--config {str(path)!r}", mend='Expected a JSON object such as {"seed": 1}.'
    )


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

    if values := section(settings, "budget"):
        return read(Budget, values, where="budget")
    if settings.get("ranks"):
        return None
    raise no_budget()


def check_keys(values: dict[str, Any], known: Sequence[str], *, place: str) -> None:
    """Refuses keys that are not known."""
    for key in values:
        if key not in known:
            hint = did_you_mean(key, known) or "."
            raise ConfigError(f"{place}: unknown key {key!r}; expected some of {', '.join(known)}{hint}")


def given(flags: Mapping[str, Any]) -> dict[str, Any]:
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
        super().__init__(one_line(message))
        self.exit_code = 2 if isinstance(error, ConfigError) else 1
