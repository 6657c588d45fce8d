"""`vitrim evaluate`: scores on images."""

from __future__ import annotations

import logging
from typing import Any

import click

from vitrim.cli import options, tables
from vitrim.cli.progress import progress_on_stderr
from vitrim.errors import ConfigError, DataError

log = logging.getLogger("vitrim.cli")
SPLITS = ("train", "validation", "val", "test", "all")


@click.command()
@click.argument("model")
@click.option("--against", metavar="MODEL", help="Also how much it agrees with this one; the score of an encoder.")
@options.product("What is compared with --against; tokens of an encoder, output of a classifier by default.")
@options.DATA
@click.option("--split", type=options.Named(*SPLITS), default="validation", show_default=True, help="Part of the data.")
@click.option("--batch", "batch_size", type=options.COUNT, default=64, show_default=True, help="Images at a time.")
@click.option("--limit", type=options.COUNT, help="Only so many images, balanced over the classes.")
@options.BROKEN
@click.option("--skip-broken", is_flag=True, help="Short for --on-broken skip.")
@options.SOURCE
@options.PREPARED
@options.MACHINE
@options.OUTPUT
def evaluate(
    model: str,
    against: str | None,
    data: str | None,
    split: str,
    limit: int | None,
    on_broken: str | None,
    skip_broken: bool,
    weights: options.Weights,
    prepared: options.Prepared,
    device: str | None,
    threads: int | None,
    seed: int | None,
    output: options.Output,
    **how: Any,
) -> None:
    """Score MODEL on labelled images: top-1, top-5, loss. An encoder is scored against another model, without labels.

    vitrim evaluate small/ --data photos/ --split test
    """
    source = options.data_for(data, model)
    options.use_threads(threads)
    where = options.device_named(device)
    network = prepared.on(weights.load(model))
    reference = None if against is None else options.Weights().load(against)
    if how["product"] == "tokens" and reference is None:
        raise ConfigError("--product tokens compares tokens with a model's; pass --against DENSE.")
    if not network.spec.outputs and reference is None:
        raise ConfigError(
            f"{model} has no classifier to score. Pass --against DENSE to compare its features with a model's."
        )
    from vitrim import data as opened
    from vitrim.tasks.classification import evaluate as score
    from vitrim.tasks.classification import task_of
    from vitrim.tasks.task import METRICS, counts

    # The seed draws `limit`; the validation tenth of the data is the same whatever the seed.
    on_broken = "skip" if skip_broken else on_broken or "raise"
    images = opened.open(source, split=split, labelled=None if against else True, on_broken=on_broken)
    try:
        task_of(network.spec).check_labels(network.config, images)
    except DataError as error:
        if against is None:
            raise
        log.warning("Judged without labels, by agreement with %s: %s", against, error)
        images = opened.open(source, split=split, labelled=False, on_broken=on_broken)
    if limit is not None:
        images = images.take(limit, seed or 0)
    with progress_on_stderr(output.quiet) as progress:
        how = options.given({**how, "device": where, "reference": reference})
        metrics = score(network, images, progress=progress, **how)
    kept = {name: metrics[name] for name in (*METRICS, "count", "skipped") if metrics.get(name) is not None}
    counted, whole = counts(metrics), images.set_aside_from
    if output.as_json:
        tables.show_json(
            {
                "model": model,
                "data": images.fingerprint(),
                "split": split,
                "counts": counted,
                "set_aside_from": whole,
                **kept,
            }
        )
    else:
        tables.say(f"{model} on {kept['count']} images of {images.name} ({split})")
        for name, metric in METRICS.items():
            if name in kept:
                value = tables.percent_text(kept[name]) if metric.form == "percent" else f"{kept[name]:.4f}"
                if (of := counted.get(name)) is not None:
                    ends = f"{100 * of['low']:.2f} to {100 * of['high']:.2f}"
                    value += f"  ({of['right']} of {of['count']}; 95 % interval {ends})"
                tables.say(f"{metric.short}  {value}")
        if whole is not None:
            part = (
                "a tenth, set aside by seed, was scored"
                if split != "train"
                else "all but the tenth that is set aside were scored"
            )
            tables.say(f"{images.name} has no validation split: of its {whole} images {part}. --split all scores all.")
