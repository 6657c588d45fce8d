"""Pictures as people have them: turned by a phone, cut short, of another format, no file at all."""

from __future__ import annotations

import io
import os
import socket
import struct
import sys
import types
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from vitrim import data
from vitrim.data.decoding import decode, to_rgb
from vitrim.errors import DataError
from vitrim.spec import Preprocess

from .pictures import encoded, parquet

NOISE = np.random.default_rng(5).integers(0, 256, (6, 9, 3), dtype=np.uint8)
FTYP = b"\0\0\0\x18ftyp"


def turned(orientation: int, kind: str = "PNG") -> bytes:
    """The noise, with an orientation in its tags."""
    image = Image.fromarray(NOISE)
    tags = image.getexif()
    tags[0x0112] = orientation
    return encoded(image, kind, exif=tags.tobytes(), **({"lossless": True} if kind == "WEBP" else {}))


class Photos(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Opens its files as torchvision's ImageFolder does: converted, tags kept, not turned."""

    def __init__(self, files: list[bytes]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Image.Image:
        return Image.open(io.BytesIO(self.files[index])).convert("RGB")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_a_photograph_is_turned_upright_as_its_tags_say(orientation: int, kind: str) -> None:
    raw = turned(orientation, kind)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(raw))).convert("RGB"))
    upright = decode(raw, key="x")
    assert np.array_equal(np.asarray(upright), expected)
    assert orientation == 1 or not np.array_equal(expected, NOISE)
    assert np.array_equal(np.asarray(to_rgb(upright)), expected)  # once


def test_every_source_turns_the_same_photograph_alike(tmp_path: Path) -> None:
    raws = [turned(6), turned(1)]
    (tmp_path / "folder").mkdir()
    for number, raw in enumerate(raws):
        (tmp_path / "folder" / f"{number}.png").write_bytes(raw)
    sources = [tmp_path / "folder", parquet(tmp_path / "two.parquet", raws), Photos(raws)]
    for source in sources:
        images = data.open(source, split="all")
        assert [images[i][0].size for i in range(2)] == [(6, 9), (9, 6)]
        assert np.array_equal(np.asarray(images[0][0]), np.rot90(NOISE, -1))


def test_damaged_tags_leave_the_pixels_as_they_are_stored() -> None:
    raw = encoded(Image.fromarray(NOISE), "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff\x12\x01")
    assert np.array_equal(np.asarray(decode(raw, key="x")), NOISE)


AWKWARD = {
    "one pixel": (encoded(Image.new("RGB", (1, 1), (9, 8, 7))), (1, 1)),
    "one row": (encoded(Image.new("L", (40, 1), 5)), (40, 1)),
    "CMYK": (encoded(Image.new("CMYK", (4, 5), (0, 0, 0, 0)), "JPEG"), (4, 5)),
    "a palette with transparency": (encoded(Image.new("P", (4, 5), 1), "PNG", transparency=1), (4, 5)),
    "grey with transparency": (encoded(Image.new("LA", (4, 5), (3, 0))), (4, 5)),
    "16 bits": (encoded(Image.fromarray(np.full((5, 4), 40000, np.uint16))), (4, 5)),
    "floats with holes": (
        encoded(Image.fromarray(np.array([[0.5, float("nan")], [float("inf"), 1.0]], np.float32)), "TIFF"),
        (2, 2),
    ),
    "animated": (
        encoded(Image.new("RGB", (4, 5)), "GIF", save_all=True, append_images=[Image.new("RGB", (4, 5), 9)]),
        (4, 5),
    ),
}


@pytest.mark.parametrize("case", AWKWARD)
def test_an_awkward_picture_is_read(case: str) -> None:
    raw, size = AWKWARD[case]
    image = decode(raw, key="x")
    assert (image.mode, image.size) == ("RGB", size)


def bomb() -> bytes:
    """A PNG of a hundred bytes that says it has 100,000 x 100,000 pixels."""
    raw = bytearray(encoded(Image.new("L", (1, 1))))
    raw[16:24] = struct.pack(">II", 100_000, 100_000)
    raw[29:33] = struct.pack(">I", zlib.crc32(bytes(raw[12:29])))
    return bytes(raw)


