"""Labels as data sets give them, read in one way whatever the source: class numbers, class names, several labels, shares.

    7                       the class of that number
    "cat", b"cat"           the class of that name
    [0, 4], ["cat", "dog"]  several labels, by number or by name; rows may differ in length
    [0, 1, 0, 1]            several labels, one place for each class (0 and 1, or how sure each is)
    [0, 0, 1, 0], [2]       one class, where every row has a single 1, or a single number or name
    [0.1, 0.7, 0.2]         shares of one image that sum to 1: a soft label
    None, NaN, -1           no label

What is none of these is refused with its row. The kind is that of the whole source, never of a split or of a row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import numpy as np

from vitrim.errors import DataError

MOST_CLASSES = 1_000_000
"""Class numbers without names end below this: a larger one is an identity or a hash."""
MOST_BYTES = 4 * 1024**3
"""What a table of images by classes may take."""
_SUM = 1e-3  # how far from 1 shares of half precision may sum

Item = int | float | str | bool | None
Cell = Item | tuple[Item, ...]


@dataclass(frozen=True, eq=False, slots=True)
class Targets:
    """Labels of all rows of a source.

    labels: int64 [rows], or float32 [rows, classes] in [0, 1]; -1 where a row has none; None: no row has one.
    classes: names in their order; None where the source only numbers them.  soft: rows are shares that sum to 1.
    """

    labels: np.ndarray | None = None
    classes: tuple[str, ...] | None = None
    soft: bool = False

    def numbered(self) -> Targets:
        """The same, where classes without names are called by their numbers."""
        if self.labels is None or self.classes is not None:
            return self
        count = self.labels.shape[1] if self.labels.ndim == 2 else int(self.labels.max()) + 1
        return Targets(self.labels, tuple(map(str, range(count))), self.soft)


def read_targets(values: Iterable[Any], names: Sequence[str] | None, *, name: str) -> Targets:
    """Labels of a source, row by row.

    names: of the classes, in the order of their numbers, where the source has them.  name: of the source, for messages.
    DataError for what is no label, out of range, or of two kinds.
    """
    classes = None if names is None else tuple(str(label) for label in names)

    if isinstance(values, np.ndarray) and values.ndim == 1 and values.dtype.kind in "iu" and len(values):
        top, low = int(values.argmax()), int(values.argmin())  # many rows, looked at in one go
        for row in (low, top):
            _within(row, int(values[row]), classes, name)
        return Targets(values.astype(np.int64), classes) if int(values[top]) >= 0 else Targets()

    def refused(row: int, what: str) -> DataError:
        return DataError(
            f"{name}: the label of row {row} is {what}; expected a class number, a class name, or a list of several."
        )

    cells = [_cell(value, row, refused) for row, value in enumerate(values)]
    kinds: dict[str, int] = {}
    for row, cell in enumerate(cells):
        if cell is not None:
            kinds.setdefault(_kind(cell), row)
    if len(kinds) > 1:
        (one, first), (other, second), *_ = kinds.items()
        raise DataError(
            f"{name}: the label of row {first} is {one}, that of row {second} {other}; expected one kind in all rows. "
            "Write the column anew in one of them."
        )
    kind = next(iter(kinds), None)
    if kind == "a list":
        return _lists(cells, classes, name, refused)
    if kind == "a name":
        texts: list[Any] = [cell if cell is None else str(cell) for cell in cells]
        if classes is None or not _digits(texts) or set(texts) & set(classes):
            return _names(texts, classes, name)
        cells = [None if text is None else int(text) for text in texts]  # numbers, as webdataset writes them
    return _numbers(cells, classes, name)


def is_missing(value: Any) -> bool:
    """Whether a label says that there is none: None, NaN or -1."""
    if callable(getattr(value, "tolist", None)):
        value = value.tolist()
    return value is None or (isinstance(value, int | float) and (value == -1 or value != value))


def unlabelled_among(labels: np.ndarray) -> np.ndarray:
    """int64, ascending: the rows of labels [rows] or [rows, classes] that have none."""
    return np.flatnonzero((labels.reshape(len(labels), -1) < 0).any(axis=1))


def class_names(given: Any) -> tuple[str, ...] | None:
    """Names that a Dataset tells as `classes`: a list (of names, or of tuples of synonyms), or a dict of name to number."""
    if isinstance(given, dict):
        if sorted(given.values(), key=str) != sorted(range(len(given)), key=str):
            return None
        given = sorted(given, key=given.__getitem__)
    if given is None or isinstance(given, str) or not isinstance(given, Iterable):
        return None
    return tuple(", ".join(map(str, each)) if isinstance(each, tuple | list) else str(each) for each in given)


# ------------------------------------------------------------------------------------------------------------- one cell


def _cell(value: Any, row: int, refused: Callable[[int, str], DataError]) -> Cell:
    """A label in plain values; whole floats stay floats within a list, where they tell places from numbers."""
    if callable(getattr(value, "tolist", None)):  # of numpy or torch, a scalar or an array
        value = value.tolist()
    if isinstance(value, list | tuple):
        inner = [_cell(each, row, refused) for each in value]
        if any(isinstance(each, tuple) for each in inner):
            raise refused(row, "a list of lists")
        return tuple(inner)  # type: ignore[arg-type]
    if isinstance(value, Decimal):
        value = float(value)
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError:
            raise refused(row, f"{len(value)} bytes that are no text") from None
    if isinstance(value, str):
        return value.strip() or None
    if isinstance(value, bool | int | float):
        return value
    raise refused(row, "a struct" if isinstance(value, dict) else f"of type {type(value).__name__}")


def _kind(cell: Cell) -> str:
    return "a list" if isinstance(cell, tuple) else "a name" if isinstance(cell, str) else "a number"


# ------------------------------------------------------------------------------------------------------ one label a row


def _names(texts: Sequence[str | None], classes: tuple[str, ...] | None, name: str) -> Targets:
    classes = classes or _ordered(text for text in texts if text is not None)
    index = {label: i for i, label in enumerate(classes)}
    return Targets(
        np.array([-1 if text is None else _found(text, index, name) for text in texts], dtype=np.int64), classes
    )


def _found(text: str, index: dict[str, int], name: str) -> int:
    if text not in index:
        shown = ", ".join(list(index)[:8]) + (", ..." if len(index) > 8 else "")
        raise DataError(f"{name}: label {text!r} is none of its {len(index)} class names {shown}.")
    return index[text]


def _numbers(cells: Sequence[Any], classes: tuple[str, ...] | None, name: str) -> Targets:
    numbers = [-1 if cell is None else _number(cell, row, name) for row, cell in enumerate(cells)]
    top, low = max(numbers, default=-1), min(numbers, default=-1)
    if top < 0 and low >= -1:
        return Targets()  # the Hub marks a test split without labels by -1
    _within(numbers.index(low) if low < -1 else numbers.index(top), low if low < -1 else top, classes, name)
    return Targets(np.array(numbers, dtype=np.int64), classes)


def _number(cell: Any, row: int, name: str) -> int:
    if isinstance(cell, float) and not cell.is_integer():
        raise DataError(
            f"{name}: the label of row {row} is {cell!r}; expected a whole number, since vitrim scores classes and no measured values."
        )
    return int(cell)


def _within(row: int, number: int, classes: tuple[str, ...] | None, name: str) -> None:
    """Refuse a class number that there cannot be."""
    most = MOST_CLASSES if classes is None else len(classes)
    if number < -1:
        raise DataError(
            f"{name}: the label of row {row} is {number}; expected class numbers from 0 on, or -1 for an image without label. "
            "Number the classes from 0."
        )
    if number >= most:
        raise DataError(
            f"{name}: label {number} with {most} classes (row {row}); expected labels from 0 to {most - 1}."
            if classes is not None
            else f"{name}: the label of row {row} is {number}; expected class numbers below {most:,}. Number the classes from 0, or name them."
        )


# ----------------------------------------------------------------------------------------------------- several labels


def _lists(
    cells: Sequence[Any], classes: tuple[str, ...] | None, name: str, refused: Callable[[int, str], DataError]
) -> Targets:
    rows = [(row, cell) for row, cell in enumerate(cells) if cell is not None]
    for row, cell in rows:
        if any(each is None for each in cell):
            raise refused(row, "a list with an empty place (null or NaN)")
    items = [each for _, cell in rows for each in cell]
    if any(isinstance(each, str) for each in items):
        if not all(isinstance(each, str) for each in items):
            raise DataError(f"{name}: lists of names and numbers as labels; expected one of them.")
        classes = classes or _ordered(items)
        index = {label: i for i, label in enumerate(classes)}
        return _hot(cells, [[_found(each, index, name) for each in cell] for _, cell in rows], classes, name)
    if _by_place(rows, items, classes, name):
        return _placed(cells, rows, classes, name)
    for row, cell in rows:
        for each in cell:
            _within(row, each if each >= 0 else min(each, -2), classes, name)
    if not items and classes is None:
        return Targets()
    return _hot(cells, [list(cell) for _, cell in rows], classes, name)


def _by_place(
    rows: Sequence[tuple[int, tuple[Any, ...]]], items: Sequence[Any], classes: tuple[str, ...] | None, name: str
) -> bool:
    """Whether lists have a place for each class, rather than the numbers of those that apply. Refuses what could be both, or neither."""
    lengths = {len(cell) for _, cell in rows}
    measured = any(isinstance(each, float | bool) for each in items)
    repeats = next((row for row, cell in rows if len({*cell}) < len(cell)), None)
    if len(lengths) > 1:
        if measured or repeats is not None:
            few, many = min(lengths), max(lengths)
            raise DataError(
                f"{name}: labels are lists of {few} to {many} places; expected as many places as classes in every row, or the "
                "numbers of the classes that apply, each once."
            )
        return False
    if measured:
        return True
    if not all(each in (0, 1) for each in items):
        if repeats is not None:
            raise DataError(
                f"{name}: the label of row {repeats} repeats a number; expected the numbers of the classes that apply, each "
                "once, or a 0 or 1 for each class."
            )
        return False
    (length,) = lengths
    if classes is not None:
        return length == len(classes)
    if length == 1:
        raise DataError(
            f"{name}: labels are lists of one 0 or 1, which may be a class number or whether a single label applies. Write "
            "plain class numbers instead of lists."
        )
    return length > 1


def _placed(
    cells: Sequence[Any],
    rows: Sequence[tuple[int, tuple[Any, ...]]],
    classes: tuple[str, ...] | None,
    name: str,
) -> Targets:
    width = len(rows[0][1])
    if classes is not None and len(classes) != width:
        raise DataError(f"{name}: labels of {width} places for {len(classes)} class names; expected as many.")
    table = _table(len(cells), width, name)
    at = np.array([row for row, _ in rows], dtype=np.int64)
    table[at] = np.array([cell for _, cell in rows], dtype=np.float32)
    values = table[at]
    if not ((values >= 0) & (values <= 1)).all():
        row = int(at[np.argmax(((values < 0) | (values > 1)).any(axis=1))])
        raise DataError(
            f"{name}: the label of row {row} has values from {table[row].min():.3g} to {table[row].max():.3g}; expected a "
            "share in [0, 1] for each class. Turn scores into shares by a softmax, or into 0 and 1."
        )
    one = bool((np.abs(values.sum(axis=1, dtype=np.float64) - 1) <= _SUM).all())
    if one and bool(np.isin(values, (0, 1)).all()):
        numbers = np.full(len(cells), -1, dtype=np.int64)
        numbers[at] = values.argmax(axis=1)
        return Targets(numbers, classes)
    return Targets(table, classes, soft=one)


def _hot(cells: Sequence[Any], found: Sequence[list[int]], classes: tuple[str, ...] | None, name: str) -> Targets:
    width = len(classes) if classes is not None else max((max(each, default=-1) for each in found), default=-1) + 1
    table = _table(len(cells), width, name)
    if found and all(len(numbers) == 1 for numbers in found):  # one class each, as where every row has a single 1
        one = iter(found)
        return Targets(np.array([-1 if cell is None else next(one)[0] for cell in cells], dtype=np.int64), classes)
    each = iter(found)
    for row, cell in enumerate(cells):
        if cell is not None:
            table[row] = 0.0
            table[row, next(each)] = 1.0
    return Targets(table, classes)


def _table(rows: int, width: int, name: str) -> np.ndarray:
    if rows * width * 4 > MOST_BYTES:
        raise DataError(
            f"{name}: several labels for each of {rows:,} images among {width:,} classes take more than {MOST_BYTES / 1024**3:.0f} GB; "
            "expected fewer classes. Number the classes from 0 without gaps, or score a part of the images."
        )
    return np.full((rows, width), -1.0, dtype=np.float32)


def _digits(texts: Iterable[str | None]) -> bool:
    return all(text is None or (text.isascii() and text.isdigit() and len(text) <= 18) for text in texts)


def _ordered(texts: Iterable[str]) -> tuple[str, ...]:
    """Names once each, sorted; those that are numbers by their size."""
    names = sorted(set(texts))
    return tuple(sorted(names, key=int) if _digits(names) else names)
