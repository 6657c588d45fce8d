"""`vitrim recover`: a compressed model trained to answer as the dense one did."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from vitrim import processes
from vitrim.cli import options, tables
from vitrim.cli.progress import duration_text, progress_on_stderr
from vitrim.files import locked


@click.command()
@click.argument("model")
@click.option("--teacher", metavar="MODEL", help="The dense model, whose answers it learns.")
@options.DATA
@options.BROKEN
@options.OUT
@click.option(
    "--objective",
    type=options.Named("auto", "distilled", "supervised", "label_free"),
    help="What to learn from; auto: labels and teacher where there are labels, else the teacher's tokens.",
)
@options.product("What label-free learning makes alike; tokens of an encoder, output of a classifier by default.")
@options.TRAINING
@click.option("--config", type=options.PLACE, metavar="FILE", help="JSON with keys of RecoverConfig.")
@click.option("--resume", is_flag=True, help="Go on with the run at --out.")
@options.PREPARED
@options.MACHINE
@options.OUTPUT
def recover(
    model: str,
    teacher: str | None,
    data: str | None,
    on_broken: str | None,
    out: Path,
    config: Path | None,
    resume: bool,
    prepared: options.Prepared,
    threads: int | None,
    output: options.Output,
    **settings: Any,
) -> None:
    """Train a compressed MODEL to answer as the dense one did.

    vitrim recover small/ --teacher timm:deit_small_patch16_224 --data imagenet/ --epochs 30 --out better/
    """
    source = options.data_for(data, teacher or model)
    if teacher is None and settings["objective"] != "supervised":
        raise click.UsageError(
            "--teacher is missing; pass the dense model, or --objective supervised to learn from labels alone."
        )
    options.check_out(out, force=False, resume=resume)
    values = options.for_training(config, settings, threads)
    from vitrim import artifact
    from vitrim.config import read
    from vitrim.pipeline import RecoverConfig
    from vitrim.pipeline import recover as train_again
    from vitrim.tasks.task import METRICS

    how = read(RecoverConfig, values, where="recover")
    small = prepared.on(options.Weights().load(model))
    dense = None if teacher is None else options.Weights().load(teacher)
    if dense is not None and dense.config.preprocess is None:
        dense = prepared.on(dense)
    with locked(out):
        artifact.refuse_overwriting(out, force=True)
        with progress_on_stderr(output.quiet) as progress:
            result = train_again(
                small,
                teacher=dense,
                data=source,
                config=how,
                out=out,
                resume=resume,
                on_broken=on_broken or "raise",
                progress=progress,
            )
        if processes.is_first():
            result.save(out, force=True)
    spent = result.report["recovery"]
    last = spent["before" if spent["kept"] == "cut" else "after"]
    output.tell(
        {"out": str(out), "validation": last, **spent},
        f"recovered in {tables.number_of(spent['steps'], 'step')}, {duration_text(spent['seconds'])} ({spent['objective']}); saved to {out}",
        *(
            f"{metric.short}  {tables.counted_text(metric, last[key], int(last.get('count', 0)))}"
            for key, metric in METRICS.items()
            if key in last
        ),
    )