REFUSED = {
    "empty": (b"", "it is empty"),
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n", "run git lfs pull"),
    "text": (b"<html>404</html>", "no known image format"),
    "cut short": (encoded(Image.fromarray(np.tile(NOISE, (20, 20, 1))), "JPEG")[:2000], "truncated"),
    "bomb": (bomb(), "exceeds limit"),
    "HEIC": (FTYP + b"heic" + bytes(40), "pip install pillow-heif"),
    "JPEG XL": (b"\xff\x0a" + bytes(40), "convert it to PNG or JPEG"),
    "a program": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n", "a program"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_picture_is_one_sentence_that_says_what_and_how_to_go_on(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    raw, words = REFUSED[case]
    with pytest.raises(DataError) as caught:
        decode(raw, key="cat/1.jpg")
    text = str(caught.value)
    assert text.startswith("cat/1.jpg: not a readable image (")
    assert words in text
    assert "--on-broken skip" in text
    assert "\n" not in text


def test_heic_is_read_by_the_package_that_can(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bytes] = []

    def open_heif(source: io.BytesIO) -> object:
        seen.append(source.read())
        return types.SimpleNamespace(to_pillow=lambda: Image.fromarray(NOISE))

    monkeypatch.setitem(sys.modules, "pillow_heif", types.SimpleNamespace(open_heif=open_heif))
    raw = FTYP + b"heic" + bytes(40)
    assert np.array_equal(np.asarray(decode(raw, key="x")), NOISE)
    assert seen == [raw]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_what_only_looks_like_a_file_is_refused_and_never_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "0.jpg")
    (tmp_path / "1.jpg").symlink_to("/dev/zero")
    (tmp_path / "2.jpg").symlink_to(tmp_path / "gone.jpg")
    (tmp_path / "4.jpg").write_bytes(encoded(Image.fromarray(NOISE), "JPEG"))
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "3.jpg"))
        images = data.open(tmp_path, split="all", on_broken="skip")
        assert images.fingerprint()["count"] == 5
        told = {"0.jpg": "named pipe", "1.jpg": "device", "2.jpg": "No such file", "3.jpg": "socket"}
        for row, words in enumerate(told.values()):
            with pytest.raises(DataError, match=words):
                images[row]
        x, _ = data.in_memory(images, 8)
        assert len(x) == 1
        assert set(images.broken) == set(told)


def test_a_large_picture_is_read_without_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = encoded(Image.fromarray(NOISE))
    monkeypatch.setattr(
        Image, "MAX_IMAGE_PIXELS", NOISE.size // 3 - 1
    )  # Pillow warns above it, and refuses twice as much
    assert np.array_equal(np.asarray(decode(raw, key="x")), NOISE)


def test_a_strip_that_would_fill_the_memory_is_refused_and_a_shorter_one_is_read(tmp_path: Path) -> None:
    how = Preprocess(mean=(0.5,) * 3, std=(0.5,) * 3, size_px=(224, 224), crop=0.9)
    Image.new("RGB", (60000, 1)).save(tmp_path / "0.png")
    Image.new("RGB", (1, 40), (255, 255, 255)).save(tmp_path / "1.png")
    images = data.open(tmp_path, split="all", on_broken="skip")
    ((x, _),) = data.batches(images, data.evaluation(how), 2)
    assert x.shape == (1, 3, 224, 224)
    assert bool((x == 1).all())
    assert "60000 x 1 px is too long and narrow" in images.broken["0.png"]


@pytest.mark.parametrize("size", [8, 112])  # kept in memory, and streamed
def test_a_pass_over_nothing_but_broken_pictures_is_an_error_and_no_empty_pass(size: int, tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(b"x")
    how = Preprocess(mean=(0.5,) * 3, std=(0.5,) * 3, size_px=(size, size))
    images = data.open(tmp_path, split="all", on_broken="skip")
    with pytest.raises(DataError, match=r"none of 3 images could be read; the first: 0\.png: .*Choose other data"):
        list(data.batches(images, data.evaluation(how), 2))
