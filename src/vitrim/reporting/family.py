"""The page of a family: several budgets of one model side by side, to pick a point from.

A family's summary is a dictionary of plain JSON values:

    schema   1
    vitrim   the version that wrote it
    name     of the folder
    model, method, data   as in a run's result, the same for all members
    quality  which metric stands for quality: of `vitrim.tasks.task.QUALITY`; None if none was measured
    dense    {quality, macs, params}
    members  [{name, budget, macs, params, kept_macs, kept_params, quality, before_recovery, difference: as in a run's result,
             speed: [speed-up rows], warnings}] by falling MACs; `name` is the member's folder
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from vitrim import __version__
from vitrim.foreign import command
from vitrim.reporting.figures import Result, least_gain, lookup
from vitrim.reporting.page import fill, final_state, method_name, quality, where
from vitrim.result import Axis, Curve, Series
from vitrim.tasks.task import METRICS, interval

SUMMARY = "family.json"
LITTLE = 2.0
"""Percentage points: a loss that most would give for fewer operations."""


def summary(members: Mapping[str, Result], *, name: str) -> dict[str, Any]:
    """A family's summary from its members' results, by the names of their folders."""
    first = next(iter(members.values()))
    metric = quality(first)
    dense = first["costs"]["dense"]

    def scored(result: Result, state: str) -> Any:
        return None if metric is None else lookup(result, f"metrics/{state}/{metric}")

    rows = []
    for folder, result in members.items():
        small = result["costs"]["compressed"]
        rows.append(
            {
                "name": folder,
                "budget": result["budget"],
                "macs": small["macs"],
                "params": small["params"],
                "kept_macs": small["macs"] / dense["macs"],
                "kept_params": small["params"] / dense["params"],
                "quality": scored(result, final_state(result)),
                "before_recovery": scored(result, "compressed"),
                "difference": result.get("difference"),
                "speed": lookup(result, "timing/speedups") or [],
                "warnings": list(result.get("warnings") or ()),
            }
        )
    return {
        "schema": 1,
        "vitrim": __version__,
        "name": name,
        "model": first["model"],
        "method": first["method"],
        "data": first["data"],
        "quality": metric,
        "dense": {"quality": scored(first, "dense"), "macs": dense["macs"], "params": dense["params"]},
        "members": sorted(rows, key=lambda row: -row["macs"]),
    }


def pick(found: Result) -> tuple[str, str]:
    """The member to begin with, by its folder's name, and why: the page and the command offer the same one."""
    members = found["members"]
    sure = [row for row in members if row.get("difference") and row["difference"]["low"] >= -LITTLE]
    if sure:
        return sure[-1]["name"], f"the smallest that has surely lost less than {LITTLE:g} points"
    return members[0]["name"], f"the largest: for none is a loss below {LITTLE:g} points sure"


def render(found: Result) -> str:
    """The whole page of a family's summary."""
    chosen, why = pick(found)
    inside = f"{found['name']}/{chosen}"
    picks = (
        {
            "does": f"Each point is an ordinary folder; {chosen} is {why}.",
            "command": command("cp", "-r", inside, "small"),
        },
        {"does": "Use it in Python", "command": f"import vitrim\nmodel = vitrim.load({inside!r})"},
    )
    word = "quality" if found["quality"] is None else METRICS[found["quality"]].words
    counted = found["quality"] is not None and METRICS[found["quality"]].counted
    count, form = (
        "data/count" if counted else None,
        "percent" if found["quality"] is None else METRICS[found["quality"]].form,
    )
    return fill(
        "family.html",
        found,
        method=method_name(found),
        word=word,
        form=form,
        count=count,
        where=where,
        plots=_plots(found),
        picks=picks,
        timed=any(row["speed"] for row in found["members"]),
    )


def _plots(found: Result) -> list[dict[str, Any]]:
    """Quality against operations, and against measured time where it was measured."""
    metric, members = found["quality"], found["members"]
    if metric is None or any(row["quality"] is None for row in members):
        return []
    word, count = METRICS[metric].words.capitalize(), found["data"].get("count") if METRICS[metric].counted else None
    dense = [] if METRICS[metric].against_dense else [("dense", 1.0, found["dense"]["quality"])]
    points = [(row["name"], row["kept_macs"], row["quality"]) for row in members]
    drawn = [_plot(f"{word} against operations", [*points, *dense], "MACs kept", count)]
    if all(row["speed"] for row in members):
        at = least_gain(members[0]["speed"]) or 0
        points = [(row["name"], 1 / row["speed"][at]["measured"], row["quality"]) for row in members]
        across = f"time of the dense model ({where(members[0]['speed'][at])})"
        drawn.append(_plot(f"{word} against measured time", [*points, *dense], across, count))
    return drawn


def _plot(title: str, points: Sequence[tuple[str, float, float]], across: str, count: int | None) -> dict[str, Any]:
    """Points (name, share, quality), with intervals where the quality is a share of `count` images.

    A line joins those that no other beats, lying no further right and no lower.
    """
    best: list[tuple[float, float]] = []
    for _, share, value in sorted(points, key=lambda point: (point[1], -point[2])):
        if not best or value > best[-1][1]:
            best.append((share, value))
    dots = (
        Series(
            name=name,
            points=((x, y),),
            named=name == "dense",
            spread=(interval(round(y * count), count),) if count else (),
        )
        for name, x, y in points
    )
    line = Series(name="those that no other beats", points=tuple(best))
    percent = Axis(format="percent")
    return Curve(title=title, x=replace(percent, label=across), y=percent, series=(line, *dots)).to_dict()
