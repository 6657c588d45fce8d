"""The methods, by name: each a record of functions from (model, config, data) to a smaller model. None imports another.

Names and records are read without importing torch.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitrim.errors import BudgetError, ConfigError, DataError, did_you_mean, fitting_in_memory

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

    from vitrim.budget import Budget
    from vitrim.methods.method import Method, MethodConfig, Plan
    from vitrim.model import Vit
    from vitrim.progress import Progress
    from vitrim.result import Compressed
    from vitrim.spec import ModelSpec, ProductName

log = logging.getLogger("vitrim.methods")

BUILT_IN = ("auto", "comcat", "dcvit", "uvc")
DEFAULT = "auto"
PLANNED = ("usdc", "cait")


class _Methods(Mapping[str, "Method"]):
    """Those of vitrim, then those that installed packages offer as entry points of the group `vitrim.methods`."""

    def __iter__(self) -> Iterator[str]:
        yield from BUILT_IN
        yield from _offered()

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, name: object) -> bool:
        return name in BUILT_IN or name in _offered()

    def __getitem__(self, name: str) -> Method:
        if name in BUILT_IN:
            found: Method = import_module(f"vitrim.methods.{name}").METHOD
            return found
        return _loaded(_offered()[name])


METHODS: Mapping[str, Method] = _Methods()


def _offered() -> dict[str, EntryPoint]:
    """The methods of other packages. Raises ConfigError where two have one name."""
    import importlib.metadata  # slow to import: no verb's help asks for it

    found: dict[str, EntryPoint] = {}
    for entry in importlib.metadata.entry_points(group="vitrim.methods"):
        if entry.name in BUILT_IN or entry.name in found:
            other = "vitrim" if entry.name in BUILT_IN else _package(found[entry.name])
            raise ConfigError(
                f"method {entry.name!r} of the package {_package(entry)} is one of {other} already; expected another name. "
                "Uninstall one of the two."
            )
        found[entry.name] = entry
    return found


def _package(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist is not None else entry.value


def _loaded(entry: EntryPoint) -> Method:
    from vitrim.methods.method import Method

    try:
        found = entry.load()
    except Exception as error:  # whatever a foreign module raises when it is imported
        raise ConfigError(
            f"method {entry.name!r} of the package {_package(entry)} cannot be loaded ({error}). Mend or uninstall it."
        ) from error
    if not isinstance(found, Method) or found.name != entry.name:
        raise ConfigError(
            f"method {entry.name!r} of the package {_package(entry)}: {entry.value} is no Method of that name; expected a "
            "vitrim.methods.method.Method. Mend or uninstall it."
        )
    return found


def method_named(name: str) -> Method:
    """The record of a method. Raises ConfigError for an unknown name, with the near miss."""
    if not isinstance(name, str):
        raise ConfigError(f"method={name!r}; expected the name of one: {', '.join(METHODS)}.")
    if name in METHODS:
        return METHODS[name]
    if name in PLANNED:
        raise ConfigError(f"method {name!r} is planned and not there yet; expected one of {', '.join(METHODS)}.")
    hint = did_you_mean(name, METHODS) or "."
    raise ConfigError(f"method {name!r} is not known; expected one of {', '.join(METHODS)}{hint}")


def method_of(config: MethodConfig) -> str:
    """The name of the method whose config this is. Raises ConfigError."""
    for name, method in METHODS.items():
        if isinstance(config, method.config):
            return name
    known = ", ".join(method.config.__name__ for method in METHODS.values())
    raise ConfigError(f"{type(config).__name__} is no method's config; expected one of {known}.")


def require_device(config: MethodConfig) -> None:
    """Raises MeasureError where torch has no device of the config's name."""
    from vitrim.model import device_named

    if config.device is not None and config.device != "auto":
        device_named(config.device)


def configure(method: str, settings: Mapping[str, Any]) -> Any:
    """The config of a method by its name, from plain values. Raises ConfigError that names an unknown method or key."""
    from vitrim.config import read

    return read(method_named(method).config, settings, where=method)


def plan(method: str, spec: ModelSpec, config: MethodConfig | None = None) -> Plan:
    """What a method would reach, cost and need on this spec; trains and reads nothing."""
    product_for(spec, config)
    return method_named(method).plan(spec, config)


def product_for(spec: ModelSpec, config: MethodConfig | None) -> ProductName:
    """What a network is for where this config cuts it. Raises ConfigError for tokens that are not there.

    A method without the setting, such as uvc, goes by the answers: there it is what `spec.product_of` says without a name.
    """
    from vitrim.spec import product_of

    return product_of(spec, getattr(config, "product", None))


