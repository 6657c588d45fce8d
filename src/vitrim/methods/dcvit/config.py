"""What `dcvit` is told. No torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from vitrim.config import Augment, checked, default
from vitrim.errors import ConfigError
from vitrim.methods.method import FittedConfig

IGNORED = {
    "closed": ("k", "preset", "steps", "metric_images", "metric_steps"),
    "finetune": ("align", "ridge", "weighted", "probe_images", "hand_over", "finetune_steps"),
}
"""Fields of one variant that the other does not look at, and refuses."""


@checked
class DcvitConfig(FittedConfig):
    """What to reach and how."""

    variant: Literal["closed", "finetune"] = "closed"
    """`closed`: ours, by regressions, in seconds. `finetune`: the paper's, by gradient steps."""
    images: int = Field(default=256, ge=1, le=1_000_000)
    """Unlabelled images to use, drawn by seed. The paper has 50 to 1000."""
    batch_size: int = Field(default=16, ge=1)
    """Images at a time in statistics and scores; sets the memory."""
    align: int = Field(default=8, ge=1)
    """closed: hidden widths are multiples of it, of less in narrow MLPs."""
    ridge: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """closed: strength of the pull towards inherited weights, as a share of the mean variance of the hidden units;
    None: chosen for each block by leaving images out."""
    weighted: bool = True
    """closed: tokens and channels count by how much the outputs depend on them (two backward passes, no labels)."""
    probe_images: int = Field(default=64, ge=1)
    """closed: images, left out of the trial fits (of fewer than four there are none to leave out), on which each candidate's effect on
    the output is measured; as many serve the backward passes of `weighted`."""
    hand_over: bool = False
    """closed: the halves before a lost attention are refitted to carry what they can foretell of it. On the built-in model
    it cost five points with 50 images and gave a third of one with 256."""
    finetune_steps: int = Field(default=0, ge=0)
    """closed: gradient steps on the teacher's features after the closed form."""
    preset: Literal["clean", "paper"] = "clean"
    """finetune: `paper` follows the authors' code in its quirks too."""
    k: int | None = Field(default=None, ge=1)
    """finetune: how many blocks lose their attention; None: as few as the budget allows."""
    steps: int = Field(default=2000, ge=1)
    """finetune: optimiser steps of each trial and of each progressive stage; `paper` takes them as epochs."""
    lr: float = Field(default=3e-5, gt=0, allow_inf_nan=False)
    """Top of the learning rate of every fine-tuning here."""
    metric_images: int = Field(default=50, ge=1)
    """finetune: synthetic images on which trials are compared."""
    metric_steps: int = Field(default=2000, ge=1)
    """finetune: steps of their synthesis."""
    augment: Augment = Augment(randaugment="rand-m9-mstd0.5-inc1")
    """How the images are varied in every fine-tuning here."""

    def __post_init__(self) -> None:
        for name in IGNORED[self.variant]:
            if getattr(self, name) != default(type(self), name):
                raise ConfigError(
                    f"{name}={getattr(self, name)!r} has no meaning in variant {self.variant!r}; leave it out, or "
                    f"choose variant={'finetune' if self.variant == 'closed' else 'closed'!r}."
                )
