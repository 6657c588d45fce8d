"""What the loop asks of whatever is learned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """Where a run is. index: optimiser steps done before this one. micro: micro-batch within it, on this process."""

    index: int
    total: int
    epoch: int
    micro: int = 0
    micros: int = 1
    rank: int = 0
    world: int = 1

    @property
    def share(self) -> float:
        """Share of the run that is done, in [0, 1): what ramps and temperatures are functions of."""
        return self.index / self.total


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """One micro-batch. images: B C h w, perhaps mixed; labels: B int64, or B classes where mixed or multi-label, or None."""

    images: Tensor
    labels: Tensor | None


class Objective(Protocol):
    """What is learned. Only `model(...)`, the wrapped model's forward, may be called in `loss`.

    One that says nothing else trains in one phase and has no state.
    """

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Groups for the optimiser, as torch has them; called once, with the model on its device.

        "lr" is the group's own top of the schedule, "schedule": "constant" keeps it there. Tensors that are not the
        model's own may be among them: the loop averages their gradients over the processes.
        """

    def loss(self, model: nn.Module, batch: Batch, step: Step) -> Tensor:
        """The scalar to be lowered: a mean over the images of the batch."""

    def after_backward(self, step: Step) -> None:
        """Once a step, when gradients are whole and not yet clipped."""
        return

    def after_step(self, step: Step) -> None:
        """Once a step, after the optimiser's."""
        return

    def phase(self, step: Step) -> str:
        """Name of the part of the run, for logs."""
        return "train"

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs, as tensors and JSON values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse; called after `param_groups`."""
        return

    def metrics(self) -> dict[str, float]:
        """Figures of the latest step, for logs."""
        return {}
