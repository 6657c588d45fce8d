"""`vitrim plan`: what each method would reach, cost and need."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from vitrim import methods
from vitrim.cli import options, settings, tables
from vitrim.cli.cost import spec_named
from vitrim.cli.progress import progress_on_stderr
from vitrim.errors import BudgetError

if TYPE_CHECKING:
    from vitrim.budget import Budget
    from vitrim.model import Vit
    from vitrim.spec import ModelSpec


@click.command()
@click.option("--model", required=True, metavar="MODEL", help="What to cut; only its shape is needed.")
@click.option("--method", metavar="NAME[,NAME...]", help="Only these methods; all that exist by default.")
@settings.SET
@settings.VARIANT
@options.BUDGET
@settings.FREEZE
@settings.PRODUCT
@click.option("--data", metavar="DATA", help="Images: say what would be cut at each budget, and at what loss.")
@options.BROKEN
@settings.IMAGES
@settings.PLANNED_BY
@options.IMAGE_PX
@options.SOURCE
@options.PREPARED
@options.DEVICE
@options.SEED
@options.OUTPUT
def plan(
    model: str,
    method: str | None,
    assigned: tuple[str, ...],
    data: str | None,
    on_broken: str | None,
    device: str | None,
    image_px: tuple[int, int] | None,
    limits: options.Limits,
    weights: options.Weights,
    prepared: options.Prepared,
    output: options.Output,
    **flags: Any,
) -> None:
    """Say what each method would reach, cost and need; train nothing.

    With --data, also what the method expects of each budget, from the images, before anything is built.

    vitrim plan --model timm:deit_small_patch16_224 --keep-macs 0.9,0.7,0.5
    """
    typed = settings.asked(assigned, flags)
    every = [methods.DEFAULT] if data is not None else [*methods.METHODS]
    known = [methods.method_named(name.strip()) for name in (method.split(",") if method is not None else every)]
    # of all methods those that have what was typed; where none has, the first says what is wrong
    chosen = known if method is not None else [one for one in known if settings.has(one, typed)] or known[:1]
    own = {one.name: settings.applied(one, typed, {}) for one in chosen}
    budgets = limits.budgets()
    if not budgets:
        raise options.no_budget()
    for name, given in own.items():
        methods.configure(name, {"budget": budgets[0], **given})
    if data is not None:
        if len(own) > 1:
            raise click.UsageError(f"--data goes with one method; {method} are several.")
        from vitrim import data as opened
        from vitrim.surgery import with_own_positions

        ((name, given),) = own.items()
        given = {"device": options.device_named(device), **given}
        network = prepared.on(with_own_positions(weights.load(model, image_px)))
        rows = predicted(network, name, budgets, opened.skipping(data, on_broken or "raise"), given, output.quiet)
        show_predictions(model, name, rows, network.spec, output.as_json)
        return
    seen = [
        weights.checkpoint,
        weights.checkpoint_key,
        device,
        on_broken,
        *(flags[key] for key in ("images", "axes", "score", "seed")),
    ]
    if weights.no_pretrained or prepared.asked or any(value is not None for value in seen):
        raise click.UsageError(
            "--checkpoint, --checkpoint-key, --no-pretrained, --images, --axes, --score, --device, --on-broken, --mean, --std, --size and --seed go with --data; without it only the shape counts."
        )
    from vitrim.spec import at_size

    spec = spec_named(model, image_px)
    spec = at_size(spec, spec.image_px)  # as `compress` takes it: with the positions of its own size
    rows = [planned(name, spec, budget, given) for budget in budgets for name, given in own.items()]
    if output.as_json:
        from vitrim import counting

        whole = counting.cost(spec)
        tables.show_json(
            {"model": model, "image_px": spec.image_px, "macs": whole.macs, "params": whole.params, "plans": rows}
        )
        return
    heads = ["method", "budget", "asks MACs", "asks params", "reaches MACs", "reaches params", "needs", "within reach"]
    tables.show_table(
        f"{model}, {tables.size_text(spec)}: what each method would reach", heads, [plan_row(row) for row in rows]
    )
    note_refusals(rows)


def note_refusals(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        if row.get("refused"):
            tables.note(row["refused"])


def predicted(
    network: Vit, method: str, budgets: list[Budget], data: Any, given: dict[str, Any], quiet: bool
) -> list[dict[str, Any]]:
    """What the method expects of each budget, from images."""
    predict = methods.METHODS[method].predict
    if predict is None:
        known = ", ".join(name for name, other in methods.METHODS.items() if other.predict is not None)
        raise click.UsageError(f"--data: method {method!r} cannot say it before building; expected {known}.")
    config = methods.configure(method, given)
    refused = {budget: out_of_reach(network.spec, method, config, budget) for budget in budgets}
    open_ = [budget for budget in budgets if refused[budget] is None]
    if not open_:
        raise BudgetError(str(refused[budgets[0]]))
    with progress_on_stderr(quiet) as progress:
        rows = iter(predict(network, config, open_, data=data, progress=progress))
    return [
        next(rows) if refused[budget] is None else {"budget": budget.to_dict(), "refused": refused[budget]}
        for budget in budgets
    ]


def out_of_reach(spec: ModelSpec, method: str, config: Any, budget: Budget) -> str | None:
    """Why the method cannot meet the budget; None where it can."""
    try:
        methods.plan(method, spec, replace(config, budget=budget))
    except BudgetError as error:
        return str(error)
    return None


def show_predictions(model: str, method: str, rows: list[dict[str, Any]], spec: ModelSpec, as_json: bool) -> None:
    """A row for each budget: predicted divergence, stream, and what each block would keep."""
    if as_json:
        tables.show_json({"model": model, "image_px": spec.image_px, "method": method, "predictions": rows})
        return
    body = [prediction_row(row) for row in rows]
    heads = ["budget", "MACs", "params", "predicted loss", "stream", "tokens", "blocks: q/k rank / v rank / MLP units"]
    tables.show_table(
        f"{model}, {tables.size_text(spec)}: what {method} expects (divergence of the outputs from the dense ones)",
        heads,
        body,
    )
    note_refusals(rows)


def prediction_row(row: dict[str, Any]) -> list[str]:
    """A prediction as a row of the table."""
    budget = budget_text(row["budget"])
    if "refused" in row:
        return [budget, "out of reach", *[""] * 5]
    now, was = row["width"]
    tokens = [f"{step['kind']} in block {step['block']}" for step in row["steps"]]
    tokens += ["exact tail"] if row["exact_tail"] else []
    blocks = "  ".join(f"{b['qk'][0]}/{b['v'][0]}/{b['hidden'][0]}" for b in row["blocks"])
    counts = [tables.count_text(row[key]) for key in ("macs", "params")]
    return [budget, *counts, f"{row['predicted_kl']:.2g}", f"{now} of {was}", ", ".join(tokens) or "all kept", blocks]


def budget_text(budget: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in budget.items())


def planned(name: str, spec: ModelSpec, budget: Budget, given: dict[str, Any]) -> dict[str, Any]:
    """One method at one budget; out of reach is an answer here, not a failure."""
    from vitrim import counting
    from vitrim.budget import Budget
    from vitrim.pipeline.reference import given_spec

    whole = counting.cost(spec)
    row: dict[str, Any] = {"method": name, "budget": budget.to_dict(), "limits": budget.limits(whole), "refused": None}
    loose = methods.configure(name, {"budget": Budget(keep_macs=1.0), **given})
    # as `compress` does; shares refer to the model as it is
    budget, spec = budget.of(whole), given_spec(spec, loose, wanted=True)
    try:
        return row | methods.plan(name, spec, methods.configure(name, {"budget": budget, **given}))
    except BudgetError as error:
        return row | methods.plan(name, spec, loose) | {"refused": str(error)}


def plan_row(row: dict[str, Any]) -> list[str]:
    """A plan as a row of the table."""
    asks = [tables.count_text(row["limits"][name]) if name in row["limits"] else "-" for name in ("macs", "params")]
    reaches = [" to ".join(map(tables.count_text, row["range"][name])) for name in ("macs", "params")]
    name, answer = f"{row['method']} ({row['variant']})", "no" if row["refused"] else "yes"
    return [name, budget_text(row["budget"]), *asks, *reaches, tables.needs_text(row["needs"]), answer]
