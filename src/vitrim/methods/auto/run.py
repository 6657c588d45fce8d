"""One plan: ranks, widths, the residual stream and tokens cut at once under one budget, by closed forms.

Source   ours; no published method. The closed forms are those beside COMCAT (whitened products) and DC-ViT (elimination with
         refit), each in `vitrim.closed_form`; the narrower stream is on the idea of SliceGPT (arXiv 2401.15024). Added here:
         a stream width that is exact under plain LayerNorm, Fisher weights without labels, one allocation over all axes.
Takes    a ViT, a budget, and a few hundred unlabelled images.
Gives    a spec with smaller ranks, hidden widths, stream and token counts, and refitted weights. No training; seconds to minutes.
How      1 sensitivity: a backward pass with random signs, how much the outputs mind a disturbance at each place.
         2 parts: for each block, every rank and every width from one set of sums over the dense stream.
         3 scores: what each part of each block costs alone, in output divergence (`fisher`), or measured (`measured`).
         4 plans: for each stream width the merges that lose least beside all else, at a price of operations; for each of these an
           exact allocation over blocks; losses add.
         5 builds: the best plans, front to back on the student's stream towards the dense one; the best on held-out images stays.
         Of many images, sums for scores and trial builds take as many as make enough tokens (`score.ROWS`, `SENSED`, `SCORED`).
Departs  from our own sheet: scores and choices are made on the held-out quarter of the images; the network that stays is built
         once more from all of them.

Its files: `config`, `choose` (2, 4), `merges` (4), `score` (1 to 3), `build` (5), and here the calls.
"""

from __future__ import annotations

import hashlib
import statistics
import tempfile
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Unpack

from vitrim import surgery
from vitrim.budget import Budget, exceeded
from vitrim.checkpoints import Journal, Piece, identity_of
from vitrim.counting import cost
from vitrim.errors import ConfigError
from vitrim.methods.auto.build import Refit
from vitrim.methods.auto.choose import PARTS, Candidate, Nets, Scores, best_candidates, nets_of
from vitrim.methods.auto.config import AutoConfig
from vitrim.methods.auto.score import Inputs, Job, score, warnings_of
from vitrim.methods.fitting import alone
from vitrim.methods.method import How
from vitrim.model import Vit
from vitrim.progress import Progress
from vitrim.result import Compressed
from vitrim.spec import SelectionStep, spec_hash

CHECKED = 16
"""Images on which is measured what each block of a trial network adds to the divergence."""


def compress(model: Vit, config: AutoConfig, **how: Unpack[How]) -> Compressed:
    """Cut `model` to the config's budget on all its axes; no training, and `model` is left as it was.

    data: images, whatever `vitrim.data.open` takes (its training split, labels unused); a float tensor [n, C, h, w] is taken as
    the network's own input if the model says no preprocessing. folder: where finished pieces of work are noted, so that with
    `resume` a killed run goes on from them to the same result.
    Raises BudgetError, before anything is read, when the budget is out of reach; ConfigError where an axis does not apply;
    DataError for images that are none, too few, or all equal.
    """
    return alone("auto", compress_family, model, config, **how)


def compress_family(model: Vit, config: AutoConfig, budgets: Sequence[Budget], **how: Unpack[How]) -> list[Compressed]:
    """A network for each budget, in their order, from one scoring. The config's own budget does not count. Else as `compress`."""
    nets = _reachable(model, config, budgets)
    whole = nets.whole.reference
    cut = [bool(exceeded(whole, budget.limits(whole))) for budget in budgets]
    if not any(cut):
        return [_untouched(model, config, nets) for _ in budgets]
    with tempfile.TemporaryDirectory(prefix="vitrim-auto-") as temporary:
        job = job_of(model, config, nets, Path(temporary), **how)
        scores = score(job)
        return [
            _one(job, scores, budget) if goes else _untouched(model, config, nets)
            for budget, goes in zip(budgets, cut, strict=True)
        ]


