"""Folders, Parquet, tensors, Datasets, the Hub and the sample; bad data."""

from __future__ import annotations

import os
import pickle
import sys
import types
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from tests.data.pictures import SMALL, class_folder, encoded, jpeg, parquet
from vitrim import data
from vitrim.data import parquet as parquet_module
from vitrim.data.decoding import decode
from vitrim.data.loading import batches
from vitrim.data.transforms import evaluation
from vitrim.errors import DataError


def labels_of(images: data.Images) -> list[int]:
    assert images.labels is not None
    return images.labels.tolist()


def test_subfolders_are_classes_in_the_order_of_their_names(tmp_path):
    images = data.open(class_folder(tmp_path, {"dog": 6, "cat": 6}), split="all")
    assert images.classes == ("cat", "dog")
    image, label = images[0]
    assert (image.mode, image.size, label) == ("RGB", (32, 32), 0)
    assert images.keys[0] == "cat/0.jpg"
    assert labels_of(images) == [0] * 6 + [1] * 6


def test_folders_named_like_splits_are_the_splits(tmp_path):
    for split, count in {"train": 4, "val": 3, "test": 2}.items():
        class_folder(tmp_path / split, {"cat": count, "dog": count})
    sizes = {split: len(data.open(tmp_path, split=split)) for split in ("train", "val", "validation", "test", "all")}
    assert sizes == {"train": 8, "val": 6, "validation": 6, "test": 4, "all": 18}


def test_classes_keep_their_numbers_in_a_split_that_lacks_one(tmp_path):
    class_folder(tmp_path / "train", {"ant": 2, "bee": 2, "cat": 2})
    class_folder(tmp_path / "val", {"bee": 2, "cat": 2})
    validation = data.open(tmp_path, split="val")
    assert validation.classes == ("ant", "bee", "cat")
    assert labels_of(validation) == [1, 1, 2, 2]


def test_a_test_folder_of_loose_photos_is_unlabelled_beside_labelled_training_images(tmp_path):
    class_folder(tmp_path / "train", {"cat": 2, "dog": 2})
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "a.jpg").write_bytes(jpeg(0))
    assert data.open(tmp_path, split="test").labels is None
    assert data.open(tmp_path, split="train").classes == ("cat", "dog")


def test_photos_in_any_nesting_are_read_without_labels(tmp_path):
    class_folder(tmp_path, {"2024/summer": 3, "2024/winter/snow": 3, ".hidden": 1})
    images = data.open(tmp_path, split="all")
    assert images.labels is None
    assert images.classes is None
    assert images.keys[0] == "2024/summer/0.jpg"
    assert len(images) == 6
    assert len(data.open(class_folder(tmp_path / "x", {"cat": 2, "dog": 2}), split="all", labelled=False)) == 4


def test_a_linked_loop_of_folders_ends(tmp_path):
    class_folder(tmp_path, {"cat": 2, "dog": 2})
    os.symlink(tmp_path, tmp_path / "cat" / "again")
    assert len(data.open(tmp_path, split="all")) == 4


