"""Splits by name, and the part of train that stands in for a missing validation split."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np

from vitrim.data.draws import ranked
from vitrim.errors import DataError

SPLITS = ("train", "validation", "test")
WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""As the `datasets` library reads them."""
_NAMES = {word: split for split, words in WORDS.items() for word in words}
_UNSURE = ("holdout", "heldout")  # say that this is a split, and not which
_SEPARATORS = re.compile(r"[-._= 0-9]+")  # "=": a table partitioned by its split, "split=train"
_VALIDATION = 0x5641_4C49  # keeps these draws apart from others with the same seed


def split_named(name: str) -> str | None:
    """The split that a folder's or a split's whole name says ("val" -> "validation"), or None."""
    return _NAMES.get(name.lower())


def split_of_word(name: str) -> str | None:
    """The split that a word of a name says ("training_set" -> "train"); a word that may be any split is one of its own; or None."""
    for word in _SEPARATORS.split(name.lower()):
        if word in _UNSURE:
            return word
        if (split := split_named(word)) is not None:
            return split
    return None


def split_of_path(path: str) -> str | None:
    """The split that a file's relative path says, or None: its name first, then its folders from the inside out.

    "data/train-00000-of-00004.parquet" -> "train"; a longer word ("trainer") says nothing.
    """
    return next((split for part in reversed(path.split("/")) if (split := split_of_word(part)) is not None), None)


def splits_of_files(paths: Sequence[str]) -> list[str]:
    """The split of each of the files of one data set, by relative paths.

    Where no path says one, all are train. Else a file that says none is of a split of its own: `choose` asks what it is. So
    are shards of several names ("left-00000-of-00002", "right-00000-of-00002").
    """
    said = [split_of_path(path) for path in paths]
    own = [_own_name(path) for path in paths]
    sharded = {name for path, name in zip(paths, own, strict=True) if re.search(r"-\d{5}-of-\d{5}", path)}
    if not any(said) and len(sharded) < 2:
        return ["train"] * len(paths)
    return [split or name for split, name in zip(said, own, strict=True)]


def _own_name(path: str) -> str:
    """What is left of a file's name without numbers, or else of its folder's."""
    for part in reversed(path.removesuffix(".parquet").split("/")):
        if name := re.sub(r"[-._ ]*\d+([-._ ]of[-._ ]\d+)?", "", part).strip("-._ "):
            return name
    return path


def in_order(split: str) -> tuple[int, str]:
    """Sorts train, validation, test, then all others by name."""
    return (SPLITS.index(split) if split in SPLITS else len(SPLITS), split)


def validation_rows(count: int, seed: int = 0) -> np.ndarray:
    """int64, ascending: the rows, a tenth of `count`, that are set aside from train for validation.

    Depends on (count, seed) alone; at least one row where there are two or more.
    """
    held = max(count // 10, 1) if count >= 2 else 0
    return np.sort(ranked(seed, _VALIDATION, np.arange(count))[:held])


def choose(splits: Mapping[str, np.ndarray], split: str, *, seed: int, name: str) -> np.ndarray:
    """int64: the rows of the split asked for ("val" is understood); "all" is every row of every split.

    Without a validation split of its own, train is what `validation_rows` leaves and validation what it takes.
    DataError where the data has no such split: nothing stands in for a missing test split, and one of another name may be
    what is missing, so that its name is asked for.
    """
    if split == "all":
        return np.concatenate([splits[part] for part in sorted(splits, key=in_order)])
    wanted = split if split in splits else split_named(str(split))
    if wanted is None:
        raise DataError(f"unknown split {split!r}; expected one of train, validation, test, all.")
    if wanted in splits and (wanted != "train" or "validation" in splits):
        if len(splits[wanted]) == 0:
            raise DataError(f"{name}: its {wanted} split holds no images; expected at least one. Choose another split.")
        return splits[wanted]
    there = ", ".join(sorted(splits, key=in_order))
    if others := [repr(part) for part in sorted(splits) if part not in SPLITS]:
        words = "; ".join(f"{part}: {', '.join(WORDS[part])}" for part in SPLITS)
        raise DataError(
            f"{name}: which split is {' and '.join(others[:3])}? The words are {words}. Rename it, or move it out of here "
            f"(folders of classes belong into a folder 'train'); from Python, split={others[0]} takes it as it is."
        )
    if wanted in ("train", "validation") and "train" in splits:
        train = splits["train"]
        held = validation_rows(len(train), seed)
        rows = train[held] if wanted == "validation" else np.delete(train, held)
        if len(rows) == 0:
            raise DataError(
                f"{name}: {len(train)} image(s) in train, too few to set a tenth aside for validation; "
                "expected at least 2, or a folder or file named 'validation'."
            )
        return rows
    raise DataError(
        f"{name}: no {wanted} split; it has: {there}. Choose one of these, or name a folder or file {wanted!r}."
    )
