"""`vitrim predict`: names for pictures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vitrim.cli import options, tables
from vitrim.errors import ConfigError, DataError
from vitrim.foreign import printable

if TYPE_CHECKING:
    from vitrim.model import Vit


@click.command()
@click.argument("model")
@click.argument("files", nargs=-1, required=True, metavar="IMAGE...", type=options.PLACE)
@click.option("--top", type=options.COUNT, default=5, show_default=True, help="Names for each image.")
@options.BROKEN
@options.SOURCE
@options.PREPARED
@options.COMPUTE
@options.OUTPUT
def predict(
    model: str,
    files: tuple[Path, ...],
    top: int,
    on_broken: str | None,
    weights: options.Weights,
    prepared: options.Prepared,
    device: str | None,
    threads: int | None,
    output: options.Output,
) -> None:
    """Name what MODEL sees on each IMAGE.

    vitrim predict small/ cat.jpg
    """
    skips = on_broken == "skip"
    for file in files:
        if not skips and (file.is_dir() or not file.exists()):
            what = "is a folder" if file.is_dir() else "is not there"
            raise DataError(f"{str(file)!r} {what}; expected an image file, such as cat.jpg.")
    options.use_threads(threads)
    where = options.device_named(device)
    network = prepared.on(weights.load(model)).to(where)
    from vitrim.data.images import Broken

    answers: dict[str, list[dict[str, Any]]] = {}
    left_out = Broken()
    for file in files:
        try:
            answers[str(file)] = names_on(network, file, top)
        except DataError as error:
            if not skips:
                raise
            left_out[str(file)] = str(error)
    if not answers:
        raise DataError(f"none of {len(files)} images could be read; the first: {next(iter(left_out.values()))}")
    left_out.tell("predict")
    if output.as_json:
        tables.show_json({"model": model, "predictions": answers})
        return
    for name, found in answers.items():
        tables.show_table(
            name, ["class", "probability"], [[a["label"], tables.percent_text(a["probability"])] for a in found]
        )


def names_on(network: Vit, file: Path, top: int) -> list[dict[str, Any]]:
    """The likeliest classes of one image file, as `answers` has them."""
    from vitrim.data import evaluation
    from vitrim.data.decoding import decode
    from vitrim.data.transforms import UNPREPARED
    from vitrim.tasks.samples import answers

    if not network.spec.outputs:
        raise ConfigError(
            "this model has no classifier, so it names nothing. Give it one with `vitrim train --new-head`."
        )
    if network.config.preprocess is None:
        raise DataError(UNPREPARED)
    picture = decode(file, key=str(file))
    try:
        image = evaluation(network.config.preprocess)(picture)  # C h w
    except DataError as error:
        raise DataError(f"{printable(file)}: {error}") from error
    return answers(network, image.unsqueeze(0), top=top)[0]
