"""What every accuracy benchmark shares: equal data, equal recovery, a control, provenance, and tables made from the rows.

A row is one JSON line. Settings are chosen on the validation split; the test split is scored once, at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import vitrim
from vitrim import data as opened
from vitrim import timing
from vitrim.counting import cost
from vitrim.data import Images
from vitrim.model import Vit
from vitrim.pipeline import RecoverConfig
from vitrim.pipeline.comparison import difference as difference
from vitrim.spec import spec_hash

RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).parents[1] / "docs" / "benchmarks"


def arguments(kind: str, about: str | None, *, resumes: bool = True, **more: dict[str, Any]) -> argparse.Namespace:
    """What every accuracy benchmark is told, with `name` (of the built-in model) and `place` (of its rows) beside it.

    resumes: whether it can go on from rows that are there. more: further options as `add_argument` takes them.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="CIFAR-10 as a folder of Parquet files; its test split is scored")
    parser.add_argument("--full", action="store_true", help="the larger built-in model, on an accelerator")
    for option, how in more.items():
        parser.add_argument(f"--{option}", **how)
    if resumes:
        parser.add_argument("--resume", action="store_true", help="keep the rows that are there")
    parser.add_argument("--table", action="store_true", help="only make the table from the rows that are there")
    options = parser.parse_args()
    options.name = "cifar10-vit-tiny" if options.full else "cifar10-vit-micro"
    options.place = RESULTS / f"{kind}-{options.name}.jsonl"
    return options


class Run:
    """What the rows of a benchmark are made from: the dense model, images to learn from, the test split, the rows so far."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.name, self.place, self.full, self.data = options.name, options.place, options.full, options.data
        self.dense = vitrim.load(f"builtin:{self.name}")
        self.source: Any = self.data if self.full else "sample"
        self.test = opened.open(self.data, split="test", labelled=True)
        self.facts = {"model": self.name, "data": opened.open(self.source).fingerprint(), "test_images": len(self.test)}
        self.rows: list[dict[str, Any]] = read(self.place) if options.resume and self.place.is_file() else []


def publish(page: str, text: str) -> None:
    """Write docs/benchmarks/PAGE.md."""
    DOCS.mkdir(parents=True, exist_ok=True)
    (DOCS / f"{page}.md").write_text(text, encoding="utf-8")


def conditions() -> dict[str, Any]:
    """Versions, processor, threads and load: what a figure depends on beside its settings."""
    return {
        "versions": {name: version(name) for name in ("vitrim", "torch", "timm")}
        | {"python": platform.python_version()},
        "processor": timing.device_name("cpu"),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
    }


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def recovered(model: Vit, teacher: Vit, data: Any, config: RecoverConfig) -> tuple[Vit, float]:
    """The model after the protocol's recovery, and its seconds."""
    began = time.monotonic()
    after = vitrim.recover(model, teacher=teacher, data=data, config=config).model
    return after, time.monotonic() - began


def accuracy(model: Vit, images: Images, amp: str = "no") -> tuple[float, list[bool]]:
    """Top-1 in percent, and whether each image was right."""
    found = vitrim.evaluate(model, images, batch_size=250, amp=amp)
    return 100 * found["top1"], found["correct"]


def answers(model: Vit, images: Images) -> tuple[float, list[bool], list[int]]:
    """Top-1 in percent, whether each image was right, and what was said of it."""
    found = vitrim.evaluate(model, images, batch_size=250)
    return 100 * found["top1"], found["correct"], list(found["predictions"])


def latency(models: Mapping[str, Vit], *, batches: Sequence[int], runs: int) -> list[dict[str, Any]]:
    """Measured against ideal speed on one thread, models in turns."""
    rows = timing.measure(models, batch_sizes=batches, threads=1, runs=runs)
    gains = timing.speedups(rows, "dense", {name: cost(model).macs for name, model in models.items()})
    medians = {(row["model"], row["batch"]): row for row in rows}
    return [
        {
            **gain,
            "median_ms": medians[gain["model"], gain["batch"]]["median_ms"],
            "dense_ms": medians["dense", gain["batch"]]["median_ms"],
            "device_name": rows[0]["device_name"],
        }
        for gain in gains
    ]


def described(model: Vit, dense: Vit) -> dict[str, Any]:
    """Spec, counts, and shares of the dense model."""
    own, whole = cost(model), cost(dense)
    return {
        "spec": spec_hash(model.spec),
        "macs": own.macs,
        "params": own.params,
        "kept_macs": own.macs / whole.macs,
        "kept_params": own.params / whole.params,
    }


def write(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """One JSON line for each row, replacing the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, sort_keys=True) + "\n" for row in rows), encoding="utf-8")


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def points(change: Mapping[str, Any] | None) -> str:
    """A difference with its interval, or the plain sentence where the interval holds 0."""
    if change is None:
        return ""
    low, high = change["low"], change["high"]
    if low <= 0 <= high:
        return f"no difference seen ({low:+.2f} to {high:+.2f})"
    return f"{change['points']:+.2f} ({low:+.2f} to {high:+.2f})"
