"""Training: the one loop, into which an objective is plugged. Names are loaded when they are first used: no torch before."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vitrim import lazy

if TYPE_CHECKING:
    from vitrim.codec import plain
    from vitrim.config import Augment
    from vitrim.progress import Progress
    from vitrim.training.config import TrainConfig, read_config
    from vitrim.training.loop import AMP_DTYPES, LEAST_BETWEEN, FitResult, fit, mapped, ready, schedule
    from vitrim.training.objective import Batch, Objective, Step

__all__ = [
    "AMP_DTYPES",
    "LEAST_BETWEEN",
    "Augment",
    "Batch",
    "FitResult",
    "Objective",
    "Progress",
    "Step",
    "TrainConfig",
    "fit",
    "mapped",
    "plain",
    "read_config",
    "ready",
    "schedule",
]

__getattr__, __dir__ = lazy.names(
    __name__,
    {
        **dict.fromkeys(__all__, "loop"),
        **dict.fromkeys(("Batch", "Objective", "Step"), "objective"),
        **dict.fromkeys(("TrainConfig", "read_config"), "config"),
        "Augment": ".config",
        "Progress": ".progress",
        "plain": ".codec",
    },
)
