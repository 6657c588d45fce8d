"""Charts as inline SVG: a few kB, and their colours follow the page's light or dark scheme.

All are drawn for a width of 360 units, about a phone's, so that their text stays readable there.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from vitrim.reporting.figures import FORMS, count, percent

WIDTH, LEFT, RIGHT = 360, 44, 10
ACROSS = WIDTH - LEFT - RIGHT


def tag(name: str, *inside: str, **attributes: str | float) -> Markup:
    """An element. Strings are escaped, floats have a tenth of a unit; `kind` is its class, and _ in a name a hyphen."""
    said = Markup("").join(
        Markup(' {}="{}"').format(
            "class" if key == "kind" else key.replace("_", "-"), f"{value:.1f}" if isinstance(value, float) else value
        )
        for key, value in attributes.items()
    )
    return Markup("<{0}{1}>{2}</{0}>").format(name, said, Markup("").join(inside))


def _svg(parts: Iterable[Markup], *, height: float, title: str, described: str, name: str) -> Markup:
    """The frame, with a title and a description for those who do not see it. name: unique on the page."""
    return tag(
        "svg",
        tag("title", title, id=f"{name}-title"),
        tag("desc", described, id=f"{name}-desc"),
        *parts,
        kind="chart",
        viewBox=f"0 0 {WIDTH} {height:g}",
        role="img",
        aria_labelledby=f"{name}-title {name}-desc",
    )


def _text(x: float, y: float, text: str, anchor: str, kind: str = "label") -> Markup:
    return tag("text", text, kind=kind, x=float(x), y=float(y), text_anchor=anchor)


def _line(kind: str, x1: float, y1: float, x2: float, y2: float) -> Markup:
    return tag("line", kind=kind, x1=float(x1), y1=float(y1), x2=float(x2), y2=float(y2))


def _levels(ticks: Sequence[float], at: Callable[[float], float], shown: Callable[[float], str]) -> list[Markup]:
    """The grid's horizontal lines with their numbers."""
    return [
        part
        for tick in ticks
        for part in (
            _line("grid", LEFT, at(tick), WIDTH - RIGHT, at(tick)),
            _text(LEFT - 6, at(tick) + 4, shown(tick), "end"),
        )
    ]


PARTS = {
    "macs": (("attention_macs", "attention"), ("mlp_macs", "mlp"), ("step_macs", "step")),
    "params": (("attention_params", "attention"), ("mlp_params", "mlp")),
}


def block_costs(dense: Sequence[Any], compressed: Sequence[Any], what: str) -> Markup:
    """Columns for each block: the dense model as an outline, the compressed one filled, attention under MLP.

    dense, compressed: the `blocks` of two costs.  what: "macs" or "params".
    """
    ticks = nice_ticks(0, max([block[what] for block in (*dense, *compressed)] + [1]))
    base = 200
    scale = (base - 26) / ticks[-1]
    word = {"macs": "MACs", "params": "parameters"}[what]
    parts = [_text(0, 11, word, "start"), *_levels(ticks, lambda tick: base - tick * scale, short)]
    slot = ACROSS / max(1, len(dense))
    bar = min(34.0, slot * 0.72)
    every = math.ceil(len(dense) / 16)
    for index, before in enumerate(dense):
        x, y = LEFT + slot * index + (slot - bar) / 2, float(base)
        tip = f"block {index}: dense {count(before[what])}"
        shapes = [(before[what] * scale, y, "ghost")]
        if index < len(compressed):
            after = compressed[index]
            tip += f", now {count(after[what])}"
            for part, kind in PARTS[what]:
                shapes.append((after[part] * scale, y, kind))
                y -= after[part] * scale
        drawn = [
            tag("rect", kind=kind, x=x, y=foot - tall, width=bar, height=tall)
            for tall, foot, kind in shapes
            if tall > 0
        ]
        parts.append(tag("g", tag("title", tip), *drawn))
        if index % every == 0:
            parts.append(_text(x + bar / 2, base + 15, str(index), "middle"))
    parts.append(_text(LEFT + ACROSS / 2, base + 31, "block", "middle"))
    total = sum(block[what] for block in compressed) / max(1, sum(block[what] for block in dense))
    return _svg(
        parts,
        height=base + 36,
        title=f"{word[0].upper()}{word[1:]} of each block",
        described=f"Columns for {len(dense)} blocks; in all the blocks keep {percent(total)} of the dense model's {word}. "
        "The figures are in the table below the charts.",
        name=f"block-{what}",
    )


