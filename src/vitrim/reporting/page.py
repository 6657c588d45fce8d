"""The page's sections, from a result to HTML. Every label and path is escaped; nothing is loaded from anywhere."""

from collections.abc import Callable, Mapping, Sequence
from html import escape
from importlib import resources
from typing import Any

from vitrim.reporting import charts
from vitrim.reporting.figures import (
    NONE,
    Format,
    Result,
    count,
    figure,
    lookup,
    megabytes,
    ms,
    percent,
    percent_whole,
    plain,
    seconds,
    signed,
    times,
    whole,
)

STATES = {"dense": "dense", "compressed": "after the cut", "recovered": "after recovery"}


def render(result: Result) -> str:
    """The whole page of one result (laid out as the package says)."""
    style = resources.files("vitrim.reporting").joinpath("page.css").read_text(encoding="utf-8")
    sections = (before_after, kept, prediction, search, block_cost, speed, curves, samples, provenance, commands)
    body = "\n".join(part for part in (section(result) for section in sections) if part)
    title = escape(f"{result['model']}: {method_name(result)}")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<title>{title}</title>\n<link rel="icon" href="data:,">\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n'
        f"{head(result)}\n{body}\n<footer>Written by vitrim. This page loads nothing from the network.</footer>\n"
        "</main>\n</body>\n</html>\n"
    )


def method_name(result: Result) -> str:
    method = result["method"]
    return f"{method['name']} ({method['variant']})" if method.get("variant") else str(method["name"])


def final_state(result: Result) -> str:
    """Which metrics are the final model's: after recovery, where there was one."""
    return "recovered" if lookup(result, "metrics/recovered") else "compressed"


def quality(result: Result) -> str | None:
    """The metric that stands for quality: accuracy where there are labels, else agreement with the dense model."""
    dense = lookup(result, f"metrics/{final_state(result)}") or {}
    return next((name for name in ("top1", "agreement", "cosine") if dense.get(name) is not None), None)


def head(result: Result) -> str:
    """Headline, one line of context, warnings, and the four tiles."""
    warnings = "".join(f'<p class="notice" role="note">{escape(text)}</p>' for text in result.get("warnings") or ())
    data = result.get("data") or {}
    lead = f"{escape(result['model'])} cut by {escape(method_name(result))}"
    if data.get("name"):
        number, split = figure(result, "data/count", whole), escape(data.get("split") or "")
        lead += f", judged on {number} {split} images of {escape(data['name'])}"
    return (
        f'<header>\n<p class="kind">vitrim report</p>\n<h1>{headline(result)}</h1>\n<p class="lead">{lead}.</p>\n'
        f"{warnings}\n{tiles(result)}\n</header>"
    )


def headline(result: Result) -> str:
    """One sentence: operations kept, time gained, accuracy lost."""
    costs = result["costs"]
    share = costs["compressed"]["macs"] / costs["dense"]["macs"]
    parts = [f"{percent(share)} of the operations"]
    gain = lookup(result, "timing/speedups/0")
    if gain:
        fast = times(gain["measured"]).replace("×", " times")
        here = "no speed-up seen" if gain["low"] <= 1 else f"{fast} as fast"
        here += f" at batch {gain['batch']}"
        parts.append(here)
    parts.append(loss_words(result))
    return escape(", ".join(part for part in parts if part))


def loss_words(result: Result) -> str:
    difference = result.get("difference")
    if difference:
        if difference["low"] <= 0 <= difference["high"]:
            return "no difference in accuracy seen"
        word = "lost" if difference["points"] < 0 else "gained"
        return f"{abs(difference['points']):.1f} points of accuracy {word}"
    final = lookup(result, f"metrics/{final_state(result)}") or {}
    if final.get("agreement") is not None:
        return f"{percent(final['agreement'])} of the predictions as before"
    if final.get("cosine") is not None:
        return f"features at cosine {final['cosine']:.3f} to the dense model's"
    return ""


