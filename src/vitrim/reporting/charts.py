"""Charts as inline SVG, written by hand: a few kB, and their colours follow the page's light or dark scheme.

All are drawn for a width of 360 units, about a phone's, so that their text stays readable there.
"""

import math
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

from vitrim.reporting.figures import count, percent, three

WIDTH, LEFT, RIGHT = 360, 44, 10


def svg(body: str, *, height: float, title: str, description: str, name: str) -> str:
    """The frame, with a title and a description for those who do not see it. name: unique on the page."""
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {height:g}" role="img" aria-labelledby="{name}-title {name}-desc">'
        f'<title id="{name}-title">{escape(title)}</title><desc id="{name}-desc">{escape(description)}</desc>{body}</svg>'
    )


PARTS = {
    "macs": (("attention_macs", "attention"), ("mlp_macs", "mlp"), ("step_macs", "step")),
    "params": (("attention_params", "attention"), ("mlp_params", "mlp")),
}


def block_costs(dense: Sequence[Any], compressed: Sequence[Any], *, what: str) -> str:
    """Columns for each block: the dense model as an outline, the compressed one filled, attention under MLP.

    dense, compressed: the `blocks` of two costs.  what: "macs" or "params".
    """
    ticks = nice_ticks(0, max([block[what] for block in (*dense, *compressed)] + [1]))
    high, base = 26, 200
    scale = (base - high) / ticks[-1]
    word = {"macs": "MACs", "params": "parameters"}[what]
    parts = [_text(0, 11, word, "start")] + [_level(base - tick * scale, short(tick)) for tick in ticks]
    slot = (WIDTH - LEFT - RIGHT) / max(1, len(dense))
    bar = min(34.0, slot * 0.72)
    every = math.ceil(len(dense) / 16)
    for index, before in enumerate(dense):
        x = LEFT + slot * index + (slot - bar) / 2
        tip = [f"block {index}: dense {count(before[what])}"]
        shapes = _column(x, base, bar, before[what] * scale, "ghost")
        if index < len(compressed):
            after, y = compressed[index], float(base)
            for part, kind in PARTS[what]:
                shapes += _column(x, y, bar, after[part] * scale, kind)
                y -= after[part] * scale
            tip.append(f"now {count(after[what])}")
        parts.append(f"<g><title>{escape(', '.join(tip))}</title>{shapes}</g>")
        if index % every == 0:
            parts.append(_text(x + bar / 2, base + 15, str(index), "middle"))
    parts.append(_text(LEFT + (WIDTH - LEFT - RIGHT) / 2, base + 31, "block", "middle"))
    total = sum(block[what] for block in compressed) / max(1, sum(block[what] for block in dense))
    return svg(
        "".join(parts),
        height=236,
        title=f"{word} of each block".capitalize() if what == "params" else f"{word} of each block",
        description=f"Columns for {len(dense)} blocks; in all the blocks keep {percent(total)} of the dense model's {word}. "
        "The figures are in the table below the charts.",
        name=f"block-{what}",
    )


def _column(x: float, base: float, width: float, tall: float, kind: str) -> str:
    if tall <= 0:
        return ""
    return f'<rect class="{kind}" x="{x:.1f}" y="{base - tall:.1f}" width="{width:.1f}" height="{tall:.1f}"/>'


