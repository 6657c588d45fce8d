"""`vitrim compress`: the main job."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vitrim import methods
from vitrim.cli import options, settings, tables
from vitrim.cli.progress import progress_on_stderr
from vitrim.errors import ConfigError
from vitrim.foreign import command

if TYPE_CHECKING:
    from vitrim.budget import Budget
    from vitrim.methods.method import MethodConfig

SECTIONS = ("settings", "recover", "evaluate", "measure")
"""Of a --config file: of the method, the recovery, the comparison and the timing."""
RECORDED = ("schema", "vitrim", "weights", "data", "threads")
"""What a run's own stages/config.json says beside them; it changes nothing here."""


@click.command()
@click.option("--model", metavar="MODEL", help="What to cut.")
@click.option("--method", metavar="NAME", help="How to cut; auto by default. `vitrim methods` lists them.")
@options.BUDGET
@settings.SPENT
@click.option(
    "--relative-to",
    type=options.Named("given", "original"),
    help="Shares of MODEL (default), or of what it was first cut from.",
)
@click.option("--init", metavar="METHOD", help="First cut to twice the budget by this method, such as auto.")
@click.option(
    "--no-exact-tail", is_flag=True, help="Keep all tokens in the last block, though the classifier reads one."
)
@options.DATA
@options.BROKEN
@options.OUT
@click.option("--recover-epochs", type=options.POSITIVE, help="Length of the recovery; 10 by default.")
@click.option("--recover-steps", type=options.COUNT_OR_NONE, help="The same in optimiser steps; 0: no recovery.")
@click.option(
    "--measure",
    "measured",
    type=options.Named("eager", "compile"),
    help="What is timed: eager (default), or compile: compiled too, which takes minutes.",
)
@click.option("--no-measure", is_flag=True, help="Measure no latency.")
@click.option("--config", type=options.PLACE, metavar="FILE", help="JSON, as OUT/stages/config.json of a run.")
@click.option("--resume", is_flag=True, help="Go on with the run at --out, at its first missing stage.")
@options.IMAGE_PX
@options.FORCE
@options.SOURCE
@options.PREPARED
@options.MACHINE
@options.OUTPUT
def compress(
    model: str | None,
    method: str | None,
    assigned: tuple[str, ...],
    relative_to: str | None,
    init: str | None,
    no_exact_tail: bool,
    data: str | None,
    on_broken: str | None,
    out: Path,
    recover_epochs: float | None,
    recover_steps: int | None,
    measured: str | None,
    no_measure: bool,
    config: Path | None,
    resume: bool,
    image_px: tuple[int, int] | None,
    force: bool,
    limits: options.Limits,
    weights: options.Weights,
    prepared: options.Prepared,
    output: options.Output,
    **flags: Any,
) -> None:
    """Cut MODEL to a budget, recover it, and report: the whole job.

    vitrim compress --model timm:deit_small_patch16_224 --keep-macs 0.5 --data photos/ --out small/
    """
    if recover_epochs is not None and recover_steps is not None:
        raise click.UsageError("--recover-epochs and --recover-steps contradict each other; pass one of them.")
    if measured is not None and no_measure:
        raise click.UsageError("--measure and --no-measure contradict each other; pass one of them.")
    if resume and force:
        raise click.UsageError("--resume and --force contradict each other: go on with the run, or replace it.")
    values = options.read_json(config)
    options.check_keys(
        values,
        (*SECTIONS, "model", "method", "relative_to", "exact_tail", "init", "image_px", "on_broken", *RECORDED),
        place=f"--config {str(config)!r}",
    )
    if not isinstance(values.get("exact_tail", True), bool):
        raise ConfigError(f"--config {str(config)!r}: exact_tail={values['exact_tail']!r}; expected true or false.")
    name = model or values.get("model")
    if name is None:
        raise click.UsageError("--model is missing; pass one, such as --model timm:deit_small_patch16_224.")
    chosen, init = methods.method_named(method or values.get("method") or methods.DEFAULT), init or values.get("init")
    if init is not None:
        methods.method_named(init)
    source = options.data_for(data, name)
    machine = {key: flags[key] for key in ("device", "threads", "amp", "workers", "seed")}
    typed, budgets = settings.asked(assigned, flags), limits.budgets()
    own = settings.applied(chosen, typed, options.section(values, "settings"))
    if budgets and any(key.startswith("budget") for _, key, _ in typed):
        raise click.UsageError("--set budget and the flags of a budget contradict each other; pass one of them.")
    own["budget"] = budgets[0] if budgets else options.budget_in(own)
    how = methods.configure(chosen.name, own)
    options.check_out(out, force=force, resume=resume)
    options.use_threads(machine["threads"])
    size = image_px or size_in(values)
    recovery = timed = None
    if recover_steps != 0 and values.get("recover", {}) is not None:
        length = options.given({"epochs": recover_epochs, "steps": recover_steps})
        recovery = {**options.section(values, "recover"), **length}
        if recover_epochs is not None:
            recovery.pop("steps", None)
    if not no_measure and values.get("measure", {}) is not None:
        kinds = {None: None, "eager": ("eager",), "compile": ("eager", "compile")}[measured]
        timed = {**options.section(values, "measure"), **options.given({"runtimes": kinds})}
    result = run_with(
        name if weights == options.Weights() and not prepared.asked else prepared.on(weights.load(name, size)),
        how,
        fixed=own,
        data=source,
        out=out,
        recovery=recovery,
        judging=options.section(values, "evaluate"),
        timed=timed,
        machine=machine,
        quiet=output.quiet,
        resume=resume,
        force=force,
        relative_to=relative_to or values.get("relative_to") or "given",
        exact_tail=not no_exact_tail and values.get("exact_tail", True),
        init=init,
        image_px=size,
        on_broken=on_broken or values.get("on_broken") or "raise",
        budgets=budgets,
    )
    if output.as_json:
        tables.show_json(result.summary)
        return
    several = len(budgets) > 1
    (show_family if several else show_run)(result.summary)
    what = "a folder for each budget" if several else "the model"
    tables.say(f"made {result.folder} ({what}) and {result.report} (open it in a browser)")
    if several:
        from vitrim.reporting.family import pick

        member, why = pick(result.summary)
        tables.say(f"next: {command('cp', '-r', out / member, 'small/')}  ({member} is {why})")
        return
    from vitrim.pipeline.summary import next_commands

    tables.say("next:")
    for row in next_commands(result.summary["onward"], place=str(out), model=name, data=source):
        tables.say(f"  {row['command']}")