def tiles(result: Result) -> str:
    """Four numbers to look at first, each with what it was."""

    def tile(what: str, now: str, was: str) -> str:
        inside = f'<span class="what">{what}</span><span class="now">{now}</span><span class="was">{was}</span>'
        return f'<div class="tile">{inside}</div>'

    def pair(what: str, path: str, form: Format) -> str:
        now, was = (figure(result, path.replace("*", state), form) for state in ("compressed", "dense"))
        return tile(what, now, f"dense {was}")

    found, name = [], quality(result)
    if name == "top1":
        now = figure(result, f"metrics/{final_state(result)}/top1", percent)
        found.append(tile("Accuracy", now, f"dense {figure(result, 'metrics/dense/top1', percent)}"))
    elif name:
        words, of = {
            "agreement": ("Agreement with dense", "of the predictions"),
            "cosine": ("Cosine to dense", "of the features"),
        }[name]
        found.append(tile(words, figure(result, f"metrics/{final_state(result)}/{name}", percent), of))
    found.append(pair("Operations (MACs)", "costs/*/macs", count))
    found.append(pair("Parameters", "costs/*/params", count))
    rows: Sequence[Any] = lookup(result, "timing/rows") or []
    small, dense = _row_index(rows, "compressed"), _row_index(rows, "dense")
    if small is not None and dense is not None:
        found.append(
            tile(
                f"Latency, batch {rows[small]['batch']}",
                figure(result, f"timing/rows/{small}/median_ms", ms),
                f"dense {figure(result, f'timing/rows/{dense}/median_ms', ms)}",
            )
        )
    return f'<div class="tiles">{"".join(found)}</div>'


def before_after(result: Result) -> str:
    """The table: dense, cut, recovered."""
    recovered = lookup(result, "metrics/recovered") is not None
    states = [state for state in STATES if recovered or state != "recovered"]
    rows: list[str] = []

    def add(name: str, cells: Sequence[str], note: str = "") -> None:
        marked = [f"<td>{cell}</td>" for cell in cells[:-1]] + [f'<td class="final">{cells[-1]}</td>']
        small = f' <span class="small">{note}</span>' if note else ""
        rows.append(f'<tr><th scope="row">{name}{small}</th>{"".join(marked)}</tr>')

    metrics: tuple[tuple[str, str, Format], ...] = (
        ("top1", "Top-1 accuracy", percent),
        ("top5", "Top-5 accuracy", percent),
        ("loss", "Loss", plain),
        ("agreement", "Agrees with dense", percent),
        ("cosine", "Cosine to dense", plain),
    )
    for key, title, form in metrics:
        paths = [f"metrics/{state}/{key}" for state in states]
        if any(lookup(result, path) is not None for path in paths[1:]):
            add(title, [figure(result, path, form) for path in paths])

    def static(title: str, path: str, form: Format) -> None:
        if lookup(result, path.replace("*", "compressed")) is not None:
            now = figure(result, path.replace("*", "compressed"), form)
            add(title, [figure(result, path.replace("*", "dense"), form), *[now] * (len(states) - 1)])

    static("GMACs (the papers’ FLOPs)", "costs/*/macs", lambda value: f"{value / 1e9:.4g}")
    static("Parameters", "costs/*/params", count)
    static("Weights on disk", "file_bytes/*", megabytes)
    static("Peak activations, estimated", "costs/*/activation_bytes", megabytes)
    timed = lookup(result, "timing/rows") or ()
    for index, row in enumerate(timed):
        if row["model"] != "compressed":
            continue
        was = _row_index(timed, "dense", like=row)
        before = figure(result, f"timing/rows/{was}/median_ms", ms) if was is not None else NONE
        now = figure(result, f"timing/rows/{index}/median_ms", ms)
        add("Latency", [before, *[NONE] * (len(states) - 2), now], _where(row))
    columns = "".join(f'<th scope="col">{STATES[state]}</th>' for state in states)
    difference = ""
    if result.get("difference"):
        low, points, high = (figure(result, f"difference/{key}", signed) for key in ("low", "points", "high"))
        difference = (
            f"<p>Final against dense: {points} points, 95 % interval {low} to {high}, "
            f"paired over {figure(result, 'difference/count', whole)} images.</p>"
        )
    return (
        "<section>\n<h2>Before and after</h2>\n"
        f'{difference}<div class="scroll" tabindex="0" role="region" aria-label="table"><table>\n<thead><tr><th scope="col">figure</th>'
        f"{columns}</tr></thead>\n<tbody>\n{_lines(rows)}\n</tbody>\n</table></div>\n</section>"
    )


