"""Real images of the sample, written the way a user has them."""

from __future__ import annotations

import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from vitrim import data
from vitrim.spec import Preprocess

SMALL = Preprocess(mean=(0.49, 0.48, 0.45), std=(0.25, 0.24, 0.26), size_px=(32, 32))


def jpeg(index: int) -> bytes:
    """The bytes of one image of the sample's training part."""
    return bytes(pq.read_table(data.SAMPLE / "train.parquet").column("image")[index].as_py()["bytes"])


def class_folder(root: Path, counts: dict[str, int]) -> Path:
    """root/CLASS/N.jpg, all different images."""
    column = pq.read_table(data.SAMPLE / "train.parquet").column("image")
    at = 0
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for number in range(count):
            (root / name / f"{number}.jpg").write_bytes(column[at].as_py()["bytes"])
            at += 1
    return root


def parquet(path: Path, images: list[bytes], labels: list[int] | None = None, **columns: pa.Array) -> Path:
    """A file with plain columns and no metadata."""
    cells = [{"bytes": image, "path": None} for image in images]
    made = {"image": pa.array(cells, pa.struct([("bytes", pa.binary()), ("path", pa.string())])), **columns}
    if labels is not None:
        made["label"] = pa.array(labels)
    pq.write_table(pa.table(made), path)
    return path


def encoded(image: object, kind: str = "PNG", **settings: object) -> bytes:
    """A PIL image as a file's bytes."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)  # type: ignore[attr-defined]
    return buffer.getvalue()
