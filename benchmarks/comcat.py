"""COMCAT's factorisation on a built-in model: accuracy before and after equal recovery, beside the control; measured speed.

    python benchmarks/comcat.py --data PATH/TO/cifar10          two CPU cores, about ten minutes
    python benchmarks/comcat.py --data PATH/TO/cifar10 --full   the larger built-in model, on an accelerator

Recovery and calibration use the built-in sample (with --full: the set given by --data). Test rows are all of --data's.
Writes benchmarks/results/comcat-MODEL.jsonl and the table docs/benchmarks/comcat-MODEL.md; `--table` only the latter.
"""

from __future__ import annotations

import time
from typing import Any

import protocol

import vitrim
from vitrim import data as opened
from vitrim import surgery
from vitrim.pipeline import RecoverConfig


def main() -> None:
    options = protocol.arguments(
        "comcat",
        __doc__,
        resumes=False,
        keep={"default": "", "help": "shares of the MACs, as 0.5,0.25; the protocol's by default"},
    )
    if not options.table:
        chosen = tuple(float(share) for share in options.keep.split(",") if share)
        protocol.write(options.place, rows(options.name, options.data, chosen, full=options.full))
    protocol.publish(options.place.stem, table(options.name, protocol.read(options.place)))


def rows(name: str, data: str, keeps: tuple[float, ...], *, full: bool) -> list[dict[str, Any]]:
    """Dense, control, and each variant at each budget."""
    dense = vitrim.load(f"builtin:{name}")
    training: Any = data if full else "sample"
    test = opened.open(data, split="test", labelled=True)
    keeps = keeps or ((0.7, 0.5, 0.35, 0.2) if full else (0.5, 0.25, 0.15))
    seeds = (0, 1, 2) if full else (0,)
    amount: dict[str, Any] = {"epochs": 20.0, "batch_size": 512} if full else {"steps": 400, "batch_size": 64}
    device = "auto" if full else "cpu"
    found: list[dict[str, Any]] = []
    base, right = protocol.accuracy(dense, test)

    def add(row: dict[str, Any]) -> None:
        facts = {
            "model": name,
            "data": opened.open(training).fingerprint(),
            "test_images": len(test),
            **protocol.conditions(),
        }
        found.append({**row, **facts})
        shown = " -> ".join("-" if row.get(key) is None else f"{row[key]:.2f}" for key in ("before", "after"))
        protocol.say(f"{row['row']:>20} keep {row.get('keep', 1):.2f} seed {row.get('seed', 0)}: {shown}")

    add({"row": "dense", "before": base, **protocol.described(dense, dense)})
    tail = surgery.exact_tail(dense)
    add(
        {
            "row": "exact tail",
            "before": protocol.accuracy(tail, test)[0],
            "speed": protocol.latency({"dense": dense, "small": tail}, batches=(1, 8, 64), runs=20),
            **protocol.described(tail, dense),
        }
    )
    for seed in seeds:
        recovery = RecoverConfig(**amount, seed=seed, amp="bf16", device=device)
        settings = {
            "steps": recovery.steps,
            "epochs": recovery.epochs,
            "batch_size": recovery.batch_size,
            "lr": recovery.lr,
            "objective": "distilled",
            "amp": recovery.amp,
        }
        control, seconds = protocol.recovered(dense, dense, training, recovery)
        top, control_right = protocol.accuracy(control, test)
        add(
            {
                "row": "control",
                "seed": seed,
                "before": base,
                "after": top,
                "recovery": settings,
                "recovery_s": seconds,
                "against_dense": protocol.difference(right, control_right),
                **protocol.described(control, dense),
            }
        )
        for keep in keeps:
            for variant in ("whitened", "svd"):
                began = time.monotonic()
                config = vitrim.ComcatConfig(budget=vitrim.Budget(keep_macs=keep), variant=variant, seed=seed)
                try:
                    small = vitrim.compress(dense, config, data=training)
                except vitrim.errors.BudgetError as error:  # a budget out of reach is a row that says so
                    add(
                        {
                            "row": f"comcat {variant}",
                            "keep": keep,
                            "seed": seed,
                            "before": None,
                            "refused": str(error),
                        }
                    )
                    continue
                spent = time.monotonic() - began
                cut_top, cut_right = protocol.accuracy(small.model, test)
                after, seconds = protocol.recovered(small.model, dense, training, recovery)
                after_top, after_right = protocol.accuracy(after, test)
                speed = protocol.latency({"dense": dense, "small": after}, batches=(1, 8, 64), runs=20)
                add(
                    {
                        "row": f"comcat {variant}",
                        "keep": keep,
                        "seed": seed,
                        "before": cut_top,
                        "after": after_top,
                        "compress_s": spent,
                        "recovery_s": seconds,
                        "recovery": settings,
                        "speed": speed,
                        "cut_against_dense": protocol.difference(right, cut_right),
                        "against_control": protocol.difference(control_right, after_right),
                        "against_dense": protocol.difference(right, after_right),
                        **protocol.described(after, dense),
                    }
                )
    return found


