"""One plan over all axes against single methods, before and after equal recovery; calibration images and fit seeds.

    python benchmarks/auto.py --data PATH/TO/cifar10          two CPU cores, about an hour
    python benchmarks/auto.py --data PATH/TO/cifar10 --full   the larger built-in model, on an accelerator

Calibration and recovery use the built-in sample (with --full: --data's training split). Test rows are all of --data's.
Writes benchmarks/results/auto-MODEL.jsonl and docs/benchmarks/auto-MODEL.md; `--table` only the latter. Rows are kept as they
come: a stopped run goes on with `--resume`. `--recover 0.25,0.1` recovers at these shares only.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import protocol
import pruned

import vitrim
from vitrim.counting import cost
from vitrim.model import Vit
from vitrim.pipeline import RecoverConfig

KEEPS = (0.5, 0.25, 0.15, 0.1, 0.05)
SEEDS = (0, 1, 2)
COUNTS = (50, 100, 256, 1000)
NARROW_OFF = ("qk", "vo", "mlp", "attention", "block", "tokens")
PLAIN = (*NARROW_OFF, "width")
"""All axes but the exact tail, which is a row of its own."""


def main() -> None:
    options = protocol.arguments(
        "auto",
        __doc__,
        recover={"default": "", "help": "shares at which rows are recovered too; all by default"},
    )
    if not options.table:
        shares = tuple(float(share) for share in options.recover.split(",") if share)
        Run(options, recover=shares or KEEPS).all()
    protocol.publish(options.place.stem, table(options.name, protocol.read(options.place)))


class Run(protocol.Run):
    """All rows, each written when it is done."""

    def __init__(self, options: Any, *, recover: tuple[float, ...]) -> None:
        super().__init__(options)
        self.recover = recover
        self.base, self.right = protocol.accuracy(self.dense, self.test)
        if not self.rows:
            self.keep({"row": "dense", "keep": 1.0, "seed": 0, "images": 0, "before": self.base}, self.dense)

    def all(self) -> None:
        """Every way at every share with each fit seed, then the number of images."""
        for share in KEEPS:
            for row, make in self.ways(share).items():
                for seed in SEEDS if row == "auto" or self.full else (0,):
                    self.one(row, share, seed, 256, make)
        for count in COUNTS:
            for seed in SEEDS if count < 1000 else (0,):
                self.one(
                    "auto", 0.1, seed, count, lambda s, n, count=count: self.method("auto", 0.1, s, count, axes=PLAIN)
                )

    def ways(self, share: float) -> dict[str, Callable[[int, int], Vit]]:
        """How to make the network from a seed and a number of images, by the name of the row. UVC learns from all images."""
        limit = int(share * cost(self.dense).macs)
        return {
            "auto": lambda s, n: self.method("auto", share, s, n, axes=PLAIN),
            "auto, with the exact tail": lambda s, n: self.method("auto", share, s, n),
            "auto, without stream width": lambda s, n: self.method("auto", share, s, n, axes=NARROW_OFF),
            "COMCAT whitened": lambda s, n: self.method("comcat", share, s, n),
            "DC-ViT closed": lambda s, n: self.method("dcvit", share, s, n),
            "magnitude, equal shares": lambda s, n: pruned.nearest(lambda k: pruned.by_magnitude(self.dense, k), limit),
            "UVC": lambda s, n: self.uvc(self.dense, limit, s),
            "UVC, started from auto": lambda s, n: self.uvc(
                self.method("auto", min(2 * share, 0.99), s, n, axes=PLAIN), limit, s
            ),
        }

    def one(self, row: str, share: float, seed: int, count: int, make: Callable[[int, int], Vit]) -> None:
        """Make, score, time; at the first seed recover and score again. A row that lacks its recovery is made anew."""
        facts: dict[str, Any] = {"row": row, "keep": share, "seed": seed, "images": count}
        main = seed == 0 and count == 256
        known = next((r for r in self.rows if facts.items() <= r.items()), None)
        if known is not None and ("refused" in known or "after" in known or not (main and share in self.recover)):
            return
        began = time.monotonic()
        try:
            small = make(seed, count)
        except vitrim.errors.VitrimError as error:  # a row that says so
            self.keep({**facts, "refused": str(error)}, None)
            return
        facts["compress_s"] = time.monotonic() - began
        before, right, _ = protocol.answers(small, self.test)
        facts |= {"before": before, "cut_against_dense": protocol.difference(self.right, right)}
        if main:
            facts["speed"] = protocol.latency({"dense": self.dense, "small": small}, batches=(1, 8, 64), runs=15)
            if share in self.recover:
                amount: dict[str, Any] = (
                    {"epochs": 20.0, "batch_size": 512} if self.full else {"steps": 400, "batch_size": 64}
                )
                how = RecoverConfig(**amount, seed=seed, amp="bf16", device="auto" if self.full else "cpu")
                final, seconds = protocol.recovered(small, self.dense, self.source, how)
                after, right, _ = protocol.answers(final, self.test)
                facts |= {
                    "after": after,
                    "recovery_s": seconds,
                    "against_dense": protocol.difference(self.right, right),
                }
        self.keep(facts, small)

    def method(self, name: str, share: float, seed: int, count: int, **settings: Any) -> Vit:
        given = {"budget": vitrim.Budget(keep_macs=share), "images": count, "seed": seed, **settings}
        return vitrim.compress(self.dense, vitrim.methods.configure(name, given), data=self.source).model

    def uvc(self, start: Vit, limit: int, seed: int) -> Vit:
        """As in benchmarks/uvc.py: its own search, with labels; the dense model is the teacher."""
        amount: dict[str, Any] = {"epochs": 30.0, "batch_size": 512} if self.full else {"steps": 600, "batch_size": 64}
        config = vitrim.UvcConfig(
            budget=vitrim.Budget(max_macs=limit), seed=seed, amp="bf16", device="auto" if self.full else "cpu", **amount
        )
        return vitrim.compress(start, config, data=self.source, teacher=self.dense).model

    def keep(self, facts: dict[str, Any], model: Vit | None) -> None:
        described = {} if model is None else {**protocol.described(model, self.dense), "width": model.spec.width}
        key = {name: facts[name] for name in ("row", "keep", "seed", "images")}
        place = next((n for n, r in enumerate(self.rows) if key.items() <= r.items()), len(self.rows))
        self.rows[place : place + 1] = [{**facts, **described, **self.facts, **protocol.conditions()}]
        protocol.write(self.place, self.rows)
        said = "refused" if model is None else f"{facts['before']:.2f} -> {facts.get('after', float('nan')):.2f}"
        protocol.say(f"{facts['row']:>30} keep {facts['keep']:.2f} seed {facts['seed']} N {facts['images']}: {said}")


def table(name: str, found: list[dict[str, Any]]) -> str:
    """Markdown: a row for each way and share; then accuracy by number of images."""
    dense = found[0]
    timed = next(row for row in found if "speed" in row)
    batches = [speed["batch"] for speed in timed["speed"]]
    lines = [
        f"# One plan over all axes on `builtin:{name}`",
        "",
        f"Made by `benchmarks/auto.py` from `benchmarks/results/auto-{name}.jsonl`. Top-1 on {dense['test_images']:,} CIFAR-10 test images (dense "
        f"{dense['before']:.2f}); 256 unlabelled images; where several fit seeds ran, the mean and in brackets the range; differences to the dense model in points "
        "with their paired bootstrap interval (95 %, seed 0). UVC learns from the whole sample with its labels. Recovery: the protocol's, distilled, the same for all. The exact tail is off where a row does not say otherwise. Speed: "
        f"PyTorch eager, one thread, float32, {timed['speed'][0]['device_name']}, interleaved with the dense model, median of 15.",
        "",
        "| way | asked | MACs kept | parameters kept | stream width | before recovery | cut, against dense | after recovery | seconds | "
        + " | ".join(f"speed at {batch}" for batch in batches)
        + " | ideal |",
        "| --- |" + " --- |" * (9 + len(batches)),
    ]
    for share in KEEPS:
        for way in dict.fromkeys(row["row"] for row in found if row["keep"] == share):
            rows = [r for r in found if (r["row"], r["keep"], r["images"]) == (way, share, 256)]
            if rows:
                lines.append(line(way, share, rows, len(batches)))
    lines += [
        "",
        "## By the number of images, `auto` at 10 %",
        "",
        "| images | before recovery | seconds |",
        "| --- | --- | --- |",
    ]
    for count in COUNTS:
        rows = [r for r in found if (r["row"], r["keep"], r["images"]) == ("auto", 0.1, count) and "before" in r]
        if rows:
            spent = sum(row["compress_s"] for row in rows) / len(rows)
            lines.append(f"| {count} | {spread([row['before'] for row in rows])} | {spent:.1f} |")
    lines += ["", f"Conditions: { ({key: dense[key] for key in ('versions', 'processor', 'threads')}) }."]
    return "\n".join(lines) + "\n"


def line(way: str, share: float, rows: list[dict[str, Any]], batches: int) -> str:
    first = rows[0]
    if "refused" in first:
        return f"| {way} | {share:.0%} | {first['refused']} |" + " |" * (7 + batches)
    spent = sum(row["compress_s"] for row in rows) / len(rows)
    after = f"{first['after']:.2f}" if "after" in first else ""
    cells = [way, f"{share:.0%}", f"{first['kept_macs']:.1%}", f"{first['kept_params']:.1%}", str(first["width"])]
    cells += [
        spread([row["before"] for row in rows]),
        protocol.points(first["cut_against_dense"]),
        after,
        f"{spent:.1f}",
    ]
    cells += [f"{gain['measured']:.2f}" for gain in first["speed"]] + [f"{first['speed'][0]['ideal']:.2f}"]
    return "| " + " | ".join(cells) + " |"


def spread(values: list[float]) -> str:
    """The mean, and the range of several."""
    mean = f"{sum(values) / len(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    main()
