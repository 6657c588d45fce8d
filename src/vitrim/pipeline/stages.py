"""The stages of a job: each a function of the job and of what the stages before it found, to plain JSON values.

Models are always read back from their folders, never handed on in memory: the layout of a tensor changes the last bits of its
products, and a resumed run must end as an undisturbed one.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vitrim import artifact, reporting, timing
from vitrim.budget import exceeded
from vitrim.checkpoints import replace_text
from vitrim.counting import Cost, cost
from vitrim.errors import ArtifactError, MeasureError
from vitrim.files import sealed
from vitrim.methods import compress as compress_by
from vitrim.model import Vit
from vitrim.pipeline.comparison import compare
from vitrim.pipeline.configs import MeasureConfig
from vitrim.pipeline.job import Job
from vitrim.pipeline.recovery import better_again, training_speeds
from vitrim.pipeline.summary import summary
from vitrim.spec import product_of, spec_hash
from vitrim.training import plain

LEAST_GAIN = 1.05
"""An ideal speed-up below this does not pay: launches and memory traffic eat it."""

STEPS_PER_SPEED_ROUND = 50
"""A recovery of so many steps is followed by one round that times its step against the dense model's; at most three rounds."""

Found = dict[str, dict[str, Any]]
"""By stage."""

log = logging.getLogger("vitrim.pipeline")


def plan(job: Job, found: Found) -> dict[str, Any]:
    """The limits, and whether they can pay."""
    dense, warnings = job.reference, list(job.warnings)
    limits = {} if job.config.budget is None else job.config.budget.limits(dense)
    if limits and not exceeded(dense, limits):
        warnings += _said("The model meets the budget as it is: nothing has to be cut.")
    elif "macs" in limits and dense.macs / limits["macs"] < LEAST_GAIN:
        warnings += _said(
            f"The budget asks for {limits['macs'] / dense.macs:.1%} of the MACs: at best {dense.macs / limits['macs']:.2f} times as "
            "fast, which rarely shows in measured time."
        )
    told = {"limits": limits, "dense": dense.to_dict(), "dense_top1": job.dense_top1, "warnings": warnings}
    return {**job.planned, **told}


def compress(job: Job, found: Found) -> dict[str, Any]:
    """The cut network, in stages/compressed."""
    search = job.folder.stages / "search"

    def how(place: Path) -> dict[str, Any]:
        return {"data": job.train, "progress": job.progress, "folder": place, "resume": place.is_dir()}

    start, taught = job.given, {}
    if job.first is not None:
        start = compress_by(job.given, job.first, **how(search / "init")).model
        search = search / "after"
        taught = {"teacher": job.dense} if job.method.takes_teacher else {}
    made = job.asked.compressor(start, job.config, **how(search), **taught)
    warnings = list(made.report.get("warnings", ()))  # logged by `vitrim.compress`
    product_of(made.spec, job.judging.product, beside=job.dense.spec)  # refused now, and not when the recovery is over
    warnings += _doubts(job, made.model)
    made.save(job.folder.stages / "compressed", provenance=job.origin, force=True)
    shutil.rmtree(job.folder.stages / "search", ignore_errors=True)  # what a killed search would have gone on from
    return {
        "method": made.method,
        "variant": made.variant,
        "spec": spec_hash(made.spec),
        "start": cost(start).to_dict(),
        "cost": cost(made.spec).to_dict(),
        "report": made.report,
        "history": made.history,
        "warnings": warnings,
    }


def _doubts(job: Job, small: Vit) -> list[str]:
    """What would make a recovery pointless on the target; said before it begins."""
    before, after, target = job.reference, cost(small), job.asked.target
    ideal = before.macs / after.macs
    if ideal < LEAST_GAIN:
        return _said(
            f"The cut can make it at most {ideal:.2f} times as fast (the ratio of MACs): on this target it will not pay."
        )
    if target is None:
        return []
    batch = target.batch_sizes[0]
    both = {"dense": job.dense, "compressed": small}
    rows = timing.measure(both, batch_sizes=(batch,), runs=min(7, target.runs), **_on(target))
    (gain,) = timing.speedups(rows, "dense", _macs(before, after))
    if gain["high"] >= LEAST_GAIN:
        return []
    log.warning(  # for who waits; the report has the timing that counts
        "A first timing at batch %d on %s shows %.2f times the speed where the MACs promise %.2f: on this target the cut may not pay.",
        batch,
        rows[0]["device_name"],
        gain["measured"],
        ideal,
    )
    return []


