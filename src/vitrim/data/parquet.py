"""Parquet files and folders of shards in the layout of the Hugging Face Hub.

An `image` column is a struct of `bytes` and `path` (or plain bytes); class names stand in the schema's `huggingface`
metadata; a file's split is read from its name.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from vitrim.data.decoding import decode
from vitrim.data.images import Source, consecutive, part_of, starts_of
from vitrim.data.splits import in_order, split_named, splits_of_files
from vitrim.data.targets import read_targets
from vitrim.errors import DataError
from vitrim.foreign import parse_json, printable

IN_MEMORY_BYTES = 2 * 1024**3
"""Files up to this size in all are read whole; bigger sets are read by row group."""
_GROUPS_KEPT = 6

_IMAGE_COLUMNS = ("image", "img", "picture", "jpg", "jpeg", "png", "webp")
_LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "target", "targets", "cls")
"""The usual names, and those of webdataset (jpg, png, cls)."""
_USUAL = _IMAGE_COLUMNS, _LABEL_COLUMNS


@dataclass(frozen=True)
class _Columns:
    image: str
    label: str | None
    names: tuple[str, ...] | None


def parquet_files(folder: Path) -> list[Path]:
    """Those below a folder; hidden names are passed over, and folders that other programs name like files."""
    found = (file for file in folder.rglob("*.[pP][aA][rR][qQ][uU][eE][tT]") if not file.is_dir())
    return sorted(file for file in found if not any(part.startswith(".") for part in file.relative_to(folder).parts))


class ParquetSource(Source):
    """Rows of one or several Parquet files, train first.

    Where no path says a split, a column `split` does that holds the words. Where there is no column of labels, folders that say
    one do ("label=cat/", as Spark partitions a table).
    """

    def __init__(self, path: Path, *, name: str | None = None, labelled: bool | None = None) -> None:
        """labelled: False reads no labels."""
        self.root = path if path.is_dir() else path.parent
        self.name = name or printable(path.name)
        paths = parquet_files(path) if path.is_dir() else [path]
        said = splits_of_files([file.relative_to(self.root).as_posix() for file in paths])
        splits = dict(zip(paths, said, strict=True))
        self.paths = sorted(paths, key=lambda file: (in_order(splits[file]), file.as_posix()))
        self.relative = [file.relative_to(self.root).as_posix() for file in self.paths]
        self.opened = [_open(file) for file in self.paths]
        self.columns = _columns(self.opened[0].schema_arrow, self.relative[0])
        for file, opened in zip(self.relative[1:], self.opened[1:], strict=True):
            if _columns(opened.schema_arrow, file) != self.columns:
                raise DataError(
                    f"{printable(file)}: its columns or class names differ from those of {printable(self.relative[0])}; expected "
                    "shards of one data set in a folder. Point at one data set, or at one file."
                )
        words = [name for name in self.opened[0].schema_arrow.names if name.lower() == "split"]
        self._count_rows(splits)
        self.small = sum(file.stat().st_size for file in self.paths) <= IN_MEMORY_BYTES
        self._groups: OrderedDict[int, pa.ChunkedArray] = OrderedDict()
        self._images: list[pa.ChunkedArray] = []
        if self.small:
            self._images = [self._read_column(file, self.columns.image) for file in range(len(self.paths))]
            self.opened = []
        if words and set(said) == {"train"}:
            self._split_by(words[0])
        if labelled is not False and (values := self._label_values()) is not None:
            try:
                self.take_labels(read_targets(values, self.columns.names, name=self.name).numbered())
            except DataError as error:
                column = self.columns.label
                raise (
                    error
                    if column is None
                    else DataError(f"{error} To do without labels, rename the column {column!r}.")
                ) from error

    def _label_values(self) -> Sequence[Any] | np.ndarray | None:
        if (label := self.columns.label) is not None:
            columns = [self._read_column(file, label) for file in range(len(self.paths))]
            return _values([chunk for column in columns for chunk in column.chunks], self.name)
        said = [_label_of_path(path) for path in self.relative]
        if None in said:
            return None
        return [label for label, rows in zip(said, np.diff(self.starts).tolist(), strict=True) for _ in range(rows)]

    def _split_by(self, column: str) -> None:
        """Rows by what a column says, where any of it is a split's word."""
        columns = [self._read_column(file, column) for file in range(len(self.paths))]
        said = [str(value) for each in columns for value in each.to_pylist()]
        if any(split_named(word) for word in said):
            splits = np.array([split_named(word) or word for word in said])
            self.splits = {split: np.flatnonzero(splits == split) for split in sorted({*splits.tolist()}, key=in_order)}

    def _count_rows(self, splits: dict[Path, str]) -> None:
        self.starts = starts_of(opened.metadata.num_rows for opened in self.opened)
        if self.starts[-1] == 0:
            raise DataError(f"{self.name}: holds no rows; expected a Parquet file with images.")
        counts: Counter[str] = Counter()
        for file, opened in zip(self.paths, self.opened, strict=True):
            counts[splits[file]] += opened.metadata.num_rows
        self.splits = consecutive(counts)
        sizes = [
            (file, group, opened.metadata.row_group(group).num_rows)
            for file, opened in enumerate(self.opened)
            for group in range(opened.metadata.num_row_groups)
        ]
        self.groups = [(file, group) for file, group, _ in sizes]
        self.group_starts = starts_of(rows for _, _, rows in sizes)

    @property
    def blocks(self) -> np.ndarray | None:
        """Row groups, where the set is too big to be held."""
        if self.small:
            return None
        return np.repeat(np.arange(len(self.groups)), np.diff(self.group_starts))

    def key(self, row: int) -> str:
        file, within = part_of(self.starts, row)
        return printable(f"{self.relative[file]} row {within}")

    def read(self, row: int) -> Image.Image:
        cell = self._cell(row)
        data, path = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, None)
        key = f"{self.key(row)} ({path})" if path else self.key(row)
        return decode(self._beside(str(path), row) if data is None and path else data or b"", key=key)

    def files(self) -> list[tuple[str, int]]:
        return [(name, file.stat().st_size) for name, file in zip(self.relative, self.paths, strict=True)]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "opened": [], "_groups": OrderedDict()}  # open files do not travel to a worker

    def _cell(self, row: int) -> Any:
        if self.small:
            file, within = part_of(self.starts, row)
            return self._images[file][within].as_py()
        group, at = part_of(self.group_starts, row)
        if group not in self._groups:
            file, number = self.groups[group]
            with pq.ParquetFile(self.paths[file]) as opened:
                # one thread: a forked worker has none of pyarrow's pool
                table = opened.read_row_group(number, columns=[self.columns.image], use_threads=False)
            self._groups[group] = table.column(self.columns.image)
            if len(self._groups) > _GROUPS_KEPT:
                self._groups.popitem(last=False)
        self._groups.move_to_end(group)
        return self._groups[group][at].as_py()

    def _beside(self, path: str, row: int) -> Path:
        file = (self.paths[part_of(self.starts, row)[0]].parent / path).resolve()
        if not file.is_relative_to(self.root.resolve()):
            raise DataError(f"{self.key(row)}: its path {path!r} leaves the folder; expected images inside it.")
        return file

    def _read_column(self, file: int, column: str) -> pa.ChunkedArray:
        path = self.paths[file]
        try:
            with pq.ParquetFile(path) as opened:
                if column not in opened.schema_arrow.names:
                    raise DataError(
                        f"{path.name}: no column {column!r}; it has {', '.join(opened.schema_arrow.names)}."
                    )
                return opened.read(columns=[column]).column(column)
        except (pa.ArrowException, OSError) as error:
            raise _unreadable(path, error) from error


