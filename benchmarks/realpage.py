"""The page of `real.py`, made from its rows alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

Row = dict[str, Any]

LABELS = {
    "auto": "`auto`, all axes",
    "auto-without-tokens": "`auto` without tokens",
    "auto-tokens-alone": "`auto`, tokens alone",
    "dcvit-closed": "DC-ViT closed",
    "comcat-whitened": "COMCAT whitened",
    "comcat-svd": "COMCAT svd",
    "corp": "CORP's form",
    "snapvit": "SnapViT's form",
    "torch-pruning": "Torch-Pruning",
    "magnitude": "magnitude",
    "lattice": "lattice halving",
    "similarity": "similarity, constant counts",
    "dense": "the dense model",
}
COSINES = {0.65: 0.995, 0.5: 0.985, 0.35: 0.95}
"""What was hoped for before anything ran: mean cosine of the tokens by share of the MACs, nothing trained."""
OVERLAPS = {0.65: 0.92, 0.5: 0.82, 0.35: 0.65}
REALISED = 0.95
"""Of the ideal speed, at batch 8."""
ABOUT = (
    "[DINOv2-small](https://huggingface.co/facebook/dinov2-small) (ViT-S/14, 224 px, 257 tokens), fine-tuned for saliency, "
    "and CamVid's street photographs. Nothing is labelled: the dense model's own tokens (of the last map, after the final norm, merged ones restored) and its "
    "saliency map, by its decoder as it is, are the reference. Cosines are of all tokens, a mean over photographs; the worst is the photograph with the lowest mean. "
    "Map: mean absolute error of importance in [0, 1], and intersection over union of what is above 0.5. Error after blocks 3, 6, 9: of the stream's patch tokens, as a share of their "
    "length, where the stream has the dense one's width."
)
FORMS = (
    "CORP's form (arXiv 2602.05243) and SnapViT's form (arXiv 2510.17700) are rebuilt here from their formulas, and are not their code: CORP's has ridge-folded MLP units and query/key "
    "dims, the same share everywhere; SnapViT's ranks heads and MLP units over all blocks by squared gradients of a loss without labels, with the mean of what goes in the biases, without its "
    "evolutionary search over blocks. Torch-Pruning is its own recipe for timm's ViTs (group Taylor), its gradients of the same loss. Magnitude takes equal shares of query/key "
    "dims, value dims and MLP units. Lattice halves columns and rows behind blocks that are chosen on validation photographs. Similarity merges as many tokens in each block, by "
    "cosine, with proportional attention; nothing is fitted."
)


def page(rows: Sequence[Row]) -> str:
    """Markdown: what it says, tables by share, fewer images, recovery, domain, aims, conditions."""
    cut = [row for row in rows if not row["steps"] and row["fitting"] != "enlarged"]
    counts = sorted({row["images"] for row in cut if row["images"]}, reverse=True) or [0]
    main = [row for row in cut if row["images"] in (0, counts[0])]
    shares = sorted({row["keep"] for row in main}, reverse=True)
    first = rows[0]
    timed = next((row["speed"][0] for row in main if "speed" in row), None)
    lines = [
        "# One plan over all axes on a real encoder: DINOv2-small",
        "",
        "Made by `benchmarks/real.py` from `benchmarks/results/real-dinov2-small.jsonl`. " + ABOUT + " "
        f"{first['test_images']} test photographs, on which nothing is chosen; fitting images are of the training split.",
        "",
        FORMS,
        "",
        "Seconds are of a process of its own beside another one, for all shares that were asked at once (`auto`, COMCAT, DC-ViT, CORP's form, SnapViT's form and Torch-Pruning score once for "
        "all), and in brackets a share's part; peak memory is all that this process holds, imports and images too. "
        + (
            f"Speed: PyTorch eager, one thread, float32, {timed['device_name']}, all networks of a share in turns with the dense one, median; realised is measured over ideal."
            if timed
            else ""
        ),
        "",
        "## What it says",
        "",
        *[f"- {line}" for line in said(main, shares)],
        "",
        "## Aims",
        "",
        *aims(main, shares, counts[0]),
        "",
    ]
    for share in shares:
        lines += [
            f"## {share:.0%} of the MACs, {counts[0]} fitting images",
            "",
            *wide([r for r in main if r["keep"] == share]),
            "",
        ]
    for count in counts[1:]:
        own = [row for row in cut if row["images"] == count]
        lines += [
            f"## {count} fitting images",
            "",
            "Mean cosine, and the map's overlap in brackets.",
            "",
            *short(own, shares),
            "",
        ]
    lines += recovery(rows)
    lines += domain(rows)
    return "\n".join([*lines, *conditions(rows)]) + "\n"


def ordered(rows: Sequence[Row]) -> list[Row]:
    places = list(LABELS)
    return sorted(rows, key=lambda row: places.index(row["row"]))


def of(rows: Sequence[Row], name: str, share: float) -> Row | None:
    """A row that is no refusal."""
    return next((r for r in rows if r["row"] == name and r["keep"] == share and "refused" not in r), None)


def table(heads: Sequence[str], cells: Sequence[Sequence[str]]) -> list[str]:
    return [
        f"| {' | '.join(heads)} |",
        "| --- |" * 1 + " --- |" * (len(heads) - 1),
        *(f"| {' | '.join(c)} |" for c in cells),
    ]


def wide(rows: Sequence[Row]) -> list[str]:
    """All columns of one share."""
    heads = ["way", "MACs kept", "parameters kept", "cosine", "worst", "class token", "map error", "map IoU"]
    heads += [
        "after 3",
        "after 6",
        "after 9",
        "seconds",
        "peak MB",
        "speed at 1",
        "speed at 8",
        "ideal",
        "realised at 8",
    ]
    found = []
    for row in ordered(rows):
        if "refused" in row:
            found.append([LABELS[row["row"]], f"refused: {row['refused'].split('. ')[0]}", *[""] * (len(heads) - 2)])
            continue
        cells = [LABELS[row["row"]], f"{row['kept_macs']:.1%}", f"{row['kept_params']:.1%}"]
        cells += [f"{row[name]:.4f}" for name in ("cosine", "worst", "cls")]
        cells += [f"{row['map_mae']:.4f}", f"{row['map_iou']:.3f}"]
        cells += [f"{row[name]:.3f}" if name in row else "" for name in ("after 3", "after 6", "after 9")]
        cells += [f"{row['family_s']:.0f} ({row['family_s'] / row['family']:.0f})", f"{row['peak_mb']:.0f}"]
        speeds = {speed["batch"]: speed for speed in row.get("speed", ())}
        cells += [f"{speeds[batch]['measured']:.2f}" if batch in speeds else "" for batch in (1, 8)]
        cells += [f"{speeds[8]['ideal']:.2f}", f"{speeds[8]['realised']:.2f}"] if 8 in speeds else ["", ""]
        found.append(cells)
    return table(heads, found)


def short(rows: Sequence[Row], shares: Sequence[float]) -> list[str]:
    """A row for each way, a column for each share."""
    found = []
    for name in [name for name in LABELS if any(row["row"] == name for row in rows)]:
        own = {row["keep"]: row for row in rows if row["row"] == name}
        cells = [
            ""
            if k not in own
            else "refused"
            if "refused" in own[k]
            else f"{own[k]['cosine']:.4f} ({own[k]['map_iou']:.3f})"
            for k in shares
        ]
        spent = next((f"{row['family_s']:.0f}" for row in own.values() if "family_s" in row), "")
        found.append([LABELS[name], *cells, spent])
    return table(["way", *(f"{share:.0%}" for share in shares), "seconds"], found)


# ------------------------------------------------------------------------------------------------------------- sentences


def said(rows: Sequence[Row], shares: Sequence[float]) -> list[str]:
    """By share: the plan over all axes beside its parts and the best of the others."""
    lines = []
    for share in shares:
        whole = of(rows, "auto", share)
        others = [r for r in rows if r["keep"] == share and not r["row"].startswith("auto") and "refused" not in r]
        if whole is None or not others:
            continue
        best = max(others, key=lambda row: row["cosine"])
        parts = {
            words: "out of reach" if "refused" in part else f"{part['cosine']:.4f}"
            for name, words in (("auto-without-tokens", "without tokens"), ("auto-tokens-alone", "by tokens alone"))
            for part in rows
            if (part["row"], part["keep"]) == (name, share)
        }
        ratio = (1 - best["cosine"]) / (1 - whole["cosine"])
        lines.append(
            f"At {share:.0%} `auto` keeps a mean cosine of {whole['cosine']:.4f} over all axes"
            + "".join(f", {words} {figure}" for words, figure in parts.items())
            + f"; the best of the others is {LABELS[best['row']]} with {best['cosine']:.4f}, {ratio:.1f} times as far from 1."
        )
    return lines


def aims(rows: Sequence[Row], shares: Sequence[float], count: int) -> list[str]:
    """Each aim, and whether the rows meet it."""
    found = []
    hopes: list[tuple[str, str, dict[float, float]]] = [
        ("mean cosine", "cosine", COSINES),
        ("IoU of the map", "map_iou", OVERLAPS),
    ]
    for words, key, goals in hopes:
        for share, goal in goals.items():
            if (row := of(rows, "auto", share)) is not None:
                found.append(
                    [
                        f"{words} at {share:.0%}, {count} images",
                        f"at least {goal:g}",
                        f"{row[key]:.4f}",
                        met(row[key] >= goal),
                    ]
                )
    timed = [row for share in shares if (row := of(rows, "auto", share)) and "speed" in row]
    for row in timed:
        value = next(speed["realised"] for speed in row["speed"] if speed["batch"] == 8)
        found.append(
            [
                f"realised over ideal at batch 8, {row['keep']:.0%}",
                f"at least {REALISED:g}",
                f"{value:.2f}",
                met(value >= REALISED),
            ]
        )
    if timed:
        behind, faster = behind_at_equal_time(rows, timed)
        figure = "; ".join(behind) or "nowhere behind"
        figure += f" (faster than every network of `auto`, so not compared: {'; '.join(faster)})" if faster else ""
        found.append(["ahead of every row at equal measured time, batch 8", "cosine no lower", figure, met(not behind)])
    return table(["aim", "asked", "found", ""], found)


def met(yes: bool) -> str:
    return "met" if yes else "not met"


def behind_at_equal_time(rows: Sequence[Row], own: Sequence[Row]) -> tuple[list[str], list[str]]:
    """Rows of others that are better than `auto` at their own measured time, read off the line through auto's networks and the dense
    one; and those that are faster than all of it, where nothing is known.
    """
    line = sorted([(time_of(row), row["cosine"]) for row in own] + [(1.0, 1.0)])
    behind, faster = [], []
    for row in rows:
        if row["row"] == "auto" or "speed" not in row:
            continue
        ours, named = (
            read_off(line, time_of(row)),
            f"{LABELS[row['row']]} at {row['keep']:.0%} with {row['cosine']:.4f}",
        )
        if ours is None:
            faster.append(named)
        elif ours < row["cosine"]:
            behind.append(f"{named} against {ours:.4f}")
    return behind, faster


def time_of(row: Row) -> float:
    return float(1 / next(speed["measured"] for speed in row["speed"] if speed["batch"] == 8))


def read_off(line: Sequence[tuple[float, float]], at: float) -> float | None:
    """The height of a line of points at a place; beyond its right end the last height, before its left end None."""
    if at < line[0][0]:
        return None
    for (x, y), (x2, y2) in pairwise(line):
        if x <= at <= x2:
            return y + (y2 - y) * (at - x) / (x2 - x) if x2 > x else max(y, y2)
    return line[-1][1]


# -------------------------------------------------------------------------------------------------------------- sections


def recovery(rows: Sequence[Row]) -> list[str]:
    after = [row for row in rows if row["steps"]]
    if not after:
        return []
    steps = after[0]["steps"]
    control = next((row for row in after if row["row"] == "dense"), None)
    lines = [
        f"## After {steps} steps without labels",
        "",
        f"The dense model's tokens and saliency map are learned on the training photographs, each as a share of its mean square: batch {after[0]['batch']}, bf16, AdamW, the "
        f"library's own loop at a learning rate of {after[0]['lr']:g}, chosen on validation photographs. "
        + (
            f"The dense model with the same training ends at a cosine of {control['cosine']:.4f} and an IoU of {control['map_iou']:.3f} with itself: so much is noise."
            if control
            else ""
        ),
        "",
    ]
    found = []
    for row in ordered([row for row in after if row["row"] != "dense"]):
        same = [r for r in rows if not r["steps"] and r["fitting"] == row["fitting"] and r["images"] == row["images"]]
        before = of(same, row["row"], row["keep"])
        pairs: list[tuple[str, Callable[[float], str]]] = [
            ("cosine", "{:.4f}".format),
            ("worst", "{:.4f}".format),
            ("map_iou", "{:.3f}".format),
        ]
        cells = [LABELS[row["row"]], f"{row['keep']:.0%}"]
        cells += [f"{form(before[key]) if before else ''} -> {form(row[key])}" for key, form in pairs]
        found.append([*cells, f"{row['recovery_s']:.0f}"])
    return [*lines, *table(["way", "MACs asked", "cosine", "worst", "map IoU", "seconds"], found), ""]


def domain(rows: Sequence[Row]) -> list[str]:
    """The same photographs scored, after fitting on images of another kind."""
    other = [row for row in rows if row["fitting"] == "enlarged" and "refused" not in row]
    if not other:
        return []
    found, count = [], other[0]["images"]
    for row in sorted(other, key=lambda row: -row["keep"]):
        same = of(
            [r for r in rows if not r["steps"] and r["fitting"] == "photographs" and r["images"] == count],
            row["row"],
            row["keep"],
        )
        cells = [LABELS[row["row"]], f"{row['keep']:.0%}"]
        cells += [f"{same[key]:.4f}" if same else "" for key in ("cosine", "map_iou")]
        found.append([*cells, *(f"{row[key]:.4f}" for key in ("cosine", "map_iou"))])
    heads = ["way", "MACs asked", "cosine, street scenes", "IoU, street scenes", "cosine, CIFAR-10", "IoU, CIFAR-10"]
    return [
        "## What the domain of the fitting images costs",
        "",
        f"Fitted on {count} street photographs, or on as many of CIFAR-10 enlarged to 224 px; scored on the same test photographs.",
        "",
        *table(heads, found),
        "",
    ]


def conditions(rows: Sequence[Row]) -> list[str]:
    first = rows[0]
    versions = {name: number for row in rows for name, number in row["versions"].items()}
    threads = sorted({row["threads"] for row in rows})
    loads = [row["load"] for row in rows]
    timings = [row["speed_load"] for row in rows if "speed_load" in row]
    said = f"Conditions: {versions}, {first['processor']}, {' or '.join(map(str, threads))} threads a process; load before a row {min(loads):.1f} to {max(loads):.1f}"
    return [said + (f", before the timings {min(timings):.1f} to {max(timings):.1f}." if timings else ".")]
