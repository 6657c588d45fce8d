"""What `uvc` is told, and what its presets fix. No torch."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Literal

from pydantic import Field

from vitrim.budget import Budget
from vitrim.config import checked, read
from vitrim.errors import BudgetError, ConfigError
from vitrim.methods.method import MethodConfig
from vitrim.training.config import Running, TrainConfig

LEAST_LINES = 20
"""Lines of history that a short search writes at least, as far as it has steps."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rules:
    """What a preset fixes; the defaults are `clean`'s. Shares are of the run; steps are shares of a variable's range over the search."""

    epochs: float = 30
    batch_size: int = 128
    warmup: float = 0.1
    """Share of the run in which only weights learn: gates open, nothing removed."""
    settle: float = 0.3
    """Share at the end in which the final masks stand and only weights learn."""
    ramp: float = 0.6
    """Share of the search over which the budget falls from 1 to its value; 0: at once."""
    masked: bool = True
    """Whether the search's forward pass has soft masks, whose gradients price the counts."""
    ceil: bool = False
    """Whether the cost rounds removed counts up (straight through)."""
    cold: float = 0.25
    """Gate logits are divided by a temperature that falls from 1 to this."""
    count_step: float = 3.0
    gate_step: float = 3.0
    y_step: float = 0.1
    z_steps: tuple[float, ...] = (150.0,)
    """Of the budget's dual, in equal phases of the search."""
    z_push: float = 20.0
    """Proportional part: prices are z + z_push * (cost - budget), an augmented Lagrangian's; 0: plain dual ascent."""
    z_max: float = 20.0
    prox: float = 5.0
    """Shrinking of removed groups, on top of y; the paper's is the learning rate itself."""
    gate_weight: float = 1.0
    gate_every: int = 1
    alpha: float = 0.5
    tau: float = 2.0
    smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    mix_share: float = 1.0
    lr_warmup: float = 0.05
    """Share of the run over which the learning rate rises."""


PRESETS = {
    "clean": Rules(),
    "paper": Rules(
        batch_size=1024,
        warmup=5 / 30,
        settle=0.0,
        ramp=0.0,
        masked=False,
        ceil=True,
        cold=1.0,
        count_step=0.02,
        gate_step=0.1,
        y_step=1e-4,
        z_steps=(1.0, 5.0, 9.0, 13.0, 17.0),
        z_push=0.0,
        prox=1.0,
        gate_weight=5e-4,
        gate_every=50,
        alpha=0.1,
        tau=1.0,
        smoothing=0.1,
        mixup=0.8,
        cutmix=1.0,
        mix_share=0.8,
        lr_warmup=500 / 37_530,  # 500 steps of 30 epochs of ImageNet-1k in batches of 1024
    ),
}
"""`paper`: the released command for DeiT-Tiny; absolute steps in units (heads, dims, MLP units), as there."""


@checked
class SearchConfig(MethodConfig):
    """What to reach and how the search goes there. None, where it may stand, is the preset's value."""

    preset: Literal["clean", "paper"] = "clean"
    """`clean`: works in hundreds of steps as in 100,000. `paper`: the released command's values, which need its length."""
    gates: Literal["block", "halves", "none"] = "block"
    """What may be skipped: whole blocks as in the paper, attention and MLP apart, or nothing."""
    widths: bool = True
    """Whether heads, dims and MLP units may go."""
    distill: bool = True
    """Whether the uncompressed model teaches; without it labels alone do."""
    tie_qk: bool = False
    """Let queries and keys lose dims with the values; the paper leaves them."""
    count_per_head: bool | None = None
    """One count of removed dims for each head (padded to the largest when cut), or one for all heads of a block."""
    steps: int | None = Field(default=None, ge=1)
    """Optimiser steps of the search; None: as many as `epochs` makes."""
    epochs: float | None = Field(default=None, gt=0)
    """Passes over the images, of no account where `steps` is given."""
    batch_size: int | None = Field(default=None, ge=1)
    """Images that one step sees, over all processes and micro-batches."""
    lr: float = Field(default=1e-4, gt=0)
    """Of the weights, at the top of the cosine."""
    warmup: float | None = Field(default=None, ge=0, lt=1)
    """Share of the run before decisions move."""
    settle: float | None = Field(default=None, ge=0, lt=1)
    """Share of the run after decisions are final, under the final masks."""
    ramp: float | None = Field(default=None, ge=0, le=1)
    """Share of the search over which the budget falls to its value."""
    cold: float | None = Field(default=None, gt=0, le=1)
    """Temperature that the gates' logits are divided by at the end of the search; 1 at its beginning."""
    alpha: float | None = Field(default=None, ge=0, le=1)
    """Weight of the teacher against the labels; 1 needs no labels."""
    tau: float | None = Field(default=None, gt=0)
    """Temperature of the distillation."""
    align: int = Field(default=8, ge=1)
    """Dims and MLP units are multiples of it, where the budget can be met so."""


@checked
class UvcConfig(Running, SearchConfig):
    """What to reach, how the search goes there, and how its training runs."""

    def __post_init__(self) -> None:
        if self.budget is None:
            raise BudgetError("no budget. To halve the operations, pass budget=Budget(keep_macs=0.5).")
        if self.gates == "none" and not self.widths:
            raise ConfigError("gates='none' with widths=False leaves nothing to remove; allow one of them.")
        rules = self.rules
        if rules.warmup + rules.settle >= 1:
            raise ConfigError(
                f"warmup={rules.warmup:g} and settle={rules.settle:g} leave no steps for the search; "
                "expected shares of the run that add up to less than 1."
            )
        _ = self.training  # says what is wrong with it now, not when the images have been read

    @property
    def bounds(self) -> Budget:
        """The budget."""
        assert self.budget is not None
        return self.budget

    @property
    def rules(self) -> Rules:
        """The preset, with what the config says otherwise."""
        names = ("epochs", "batch_size", "warmup", "settle", "ramp", "cold", "alpha", "tau")
        given = {name: getattr(self, name) for name in names}
        return replace(PRESETS[self.preset], **{name: value for name, value in given.items() if value is not None})

    @property
    def per_head(self) -> bool:
        """Whether each head has its own count of dims."""
        return self.preset == "paper" if self.count_per_head is None else self.count_per_head

    @property
    def training(self) -> TrainConfig:
        """The one loop's config."""
        rules = self.rules
        every = self.log_every if self.steps is None else min(self.log_every, max(1, self.steps // LEAST_LINES))
        own = {field.name: getattr(self, field.name) for field in fields(TrainConfig) if hasattr(self, field.name)}
        names = ("epochs", "batch_size", "smoothing", "mixup", "cutmix", "mix_share")
        given = {name: getattr(rules, name) for name in names}
        ours = {"min_lr": min(1e-5, self.lr), "warmup": rules.lr_warmup, "log_every": every}
        return read(TrainConfig, {**own, **given, **ours}, where="uvc")