def predict(model: Vit, config: AutoConfig, budgets: Sequence[Budget], **how: Unpack[How]) -> list[dict[str, Any]]:
    """For each budget what would be cut and the divergence predicted for it, before anything is built; plain JSON values."""
    nets = _reachable(model, config, budgets)
    scores: Scores | None = None
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="vitrim-auto-") as temporary:
        for budget in budgets:
            limits = budget.limits(nets.whole.reference)
            if not exceeded(nets.whole.reference, limits):
                found = _described(nets)
            else:
                scores = scores or score(job_of(model, config, nets, Path(temporary), **how))
                found = _described(nets, scores, best_candidates(nets, scores, limits, count=1)[0])
            rows.append({"budget": budget.to_dict(), **found})
    return rows


def _reachable(model: Vit, config: AutoConfig, budgets: Sequence[Budget]) -> Nets:
    if not budgets:
        raise ConfigError("auto: no budgets; expected one or more.")
    nets = nets_of(model.spec, config)
    for budget in budgets:
        budget.refuse_unreachable(floor=nets.floor(budget), reference=nets.whole.reference, method="auto")
    return nets


def job_of(
    model: Vit,
    config: AutoConfig,
    nets: Nets,
    scratch: Path,
    *,
    data: Any = None,
    progress: Progress | None = None,
    folder: Path | None = None,
    resume: bool = False,
) -> Job:
    """A run. scratch: for held streams."""
    inputs = Inputs(model, data, config, nets)
    free = ("budget", "builds", "device")  # a run may be gone on with under others
    identity = identity_of(config, free=free, given=model.spec, weights=model, data=inputs.mark)
    journal = Journal(folder, "auto", identity, resume=resume)
    folded = surgery.fold_layer_scale(model, skip=nets.whole.fixed)
    base = surgery.with_spec(folded, nets.base, folded.state_dict(), share=True).eval()
    if config.device is not None:
        base = base.to(config.device)
    return Job(
        model=model,
        base=base,
        scratch=scratch,
        progress=progress,
        nets=nets,
        config=config,
        inputs=inputs,
        journal=journal,
    )


def _untouched(model: Vit, config: AutoConfig, nets: Nets) -> Compressed:
    """The network as it is, for a budget that it meets."""
    nothing = (None,) * len(model.blocks)
    record = SelectionStep(method="auto", variant=config.score, parent=spec_hash(model.spec), blocks=nothing)
    same = surgery.with_spec(model, model.spec, model.state_dict(), record)
    zero: dict[str, Any] = {"predicted_kl": 0.0, "reached_kl": 0.0}
    report = {"variant": config.score, **zero, "blocks": [], "dense": nets.whole.dense, "warnings": []}
    return Compressed(model=same, method="auto", variant=config.score, report=report)


def _one(job: Job, scores: Scores, budget: Budget) -> Compressed:
    """The best of the built plans for a budget."""
    nets, config = job.nets, job.config
    plans = best_candidates(nets, scores, budget.limits(nets.whole.reference), count=config.builds)
    candidates = []
    for number, one in enumerate(plans):
        name = f"build-{_name(one)}"
        job.tell("candidates", number, len(plans), predicted=scores.total(nets, one))
        reached = job.kept(f"{name}-reached", partial(_reached, job, one, name)).values
        described = _described(nets, scores, one)
        candidates.append(described | {"reached_kl": reached["reached"], **_agreement(described, reached["blocks"])})
    job.tell("candidates", len(plans), len(plans))
    best = min(range(len(plans)), key=lambda n: (candidates[n]["reached_kl"], n))
    small = Refit(job, plans[best], "all", f"final-{_name(plans[best])}").build()
    small = small.to(next(job.model.parameters()).device).train(job.model.training)
    shown = ("width", "steps", "macs", "params", "predicted_kl", "reached_kl")
    report = {
        "variant": config.score,
        "metric": job.product.metric,
        **candidates[best],
        "candidates": [{name: row[name] for name in shown} for row in candidates],
        "widths": {str(w): loss for w, loss in scores.widths.items()},
        "images": {name: len(job.inputs.rows[name]) for name in ("all", "fit", "held")},
        "dense": nets.whole.dense,
        "warnings": warnings_of(nets, job.inputs),
    }
    history = [
        {"stage": "candidate", **{n: row[n] for n in ("width", "predicted_kl", "reached_kl")}} for row in candidates
    ]
    return Compressed(model=small, method="auto", variant=config.score, history=history, report=report)