def speed(gains: Sequence[Any]) -> str:
    """Measured speed-ups as bars with their quartiles, the ideal one as a mark."""
    ticks = nice_ticks(0, max([gain["ideal"] for gain in gains] + [gain["high"] for gain in gains] + [1.0]))
    scale = (WIDTH - 20) / ticks[-1]
    parts, row, left = [], 44, 10
    base = 8 + row * len(gains)
    for tick in ticks:
        x = left + tick * scale
        parts.append(f'<line class="{"one" if tick == 1 else "grid"}" x1="{x:.1f}" y1="4" x2="{x:.1f}" y2="{base}"/>')
        anchor = "end" if tick == ticks[-1] else "start" if tick == 0 else "middle"
        parts.append(_text(x, base + 15, f"{tick:g}×", anchor))
    for index, gain in enumerate(gains):
        y = 8 + row * index
        label = f"{runtime_name(gain['runtime'])}, batch {gain['batch']}"
        low, high, ideal = (left + gain[key] * scale for key in ("low", "high", "ideal"))
        length = gain["measured"] * scale
        tip = f"{label}: measured {gain['measured']:.2f} times, ideal {gain['ideal']:.2f} times"
        parts.append(
            f"<g><title>{escape(tip)}</title>{_text(left, y + 11, label, 'start')}"
            f'<rect class="attention" x="{left}" y="{y + 17}" width="{length:.1f}" height="16"/>'
            f'<line class="whisker" x1="{low:.1f}" y1="{y + 25}" x2="{high:.1f}" y2="{y + 25}"/>'
            f'<line class="whisker" x1="{low:.1f}" y1="{y + 21}" x2="{low:.1f}" y2="{y + 29}"/>'
            f'<line class="whisker" x1="{high:.1f}" y1="{y + 21}" x2="{high:.1f}" y2="{y + 29}"/>'
            f'<line class="ideal" x1="{ideal:.1f}" y1="{y + 13}" x2="{ideal:.1f}" y2="{y + 37}"/></g>'
        )
    described = "; ".join(
        f"{runtime_name(gain['runtime'])} at batch {gain['batch']}: measured {gain['measured']:.2f} of ideal {gain['ideal']:.2f}"
        for gain in gains
    )
    return svg(
        "".join(parts),
        height=base + 24,
        title="Ideal and measured speed-up",
        description=described + ".",
        name="speed",
    )


def curve(
    points: Sequence[tuple[float, float]],
    *,
    name: str,
    title: str,
    share: bool = False,
    marks: bool = False,
    references: Sequence[tuple[str, float]] = (),
) -> str:
    """A line over training steps. share: values in [0, 1], printed as percent. references: named horizontal lines."""
    values = [value for _, value in points] + [value for _, value in references]
    ticks = nice_ticks(min(values), max(values))
    high, base = 12, 166
    span = ticks[-1] - ticks[0]
    last = max(step for step, _ in points) or 1

    def at(step: float, value: float) -> tuple[float, float]:
        across = LEFT + (WIDTH - LEFT - RIGHT) * step / last
        return across, base - (value - ticks[0]) / span * (base - high)

    shown = (percent_tick if share else number_tick)(ticks)
    parts = [_level(at(0, tick)[1], shown(tick)) for tick in ticks]
    for place, (label, value) in enumerate(references):
        y = at(0, value)[1]
        parts.append(f'<line class="reference" x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}"/>')
        anchor, x = ("end", WIDTH - RIGHT) if place % 2 == 0 else ("start", LEFT + 4)
        parts.append(_text(x, y - 4 if y > high + 14 else y + 13, label, anchor, "reference-name"))
    if len(points) > 1:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*point) for point in points))
        parts.append(f'<polyline class="line" points="{path}"/>')
    if marks or len(points) == 1:
        parts += [
            f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>' for x, y in (at(*point) for point in points)
        ]
    parts.append(_text(LEFT, base + 16, "0", "middle"))
    parts.append(_text(WIDTH - RIGHT, base + 16, f"step {last:g}", "end"))
    first, end = points[0][1], points[-1][1]
    form = percent if share else three
    described = f"From {form(first)} at step {points[0][0]:g} to {form(end)} at step {points[-1][0]:g}."
    return svg("".join(parts), height=190, title=title, description=described, name=name)


