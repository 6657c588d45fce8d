"""Fill the results in README.md from benchmarks/results/, between the markers.

python scripts/make_results.py
"""

from __future__ import annotations

import json
from collections.abc import Callable
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
REAL = {
    "auto": "auto",
    "auto-tokens-alone": "auto, tokens alone",
    "auto-without-tokens": "auto, without tokens",
    "similarity": "similarity merging, nothing fitted",
    "comcat-whitened": "COMCAT whitened",
    "dcvit-closed": "DC-ViT closed",
    "corp": "CORP's form",
}
"""Rows of the real encoder that the README shows, and their words there."""
TRAINED = ("UVC", "UVC, started from auto")
IN_FULL = ("from scratch, UVC's shape, full recipe", "UVC's network, full recipe", "auto's network, full recipe")


def read(name: str, model: str = NAME) -> list[dict[str, Any]]:
    """The rows of a result file; none where it is not there."""
    place = RESULTS / f"{name}-{model}.jsonl"
    return [json.loads(line) for line in place.read_text(encoding="utf-8").splitlines()] if place.is_file() else []


def grid(rows: list[dict[str, Any]], ways: tuple[str, ...], cell: Callable[[dict[str, Any]], str]) -> list[str]:
    """A table of ways by shares of the MACs."""
    shares = sorted({row["keep"] for row in rows if row["row"] != "dense"}, reverse=True)
    lines = [
        "| way | " + " | ".join(f"{share:.0%} of the MACs" for share in shares) + " |",
        "| --- |" + " --- |" * len(shares),
    ]
    for way in ways:
        cells = []
        for share in shares:
            found = next((row for row in rows if (row["row"], row["keep"]) == (way, share)), None)
            cells.append("" if found is None else "out of reach" if "refused" in found else cell(found))
        if any(cells):
            lines.append(f"| {way} | " + " | ".join(cells) + " |")
    return lines


def untrained(rows: list[dict[str, Any]]) -> list[str]:
    """Top-1 right after the cut, and the measured speed, by way and share."""

    def cell(row: dict[str, Any]) -> str:
        speed = next(gain["measured"] for gain in row["speed"] if gain["batch"] == 8)
        return f"{row['before']:.2f} ({speed:.2f})"

    dense = rows[0]
    return [
        f"`builtin:{NAME}` cut from 256 unlabelled images, **no training**: top-1 on all {dense['test_images']:,} test images (dense {dense['before']:.2f}), and in brackets "
        "how many times as fast at batch 8 on one thread.",
        "",
        *grid(rows, WAYS, cell),
    ]


def recovered(rows: list[dict[str, Any]]) -> list[str]:
    """Top-1 after equal recovery, beside the control."""
    control = next(row for row in read("comcat") if row["row"] == "control")
    steps = control["recovery"]
    return [
        f"After {steps['steps']} recovery steps of {steps['batch_size']} images, the same for all; the control is the dense model with the same training, "
        f"{control['after']:.2f}. UVC has learned before, with labels, in the 600 steps of its search.",
        "",
        *grid(rows, (*WAYS, *TRAINED), lambda row: f"{row['after']:.2f}" if "after" in row else "not run"),
    ]


def in_full() -> list[str]:
    """Networks of each size by the built-in model's own recipe: what all of its images and its time would buy."""
    every = read("uvc")
    rows = [row for row in every if row["row"] in IN_FULL]
    if not rows:
        return []
    how = rows[0]["recovery"]
    again = next((r["top1"] for r in every if r["row"] == "dense, full recipe once more"), None)
    control = "" if again is None else f" The dense model trained once more so: {again:.2f}."
    return [
        f"What the dense model's own training buys at these sizes: its whole recipe, {how['steps']:,} steps on {how['images']:,} labelled images, "
        f"{min(row['recovery_s'] for row in rows) / 60:.0f} to {max(row['recovery_s'] for row in rows) / 60:.0f} minutes each on one core. Cut networks have the dense model's training behind them as well.{control}",
        "",
        *grid(rows, IN_FULL, lambda row: f"{row['top1']:.2f}"),
        "",
    ]


def real() -> list[str]:
    """Fidelity and speed of a real encoder's cut networks."""
    every = [row for row in read("real", "dinov2-small") if not row["steps"] and row["fitting"] != "enlarged"]
    if not every:
        return []
    most = max(row["images"] for row in every)
    rows = [row for row in every if row["images"] in (0, most)]

    def cell(row: dict[str, Any]) -> str:
        speed = next((gain["measured"] for gain in row.get("speed", ()) if gain["batch"] == 8), None)
        return f"{row['cosine']:.4f}" + (f" ({speed:.2f})" if speed is not None else "")

    named = [{**row, "row": REAL.get(row["row"], "")} for row in rows]
    return [
        f"DINOv2-small (ViT-S/14, 257 tokens, real weights) cut from {most} unlabelled photographs, **no training**: mean cosine of all its tokens with the dense model's on "
        f"{rows[0]['test_images']} other photographs, and in brackets how many times as fast at batch 8 on one thread.",
        "",
        *grid(named, tuple(REAL.values()), cell),
        "",
    ]


def pages() -> list[str]:
    """Where the rows and their conditions stand."""
    known = {
        "auto": "one plan",
        "comcat": "COMCAT",
        "dcvit": "a few unlabelled images",
        "uvc": "learned widths and skipping",
    }
    there = [f"[{words}](docs/benchmarks/{name}-{NAME}.md)" for name, words in known.items() if read(name)]
    there += [
        f"[{words}](docs/benchmarks/{name}-dinov2-small.md)"
        for name, words in {"real": "a real encoder", "merging": "how tokens merge"}.items()
        if read(name, "dinov2-small")
    ]
    if (RESULTS / "sizes.jsonl").is_file():
        there.append("[seconds and memory](docs/benchmarks/sizes.md)")
    return [f"Rows, seeds, intervals and conditions: {', '.join(there)}."]


def section() -> str:
    """The text between the markers."""
    rows = [row for row in read("auto") if row["seed"] == 0 and row["images"] in (0, 256)]
    return "\n".join([BEGIN, "", *real(), *untrained(rows), "", *recovered(rows), "", *in_full(), *pages(), "", END])


def main() -> None:
    page = ROOT / "README.md"
    text = page.read_text(encoding="utf-8")
    before, rest = text.split("<!-- results:begin", 1)
    page.write_text(before + section() + rest.split(END, 1)[1], encoding="utf-8")


if __name__ == "__main__":
    main()
