"""DC-ViT: lose the attention of some blocks and part of their MLP, from a few unlabelled images, at any budget.

Source   Zhang, Zhou, Wang, Wu, CVPR 2024, arXiv:2403.18708; mechanics from the authors' code (Michelia-zhx/dcvit), since the
         paper's method section could not be read: DC-ViT-style (reconstructed).
Takes    a ViT, a budget, and 50 to 1000 unlabelled images. Labels are never read.
Gives    `finetune`: k blocks without attention, their MLP at a common width, by trials, ranking and progressive fine-tuning.
         `closed` (ours): for each block one of {keep; keep attention, width m; no attention, width m; drop}, chosen by
         dynamic programming over measured losses, and refitted front to back by regressions. Seconds, no gradient steps.
Departs  `finetune`, preset `clean`: one channel subset a block, used in both stages; this project's MACs instead of the
         authors' counter; the teacher's LayerNorm epsilon (in preset `paper` too: one network has one); a linear ramp of the
         learning rate instead of a scaled loss; the model's own normalisation; optimiser steps instead of epochs; metric
         images as tensors; the last trained block is L-1 at most; total variation at one strength; in preset `paper` too the
         cosine moves by steps and an epoch's last partial batch is left out. `closed` is not the paper's method and shares only the form
         of its result.

`structure`: what is possible. `score`, `closed`: ours. `finetune`: the paper's. Here: the calls.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

from vitrim import closed_form as cf
from vitrim import surgery
from vitrim.budget import Budget, exceeded
from vitrim.data.transforms import UNPREPARED
from vitrim.errors import ConfigError, DataError
from vitrim.methods.dcvit.closed import allocate, keeps_of, reconstruct
from vitrim.methods.dcvit.config import DcvitConfig
from vitrim.methods.dcvit.finetune import by_finetuning, finetune
from vitrim.methods.dcvit.job import Inputs, Job
from vitrim.methods.dcvit.score import Score, score
from vitrim.methods.dcvit.structure import check_budget, space_of
from vitrim.methods.fitting import alone
from vitrim.methods.method import How
from vitrim.model import Vit
from vitrim.progress import Progress
from vitrim.result import Compressed
from vitrim.space import Choice
from vitrim.spec import ModelSpec, SelectionStep, spec_hash
from vitrim.surgery import Keep


def compress(model: Vit, config: DcvitConfig, **how: Unpack[How]) -> Compressed:
    """Compress `model` to the config's budget; `model` is left as it was.

    data: images, whatever `vitrim.data.open` takes (labels are not read); a float tensor [n, C, h, w] is taken as the
    network's own input if the model says no preprocessing. folder: where partial state goes, so that a killed run can go on
    with resume. Raises BudgetError before anything is read when the budget is out of reach, ConfigError for a frozen part
    that is not there, DataError for images that are missing or all equal.
    """
    return alone("dcvit", compress_family, model, config, **how)


def compress_family(
    model: Vit,
    config: DcvitConfig,
    budgets: Sequence[Budget],
    *,
    data: Any = None,
    progress: Progress | None = None,
    folder: Path | None = None,
    resume: bool = False,
) -> list[Compressed]:
    """One compressed model for each budget, from one scoring of the blocks; arguments as for `compress`.

    The config's own budget is not looked at. All budgets are checked before anything is read.
    """
    if not budgets:
        raise ConfigError(
            "dcvit: no budgets. Pass one or more, such as [Budget(keep_macs=0.8), Budget(keep_macs=0.5)]."
        )
    space = space_of(model.spec, config)
    for budget in budgets:
        check_budget(space, config, budget)
    base = surgery.fold_layer_scale(model, skip=space.fixed)
    base = base.to(config.device or next(model.parameters()).device).eval()
    inputs = Inputs(model, data, config)
    if inputs.images is None and (config.variant == "finetune" or config.finetune_steps):
        raise DataError(f"dcvit: fine-tuning varies the images; {UNPREPARED}")
    cuts = [bool(exceeded(space.reference, budget.limits(space.reference))) for budget in budgets]
    if any(cuts):
        inputs.refuse_alike()
    results = []
    with tempfile.TemporaryDirectory(prefix="vitrim-") as temporary:
        job = Job(
            model=model, base=base, space=space, inputs=inputs, config=config,
            scratch=Path(temporary), folder=folder, resume=resume, progress=progress,
        )  # fmt: skip
        scores, sites = score(job) if config.variant == "closed" and any(cuts) else ([], None)
        for n, (budget, cut) in enumerate(zip(budgets, cuts, strict=True)):
            own = job if folder is None or len(budgets) == 1 else replace(job, folder=folder / f"member-{n}")
            if not cut:
                same = [None] * len(model.blocks)
                results.append(_finished(job, surgery.copy(model), same, [], {}, refit=False))
            elif config.variant == "closed":
                results.append(_closed(own, scores, sites, budget))
            else:
                results.append(_finished(own, *by_finetuning(own, budget)))
    return results


def _closed(
    job: Job, scores: Sequence[Score], sites: Mapping[str, cf.Sensitivity] | None, budget: Budget
) -> Compressed:
    model, config = job.model, job.config
    losses = [one.losses(levels.choices()) for one, levels in zip(scores, job.space.levels, strict=True)]
    chosen = allocate(job.space, losses, budget)
    keeps = keeps_of(job.space, chosen, scores)
    small = reconstruct(job, keeps, sites)
    if config.finetune_steps:
        last = max((i for i, keep in enumerate(keeps) if keep is not None), default=0)
        finetune(job, small, last=last, steps=config.finetune_steps, out=job.place("finetune"))
    lost = [loss[option] for loss, option in zip(losses, chosen, strict=True)]
    report = {
        "metric": "KL to the given model" if model.spec.outputs else "squared error of unit features",
        "predicted": sum(lost),
        "handed_over": config.hand_over,
        "images": job.inputs.count,
        "probe_images": min(config.probe_images, job.inputs.count),
        "blocks": _rows(model.spec, small.spec, lost, scores),
    }
    return _finished(job, small, keeps, [{"stage": "allocate", "predicted": sum(lost)}], report)


def _finished(
    job: Job,
    small: Vit,
    keeps: Sequence[Keep | None],
    history: list[dict[str, Any]],
    report: Mapping[str, Any],
    *,
    refit: bool = True,
) -> Compressed:
    """The result with one selection step, from the given model to it, in that model's mode and place."""
    model, variant = job.model, job.config.variant
    pairs = zip(model.spec.blocks, keeps, strict=True)
    kept = tuple(None if keep is None else surgery.record(block, keep) for block, keep in pairs)
    step = SelectionStep(method="dcvit", variant=variant, parent=spec_hash(model.spec), refit=refit, blocks=kept)
    small.selection = model.selection.then(step)
    report = {"variant": variant, "blocks": _rows(model.spec, small.spec), **report}
    small = small.train(model.training).to(next(model.parameters()).device)
    return Compressed(model=small, method="dcvit", variant=variant, history=history, report=report)


def _rows(
    dense: ModelSpec, small: ModelSpec, losses: Sequence[float] | None = None, scores: Sequence[Score] | None = None
) -> list[dict[str, Any]]:
    """What became of each block; plain JSON values."""
    rows = []
    for i, blocks in enumerate(zip(dense.blocks, small.blocks, strict=True)):
        before, after = map(Choice.of, blocks)
        attention = "kept" if after.attention else ("lost" if before.attention else "none")
        row: dict[str, Any] = {"block": i, "attention": attention, "hidden": after.hidden, "of": before.hidden}
        if losses is not None and scores is not None:
            curve = scores[i].curve(after, before)
            row |= {"predicted": losses[i], "ridge": None if curve is None else curve.ridge}
        rows.append(row)
    return rows
