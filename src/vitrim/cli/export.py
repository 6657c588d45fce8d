"""`vitrim export`: another library's own checkpoint."""

from __future__ import annotations

from pathlib import Path

import click

from vitrim.cli import options
from vitrim.errors import ConfigError
from vitrim.files import refuse_locked


@click.command()
@click.argument("model")
@click.option(
    "--format",
    "kind",
    type=options.Named("timm", "hf", "torchvision", "t2t"),
    required=True,
    help="Whose checkpoint: timm (local-dir:), hf (from_pretrained), torchvision or t2t (a state dict).",
)
@click.option("--out", type=options.PLACE, required=True, metavar="PLACE", help="Folder or file to make.")
@options.IMAGE_PX
@options.FORCE
@options.SOURCE
@options.OUTPUT
def export(
    model: str,
    kind: str,
    out: Path,
    image_px: tuple[int, int] | None,
    force: bool,
    weights: options.Weights,
    output: options.Output,
) -> None:
    """Write MODEL as another library's own checkpoint, with the same answers.

    Where that library cannot say the model, the block in the way is named. vitrim export small/ --format timm --out for-timm/
    """
    from vitrim.sources import write

    if out.exists() and not force:
        raise ConfigError(f"--out {str(out)!r} is there already. Pass --force to replace it, or choose another name.")
    refuse_locked(out)
    options.check_place(out.parent if kind == "t2t" else out)
    place = write(weights.load(model, image_px), kind, out, force=force)
    output.tell({"format": kind, "out": str(place)}, f"wrote {place} for {kind}")
