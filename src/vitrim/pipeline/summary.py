"""The result of a job, as `vitrim.reporting` describes it, from what its stages found."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from vitrim import __version__
from vitrim.foreign import command
from vitrim.pipeline.folder import STAGES
from vitrim.pipeline.job import Job
from vitrim.spec import ModelSpec, spec_hash


def summary(job: Job, found: Mapping[str, Mapping[str, Any]], final: ModelSpec) -> dict[str, Any]:
    """Plain JSON values.  final: the spec that the job ended in."""
    compressed, asked = found["compress"], job.asked
    dense = job.reference.to_dict()
    metrics = {"recovered": None, **found["evaluate"]["metrics"]}
    name = job.folder.out.resolve().name
    facts = {"dense": dense, **{key: compressed[key] for key in ("report", "history", "start")}}
    return {
        "schema": 1,
        "name": name,
        "model": asked.name,
        "method": {"name": compressed["method"], "variant": compressed["variant"]},
        "data": {"name": job.held.name, "split": "validation", "count": metrics["dense"]["count"]},
        "budget": {} if asked.config.budget is None else asked.config.budget.to_dict(),
        "limits": found["plan"]["limits"],
        "specs": {"dense": job.dense.spec.to_dict(), "compressed": final.to_dict()},
        "costs": {"dense": dense, "compressed": compressed["cost"]},
        "file_bytes": {"dense": job.reference.file_bytes, "compressed": found["save"]["file_bytes"]},
        "metrics": metrics,
        "difference": found["evaluate"]["difference"],
        "timing": _picked(found["measure"], "rows", "speedups", "notes"),
        "recovery": _picked(
            found["recover"],
            "objective",
            "kept",
            "before",
            "steps",
            "curve",
            "validation",
            "images_per_s",
            seconds="train_seconds",
        ),
        "sections": [section.to_dict() for section in job.method.sections(facts)],
        "warnings": [text for stage in STAGES for text in found.get(stage, {}).get("warnings", ())],
        "seconds": {stage: found[stage]["seconds"] for stage in STAGES if stage in found},
        "provenance": {
            "source": job.origin["source"],
            "weights (hash)": job.weights,
            "spec (hash)": spec_hash(final),
            "data": f"{job.train.name}: {len(job.train)} training, {len(job.held)} validation images",
            "data (hash)": job.held.fingerprint()["sha256"][:16],
            "seed": job.config.seed,
            "vitrim": __version__,
            "torch": str(torch.__version__),
        },
        "commands": _next_commands(
            name, job.train.name if isinstance(asked.data, str | Path) else "DATA", job.task.predicts
        ),
    }


def _picked(stage: Mapping[str, Any], *names: str, **renamed: str) -> dict[str, Any] | None:
    """What the result tells of a stage; None where it was left out."""
    if stage.get("skipped"):
        return None
    return {name: stage[name] for name in names} | {name: stage[own] for name, own in renamed.items()}


def _next_commands(name: str, data: str, predicts: bool) -> list[dict[str, str]]:
    rows = [
        {"does": "Use it in Python", "command": f"import vitrim\nmodel = vitrim.load({name!r})"},
        {"does": "Look at the cost of each block", "command": command("vitrim", "cost", name)},
    ]
    if predicts:
        rows += [
            {
                "does": "Score it on images that no choice was made on",
                "command": command("vitrim", "evaluate", name, "--data", data, "--split", "test"),
            },
            {"does": "Try it on a picture of your own", "command": command("vitrim", "predict", name, "cat.jpg")},
        ]
    return rows