def speed(gains: Sequence[Any]) -> Markup:
    """Measured speed-ups as bars with their quartiles, the ideal one as a mark."""
    ticks = nice_ticks(0, max([gain[key] for gain in gains for key in ("ideal", "high")] + [1.0]))
    left, row = 10, 44
    scale = (WIDTH - 2 * left) / ticks[-1]
    base = 8 + row * len(gains)
    parts, said = [], []
    for tick in ticks:
        x = left + tick * scale
        anchor = "end" if tick == ticks[-1] else "start" if tick == 0 else "middle"
        parts += [_line("one" if tick == 1 else "grid", x, 4, x, base), _text(x, base + 15, f"{tick:g}×", anchor)]
    for index, gain in enumerate(gains):
        y = 8 + row * index
        low, high, ideal = (left + gain[key] * scale for key in ("low", "high", "ideal"))
        label = f"{runtime_name(gain['runtime'])}, batch {gain['batch']}"
        said.append(f"{label}: measured {gain['measured']:.2f} times, ideal {gain['ideal']:.2f} times")
        parts.append(
            tag(
                "g",
                tag("title", said[-1]),
                _text(left, y + 11, label, "start"),
                tag("rect", kind="attention", x=left, y=y + 17, width=gain["measured"] * scale, height=16),
                _line("whisker", low, y + 25, high, y + 25),
                _line("whisker", low, y + 21, low, y + 29),
                _line("whisker", high, y + 21, high, y + 29),
                _line("ideal", ideal, y + 13, ideal, y + 37),
            )
        )
    described = f"{'; '.join(said)}."
    return _svg(parts, height=base + 24, title="Ideal and measured speed-up", described=described, name="speed")


def curve(found: Mapping[str, Any], *, name: str) -> Markup:
    """Lines and dots on one scale, each with its name as a tip.

    found: as `vitrim.result.Curve.to_dict` gives it.  name: unique on the page.
    """
    across, up, series = found["x"], found["y"], found["series"]
    every = [point for line in series for point in line["points"]]
    xs, ys = ([point[side] for point in every] for side in (0, 1))
    ys += [value for line in series for ends in line.get("spread") or () for value in ends]
    left, right = across["bounds"] or (min(0, *xs), max(xs))
    ticks = nice_ticks(*(up["bounds"] or (min(ys), max(ys))))
    high, base = 26 if up["label"] else 12, 170

    def at(x: float, y: float = ticks[0]) -> tuple[float, float]:
        share = (x - left) / ((right - left) or 1)
        return LEFT + ACROSS * share, base - (y - ticks[0]) / (ticks[-1] - ticks[0]) * (base - high)

    steps = [tick for tick in nice_ticks(left, right) if left <= tick <= right]
    words = tick_words(steps, across["format"])
    parts = [
        *_levels(ticks, lambda tick: at(0, tick)[1], tick_words(ticks, up["format"])),
        *(_text(at(step)[0], base + 16, words(step), "middle") for step in steps),
        _text(LEFT + ACROSS / 2, base + 33, across["label"], "middle"),
        _text(0, 11, up["label"], "start"),
    ]
    said = [_told(line, across["format"], up["format"]) for line in series]
    for line, told in zip(series, said, strict=True):
        points = [at(*point) for point in line["points"]]
        tip = told if len(points) == 1 else line["name"]
        whiskers = [
            _line("whisker thin", *at(x, low), *at(x, high))
            for (x, _), (low, high) in zip(line["points"], line.get("spread") or (), strict=False)
        ]
        parts.append(tag("g", tag("title", tip), *whiskers, *_drawn(points, line["style"])))
    for place, line in enumerate(line for line in series if line["named"]):
        end, anchor, aside = (-1, "end", 0) if place % 2 == 0 else (0, "start", 4)
        x, y = at(*line["points"][end])
        drop = 17 if len(line["points"]) == 1 else 13
        kind = "named aimed" if line["style"] == "dashed" else "named"
        parts.append(_text(x + aside, y - 5 if y > high + 14 else y + drop, line["name"], anchor, kind))
    title = found["caption"] or found["title"]
    return _svg(parts, height=base + 40, title=title, described=f"{'; '.join(said)}.", name=name)


