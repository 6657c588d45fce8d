"""`vitrim train`: training on labelled images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from vitrim.cli import options, tables
from vitrim.cli.progress import duration_text, progress_on_stderr
from vitrim.tasks.task import METRICS, quality


@click.command()
@click.option("--model", metavar="MODEL", help="Where to start; a recipe names its own.")
@click.option("--recipe", metavar="NAME", help="A packaged training, such as cifar10-vit-micro.")
@click.option("--new-head", is_flag=True, help="Fresh classifiers for the classes of the data.")
@options.DATA
@click.option("--out", type=click.Path(path_type=Path), required=True, metavar="FOLDER", help="What it becomes.")
@click.option("--resume", is_flag=True, help="Go on with the run at --out.")
@options.TRAINING
@click.option("--config", type=click.Path(path_type=Path), metavar="FILE", help="JSON with keys of TrainConfig.")
@options.SOURCE
@options.COMPUTE
@options.AMP
@options.WORKERS
@options.SEED
@options.OUTPUT
def train(
    model: str | None,
    recipe: str | None,
    new_head: bool,
    data: str | None,
    out: Path,
    resume: bool,
    config: Path | None,
    checkpoint: Path | None,
    no_pretrained: bool,
    no_verify: bool,
    threads: int | None,
    as_json: bool,
    quiet: bool,
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
    source = options.data_for(data, model or f"builtin:{recipe}")
    options.check_out(out, force=False, resume=resume)
    prepared = {} if recipe is None else recipe_named(recipe)
    values = {**prepared.get("train", {}), **options.read_json(config), **options.given(settings)}
    if settings["steps"] is None and settings["epochs"] is not None:
        values.pop("steps", None)
    options.use_threads(threads)
    from vitrim.config import read
    from vitrim.spec import Config
    from vitrim.training import TrainConfig
    from vitrim.training.objectives import train as fit

    options.device_named(values.get("device"))
    training = read(TrainConfig, values, where="train")
    if model is not None:
        start: Any = options.load_model(model, checkpoint=checkpoint, no_pretrained=no_pretrained, no_verify=no_verify)
    else:
        start = Config.from_dict(prepared["model"])
    told = {"source": model or f"recipe {recipe}", **({} if recipe is None else {"recipe": recipe})}
    with progress_on_stderr(quiet) as progress:
        result = fit(
            start, source, training, out=out, resume=resume, new_head=new_head, provenance=told, progress=progress
        )
    scores: dict[str, Any] = next((line for line in reversed(result.history) if line["kind"] == "validate"), {})
    facts = {"out": str(out), "steps": result.steps, "seconds": round(result.seconds, 1), "validation": scores}
    if as_json:
        tables.show_json(facts)
        return
    tables.say(f"trained {result.steps} steps in {duration_text(result.seconds)}; saved to {out}")
    if (key := quality(scores)) is not None:
        tables.say(f"{METRICS[key].short} on the validation images: {tables.percent_text(scores[key])}")
    tables.say(f"next: vitrim compress --model {out} --keep-macs 0.5 --data {source} --out smaller")


def recipe_named(name: str) -> dict[str, Any]:
    """A packaged recipe; an unknown name is refused with the near miss."""
    from vitrim import recipes

    return recipes.read(name)