def size_in(values: Mapping[str, Any]) -> tuple[int, int] | None:
    """The image size in a config; None without one. Raises ConfigError."""
    if (found := values.get("image_px")) is None:
        return None
    from vitrim.spec import sides

    return sides(tuple(found) if isinstance(found, list) else found)


def run_with(
    model: Any,
    config: MethodConfig,
    *,
    fixed: Collection[str],
    recovery: dict[str, Any] | None,
    judging: dict[str, Any],
    timed: dict[str, Any] | None,
    machine: Mapping[str, Any],
    quiet: bool,
    budgets: Sequence[Budget] = (),
    **rest: Any,
) -> Any:
    """The pipeline with configs made from plain values. machine: device, threads, amp, workers and seed, where given.

    fixed: settings of the method's config that someone chose; the others take what the machine's flags say of them.
    budgets: two or more make a family. Gives a RunResult, or a FamilyResult.
    """
    from vitrim.config import keys, read
    from vitrim.pipeline import EvaluateConfig, MeasureConfig, RecoverConfig, run, run_family

    machine = options.given({**machine, "device": options.device_named(machine.get("device"))})

    def picked(*names: str) -> dict[str, Any]:
        return {name: machine[name] for name in names if name in machine}

    how = picked("workers", "amp", "device")
    kind = {"device": machine["device"].split(":")[0]}  # as the training loop takes it: the first of its kind
    learn = target = None
    if recovery is not None:
        learn = read(RecoverConfig, {**recovery, **how, **picked("seed"), **kind}, where="recover")
    if timed is not None:
        target = read(MeasureConfig, {**timed, **picked("threads", "device")}, where="measure")
    judge = read(EvaluateConfig, {**judging, **how}, where="evaluate")
    rest |= {"recover": learn, "measure": target, "evaluate": judge}
    loose = {*keys(type(config))} - {*fixed}
    config = replace(config, **{key: value for key, value in {**how, **kind}.items() if key in loose})
    with progress_on_stderr(quiet) as progress:
        if len(budgets) > 1:
            return run_family(model, config, budgets, progress=progress, **rest)
        return run(model, config, progress=progress, **rest)


COSTS = (
    ("macs", "MACs (the papers' FLOPs)", tables.count_text),
    ("params", "parameters", tables.count_text),
    ("memory_bytes", "memory MB (estimated)", lambda count: f"{count / 1e6:.1f}"),
)
"""Rows of a run's table: key, title, and how a number is shown."""
FIRST = (("macs", "MACs"), ("params", "parameters"))
"""What is said of the first ancestor: key and word."""


