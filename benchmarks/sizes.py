"""Seconds and memory of the closed forms on the geometry of known networks: random weights, so no accuracy.

    python benchmarks/sizes.py --method dcvit --model deit_small_patch16_224 --images 100

Peak memory is above what imports and the model take. Appends a row to benchmarks/results/sizes.jsonl and remakes
docs/benchmarks/sizes.md; with `--speed` the result is timed against the dense network on one thread too.
"""

from __future__ import annotations

import argparse
import resource
import threading
import time
from pathlib import Path
from typing import Any

import protocol
import torch

import vitrim
from vitrim import architectures, methods
from vitrim.counting import cost
from vitrim.model import Vit, build

PLACE = protocol.RESULTS / "sizes.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", required=True, choices=list(methods.METHODS))
    parser.add_argument("--model", default="deit_small_patch16_224", help="a timm name")
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--speed", action="store_true", help="time the result")
    parser.add_argument("--table", action="store_true", help="only make the table from the rows that are there")
    options = parser.parse_args()
    found = protocol.read(PLACE) if PLACE.is_file() else []
    if not options.table:
        found.append(row(options))
        protocol.write(PLACE, found)
    protocol.publish("sizes", table(found))


def row(options: Any) -> dict[str, Any]:
    """One compression, watched."""
    model = random_model(options.model)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(options.images, 3, *model.spec.image_px, generator=generator)
    with torch.no_grad():
        model(x[:1])
    torch.linalg.svd(torch.randn(8, 8))  # what the first call loads is no part of the method
    config = methods.configure(
        options.method, {"budget": vitrim.Budget(keep_macs=options.keep), "images": options.images}
    )
    load, watch = protocol.conditions()["load"], Watch()
    began, spent = time.monotonic(), time.process_time()
    with watch:
        small = vitrim.compress(model, config, data=x)
    facts = {
        "method": options.method,
        "model": options.model,
        "images": options.images,
        "keep": options.keep,
        "seconds": time.monotonic() - began,
        "cpu_seconds": time.process_time() - spent,
        "peak_mb": watch.peak_mb,
        "model_mb": cost(model).file_bytes / 1e6,
        **protocol.described(small.model, model),
    }
    if options.speed:
        facts["speed"] = protocol.latency({"dense": model, "small": small.model}, batches=(1, 8), runs=10)
    protocol.say(f"{options.method} on {options.model}: {facts['seconds']:.0f} s, {facts['peak_mb']:.0f} MB")
    return {**facts, **protocol.conditions(), "load": load}


def random_model(name: str) -> Vit:
    """The geometry with random weights; biases too, which start at zero."""
    spec = architectures.spec(name)
    assert spec is not None, f"no architecture named {name!r}"
    torch.manual_seed(0)
    model = build(spec)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() == 1 and "norm" not in key:
                parameter.normal_(std=0.05)
    return model


class Watch:
    """The largest resident memory while it is entered, above what it was, in MB (10**6 bytes)."""

    def __enter__(self) -> Watch:
        self.before, self.most, self.over = resident(), resident(), threading.Event()
        self.thread = threading.Thread(target=self.look, daemon=True)
        self.thread.start()
        return self

    def look(self) -> None:
        while not self.over.wait(0.02):
            self.most = max(self.most, resident())

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join()

    @property
    def peak_mb(self) -> float:
        return (self.most - self.before) / 1e6


def resident() -> int:
    """Bytes of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize()


def table(found: list[dict[str, Any]]) -> str:
    lines = [
        "# Seconds and memory of the closed forms",
        "",
        "Made by `benchmarks/sizes.py` from `benchmarks/results/sizes.jsonl`: random weights at 224 px, so time and memory only. Peak memory is above what "
        "imports, the model and the images take. Speed: PyTorch eager, one thread, float32, median of 10, interleaved with the dense network.",
        "",
        "| method | geometry | images | MACs kept | seconds | processor seconds | threads | load before | peak MB | model MB | measured speed (ideal) |",
        "| --- |" + " --- |" * 10,
    ]
    for row in found:
        speed = ", ".join(f"{s['measured']:.2f} at batch {s['batch']}" for s in row.get("speed", []))
        speed += f" ({row['speed'][0]['ideal']:.2f})" if speed else ""
        cells = [row["method"], row["model"], str(row["images"]), f"{row['kept_macs']:.1%}", f"{row['seconds']:.0f}"]
        cells += [f"{row['cpu_seconds']:.0f}", str(row["threads"]), f"{row['load']:.1f}", f"{row['peak_mb']:.0f}"]
        cells += [f"{row['model_mb']:.0f}", speed]
        lines.append("| " + " | ".join(cells) + " |")
    first = found[0]
    lines += ["", f"Conditions: { ({key: first[key] for key in ('versions', 'processor')}) }."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
