"""From the bytes of one picture to RGB: upright, eight bits, the first frame; or one sentence that says why not.

The one rule for orientation, whatever the source (folder, Parquet, Hub, a Dataset's PIL images, `predict`): a picture that
carries an EXIF orientation is turned upright, as viewers and the `datasets` library do. Arrays and tensors carry none.
"""

from __future__ import annotations

import io
import os
import stat
import warnings
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from vitrim.errors import DataError
from vitrim.foreign import one_line, printable

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""By EXIF's number, what makes the picture upright."""
_ORIENTED = ("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif")
"""Where a picture's info tells its orientation."""
_PROGRAMS = ("EPS",)
"""Formats that Pillow hands to another program: never for a file that somebody calls an image."""
_BRANDS = {
    **dict.fromkeys((b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1"), "HEIC"),
    **dict.fromkeys((b"avif", b"avis"), "AVIF"),
}
_NEEDS = {
    "HEIC": "HEIC, which needs another package: pip install pillow-heif",
    "AVIF": "AVIF, which needs Pillow 11.3 or later: pip install -U pillow",
    "Git LFS": "a Git LFS pointer in place of the picture; run git lfs pull",
    "JPEG XL": "JPEG XL, which Pillow does not read; convert it to PNG or JPEG",
}


def decode(data: bytes | Path, *, key: str) -> Image.Image:
    """RGB image of encoded bytes or of a file; DataError that names `key` if it cannot be read."""
    try:
        if isinstance(data, Path):
            _check_regular(data)
        if not (data.stat().st_size if isinstance(data, Path) else data):
            raise ValueError("it is empty")
        with warnings.catch_warnings():
            # large pictures are fine up to the size that Pillow refuses, and damaged tags do not matter
            warnings.simplefilter("ignore")
            with _opened(data) as image:
                if image.format in _PROGRAMS:
                    raise ValueError(f"{image.format}, which is a program and not a picture; convert it")
                return to_rgb(image)
    except Exception as error:  # Pillow's plug-ins raise anything from OSError to struct.error on damaged files
        raise broken(key, error) from error


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB as a viewer would show it: upright, 16-bit scaled to 8, first frame of an animation, transparency dropped."""
    plain = _in_rgb(_upright(image))
    for name in _ORIENTED:  # it is done: whoever looks again must not turn it twice
        plain.info.pop(name, None)
    return plain


def broken(key: str, error: BaseException) -> DataError:
    """What to raise for a picture that cannot be read."""
    reason = one_line(error) or type(error).__name__
    if isinstance(error, UnidentifiedImageError) or "cannot identify image file" in reason:
        reason = "no known image format"
    if isinstance(error, OSError) and error.strerror:
        reason = error.strerror
    return DataError(
        f"{printable(key)}: not a readable image ({reason}). Replace or remove it, or go on without it: --on-broken skip "
        "(on_broken='skip')."
    )


def _check_regular(path: Path) -> None:
    """Refuse what only looks like a file: opening a pipe waits for ever."""
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket", stat.S_IFDIR: "a folder"}
        raise ValueError(f"it is {kinds.get(stat.S_IFMT(mode), 'a device')}, no file")


def _opened(data: bytes | Path) -> Any:
    """Pillow's image; where Pillow knows no such format, what the bytes say they are."""
    try:
        return Image.open(io.BytesIO(data) if isinstance(data, bytes) else data)
    except UnidentifiedImageError:
        kind = _kind_of(data)
        if kind is None:
            raise
        if kind == "HEIC":
            try:
                import pillow_heif
            except ImportError:
                raise ValueError(_NEEDS[kind]) from None
            return pillow_heif.open_heif(io.BytesIO(data) if isinstance(data, bytes) else data).to_pillow()
        raise ValueError(_NEEDS[kind]) from None


def _kind_of(data: bytes | Path) -> str | None:
    """A format that Pillow may lack, by the first bytes."""
    source: IO[bytes] = io.BytesIO(data) if isinstance(data, bytes) else data.open("rb")
    with source:
        head = source.read(12)
    if head == b"version http":
        return "Git LFS"
    if head.startswith((b"\xff\x0a", b"\0\0\0\x0cJXL ")):
        return "JPEG XL"
    return _BRANDS.get(head[8:12]) if head[4:8] == b"ftyp" else None


def _upright(image: Image.Image) -> Image.Image:
    """The picture as it is meant to be seen; as it is stored where its tags cannot be read."""
    image.load()  # Pillow turns a TIFF as it reads it, and takes the tag away
    try:
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged tags of a picture whose pixels are whole
        return image
    return image if turn is None else image.transpose(turn)


def _in_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        values = np.nan_to_num(np.asarray(image).astype(np.float64))
        # integers above 8 bits are 16-bit scans; floats are shares of white unless they exceed it
        top = 65535.0 if image.mode.startswith("I") else (1.0 if values.size and values.max() <= 1.0 else 255.0)
        if image.mode == "I" and values.size and values.max() <= 255:
            top = 255.0
        grey = np.clip(np.rint(values * (255.0 / top)), 0, 255).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # straight to RGB makes Pillow warn
    return image.convert("RGB")
