"""What `auto` is told. No torch."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, Self

from pydantic import Field

from vitrim.config import checked
from vitrim.errors import ConfigError, did_you_mean
from vitrim.methods.method import FittedConfig

AXES = ("qk", "vo", "mlp", "attention", "block", "width", "tokens", "tail")


@checked
class AutoConfig(FittedConfig):
    """What to reach and how. With a frozen part the stream keeps its width; `budget` may be None for `compress_family` and `predict`."""

    axes: tuple[str, ...] | None = None
    """What may be cut: qk, vo (ranks of the two products of attention), mlp (hidden units), attention (all of it), block (both
    halves), width (of the residual stream), tokens (merges), tail (only prefix tokens through the last block, exact). None: all
    that the network allows."""
    score: Literal["fisher", "measured"] = "fisher"
    """How options are scored: `fisher` by one backward pass, `measured` by running the rest of the network for each."""
    images: int = Field(default=256, ge=2, le=1_000_000)
    """Unlabelled images, drawn by seed; a quarter of them judges."""
    batch_size: int = Field(default=16, ge=1)
    """Images at a time; sets the memory, and the last bits of sums."""
    builds: int = Field(default=3, ge=1)
    """How many of the best plans are built and compared. Each has another stream width or token schedule: without these axes
    there is one, the best."""
    draws: int = Field(default=4, ge=1)
    """Sign vectors an image in the scores."""
    align: int = Field(default=8, ge=1)
    """Hidden widths and the stream's are multiples of it, and ranks of wide heads; less in narrow parts."""
    ridge: float = Field(default=3e-3, gt=0, allow_inf_nan=False)
    """Pull of the MLP's last linear towards the inherited weights, as a share of the mean variance of its inputs."""
    output_ridge: float = Field(default=1e-3, gt=0, allow_inf_nan=False)
    """The same of attention's output projection."""
    exact_tail: bool = True
    """False: as if `tail` were not among the axes."""

    def __post_init__(self) -> None:
        for axis in self.axes or ():
            if axis not in AXES:
                raise ConfigError(
                    f"axes: unknown axis {axis!r}{did_you_mean(axis, AXES) or '.'} Known: {', '.join(AXES)}."
                )
        if self.axes is not None and not self.axes:
            raise ConfigError(f"every axis is switched off; leave at least one of {', '.join(AXES)}.")

    @property
    def takes_tail(self) -> bool:
        return super().takes_tail and "tail" in (self.axes or AXES)

    def without_tail(self) -> Self:
        return replace(self, exact_tail=False)
