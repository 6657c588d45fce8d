"""Whether another version of vitrim is as fast: two checkouts in turns, in fresh processes, one thread, processor seconds.

    python benchmarks/versions.py --before PATH_OF_A_CHECKOUT --rounds 5

PATH is what the ratio is taken against; this checkout is "after". Each job is a process of its own, so that imports count where
they are what is timed, and are left out where they are not. Appends a row for each job to benchmarks/results/versions.jsonl and
remakes docs/benchmarks/versions.md.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import protocol

PLACE = protocol.RESULTS / "versions.jsonl"
HERE = Path(__file__).parents[1]
TIMED = """
import time, torch
torch.set_num_threads(1)
from sizes import random_model
import vitrim
from vitrim import methods
{ready}
began = time.process_time()
{work}
print("spent", time.process_time() - began)
"""
CLOSED = (
    'model = random_model("deit_tiny_patch16_224")\n'
    "x = torch.randn({images}, 3, 224, 224, generator=torch.Generator().manual_seed(0))\n"
    'config = methods.configure("{method}", {{"budget": vitrim.Budget(keep_macs=0.5), "images": {images}}})'
)
SEARCH = (
    'model = vitrim.load("builtin:cifar10-vit-micro")\n'
    'settings = {"budget": vitrim.Budget(keep_macs=0.5), "steps": 20, "batch_size": 32, "device": "cpu"}\n'
    'config = methods.configure("uvc", settings)'
)
JOBS: dict[str, str] = {
    "auto, DeiT-T, 12 images": TIMED.format(
        ready=CLOSED.format(method="auto", images=12), work="vitrim.compress(model, config, data=x)"
    ),
    "comcat, DeiT-T, 64 images": TIMED.format(
        ready=CLOSED.format(method="comcat", images=64), work="vitrim.compress(model, config, data=x)"
    ),
    "dcvit, DeiT-T, 24 images": TIMED.format(
        ready=CLOSED.format(method="dcvit", images=24), work="vitrim.compress(model, config, data=x)"
    ),
    "uvc, built-in model, 20 steps": TIMED.format(ready=SEARCH, work='vitrim.compress(model, config, data="sample")'),
    "loading timm:deit_small_patch16_224": TIMED.format(
        ready="import timm", work='vitrim.load("timm:deit_small_patch16_224", pretrained=False)'
    ),
    "vitrim.load of the built-in model, with imports": 'import vitrim; vitrim.load("builtin:cifar10-vit-micro")',
    "vitrim --help, with imports": "from vitrim.cli import main; main(['--help'], standalone_mode=False)",
    "vitrim cost of a timm name, with imports": (
        "from vitrim.cli import main; main(['cost', 'timm:deit_small_patch16_224'], standalone_mode=False)"
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", required=True, type=Path, help="the other checkout")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", help="jobs whose names begin so")
    options = parser.parse_args()
    kept = protocol.read(PLACE) if PLACE.is_file() else []
    names = [name for name in JOBS if name.startswith(options.only or "")]
    kept = [row for row in kept if row["job"] not in names]
    for name in names:
        kept.append(row(name, options.before, options.rounds))
        protocol.write(PLACE, kept)
    protocol.publish("versions", table(kept))


def row(name: str, before: Path, rounds: int) -> dict[str, Any]:
    """Both checkouts in turns; the first turn of each fills caches and is not counted."""
    load = protocol.conditions()["load"]
    spent: dict[str, list[float]] = {"before": [], "after": []}
    for turn in range(rounds + 1):
        for label, root in (("before", before), ("after", HERE)):
            seconds = seconds_of(JOBS[name], root)
            if turn:
                spent[label].append(seconds)
    ratio = statistics.median(spent["after"]) / statistics.median(spent["before"])
    protocol.say(f"{name}: {ratio:.3f}")
    commits = {label: commit_of(root) for label, root in (("before", before), ("after", HERE))}
    return {"job": name, "ratio": ratio, "seconds": spent, "commits": commits, **protocol.conditions(), "load": load}


def seconds_of(code: str, root: Path) -> float:
    """Processor seconds of one process: what it says it spent, or all of them."""
    paths = [str(root / "src"), str(root / "benchmarks")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    told = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("spent ")]
    whole = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return float(told[0]) if told else whole


def commit_of(root: Path) -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def table(found: list[dict[str, Any]]) -> str:
    """The page of all jobs."""
    first = found[0]
    afters = ", ".join(sorted({one["commits"]["after"] for one in found}))
    lines = [
        "# One version beside another",
        "",
        f"Made by `benchmarks/versions.py` from `benchmarks/results/versions.jsonl`: {afters} against "
        f"{first['commits']['before']}, fresh processes in turns, one thread, medians of processor seconds.",
        "",
        "| job | before, s | after, s | after / before |",
        "| --- | --- | --- | --- |",
    ]
    for one in found:
        before, after = (statistics.median(one["seconds"][label]) for label in ("before", "after"))
        lines.append(f"| {one['job']} | {before:.3f} | {after:.3f} | {one['ratio']:.2f} |")
    lines += ["", f"Conditions: { ({key: first[key] for key in ('versions', 'processor')}) }."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