AXES = (
    ("heads", "attention", "heads"),
    ("q/k dims", "attention", "qk_dim"),
    ("v dims", "attention", "v_dim"),
    ("MLP units", "mlp", "hidden"),
    ("fc1 rank", "mlp", "fc1_rank"),
    ("fc2 rank", "mlp", "fc2_rank"),
)


def kept(result: Result) -> str:
    """What is left of each block: one bar for each thing that a method can cut."""
    dense, small = (lookup(result, f"specs/{name}/blocks") or [] for name in ("dense", "compressed"))
    if not dense or not small:
        return ""
    width = result["specs"]["dense"]["width"]
    ranks = [
        key
        for key in ("fc1_rank", "fc2_rank")
        if any((block["mlp"] or {}).get(key) is not None for block in (*dense, *small))
    ]
    axes = [axis for axis in AXES if not axis[2].endswith("_rank") or axis[2] in ranks]
    tokens = _tokens_cut(result)
    rows = []
    for index, before in enumerate(dense):
        after = small[index] if index < len(small) else {"attention": None, "mlp": None}
        path = f"specs/compressed/blocks/{index}"
        cells = [
            _kept_cell(result, before[half], after[half], key, f"{path}/{half}/{key}", width) for _, half, key in axes
        ]
        if tokens:
            at, of = (lookup(result, f"costs/{name}/blocks/{index}/tokens_out") for name in ("compressed", "dense"))
            cells.append(_bar(figure(result, f"costs/compressed/blocks/{index}/tokens_out", whole), at, of))
        rows.append(f'<tr><th scope="row">{index}</th>{"".join(cells)}</tr>')
    titles = [title for title, _, _ in axes] + (["tokens out"] if tokens else [])
    columns = "".join(f'<th scope="col">{title}</th>' for title in titles)
    return (
        "<section>\n<h2>What was cut</h2>\n"
        "<p>Each bar is what a block kept of the dense model; q/k and v dims are per head. A grey bar was left whole, "
        f"a hatched one is gone.{_width_words(result)}{_tail_words(result)}</p>\n"
        f'<div class="card scroll" tabindex="0" role="region" aria-label="table"><table class="{"kept many" if len(titles) > 5 else "kept"}">\n<thead><tr><th scope="col">block</th>{columns}</tr></thead>\n'
        f"<tbody>\n{_lines(rows)}\n</tbody>\n</table></div>\n</section>"
    )


def prediction(result: Result) -> str:
    """What the plan expected of its best candidates, and what they reached once built."""
    found = result.get("prediction")
    if not found or not found.get("candidates"):
        return ""
    rows = []
    for index, row in enumerate(found["candidates"]):
        path = f"prediction/candidates/{index}"
        now, was = row["width"]
        merged = f", {len(row['steps'])} token steps" if row["steps"] else ""
        name = f"stream of {now} of {was} channels{merged}"
        chosen = row["reached_kl"] == found["reached_kl"] and row["predicted_kl"] == found["predicted_kl"]
        cells = [
            figure(result, f"{path}/macs", count),
            figure(result, f"{path}/params", count),
            figure(result, f"{path}/predicted_kl", plain),
            figure(result, f"{path}/reached_kl", plain),
            "taken" if chosen else "",
        ]
        rows.append(f'<tr><th scope="row">{escape(name)}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>')
    heads = ("plan", "MACs", "parameters", "predicted", "reached", "")
    columns = "".join(f'<th scope="col">{head}</th>' for head in heads)
    return (
        "<section>\n<h2>Predicted and reached</h2>\n"
        "<p>The best plans, built and compared on images held out from their fit; the best was then fitted anew on all of them. "
        f"Both figures: {escape(found.get('metric') or '')}.</p>\n"
        '<div class="card scroll" tabindex="0" role="region" aria-label="table"><table>\n'
        f"<thead><tr>{columns}</tr></thead>\n<tbody>\n{_lines(rows)}\n</tbody>\n</table></div>\n</section>"
    )