def compress(
    model: Vit,
    config: MethodConfig,
    *,
    data: Any = None,
    progress: Progress | None = None,
    seed: int | None = None,
    folder: str | Path | None = None,
    resume: bool = False,
    teacher: Vit | None = None,
    on_broken: str = "raise",
) -> Compressed:
    """The method that the config belongs to, alone: no recovery. `model` is left as it was; where its positions are for another
    image size than its own, the method is given them resized, once.

    data: whatever `vitrim.data.open` takes; None where the method needs none. on_broken: "raise" stops at an image that cannot be
    read, "skip" leaves it out and says so. seed: instead of the config's own.
    progress: called as progress(stage, done, total, **facts).  folder: where a long method leaves what a killed run goes on
    from, with `resume`; None: nowhere. teacher: whose answers a method that distils learns, such as the network that `model` was
    cut from; None: `model`. Raises ConfigError for a config of no method, and for a teacher where the method has none;
    BudgetError for a budget out of reach, or a network that is left with the same answer for every image. Shares of the budget
    are of `model`; the exact tail, which `vitrim.run` adds first, is not added here, so that some methods reach less far.
    """
    from vitrim import data as opened
    from vitrim.model import require_model
    from vitrim.surgery import with_own_positions

    require_model(model, "compress: the model")
    method = METHODS[method_of(config)]
    require_device(config)
    product_for(model.spec, config)
    if seed is not None:
        config = replace(config, seed=seed)
    if teacher is not None and not method.takes_teacher:
        others = ", ".join(other.name for other in METHODS.values() if other.takes_teacher)
        raise ConfigError(f"{method.name} learns from no teacher; leave teacher out. Those that do: {others}.")
    taught = {} if teacher is None else {"teacher": teacher}
    for network in (model, *taught.values()):
        _finite(network, f"{method.name}: the model is not cut")
    model = with_own_positions(model)
    place = None if folder is None else Path(folder)
    data = None if data is None else opened.skipping(data, on_broken)
    with _in_memory(method):
        made = method.compress(model, config, data=data, progress=progress, folder=place, resume=resume, **taught)
    return _finished(made, model, config)


def compress_family(
    model: Vit,
    config: MethodConfig,
    budgets: Sequence[Budget],
    *,
    data: Any = None,
    progress: Progress | None = None,
    folder: str | Path | None = None,
    resume: bool = False,
) -> list[Compressed]:
    """A smaller model for each budget, in their order; a method with `family` scores once for all. As `compress` otherwise."""
    method, place = METHODS[method_of(config)], None if folder is None else Path(folder)
    product_for(model.spec, config)
    _finite(model, f"{method.name}: the model is not cut")
    from vitrim.surgery import with_own_positions

    model = with_own_positions(model)
    if method.family is not None:
        with _in_memory(method):
            made = method.family(model, config, budgets, data=data, progress=progress, folder=place, resume=resume)
        return [_finished(one, model, replace(config, budget=b)) for one, b in zip(made, budgets, strict=True)]
    found = []
    for index, budget in enumerate(budgets):
        own = None if place is None else place / str(index)
        asked = replace(config, budget=budget)
        found.append(compress(model, asked, data=data, progress=progress, folder=own, resume=resume))
    return found


def _in_memory(method: Method) -> AbstractContextManager[None]:
    """What to lower where a method finds no memory."""
    from vitrim.config import keys

    known = [key for key in ("batch_size", "images") if key in keys(method.config)]
    lower = " or ".join(f"{key} (--set {key}=N)" for key in known) or "the size of the model"
    return fitting_in_memory(
        f"cutting with {method.name}", f"Lower {lower}, or compute on a device with more memory (--device cpu)."
    )


def _finite(model: Vit, where: str) -> None:
    """Raise DataError that names a tensor with numbers that are none."""
    from vitrim.model import not_finite

    if (bad := not_finite(model.state_dict())) is not None:
        raise DataError(f"{where}: {bad}; expected finite weights. Check the model and the images' normalisation.")


def _without_dead(made: Compressed, given: Vit, config: MethodConfig) -> Compressed:
    """The same without units that change nothing, which no budget should pay for; a network that was not cut stays as it is."""
    from vitrim.counting import cost
    from vitrim.freezing import frozen
    from vitrim.surgery import without_dead

    if made.spec == given.spec:
        return made
    smaller = without_dead(made.model, skip=frozen(given.spec, config.freeze))
    if smaller is made.model:
        return made
    saved = cost(made.spec).macs - cost(smaller.spec).macs
    said = f"Units that change nothing were left out, exactly: {saved:,} MACs below what the budget had paid for."
    return replace(made, model=smaller, report={**made.report, "warnings": [*made.report.get("warnings", ()), said]})


def _finished(made: Compressed, given: Vit, config: MethodConfig) -> Compressed:
    """The same, told where it comes from, its warnings logged. Raises BudgetError where no training could make use of it,
    DataError where closed forms went astray."""
    from vitrim.budget import Budget
    from vitrim.codec import plain
    from vitrim.result import descended
    from vitrim.tasks.classification import same_for_all

    _finite(made.model, f"{made.method}: no result")
    budget = config.budget
    if made.model is not given:
        asked = config if budget is None else replace(config, budget=Budget(**budget.to_dict()))
        own = {"method": made.method, "variant": made.variant, "config": plain(asked), "seed": config.seed}
        own["product"] = product_for(given.spec, config)
        made.model.provenance = descended(given.provenance, given.spec) | own
        made = _without_dead(made, given, config)
    if same_for_all(made.model) and same_for_all(given):
        log.warning(
            "%s: the model that was given gives the same for every image, and so does what is left of it.", made.method
        )
    elif same_for_all(made.model):
        limits = {} if budget is None else budget.to_dict()
        doubled = ((key, min(1.0, 2 * n) if key.startswith("keep_") else 2 * n) for key, n in limits.items())
        larger = ", ".join(f"{key}={n:g}" for key, n in doubled)
        raise BudgetError(
            f"{made.method}: the network that is left gives the same for every image, which no recovery mends; expected "
            f"one that sees. Keep more{f', such as {larger}' if larger else ''}, or choose another method."
        )
    for text in made.report.get("warnings", ()):
        log.warning("%s: %s", made.method, text)
    return made


__all__ = [
    "DEFAULT",
    "METHODS",
    "PLANNED",
    "compress",
    "compress_family",
    "configure",
    "method_named",
    "method_of",
    "plan",
    "product_for",
]