def show_run(result: Mapping[str, Any]) -> None:
    """The one table of a run: what it was, what it is, and what that cost and gained."""
    dense, small = (result["costs"][state] for state in ("dense", "compressed"))
    rows = [
        [title, show(dense[key]), show(small[key]), tables.share_text(small[key], dense[key])]
        for key, title, show in COSTS
    ]
    kept = (result.get("recovery") or {}).get("kept") != "cut"
    last = "recovered" if kept else "kept as cut"  # where the recovery made it worse
    rows += accuracy_rows(result["metrics"], result.get("difference"), last)
    for gain in (result.get("timing") or {}).get("speedups", ()):
        rows.append(speed_row(gain, result["timing"]["rows"]))
    method, px = result["method"], result["specs"]["compressed"]["image_px"]
    name = f"{method['name']} ({method['variant']})" if method.get("variant") else method["name"]
    tables.show_table(
        f"{result['model']} cut by {name}, {px[0]} x {px[1]} px", ["", "before", "after", "kept or gained"], rows
    )
    if first := result.get("original"):
        left = (f"{tables.share_text(first[f'kept_{key}'], 1)} of its {word}" for key, word in FIRST)
        tables.say(f"of {first['model']}, which it was first cut from: {', '.join(left)}")
    for text in (result.get("timing") or {}).get("notes", ()):
        tables.say(text)


def show_family(found: Mapping[str, Any]) -> None:
    """The members of a family in one table."""
    from vitrim.tasks.task import METRICS

    metric = None if found["quality"] is None else METRICS[found["quality"]]
    word, dense, count = metric.short if metric else "quality", found["dense"], found["data"].get("count")

    def shown(value: float | None) -> str:
        return "-" if metric is None else tables.counted_text(metric, value, count)

    rows = [["dense", tables.count_text(dense["macs"]), "100 %", "", shown(dense["quality"]), ""]]
    for row in found["members"]:
        scores = (shown(row[key]) for key in ("before_recovery", "quality"))
        speed = least_speed(row["speed"])
        kept = tables.percent_text(row["kept_macs"])
        rows.append([row["name"], tables.count_text(row["macs"]), kept, *scores, speed])
    heads = ["folder", "MACs", "kept", f"{word}, cut", f"{word}, final", "measured speed"]
    if not any(row["speed"] for row in found["members"]):  # nothing was timed
        heads, rows = heads[:-1], [row[:-1] for row in rows]
    tables.show_table(f"{found['model']}: a family", heads, rows)


def accuracy_rows(
    metrics: Mapping[str, Any], difference: Mapping[str, Any] | None, last: str = "recovered"
) -> list[list[str]]:
    """What stands for quality, before, after the cut, and after the recovery.  last: what the final network is."""
    from vitrim.tasks.task import METRICS, QUALITY, seen

    dense, cut, recovered = (metrics.get(state) or {} for state in ("dense", "compressed", "recovered"))
    count = dense.get("count")
    rows = []
    for key in QUALITY:
        if cut.get(key) is None:
            continue
        metric = METRICS[key]
        before = tables.counted_text(metric, dense.get(key), count)
        rows.append([f"{metric.short}, before recovery", before, tables.counted_text(metric, cut[key], count), ""])
        if recovered.get(key) is not None:
            rows.append([f"{metric.short}, {last}", before, tables.counted_text(metric, recovered[key], count), ""])
        if difference and key == "top1":
            rows[-1][3] = f"{seen(difference)} ({difference['low']:+.2f} to {difference['high']:+.2f})"
    return rows


def speed_row(gain: Mapping[str, Any], timed: list[dict[str, Any]]) -> list[str]:
    """Measured time of one runtime and batch size, with the speed-up beside the ideal one."""
    alike = [row for row in timed if all(row[key] == gain[key] for key in ("runtime", "batch"))]
    times = {row["model"]: f"{row['median_ms']:.2f}" for row in alike}
    title = f"ms, {gain['runtime']}, batch {gain['batch']}"
    return [title, times[gain["reference"]], times[gain["model"]], gain_text(gain)]


def least_speed(gains: Sequence[Mapping[str, Any]]) -> str:
    """The least of the measured speed-ups, named."""
    from vitrim.reporting.figures import least_gain

    index = least_gain(gains)
    if index is None:
        return ""
    return f"{gain_text(gains[index])}, {gains[index]['runtime']}, batch {gains[index]['batch']}"


def gain_text(gain: Mapping[str, Any]) -> str:
    """A measured speed-up beside the ideal one."""
    return f"{gain['measured']:.2f} x of ideal {gain['ideal']:.2f} x"
