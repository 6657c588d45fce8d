"""Fill the results in README.md from benchmarks/results/, between the markers.

python scripts/make_results.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
NAME = "cifar10-vit-micro"
BEGIN, END = "<!-- results:begin; made by scripts/make_results.py -->", "<!-- results:end -->"
WAYS = (
    "auto",
    "auto, with the exact tail",
    "auto, without stream width",
    "COMCAT whitened",
    "DC-ViT closed",
    "magnitude, equal shares",
)


def read(name: str) -> list[dict[str, Any]]:
    """The rows of a result file; none where it is not there."""
    place = RESULTS / f"{name}-{NAME}.jsonl"
    return [json.loads(line) for line in place.read_text(encoding="utf-8").splitlines()] if place.is_file() else []


def untrained() -> list[str]:
    """Top-1 right after the cut, and the measured speed, by way and share."""
    rows = [row for row in read("auto") if row["seed"] == 0 and row["images"] in (0, 256)]
    dense = rows[0]
    shares = sorted({row["keep"] for row in rows if row["row"] != "dense"}, reverse=True)
    lines = [
        f"`builtin:{NAME}` cut from 256 unlabelled images, **no training**: top-1 on all {dense['test_images']:,} test images (dense {dense['before']:.2f}), and in brackets "
        "how many times as fast at batch 8 on one thread.",
        "",
        "| way | " + " | ".join(f"{share:.0%} of the MACs" for share in shares) + " |",
        "| --- |" + " --- |" * len(shares),
    ]
    for way in WAYS:
        cells = []
        for share in shares:
            found = next((row for row in rows if (row["row"], row["keep"]) == (way, share)), None)
            if found is None:
                cells.append("")
            elif "refused" in found:
                cells.append("out of reach")
            else:
                speed = next(gain["measured"] for gain in found["speed"] if gain["batch"] == 8)
                cells.append(f"{found['before']:.2f} ({speed:.2f})")
        if any(cells):
            lines.append(f"| {way} | " + " | ".join(cells) + " |")
    return lines


def recovered() -> list[str]:
    """COMCAT beside its control, after equal recovery."""
    rows = read("comcat")
    control = next(row for row in rows if row["row"] == "control")
    steps = control["recovery"]
    lines = [
        f"After {steps['steps']} recovery steps of {steps['batch_size']} images, beside the control (the dense model with the same training, "
        f"{control['after']:.2f}):",
        "",
        "| way | MACs kept | before | after | after, against control | times as fast at batch 8 (ideal) |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        if "after" in row and row["row"] != "control":
            speed = next(gain for gain in row["speed"] if gain["batch"] == 8)
            gap = row["against_control"]
            seen = "no difference seen" if gap["low"] <= 0 <= gap["high"] else f"{gap['points']:+.2f}"
            lines.append(
                f"| {row['row']} | {row['kept_macs']:.1%} | {row['before']:.2f} | {row['after']:.2f} | {seen} ({gap['low']:+.2f} to {gap['high']:+.2f}) | "
                f"{speed['measured']:.2f} ({speed['ideal']:.2f}) |"
            )
    return lines


def pages() -> list[str]:
    """Where the rows and their conditions stand."""
    known = {
        "auto": "one plan",
        "comcat": "COMCAT",
        "dcvit": "a few unlabelled images",
        "uvc": "learned widths and skipping",
    }
    there = [f"[{words}](docs/benchmarks/{name}-{NAME}.md)" for name, words in known.items() if read(name)]
    if (RESULTS / "sizes.jsonl").is_file():
        there.append("[seconds and memory](docs/benchmarks/sizes.md)")
    return [f"Rows, seeds, intervals and conditions: {', '.join(there)}."]


def section() -> str:
    """The text between the markers."""
    return "\n".join([BEGIN, "", *untrained(), "", *recovered(), "", *pages(), "", END])


def main() -> None:
    page = ROOT / "README.md"
    text = page.read_text(encoding="utf-8")
    before, rest = text.split("<!-- results:begin", 1)
    page.write_text(before + section() + rest.split(END, 1)[1], encoding="utf-8")


if __name__ == "__main__":
    main()