def _open(path: Path) -> pq.ParquetFile:
    if not path.is_file():  # opening a pipe would wait for ever
        raise DataError(
            f"{printable(path.name)} is no file; expected a Parquet file, not a pipe, a folder or a device."
        )
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: BaseException) -> DataError:
    reason = " ".join(str(error).split())[:160]
    return DataError(f"{path.name}: not a readable Parquet file ({reason}). Download or write it again.")


def image_and_label(
    names: Iterable[str], images: Sequence[str], labels: Sequence[str]
) -> tuple[str | None, str | None]:
    """The columns of images and of labels: one of the usual names in whatever case, else the first that is marked as such."""
    listed = [*names]
    there = {name.lower(): name for name in reversed(listed)} | {name: name for name in listed}
    image, label = (next((there[usual] for usual in columns if usual in there), None) for columns in _USUAL)
    return image or next(iter(images), None), label or next(iter(labels), None)


def _columns(schema: pa.Schema, name: str) -> _Columns:
    features = _features(schema)
    images = [column for column, feature in features.items() if feature.get("_type") == "Image"]
    named = [column for column, feature in features.items() if _class_names(feature) is not None]
    image, label = image_and_label(schema.names, images, named)
    for column in (image, label):
        if column is not None and schema.names.count(column) > 1:
            raise DataError(
                f"{name}: {schema.names.count(column)} columns are named {column!r}; expected one. Write the file with unlike names."
            )
    if image is None or not _holds_images(schema.field(image).type):
        raise DataError(
            f"{name}: no image column among {', '.join(schema.names)}; expected 'image' with encoded bytes, "
            "a struct of 'bytes' and 'path' as on the Hugging Face Hub, or plain binary."
        )
    if label is None:
        return _Columns(image, None, None)
    return _Columns(image, label, _class_names(features.get(label, {})))