def _told(line: Mapping[str, Any], across: str, up: str) -> str:
    """A line in words: where it begins and ends, or where its one point lies."""
    (_, begin), (last, end) = line["points"][0], line["points"][-1]
    if len(line["points"]) == 1:
        ends = "".join(f" ({FORMS[up](low)} to {FORMS[up](high)})" for low, high in line.get("spread") or ())
        return f"{line['name']}: {FORMS[up](end)}{ends} at {FORMS[across](last)}"
    return f"{line['name']} from {FORMS[up](begin)} to {FORMS[up](end)}"


def _drawn(points: Sequence[tuple[float, float]], style: str) -> Iterable[Markup]:
    if len(points) > 1:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        yield tag("polyline", kind="reference" if style == "dashed" else "line", points=path)
    if style == "marked" or len(points) == 1:
        yield from (tag("circle", kind="dot", cx=x, cy=y, r=4) for x, y in points)


def short(value: float) -> str:
    """A round number for an axis: 5_000_000 -> "5 M"."""
    unit, scale = next(((u, s) for u, s in (("G", 1e9), ("M", 1e6), ("k", 1e3)) if value >= s), ("", 1.0))
    return f"{value / scale:g} {unit}".strip()


def smooth(points: Sequence[tuple[float, float]], *, most: int = 160) -> list[tuple[float, float]]:
    """At most `most` points, each the mean of its neighbours: single batches hide the trend."""
    if len(points) <= 12:
        return list(points)
    width = max(1, math.ceil(len(points) / most), len(points) // 30)
    stride = math.ceil(len(points) / most)
    means = []
    for end in range(len(points), 0, -stride):
        window = points[max(0, end - width) : end]
        means.append((points[end - 1][0], sum(value for _, value in window) / len(window)))
    return means[::-1]


def nice_ticks(low: float, high: float, aim: int = 4) -> list[float]:
    """Round numbers that enclose the range, about `aim` steps."""
    if not high > low:
        low, high = low - (abs(low) * 0.05 or 0.5), high + (abs(high) * 0.05 or 0.5)
    raw = (high - low) / aim
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(size * power for size in (1, 2, 2.5, 5, 10) if size * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


UNITS = {
    "percent": (100.0, " %"),
    "seconds": (1.0, " s"),
    "ms": (1.0, " ms"),
    "times": (1.0, "×"),
    "megabytes": (1e-6, " MB"),
}


def tick_words(ticks: Sequence[float], form: str) -> Callable[[float], str]:
    """The words of an axis's numbers in a form of `vitrim.result.Format`, with as many digits as the ticks have."""
    if form == "count":
        return short
    scale, unit = UNITS.get(form, (1.0, ""))
    shown = [scale * tick for tick in ticks]
    exact = 1e-6 * (max(shown) - min(shown))
    digits = next((d for d in range(12) if all(abs(tick - round(tick, d)) <= exact for tick in shown)), 12)
    return lambda value: f"{scale * value:,.{digits}f}{unit}"


def runtime_name(runtime: str) -> str:
    return {"eager": "PyTorch", "compile": "PyTorch compiled"}.get(runtime, runtime)
