"""Pictures that are in memory already: tensors, and torch data sets of (image, label)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vitrim.data.decoding import broken, decode, to_rgb
from vitrim.data.hub import names_of_feature
from vitrim.data.images import Source
from vitrim.data.parquet import image_and_label
from vitrim.data.targets import class_names, is_missing, read_targets, unlabelled_among
from vitrim.errors import DataError


class TensorSource(Source):
    """images [n,3,h,w], uint8 or float in [0, 1]; labels: one for each (a tensor or a list), as `read_targets` has them, or None."""

    def __init__(self, images: Tensor, labels: Any = None, *, classes: tuple[str, ...] | None = None) -> None:
        self.name = "tensor"
        self.pixels = _as_uint8(images)
        self.splits = {"train": np.arange(len(images))}
        self._classes = classes
        if labels is None:
            return
        if len(labels) != len(images):
            shape = tuple(labels.shape) if isinstance(labels, Tensor) else f"({len(labels)},)"
            raise DataError(
                f"labels of shape {shape} for {len(images)} images; expected one for each, or ({len(images)}, classes) where an "
                "image has several labels."
            )
        self.take_labels(read_targets(_plain(labels), classes, name=self.name))

    def key(self, row: int) -> str:
        return f"image {row}"

    def read(self, row: int) -> Image.Image:
        return _from_uint8(self.pixels[row])

    def files(self) -> list[tuple[str, int]]:
        return [(f"tensor {tuple(self.pixels.shape)}", self.pixels.numel())]


_COMPARED = 8
"""Items that must agree with labels told beside them."""


class DatasetSource(Source):
    """A map-style torch Dataset, or a list, whose items are (image, label), {"image": image, "label": label} or images.

    An image is PIL, a tensor [3,h,w] as for TensorSource, or the path of a file. Labels come from its `targets` or `labels`
    where these say what some of its items say, else from its items, once, when first asked for. Class names come from its
    `classes` or `class_to_idx`, also through torch's Subset and ConcatDataset.
    """

    def __init__(self, dataset: Any) -> None:
        self.name = type(dataset).__name__
        self.dataset = dataset
        try:
            count = len(dataset)
        except (TypeError, ValueError, OverflowError) as error:
            raise DataError(
                f"{self.name} has no length; expected a map-style Dataset with __len__ and __getitem__."
            ) from error
        if count == 0:
            raise DataError(f"{self.name} is empty; expected a Dataset of images.")
        self.splits = {"train": np.arange(count)}
        self.labelled = not is_missing(self._item(0)[1])
        self._read = False
        self._broken: set[int] = set()

    @property
    def labels(self) -> np.ndarray | None:
        if self.labelled and not self._read:
            values = self._told()
            if values is None:
                values = [self._label(row) for row in range(len(self.splits["train"]))]
            self.take_labels(read_targets(values, names_of(self.dataset), name=self.name))
            self._read = True
            assert self._labels is not None  # the first item has one
            lacking = unlabelled_among(self._labels).tolist()
            if unlabelled := sorted({*lacking} - self._broken):
                raise DataError(
                    f"{self.name}: {len(unlabelled)} of {len(values)} items have no label (the first is {self.key(unlabelled[0])}); "
                    "expected one in each, or in none. Leave them out, or give images alone."
                )
        return self._labels

    @property
    def classes(self) -> tuple[str, ...] | None:
        _ = self.labels  # where they are names, they name the classes
        return self._classes

    def labelled_rows(self, rows: np.ndarray) -> bool:
        return self.labelled  # without a look at the others, which may mean to read them all

    def _told(self) -> Any:
        """Labels that the Dataset holds beside its items; None where it has none, or others (a target_transform)."""
        if getattr(self.dataset, "target_transform", None) is not None:
            return None
        for name in ("targets", "labels"):
            told = getattr(self.dataset, name, None)
            if told is None or isinstance(told, str | dict) or not hasattr(told, "__len__"):
                continue
            if len(told) != len(self.splits["train"]):
                continue
            values = _plain(told)
            rows = sorted({*np.linspace(0, len(values) - 1, _COMPARED).astype(int).tolist()})
            if all(
                _plain([self._label(row)])[0] == _plain([values[row]])[0] for row in rows if row not in self._broken
            ):
                return values
        return None

    def key(self, row: int) -> str:
        return f"{self.name}[{row}]"

    def read(self, row: int) -> Image.Image:
        image, _ = self._item(row)
        if isinstance(image, str | Path):
            return decode(Path(image), key=f"{self.key(row)} ({image})")
        if isinstance(image, Image.Image):
            try:
                return to_rgb(image)
            except Exception as error:  # it may be lazy, and read its file only now
                raise broken(self.key(row), error) from error
        if isinstance(image, Tensor):
            return _from_uint8(_as_uint8(image[None])[0])
        mend = (
            "Image.fromarray makes one of an RGB array."
            if isinstance(image, np.ndarray)
            else "Leave normalising transforms out: the model's own preprocessing is applied here."
        )
        raise DataError(
            f"{self.key(row)}: its image is of type {type(image).__name__}; expected a PIL image, a tensor [3,h,w] or a path. {mend}"
        )

    def files(self) -> list[tuple[str, int]]:
        return [(self.name, len(self.splits["train"]))]

    def _label(self, row: int) -> Any:
        try:
            return self._item(row)[1]
        except DataError:
            self._broken.add(row)
            return None  # whoever reads the image itself is told

    def _item(self, row: int) -> tuple[Any, Any]:
        """Image and label, None where there is none."""
        try:
            item = self.dataset[int(row)]
        except Exception as error:  # a caller's Dataset may raise anything
            raise broken(self.key(row), error) from error
        if isinstance(item, Mapping):
            others = [key for key in ("pixel_values", "images") if key in item]
            image, label = image_and_label([key for key in item if isinstance(key, str)], others, [])
            if image is None:
                raise DataError(
                    f"{self.key(row)}: no image among {', '.join(map(str, item))}; expected items (image, label), or with the keys "
                    "'image' and 'label'."
                )
            return item[image], None if label is None else item[label]
        if isinstance(item, tuple | list):
            return (item[0] if item else None), (item[1] if len(item) >= 2 else None)
        return item, None


def names_of(dataset: Any) -> tuple[str, ...] | None:
    """Class names that a Dataset, or the one that it is a part of, tells; None where there are none."""
    for holder in (dataset, getattr(dataset, "reader", None)):  # timm keeps them with the reader
        for name in ("classes", "class_to_idx"):
            if (names := class_names(getattr(holder, name, None))) is not None:
                return names
    if isinstance(
        features := getattr(dataset, "features", None), Mapping
    ):  # of the `datasets` library, within a Subset
        return next((names for each in features.values() if (names := names_of_feature(each)) is not None), None)
    if (inner := getattr(dataset, "dataset", None)) is not None:  # Subset
        return names_of(inner)
    parts = [names_of(part) for part in getattr(dataset, "datasets", ())]  # ConcatDataset
    if len({*parts}) > 1:
        raise DataError(
            f"{type(dataset).__name__}: its parts have different class names; expected the same names in the same order. "
            "Number the labels of all parts alike."
        )
    return parts[0] if parts else None


def _plain(values: Any) -> Any:
    """Labels as plain values, a list of them; whole numbers as they are in an array."""
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        return values.numpy() if values.ndim == 1 and not values.is_floating_point() else values.tolist()
    return [value.tolist() if isinstance(value, Tensor | np.ndarray | np.generic) else value for value in values]


def _as_uint8(images: Tensor) -> Tensor:
    """[n,3,h,w] uint8 on the CPU of images as a caller gives them."""
    if images.ndim != 4 or images.shape[1] != 3:
        last = images.ndim == 4 and images.shape[3] == 3
        raise DataError(
            f"images of shape {tuple(images.shape)}; expected [n, 3, height, width]."
            + (" Move the channels forward: images.permute(0, 3, 1, 2), or np.moveaxis(images, 3, 1)." if last else "")
        )
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
