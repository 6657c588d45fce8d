"""The page of one run: what its template needs to know, from a result. Figures are named by their paths.

Whatever a template is given is escaped; only `Markup` goes in as it is.
"""

from collections.abc import Mapping, Sequence
from functools import cache, partial
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

from vitrim.reporting import charts
from vitrim.reporting.figures import FORMS, Result, counted, figure, least_gain, lookup, percent, short_of_one
from vitrim.result import Axis, Curve, Series
from vitrim.tasks import task

if TYPE_CHECKING:
    from jinja2 import Environment

STATES = {"dense": "dense", "compressed": "after the cut", "recovered": "after recovery"}


def render(result: Result) -> str:
    """The whole page of one result (laid out as the package says)."""
    states, titles = states_of(result), dict(STATES)
    if lookup(result, "recovery/kept") == "cut":
        titles["recovered"] = "kept: as cut"  # the recovery made it worse
    return fill(
        "page.html",
        result,
        method=method_name(result),
        headline=headline(result),
        tiles=tiles(result),
        STATES=titles,
        states=[titles[state] for state in states],
        rows=before_after(result, states),
        kept=kept(result),
        narrower=(lookup(result, "specs/compressed/width") or 0) < (lookup(result, "specs/dense/width") or 0),
        has_tail=has_tail(result),
        sections=grouped(result.get("sections") or ()),
        training=training(result),
        where=where,
    )


def method_name(result: Result) -> str:
    method = result["method"]
    return f"{method['name']} ({method['variant']})" if method.get("variant") else str(method["name"])


def final_state(result: Result) -> str:
    """Which metrics are the final model's: after recovery, where there was one."""
    return "recovered" if lookup(result, "metrics/recovered") else "compressed"


def states_of(result: Result) -> list[str]:
    return [state for state in STATES if state != "recovered" or lookup(result, "metrics/recovered") is not None]


def quality(result: Result) -> str | None:
    """The figure of the final model that stands for quality."""
    return task.quality(lookup(result, f"metrics/{final_state(result)}") or {})


def headline(result: Result) -> str:
    """One sentence: operations kept, time gained, accuracy lost."""
    costs, gains = result["costs"], lookup(result, "timing/speedups") or []
    least = least_gain(gains)
    parts = [f"{percent(costs['compressed']['macs'] / costs['dense']['macs'])} of the operations"]
    if least is not None:
        gain = gains[least]
        here = "no speed-up seen" if gain["low"] <= 1 else f"{gain['measured']:.2f} times as fast"
        parts.append(f"{here} ({where(gain)}{', the least of those measured' if len(gains) > 1 else ''})")
    return ", ".join(part for part in (*parts, loss_words(result)) if part)


def loss_words(result: Result) -> str:
    difference, key = result.get("difference"), quality(result)
    if difference and (key is None or not task.METRICS[key].against_dense):
        if difference["low"] <= 0 <= difference["high"]:
            words = task.seen(difference)
            return "no difference in accuracy seen" if words == "no difference seen" else words
        word = "lost" if difference["points"] < 0 else "gained"
        return f"{abs(difference['points']):.1f} points of accuracy {word}"
    if key is None or not task.METRICS[key].against_dense:
        return ""
    metric, value = task.METRICS[key], lookup(result, f"metrics/{final_state(result)}/{key}")
    return metric.kept.format(percent(value) if metric.form == "percent" else short_of_one(value) or f"{value:.3f}")


class Tile(NamedTuple):
    """A number to look at first. was: the path of what it was; None: it is a share `of` something."""

    what: str
    form: str
    now: str
    was: str | None = None
    of: str = ""
    images: str | None = None
    """The path of the number of images that a share is of."""


