"""The result of a job, as `vitrim.reporting` describes it, from what its stages found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from vitrim import __version__
from vitrim.errors import SourceError
from vitrim.foreign import command
from vitrim.pipeline.folder import STAGES
from vitrim.pipeline.job import Job
from vitrim.sources import timm
from vitrim.spec import ModelSpec, spec_hash
from vitrim.tasks.task import product_words


def summary(job: Job, found: Mapping[str, Mapping[str, Any]], final: ModelSpec) -> dict[str, Any]:
    """Plain JSON values.  final: the spec that the job ended in."""
    compressed, asked = found["compress"], job.asked
    dense = job.reference.to_dict()
    metrics = {"recovered": None, **found["evaluate"]["metrics"]}
    name = job.folder.out.resolve().name
    onward = _onward(job, final)
    data = job.train.name if isinstance(asked.data, str | Path) else "DATA"
    facts = {"dense": dense, **{key: compressed[key] for key in ("report", "history", "start")}}
    return {
        "schema": 1,
        "name": name,
        "model": asked.name,
        "method": {"name": compressed["method"], "variant": compressed["variant"]},
        "data": {"name": job.held.name, "split": "validation", "count": metrics["dense"]["count"]},
        "budget": {} if asked.config.budget is None else asked.config.budget.to_dict(),
        "product": {"name": job.product, "words": product_words(job.dense.spec, final, job.product)},
        "limits": found["plan"]["limits"],
        "specs": {"dense": job.dense.spec.to_dict(), "compressed": final.to_dict()},
        "costs": {"dense": dense, "compressed": compressed["cost"]},
        "original": _original(job, compressed["cost"]),
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
        "onward": onward,
        "commands": [
            {"does": "Use it in Python", "command": f"import vitrim\nmodel = vitrim.load({name!r})"},
            *next_commands(onward, place=name, model=asked.name, data=data),
        ],
    }


def _picked(stage: Mapping[str, Any], *names: str, **renamed: str) -> dict[str, Any] | None:
    """What the result tells of a stage; None where it was left out."""
    if stage.get("skipped"):
        return None
    return {name: stage[name] for name in names} | {name: stage[own] for name, own in renamed.items()}


def _original(job: Job, small: Mapping[str, Any]) -> dict[str, Any] | None:
    """What is left of the first ancestor, where the dense model was itself cut."""
    if job.original is None:
        return None
    name, whole = job.original
    return {"model": name, "kept_macs": small["macs"] / whole.macs, "kept_params": small["params"] / whole.params}


def _onward(job: Job, final: ModelSpec) -> dict[str, Any]:
    """What the next commands need to know: a split to score, a picture to show and a library to export to, where there are any."""
    asked = job.asked
    keys = job.held.keys if isinstance(asked.data, str | Path) and Path(asked.data).is_dir() else ()
    picture = next((key for key in keys[:1] if (Path(asked.data) / key).is_file()), None)
    left = replace(final, blocks=tuple(block for block in final.blocks if block.attention or block.mlp or block.steps))
    try:
        timm.check(left)
        library = "timm"
    except SourceError:
        library = None
    split = "test" if job.has_test_split else "validation"
    told = {"split": split, "picture": picture, "library": library, "predicts": job.task.predicts}
    return told | {"labelled": job.held.labelled}


def next_commands(onward: Mapping[str, Any], *, place: str, model: str, data: str) -> list[dict[str, str]]:
    """What to do with a result, each as a command to copy.  place, model, data: how to name them where it is typed."""
    rows = [
        ("Look at the cost of each block", ("cost", place)),
        ("Time it again, beside the model it was cut from", ("measure", place, "--against", model)),
        ("Write the report again", ("report", place)),
    ]
    if not onward["predicts"]:  # an encoder is scored beside the dense one
        words = ("evaluate", place, "--against", model, "--data", data, "--split", onward["split"])
        rows = [("Score it beside the model that it was cut from", words), *rows]
    else:
        picture = "YOUR_PHOTO.jpg" if onward["picture"] is None else f"{data.rstrip('/')}/{onward['picture']}"
        unseen = (
            " that no choice was made on"
            if onward["split"] == "test"
            else " that the choices were made on: there is no test split"
        )
        against = () if onward.get("labelled", True) else ("--against", model)
        rows = [
            (f"Score it on images{unseen}", ("evaluate", place, *against, "--data", data, "--split", onward["split"])),
            ("Try it on a picture", ("predict", place, picture)),
            *rows,
        ]
    if onward["library"]:
        out = f"{place.rstrip('/')}-{onward['library']}"
        rows.append((f"Hand it to {onward['library']}", ("export", place, "--format", onward["library"], "--out", out)))
    return [{"does": does, "command": command("vitrim", *words)} for does, words in rows]
