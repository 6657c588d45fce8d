"""Folders that are written whole or not at all, and the header of a safetensors file. Standard library only."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import ArtifactError
from .foreign import parse_json

_HEADER_BYTES = 100_000_000  # the format's own limit
DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "I16": 2, "U16": 2, "I32": 4, "U32": 4, "I64": 8, "U64": 8,
    "F16": 2, "BF16": 2, "F32": 4, "F64": 8,
}  # fmt: skip


def make_whole(folder: Path, fill: Callable[[Path], None]) -> None:
    """Fill a temporary sibling of a folder that is not there yet, and rename it.

    On failure nothing is left, parents that had to be made included.
    """
    missing = [parent for parent in folder.parents if not parent.exists()]
    staging = folder.with_name(f".{secrets.token_hex(8)}.partial")
    renamed = False
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging.mkdir()
        fill(staging)
        sync_folder(staging)
        os.rename(staging, folder)
        renamed = True
        sync_folder(folder.parent)
    except BaseException:
        shutil.rmtree(folder if renamed else staging, ignore_errors=True)
        for parent in missing:
            with contextlib.suppress(OSError):
                parent.rmdir()
        raise


def replace_within(folder: Path, fill: Callable[[Path], None], *, names: Sequence[str]) -> None:
    """Swap the named files of a folder that stays where it is: it may be a mount point, or hold other files.

    names: what `fill` writes. The first leaves first and comes last: while it is missing nobody takes the rest for whole.
    On failure the old files are put back.
    """
    staging = folder / f".{secrets.token_hex(8)}.partial"
    old = staging / "old"
    moved: list[tuple[Path, Path]] = []

    def move(source: Path, target: Path) -> None:
        os.rename(source, target)
        moved.append((source, target))

    try:
        staging.mkdir()
        old.mkdir()
        fill(staging)
        sync_folder(staging)
        for name in names:
            if os.path.lexists(folder / name):
                move(folder / name, old / name)
        for name in reversed(names):
            move(staging / name, folder / name)
        sync_folder(folder)
    except BaseException as error:
        try:
            for source, target in reversed(moved):
                os.rename(target, source)
        except OSError as second:
            raise ArtifactError(
                f"{folder}: could not be written ({error}), nor put back as it was ({second}). "
                f"The files that stood there are in {old}: move them up by hand."
            ) from error
        shutil.rmtree(staging, ignore_errors=True)
        raise
    shutil.rmtree(staging, ignore_errors=True)


def replace_file(path: Path, fill: Callable[[Path], object]) -> None:
    """Write a file so that it has either its old or its new content, even after a crash."""
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)  # of a process that was killed
    try:
        fill(partial)
        sync_file(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a new file and flush it to the disk."""
    with open(path, "x", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a new file of sorted JSON without NaN and flush it to the disk."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n")


def sync_file(path: Path) -> None:
    """Flush a file that another library wrote."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder, where the system can."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def sha256(path: Path) -> str:
    """Of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One tensor of a safetensors header. begin, end: bytes behind the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(path: Path) -> tuple[dict[str, Entry], int]:
    """The entries of a safetensors file, and the bytes of its data. Every byte must belong to exactly one tensor.

    Reads nothing but the header. Raises ArtifactError.
    """
    try:
        total = path.stat().st_size
        with open(path, "rb") as file:
            first = file.read(9)
            length = int.from_bytes(first[:8], "little")
            if first[8:] != b"{" or length > min(total - 8, _HEADER_BYTES):
                raise ArtifactError(f"{path}: {_no_header(first, total)}")
            text = first[8:] + file.read(length - 1)
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read ({error.strerror or error}).") from error
    try:
        held = parse_json(text, named=f"{path}: its header", error=ArtifactError, mend="Copy or download it again.")
        entries = {name: _entry(value) for name, value in held.items() if name != "__metadata__"}
    except (ValueError, TypeError, KeyError) as error:
        raise ArtifactError(f"{path}: its safetensors header is damaged. Copy or download it again.") from error

    data, at = total - 8 - length, 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != at or entry.end - entry.begin != math.prod(entry.shape) * DTYPE_BYTES[entry.dtype]:
            raise ArtifactError(
                f"{path}: the header places {name!r} ({entry.dtype}, shape {list(entry.shape)}) at bytes {entry.begin} "
                f"to {entry.end}, which does not fit: edited or damaged. Copy or download it again."
            )
        at = entry.end
    if at != data:
        state = "truncated" if data < at else "longer than its header says"
        raise ArtifactError(f"{path}: {state} ({data} bytes of data, expected {at}). Copy or download it again.")
    return entries, data


def _no_header(first: bytes, total: int) -> str:
    if first[:2] == b"PK" or (first[:1] == b"\x80" and first[8:] != b"{"):
        return "is a pickle under another name, and is not opened. checkpoint= reads such files, weights only."
    return (
        f"has {total} bytes and no whole safetensors header: truncated, or another kind of file. "
        "Copy or download it again."
    )


def _entry(value: Any) -> Entry:
    begin, end = value["data_offsets"]
    shape = tuple(value["shape"])
    if value["dtype"] not in DTYPE_BYTES or any(type(n) is not int or n < 0 for n in (*shape, begin, end)):
        raise ValueError
    return Entry(dtype=value["dtype"], shape=shape, begin=begin, end=end)