def lines(
    series: Sequence[tuple[str, Sequence[tuple[float, float]]]],
    *,
    name: str,
    title: str,
    share: bool = False,
    dashed: Sequence[tuple[str, Sequence[tuple[float, float]]]] = (),
    bounds: tuple[float, float] | None = None,
) -> str:
    """Several lines over training steps on one scale, each with its name as a tip.  share: values in [0, 1], as percent.

    dashed: lines that are aimed at. The names stand in the description too.  bounds: of the scale; None: of the values.
    """
    every = [point for _, points in (*series, *dashed) for point in points]
    ticks = nice_ticks(*(bounds or (min(value for _, value in every), max(value for _, value in every))))
    high, base, last = 12, 166, max(step for step, _ in every) or 1
    span = ticks[-1] - ticks[0]

    def path(points: Sequence[tuple[float, float]]) -> str:
        at = (
            (LEFT + (WIDTH - LEFT - RIGHT) * step / last, base - (value - ticks[0]) / span * (base - high))
            for step, value in points
        )
        return " ".join(f"{x:.1f},{y:.1f}" for x, y in at)

    shown = (percent_tick if share else number_tick)(ticks)
    parts = [_level(base - (tick - ticks[0]) / span * (base - high), shown(tick)) for tick in ticks]
    for kind, group in (("reference", dashed), ("line", series)):
        for label, points in group:
            parts.append(
                f'<g><title>{escape(label)}</title><polyline class="{kind}" fill="none" points="{path(points)}"/></g>'
            )
    parts.append(_text(LEFT, base + 16, "0", "middle"))
    parts.append(_text(WIDTH - RIGHT, base + 16, f"step {last:g}", "end"))
    value = percent if share else three
    described = "; ".join(f"{label} ends at {value(points[-1][1])}" for label, points in (*series, *dashed))
    return svg("".join(parts), height=190, title=title, description=f"{described}.", name=name)


def scatter(points: Sequence[tuple[float, float, str]], *, name: str, title: str, across: str) -> str:
    """Points (share, quality, label) in percent on both axes; a line joins those that no other beats.

    A point beats another when it lies no further right and no lower.
    """
    ticks = nice_ticks(min(value for _, value, _ in points), max(value for _, value, _ in points))
    steps = nice_ticks(0, max(share for share, _, _ in points))
    high, base = 12, 176

    def at(share: float, value: float) -> tuple[float, float]:
        x = LEFT + (WIDTH - LEFT - RIGHT) * share / steps[-1]
        return x, base - (value - ticks[0]) / (ticks[-1] - ticks[0]) * (base - high)

    vertical, horizontal = percent_tick(ticks), percent_tick(steps)
    parts = [_level(at(0, tick)[1], vertical(tick)) for tick in ticks]
    for step in steps:
        parts.append(_text(at(step, ticks[0])[0], base + 16, horizontal(step), "middle"))
    parts.append(_text(LEFT + (WIDTH - LEFT - RIGHT) / 2, base + 33, across, "middle"))
    best: list[tuple[float, float]] = []
    for share, value, _ in sorted(points, key=lambda point: (point[0], -point[1])):
        if not best or value > best[-1][1]:
            best.append((share, value))
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*point) for point in best))
    parts.append(f'<polyline class="line" points="{line}"/>')
    for share, value, label in points:
        x, y = at(share, value)
        tip = f"{label}: {percent(value)} at {percent(share)}"
        parts.append(f'<g><title>{escape(tip)}</title><circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="4"/></g>')
        if label == "dense":
            parts.append(_text(x + 4, y - 8 if y > high + 12 else y + 17, label, "end"))
    described = "; ".join(f"{label} {percent(value)} at {percent(share)}" for share, value, label in points)
    return svg("".join(parts), height=base + 40, title=title, description=f"{described}.", name=name)


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


def number_tick(ticks: Sequence[float], scale: float = 1.0, unit: str = "") -> Callable[[float], str]:
    """Numbers times a scale, with as many digits as the ticks have."""
    shown = [scale * tick for tick in ticks]
    exact = 1e-6 * (max(shown) - min(shown))
    digits = next((d for d in range(12) if all(abs(tick - round(tick, d)) <= exact for tick in shown)), 12)
    return lambda value: f"{scale * value:,.{digits}f}{unit}"


def percent_tick(ticks: Sequence[float]) -> Callable[[float], str]:
    """Percent with as many digits as the ticks have."""
    return number_tick(ticks, 100.0, " %")


def runtime_name(runtime: str) -> str:
    return {"eager": "PyTorch", "compile": "PyTorch compiled"}.get(runtime, runtime)


def _level(y: float, label: str) -> str:
    line = f'<line class="grid" x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}"/>'
    return line + _text(LEFT - 6, y + 4, label, "end")


def _text(x: float, y: float, text: str, anchor: str, kind: str = "label") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
