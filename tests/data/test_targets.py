"""Labels are read in one way, whatever the source."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from tests.data.pictures import jpeg, parquet
from vitrim import data
from vitrim.data.targets import read_targets
from vitrim.errors import DataError

NAN = float("nan")


class Items(torch.utils.data.Dataset):
    """Pictures of one colour with these labels."""

    def __init__(self, labels: list[Any], **attributes: Any) -> None:
        self.given = labels
        self.__dict__.update(attributes)

    def __len__(self) -> int:
        return len(self.given)

    def __getitem__(self, index: int) -> tuple[Image.Image, Any]:
        return Image.new("RGB", (8, 8), (index, 0, 0)), self.given[index]


READINGS: dict[str, tuple[list[Any], list[Any], tuple[str, ...] | None, bool]] = {
    "class numbers": ([2, 0, 1, 2], [2, 0, 1, 2], None, False),
    "whole floats": ([2.0, 0.0, 1.0, 2.0], [2, 0, 1, 2], None, False),
    "names": (["dog", "cat", "dog", "ant"], [2, 1, 2, 0], ("ant", "cat", "dog"), False),
    "names in bytes": ([b"dog", b"cat", b"dog", b"ant"], [2, 1, 2, 0], ("ant", "cat", "dog"), False),
    "numbers in text": (["10", "9", "10", "2"], [2, 1, 2, 0], ("2", "9", "10"), False),
    "multi-hot": (
        [[1, 0, 1], [0, 1, 0], [0, 0, 0], [1, 1, 1]],
        [[1, 0, 1], [0, 1, 0], [0, 0, 0], [1, 1, 1]],
        None,
        False,
    ),
    "multi-hot of two": ([[1, 1], [0, 1], [0, 0], [1, 0]], [[1, 1], [0, 1], [0, 0], [1, 0]], None, False),
    "multi-hot in floats": (
        [[1.0, 0.0], [1.0, 1.0], [0.0, 0.0], [0.0, 1.0]],
        [[1, 0], [1, 1], [0, 0], [0, 1]],
        None,
        False,
    ),
    "one-hot": ([[0, 0, 1], [1, 0, 0], [0, 1, 0], [0, 0, 1]], [2, 0, 1, 2], None, False),
    "soft": (
        [[0.5, 0.25, 0.25], [0.0, 1.0, 0.0], [0.25, 0.5, 0.25], [1.0, 0.0, 0.0]],
        [[0.5, 0.25, 0.25], [0, 1, 0], [0.25, 0.5, 0.25], [1, 0, 0]],
        None,
        True,
    ),
    "lists of one number": ([[2], [0], [1], [2]], [2, 0, 1, 2], None, False),
    "lists of one name": ([["dog"], ["cat"], ["dog"], ["ant"]], [2, 1, 2, 0], ("ant", "cat", "dog"), False),
    "lists of numbers": ([[0, 2], [1], [], [2, 0]], [[1, 0, 1], [0, 1, 0], [0, 0, 0], [1, 0, 1]], None, False),
    "lists of names": (
        [["dog", "ant"], ["cat"], [], ["ant"]],
        [[1, 0, 1], [0, 1, 0], [0, 0, 0], [1, 0, 0]],
        ("ant", "cat", "dog"),
        False,
    ),
}


@pytest.mark.parametrize("case", READINGS)
def test_parquet_a_dataset_and_a_pair_read_a_label_alike(case: str, tmp_path: Path) -> None:
    values, labels, names, soft = READINGS[case]
    file = parquet(tmp_path / "a.parquet", [jpeg(i) for i in range(4)], label=pa.array(values))
    sources = {
        "parquet": file,
        "dataset": Items(values),
        "dataset with targets": Items(values, targets=values),
        "subset": torch.utils.data.Subset(Items(values), range(4)),
        "pair": (torch.zeros(4, 3, 8, 8), values),
    }
    for name, source in sources.items():
        images = data.open(source, split="all", labelled=True)
        assert images.labels is not None
        assert images.labels.tolist() == labels, name
        counted = tuple(map(str, range(images.class_count or 0)))
        assert images.classes == (names or (counted if name == "parquet" else None)), name
        assert images.several == (images.labels.dim() == 2 and not soft), name


REFUSED: dict[str, tuple[list[Any], str]] = {
    "a measure": ([0, 1.5], "row 1 is 1.5; expected a whole number"),
    "infinity": ([0, float("inf")], "row 1 is inf; expected a whole number"),
    "a negative number": ([0, -7], "row 1 is -7; expected class numbers from 0 on"),
    "a number beyond all": ([0, 2**40], "row 1 is 1099511627776; expected class numbers below 1,000,000"),
    "a number of 64 bits": ([0, 2**64 - 1], "expected class numbers below"),
    "a number beyond all, listed": ([[0], [2**40, 1]], "expected class numbers below"),
    "a negative number, listed": ([[0], [-1, 1]], "expected class numbers from 0 on"),
    "a struct": ([{"id": 1}, {"id": 2}], "row 0 is a struct"),
    "bytes of no text": ([b"\xff\xfe", b"a"], "row 0 is 2 bytes that are no text"),
    "a list of lists": ([[[1]], [[2]]], "row 0 is a list of lists"),
    "numbers and names": ([0, "cat"], "row 0 is a number, that of row 1 a name"),
    "names and lists": (["cat", ["cat"]], "row 0 is a name, that of row 1 a list"),
    "numbers and names, listed": ([["cat", 1], ["cat"]], "lists of names and numbers"),
    "places of unequal number": ([[1.0, 0.0], [1.0]], "lists of 1 to 2 places"),
    "0 and 1 of unequal number": ([[1, 0, 0], [1, 0]], "lists of 2 to 3 places"),
    "repeated numbers": ([[3, 3], [1, 2]], "row 0 repeats a number"),
    "NaN in a list": ([[1.0, NAN], [0.0, 1.0]], "row 0 is a list with an empty place"),
    "scores": ([[3.5, -1.0], [0.0, 1.0]], "values from -1 to 3.5; expected a share in [0, 1]"),
    "lists of one": ([[0], [1]], "lists of one 0 or 1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_label_is_refused_with_its_row(case: str) -> None:
    values, words = REFUSED[case]
    with pytest.raises(DataError) as caught:
        read_targets(values, None, name="set")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_table_of_labels_beyond_memory_is_refused_before_it_is_made() -> None:
    with pytest.raises(DataError, match="take more than 4 GB"):
        read_targets([[999_999, 1], *([0] for _ in range(1100))], None, name="set")


def test_null_nan_and_minus_one_are_no_label_and_are_counted_where_labels_are_needed(tmp_path: Path) -> None:
    for values in ([1, None, 0], [1.0, NAN, 0.0], [1, -1, 0], ["b", None, "a"], ["b", "", "a"]):
        file = parquet(tmp_path / "a.parquet", [jpeg(0)] * 3, label=pa.array(values))
        images = data.open(file, split="all")
        assert images.source.labels is not None
        assert images.source.labels.tolist() == [1, -1, 0]
        with pytest.raises(DataError, match=r"1 of 3 images have no label .* a\.parquet row 1\)"):
            data.open(file, split="all", labelled=True)
        with pytest.raises(DataError, match=r"1 of 3 items have no label \(the first is Items\[1\]\)"):
            _ = data.open(Items(values), split="all").labels
    lists = read_targets([[0, 1], None, []], None, name="set").labels
    assert lists is not None
    assert lists.tolist() == [[1, 1], [-1, -1], [0, 0]]
    assert read_targets([NAN, None], None, name="set").labels is None


def test_names_of_the_source_bound_numbers_and_lists() -> None:
    assert read_targets(["1", "0"], ("a", "b"), name="set").labels.tolist() == [1, 0]  # type: ignore[union-attr]
    assert read_targets([[0, 1], [1, 0]], ("a", "b", "c"), name="set").labels.tolist() == [[1, 1, 0], [1, 1, 0]]  # type: ignore[union-attr]
    for values, words in (
        ([2], "label 2 with 2 classes (row 0)"),
        ([[2], [0]], "label 2 with 2 classes (row 0)"),
        (["c"], "'c' is none of its 2 class names a, b"),
        ([["c"], []], "'c' is none of its 2 class names a, b"),
        ([[0.5, 0.1, 0.2]], "labels of 3 places for 2 class names"),
    ):
        with pytest.raises(DataError) as caught:
            read_targets(values, ("a", "b"), name="set")
        assert words in str(caught.value)


def test_parquet_columns_that_are_no_labels_or_stand_twice_are_refused(tmp_path: Path) -> None:
    whole = pq.read_table(parquet(tmp_path / "a.parquet", [jpeg(0)] * 2, [0, 1]))
    unsigned = pa.array(np.array([0, 2**64 - 1], dtype=np.uint64))
    tables = {
        "expected class numbers below": whole.set_column(1, "label", unsigned),
        "2 columns are named 'label'": whole.append_column("label", pa.array([1, 1])),
        "2 columns are named 'image'": whole.append_column("image", whole.column("image")),
        "of type datetime": whole.set_column(1, "label", pa.array([0, 1], pa.timestamp("s"))),
        "labels of type timestamp[ns] cannot be read": whole.set_column(
            1, "label", pa.array([1, 2], pa.timestamp("ns"))
        ),
        "a struct": whole.set_column(1, "label", pa.array([{"a": 1}, {"a": 2}])),
    }
    for words, table in tables.items():
        pq.write_table(table, tmp_path / "b.parquet")
        with pytest.raises(DataError) as caught:
            data.open(tmp_path / "b.parquet", split="all")
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)


def test_columns_of_webdataset_are_images_and_labels(tmp_path: Path) -> None:
    for column in ("jpg", "png"):
        pq.write_table(
            pa.table({"__key__": ["a", "b"], column: [jpeg(0), jpeg(1)], "cls": [3, 1]}), tmp_path / "x.parquet"
        )
        images = data.open(tmp_path / "x.parquet", split="all", labelled=True)
        assert images.labels is not None
        assert images.labels.tolist() == [3, 1]
        assert images[1][0].size == (32, 32)


def test_names_of_a_dataset_are_found_through_what_holds_it() -> None:
    inner = Items([1, 0, 1, 0], classes=["ant", "bee"])
    part = torch.utils.data.Subset(inner, [0, 1, 2])
    assert data.open(part, split="all").classes == ("ant", "bee")
    assert data.open(torch.utils.data.ConcatDataset([part, inner]), split="all").classes == ("ant", "bee")
    assert data.open(Items([1, 0], class_to_idx={"bee": 1, "ant": 0}), split="all").classes == ("ant", "bee")
    synonyms = Items([1, 0], classes=[("tench", "Tinca tinca"), ("goldfish",)])
    assert data.open(synonyms, split="all").classes == ("tench, Tinca tinca", "goldfish")
    other = Items([0, 1], classes=["bee", "ant"])
    with pytest.raises(DataError, match="different class names"):
        _ = data.open(torch.utils.data.ConcatDataset([inner, other]), split="all").classes


def test_targets_beside_the_items_are_believed_only_where_they_say_the_same() -> None:
    turned = Items([1, 1, 0], targets=[0, 0, 1], target_transform=lambda label: 1 - label)
    assert data.open(turned, split="all").labels.tolist() == [1, 1, 0]  # type: ignore[union-attr]
    stale = Items([0, 1, 0, 1], targets=[0, 0, 1, 1])
    assert data.open(stale, split="all").labels.tolist() == [0, 1, 0, 1]  # type: ignore[union-attr]
    named = Items(["b", "a"], targets=[1, 0])
    assert data.open(named, split="all").classes == ("a", "b")
