"""Images: what every source of pictures becomes.

A source numbers its pictures once (`row`: train first, then validation, then test). All random draws about a picture
are keyed by its row, so that a subset, another batch size or another worker sees the same picture treated alike.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from vitrim.data.draws import mix
from vitrim.data.splits import split_named
from vitrim.data.targets import Targets
from vitrim.errors import DataError

_TAKE = 0x5441_4B45  # keeps these draws apart from others with the same seed
_SHOWN = 5  # keys in a message
ON_BROKEN = ("raise", "skip")
"""What may be done about a picture that cannot be read."""

log = logging.getLogger("vitrim.data")

Label = int | torch.Tensor | None


class Source:
    """Pictures by row. Must pickle: worker processes may get a copy. Labels and class names are found by the constructor."""

    name: str
    """For messages and records: a base name, never an absolute path."""
    splits: dict[str, np.ndarray]
    """Rows of each split that is there."""
    _classes: tuple[str, ...] | None = None
    _labels: np.ndarray | None = None
    soft: bool = False
    """Whether labels [rows, classes] are shares that sum to 1, of one class each, and not several labels."""

    @property
    def blocks(self) -> np.ndarray | None:
        """int64 [rows]: which rows are cheap to read together; None if every row is equally cheap."""
        return None

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Class names in the order of the labels, or None."""
        return self._classes

    @property
    def labels(self) -> np.ndarray | None:
        """int64 [rows], or float32 [rows, classes] (several labels each, or shares); -1 for an unlabelled row; or None."""
        return self._labels

    def take_labels(self, found: Targets) -> None:
        """Keep labels as they were read."""
        self._labels, self._classes, self.soft = found.labels, found.classes, found.soft

    def labelled_rows(self, rows: np.ndarray) -> bool:
        """Whether every one of these rows has a label. Reads no image."""
        return self._labels is not None and bool((self._labels[rows] >= 0).all())

    def key(self, row: int) -> str:
        """What to call the picture in messages: a relative path, or file and row."""
        raise NotImplementedError

    def read(self, row: int) -> Image.Image:
        """The picture in RGB; DataError with its key if it cannot be read."""
        raise NotImplementedError

    def files(self) -> list[tuple[str, int]]:
        """Relative paths and sizes in bytes of what the source was read from."""
        raise NotImplementedError


def starts_of(counts: Iterable[int]) -> np.ndarray:
    """int64 [parts + 1]: the row at which each part begins, and their end."""
    return np.cumsum([0, *counts], dtype=np.int64)


def consecutive(counts: Mapping[str, int]) -> dict[str, np.ndarray]:
    """Rows of each split, one behind the other."""
    starts = starts_of(counts.values())
    return {split: np.arange(*ends) for split, *ends in zip(counts, starts, starts[1:], strict=False)}


def part_of(starts: np.ndarray, row: int) -> tuple[int, int]:
    """The part that holds a row, and the row within it."""
    part = int(np.searchsorted(starts, row, side="right")) - 1
    return part, row - int(starts[part])


class Broken(dict[str, str]):
    """Why pictures were left out, by their keys."""

    def __init__(self) -> None:
        super().__init__()
        self.told = 0

    def tell(self, name: str) -> None:
        """Log those of the data `name` that were not told yet: how many, which, and why the first."""
        new = list(self.items())[self.told :]
        self.told = len(self)
        if new:
            keys = ", ".join(key for key, _ in new[:_SHOWN]) + (" ..." if len(new) > _SHOWN else "")
            reason = new[0][1].partition(" Replace or remove it")[0]
            log.warning("%s: left out %d that cannot be read: %s. The first: %s", name, len(new), keys, reason)


@dataclass(frozen=True, eq=False)
class Skipping:
    """Data of which pictures that cannot be read are left out: a source for `vitrim.data.open`.

    broken: what was left out so far, of all splits that were opened from it.
    """

    source: Any
    broken: Broken = field(default_factory=Broken)


def skipping(source: Any, on_broken: str) -> Any:
    """The source for `vitrim.data.open` that treats pictures that cannot be read as `on_broken` says: "raise" or "skip"."""
    check_on_broken(on_broken)
    return Skipping(source) if on_broken == "skip" and not isinstance(source, Skipping) else source


def check_on_broken(on_broken: str) -> None:
    """Raise DataError for what is neither."""
    if on_broken not in ON_BROKEN:
        raise DataError(f"on_broken={on_broken!r}; expected 'raise' or 'skip'.")