def _values(chunks: Sequence[pa.Array], name: str) -> Sequence[Any] | np.ndarray:
    """What the chunks of a column hold; whole numbers without gaps as an array."""
    if chunks and all(pa.types.is_integer(chunk.type) and chunk.null_count == 0 for chunk in chunks):
        return np.concatenate([chunk.to_numpy(zero_copy_only=False) for chunk in chunks])
    try:
        return [value for chunk in chunks for value in chunk.to_pylist()]
    except (ValueError, OverflowError) as error:  # moments that Python's own types cannot say
        kind = chunks[0].type
        raise DataError(
            f"{name}: labels of type {kind} cannot be read; expected class numbers, class names, or lists of them."
        ) from error


def _label_of_path(path: str) -> str | None:
    """What a folder of a partitioned table says: "label=cat/part-0.parquet" -> "cat"; "" where it says that there is no label."""
    pairs = (part.partition("=") for part in path.split("/")[:-1])
    said = next((unquote(value) for name, sign, value in pairs if sign and name.lower() in _LABEL_COLUMNS), None)
    return "" if said == "__HIVE_DEFAULT_PARTITION__" else said


def _holds_images(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _holds_images(kind.field("bytes").type)
    return str(kind) in ("binary", "large_binary", "binary_view") or pa.types.is_null(kind)


def _features(schema: pa.Schema) -> dict[str, Any]:
    raw = (schema.metadata or {}).get(b"huggingface")
    if raw is None:
        return {}
    try:
        told = parse_json(raw, named="the schema", error=DataError, mend="")
        features = told["info"]["features"]
    except (DataError, KeyError, TypeError):
        return {}  # foreign metadata: the column names alone must do
    listed = {column: each[0] if isinstance(each, list) and each else each for column, each in features.items()}
    return {column: feature for column, feature in listed.items() if isinstance(feature, dict)}


def _class_names(feature: dict[str, Any]) -> tuple[str, ...] | None:
    inner = feature.get("feature", feature)  # a Sequence or List wraps the ClassLabel
    names = inner.get("names") if isinstance(inner, dict) and inner.get("_type") == "ClassLabel" else None
    return tuple(map(str, names)) if names and isinstance(names, list) else None
