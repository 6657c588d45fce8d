"""Data sets of the `datasets` library: those of the Hugging Face Hub by name (extra `data`), and a caller's own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from vitrim.data.decoding import broken, decode, to_rgb
from vitrim.data.images import Source, consecutive, part_of, starts_of
from vitrim.data.parquet import image_and_label
from vitrim.data.splits import in_order, split_named
from vitrim.data.targets import read_targets
from vitrim.errors import DataError


class HubSource(Source):
    """All splits of a `datasets.DatasetDict`, train first, or one `datasets.Dataset` as train; formats and transforms are left out."""

    def __init__(self, found: Any, *, name: str, labelled: bool | None = None) -> None:
        """labelled: False reads no labels."""
        self.name = name
        parts = _encoded(found if isinstance(found, Mapping) else {"train": found})
        self.parts = [(split, parts[split]) for split in sorted(parts, key=in_order)]
        if not any(len(part) for _, part in self.parts):
            raise DataError(f"{name}: no rows; expected a data set of images.")
        self.image, self.label = _columns(self.parts[0][1], name)
        self.starts = starts_of(len(part) for _, part in self.parts)
        self.splits = consecutive({split: len(part) for split, part in self.parts})
        if self.label is not None and labelled is not False:
            values = [value for _, part in self.parts for value in part[self.label]]
            names = names_of_feature(self.parts[0][1].features[self.label])
            self.take_labels(read_targets(values, names, name=name).numbered())

    def key(self, row: int) -> str:
        part, within = part_of(self.starts, row)
        return f"{self.parts[part][0]} row {within}"

    def read(self, row: int) -> Image.Image:
        part, within = part_of(self.starts, row)
        cell: Any = self.parts[part][1][within][self.image]
        if isinstance(cell, Image.Image):
            try:
                return to_rgb(cell)
            except Exception as error:
                raise broken(self.key(row), error) from error
        if isinstance(cell, bytes):
            return decode(cell, key=self.key(row))
        if not isinstance(cell, Mapping):
            raise DataError(
                f"{self.name}: column {self.image!r} holds {type(cell).__name__} and no pictures; expected a column of the kind Image. "
                f"Cast it: cast_column({self.image!r}, datasets.Image())."
            )
        data = cell["bytes"] or (Path(cell["path"]) if cell.get("path") else b"")  # a local data set keeps paths alone
        return decode(data, key=self.key(row))

    def files(self) -> list[tuple[str, int]]:
        return [(f"{self.name} {split}", len(part)) for split, part in self.parts]


def is_of_datasets(found: Any) -> bool:
    """Whether this is a map-style data set of the `datasets` library, or a dict of several by split. Needs no library to tell."""
    if isinstance(found, Mapping):
        return len(found) > 0 and all(is_of_datasets(part) for part in found.values())
    return isinstance(getattr(found, "features", None), Mapping) and hasattr(found, "__len__")


def name_of(found: Any) -> str:
    """What a caller's data set is called in messages and records."""
    part = next(iter(found.values())) if isinstance(found, Mapping) else found
    return str(getattr(getattr(part, "info", None), "dataset_name", None) or type(part).__name__)


def load(name: str) -> Any:
    """The data set `NAME` or `NAME:CONFIG` of the Hub. DataError where it cannot be had."""
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"hf:{name} needs the extra 'data': pip install 'vitrim[data]'.") from error
    repository, _, config = name.partition(":")
    try:
        return datasets.load_dataset(repository, config or None)
    except Exception as error:  # network, name and script errors have no common base there
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"hf:{name}: cannot be loaded ({reason}). Check the name, the configuration and the network."
        ) from error


def _encoded(found: Mapping[Any, Any]) -> dict[str, Any]:
    """Parts by split, in plain Python values with pictures as bytes: decoding belongs to the workers."""
    parts: dict[str, Any] = {}
    for split_name, part in found.items():
        split = split_named(str(split_name)) or str(split_name)
        part = part.with_format(None)
        for column, feature in part.features.items():
            if type(feature).__name__ == "Image":
                part = part.cast_column(column, type(feature)(decode=False))
        parts[split if split not in parts else str(split_name)] = part
    return parts


def _columns(part: Any, name: str) -> tuple[str, str | None]:
    features = part.features
    images = [column for column, feature in features.items() if type(feature).__name__ == "Image"]
    named = [column for column, feature in features.items() if names_of_feature(feature) is not None]
    image, label = image_and_label(features, images, named)
    if image is None:
        raise DataError(f"{name}: no image column among {', '.join(features)}; expected a data set of images.")
    return image, label


def names_of_feature(feature: Any) -> tuple[str, ...] | None:
    """Class names of a column of labels, or of one of lists of them; None where it has none."""
    feature = feature[0] if isinstance(feature, list) and feature else feature
    names = getattr(getattr(feature, "feature", feature), "names", None)
    return tuple(str(name) for name in names) if names else None
