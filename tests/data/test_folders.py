"""Folders as people have them: other formats, empty class folders, names that are no UTF-8."""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from vitrim import data
from vitrim.errors import DataError

from .pictures import encoded, parquet

RED = encoded(Image.new("RGB", (8, 8), (255, 0, 0)))


def class_folders(root: Path, **files: list[str]) -> Path:
    """root/CLASS/FILE, each a red image whatever its ending."""
    for folder, names in files.items():
        (root / folder).mkdir(parents=True)
        for name in names:
            (root / folder / name).write_bytes(RED)
    return root


def test_a_class_folder_without_a_picture_keeps_its_place_and_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = class_folders(tmp_path, ant=["0.png"], bee=[], cow=["0.png", "notes.txt", "list.csv", "b.txt"], __MACOSX=[])
    with caplog.at_level(logging.WARNING, "vitrim.data"):
        images = data.open(root, split="all")
    assert images.classes == ("ant", "bee", "cow")
    assert images.labels is not None
    assert images.labels.tolist() == [0, 2]
    assert "no image in the class folder bee, which keeps the place among 3 classes" in caplog.text
    assert "passed over what is no image: 2 .txt, 1 .csv" in caplog.text


@pytest.mark.parametrize("suffix", [".avif", ".heic", ".jxl", ".jp2"])
def test_a_picture_of_a_rarer_format_is_read_or_refused_by_name_and_never_passed_over(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    root = class_folders(tmp_path, ant=["0.png"], bee=[])
    (root / "bee" / f"0{suffix}").write_bytes(b"\0\0\0\x18ftypheic" + bytes(30) if suffix == ".heic" else b"nothing")
    images = data.open(root, split="all")
    assert (images.classes, len(images)) == (("ant", "bee"), 2)
    with pytest.raises(DataError, match=rf"^bee/0{suffix}: not a readable image"):
        images[1]


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
def test_avif_is_read_where_pillow_can(tmp_path: Path) -> None:
    (tmp_path / "0.avif").write_bytes(encoded(Image.new("RGB", (16, 16), (255, 0, 0)), "AVIF"))
    image, _ = data.open(tmp_path, split="all")[0]
    assert np.abs(np.asarray(image).astype(int) - [255, 0, 0]).max() < 8


@pytest.mark.skipif(sys.platform != "linux", reason="file names are text here")
def test_names_that_are_no_utf8_are_read_and_shown(tmp_path: Path) -> None:
    root = os.fsencode(tmp_path)
    for folder in (b"caf\xe9", b"the"):
        os.mkdir(os.path.join(root, folder))
        with open(os.path.join(root, folder, b"\xff.png"), "wb") as file:
            file.write(RED)
    images = data.open(tmp_path, split="all")
    assert images.classes == (r"caf\udce9", "the")
    assert images.keys == (r"caf\udce9/\udcff.png", r"the/\udcff.png")
    assert images[0][0].getpixel((0, 0)) == (255, 0, 0)
    json.dumps({"fingerprint": images.fingerprint(), "keys": images.keys}, ensure_ascii=False).encode()


@pytest.mark.parametrize("name", ["", " ", "hf:", "a\0b"])
def test_data_that_names_nothing_is_refused(name: str) -> None:
    with pytest.raises(DataError, match="names nothing"):
        data.open(name)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
@pytest.mark.parametrize("name", ["photos", "photos.parquet", "inside/photos.parquet"])
def test_a_pipe_in_place_of_data_is_refused_and_not_waited_for(name: str, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(DataError, match="pipe"):
        data.open(tmp_path / name.split("/")[0])


def test_shards_in_a_folder_named_like_a_file_are_read_and_hidden_files_are_not(tmp_path: Path) -> None:
    (tmp_path / "photos.parquet").mkdir()
    parquet(tmp_path / "photos.parquet" / "part-0.parquet", [RED] * 3, [0, 1, 0])
    (tmp_path / "photos.parquet" / "._part-0.parquet").write_bytes(b"what a system leaves")
    for place in (tmp_path, tmp_path / "photos.parquet"):
        assert len(data.open(place, split="all")) == 3


def test_folders_without_pictures_that_hold_other_files_and_those_of_systems_are_no_classes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = class_folders(tmp_path, ant=["0.png"], bee=["0.png"], docs=["a.txt"])
    (root / "bee" / "@eaDir").mkdir()
    (root / "bee" / "@eaDir" / "small.jpg").write_bytes(RED)
    class_folders(root, **{"@eaDir": ["small.jpg"]})
    with caplog.at_level(logging.WARNING, "vitrim.data"):
        images = data.open(root, split="all")
    assert images.classes == ("ant", "bee")
    assert images.keys == ("ant/0.png", "bee/0.png")
    assert "no image in the folder docs: taken for no class" in caplog.text


@pytest.mark.parametrize(
    ("train", "test"),
    [("photos/train", "photos/test"), ("seg_train/seg_train", "seg_test/seg_test"), ("a=train", "a=test")],
)
def test_splits_are_found_in_one_folder_around_them_and_in_folders_of_their_own_names(
    train: str, test: str, tmp_path: Path
) -> None:
    class_folders(tmp_path, **{f"{folder}/{name}": ["0.png"] for folder in (train, test) for name in ("ant", "bee")})
    for split in ("all", "test"):
        images = data.open(tmp_path, split=split, labelled=True)
        assert images.classes == ("ant", "bee")
        assert images.labels is not None
        assert images.labels.tolist() == [0, 1] * (2 if split == "all" else 1)


def test_one_class_written_in_two_ways_is_refused_and_two_of_one_split_are_two(tmp_path: Path) -> None:
    class_folders(tmp_path / "letters", **{f"{split}/{name}": ["0.png"] for split in ("train", "val") for name in "aA"})
    assert data.open(tmp_path / "letters", split="val").classes == ("A", "a")
    class_folders(tmp_path / "pets", **{"train/Cat": ["0.png"], "train/dog": ["0.png"], "val/cat": ["0.png"]})
    with pytest.raises(DataError, match="one class is written in several ways, 'Cat', 'cat'"):
        data.open(tmp_path / "pets", split="val")


def test_a_picture_beside_class_folders_is_named_as_what_hides_the_classes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class_folders(tmp_path, ant=["0.png"], bee=["0.png"])
    (tmp_path / "cover.png").write_bytes(RED)
    with caplog.at_level(logging.WARNING, "vitrim.data"):
        assert data.open(tmp_path, split="all").labels is None
    assert "1 of 3 images lie beside them (the first is cover.png)" in caplog.text


def test_archives_and_tables_are_told_what_to_become(tmp_path: Path) -> None:
    for ending, words in {".tar": "Unpack archives first", ".arrow": "Write such tables as Parquet first"}.items():
        class_folders(tmp_path / ending, shards=[f"train-0{ending}"])
        with pytest.raises(DataError, match=words):
            data.open(tmp_path / ending)


def test_a_folder_that_cannot_be_listed_is_refused_and_not_taken_for_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class_folders(tmp_path, ant=["0.png"], bee=["0.png"], cow=["0.png"])
    listed = os.scandir

    def scandir(path: str) -> object:
        if Path(path).name == "cow":  # as without the right to read it, which a test as root cannot take away
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(DataError, match=r"cow: cannot be read \(Permission denied\)"):
        data.open(tmp_path)
