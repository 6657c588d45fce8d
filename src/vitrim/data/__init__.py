"""Images for compressing, training and scoring: where they come from, their splits, and batches of them."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from vitrim.config import Augment
from vitrim.data import hub, transforms
from vitrim.data.arrays import DatasetSource, TensorSource
from vitrim.data.calibration import CalibrationImages
from vitrim.data.folders import FolderSource
from vitrim.data.images import Images, Skipping, Source, skipping
from vitrim.data.labels import match_labels, readable
from vitrim.data.loading import batch_count, batches, calibration
from vitrim.data.parquet import ParquetSource, parquet_files
from vitrim.data.pixels import crop_flip, in_memory
from vitrim.data.reading import suggest_workers
from vitrim.data.splits import choose, validation_rows
from vitrim.data.targets import unlabelled_among
from vitrim.data.transforms import UNPREPARED, evaluation, prepare, training
from vitrim.errors import DataError
from vitrim.foreign import is_finite, printable
from vitrim.spec import Preprocess

log = logging.getLogger("vitrim.data")

SAMPLE = Path(__file__).resolve().parents[1] / "assets" / "sample"

__all__ = [
    "SAMPLE",
    "Augment",
    "CalibrationImages",
    "Images",
    "batch_count",
    "batches",
    "calibration",
    "crop_flip",
    "evaluation",
    "in_memory",
    "match_labels",
    "open",
    "prepare",
    "readable",
    "skipping",
    "suggest_workers",
    "training",
    "transforms",
    "validation_rows",
]


def open(
    source: Any,
    *,
    split: str = "train",
    seed: int = 0,
    labelled: bool | None = None,
    limit: int | None = None,
    on_broken: str = "raise",
) -> Images:
    """Images of one split.

    source: a folder of images or of Parquet shards, a Parquet file, "hf:NAME", "sample", a torch Dataset or a list of (image, label)
    or of {"image": ..., "label": ...}, a `datasets.Dataset` or a dict of them by split, a tensor or array [n,3,h,w] (uint8, or
    float in [0, 1]), a pair of it (or of a list of images) and labels, or Images, which come back as they are. What `skipping`
    makes of one of these has on_broken="skip" with it.
    split: train, validation (or val), test or all; a missing validation split is a tenth of train.
    seed: of that tenth, and of `limit`. It names a split, not a run: the built-in models never saw the tenth of seed 0.
    labelled: True demands labels, False does without (and takes photos from any nesting), None takes what there is.
    limit: at most so many images, drawn by seed, as many of each class as can be.
    on_broken: "raise" refuses an image that cannot be read, "skip" leaves it out, notes it in `.broken` and says so in the log.
    DataError for whatever cannot be found, read or told apart.
    """
    for key, value in (("seed", seed), ("limit", limit)):
        if value is not None and not (isinstance(value, Integral) and is_finite(int(value))):
            raise DataError(f"{key}={value!r}; expected a whole number of at most 64 bits.")
    broken = None
    if isinstance(source, Skipping):
        source, broken, on_broken = source.source, source.broken, "skip"
    if isinstance(source, Images):
        images = source if broken is None else source.skipping(broken)
    else:
        try:
            found = _source(source, labelled)
        except OSError as error:
            raise DataError(
                f"{printable(error.filename or source)}: cannot be read ({error.strerror or error}). Check the path and its permissions."
            ) from error
        rows = choose(found.splits, split, seed=seed, name=found.name)
        known = labelled is not False and found.labelled_rows(rows)
        if (
            labelled is None
            and not known
            and found.labels is not None
            and (lacking := unlabelled_among(found.labels[rows])).size < len(rows)
        ):
            log.warning(
                "%s: no label is used, since %d of %d images have none (null, NaN or -1; the first is %s).",
                found.name,
                len(lacking),
                len(rows),
                found.key(int(rows[lacking[0]])),
            )
        images = Images(found, rows, split=split, labelled=known, on_broken=on_broken, broken=broken)
    if labelled and not images.labelled:
        _refuse_part_labelled(images)
        raise DataError(
            f"{images.name}: images without labels, which are needed here; expected one subfolder for each class (two or more), "
            "or a 'label' column. Cutting by auto, comcat or dcvit needs none, and `vitrim evaluate --against DENSE` scores without."
        )
    return images if limit is None or limit == len(images) else images.take(limit, seed)


def _refuse_part_labelled(images: Images) -> None:
    """Raise DataError where other images of the source have labels, which a reader of "without labels" would not look for."""
    labels = images.source.labels
    if labels is None:
        return
    lacking = unlabelled_among(labels[images.rows])
    if len(lacking) == len(images):
        raise DataError(
            f"{images.name}: no image of its {images.split} split has a label (all are null, NaN or -1), which are needed here. "
            "Choose another split."
        )
    if len(lacking) > 0:
        raise DataError(
            f"{images.name}: {len(lacking)} of {len(images)} images have no label (null, NaN or -1; the first is "
            f"{images.source.key(int(images.rows[lacking[0]]))}), which are needed here. Label them, or leave them out."
        )


def calibration_images(
    source: Any, preprocess: Preprocess | None, *, count: int, seed: int, method: str
) -> CalibrationImages:
    """At most `count` unlabelled images of the source's training split, as a network with this preprocessing takes them.

    Without a preprocessing a float tensor [n, C, h, w] is taken as the network's own input, and anything else is refused with
    a DataError that names the method.
    """
    if preprocess is not None:
        return CalibrationImages(preprocess, images=open(source, labelled=False).take(count, seed, balanced=False))
    source = source.source if isinstance(source, Skipping) else source
    if not (isinstance(source, Tensor) and source.is_floating_point() and source.dim() == 4):
        raise DataError(f"{method}: {UNPREPARED} Or pass a float tensor [n, C, h, w] that is ready for it.")
    order = torch.randperm(len(source), generator=torch.Generator().manual_seed(seed))
    return CalibrationImages(None, tensor=source[order[:count]])


def _source(source: Any, labelled: bool | None) -> Source:
    if isinstance(source, Tensor | np.ndarray):
        return TensorSource(_as_tensor(source))
    if isinstance(source, tuple | list) and len(source) == 2:
        images, labels = source
        if isinstance(images, Tensor | np.ndarray) and getattr(labels, "shape", None) != images.shape:
            return TensorSource(_as_tensor(images), _checked(labels))
        if isinstance(source, tuple) and isinstance(images, list):
            if labels is None:
                return DatasetSource(images)
            if len(_checked(labels)) != len(images):
                raise DataError(f"{len(labels)} labels for {len(images)} images; expected one for each.")
            return DatasetSource([*zip(images, labels, strict=True)])
    if hub.is_of_datasets(source):
        return hub.HubSource(source, name=hub.name_of(source), labelled=labelled)
    if isinstance(source, Dataset) or (
        hasattr(source, "__getitem__")
        and hasattr(source, "__len__")
        and not isinstance(source, str | bytes | Mapping)
        and not hasattr(source, "columns")
    ):
        return DatasetSource(source)
    if not isinstance(source, str | Path):
        raise DataError(
            f"data of type {type(source).__name__}; expected a path, 'hf:NAME', 'sample', a torch Dataset, a tensor of "
            "images, or a pair of images and labels."
            + (" Write a table as Parquet and name that." if hasattr(source, "columns") else "")
        )
    if str(source).strip() in ("", "hf:") or "\0" in str(source):
        raise DataError(
            f"data {str(source)!r} names nothing; expected a folder of images, a Parquet file, 'hf:NAME' or 'sample'."
        )
    if source == "sample":
        return ParquetSource(SAMPLE, name="sample")
    if isinstance(source, str) and source.startswith("hf:"):
        return hub.HubSource(hub.load(source[3:]), name=source, labelled=labelled)
    return _path_source(Path(os.path.expanduser(source)), labelled)


def _as_tensor(images: Tensor | np.ndarray) -> Tensor:
    if isinstance(images, Tensor):
        return images
    try:
        return torch.from_numpy(np.ascontiguousarray(images))
    except TypeError as error:  # text, objects
        raise DataError(f"an array of dtype {images.dtype}; expected images in uint8, or float in [0, 1].") from error


def _checked(labels: Any) -> Any:
    """Labels beside images: what counts and orders them, or None."""
    single = not (hasattr(labels, "__len__") and hasattr(labels, "__getitem__")) or getattr(labels, "ndim", 1) == 0
    if labels is not None and (single or isinstance(labels, str | bytes | Mapping)):
        raise DataError(
            f"labels of type {type(labels).__name__}; expected a tensor or a list, one label for each image."
        )
    return labels


def _path_source(path: Path, labelled: bool | None) -> Source:
    if not path.exists():
        raise DataError(
            f"no such file or folder: {str(path)!r}; expected a folder of images, a Parquet file, 'hf:NAME' or 'sample'. "
            "Check the path."
        )
    if path.is_file():
        if path.suffix.lower() != ".parquet":
            raise DataError(
                f"{printable(path.name)}: expected a folder of images or a .parquet file. Put images into a folder and name that."
            )
        return ParquetSource(path, labelled=labelled)
    if not path.is_dir():
        raise DataError(
            f"{printable(path.name)} is a named pipe, a socket or a device; expected a folder of images or a .parquet file. "
            "Write it to a file first."
        )
    if parquet_files(path):
        return ParquetSource(path, labelled=labelled)
    return FolderSource(path, labelled=labelled)
