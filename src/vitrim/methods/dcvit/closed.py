"""The closed form's network: choices of the least predicted loss, then a refit front to back."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from vitrim import closed_form as cf
from vitrim import surgery
from vitrim.allocation import Allocator
from vitrim.budget import Budget
from vitrim.closed_form import sublayers
from vitrim.counting import ADDITIVE
from vitrim.methods.dcvit.job import FOLDS, Job
from vitrim.methods.dcvit.score import Score, last_linear, metric_of, weights_of
from vitrim.model import Block, Vit
from vitrim.space import Choice, Space
from vitrim.spec import ModelSpec
from vitrim.surgery import Keep


def allocate(space: Space, losses: Sequence[Mapping[Choice, float]], budget: Budget) -> tuple[Choice, ...]:
    """The choices of least total predicted loss within the budget; what whole steps leave of it is filled.

    losses: by block, of each of its choices. Raises BudgetError when even the cheapest choices are above.
    """
    budget.refuse_unreachable(floor=space.floor, reference=space.reference, method="dcvit")
    limits = budget.limits(space.reference)
    allocator = Allocator(space, lambda i, choice: losses[i][choice])
    if allocator.fits(space.whole, limits):
        return space.whole
    starts = allocator.solutions(limits) or [space.lowest]
    currency = next((name for name in ADDITIVE if name in limits), "params")
    plans = [
        allocator.filled(one, limits, currency, lambda i, _: space.levels[i].hidden[-1], regain=True) for one in starts
    ]
    return min(plans, key=allocator.total)


def keeps_of(space: Space, chosen: Sequence[Choice], scores: Sequence[Score]) -> list[Keep | None]:
    """What stays of each block, as `surgery.cut` takes it; None where nothing goes."""
    keeps: list[Keep | None] = []
    for dense, option, one in zip(space.whole, chosen, scores, strict=True):
        if option == dense:
            keeps.append(None)
            continue
        hidden = None
        if 0 < option.hidden < dense.hidden:
            curve = one.curve(option, dense)
            assert curve is not None
            hidden = curve.kept(option.hidden)
        keeps.append(Keep(attention=option.attention, mlp=option.mlp, hidden=hidden))
    return keeps


@torch.no_grad()
def reconstruct(job: Job, keeps: Sequence[Keep | None], sites: Mapping[str, cf.Sensitivity] | None) -> Vit:
    """Cut, then refit front to back: on the stream that the cut network has by then, towards the teacher's.

    With `hand_over`, a half also takes on what it can foretell of the update that is lost right behind it. Halves in front
    of the first change, and frozen ones, are left alone.
    """
    base, config, fixed, device = job.base, job.config, job.space.fixed, job.device
    small = surgery.cut(base, keeps, method="dcvit", variant="closed", skip=fixed)
    if all(keep is None for keep in keeps):
        return small
    walk = cf.Walk(job.inputs.streams(base), folder=job.scratch, device=device)
    count = len(keeps)
    changed = False  # whether the student's stream differs from the teacher's behind what was done so far
    began = time.monotonic()
    for i, keep in enumerate(keeps):
        tb, new = base.blocks[i], small.blocks[i]
        carries = config.hand_over and _loses_next(base.spec, keeps, i)
        if new.spec.attention is not None and (i, "attention") not in fixed and (changed or carries):
            # what an MLP behind token steps would be given back has other rows than the heads
            carries_here = carries and not tb.has_steps("mid")
            out, site = new.attention.out, None if sites is None else sites[f"mid:{i}"]
            last = sublayers.Last(sublayers.double(out.weight).T, bias=out.bias is not None)
            lost = partial(_lost, base, small, i, tb) if carries_here else None
            _refit(out, out.bias, last, walk.attention(tb, new), site, ridge=None, lost=lost, device=device)
            changed = True
        if new.spec.mlp is not None and (i, "mlp") not in fixed and (changed or keep is not None or carries):
            site = None if sites is None else sites[f"block:{i}"]
            linear, bias, last = new.mlp.reader, new.mlp.fc2.bias, last_linear(new)
            lost = partial(_lost, base, small, i, None) if carries else None
            _refit(linear, bias, last, walk.mlp(tb, new), site, ridge=config.ridge, lost=lost, device=device)
            changed = True
        if i + 1 < count:
            changed = changed or keep is not None
            walk.advance(tb, new, apart=changed)
        job.time_left("refit", i + 1, count, began)
    return small


def _loses_next(spec: ModelSpec, keeps: Sequence[Keep | None], index: int) -> bool:
    """Whether what comes right behind block `index` is lost: the next block's attention, if there was one."""
    if index + 1 >= len(spec.blocks) or (keep := keeps[index + 1]) is None:
        return False
    block = spec.blocks[index + 1]
    return (block.attention is not None and not keep.attention) or (block.attention is None and not keep.mlp)


def _lost(base: Vit, small: Vit, index: int, rest: Block | None, rows: cf.Rows) -> Tensor:
    """What the teacher adds to its stream behind block `index` with the halves that the student has lost right there.  [B, N, D]

    rest: the teacher's block, whose MLP comes behind the half that the rows are of; None: nothing comes.
    """
    stream = rows.aim if rest is None else rest.transform(rows.aim).stream
    return cf.lookahead(base, small, index, stream).x - stream.x


def _refit(
    linear: nn.Linear,
    bias: Tensor | None,
    last: sublayers.Last,
    rows: Iterable[cf.Rows],
    site: cf.Sensitivity | None,
    *,
    ridge: float | None,
    lost: Callable[[cf.Rows], Tensor] | None,
    device: torch.device,
) -> None:
    """New weights and bias: the own target with a ridge towards the inherited weights, the lost update with one towards none.

    lost: the update that is lost right behind, of the same rows. ridge: of the own target; None: as images left out say.
    """
    metric, width = metric_of(site, device), linear.out_features if last.outputs is None else len(last.outputs)
    eye = torch.eye(width if lost is None else 2 * width)
    folds = [cf.Regression.empty(len(last.prior), len(eye), device=device) for _ in range(FOLDS)]
    for number, row in enumerate(rows):
        y = row.goal if lost is None else torch.cat([row.goal, lost(row)], dim=-1)
        folds[number % FOLDS].add(row.inputs, y, weights_of(site, row.goal))
    own = folds if lost is None else [fold.on(eye[:, :width]) for fold in folds]
    ridge = ridge or _left_out(own, last, metric)
    w, b = sublayers.refitted(cf.total(own), last, metric, ridge=ridge, keep=None)
    if lost is not None:
        behind = [fold.on(eye[:, width:]) for fold in folds]
        nothing = last._replace(prior=torch.zeros_like(last.prior))
        ridge = _left_out(behind, nothing, metric, (*cf.RIDGES, 10.0, 1e6))
        more, shift = sublayers.refitted(cf.total(behind), nothing, metric, ridge=ridge, keep=None)
        w, b = w + more, None if b is None or shift is None else b + shift
    linear.weight.copy_(w.T)
    if b is not None:
        assert bias is not None
        bias.copy_(b)


def _left_out(
    folds: Sequence[cf.Regression], last: sublayers.Last, metric: Tensor | None, ridges: Sequence[float] = cf.RIDGES
) -> float:
    """The ridge that does best on images left out."""
    seen = [sublayers.seen(fold, last, metric) for fold in folds]
    return cf.choose_ridge([s for s, _ in seen], last.prior, bias=last.bias, metric=seen[0][1], ridges=ridges)