def _mean(values: Mapping[str, float]) -> float:
    return sum(values.values()) / len(values)


def _width_words(result: Result) -> str:
    """Said where the residual stream is narrower."""
    now, was = (lookup(result, f"specs/{name}/width") for name in ("compressed", "dense"))
    if now is None or was is None or now >= was:
        return ""
    return (
        f" The residual stream keeps {figure(result, 'specs/compressed/width', whole)} of "
        f"{figure(result, 'specs/dense/width', whole)} channels, in every block."
    )


def search(result: Result) -> str:
    """How a search went, where the method has one: the cost against its budget, the forces, the decisions."""
    found = result.get("search")
    if not found:
        return ""
    rows = found["history"]

    def series(*path: str) -> list[tuple[float, float]]:
        return [(row["step"], value) for row in rows if (value := lookup(row, "/".join(path))) is not None]

    figures = _search_figures(rows, series) if len(rows) > 1 else []
    said = f"<p>It {escape(found['ended'])} ({escape(found['judged'])}).</p>" if found.get("ended") else ""
    shares = "".join(
        f"<li>{ {'macs': 'MACs', 'params': 'parameters'}[key] } saved: {figure(result, f'search/saving/{key}/widths', percent)} by widths, "
        f"{figure(result, f'search/saving/{key}/skipping', percent)} by skipping"
        + (
            f", {figure(result, f'search/saving/{key}/before', percent)} before the search began"
            if (lookup(result, f"search/saving/{key}/before") or 0) > 0
            else ""
        )
        + f"; the last step cut {figure(result, f'search/finaliser/{key}/cut', percent)} of the dense cost itself.</li>"
        for key in found.get("saving") or {}
    )
    return (
        f'<section>\n<h2>How the search went</h2>\n{said}<div class="card"><div class="pair">{"".join(figures)}</div>'
        f'<ul class="gains">{shares}</ul></div>\n</section>'
    )


def _search_figures(rows: Sequence[Mapping[str, Any]], series: Callable[..., list[tuple[float, float]]]) -> list[str]:
    """Costs, dual variables and decisions over the steps."""
    figures = []
    for resource in rows[-1].get("budget") or {}:
        word = {"macs": "MACs", "params": "parameters"}[resource]
        figures.append(
            f"<figure><h3>{word} against the budget</h3>"
            + charts.lines(
                [(f"{word} of the search", series("cost", resource))],
                dashed=[("budget", series("budget", resource))],
                name=f"search-{resource}",
                title=f"{word} against the budget",
                share=True,
            )
            + "</figure>"
        )
    if duals := [(f"for {key}", series("z", key)) for key in rows[-1].get("z") or {}]:
        title = "Price of the budget (dual variable)"
        figures.append(f"<figure><h3>{title}</h3>{charts.lines(duals, name='search-duals', title=title)}</figure>")
    words = {"heads": "heads", "v": "value dims", "hidden": "MLP units"}
    for part, word in words.items():
        if drawn := [(about, series("removed", part, about)) for about in lookup(rows[-1], f"removed/{part}") or ()]:
            title = f"Share of {word} removed"
            chart = charts.lines(drawn, name=f"search-{part}", title=title, share=True)
            figures.append(f"<figure><h3>{title}</h3>{chart}</figure>")
    penalties = {word: part for part, word in words.items() if lookup(rows[-1], f"y/{part}")}
    if drawn := [(word, [(row["step"], _mean(row["y"][part])) for row in rows]) for word, part in penalties.items()]:
        title = "Weight of what is removed (dual variables), mean over blocks"
        chart = charts.lines(drawn, name="search-penalties", title=title)
        figures.append(f"<figure><h3>{title}</h3>{chart}</figure>")
    if drawn := [(about, series("gates", about)) for about in rows[-1].get("gates") or ()]:
        title = "Probability that it stays"
        chart = charts.lines(drawn, name="search-gates", title=title, share=True, bounds=(0, 1))
        figures.append(f"<figure><h3>{title}</h3>{chart}</figure>")
    return figures


