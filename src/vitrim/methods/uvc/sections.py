"""What UVC's report shows: the cost against its budget, the forces and decisions of the search, and where the saving came from.

A search's shares refer to the network that it was given, behind an exact tail or another method; here to the dense one.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import ceil
from typing import Any

from vitrim.result import Axis, Column, Curve, Format, Section, Series, Table

PLOTTED = 150
"""Rows of the search that a chart shows."""

TITLE = "How the search went"
RESOURCES = {"macs": "MACs", "params": "parameters"}
PARTS = {"heads": "heads", "v": "value dims", "hidden": "MLP units"}
STEPS = Axis(label="step", format="whole")

Row = Mapping[str, Any]


def sections(facts: Mapping[str, Any]) -> tuple[Section, ...]:
    """facts: {report, history, start, dense}; start and dense are costs. Gives none where nothing was searched."""
    rows = [row for row in facts["history"] if "cost" in row and "budget" in row]
    if not rows:
        return ()
    told = facts["report"]
    of_dense = {name: facts["start"][name] / facts["dense"][name] for name in RESOURCES}
    thinned = [*rows[: -1 : ceil(len(rows) / PLOTTED)], rows[-1]]
    charts = (*_costs(thinned, of_dense), *_forces(thinned)) if len(rows) > 1 else ()
    first, *others = (*charts, _saving(told, of_dense))
    ended = told["search"]
    return (replace(first, lead=f"How it ended: {ended['ended']} ({ended['judged']})."), *others)


def _costs(rows: Sequence[Row], of_dense: Mapping[str, float]) -> Iterator[Curve]:
    """Each limited cost beside its budget, as shares of the dense model's."""
    for name in rows[-1]["budget"]:
        word, scale = RESOURCES[name], of_dense[name]
        cost = _series(f"{word} of the search", rows, "cost", name, scale=scale)
        budget = replace(_series("budget", rows, "budget", name, scale=scale), style="dashed", named=True)
        yield _curve(f"{word} against the budget", [cost, budget], format="percent")


def _forces(rows: Sequence[Row]) -> Iterator[Curve]:
    """Dual variables, shares removed and gates, of whatever the search decides."""
    last = rows[-1]
    if prices := [_series(f"for {name}", rows, "z", name) for name in last["z"]]:
        yield _curve("Price of the budget (dual variable)", prices)
    for part, word in PARTS.items():
        if drawn := [_series(about, rows, "removed", part, about) for about in last["removed"][part]]:
            yield _curve(f"Share of {word} removed", drawn, format="percent")
    means = [{"step": row["step"], **{part: _mean(row["y"][part]) for part in PARTS}} for row in rows]
    if weights := [_series(word, means, part) for part, word in PARTS.items() if last["y"][part]]:
        yield _curve("Weight of what is removed (dual variables), mean over blocks", weights)
    if gates := [_series(about, rows, "gates", about) for about in last["gates"]]:
        yield _curve("Probability that it stays", gates, format="percent", bounds=(0, 1))


def _curve(
    caption: str, series: Sequence[Series], *, format: Format = "plain", bounds: tuple[float, float] | None = None
) -> Curve:
    return Curve(title=TITLE, caption=caption, x=STEPS, y=Axis(format=format, bounds=bounds), series=tuple(series))


def _series(name: str, rows: Sequence[Row], *path: str, scale: float = 1.0) -> Series:
    """What the rows have at a path, over the steps; rows without it are passed over."""
    found = ((row["step"], _at(row, path)) for row in rows)
    return Series(name=name, points=tuple((step, scale * value) for step, value in found if value is not None))


def _at(row: Row, path: Sequence[str]) -> float | None:
    for key in path[:-1]:
        row = row.get(key) or {}
    return row.get(path[-1])


def _mean(values: Mapping[str, float]) -> float | None:
    return sum(values.values()) / len(values) if values else None


SAVED = (
    "saved of the dense cost",
    "of that, before the search",
    "of that, by widths",
    "of that, by skipping",
    "cut by the last step itself",
)


def _saving(told: Mapping[str, Any], of_dense: Mapping[str, float]) -> Table:
    """Of each resource: the share saved, how it divides, and what the finaliser had to cut."""
    found = []
    for name, saving in told["saving"].items():
        before, own = 1 - of_dense[name], saving["share"] * of_dense[name]
        total = max(before + own, 1e-12)
        parts = (before / total, saving["widths"] * own / total, saving["skipping"] * own / total)
        found.append((before + own, *parts, told["finaliser"][name]["cut"] * of_dense[name]))
    columns = (Column(heading=""), *(Column(heading=RESOURCES[name], format="percent") for name in told["saving"]))
    rows = tuple(zip(SAVED, *found, strict=True))
    return Table(title=TITLE, caption="Where the saving came from", columns=columns, rows=rows)
