"""The methods, by name: each a function from (model, config, data) to a smaller model. None imports another."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from vitrim.budget import Budget
from vitrim.data import Images
from vitrim.errors import ConfigError, VitrimError, did_you_mean
from vitrim.methods import auto, comcat, dcvit, uvc
from vitrim.model import Vit
from vitrim.result import Compressed
from vitrim.spec import ModelSpec

log = logging.getLogger("vitrim.methods")

METHODS: dict[str, Callable[..., Compressed]] = {
    "auto": auto.compress,
    "comcat": comcat.compress,
    "dcvit": dcvit.compress,
    "uvc": uvc.compress,
}
CONFIGS: dict[str, type] = {
    "auto": auto.AutoConfig,
    "comcat": comcat.ComcatConfig,
    "dcvit": dcvit.DcvitConfig,
    "uvc": uvc.UvcConfig,
}
PLANS: dict[str, Callable[..., dict[str, Any]]] = {
    "auto": auto.plan,
    "comcat": comcat.plan,
    "dcvit": dcvit.plan,
    "uvc": uvc.plan,
}
PREDICTS: dict[str, Callable[..., list[dict[str, Any]]]] = {"auto": auto.predict}
"""Methods that can say from images what a budget would cost, before anything is built."""
FAMILIES: dict[str, Callable[..., list[Compressed]]] = {
    "auto": auto.compress_family,
    "dcvit": dcvit.compress_family,
}
"""Methods that score once for several budgets."""
CHECKS: dict[str, Callable[[ModelSpec, Any, Images], None]] = {"uvc": uvc.check}
"""Methods that can say from the images at hand, before any work, why they would not do."""
TAUGHT = ("uvc",)
"""Methods that distil, and may be given another teacher than the model they cut."""


def compress_family(
    model: Vit,
    config: Any,
    budgets: Sequence[Budget],
    *,
    data: Any = None,
    progress: Callable[..., None] | None = None,
    folder: str | Path | None = None,
    resume: bool = False,
) -> list[Compressed]:
    """A smaller model for each budget, in their order; methods of FAMILIES score once for all. As `compress` otherwise."""
    name, place = method_of(config), None if folder is None else Path(folder)
    if name in FAMILIES:
        rest: dict[str, Any] = {"data": data, "progress": progress, "folder": place, "resume": resume}
        return [_said(made, name) for made in FAMILIES[name](model, config, budgets, **rest)]
    found = []
    for index, budget in enumerate(budgets):
        own = None if place is None else place / str(index)
        asked = replace(config, budget=budget)
        found.append(compress(model, asked, data=data, progress=progress, folder=own, resume=resume))
    return found


def compress(
    model: Vit,
    config: Any,
    *,
    data: Any = None,
    progress: Callable[..., None] | None = None,
    seed: int | None = None,
    folder: str | Path | None = None,
    resume: bool = False,
    teacher: Vit | None = None,
) -> Compressed:
    """The method that the config belongs to, alone: no recovery. `model` is left as it was.

    data: whatever `vitrim.data.open` takes; None where the method needs none. seed: instead of the config's own.
    progress: called as progress(stage, done, total, **facts).  folder: where a long method leaves what a killed run goes on
    from, with `resume`; None: nowhere. teacher: whose answers a method that distils learns, such as the network that `model` was
    cut from; None: `model`. Raises ConfigError for a config of no method, and for a teacher where the method has none.
    """
    if not isinstance(model, Vit):
        raise VitrimError(
            f"compress: the model is a {type(model).__name__}; expected one that vitrim.load or vitrim.from_model gives."
        )
    if seed is not None and hasattr(config, "seed"):
        config = replace(config, seed=seed)
    place = None if folder is None else Path(folder)
    name, more = method_of(config), {}
    if teacher is not None:
        if name not in TAUGHT:
            raise ConfigError(f"{name} learns from no teacher; leave teacher out. Those that do: {', '.join(TAUGHT)}.")
        more = {"teacher": teacher}
    return _said(METHODS[name](model, config, data=data, progress=progress, folder=place, resume=resume, **more), name)


def _said(made: Compressed, name: str) -> Compressed:
    """The same, its warnings logged."""
    for text in made.report.get("warnings", ()):
        log.warning("%s: %s", name, text)
    return made


def method_of(config: Any) -> str:
    """The name of the method whose config this is. Raises ConfigError."""
    for name, kind in CONFIGS.items():
        if isinstance(config, kind):
            return name
    known = ", ".join(kind.__name__ for kind in CONFIGS.values())
    raise ConfigError(f"{type(config).__name__} is no method's config; expected one of {known}.")


def configure(method: str, settings: Mapping[str, Any]) -> Any:
    """The config of a method by its name, from plain values. Raises ConfigError that names an unknown method or key."""
    if method not in CONFIGS:
        raise ConfigError(f"unknown method {method!r}{did_you_mean(method, CONFIGS)}; known: {', '.join(CONFIGS)}.")
    known = [field.name for field in fields(CONFIGS[method])]
    for key in settings:
        if key not in known:
            raise ConfigError(f"{method}: unknown key {key!r}{did_you_mean(key, known)}; known: {', '.join(known)}.")
    try:
        return CONFIGS[method](**settings)
    except ValidationError as error:  # pydantic's report: ours wrapped, or a value of the wrong type
        said = []
        for found in error.errors():
            place = ".".join(str(part) for part in found["loc"])
            ours = (found.get("ctx") or {}).get("error")
            said.append(str(ours) if isinstance(ours, VitrimError) else f"{method}: {place}: {found['msg']}.")
        raise ConfigError(" ".join(said)) from error


def plan(method: str, spec: ModelSpec, config: Any = None) -> dict[str, Any]:
    """What a method would reach, cost and need on this spec; trains and reads nothing."""
    if method not in PLANS:
        raise ConfigError(f"unknown method {method!r}{did_you_mean(method, PLANS)}; known: {', '.join(PLANS)}.")
    return PLANS[method](spec, config)


__all__ = [
    "CONFIGS",
    "FAMILIES",
    "METHODS",
    "PLANS",
    "PREDICTS",
    "compress",
    "compress_family",
    "configure",
    "method_of",
    "plan",
]