def _reached(job: Job, plan: Candidate, name: str) -> Piece:
    """The divergence of a plan's network, built from images that do not judge it, and of its first blocks with the rest dense."""
    trial = Refit(job, plan, "few", name)
    reached = job.divergence(trial.build())
    return Piece({}, {"reached": reached, "blocks": trial.losses_by_block(CHECKED)})


def _agreement(described: dict[str, Any], totals: Sequence[float]) -> dict[str, Any]:
    """How well the plan foretold what becoming its block adds to the divergence.  totals: after 0, 1, ... blocks.

    blocks: with `reached_kl` of each. rank_correlation: Spearman's, of predicted and reached over the blocks; None where all are
    alike. predicted_kl is the sum of the predicted ones, with that of the stream's width, which `totals` begin with.
    """
    added = [after - before for before, after in pairwise(totals)]
    foretold = [row["predicted_kl"] for row in described["blocks"]]
    blocks = [{**row, "reached_kl": value} for row, value in zip(described["blocks"], added, strict=True)]
    return {"blocks": blocks, "rank_correlation": _rank_correlation(foretold, added)}


def _rank_correlation(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Spearman's; ties have their mean rank. None where it is not defined."""
    ranks = [_ranks(values) for values in (one, other)]
    if min(len(set(values)) for values in ranks) < 2:
        return None
    return statistics.correlation(*ranks)


def _ranks(values: Sequence[float]) -> list[float]:
    ordered = sorted(values)
    return [ordered.index(value) + (ordered.count(value) - 1) / 2 for value in values]


def _merged(scores: Scores | None, plan: Candidate) -> dict[int, float]:
    """What the token steps of each block are predicted to lose, where they were planned block by block."""
    if scores is None or scores.merges is None:
        return {}
    totals = [scores.merges.total(plan.steps[:n]) for n in range(len(plan.steps) + 1)]
    return {i: after - before for (i, _), (before, after) in zip(plan.steps, pairwise(totals), strict=True)}


def _name(plan: Candidate) -> str:
    return hashlib.sha256(repr(plan).encode()).hexdigest()[:12]


def _described(nets: Nets, scores: Scores | None = None, plan: Candidate | None = None) -> dict[str, Any]:
    """A plan and its prediction, as plain JSON values; of none the network as given, for a budget that it meets."""
    one = plan or nets.uncut()
    spec = nets.whole.given if plan is None else nets.spec(plan)
    at = cost(spec)
    merged = _merged(scores, one)
    rows = [
        {"block": i, "predicted_kl": scores.loss(nets, i, choice) + merged.get(i, 0.0) if scores else 0.0}
        | {name: [getattr(choice, name), getattr(whole, name)] for name in PARTS}
        for i, (choice, whole) in enumerate(zip(one.choices, nets.whole.whole, strict=True))
    ]
    steps = [
        {"block": i, "kind": type(s).__name__.lower(), **{n: getattr(s, n) for n in s.__slots__}} for i, s in one.steps
    ]
    return {
        "predicted_kl": scores.total(nets, one) if scores else 0.0,
        "width": [one.width, nets.base.width],
        "steps": steps,
        "exact_tail": surgery.has_exact_tail(spec),
        "macs": at.macs,
        "params": at.params,
        "blocks": rows,
    }
