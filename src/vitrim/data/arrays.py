"""Pictures that are in memory already: tensors, and torch data sets of (image, label)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from vitrim.data.images import Source, broken, to_rgb
from vitrim.data.parquet import number_labels
from vitrim.errors import DataError


class TensorSource(Source):
    """images [n,3,h,w], uint8 or float in [0, 1]; labels int64 [n], float [n, classes] of 0 and 1, or None."""

    def __init__(self, images: Tensor, labels: Tensor | None = None, *, classes: tuple[str, ...] | None = None) -> None:
        self.name = "tensor"
        self.pixels = _as_uint8(images)
        self.splits = {"train": np.arange(len(images))}
        self._classes = classes
        if labels is None:
            return
        if len(labels) != len(images) or labels.ndim not in (1, 2):
            raise DataError(
                f"labels of shape {tuple(labels.shape)} for {len(images)} images; expected ({len(images)},), "
                f"or ({len(images)}, classes) of 0 and 1 where an image has several labels."
            )
        if labels.ndim == 2:
            self._labels = labels.detach().cpu().to(torch.float32).numpy()
        elif labels.is_floating_point():
            raise DataError(
                f"labels of dtype {labels.dtype}; expected integers, one for each image. Pass labels.long()."
            )
        else:
            self._labels = labels.detach().cpu().to(torch.int64).numpy()

    def key(self, row: int) -> str:
        return f"image {row}"

    def read(self, row: int) -> Image.Image:
        return _from_uint8(self.pixels[row])

    def files(self) -> list[tuple[str, int]]:
        return [(f"tensor {tuple(self.pixels.shape)}", self.pixels.numel())]


class DatasetSource(Source):
    """A map-style torch Dataset whose items are (image, label) or images: PIL, or tensors [3,h,w] as for TensorSource.

    Labels come from its `targets` or `labels` if it has them, else from its items, once, when first asked for.
    """

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.name = type(dataset).__name__
        self.dataset = dataset
        try:
            count = len(dataset)  # type: ignore[arg-type]
        except TypeError as error:
            raise DataError(
                f"{self.name} has no length; expected a map-style Dataset with __len__ and __getitem__."
            ) from error
        if count == 0:
            raise DataError(f"{self.name} is empty; expected a Dataset of images.")
        self.splits = {"train": np.arange(count)}
        first = self._item(0)
        self.labelled = isinstance(first, tuple | list) and len(first) >= 2
        names = getattr(dataset, "classes", None)
        self._classes = tuple(str(name) for name in names) if names is not None else None

    @property
    def labels(self) -> np.ndarray | None:
        if self._labels is None and self.labelled:
            known = (getattr(self.dataset, name, None) for name in ("targets", "labels"))
            values = next((value for value in known if value is not None), None)
            if values is None:
                values = [self._label(row) for row in range(len(self.splits["train"]))]
            listed = [value.tolist() if isinstance(value, Tensor | np.ndarray) else value for value in values]
            if listed and isinstance(listed[0], list | tuple):
                self._labels = np.asarray(listed, dtype=np.float32)
            else:
                self._labels, _ = number_labels(listed, self._classes, several=False, name=self.name)
        return self._labels

    def labelled_rows(self, rows: np.ndarray) -> bool:
        return self.labelled if self._labels is None else super().labelled_rows(rows)

    def key(self, row: int) -> str:
        return f"{self.name}[{row}]"

    def read(self, row: int) -> Image.Image:
        item = self._item(row)
        image = item[0] if isinstance(item, tuple | list) else item
        if isinstance(image, Image.Image):
            return to_rgb(image)
        if isinstance(image, Tensor):
            return _from_uint8(_as_uint8(image[None])[0])
        raise DataError(
            f"{self.key(row)}: its image is of type {type(image).__name__}; expected a PIL image or a tensor [3,h,w]. "
            "Leave normalising transforms out: the model's own preprocessing is applied here."
        )

    def files(self) -> list[tuple[str, int]]:
        return [(self.name, len(self.splits["train"]))]

    def _label(self, row: int) -> Any:
        try:
            return self._item(row)[1]
        except DataError:
            return None  # whoever reads the image itself is told

    def _item(self, row: int) -> Any:
        try:
            return self.dataset[int(row)]
        except Exception as error:  # a caller's Dataset may raise anything
            raise broken(self.key(row), error) from error


def _as_uint8(images: Tensor) -> Tensor:
    """[n,3,h,w] uint8 on the CPU of images as a caller gives them."""
    if images.ndim != 4 or images.shape[1] != 3:
        raise DataError(f"images of shape {tuple(images.shape)}; expected [n, 3, height, width].")
    if len(images) == 0:
        raise DataError("a tensor of 0 images; expected at least one.")
    images = images.detach().cpu()
    if images.dtype == torch.uint8:
        return images.contiguous()
    if not images.is_floating_point():
        raise DataError(f"images of dtype {images.dtype}; expected uint8, or float in [0, 1].")
    low, high = float(images.min()), float(images.max())
    if not (low >= 0.0 and high <= 1.0):  # written so that NaN fails too
        raise DataError(
            f"float images with values from {low:.3g} to {high:.3g}; expected [0, 1], before normalisation. "
            "Undo the normalisation: the model's own preprocessing is applied here."
        )
    return (images * 255.0).round().to(torch.uint8).contiguous()


def _from_uint8(pixels: Tensor) -> Image.Image:  # 3 h w
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
