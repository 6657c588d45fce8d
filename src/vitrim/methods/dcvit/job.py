"""One run: its images, what is cut, and what it is known by."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from vitrim import data as opened
from vitrim.checkpoints import Journal, identity_of
from vitrim.data.draws import ranked
from vitrim.errors import DataError
from vitrim.methods.dcvit.config import DcvitConfig
from vitrim.methods.fitting import Run
from vitrim.model import Stream, Vit
from vitrim.space import Space

FOLDS = 4
"""Parts of the images of which one is left out at a time."""
_ORDER = 0x6463_6F72


class Inputs:
    """The images as the network takes them, read anew by each pass, in an order drawn by seed. Labels stay unread."""

    def __init__(self, model: Vit, source: Any, config: DcvitConfig) -> None:
        if source is None:
            raise DataError(
                "dcvit: no images were given; expected 50 to 1000 unlabelled ones. Pass data=, such as a folder."
            )
        feed = opened.calibration_images(
            source, model.config.preprocess, count=config.images, seed=config.seed, method="dcvit"
        )
        self.images, self.mark, self.count, self.feed = feed.images, feed.mark, len(feed), feed
        if feed.images is not None:
            self.feed = feed.subset(ranked(config.seed, _ORDER, feed.images.rows))
        if not self.count:
            raise DataError("dcvit: no images. Pass 50 to 1000 unlabelled ones.")
        if self.count < 8:
            warnings.warn(
                f"dcvit: {self.count} images; expected 50 to 1000. The fit rests on their tokens alone.", stacklevel=4
            )
        self.batch_size = max(1, min(config.batch_size, self.count // (2 * FOLDS)))

    def batches(self) -> Iterator[Tensor]:
        """[B, C, h, w] each, the same in every pass."""
        return self.feed.batches(self.batch_size)

    def streams(self, model: Vit) -> Iterator[Stream]:
        """What enters the first block."""
        like = next(model.parameters())
        return (model.embed(x.to(like)) for x in self.batches())

    def refuse_alike(self) -> None:
        """Raise DataError when all images are equal."""
        if self.feed.alike(self.batch_size):
            raise DataError(f"dcvit: all {self.count} images are equal; expected different photos. Check the folder.")


@dataclass(frozen=True, kw_only=True)
class Job(Run):
    """One run.  folder: where partial state goes, or None."""

    space: Space
    inputs: Inputs
    config: DcvitConfig
    folder: Path | None = None
    resume: bool = False

    def place(self, name: str) -> Path | None:
        """Where a part of the run keeps its state."""
        return None if self.folder is None else self.folder / name

    def journal(self, **more: Any) -> Journal:
        """Of finished pieces.  more: plain values that must agree too for a run to be gone on with."""
        free = {"budget", "device", "hand_over", "finetune_steps"}  # a run may be gone on with under others
        if self.config.variant == "closed":
            free |= {"steps", "lr", "metric_images", "metric_steps", "k", "augment"}
        known = identity_of(self.config, free=free, given=self.model.spec, weights=self.base, data=self.inputs.mark)
        return Journal(self.folder, "dcvit", known | more, resume=self.resume)

    def time_left(self, stage: str, done: int, total: int, began: float, fresh: int | None = None) -> None:
        """Say how far a stage is.  began: by `time.monotonic`. fresh: of what is done, how much since then; None: all."""
        each = (time.monotonic() - began) / (done if fresh is None else fresh)
        self.tell(stage, done, total, seconds_left=each * (total - done))
