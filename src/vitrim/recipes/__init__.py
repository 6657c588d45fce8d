"""Recipes: one training or published table row per JSON file, with what it is in words under `doc`. Standard library only."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

from ..errors import ConfigError, did_you_mean


def names() -> list[str]:
    """Names of the packaged recipes, sorted."""
    return sorted(
        entry.name.removesuffix(".json") for entry in files(__package__).iterdir() if entry.name.endswith(".json")
    )


def read(name: str) -> dict[str, Any]:
    """A recipe's JSON: `doc`, and what it is for: `model` (a `Config`) and `train` (a `TrainConfig`) in a training.

    Raises ConfigError with the near miss.
    """
    known = names()
    if name not in known:
        raise ConfigError(f"unknown recipe {name!r}{did_you_mean(name, known)}. Known: {', '.join(known)}.")
    recipe: dict[str, Any] = json.loads(files(__package__).joinpath(f"{name}.json").read_text(encoding="utf-8"))
    return recipe
