"""What methods share that fit closed forms to unlabelled images: the call for one budget, a run, and the pieces it notes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Unpack

import torch

from vitrim.checkpoints import Journal, Piece
from vitrim.closed_form import fisher
from vitrim.errors import ConfigError
from vitrim.methods.method import CompressFamily, FittedConfig, How, MethodConfig
from vitrim.model import Vit
from vitrim.progress import Progress
from vitrim.result import Compressed


def alone(method: str, family: CompressFamily, model: Vit, config: MethodConfig, **how: Unpack[How]) -> Compressed:
    """The network of a family of one, for the config's own budget. Raises ConfigError where it has none."""
    if config.budget is None:
        raise ConfigError(f"{method}: no budget. To halve the operations, pass budget=Budget(keep_macs=0.5).")
    return family(model, config, [config.budget], **how)[0]


@dataclass(frozen=True, kw_only=True)
class Run:
    """What all steps share.  model: as it was given. base: what is cut, LayerScale folded where it goes. scratch: for held streams."""

    model: Vit
    base: Vit
    scratch: Path
    config: FittedConfig
    progress: Progress | None = None

    @property
    def device(self) -> torch.device:
        return next(self.base.parameters()).device

    @cached_property
    def product(self) -> fisher.Product:
        """What the network is for, as the config says."""
        return fisher.Product.of(self.base.config, self.config.product)

    def tell(self, stage: str, done: int, total: int, **facts: Any) -> None:
        if self.progress is not None:
            self.progress(stage, done, total, **facts)


def kept(journal: Journal, name: str, make: Callable[[], Piece]) -> Piece:
    """A piece of work as the journal has it; made and noted where it has not."""
    noted = journal.get(name)
    if noted is None:
        noted = make()
        journal.put(name, *noted)
    return noted