def _kept_cell(
    result: Result, dense: Mapping[str, Any] | None, now: Mapping[str, Any] | None, key: str, path: str, width: int
) -> str:
    if dense is None:
        return f"<td>{NONE}</td>"
    if now is None:
        return '<td><span class="amount">gone</span><span class="bar gone"></span></td>'
    if key.endswith("_rank"):
        inner = now["hidden"] * (2 if key == "fc1_rank" and now["kind"] == "swiglu" else 1)
        full = dense[key] or min(width, inner)
        if now[key] is None:
            return _bar("full", full, full)
        return _bar(figure(result, path, whole), now[key], full)
    return _bar(figure(result, path, whole), now[key], dense[key])


def _bar(amount: str, value: float, of: float) -> str:
    share = min(1.0, value / of) if of else 1.0
    kind = "bar full" if value >= of else "bar"
    beside = "" if amount == "full" else f'<span class="of">/{whole(of)}</span>'
    return (
        f'<td><span class="amount">{amount}{beside}</span>'
        f'<span class="{kind}"><i style="width:{100 * share:.1f}%"></i></span></td>'
    )


def _tokens_cut(result: Result) -> bool:
    blocks = lookup(result, "specs/compressed/blocks") or ()
    return any(step.get("keep") for block in blocks for step in block["steps"])


def _tail_words(result: Result) -> str:
    """Said where the last block lets only the prefix tokens through and the dense one did not."""
    dense, small = (lookup(result, f"specs/{name}/blocks") or [] for name in ("dense", "compressed"))
    ends = [any(step["kind"] == "prefix" for step in blocks[-1]["steps"]) for blocks in (dense, small) if blocks]
    if ends != [False, True]:
        return ""
    return " In the last block only the tokens that the classifier reads go on, which changes no output."


def block_cost(result: Result) -> str:
    """Cost by block, as a chart and as a table."""
    dense, small = (lookup(result, f"costs/{name}/blocks") or () for name in ("dense", "compressed"))
    if not dense or not small:
        return ""
    rows = []
    for index in range(len(dense)):
        cells = [
            figure(result, f"costs/{name}/blocks/{index}/{key}", count)
            for key in ("attention_macs", "mlp_macs", "macs", "params")
            for name in ("dense", "compressed")
        ]
        rows.append(f'<tr><th scope="row">{index}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>')
    step = '<li class="step">token steps</li>' if any(block["step_macs"] for block in small) else ""
    groups = ("attention", "MLP", "all MACs", "parameters")
    outer = "".join(f'<th scope="colgroup" colspan="2">{title}</th>' for title in groups)
    inner = '<th scope="col">dense</th><th scope="col">now</th>' * 4
    return (
        "<section>\n<h2>Cost by block</h2>\n"
        "<p>Multiply-accumulates of one image, and parameters. The outline is the dense model.</p>\n"
        '<div class="card">\n'
        '<ul class="legend"><li class="ghost">dense</li><li class="attention">attention, now</li>'
        f'<li class="mlp">MLP, now</li>{step}</ul>\n'
        f'<div class="pair"><figure>{charts.block_costs(dense, small, what="macs")}</figure>'
        f"<figure>{charts.block_costs(dense, small, what='params')}</figure></div>\n"
        '<details><summary>The figures as a table</summary><div class="scroll" tabindex="0" role="region" aria-label="table"><table>\n'
        f'<thead><tr><th scope="col" rowspan="2">block</th>{outer}</tr><tr>{inner}</tr></thead>\n'
        f"<tbody>\n{_lines(rows)}\n</tbody>\n</table></div></details>\n</div>\n</section>"
    )


