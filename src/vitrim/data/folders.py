"""Folders of image files: one subfolder for each class, or photos without labels, with or without split folders."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from PIL import Image

from vitrim.data.images import Source, consecutive, decode
from vitrim.data.splits import SPLITS, in_order, split_named, split_of_word
from vitrim.errors import DataError

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".jfif"})


class FolderSource(Source):
    """Image files under a folder, in the order of their paths within each split; hidden names are passed over.

    Subfolders named like splits (train, val, dev, test, eval, ..., training_set) are the splits if train is among them, if there is no
    other subfolder, or if any holds folders itself; the other subfolders are then splits of their own names, which `choose` asks about.
    Below that, the first folder level is the class where all images lie in such folders and there are at least two of them;
    photos nested in any other way have no labels.
    """

    def __init__(self, root: Path, *, labelled: bool | None = None) -> None:
        self.root = root
        self.name = root.resolve().name
        every = _walk(root, "")
        parts = _split_folders(every, self.name)
        found = {
            split: [path for path in every if path.startswith(parts[split])] for split in sorted(parts, key=in_order)
        }
        self.paths = [path for paths in found.values() for path in paths]
        if not self.paths:
            raise DataError(
                f"{self.name}: no images in this folder; expected files such as .jpg or .png, one subfolder for each class "
                "(or photos in any nesting, for methods without labels), or .parquet files."
            )
        self.splits = consecutive({split: len(paths) for split, paths in found.items()})
        if labelled is not False:
            self._name_classes(level=0 if "" in parts.values() else 1)

    def _name_classes(self, level: int) -> None:
        """A class for every path that has a folder of its own; a split whose photos lie loose stays unlabelled.

        level: how many leading folders of a path belong to the split.
        """
        folders = [parts[level] if len(parts := path.split("/")) > level + 1 else None for path in self.paths]
        loose = np.array([folder is None for folder in folders])
        named = {split: rows for split, rows in self.splits.items() if not loose[rows].any()}
        known = [split for split in named if split in SPLITS] or list(named)
        classes = tuple(sorted({str(folders[row]) for split in known for row in named[split]}))
        if len(classes) < 2:
            return
        index = {name: i for i, name in enumerate(classes)}
        self._classes = classes
        self._labels = np.full(len(self.paths), -1, dtype=np.int64)
        for rows in named.values():
            self._labels[rows] = [index.get(str(folders[row]), -1) for row in rows]

    def key(self, row: int) -> str:
        return self.paths[row]

    def read(self, row: int) -> Image.Image:
        return decode(self.root / self.paths[row], key=self.paths[row])

    def files(self) -> list[tuple[str, int]]:
        return [(path, (self.root / path).stat().st_size) for path in self.paths]


def _split_folders(paths: list[str], name: str) -> dict[str, str]:
    """Split -> what its paths begin with; {"train": ""} where the subfolders are no splits."""
    nested = {path.split("/")[0]: False for path in paths if "/" in path}
    for path in paths:
        if path.count("/") > 1:
            nested[path.split("/")[0]] = True
    exact = {child: split_named(child) for child in nested}
    words = {child: split_of_word(child) for child in nested}
    if all(words.values()) and ("train" in words.values() or any(exact.values())):
        exact = words
    elif not any(exact.values()) or ("train" not in exact.values() and not any(nested.values())):
        return {"train": ""}
    said = [(split or child, child) for child, split in exact.items()]
    splits = {split: f"{child}/" for split, child in said}
    if len(splits) < len(said):
        raise DataError(
            f"{name}: several subfolders for one split among {', '.join(child for _, child in said)}; "
            "expected at most one each for train, validation and test. Rename or move one."
        )
    return splits


def _walk(root: Path, under: str) -> list[str]:
    """Relative paths (with "/") of the image files below; linked folders are followed once."""
    found: list[str] = []
    seen: set[str] = set()
    for folder, folders, files in os.walk(root / under, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        within = Path(folder).relative_to(root).as_posix()
        found += [
            file if within == "." else f"{within}/{file}"
            for file in files
            if not file.startswith(".") and os.path.splitext(file)[1].lower() in SUFFIXES
        ]
    return sorted(found)
