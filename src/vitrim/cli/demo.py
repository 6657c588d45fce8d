"""`vitrim demo`: the main job on what is built in."""

from __future__ import annotations

from pathlib import Path

import click

from vitrim.cli import options, tables
from vitrim.cli.compress import run_with, show_run
from vitrim.foreign import command

DEMO_MODEL = "builtin:cifar10-vit-micro"
DEMO_STEPS = 300
DEMO_IMAGES = 1000
DEMO_CALIBRATION = 64


@click.command()
@click.option("--out", type=options.PLACE, default=Path("demo"), show_default=True, help="Where to.")
@options.FORCE
@click.option("--threads", type=options.COUNT, help="CPU threads; all by default.")
@options.OUTPUT
def demo(out: Path, force: bool, threads: int | None, output: options.Output) -> None:
    """Show the main job on built-in images, in three to four minutes on two cores.

    Compress to half the operations, recover for a minute or two, compare, time, save, and report.
    """
    options.check_out(out, force=force)
    options.use_threads(threads)
    from vitrim.budget import Budget
    from vitrim.methods.auto import AutoConfig

    result = run_with(
        DEMO_MODEL,
        AutoConfig(budget=Budget(keep_macs=0.5), images=DEMO_CALIBRATION),
        fixed=("budget", "images"),
        data="sample",
        out=out,
        recovery={"steps": DEMO_STEPS, "batch_size": 64, "eval_every": DEMO_STEPS // 3},
        judging={"limit": DEMO_IMAGES},
        timed={"runtimes": ("eager",)},
        machine={"device": "cpu", "threads": threads, "seed": 0},
        quiet=output.quiet,
        force=force,
    )
    if output.as_json:
        tables.show_json(result.summary)
        return
    show_run(result.summary)
    tables.say(f"made   {result.folder}  the smaller model: vitrim.load({str(out)!r}) in Python")
    tables.say(f"       {result.report}  what was cut, what it cost and gained: open it in a browser")
    tables.say(f"next   {command('vitrim', 'evaluate', out, '--data', 'sample', '--split', 'test')}")
    tables.say(
        "       vitrim compress --model timm:deit_small_patch16_224 --keep-macs 0.5 --data YOUR_PHOTOS --out small"
    )
