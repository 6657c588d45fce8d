"""Splits are told by the words of the `datasets` library; a name that is none of them is asked about."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import numpy as np
import pytest

from tests.data.pictures import class_folder, jpeg, parquet
from vitrim import data
from vitrim.data.splits import choose, split_of_path, splits_of_files
from vitrim.errors import DataError


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("data/train-00000-of-00004.parquet", "train"),
        ("training.parquet", "train"),
        ("val_0.parquet", "validation"),
        ("valid.parquet", "validation"),
        ("set.dev.0.parquet", "validation"),
        ("validation2017/0000.parquet", "validation"),
        ("testing.parquet", "test"),
        ("eval-00000-of-00001.parquet", "test"),
        ("Evaluation/0000.parquet", "test"),
        ("holdout-0.parquet", "holdout"),
        ("trainer/evaluator.parquet", None),
        ("latest.parquet", None),
    ],
)
def test_a_path_says_its_split_in_the_words_of_datasets(path: str, split: str | None) -> None:
    assert split_of_path(path) == split


def test_a_file_that_says_no_split_beside_one_that_does_is_of_a_split_of_its_own() -> None:
    assert splits_of_files(["train-0.parquet", "extra-00000-of-00001.parquet"]) == ["train", "extra"]
    assert splits_of_files(["train/0000.parquet", "more/0000.parquet"]) == ["train", "more"]
    assert splits_of_files(["left-00000-of-00001.parquet", "right-00000-of-00001.parquet"]) == ["left", "right"]
    assert splits_of_files(["flowers-00000-of-00002.parquet", "flowers-00001-of-00002.parquet"]) == ["train", "train"]
    assert splits_of_files(["a.parquet", "b.parquet"]) == ["train", "train"]


def shards(folder: Path, names: dict[str, int]) -> Path:
    folder.mkdir()
    for name, count in names.items():
        parquet(
            folder / f"{name}-00000-of-00001.parquet", [jpeg(i) for i in range(count)], [i % 2 for i in range(count)]
        )
    return folder


@pytest.mark.parametrize(("word", "split"), [("eval", "test"), ("evaluation", "test"), ("dev", "validation")])
def test_shards_of_other_splits_do_not_join_the_training_set(word: str, split: str, tmp_path: Path) -> None:
    folder = shards(tmp_path / "set", {"train": 20, word: 3})
    assert len(data.open(folder, split=split)) == 3
    assert len(data.open(folder)) == (20 if split == "validation" else 18)


def test_a_split_of_another_name_is_asked_about_and_can_be_named(tmp_path: Path) -> None:
    folder = shards(tmp_path / "set", {"train": 4, "holdout": 2})
    for split in ("train", "validation", "test"):
        with pytest.raises(
            DataError, match=r"which split is 'holdout'\? The words are train: train, training; validation: "
        ):
            data.open(folder, split=split)
    assert (len(data.open(folder, split="holdout")), len(data.open(folder, split="all"))) == (2, 6)
    whole = shards(tmp_path / "whole", {"train": 4, "val": 2, "holdout": 1})
    assert (len(data.open(whole)), len(data.open(whole, split="val"))) == (4, 2)


def test_a_folder_of_evaluation_is_the_test_split(tmp_path: Path) -> None:
    for split, count in {"train": 4, "eval": 2, "dev": 3}.items():
        class_folder(tmp_path / split, {"cat": count, "dog": count})
    assert [len(data.open(tmp_path, split=split)) for split in ("train", "validation", "test")] == [8, 6, 4]


def test_folders_whose_names_hold_a_splits_word_are_splits_and_no_classes(tmp_path: Path) -> None:
    for split, count in {"training_set": 4, "test_set": 2, "val2017": 3}.items():
        class_folder(tmp_path / split, {"cat": count, "dog": count})
    assert [len(data.open(tmp_path, split=split)) for split in ("train", "validation", "test")] == [8, 6, 4]
    assert data.open(tmp_path).classes == ("cat", "dog")


@pytest.mark.parametrize("names", [("train", "holdout"), ("train", "cat", "dog"), ("val", "holdout")])
def test_a_folder_beside_splits_that_is_none_is_asked_about(names: tuple[str, ...], tmp_path: Path) -> None:
    for name in names:
        class_folder(tmp_path / name, {"a": 2, "b": 2})
    with pytest.raises(DataError, match=rf"which split is '{names[1]}'"):
        data.open(tmp_path)
    assert len(data.open(tmp_path, split=names[1])) == 4
    assert data.open(tmp_path, split=names[1]).classes == ("a", "b")


def test_a_class_may_be_called_like_a_split_or_by_its_word(tmp_path: Path) -> None:
    assert data.open(class_folder(tmp_path / "one", {"test": 2, "cat": 2}), split="all").classes == ("cat", "test")
    trains = class_folder(tmp_path / "two", {"bullet train": 2, "car": 2})
    assert data.open(trains, split="all").classes == ("bullet train", "car")


def test_splits_of_a_hub_set_keep_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    class Part:
        def __init__(self, count: int) -> None:
            self.count = count
            self.features = {
                "jpg": type("Image", (), {"__init__": lambda self, decode=True: None})(),
                "cls": types.SimpleNamespace(),
            }

        def with_format(self, kind: None) -> Part:
            return self

        def cast_column(self, column: str, feature: object) -> Part:
            return self

        def __len__(self) -> int:
            return self.count

        def __getitem__(self, at: int | str) -> object:
            labels = [i % 3 for i in range(self.count)]
            return labels if at == "cls" else {"jpg": {"bytes": jpeg(int(at)), "path": None}, "cls": labels[int(at)]}

    parts = {"train": Part(20), "eval": Part(4), "holdout": Part(6)}
    fake = types.SimpleNamespace(load_dataset=lambda name, config: parts)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    assert [len(data.open("hf:a/b", split=split)) for split in ("test", "holdout", "all")] == [4, 6, 30]
    assert data.open("hf:a/b", split="test", labelled=True)[1][1] == 1
    with pytest.raises(DataError, match="which split is 'holdout'"):
        data.open("hf:a/b")


def test_a_split_without_rows_is_refused() -> None:
    with pytest.raises(DataError, match="its test split holds no images"):
        choose({"train": np.arange(3), "test": np.arange(0)}, "test", seed=0, name="set")
