"""`vitrim measure`: the time of a forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from vitrim.cli import options, tables
from vitrim.cli.progress import progress_on_stderr

if TYPE_CHECKING:
    from vitrim.model import Vit


@click.command()
@click.argument("model")
@click.option("--against", metavar="MODEL", help="Interleave with this one, and give the speed-up.")
@click.option(
    "--batch",
    "batch_sizes",
    type=options.COUNTS,
    default="1,8",
    show_default=True,
    help="Batch sizes, comma-separated.",
)
@click.option(
    "--runtime", type=options.Named("eager", "compile"), default="eager", show_default=True, help="What runs it."
)
@click.option("--runs", type=options.COUNT, default=20, show_default=True, help="Samples of each model.")
@click.option("--dtype", type=options.Named("float32", "bfloat16", "float16"), default="float32", show_default=True)
@options.IMAGE_PX
@options.COMPUTE
@options.OUTPUT
def measure(
    model: str,
    against: str | None,
    image_px: tuple[int, int] | None,
    device: str | None,
    output: options.Output,
    **how: Any,
) -> None:
    """Time MODEL's forward pass: median and spread, here and now.

    vitrim measure small/ --against timm:deit_small_patch16_224 --batch 1,8
    """
    if against == model:
        raise click.UsageError("--against names the model itself; pass another one, such as the dense model.")
    where = options.device_named(device)
    from vitrim import timing
    from vitrim.counting import cost

    names = [model] if against is None else [against, model]
    networks = {name: for_timing(name, image_px) for name in names}
    with progress_on_stderr(output.quiet) as progress:
        rows = timing.measure(networks, device=where, progress=progress, **how)
    macs = {name: cost(network).macs for name, network in networks.items()}
    gains = [] if against is None else timing.speedups(rows, against, macs)
    if output.as_json:
        tables.show_json(
            {
                "rows": rows,
                "speedups": gains,
                "macs": macs,
                "image_px": {n: v.spec.image_px for n, v in networks.items()},
            }
        )
    else:
        sizes = dict.fromkeys(tables.size_text(network.spec) for network in networks.values())
        show_times(rows, gains, " and ".join(sizes))


def for_timing(name: str, image_px: tuple[int, int] | None = None) -> Vit:
    """A model to time, with the positions of its size; a named one needs no published weights, since they change no time."""
    from vitrim.sources import FOREIGN, load
    from vitrim.surgery import with_own_positions

    return with_own_positions(load(name, pretrained=name.partition(":")[0] not in FOREIGN, image_px=image_px))


def show_times(rows: Sequence[dict[str, Any]], gains: Sequence[dict[str, Any]], size: str) -> None:
    """Times, the speed-up beside the ideal one, and the setting they hold for.  size: of the images."""
    from vitrim.timing import busy

    gained = {(gain["model"], gain["batch"]): gain for gain in gains}
    body = []
    for row in rows:
        spread = f"{row['low_ms']:.2f} to {row['high_ms']:.2f}"
        body.append([row["model"], str(row["batch"]), f"{row['median_ms']:.2f}", spread])
        if gain := gained.get((row["model"], row["batch"])):
            body[-1] += [f"{gain['ideal']:.2f}", f"{gain['measured']:.2f}", tables.share_text(gain["realised"], 1)]
    heads = ["model", "batch", "median ms", "quartiles", *(["ideal x", "measured x", "realised"] if gains else [])]
    tables.show_table(f"time of one forward pass, {size}", heads, body)
    first = rows[0]
    tables.say(
        f"{first['runtime']}, {first['dtype']}, {first['device_name']}, {tables.number_of(first['threads'], 'thread')}, "
        f"{first['runs']} samples each, load {first['load']} on {first['cores']} cores"
    )
    if crowded := busy(rows):
        tables.say(crowded)
