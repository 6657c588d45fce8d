"""What `comcat` is told. No torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from vitrim.config import checked
from vitrim.errors import ConfigError
from vitrim.methods.method import FittedConfig


@checked
class ComcatConfig(FittedConfig):
    """What to reach and how."""

    variant: Literal["whitened", "svd"] = "whitened"
    """`whitened`: truncation in the metric of the activations. `svd`: the paper's; needs no images."""
    ranks: tuple[dict[str, int] | None, ...] | None = None
    """Explicit ranks for each block, by part: qk and vo per head, fc1, fc2. A part left out stays as it is."""
    factorise_mlp: bool = True
    """Whether the MLP's linears may be factorised too."""
    align: int = Field(default=8, ge=1)
    """Ranks are multiples of it, where the budget can be met so."""
    images: int = Field(default=256, ge=1, le=1_000_000)
    """Unlabelled images for the statistics."""
    probe_images: int = Field(default=16, ge=0)
    """How many of them measure what each group's truncation does to the output; 0: relative energies instead."""
    batch_size: int = Field(default=8, ge=1)
    """Images at a time; sets the memory, not the result."""
    ridge: float = Field(default=1e-5, gt=0, allow_inf_nan=False)
    """Share of plain SVD mixed into the statistics, relative to their trace; as it grows, `svd` returns."""

    def __post_init__(self) -> None:
        if self.budget is None and self.ranks is None:
            raise ConfigError("neither budget nor ranks. To halve the operations, pass budget=Budget(keep_macs=0.5).")