def speed(result: Result) -> str:
    """Ideal and measured speed, and the latencies behind it."""
    timing = result.get("timing")
    if not timing or not timing.get("rows"):
        return ""
    gains, rows = timing.get("speedups") or (), []
    for index, row in enumerate(timing["rows"]):
        path = f"timing/rows/{index}"
        median, low, high = (figure(result, f"{path}/{key}", ms) for key in ("median_ms", "low_ms", "high_ms"))
        rate = figure(result, f"{path}/images_per_s", whole)
        rows.append(
            f'<tr><th scope="row">{escape(row["model"])} <span class="small">{_where(row)}</span></th>'
            f'<td>{median} <span class="small">{low} – {high}</span></td><td>{rate}</td></tr>'
        )
    first = timing["rows"][0]
    threads = "1 thread" if first["threads"] == 1 else f"{first['threads']} threads"
    setting = f"{first['device_name']}, {threads}, {first['dtype']}"
    notes = "".join(f"<p>{escape(note)}</p>" for note in timing.get("notes") or ())
    chart = ""
    if gains:
        realised = "".join(
            f"<li>{_where(gain)}: {figure(result, f'timing/speedups/{index}/measured', times)} measured, "
            f"{figure(result, f'timing/speedups/{index}/ideal', times)} ideal: "
            f"{figure(result, f'timing/speedups/{index}/realised', percent)} realised</li>"
            for index, gain in enumerate(gains)
        )
        chart = (
            '<div class="pair"><figure class="card"><ul class="legend"><li class="attention">measured, with quartiles</li>'
            f'<li class="ideal">ideal: ratio of MACs</li></ul>{charts.speed(gains)}</figure>'
            f'<div class="card"><h3>What of the ideal arrived</h3><ul class="gains">{realised}</ul></div></div>'
        )
    head_row = '<th scope="col">model</th><th scope="col">median, quartiles</th><th scope="col">images/s</th>'
    return (
        "<section>\n<h2>Speed: ideal and measured</h2>\n"
        f"<p>Operations are not time. Measured on {escape(setting)}; the models took turns, medians of "
        f"{first['runs']} runs.</p>\n{notes}{chart}\n"
        f'<div class="card scroll below" tabindex="0" role="region" aria-label="table"><table>\n<thead><tr>{head_row}</tr></thead>\n'
        f"<tbody>\n{_lines(rows)}\n</tbody>\n</table></div>\n</section>"
    )


def curves(result: Result) -> str:
    """The recovery's training loss and validation accuracy."""
    recovery = result.get("recovery")
    if not recovery:
        return ""
    losses = [(row["step"], row["loss"]) for row in recovery.get("curve") or () if row.get("loss") is not None]
    checks = [(row["step"], row["top1"]) for row in recovery.get("validation") or () if row.get("top1") is not None]
    parts = []
    if losses:
        drawn = charts.curve(charts.smooth(losses), name="loss", title="Training loss")
        parts.append(f'<figure class="card"><h3>Training loss</h3>{drawn}</figure>')
    if checks:
        lines = [
            (name, lookup(result, f"metrics/{state}/top1"))
            for state, name in (("dense", "dense"), ("compressed", "after the cut"))
        ]
        drawn = charts.curve(
            checks,
            name="validation",
            title="Validation accuracy",
            share=True,
            marks=True,
            references=[(name, value) for name, value in lines if value is not None],
        )
        parts.append(f'<figure class="card"><h3>Validation accuracy</h3>{drawn}</figure>')
    spent = figure(result, "recovery/seconds", seconds)
    how = f" ({escape(recovery['objective'])})" if recovery.get("objective") else ""
    return (
        "<section>\n<h2>Recovery</h2>\n"
        f"<p>{figure(result, 'recovery/steps', whole)} training steps{how} in {spent}.{_faster_words(result)}</p>\n"
        f'<div class="pair">{"".join(parts)}</div>\n</section>'
    )


def _faster_words(result: Result) -> str:
    """How much faster a step of the recovery is than the same step of the dense network."""
    now, before = (lookup(result, f"recovery/images_per_s/{name}") for name in ("compressed", "dense"))
    if not now or not before:
        return ""
    return (
        f" Timed in turns, the cut network learned {figure(result, 'recovery/images_per_s/compressed', whole)} images a second, the dense one "
        f"in the same training {figure(result, 'recovery/images_per_s/dense', whole)}: {now / before:.2f} times as fast."
    )


