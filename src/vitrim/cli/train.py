"""`vitrim train`: training on labelled images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from vitrim.cli import options, tables
from vitrim.cli.progress import duration_text, progress_on_stderr
from vitrim.foreign import command


@click.command()
@click.option("--model", metavar="MODEL", help="Where to start; a recipe names its own.")
@click.option("--recipe", metavar="NAME", help="A packaged training, such as cifar10-vit-micro.")
@click.option("--new-head", is_flag=True, help="Fresh classifiers for the classes of the data.")
@options.DATA
@options.BROKEN
@options.OUT
@click.option("--resume", is_flag=True, help="Go on with the run at --out.")
@options.TRAINING
@click.option("--config", type=options.PLACE, metavar="FILE", help="JSON with keys of TrainConfig.")
@options.SOURCE
@options.PREPARED
@options.MACHINE
@options.OUTPUT
def train(
    model: str | None,
    recipe: str | None,
    new_head: bool,
    data: str | None,
    on_broken: str | None,
    out: Path,
    resume: bool,
    config: Path | None,
    weights: options.Weights,
    prepared: options.Prepared,
    threads: int | None,
    output: options.Output,
    **settings: Any,
) -> None:
    """Train on labelled images: from scratch, or from MODEL.

    --new-head gives it a classifier for the classes of the data.

    vitrim train --model timm:deit_tiny_patch16_224 --new-head --data flowers/ --out runs/teacher
    """
    if model is None and recipe is None:
        raise click.UsageError(
            "neither --model nor --recipe was given; pass one, such as --model timm:deit_tiny_patch16_224."
        )
    if model is None and prepared.asked:
        raise click.UsageError("--mean, --std and --size go with --model; a recipe says its own. Leave them out.")
    source = options.data_for(data, model or f"builtin:{recipe}")
    options.check_out(out, force=False, resume=resume)
    from vitrim import recipes

    packaged = {} if recipe is None else recipes.read(recipe)
    values = options.for_training(config, settings, threads, **packaged.get("train", {}))
    from vitrim.config import read
    from vitrim.spec import Config
    from vitrim.tasks.task import METRICS, quality
    from vitrim.training import TrainConfig
    from vitrim.training.objectives import train as fit

    training = read(TrainConfig, values, where="train")
    start = Config.from_dict(packaged["model"]) if model is None else prepared.on(weights.load(model))
    told = {"source": model or f"recipe {recipe}", **({} if recipe is None else {"recipe": recipe})}
    with progress_on_stderr(output.quiet) as progress:
        result = fit(
            start,
            source,
            training,
            out=out,
            resume=resume,
            new_head=new_head,
            on_broken=on_broken or "raise",
            provenance=told,
            progress=progress,
        )
    scores: dict[str, Any] = next((line for line in reversed(result.history) if line["kind"] == "validate"), {})
    key, count = quality(scores), int(scores.get("count") or 0)
    output.tell(
        {"out": str(out), "steps": result.steps, "seconds": round(result.seconds, 1), "validation": scores},
        f"trained {tables.number_of(result.steps, 'step')} in {duration_text(result.seconds)}; saved to {out}",
        *(
            [f"{METRICS[key].short} on the validation images: {tables.counted_text(METRICS[key], scores[key], count)}"]
            if key
            else []
        ),
        f"next: {command('vitrim', 'compress', '--model', out, '--keep-macs', '0.5', '--data', source, '--out', 'smaller')}",
    )
