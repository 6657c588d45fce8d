"""What a compression or a recovery gives: the smaller network with its history, ready to save."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import artifact
from .model import Vit
from .spec import ModelSpec, Selection


@dataclass(frozen=True, kw_only=True)
class Compressed:
    """A compressed model. history: one dict for each step of the search. report: what the method says of its choice."""

    model: Vit
    method: str
    variant: str
    history: list[dict[str, Any]] = field(default_factory=list)
    report: dict[str, Any] = field(default_factory=dict)

    @property
    def spec(self) -> ModelSpec:
        return self.model.spec

    @property
    def selection(self) -> Selection:
        return self.model.selection

    def save(self, folder: str | Path, *, provenance: Mapping[str, Any] | None = None, force: bool = False) -> Path:
        """Write the artifact folder. Raises ArtifactError when it exists and `force` is not set."""
        return artifact.save(self, folder, provenance=provenance, force=force)
