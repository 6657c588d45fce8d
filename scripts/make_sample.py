"""Make the built-in sample from a folder of CIFAR-10 in Parquet: python scripts/make_sample.py FOLDER [OUT].

Draws, by seed 0, 900 images of each class from the 45,000 training rows, 100 from the 5,000 validation rows and 200 from
the test rows. Image bytes stay as they are; `row` says where each stood in its file.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from vitrim import data

PER_CLASS = {"train": 900, "validation": 100, "test": 200}
SEED = 0


def main(folder: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for split, count in PER_CLASS.items():
        images = data.open(folder, split=split, seed=SEED, labelled=True)
        assert images.classes is not None
        chosen = images.take(count * len(images.classes), SEED)
        table = pq.read_table(next(folder.glob("test*.parquet" if split == "test" else "train*.parquet")))
        # a source numbers its rows train first, so test rows follow the training file's
        first = images.source.splits["test"][0] if split == "test" else 0
        rows = chosen.rows - first
        picked = table.take(rows)
        picked = picked.append_column("row", [np.asarray(rows, dtype=np.int64)])
        picked = picked.replace_schema_metadata(table.schema.metadata)
        pq.write_table(picked, out / f"{split}.parquet", compression="zstd", write_statistics=False)


if __name__ == "__main__":
    default = Path(__file__).resolve().parents[1] / "src" / "vitrim" / "assets" / "sample"
    main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else default)