def tiles(result: Result) -> list[Tile]:
    """Up to four numbers, each with what it was."""
    found, name = [], quality(result)
    final = f"metrics/{final_state(result)}/{name}"
    if name is not None:
        metric = task.METRICS[name]
        was = None if metric.against_dense else f"metrics/dense/{name}"
        images = "metrics/dense/count" if metric.counted else None
        found.append(Tile(metric.words.capitalize(), metric.form, final, was, of=metric.of, images=images))
    for what, key in (("Operations (MACs)", "macs"), ("Parameters", "params")):
        found.append(Tile(what, "count", f"costs/compressed/{key}", f"costs/dense/{key}"))
    rows, gains = (lookup(result, f"timing/{key}") or [] for key in ("rows", "speedups"))
    least = least_gain(gains)
    if least is not None:
        both = (_row_of(rows, model, like=gains[least]) for model in ("compressed", "dense"))
        found.append(Tile(f"Latency, {where(gains[least])}", "ms", *(f"timing/rows/{row}/median_ms" for row in both)))
    return found


STATIC = (
    ("costs/*/macs", "GMACs (the papers’ FLOPs)", "giga"),
    ("costs/*/padding_macs", "GMACs of padded heads, not counted above", "giga"),
    ("costs/*/params", "Parameters", "count"),
    ("file_bytes/*", "Weights on disk", "megabytes"),
    ("costs/*/activation_bytes", "Peak activations, estimated", "megabytes"),
)
"""What recovery does not change."""


class Row(NamedTuple):
    """A figure in each state: its paths, None where there is none."""

    title: str
    form: str
    paths: list[str | None]
    note: str = ""
    images: str | None = None
    """The path of the number of images that a share is of."""


def before_after(result: Result, states: Sequence[str]) -> list[Row]:
    """The table of dense, cut, recovered."""
    rows, later = [], len(states) - 1
    for key, metric in task.METRICS.items():
        paths: list[str | None] = [f"metrics/{state}/{key}" for state in states]
        if any(lookup(result, path) is not None for path in paths[1:] if path):
            rows.append(Row(metric.title, metric.form, paths, images="metrics/dense/count" if metric.counted else None))
    for path, title, form in STATIC:
        was, now = (path.replace("*", state) for state in ("dense", "compressed"))
        if lookup(result, now):  # there, and not 0: few networks pad
            rows.append(Row(title, form, [was, *[now] * later]))
    timed = lookup(result, "timing/rows") or ()
    for index, row in enumerate(timed):
        if row["model"] == "compressed":
            of = _row_of(timed, "dense", like=row)
            before = None if of is None else f"timing/rows/{of}/median_ms"
            after = [*[None] * (later - 1), f"timing/rows/{index}/median_ms"]
            rows.append(Row("Latency", "ms", [before, *after], where(row)))
    return rows


AXES = (
    ("heads", "attention", "heads"),
    ("q/k dims", "attention", "qk_dim"),
    ("v dims", "attention", "v_dim"),
    ("MLP units", "mlp", "hidden"),
    ("fc1 rank", "mlp", "fc1_rank"),
    ("fc2 rank", "mlp", "fc2_rank"),
)


class Cell(NamedTuple):
    """What a block kept of one thing. path: None where it is whole and has no figure.  now: None where it is gone."""

    path: str | None
    now: float | None
    of: float


class Kept(NamedTuple):
    columns: list[str]
    rows: list[list[Cell | None]]
    """A row for each block; None where the dense block had none of it."""


def kept(result: Result) -> Kept | None:
    """What is left of each block: one bar for each thing that a method can cut."""
    dense, small = (lookup(result, f"specs/{name}/blocks") or [] for name in ("dense", "compressed"))
    if not dense or not small:
        return None
    width = result["specs"]["dense"]["width"]
    mlps = [block["mlp"] or {} for block in (*dense, *small)]
    axes = [axis for axis in AXES if not axis[2].endswith("_rank") or any(mlp.get(axis[2]) for mlp in mlps)]
    rows = []
    for index, before in enumerate(dense):
        after = small[index] if index < len(small) else {"attention": None, "mlp": None}
        path = f"specs/compressed/blocks/{index}"
        rows.append([_cell(before[half], after[half], key, f"{path}/{half}/{key}", width) for _, half, key in axes])
    columns = [title for title, _, _ in axes]
    if any(step.get("keep") for block in small for step in block["steps"]):
        columns.append("tokens out")
        for index, row in enumerate(rows):
            now, of = (f"costs/{state}/blocks/{index}/tokens_out" for state in ("compressed", "dense"))
            row.append(Cell(now, lookup(result, now), lookup(result, of)))
    return Kept(columns, rows)