def table(name: str, found: list[dict[str, Any]]) -> str:
    """Markdown of the rows."""
    first = found[0]
    timed = next(row for row in found if "speed" in row and "recovery" in row)
    amount = timed["recovery"]
    length = f"{amount['steps']} steps" if amount["steps"] else f"{amount['epochs']:g} epochs"
    seeds = len({row.get("seed", 0) for row in found})
    lines = [
        f"# COMCAT's factorisation on `builtin:{name}`",
        "",
        f"Made by `benchmarks/comcat.py` from `benchmarks/results/comcat-{name}.jsonl`. Top-1 on {first['test_images']:,} CIFAR-10 "
        f"test images, {seeds} seed{'s' if seeds > 1 else ''}; recovery: {length} of {amount['batch_size']} images, distilled from the dense model, the "
        "same for every row and for the control (the dense model itself). Differences in points with their paired bootstrap "
        f"intervals (95 %). Speed: PyTorch eager, one thread, float32, {timed['speed'][0]['device_name']}, interleaved with the "
        "dense model, median of 20. The exact tail (the last block lets only the class "
        "token through; the same outputs) is a row of its own, and off in the others. The whitened variant is ours, the svd variant is the paper's factorisation with exact biases.",
        "",
        "| row | GMACs (the papers' FLOPs) | MACs kept | parameters kept | before recovery | after recovery | after, against control | "
        + " | ".join(f"speed at batch {s['batch']} (ideal {{}})".replace(" (ideal {})", "") for s in timed["speed"])
        + " | ideal |",
        "| --- | --- | --- | --- | --- | --- | --- |" + " --- |" * (len(timed["speed"]) + 1),
    ]
    for row in found:
        if "refused" in row:
            lines.append(
                f"| {row['row']}, keep {row['keep']:.0%} | {row['refused']} |" + " |" * (len(timed["speed"]) + 6)
            )
            continue
        label = row["row"] + (f", keep {row['keep']:.0%}" if "keep" in row else "")
        after = f"{row['after']:.2f}" if "after" in row else ""
        speed = [f"{s['measured']:.2f}" for s in row.get("speed", [])] or [""] * len(timed["speed"])
        ideal = f"{row['speed'][0]['ideal']:.2f}" if "speed" in row else ""
        lines.append(
            f"| {label} | {row['macs'] / 1e9:.4f} | {row['kept_macs']:.1%} | {row['kept_params']:.1%} | {row['before']:.2f} | {after} | "
            f"{protocol.points(row.get('against_control'))} | " + " | ".join(speed) + f" | {ideal} |"
        )
    conditions = {key: first[key] for key in ("versions", "processor", "threads")}
    lines += ["", f"Conditions: {conditions}."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