def recover(job: Job, found: Found) -> dict[str, Any]:
    """The recovered network, in stages/recovered."""
    if job.recovery is None:
        return {"skipped": True}
    small = kept(job, "compressed")
    place = job.folder.stages / "recover"
    how: dict[str, Any] = {"out": place, "resume": place.is_dir(), "progress": job.progress}
    done = better_again(small, job.dense, job.train, job.recovery, held=job.held, **how)
    fitted = done.fitted
    artifact.save(fitted.model, job.folder.stages / "recovered", force=True)
    lines, rounds = fitted.history, min(3, fitted.steps // STEPS_PER_SPEED_ROUND)
    both = {"dense": job.dense, "compressed": small}
    speeds = training_speeds(both, job.dense, job.train, job.recovery, rounds=rounds) if rounds else None
    validated = [line for line in lines if line["kind"] == "validate"]
    return {
        "objective": done.objective,
        "kept": done.kept,
        "before": done.before,
        "warnings": done.warnings,
        "steps": fitted.steps,
        "train_seconds": round(fitted.seconds, 2),
        "images_per_s": speeds,
        "curve": [{"step": line["step"], "loss": line["loss"]} for line in lines if line["kind"] == "train"],
        "validation": [{k: v for k, v in line.items() if k not in ("kind", "seconds")} for line in validated],
    }


def evaluate(job: Job, found: Found) -> dict[str, Any]:
    """All networks on the validation images; samples in stages/samples.json."""
    models = {"dense": job.dense, "compressed": kept(job, "compressed")}
    if job.recovery is not None:
        models["recovered"] = kept(job, "recovered")
    done = compare(models, job.held, job.judging, job.progress)
    replace_text(job.folder.stages / "samples.json", reporting.as_text(sealed(done.samples)))
    return {"metrics": done.metrics, "difference": done.gap, "warnings": []}


def measure(job: Job, found: Found) -> dict[str, Any]:
    """Latencies of the dense and the final network in turns."""
    target = job.asked.target
    if target is None:
        return {"skipped": True}
    rows: list[dict[str, Any]] = []
    said: list[str] = []
    both = {"dense": job.dense, "compressed": final(job)}
    for runtime in target.kinds:
        try:
            how = {"batch_sizes": target.batch_sizes, "runs": target.runs, "runtime": runtime, **_on(target)}
            rows += timing.measure(both, progress=job.progress, **how)
        except MeasureError as error:
            if runtime == "eager":
                raise
            said += _said(f"Compiled PyTorch was not timed: {error}")  # hours of recovery are not lost to that
    if crowded := timing.busy(rows):
        said += _said(crowded)
    speedups = timing.speedups(rows, "dense", _macs(job.reference, cost(both["compressed"])))
    return {"rows": rows, "speedups": speedups, "notes": said}


def save(job: Job, found: Found) -> dict[str, Any]:
    """The artifact in OUT."""
    metrics, out = found["evaluate"]["metrics"], job.folder.out
    provenance = job.origin | {
        "method": job.method.name,
        "variant": found["compress"]["variant"],
        "config": plain(job.asked.config) | {"exact_tail": job.tail, "init": job.asked.init},
        "data": job.held.fingerprint() | {"train": job.train.fingerprint()},
        "seed": job.config.seed,
        "product": job.product,
        "metrics": {"before": metrics["dense"], "after": metrics.get("recovered") or metrics["compressed"]},
        "recovery": None if job.recovery is None else plain(job.recovery) | {"kept": found["recover"]["kept"]},
    }
    artifact.save(final(job), out, provenance=provenance, force=True)
    shutil.rmtree(job.folder.stages / "recover" / "checkpoints", ignore_errors=True)  # the recovered model is kept
    return {"file_bytes": (out / artifact.WEIGHTS).stat().st_size}


def report(job: Job, found: Found) -> dict[str, Any]:
    """report.html."""
    shown = reporting.read_samples(job.folder.out)
    reporting.write({**summary(job, found, final(job).spec), **shown}, job.folder.out / "report.html")
    return {"file": "report.html"}


Stage = Callable[[Job, Found], dict[str, Any]]
STAGES: dict[str, Stage] = {
    stage.__name__: stage for stage in (plan, compress, recover, evaluate, measure, save, report)
}


def final(job: Job) -> Vit:
    """The network that the job ends in."""
    return kept(job, "compressed" if job.recovery is None else "recovered")


def kept(job: Job, name: str) -> Vit:
    """What a stage left in stages/NAME."""
    try:
        return artifact.load(job.folder.stages / name)
    except ArtifactError as error:
        stage = {"compressed": "compress", "recovered": "recover"}[name]
        raise ArtifactError(
            f"{error} To make it again, remove stages/{stage}.json from the run's folder and resume."
        ) from error


def _on(target: MeasureConfig) -> dict[str, Any]:
    return {"threads": target.threads, "device": target.device, "dtype": target.dtype}


def _macs(dense: Cost, small: Cost) -> dict[str, int]:
    return {"dense": dense.macs, "compressed": small.macs}


def _said(text: str) -> list[str]:
    log.warning(text)
    return [text]