def _cell(
    dense: Mapping[str, Any] | None, now: Mapping[str, Any] | None, key: str, path: str, width: int
) -> Cell | None:
    if dense is None:
        return None
    if now is None:
        return Cell(None, None, 0)
    if not key.endswith("_rank"):
        return Cell(path, now[key], dense[key])
    inner = now["hidden"] * (2 if key == "fc1_rank" and now["kind"] == "swiglu" else 1)
    full = dense[key] or min(width, inner)
    return Cell(None, full, full) if now[key] is None else Cell(path, now[key], full)


def has_tail(result: Result) -> bool:
    """Whether the last block lets only the prefix tokens through and the dense one did not."""
    dense, small = (lookup(result, f"specs/{name}/blocks") or [] for name in ("dense", "compressed"))
    ends = [any(step["kind"] == "prefix" for step in blocks[-1]["steps"]) for blocks in (dense, small) if blocks]
    return ends == [False, True]


Part = tuple[int, Mapping[str, Any]]
"""A section and its place in the result."""


def grouped(sections: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[list[Part]]]]:
    """What the method shows, by title, neighbours of one kind together."""
    return [
        (title, [list(run) for _, run in groupby(parts, key=lambda part: part[1]["kind"])])
        for title, parts in groupby(enumerate(sections), key=lambda part: part[1]["title"])
    ]


def training(result: Result) -> list[dict[str, Any]]:
    """Curves of the recovery: its training loss, and what stands for quality on the validation images."""
    key = next((said for row in lookup(result, "recovery/validation") or () if (said := task.quality(row))), None)
    losses, checks = (
        [(row["step"], row[name]) for row in lookup(result, f"recovery/{rows}") or () if row.get(name) is not None]
        for rows, name in (("curve", "loss"), ("validation", key))
    )
    steps, found = Axis(label="step", format="whole"), []
    if len(losses) > 1:  # one dot is no curve
        line = Series(name="loss", points=tuple(charts.smooth(losses)))
        found.append(Curve(title="Training loss", x=steps, y=Axis(), series=(line,)))
    if len(checks) > 1 and key is not None:
        words, count = task.METRICS[key].words, lookup(result, "recovery/validation/0/count")
        sure = (
            tuple(task.interval(round(value * count), int(count)) for _, value in checks)
            if task.METRICS[key].counted and count
            else ()
        )
        references = [
            Series(name=name, points=((0, value), (checks[-1][0], value)), style="dashed", named=True)
            for state, name in (("dense", "dense"), ("compressed", "after the cut"))
            if (value := lookup(result, f"metrics/{state}/{key}")) is not None
        ]
        line = Series(name=words, points=tuple(checks), style="marked", spread=sure)
        percents = Axis(format="percent")
        found.append(Curve(title=f"Validation {words}", x=steps, y=percents, series=(line, *references)))
    return [curve.to_dict() for curve in found]


def where(row: Mapping[str, Any]) -> str:
    return f"{charts.runtime_name(row['runtime'])}, batch {row['batch']}"


def _row_of(rows: Sequence[Any], model: str, like: Mapping[str, Any] | None = None) -> int | None:
    """The first row of a model; like: in the same runtime and at the same batch size."""
    keys = () if like is None else ("runtime", "batch", "threads", "dtype", "device")
    for index, row in enumerate(rows):
        if row["model"] == model and all(row[key] == like[key] for key in keys if like is not None):
            return index
    return None


@cache
def _environment() -> "Environment":
    import jinja2  # a tenth of a second, which --help need not wait for

    return jinja2.Environment(
        loader=jinja2.PackageLoader("vitrim.reporting"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def fill(template: str, result: Result, **values: Any) -> str:
    """A page from its template, which may ask for `at(path)`, a value, `fig(path, form)`, a figure of the result, and `of(path, count)`."""
    own: dict[str, Any] = {
        "at": partial(lookup, result),
        "fig": partial(figure, result),
        "of": partial(counted, result),
    }
    own |= {"charts": charts, "forms": FORMS}
    return _environment().get_template(template).render(own | values)