class Images(Dataset[tuple[Image.Image, Label]]):
    """Pictures of one split, with labels if they have them: `len`, `[i] -> (RGB image, label or None)`.

    `broken` collects, by key, the reason for each picture that a loader skipped (`on_broken="skip"`); subsets share it.
    """

    def __init__(
        self,
        source: Source,
        rows: np.ndarray,
        *,
        split: str,
        labelled: bool,
        on_broken: str = "raise",
        broken: Broken | None = None,
    ) -> None:
        check_on_broken(on_broken)
        self.source = source
        self.rows = rows
        self.split = split
        self.labelled = labelled
        self.on_broken = on_broken
        self.broken = Broken() if broken is None else broken
        self.decoded: dict[tuple[Any, ...], torch.Tensor] = {}
        """Decoded pixels by view, kept by `vitrim.data.pixels`."""

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Class names in the order of the labels; None without labels or names."""
        return self.source.classes if self.labelled else None

    @property
    def labels(self) -> torch.Tensor | None:
        """int64 [n], or float32 [n, classes] where a picture has several labels or shares; None without labels."""
        if not self.labelled:
            return None
        labels = self.source.labels
        assert labels is not None  # `labelled` was decided by looking at them
        return torch.from_numpy(labels[self.rows])

    @property
    def set_aside_from(self) -> int | None:
        """Of how many training images these are the tenth that stands in for a missing validation split, or the rest of it; else None."""
        own = split_named(self.split)
        lacking = own in ("train", "validation") and "validation" not in self.source.splits
        return len(self.source.splits["train"]) if lacking else None

    @property
    def several(self) -> bool:
        """Whether a picture has several labels, each of which applies or not."""
        labels = self.source.labels if self.labelled else None
        return labels is not None and labels.ndim == 2 and not self.source.soft

    @property
    def class_count(self) -> int | None:
        """Classes of the whole source, which a split may lack some of; None without labels."""
        if not self.labelled:
            return None
        if self.classes is not None:
            return len(self.classes)
        labels = self.source.labels
        assert labels is not None
        return labels.shape[1] if labels.ndim == 2 else int(labels.max()) + 1

    @property
    def keys(self) -> tuple[str, ...]:
        """A stable name for each picture."""
        return tuple(self.source.key(int(row)) for row in self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Image.Image, Label]:
        row = int(self.rows[index])
        return self.source.read(row), self.label(index)

    def label(self, index: int) -> Label:
        """Label of one picture without reading it."""
        if not self.labelled:
            return None
        labels = self.source.labels
        assert labels is not None
        value = labels[self.rows[index]]
        return int(value) if labels.ndim == 1 else torch.from_numpy(value)

    def subset(self, positions: np.ndarray) -> Images:
        """The pictures at these positions, in this order."""
        return Images(
            self.source,
            self.rows[positions],
            split=self.split,
            labelled=self.labelled,
            on_broken=self.on_broken,
            broken=self.broken,
        )

    def skipping(self, broken: Broken) -> Images:
        """The same pictures, of which those that cannot be read are left out and noted in `broken`."""
        return Images(self.source, self.rows, split=self.split, labelled=self.labelled, on_broken="skip", broken=broken)

    def take(self, count: int, seed: int = 0, *, balanced: bool = True) -> Images:
        """`count` pictures drawn by seed (all of them if there are no more), in the order in which they stand.

        balanced: with labels, as many of each class as can be; without labels it says nothing.
        """
        if count < 1:
            raise DataError(f"cannot take {count} images from {self.name}; expected a count of at least 1.")
        order = np.argsort(mix(seed, _TAKE, self.rows), kind="stable")
        labels = self.labels if balanced else None
        if labels is not None and labels.ndim == 1:
            drawn = labels.numpy()[order]
            by_class = np.argsort(drawn, kind="stable")  # grouped by class, in drawn order within each
            _, starts, sizes = np.unique(drawn[by_class], return_index=True, return_counts=True)
            turn = np.empty(len(order), dtype=np.int64)
            turn[by_class] = np.arange(len(order)) - np.repeat(starts, sizes)
            order = order[np.argsort(turn, kind="stable")]  # one of each class, then the second of each, ...
        return self.subset(np.sort(order[:count]))

    def fingerprint(self) -> dict[str, Any]:
        """What the data was, without reading it: counts, and a hash of relative paths, sizes and chosen rows."""
        files = sorted(self.source.files())
        digest = hashlib.sha256()
        for path, size in files:
            digest.update(f"{path}\t{size}\n".encode("utf-8", "surrogateescape"))
        digest.update(self.rows.astype("<i8").tobytes())
        return {
            "name": self.name,
            "split": self.split,
            "count": len(self),
            "files": len(files),
            "bytes": sum(size for _, size in files),
            "sha256": digest.hexdigest(),
        }

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "decoded": {}}  # workers decode for themselves