def test_parquet_shards_are_split_by_their_names_and_numbered_train_first(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    parquet(folder / "test-00000-of-00001.parquet", [jpeg(5)], [1])
    parquet(folder / "train-00001-of-00002.parquet", [jpeg(2), jpeg(3)], [0, 1])
    parquet(folder / "train-00000-of-00002.parquet", [jpeg(0), jpeg(1)], [1, 1])
    parquet(folder / "validation-00000-of-00001.parquet", [jpeg(4)], [0])
    train = data.open(tmp_path)
    assert labels_of(train) == [1, 1, 0, 1]
    assert train.classes == ("0", "1")
    assert np.array_equal(np.asarray(train[2][0]), np.asarray(decode(jpeg(2), key="")))
    assert train.keys[2] == "data/train-00001-of-00002.parquet row 0"
    assert (len(data.open(tmp_path, split="test")), len(data.open(tmp_path, split="val"))) == (1, 1)


def test_string_labels_several_labels_and_unlabelled_rows_are_told_apart(tmp_path):
    images = [jpeg(0), jpeg(1)]
    named = data.open(parquet(tmp_path / "a.parquet", images, label=pa.array(["dog", "cat"])), split="all")
    assert (named.classes, labels_of(named)) == (("cat", "dog"), [1, 0])
    several = data.open(parquet(tmp_path / "b.parquet", images, labels=pa.array([[0, 2], []])), split="all")
    assert several.labels is not None
    assert several.labels.tolist() == [[1, 0, 1], [0, 0, 0]]
    assert data.open(parquet(tmp_path / "c.parquet", images, [-1, -1]), split="all").labels is None


def test_tables_of_other_tools_tell_splits_and_labels_in_columns_and_folders(tmp_path):
    images = [jpeg(0), jpeg(1)]
    told = parquet(
        tmp_path / "a.parquet", images * 2, split=pa.array(["test", "train"] * 2), Label=pa.array([2, 0, 1, 0])
    )
    assert {split: labels_of(data.open(told, split=split)) for split in ("test", "all")} == {
        "test": [2, 1],
        "all": [0, 0, 2, 1],
    }
    for folder in ("split=train/label=cat", "split=train/label=a%20dog", "split=test/label=cat"):
        (tmp_path / "spark" / folder).mkdir(parents=True)
        parquet(tmp_path / "spark" / folder / "part-0.snappy.PARQUET", images)
    spark = data.open(tmp_path / "spark", split="test", labelled=True)
    (tmp_path / "spark" / "split=val" / "label=__HIVE_DEFAULT_PARTITION__").mkdir(parents=True)
    parquet(tmp_path / "spark" / "split=val" / "label=__HIVE_DEFAULT_PARTITION__" / "0.parquet", images)
    assert data.open(tmp_path / "spark", split="val").labels is None
    assert (len(spark), spark.classes, labels_of(spark)) == (2, ("a dog", "cat"), [1, 1])
    views = pa.array(images, pa.binary_view())
    pq.write_table(pa.table({"image": views}), tmp_path / "b.parquet")
    assert data.open(tmp_path / "b.parquet", split="all")[1][0].size == (32, 32)


def test_labels_that_are_no_classes_do_not_matter_where_none_are_needed(tmp_path):
    table = parquet(tmp_path / "a.parquet", [jpeg(0), jpeg(1)], label=pa.array([0.5, 1.5]))
    assert len(data.open(table, split="all", labelled=False)) == 2
    with pytest.raises(DataError, match=r"expected a whole number.* To do without labels, rename the column 'label'"):
        data.open(table, split="all")


def test_labels_that_some_images_lack_are_left_with_a_word(tmp_path, caplog):
    table = parquet(tmp_path / "a.parquet", [jpeg(0)] * 3, label=pa.array([0, None, 1]))
    assert data.open(table, split="all").labels is None
    assert "no label is used, since 1 of 3 images have none" in caplog.text
    assert "a.parquet row 1" in caplog.text


def test_names_of_classes_that_are_no_list_are_left_and_listed_features_are_read(tmp_path):
    table = pq.read_table(parquet(tmp_path / "a.parquet", [jpeg(0), jpeg(1)], label=pa.array([[0, 1], []])))
    for feature, classes in (
        ('[{"_type": "ClassLabel", "names": ["a", "b", "c"]}]', ("a", "b", "c")),
        ('{"_type": "ClassLabel", "names": 5}', ("0", "1")),
        ('{"_type": "ClassLabel", "names": "ab"}', ("0", "1")),
    ):
        told = f'{{"info": {{"features": {{"label": {feature}}}}}}}'
        pq.write_table(table.replace_schema_metadata({b"huggingface": told.encode()}), tmp_path / "b.parquet")
        assert data.open(tmp_path / "b.parquet", split="all").classes == classes


def test_a_split_of_which_no_image_has_a_label_is_named(tmp_path):
    parquet(tmp_path / "train.parquet", [jpeg(0), jpeg(1)], [0, 1])
    parquet(tmp_path / "test.parquet", [jpeg(2)], [-1])
    with pytest.raises(DataError, match="no image of its test split has a label"):
        data.open(tmp_path, split="test", labelled=True)


def test_a_parquet_set_too_big_to_hold_gives_the_same_images(monkeypatch):
    held = data.open("sample", split="test")
    monkeypatch.setattr(parquet_module, "IN_MEMORY_BYTES", 0)
    streamed = data.open("sample", split="test")
    assert streamed.source.blocks is not None
    for index in (0, 7, 1999):
        assert held[index][0].tobytes() == streamed[index][0].tobytes()
    orders = [
        torch.cat(
            [y for _, y in batches(streamed.take(50), evaluation(SMALL), 10, seed=s, shuffle=True) if y is not None]
        )
        for s in (0, 0, 1)
    ]
    assert torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0], orders[2])