def samples(result: Result) -> str:
    """Images with the predictions before and after."""
    shown = result.get("samples") or ()
    if not shown:
        return ""
    cards = "\n".join(_sample(result, index, sample) for index, sample in enumerate(shown))
    return (
        "<section>\n<h2>Predictions before and after</h2>\n"
        f'<p>{escape(result.get("samples_note") or "")}</p>\n<ul class="samples">\n{cards}\n</ul>\n</section>'
    )


def _sample(result: Result, index: int, sample: Mapping[str, Any]) -> str:
    made = sample["predictions"]
    last = "recovered" if made.get("recovered") else "compressed"
    differs = made["dense"]["label"] != made[last]["label"]
    truth = sample.get("label")
    lines = []
    for state, name in STATES.items():
        if not made.get(state):
            continue
        label, chance = made[state]["label"], made[state]["probability"]
        kind, mark = "", ""
        if truth is not None:
            kind, sign = ("right", "✓") if label == truth else ("wrong", "✗")
            mark = f'<span role="img" aria-label="{kind}">{sign}</span> '
        sure = figure(result, f"samples/{index}/predictions/{state}/probability", percent_whole)
        lines.append(
            f'<dt>{name}</dt><dd class="{kind}">{mark}{escape(str(label))}</dd>'
            f'<dd class="p">{sure}</dd>'
            f'<dd class="meter"><span class="bar"><i style="width:{100 * chance:.1f}%"></i></span></dd>'
        )
    badge = '<br><span class="badge">differs</span>' if differs else ""
    said = (
        f"<span>true label</span>{escape(str(truth))}" if truth is not None else escape(str(sample.get("name") or ""))
    )
    alt = f"sample {index + 1}" + (f", labelled {truth}" if truth is not None else "")
    return (
        f'<li class="{"sample differs" if differs else "sample"}"><div class="top">'
        f'<img src="{escape(sample["image"])}" alt="{escape(alt)}">'
        f'<div class="truth">{said}{badge}</div></div><dl>{"".join(lines)}</dl></li>'
    )


def provenance(result: Result) -> str:
    """Where it comes from, as facts."""
    facts = dict(result.get("provenance") or {})
    if result.get("budget"):
        facts["budget"] = ", ".join(f"{name} {value}" for name, value in result["budget"].items())
    rows = "".join(f"<dt>{escape(str(key))}</dt><dd>{escape(str(value))}</dd>" for key, value in facts.items())
    spent = result.get("seconds") or {}
    if spent:
        parts = ", ".join(f"{escape(stage)} {figure(result, f'seconds/{stage}', seconds)}" for stage in spent)
        rows += f"<dt>time spent</dt><dd>{parts}</dd>"
    return f'<section>\n<h2>Where it comes from</h2>\n<dl class="facts card">{rows}</dl>\n</section>' if rows else ""


def commands(result: Result) -> str:
    """What to try next."""
    rows = "".join(
        f"<li><span>{escape(row['does'])}</span><pre><code>{escape(row['command'])}</code></pre></li>"
        for row in result.get("commands") or ()
    )
    return f'<section>\n<h2>To go on</h2>\n<ul class="commands">{rows}</ul>\n</section>' if rows else ""


def _where(row: Mapping[str, Any]) -> str:
    return f"{escape(charts.runtime_name(row['runtime']))}, batch {row['batch']}"


def _lines(rows: Sequence[str]) -> str:
    return "\n".join(rows)


def _row_index(rows: Sequence[Any], model: str, like: Mapping[str, Any] | None = None) -> int | None:
    """The first row of a model; like: in the same runtime and at the same batch size."""
    keys = () if like is None else ("runtime", "batch", "threads", "dtype", "device")
    for index, row in enumerate(rows):
        if row["model"] == model and all(row[key] == like[key] for key in keys if like is not None):
            return index
    return None
