"""Folders of image files: one subfolder for each class, or photos without labels, with or without split folders."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from vitrim.data.decoding import decode
from vitrim.data.images import Source, consecutive
from vitrim.data.labels import loose
from vitrim.data.splits import SPLITS, in_order, split_named, split_of_word
from vitrim.errors import DataError
from vitrim.foreign import printable

SUFFIXES = frozenset(
    (
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".bmp", ".dib", ".tif", ".tiff", ".gif"),
        *(".avif", ".avifs", ".heic", ".heif", ".hif", ".jxl", ".jp2", ".j2k", ".jpx", ".tga"),
        *(".ppm", ".pgm", ".pbm", ".pnm"),
    )
)
"""What is taken for a picture. One that Pillow cannot read is refused or skipped by name; it is never passed over."""
PASSED_OVER = frozenset(
    {"__MACOSX", "lost+found", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "__pycache__"}
)
"""Folders that systems leave behind, some with small copies of the pictures."""
ARCHIVES = frozenset({".tar", ".zip", ".tgz", ".gz", ".xz", ".bz2", ".7z", ".rar"})
TABLES = frozenset({".arrow", ".tfrecord", ".npz", ".npy", ".pkl", ".h5", ".hdf5", ".feather", ".lmdb"})
_SHOWN = 5

log = logging.getLogger("vitrim.data")


class FolderSource(Source):
    """Image files under a folder, in the order of their paths within each split; hidden names are passed over.

    Subfolders named like splits (train, val, dev, test, eval, ..., training_set) are the splits if train is among them, if there is no
    other subfolder, or if any holds folders itself; the other subfolders are then splits of their own names, which `choose` asks about.
    One folder around all splits, and a split's folder within itself (train/train/), are gone through.
    Below that, the first folder level is the class where all images lie in such folders and there are at least two of them;
    photos nested in any other way have no labels. An empty folder of that level is a class all the same, so that the others keep
    their numbers; one that holds files but no picture is none. The log names both.
    """

    def __init__(self, root: Path, *, labelled: bool | None = None) -> None:
        self.root = root
        self.name = printable(root.resolve().name)
        every = _walk(root)
        parts = _split_folders(every.pictures, self.name)
        found = {
            split: [path for path in every.pictures if path.startswith(parts[split])]
            for split in sorted(parts, key=in_order)
        }
        others = every.others
        self.paths = [path for paths in found.values() for path in paths]
        if not self.paths:
            beside = f" (it holds {_counted(others)})" if others else ""
            unpack = " Unpack archives first." if ARCHIVES & {*others} else ""
            unpack += " Write such tables as Parquet first." if TABLES & {*others} else ""
            raise DataError(
                f"{self.name}: no images in this folder{beside}; expected files such as .jpg or .png, one subfolder for each class "
                f"(or photos in any nesting, for methods without labels), or .parquet files.{unpack}"
            )
        self.splits = consecutive({split: len(paths) for split, paths in found.items()})
        if others:
            log.warning("%s: passed over what is no image: %s.", self.name, _counted(others))
        if labelled is not False:
            self._name_classes(every.folders, parts)

    def _name_classes(self, there: Mapping[str, bool], parts: Mapping[str, str]) -> None:
        """A class for every path that has a folder of its own; a split whose photos lie loose stays unlabelled.

        there: all folders, and whether a file lies below.  parts: what the paths of each split begin with.
        """
        within = {split: [self.paths[row][len(parts[split]) :] for row in rows] for split, rows in self.splits.items()}
        found = {split: [path.partition("/")[0] if "/" in path else None for path in within[split]] for split in within}
        folders = [folder for split in found for folder in found[split]]
        named = {split: rows for split, rows in self.splits.items() if None not in found[split]}
        known = [split for split in named if split in SPLITS] or list(named)
        self._tell_beside(found)
        full = {str(folders[row]) for split in known for row in named[split]}
        if len(full) < 2:
            return
        self._refuse_alike({split: {str(folder) for folder in found[split]} for split in known})
        others = {
            path[len(parts[split]) :]: filled
            for split in known
            for path, filled in there.items()
            if path.startswith(parts[split]) and "/" not in path[len(parts[split]) :]
        }
        if stray := sorted(printable(name) for name, filled in others.items() if filled and name not in full):
            log.warning("%s: no image in the folder %s: taken for no class.", self.name, _listed(stray))
        classes = sorted(full | {name for name, filled in others.items() if not filled})
        if empty := [printable(name) for name in classes if name not in full]:
            log.warning(
                "%s: no image in the class folder%s %s, which keep%s the place among %d classes; remove what is no class.",
                self.name,
                "s" if len(empty) > 1 else "",
                _listed(empty),
                "" if len(empty) > 1 else "s",
                len(classes),
            )
        index = {name: i for i, name in enumerate(classes)}
        self._classes = tuple(printable(name) for name in classes)
        self._labels = np.full(len(self.paths), -1, dtype=np.int64)
        for rows in named.values():
            self._labels[rows] = [index.get(str(folders[row]), -1) for row in rows]

    def _tell_beside(self, found: Mapping[str, Sequence[str | None]]) -> None:
        """Say which pictures beside folders of classes keep these from being read as such."""
        for split, folders in found.items():
            if len(count := Counter(folders)) > 2 and None in count:
                row = int(self.splits[split][folders.index(None)])
                log.warning(
                    "%s: no class is read from the folders, since %d of %d images lie beside them (the first is %s); move "
                    "them into a class folder or out of here.",
                    self.name,
                    count[None],
                    len(folders),
                    self.key(row),
                )

    def _refuse_alike(self, found: Mapping[str, set[str]]) -> None:
        """Raise DataError for a class that two splits write differently ("Cat", "cat"): it would be two classes."""
        written: dict[str, set[str]] = {}
        for name in {name for names in found.values() for name in names}:
            written.setdefault(loose(name), set()).add(name)
        for names in written.values():
            if len(names) > 1 and not any(len(names & there) > 1 for there in found.values()):
                raise DataError(
                    f"{self.name}: one class is written in several ways, {_listed([repr(name) for name in sorted(names)])}; "
                    "expected the same folder name in every split. Rename one."
                )

    def key(self, row: int) -> str:
        return printable(self.paths[row])

    def read(self, row: int) -> Image.Image:
        return decode(self.root / self.paths[row], key=self.key(row))

    def files(self) -> list[tuple[str, int]]:
        return [(path, _size(self.root / path)) for path in self.paths]


def _size(path: Path) -> int:
    """Bytes of a file; -1 where a link leads nowhere, which is told when it is read."""
    try:
        return path.stat().st_size
    except OSError:
        return -1


def _counted(suffixes: Mapping[str, int]) -> str:
    """How many files there are of each ending, the commonest first."""
    common = sorted(suffixes.items(), key=lambda item: (-item[1], item[0]))
    return _listed([f"{count} {printable(suffix) or 'without an ending'}" for suffix, count in common])


def _listed(words: Sequence[str]) -> str:
    more = f" and {len(words) - _SHOWN} more" if len(words) > _SHOWN else ""
    return ", ".join(words[:_SHOWN]) + more


def _split_folders(paths: list[str], name: str, around: str = "") -> dict[str, str]:
    """Split -> what its paths begin with; {"train": ""} where the subfolders are no splits.  around: what all paths begin with."""
    inner = [path[len(around) :] for path in paths]
    nested = {path.split("/")[0]: False for path in inner if "/" in path}
    for path in inner:
        if path.count("/") > 1:
            nested[path.split("/")[0]] = True
    exact = {child: split_named(child) for child in nested}
    words = {child: split_of_word(child) for child in nested}
    if all(words.values()) and ("train" in words.values() or any(exact.values())):
        exact = words
    elif not any(exact.values()) or ("train" not in exact.values() and not any(nested.values())):
        if [*nested.values()] != [True] or not all("/" in path for path in inner):
            return {"train": ""}
        below = _split_folders(paths, name, f"{around}{next(iter(nested))}/")
        return below if set(below) <= set(SPLITS) else {"train": ""}
    said = [(split or child, child) for child, split in exact.items()]
    splits = {split: _repeated(f"{around}{child}/", split, paths) for split, child in said}
    if len(splits) < len(said):
        raise DataError(
            f"{name}: several subfolders for one split among {', '.join(child for _, child in said)}; "
            "expected at most one each for train, validation and test. Rename or move one."
        )
    return splits


def _repeated(start: str, split: str, paths: list[str]) -> str:
    """What a split's paths begin with, where an archive was unpacked into a folder of its own name ("train/train/")."""
    below = [path[len(start) :] for path in paths if path.startswith(start)]
    children = {path.split("/")[0] for path in below}
    if len(children) == 1 and all("/" in path for path in below) and split_of_word(child := children.pop()) == split:
        return _repeated(f"{start}{child}/", split, paths)
    return start


@dataclass(frozen=True)
class _Found:
    """Relative paths (with "/") of the pictures below a folder, of its folders with whether a file lies below, and its other files by ending."""

    pictures: list[str]
    folders: dict[str, bool]
    others: Counter[str]


def _refuse(error: OSError) -> None:
    """Of a folder that cannot be listed: without its pictures the others would be taken for all."""
    raise error


def _walk(root: Path) -> _Found:
    """What lies below; linked folders are followed once."""
    found = _Found([], {}, Counter())
    seen: set[str] = set()
    for folder, folders, files in os.walk(root, followlinks=True, onerror=_refuse):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in PASSED_OVER)
        within = Path(folder).relative_to(root).as_posix()
        start = "" if within == "." else f"{within}/"
        found.folders.update({f"{start}{name}": False for name in folders})
        if any(not file.startswith(".") for file in files):
            found.folders.update({start[:end]: True for end, sign in enumerate(start) if sign == "/"})
        for file in files:
            suffix = os.path.splitext(file)[1].lower()
            if file.startswith("."):
                continue
            if suffix in SUFFIXES:
                found.pictures.append(f"{start}{file}")
            else:
                found.others[suffix] += 1
    found.pictures.sort()
    return found
