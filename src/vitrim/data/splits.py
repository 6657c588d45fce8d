"""Splits by name, and the part of train that stands in for a missing validation split."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from vitrim.data.draws import ranked
from vitrim.errors import DataError

SPLITS = ("train", "validation", "test")
_WORDS = {"train": "train training", "validation": "val valid validation dev", "test": "test testing"}
_NAMES = {word: split for split, words in _WORDS.items() for word in words.split()}
_VALIDATION = 0x5641_4C49  # keeps these draws apart from others with the same seed


def split_named(name: str) -> str | None:
    """The split that a folder's or a split's whole name says ("val" -> "validation"), or None."""
    return _NAMES.get(name.lower())


def split_of_path(path: str) -> str | None:
    """The split that a file's relative path says, or None: its name first, then its folders from the inside out.

    "data/train-00000-of-00004.parquet" -> "train"; a longer word ("trainer") says nothing.
    """
    for part in reversed(path.split("/")):
        for word in re.split(r"[^A-Za-z]+", part):
            if (split := split_named(word)) is not None:
                return split
    return None


def validation_rows(count: int, seed: int = 0) -> np.ndarray:
    """int64, ascending: the rows, a tenth of `count`, that are set aside from train for validation.

    Depends on (count, seed) alone; at least one row where there are two or more.
    """
    held = max(count // 10, 1) if count >= 2 else 0
    return np.sort(ranked(seed, _VALIDATION, np.arange(count))[:held])


def choose(splits: Mapping[str, np.ndarray], split: str, *, seed: int, name: str) -> np.ndarray:
    """int64: the rows of the split asked for ("val" is understood); "all" is every row of every split.

    Without a validation split of its own, train is what `validation_rows` leaves and validation what it takes.
    DataError where the data has no such split: nothing stands in for a missing test split.
    """
    wanted = "all" if split == "all" else split_named(split)
    if wanted is None:
        raise DataError(f"unknown split {split!r}; expected one of train, validation, test, all.")
    if wanted == "all":
        return np.concatenate([splits[part] for part in SPLITS if part in splits])
    if wanted in splits and (wanted == "test" or "validation" in splits):
        return splits[wanted]
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
    there = ", ".join(part for part in SPLITS if part in splits)
    raise DataError(
        f"{name}: no {wanted} split; it has: {there}. Choose one of these, or name a folder or file {wanted!r}."
    )
