"""Unlabelled images for closed forms: drawn once by seed, and read anew by each pass over them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from vitrim.data.images import Images
from vitrim.data.loading import batches
from vitrim.data.transforms import evaluation
from vitrim.spec import Preprocess


class CalibrationImages:
    """Pictures normalised as the model says; or where it says nothing, a float tensor that is ready for it.

    Exactly one of `images` and `tensor` is there. Labels stay unread.
    """

    def __init__(
        self, preprocess: Preprocess | None, *, images: Images | None = None, tensor: Tensor | None = None
    ) -> None:
        assert (images is None) != (tensor is None)
        assert images is None or preprocess is not None
        self.preprocess, self.images, self.tensor = preprocess, images, tensor

    def __len__(self) -> int:
        return len(self.tensor if self.images is None else self.images)  # type: ignore[arg-type]

    @property
    def mark(self) -> str:
        """Tells these images from others: what a resumed run must agree with."""
        if self.images is not None:
            return str(self.images.fingerprint()["sha256"])
        assert self.tensor is not None
        return hashlib.sha256(self.tensor.double().sum((1, 2, 3)).cpu().numpy().tobytes()).hexdigest()

    def subset(self, rows: np.ndarray) -> CalibrationImages:
        """These rows, in this order."""
        if self.images is not None:
            return CalibrationImages(self.preprocess, images=self.images.subset(rows))
        assert self.tensor is not None
        return CalibrationImages(None, tensor=self.tensor[torch.from_numpy(rows)])

    def few(self, count: int, seed: int) -> CalibrationImages:
        """At most `count` of them, drawn by seed."""
        if count >= len(self):
            return self
        if self.images is None:
            return self.subset(np.arange(count))
        return CalibrationImages(self.preprocess, images=self.images.take(count, seed, balanced=False))

    def alike(self, size: int) -> bool:
        """Whether all of several are equal; read by so many, as far as the first that differs."""
        first: Tensor | None = None
        for x in self.batches(size):
            first = x[:1] if first is None else first
            if bool((x != first).any()):
                return False
        return len(self) > 1

    def batches(self, size: int) -> Iterator[Tensor]:
        """[B, C, h, w] each, the same in every pass."""
        if self.images is None:
            assert self.tensor is not None
            yield from self.tensor.split(size)
            return
        assert self.preprocess is not None
        for x, _ in batches(self.images, evaluation(self.preprocess), size):
            yield x
