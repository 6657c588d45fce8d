"""What a job starts from: the network that shares of a budget refer to, and the one that a method is given."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from vitrim import surgery
from vitrim.counting import Cost, cost
from vitrim.errors import ConfigError
from vitrim.freezing import frozen
from vitrim.methods.method import MethodConfig
from vitrim.model import Vit
from vitrim.sources import load
from vitrim.spec import ModelSpec, at_size, sides


def dense_of(model: str | Path | Vit, image_px: int | tuple[int, int] | None) -> Vit:
    """The model that a job cuts, at the size asked for (None: its own), with the positions of that size."""
    if isinstance(model, Vit):
        return surgery.with_own_positions(model, None if image_px is None else sides(image_px))
    return surgery.with_own_positions(load(model, image_px=image_px))


def reference_of(dense: Vit, relative_to: str) -> Cost:
    """What the shares of a budget refer to: this model, or the first one that it descends from. Raises ConfigError."""
    if relative_to == "given" or not dense.selection.steps:
        return cost(dense)  # a model that was never cut is its own original
    original = dense.provenance.get("original")
    if not original:
        raise ConfigError(
            "relative_to='original': the model does not say what it was cut from. Pass relative_to='given', or absolute limits "
            "(max_macs, max_params)."
        )
    spec = ModelSpec.from_dict(original["spec"])
    return cost(spec if spec.image_px == dense.spec.image_px else at_size(spec, dense.spec.image_px))


def limited(config: MethodConfig, reference: Cost) -> MethodConfig:
    """A method's config whose shares are of this network: an exact tail comes before the method."""
    return config if config.budget is None else dataclasses.replace(config, budget=config.budget.of(reference))


def gets_tail(spec: ModelSpec, config: MethodConfig, *, wanted: bool) -> bool:
    """Whether the job lets only the prefix tokens through the last block before the method runs."""
    if not wanted or not config.takes_tail or surgery.has_exact_tail(spec):
        return False
    return surgery.tail_refusal(spec, frozen(spec, config.freeze)) is None


def given_spec(spec: ModelSpec, config: MethodConfig, *, wanted: bool) -> ModelSpec:
    """The spec that the method is given."""
    return surgery.with_exact_tail(spec) if gets_tail(spec, config, wanted=wanted) else spec
