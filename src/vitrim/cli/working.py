"""Verbs that run the network or train it: compress, recover, train, evaluate, predict, measure, demo."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vitrim.cli import options, tables
from vitrim.cli.progress import duration_text, progress_on_stderr
from vitrim.errors import ConfigError, DataError

if TYPE_CHECKING:
    from vitrim.model import Vit

DATA = click.option("--data", metavar="DATA", help="Images; the built-in sample for built-in models.")
SPLITS = ("train", "validation", "val", "test", "all")


def data_for(data: str | None, model: str) -> str:
    """The data that was named, or the sample where the model is built in."""
    if data is not None:
        return data
    if model.startswith("builtin:"):
        return "sample"
    raise click.UsageError(
        "--data is missing; pass an image folder, a Parquet file, hf:NAME, or sample (the built-in images)."
    )


@click.command()
@click.argument("model")
@click.option("--against", metavar="MODEL", help="Also how much it agrees with this one; the score of an encoder.")
@DATA
@click.option("--split", type=options.Named(*SPLITS), default="validation", show_default=True, help="Part of the data.")
@click.option("--batch", type=click.IntRange(min=1), default=64, show_default=True, help="Images at a time.")
@click.option("--limit", type=click.IntRange(min=1), help="Only so many images, balanced over the classes.")
@click.option("--skip-broken", is_flag=True, help="Leave out images that cannot be read, and say which.")
@options.SOURCE
@options.COMPUTE
@options.AMP
@options.WORKERS
@options.SEED
@options.OUTPUT
def evaluate(
    model: str,
    against: str | None,
    data: str | None,
    split: str,
    batch: int,
    limit: int | None,
    skip_broken: bool,
    checkpoint: Path | None,
    no_pretrained: bool,
    no_verify: bool,
    device: str | None,
    threads: int | None,
    amp: str | None,
    workers: int | None,
    seed: int | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Score MODEL on labelled images: top-1, top-5, loss. An encoder is scored against another model, without labels.

    vitrim evaluate small/ --data photos/ --split test
    """
    source = data_for(data, model)
    options.use_threads(threads)
    where = options.device_named(device)
    network = options.load_model(model, checkpoint=checkpoint, no_pretrained=no_pretrained, no_verify=no_verify)
    reference = None if against is None else options.load_model(against)
    if not network.spec.outputs and reference is None:
        raise ConfigError(
            f"{model} has no classifier to score. Pass --against DENSE to compare its features with a model's."
        )
    from vitrim import data as rooms
    from vitrim.tasks.classification import evaluate as score

    # The seed draws `limit`; the validation tenth of the data is the same whatever the seed.
    images = rooms.open(
        source, split=split, labelled=None if against else True, on_broken="skip" if skip_broken else "raise"
    )
    if limit is not None:
        images = images.take(limit, seed or 0)
    with progress_on_stderr(quiet) as progress:
        metrics = score(
            network,
            images,
            batch_size=batch,
            device=where,
            amp=amp or "no",
            workers=workers or 0,
            reference=reference,
            progress=progress,
        )
    for key, reason in images.broken.items():
        tables.note(f"skipped {key}: {reason}")
    names = ("top1", "top5", "loss", "map", "agreement", "cosine", "knn_agreement", "count")
    kept = {name: metrics[name] for name in names if metrics.get(name) is not None}
    if as_json:
        tables.show_json({"model": model, "data": images.fingerprint(), "split": split, **kept})
    else:
        tables.say(f"{model} on {kept['count']} images of {images.name} ({split})")
        titles = {
            "top1": "top-1",
            "top5": "top-5",
            "map": "mean average precision",
            "knn_agreement": "neighbours agree",
        }
        for name in names[:-1]:
            if name in kept:
                value = f"{kept[name]:.4f}" if name in ("loss", "cosine") else tables.percent_text(kept[name])
                tables.say(f"{titles.get(name, name)}  {value}")