def test_images_beside_a_parquet_file_are_read_and_those_outside_are_refused(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(jpeg(0))
    (tmp_path / "out.jpg").write_bytes(jpeg(0))
    cells = [{"bytes": None, "path": "a.jpg"}, {"bytes": None, "path": "../out.jpg"}]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pq.write_table(pa.table({"image": pa.array(cells, kind)}), folder / "x.parquet")
    images = data.open(folder, split="all")
    assert images[0][0].size == (32, 32)
    with pytest.raises(DataError, match="leaves the folder"):
        images[1]


def test_tensors_give_back_their_pixels_and_labels():
    pixels = torch.randint(0, 256, (20, 3, 8, 8), dtype=torch.uint8)
    images = data.open((pixels, torch.arange(20) % 3), split="all")
    assert np.array_equal(np.asarray(images[4][0]), pixels[4].permute(1, 2, 0).numpy())
    assert images[4][1] == 1
    floats = data.open(pixels.double() / 255, split="all")
    assert floats.labels is None
    assert np.array_equal(np.asarray(floats[4][0]), np.asarray(images[4][0]))


class Pairs(torch.utils.data.Dataset):
    classes = ("ant", "bee")

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        if index == 3:
            raise RuntimeError("disk gone")
        return Image.new("L", (8, 8), index), index % 2


def test_a_dataset_gives_images_names_and_one_sentence_when_it_fails():
    images = data.open(Pairs(), split="all")
    assert (len(images), images.classes, images[0][0].mode) == (10, ("ant", "bee"), "RGB")
    assert (images[0][1], images[5][1]) == (0, 1)
    with pytest.raises(DataError, match=r"Pairs\[3\]: not a readable image \(disk gone\)"):
        images[3]


def test_what_people_have_in_python_is_read_alike(tmp_path):
    pictures = [Image.new("RGB", (8, 8), (row, 0, 0)) for row in range(4)]
    files = []
    for row, picture in enumerate(pictures):
        files.append(tmp_path / f"{row}.png")
        picture.save(files[-1])
    pixels = np.stack([np.moveaxis(np.asarray(picture), 2, 0) for picture in pictures])
    labels = ["b", "a", "b", "a"]
    keyed = [{"image": picture, "label": label} for picture, label in zip(pictures, labels, strict=True)]
    sources = {
        "items with keys": keyed,
        "tensors with keys": [
            {"pixel_values": torch.from_numpy(x), "labels": y} for x, y in zip(pixels, labels, strict=True)
        ],
        "a list and labels": (pictures, labels),
        "paths": list(zip(map(str, files), labels, strict=True)),
        "an array and labels": (pixels, np.array(labels)),
    }
    for name, source in sources.items():
        images = data.open(source, split="all", labelled=True)
        assert (images.classes, labels_of(images)) == (("a", "b"), [1, 0, 1, 0]), name
        assert [images[row][0].getpixel((0, 0)) for row in (0, 3)] == [(0, 0, 0), (3, 0, 0)], name
    for source in (files, pictures, pixels, list(torch.from_numpy(pixels[:2]))):
        images = data.open(source, split="all")
        assert (len(images), images.labels, images[1][0].getpixel((0, 0))) == (len(source), None, (1, 0, 0))


def test_a_hub_name_goes_through_datasets_and_its_absence_names_the_extra(monkeypatch, tmp_path):
    beside = tmp_path / "3.png"
    beside.write_bytes(encoded(Image.new("RGB", (5, 4))))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"vitrim\[data\]"):
        data.open("hf:someone/flowers")

    class Image_:
        def __init__(self, decode: bool = True) -> None:
            self.decode = decode

    Image_.__name__ = "Image"

    class Part:
        rows = None

        def __init__(self, count: int) -> None:
            self.count = count
            self.features = {"image": Image_(), "label": types.SimpleNamespace(names=["rose", "tulip"])}

        def with_format(self, kind: None) -> Part:
            return self

        def cast_column(self, column: str, feature: Image_) -> Part:
            assert (column, feature.decode) == ("image", False)
            return self

        def __len__(self) -> int:
            return self.count

        def __getitem__(self, at: int | str) -> object:
            if isinstance(at, str):
                return [i % 2 for i in range(self.count)]
            if self.rows is not None:
                return self.rows(at)
            if at == 3:  # a data set from files on this machine
                return {"image": {"bytes": None, "path": str(beside)}, "label": at % 2}
            return {"image": {"bytes": jpeg(at), "path": None}, "label": at % 2}

    def load_dataset(name: str, config: str | None) -> dict[str, Part]:
        if name != "someone/flowers":
            raise ConnectionError("offline")
        return {"train": Part(20), "test": Part(4)}

    fake = types.SimpleNamespace(load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    images = data.open("hf:someone/flowers", split="test")
    assert (len(images), images.classes, labels_of(images)) == (4, ("rose", "tulip"), [0, 1, 0, 1])
    assert [images[row][0].size for row in (1, 3)] == [(32, 32), (5, 4)]
    assert len(data.open("hf:someone/flowers", split="validation")) == 2
    monkeypatch.setitem(sys.modules, "datasets", None)  # a caller's own object needs no look at the library
    own = data.open({"train": Part(20), "test": Part(4)}, split="test")
    assert (own.name, own.classes, labels_of(own)) == ("Part", ("rose", "tulip"), [0, 1, 0, 1])
    assert data.open(Part(20), split="all")[3][0].size == (5, 4)
    own = Part(20)
    own.rows = lambda row: {"image": [[0, 0, 0]], "label": row % 2}
    with pytest.raises(DataError, match="column 'image' holds list and no pictures"):
        data.open(own, split="all")[0]
    own.rows = lambda row: {"image": Image.new("RGB", (4, 4)), "label": row % 2}
    assert data.open(torch.utils.data.Subset(own, [0, 1]), split="all").classes == ("rose", "tulip")
    assert data.open(Part(20), split="all", labelled=False).labels is None
    monkeypatch.setitem(sys.modules, "datasets", fake)
    with pytest.raises(DataError, match=r"cannot be loaded \(offline\)"):
        data.open("hf:nobody/nothing")


def test_the_sample_is_balanced_and_keeps_apart_what_the_full_set_keeps_apart():
    held = set(data.validation_rows(50_000, 0).tolist())
    assert len(held) == 5_000
    for split, count in {"train": 9_000, "validation": 1_000, "test": 2_000}.items():
        images = data.open("sample", split=split)
        assert torch.bincount(images.labels).tolist() == [count // 10] * 10
        rows = pq.read_table(data.SAMPLE / f"{split}.parquet").column("row").to_numpy()
        assert len(set(rows.tolist())) == count
        if split != "test":
            assert {row in held for row in rows.tolist()} == {split == "validation"}
    assert sum(file.stat().st_size for file in data.SAMPLE.iterdir()) < 4_500_000


def test_the_rows_set_aside_are_a_tenth_and_never_change():
    assert data.validation_rows(50, 0).tolist() == [11, 17, 24, 26, 44]
    assert data.validation_rows(2).size == 1
    assert data.validation_rows(1).size == 0
    assert data.validation_rows(50, 1).tolist() != data.validation_rows(50, 0).tolist()


def test_without_a_validation_split_train_and_validation_share_nothing(tmp_path):
    class_folder(tmp_path, {"cat": 10, "dog": 10})
    train, held = data.open(tmp_path), data.open(tmp_path, split="validation")
    assert (len(train), len(held)) == (18, 2)
    assert not set(train.keys) & set(held.keys)
    assert set(train.keys) != set(data.open(tmp_path, seed=1).keys)
    with pytest.raises(DataError, match="no test split; it has: train"):
        data.open(tmp_path, split="test")


def test_a_limit_takes_as_many_of_each_class():
    images = data.open("sample", limit=50, seed=3)
    assert torch.bincount(images.labels).tolist() == [5] * 10
    assert images.keys == data.open("sample", limit=50, seed=3).keys
    assert images.keys != data.open("sample", limit=50, seed=4).keys


def test_a_fingerprint_holds_no_absolute_path_and_follows_sizes(tmp_path):
    class_folder(tmp_path / "here", {"cat": 3, "dog": 3})
    class_folder(tmp_path / "there" / "here", {"cat": 3, "dog": 3})
    first, second = (
        data.open(path, split="all").fingerprint() for path in (tmp_path / "here", tmp_path / "there/here")
    )
    assert first == second
    assert str(tmp_path) not in str(first)
    (tmp_path / "here" / "cat" / "0.jpg").write_bytes(jpeg(8) + b"\0")
    assert data.open(tmp_path / "here", split="all").fingerprint()["sha256"] != first["sha256"]


def test_images_pickle_for_worker_processes(tmp_path):
    for source in ("sample", class_folder(tmp_path, {"cat": 3, "dog": 3}), torch.zeros(4, 3, 8, 8)):
        images = data.open(source, split="all")
        again = pickle.loads(pickle.dumps(images))
        assert again[1][0].tobytes() == images[1][0].tobytes()


GREY16 = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)


@pytest.mark.parametrize(
    ("raw", "corner"),
    [
        (encoded(Image.fromarray(GREY16)), (255, 255, 255)),
        (encoded(Image.fromarray(GREY16.astype(np.int32)), "TIFF"), (255, 255, 255)),
        (encoded(Image.fromarray(np.full((8, 8), 0.5, np.float32)), "TIFF"), (128, 128, 128)),
        (encoded(Image.new("L", (8, 8), 90)), (90, 90, 90)),
        (encoded(Image.new("1", (8, 8), 1)), (255, 255, 255)),
        (encoded(Image.new("RGBA", (8, 8), (10, 20, 30, 40))), (10, 20, 30)),
        (encoded(Image.new("CMYK", (8, 8), (0, 0, 0, 0)), "TIFF"), (255, 255, 255)),
        (encoded(Image.new("RGB", (8, 8), (0, 0, 255)).quantize(4), transparency=b"\0\1"), (0, 0, 255)),
        (
            encoded(
                Image.new("RGB", (8, 8), (255, 0, 0)), "GIF", save_all=True, append_images=[Image.new("RGB", (8, 8))]
            ),
            (255, 0, 0),
        ),
    ],
    ids=["16-bit", "32-bit", "float", "grey", "bilevel", "alpha", "cmyk", "palette", "animated"],
)
def test_every_kind_of_image_becomes_rgb_at_eight_bits(raw, corner):
    image = decode(raw, key="x")
    assert image.mode == "RGB"
    assert image.getpixel((7, 7)) == corner


def test_16_bit_images_are_scaled_and_not_clipped():
    values = np.asarray(decode(encoded(Image.fromarray(GREY16)), key="x"))[..., 0]
    assert np.abs(values.astype(float) - GREY16 / 257).max() <= 0.5


def bad_cases(root: Path) -> dict[str, tuple[object, dict[str, object], str]]:
    (root / "empty").mkdir()
    (root / "text").mkdir()
    (root / "text" / "notes.txt").write_text("no image")
    (root / "file.txt").write_text("no image")
    (root / "broken.parquet").write_bytes(b"PAR1 cut short")
    pq.write_table(pa.table({"x": [1, 2]}), root / "numbers.parquet")
    parquet(root / "range.parquet", [jpeg(0)], [3])
    table = pq.read_table(root / "range.parquet")
    names = b'{"info": {"features": {"label": {"_type": "ClassLabel", "names": ["a", "b"]}}}}'
    pq.write_table(table.replace_schema_metadata({b"huggingface": names}), root / "range.parquet")
    (root / "mixed").mkdir()
    parquet(root / "mixed" / "a.parquet", [jpeg(0)])
    parquet(root / "mixed" / "b.parquet", [jpeg(0)], [1])
    class_folder(root / "one", {"cat": 1})
    class_folder(root / "flat", {".": 3})
    class_folder(root / "twice", {"train/a": 1, "val/a": 1, "valid/a": 1})
    pixels = torch.zeros(2, 3, 4, 4)
    return {
        "missing": (root / "nowhere", {}, "no such file or folder"),
        "empty": (root / "empty", {}, "no images in this folder"),
        "non-image folder": (root / "text", {}, "no images in this folder"),
        "non-image file": (root / "file.txt", {}, "expected a folder of images or a .parquet file"),
        "cut parquet": (root / "broken.parquet", {}, "not a readable Parquet file"),
        "no image column": (root / "numbers.parquet", {}, "no image column among x"),
        "label out of range": (root / "range.parquet", {}, "label 3 with 2 classes"),
        "two data sets": (root / "mixed", {}, "differ from those of a.parquet"),
        "too few": (root / "one", {"split": "validation"}, "too few to set a tenth aside"),
        "no labels": (root / "flat", {"labelled": True}, "images without labels"),
        "two validation folders": (root / "twice", {}, "several subfolders for one split"),
        "unknown split": ("sample", {"split": "tset"}, "unknown split 'tset'"),
        "bad limit": ("sample", {"limit": 0}, "count of at least 1"),
        "bad flag": ("sample", {"on_broken": "ignore"}, "expected 'raise' or 'skip'"),
        "type": (3.5, {}, "data of type float"),
        "shape": (torch.zeros(2, 4, 4, 3), {}, "expected [n, 3, height, width]"),
        "range": (pixels - 2.0, {}, "before normalisation"),
        "not a number": (pixels * float("nan"), {}, "values from nan"),
        "label count": ((pixels, torch.zeros(3).long()), {}, "labels of shape (3,) for 2 images"),
        "label of a measure": ((pixels, torch.tensor([0.5, 2.0])), {}, "row 0 is 0.5; expected a whole number"),
        "label type": ((pixels, 3), {}, "expected a tensor or a list"),
        "labels by number": ((pixels, {0: 1, 1: 0}), {}, "labels of type dict"),
        "one label": ((pixels, torch.tensor(1)), {}, "expected a tensor or a list"),
        "labels of a list": (([Image.new("RGB", (4, 4))], [0, 1]), {}, "2 labels for 1 images"),
        "channels last": (np.zeros((2, 4, 4, 3), np.uint8), {}, "np.moveaxis(images, 3, 1)"),
        "text": (np.array(["a.jpg"]), {}, "an array of dtype <U5"),
        "bytes": (b"photos", {}, "data of type bytes"),
        "dict": ({"image": pixels}, {}, "data of type dict"),
        "table": (pa.table({"image": [b""]}), {}, "Write a table as Parquet and name that"),
        "items without image": ([{"text": "a"}], {}, "no image among text"),
    }


def test_bad_data_is_refused_in_one_sentence_that_says_what_was_expected(tmp_path):
    for case, (source, settings, words) in bad_cases(tmp_path).items():
        with pytest.raises(DataError) as caught:
            data.open(source, **settings)
        assert words in str(caught.value), case
        assert "\n" not in str(caught.value), case
