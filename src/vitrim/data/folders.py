"""Folders of image files: one subfolder for each class, or photos without labels, with or without split folders."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from PIL import Image

from vitrim.data.images import Source, consecutive, decode
from vitrim.data.splits import SPLITS, split_named
from vitrim.errors import DataError

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".jfif"})


class FolderSource(Source):
    """Image files under a folder, in the order of their paths within each split; hidden names are passed over.

    Subfolders named like splits (train, val, validation, test, ...) are the splits if train is among them or if there is
    no other subfolder. Below that, the first folder level is the class where all images lie in such folders and there
    are at least two of them; photos nested in any other way have no labels.
    """

    def __init__(self, root: Path, *, labelled: bool | None = None) -> None:
        self.root = root
        self.name = root.resolve().name
        parts = _split_folders(root)
        found = {split: paths for split in SPLITS if split in parts and (paths := _walk(root, parts[split]))}
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
        named = [rows for rows in self.splits.values() if not loose[rows].any()]
        classes = tuple(sorted({str(folders[row]) for rows in named for row in rows}))
        if len(classes) < 2:
            return
        index = {name: i for i, name in enumerate(classes)}
        self._classes = classes
        self._labels = np.full(len(self.paths), -1, dtype=np.int64)
        for rows in named:
            self._labels[rows] = [index[str(folders[row])] for row in rows]

    def key(self, row: int) -> str:
        return self.paths[row]

    def read(self, row: int) -> Image.Image:
        return decode(self.root / self.paths[row], key=self.paths[row])

    def files(self) -> list[tuple[str, int]]:
        return [(path, (self.root / path).stat().st_size) for path in self.paths]


def _split_folders(root: Path) -> dict[str, str]:
    """Split -> subfolder; {"train": ""} where the subfolders are no splits."""
    children = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
    named = [(split, child) for child in children if (split := split_named(child)) is not None]
    splits = dict(named)
    if not named or ("train" not in splits and len(named) < len(children)):
        return {"train": ""}
    if len(splits) < len(named):
        raise DataError(
            f"{root.resolve().name}: several subfolders for one split among {', '.join(child for _, child in named)}; "
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
