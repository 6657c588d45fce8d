"""What every accuracy benchmark shares: equal data, equal recovery, a control, provenance, and tables made from the rows.

A row is one JSON line. Settings are chosen on the validation split; the test split is scored once, at the end.
"""

from __future__ import annotations

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
from vitrim import timing
from vitrim.counting import cost
from vitrim.data import Images
from vitrim.model import Vit
from vitrim.pipeline import RecoverConfig
from vitrim.pipeline.judging import difference
from vitrim.spec import spec_hash

__all__ = ["difference"]

RESULTS = Path(__file__).parent / "results"


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
