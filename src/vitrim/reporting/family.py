"""The page of a family: several budgets of one model side by side, to pick a point from.

A family's summary is a dictionary of plain JSON values:

    schema   1
    name     of the folder
    model, method, data   as in a run's result, the same for all members
    quality  which metric stands for quality: top1, agreement or cosine; None if none was measured
    dense    {quality, macs, params}
    members  [{name, budget, macs, params, kept_macs, kept_params, quality, before_recovery, speed: [speed-up rows], warnings}]
             by falling MACs; `name` is the member's folder
"""

from collections.abc import Mapping
from html import escape
from importlib import resources
from typing import Any

from vitrim.reporting import charts
from vitrim.reporting.figures import Result, count, figure, lookup, percent, times
from vitrim.reporting.page import final_state, method_name, quality

SUMMARY = "family.json"
WORDS = {"top1": "accuracy", "agreement": "agreement with the dense model", "cosine": "cosine to the dense features"}


def summary(members: Mapping[str, Result], *, name: str) -> dict[str, Any]:
    """A family's summary from its members' results, by the names of their folders."""
    first = next(iter(members.values()))
    metric = quality(first)
    dense = first["costs"]["dense"]
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
                "quality": None if metric is None else lookup(result, f"metrics/{final_state(result)}/{metric}"),
                "before_recovery": None if metric is None else lookup(result, f"metrics/compressed/{metric}"),
                "speed": lookup(result, "timing/speedups") or [],
                "warnings": list(result.get("warnings") or ()),
            }
        )
    return {
        "schema": 1,
        "name": name,
        "model": first["model"],
        "method": first["method"],
        "data": first["data"],
        "quality": metric,
        "dense": {
            "quality": None if metric is None else lookup(first, f"metrics/dense/{metric}"),
            "macs": dense["macs"],
            "params": dense["params"],
        },
        "members": sorted(rows, key=lambda row: -row["macs"]),
    }


def render(found: Result) -> str:
    """The whole page of a family's summary."""
    style = resources.files("vitrim.reporting").joinpath("page.css").read_text(encoding="utf-8")
    title = escape(f"{found['model']}: a family by {method_name(found)}")
    low, high = (f"{100 * found['members'][i]['kept_macs']:.0f} %" for i in (-1, 0))
    data = found["data"]
    lead = (
        f"{escape(found['model'])} cut by {escape(method_name(found))} to {len(found['members'])} budgets, judged on "
        f"{data['count']:,} {escape(data['split'])} images of {escape(data['name'])}."
    )
    head = (
        f'<header>\n<p class="kind">vitrim family</p>\n<h1>{len(found["members"])} models from {high} down to {low} of the '
        f'operations</h1>\n<p class="lead">{lead}</p>\n</header>'
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<title>{title}</title>\n<link rel="icon" href="data:,">\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n'
        f"{head}\n{_pareto(found)}\n{_table(found)}\n{_pick(found)}\n"
        "<footer>Written by vitrim. This page loads nothing from the network.</footer>\n</main>\n</body>\n</html>\n"
    )


def _pareto(found: Result) -> str:
    """Quality against operations, and against measured time where it was measured."""
    metric, members = found["quality"], found["members"]
    if metric is None or any(row["quality"] is None for row in members):
        return ""
    whole = found["dense"]["quality"]
    dense = None if metric != "top1" else whole
    operations = [(row["kept_macs"], row["quality"], row["name"]) for row in members]
    drawn = [
        charts.scatter(
            [*operations, *([(1.0, dense, "dense")] if dense is not None else [])],
            name="by-macs",
            title=f"{WORDS[metric]} against operations".capitalize(),
            across="MACs kept",
        )
    ]
    timed = [(1 / row["speed"][0]["measured"], row["quality"], row["name"]) for row in members if row["speed"]]
    if len(timed) == len(members):
        batch = members[0]["speed"][0]["batch"]
        drawn.append(
            charts.scatter(
                [*timed, *([(1.0, dense, "dense")] if dense is not None else [])],
                name="by-time",
                title=f"{WORDS[metric]} against measured time".capitalize(),
                across=f"time of the dense model, batch {batch}",
            )
        )
    figures = "".join(
        f"<figure><h3>{escape(title)}</h3>{chart}</figure>"
        for title, chart in zip(_titles(metric), drawn, strict=False)
    )
    return (
        "<section>\n<h2>What each point costs</h2>\n<p>Up is better, left is smaller or faster. The line joins the points that no "
        f'other beats.</p>\n<div class="card"><div class="pair">{figures}</div></div>\n</section>'
    )


def _titles(metric: str) -> tuple[str, str]:
    word = WORDS[metric].capitalize()
    return f"{word} against operations", f"{word} against measured time"


def _table(found: Result) -> str:
    metric = found["quality"]
    rows = []
    for index, row in enumerate(found["members"]):
        path = f"members/{index}"
        speeds = "".join(
            f'<span class="small">batch {gain["batch"]}: {figure(found, f"{path}/speed/{i}/measured", times)} of '
            f"{figure(found, f'{path}/speed/{i}/ideal', times)}</span>"
            for i, gain in enumerate(row["speed"])
        )
        cells = [
            figure(found, f"{path}/macs", count)
            + f'<span class="small">{figure(found, f"{path}/kept_macs", percent)}</span>',
            figure(found, f"{path}/params", count)
            + f'<span class="small">{figure(found, f"{path}/kept_params", percent)}</span>',
            figure(found, f"{path}/before_recovery", percent),
            figure(found, f"{path}/quality", percent),
            speeds,
        ]
        link = f'<a href="{escape(row["name"])}/report.html">{escape(row["name"])}</a>'
        rows.append(f'<tr><th scope="row">{link}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>')
    word = WORDS.get(metric or "", "quality")
    heads = ("MACs", "parameters", f"{word}, cut", f"{word}, final", "measured of ideal speed")
    dense = [
        figure(found, "dense/macs", count),
        figure(found, "dense/params", count),
        "",
        figure(found, "dense/quality", percent),
        "",
    ]
    first = f'<tr><th scope="row">dense</th>{"".join(f"<td>{cell}</td>" for cell in dense)}</tr>'
    columns = "".join(f'<th scope="col">{escape(head)}</th>' for head in heads)
    return (
        '<section>\n<h2>The members</h2>\n<div class="card scroll" tabindex="0" role="region" aria-label="table"><table class="members">\n'
        f'<thead><tr><th scope="col">folder</th>{columns}</tr></thead>\n<tbody>\n{first}\n' + "\n".join(rows) + "\n"
        "</tbody>\n</table></div>\n</section>"
    )


def _pick(found: Result) -> str:
    """How to take one point: each member is an ordinary folder."""
    row = found["members"][len(found["members"]) // 2]
    inside = f"{found['name']}/{row['name']}"
    lines = (
        ("Take one point: each is an ordinary folder", f"cp -r {inside} small"),
        ("Use it in Python", f'import vitrim\nmodel = vitrim.load("{inside}")'),
    )
    items = "".join(
        f"<li><span>{escape(does)}</span><pre><code>{escape(command)}</code></pre></li>" for does, command in lines
    )
    return f'<section>\n<h2>To pick a point</h2>\n<ul class="commands">{items}</ul>\n</section>'


__all__ = ["SUMMARY", "render", "summary"]
