"""How a network is trained, as values. No torch."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal, TypeVar

from pydantic import Field

from vitrim.config import Augment, checked, default, read
from vitrim.errors import ConfigError


@checked
class Running:
    """How the one loop runs, whatever it learns."""

    accumulate: int = Field(default=1, ge=1)
    """Micro-batches of one step: more need less memory and give the same gradients."""
    amp: Literal["no", "bf16", "fp16"] = "no"
    """Precision of the products; weights stay float32. fp16 needs a GPU."""
    augment: Augment = Augment()
    """What happens to a single image."""
    seed: int = Field(default=0, ge=0)
    """Of every random draw: order, augmentation, new weights."""
    workers: int = Field(default=0, ge=0)
    """Processes that decode images; 0: this one. Changes no result."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute; auto: the fastest that is there."""
    world_size: int = Field(default=1, ge=1)
    """Processes that torchrun must have started."""
    grad_checkpoint: bool = False
    """Recompute the blocks in the backward pass: less memory, a third more time."""
    log_every: int = Field(default=20, ge=1)
    """Steps between lines of metrics.jsonl."""
    checkpoint_seconds: float = Field(default=180.0, ge=0)
    """Time between checkpoints; 0: one at each step."""


@checked
class TrainConfig(Running):
    """How a network is trained. `batch_size` counts the images of all processes."""

    epochs: float = Field(default=30.0, gt=0)
    """Passes over the training images; of no account where `steps` is given."""
    steps: int | None = Field(default=None, ge=1)
    """Optimiser steps of the whole run; None: as many as `epochs` makes."""
    batch_size: int = Field(default=128, ge=1)
    """Images that one optimiser step sees, over all processes and micro-batches."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """adamw, or sgd with Nesterov's momentum of 0.9."""
    lr: float = Field(default=1e-3, gt=0)
    """Learning rate at the top of the schedule."""
    min_lr: float = Field(default=1e-5, ge=0)
    """Learning rate at the end of the cosine."""
    warmup: float = Field(default=0.05, ge=0, lt=1)
    """Share of the run in which the learning rate rises from zero."""
    weight_decay: float = Field(default=0.05, ge=0)
    """Of matrices and kernels; vectors, tokens and position tables have none."""
    clip: float | None = Field(default=1.0, gt=0)
    """Largest norm of the gradient; None: as it comes."""
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    """Keep a running mean of the weights, and validate and return that; None: the weights themselves."""
    smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of each target that is spread over all classes."""
    mixup: float = Field(default=0.0, ge=0)
    """Alpha of mixup; 0: none."""
    cutmix: float = Field(default=0.0, ge=0)
    """Alpha of cutmix; 0: none. With both, each batch takes one of them."""
    mix_share: float = Field(default=1.0, ge=0, le=1)
    """Share of the batches that are mixed at all."""
    eval_every: int | None = Field(default=None, ge=1)
    """Steps between validations; None: one at the end of each epoch, but at least 50 steps apart: an epoch of few images is
    shorter than a validation. There is always one at the end."""
    tracker: str | None = None
    """Another place for the metrics, by its name in accelerate: "tensorboard", "wandb", ..."""

    def __post_init__(self) -> None:
        parts = self.accumulate * self.world_size
        if self.batch_size % parts:
            raise ConfigError(
                f"batch_size={self.batch_size} does not divide into accumulate={self.accumulate} micro-batches on "
                f"world_size={self.world_size} processes; expected a multiple of {parts}."
            )
        if (self.mixup or self.cutmix) and self.micro_batch % 2:
            raise ConfigError(
                f"mixup and cutmix pair the images of a micro-batch, which has {self.micro_batch}; expected an even "
                f"number. Change batch_size or accumulate, or set mixup=0 and cutmix=0."
            )
        if self.min_lr > self.lr:
            raise ConfigError(f"min_lr={self.min_lr!r} above lr={self.lr!r}; expected at most that.")

    @property
    def micro_batch(self) -> int:
        """Images that one process takes at a time."""
        return self.batch_size // (self.accumulate * self.world_size)

    def total_steps(self, images: int) -> int:
        """Optimiser steps of the run on so many images."""
        return self.steps or max(1, round(self.epochs * (images // self.batch_size)))


Training = TypeVar("Training", bound=TrainConfig)


def batch_that_fits(config: TrainConfig, count: int) -> int:
    """The largest batch, up to the config's own, that so many images fill; the config's own where not even one part is filled."""
    if count >= config.batch_size:
        return config.batch_size
    even = config.accumulate * config.world_size * (2 if config.mixup or config.cutmix else 1)
    eights = math.lcm(8, even)
    return count // eights * eights or count // even * even or config.batch_size


def filled(config: Training, images: int) -> tuple[Training, list[str]]:
    """The same with a batch that the images fill where there are fewer than the default asks for, and the sentence that says so.

    A batch that somebody chose stays, and `ready` refuses it.
    """
    few = batch_that_fits(config, images)
    if few == config.batch_size or config.batch_size != default(type(config), "batch_size"):
        return config, []
    return replace(config, batch_size=few), [fewer(images, few)]


def fewer(images: int, batch_size: int) -> str:
    """The sentence for a batch that was made smaller."""
    if images == 1:
        return "There is 1 training image, so one step takes it alone."
    return f"There are {images} training images, so one step takes {batch_size} of them."


read_config = read  # its name here until 0.2