@click.command()
@click.argument("model")
@click.argument("files", nargs=-1, required=True, metavar="IMAGE...", type=click.Path(path_type=Path))
@click.option("--top", type=click.IntRange(min=1), default=5, show_default=True, help="Names for each image.")
@options.SOURCE
@options.COMPUTE
@options.OUTPUT
def predict(
    model: str,
    files: tuple[Path, ...],
    top: int,
    checkpoint: Path | None,
    no_pretrained: bool,
    no_verify: bool,
    device: str | None,
    threads: int | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Name what MODEL sees on each IMAGE.

    vitrim predict small/ cat.jpg
    """
    for file in files:
        if not file.is_file():
            what = "is a folder" if file.is_dir() else "is not there"
            raise DataError(f"{str(file)!r} {what}; expected an image file, such as cat.jpg.")
    options.use_threads(threads)
    where = options.device_named(device)
    network = options.load_model(model, checkpoint=checkpoint, no_pretrained=no_pretrained, no_verify=no_verify)
    answers = {str(file): names_on(network, file, top=top, device=where) for file in files}
    if as_json:
        tables.show_json({"model": model, "predictions": answers})
        return
    for name, found in answers.items():
        tables.show_table(
            name, ["class", "probability"], [[a["label"], tables.percent_text(a["probability"])] for a in found]
        )


def names_on(network: Vit, file: Path, *, top: int, device: str) -> list[dict[str, Any]]:
    """The likeliest classes of one image file: label (its number where the model has no names) and probability."""
    import torch

    from vitrim.data import readable
    from vitrim.data.images import decode
    from vitrim.data.transforms import evaluation

    if not network.spec.outputs:
        raise ConfigError(
            "this model has no classifier, so it names nothing. Give it one with `vitrim train --new-head`."
        )
    if network.config.preprocess is None:
        raise ConfigError("this model says no preprocessing (mean, std, size). Save it again from a source that does.")
    image = evaluation(network.config.preprocess)(decode(file, key=str(file)))  # C h w
    with torch.inference_mode():
        shares = network.to(device)(image.unsqueeze(0).to(device)).float().softmax(-1)[0]  # classes
    values, indices = shares.topk(min(top, len(shares)))
    labels = readable(network.config.labels or ())
    return [
        {"label": labels[i] if labels else f"class {i}", "index": i, "probability": value}
        for value, i in zip(values.tolist(), indices.tolist(), strict=True)
    ]


@click.command()
@click.argument("model")
@click.option("--against", metavar="MODEL", help="Interleave with this one, and give the speed-up.")
@click.option("--batch", type=options.COUNTS, default="1,8", show_default=True, help="Batch sizes, comma-separated.")
@click.option(
    "--runtime", type=options.Named("eager", "compile"), default="eager", show_default=True, help="What runs it."
)
@click.option("--runs", type=click.IntRange(min=1), default=20, show_default=True, help="Samples of each model.")
@click.option("--dtype", type=options.Named("float32", "bfloat16", "float16"), default="float32", show_default=True)
@options.COMPUTE
@options.OUTPUT
def measure(
    model: str,
    against: str | None,
    batch: tuple[int, ...],
    runtime: str,
    runs: int,
    dtype: str,
    device: str | None,
    threads: int | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Time MODEL's forward pass: median and spread, here and now.

    vitrim measure small/ --against timm:deit_small_patch16_224 --batch 1,8
    """
    if against == model:
        raise click.UsageError("--against names the model itself; pass another one, such as the dense model.")
    where = options.device_named(device)
    from vitrim.counting import cost as count
    from vitrim.timing import measure as time_models
    from vitrim.timing import speedups

    names = [model] if against is None else [against, model]
    networks = {name: for_timing(name) for name in names}
    with progress_on_stderr(quiet) as progress:
        rows = time_models(
            networks,
            batch_sizes=batch,
            threads=threads,
            runs=runs,
            runtime=runtime,
            device=where,
            dtype=dtype,
            progress=progress,
        )
    macs = {name: count(network).macs for name, network in networks.items()}
    gains = [] if against is None else speedups(rows, against, macs)
    if as_json:
        tables.show_json({"rows": rows, "speedups": gains, "macs": macs})
    else:
        show_times(rows, gains)


def for_timing(name: str) -> Vit:
    """A model to time; a named one needs no published weights, since they change no time."""
    from vitrim.sources import FOREIGN, load

    return load(name, pretrained=name.partition(":")[0] not in FOREIGN)


def show_times(rows: Sequence[dict[str, Any]], gains: Sequence[dict[str, Any]]) -> None:
    """Times, the speed-up beside the ideal one, and the setting they hold for."""
    gained = {(gain["model"], gain["batch"]): gain for gain in gains}
    body = []
    for row in rows:
        gain = gained.get((row["model"], row["batch"]))
        speed = (
            [f"{gain['ideal']:.2f}", f"{gain['measured']:.2f}", tables.share_text(gain["realised"], 1)]
            if gain
            else ["", "", ""]
        )
        spread = f"{row['low_ms']:.2f} to {row['high_ms']:.2f}"
        body.append([row["model"], str(row["batch"]), f"{row['median_ms']:.2f}", spread, *speed])
    heads = ["model", "batch", "median ms", "quartiles", "ideal x", "measured x", "realised"]
    tables.show_table(
        "time of one forward pass", heads if gains else heads[:4], body if gains else [line[:4] for line in body]
    )
    first = rows[0]
    tables.say(
        f"{first['runtime']}, {first['dtype']}, {first['device_name']}, {first['threads']} threads, "
        f"{first['runs']} samples each, load {first['load']}"
    )


@click.command()
@click.option("--model", metavar="MODEL", help="Where to start; a recipe names its own.")
@click.option("--recipe", metavar="NAME", help="A packaged training, such as cifar10-vit-micro.")
@click.option("--new-head", is_flag=True, help="Fresh classifiers for the classes of the data.")
@DATA
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
    source = data_for(data, model or f"builtin:{recipe}")
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
    if "top1" in scores:
        tables.say(f"top-1 on the validation images: {tables.percent_text(scores['top1'])}")
    tables.say(f"next: vitrim compress --model {out} --keep-macs 0.5 --data {source} --out smaller")


def recipe_named(name: str) -> dict[str, Any]:
    """A packaged recipe; an unknown name is refused with the near miss."""
    from vitrim import recipes

    return recipes.read(name)
