"""Data sets of the Hugging Face Hub by name, through the `datasets` library (extra `data`)."""

from __future__ import annotations

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
    """All splits of `NAME` or `NAME:CONFIG`, train first."""

    def __init__(self, name: str) -> None:
        self.name = name
        parts = _download(name)
        self.parts = [(split, parts[split]) for split in sorted(parts, key=in_order)]
        if not self.parts:
            raise DataError(f"hf:{name}: no splits; expected a data set of images.")
        self.image, self.label = _columns(self.parts[0][1], name)
        self.starts = starts_of(len(part) for _, part in self.parts)
        self.splits = consecutive({split: len(part) for split, part in self.parts})
        if self.label is not None:
            values = [value for _, part in self.parts for value in part[self.label]]
            names = _names(self.parts[0][1].features[self.label])
            self.take_labels(read_targets(values, names, name=f"hf:{name}").numbered())

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
        data = cell["bytes"] or (Path(cell["path"]) if cell.get("path") else b"")  # a local data set keeps paths alone
        return decode(data, key=self.key(row))

    def files(self) -> list[tuple[str, int]]:
        return [(f"hf:{self.name} {split}", len(part)) for split, part in self.parts]


def _download(name: str) -> dict[str, Any]:
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"hf:{name} needs the extra 'data': pip install 'vitrim[data]'.") from error
    repository, _, config = name.partition(":")
    try:
        loaded = datasets.load_dataset(repository, config or None)
    except Exception as error:  # network, name and script errors have no common base there
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"hf:{name}: cannot be loaded ({reason}). Check the name, the configuration and the network."
        ) from error
    parts: dict[str, Any] = {}
    for split_name, part in loaded.items():
        split = split_named(str(split_name)) or str(split_name)
        for column, feature in part.features.items():
            if type(feature).__name__ == "Image":  # bytes as they are: decoding belongs to the workers
                part = part.cast_column(column, datasets.Image(decode=False))
        parts[split if split not in parts else str(split_name)] = part
    return parts


def _columns(part: Any, name: str) -> tuple[str, str | None]:
    features = part.features
    images = [column for column, feature in features.items() if type(feature).__name__ == "Image"]
    named = [column for column, feature in features.items() if _names(feature) is not None]
    image, label = image_and_label(features, images, named)
    if image is None:
        raise DataError(f"hf:{name}: no image column among {', '.join(features)}; expected a data set of images.")
    return image, label


def _names(feature: Any) -> tuple[str, ...] | None:
    names = getattr(getattr(feature, "feature", feature), "names", None)
    return tuple(str(name) for name in names) if names else None
