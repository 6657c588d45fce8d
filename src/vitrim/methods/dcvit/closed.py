"""The closed form's network: choices of the least predicted loss, then a refit front to back."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
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
from vitrim.model import Stream, Vit
from vitrim.space import Choice, Space
from vitrim.spec import ModelSpec
from vitrim.surgery import Keep


def allocate(
    space: Space, losses: Sequence[Mapping[Choice, float]], budget: Budget, *, sighted: bool = False
) -> tuple[Choice, ...]:
    """The choices of least total predicted loss within the budget; what whole steps leave of it is filled.

    losses: by block, of each of its choices. sighted: keep an attention if the budget allows it, whatever the sum of losses
    says: what is added up block by block does not know that a class token behind none sees no image.
    Raises BudgetError when even the cheapest choices are above.
    """
    budget.refuse_unreachable(floor=space.floor, reference=space.reference, method="dcvit")
    limits = budget.limits(space.reference)
    allocator = Allocator(space, lambda i, choice: losses[i][choice])
    if allocator.fits(space.whole, limits):
        return space.whole
    starts = [allocator.solve(limits) or space.lowest]
    if sighted and not any(choice.attention for choice in starts[0]):
        seeing = [i for i, choice in enumerate(space.whole) if choice.attention]
        found = [allocator.solve(limits, partial(_sees, seeing=i)) for i in seeing]
        starts = [one for one in found if one is not None] or starts
    currency = next((name for name in ADDITIVE if name in limits), "params")
    plans = [
        allocator.filled(one, limits, currency, lambda i, _: space.levels[i].hidden[-1], regain=True) for one in starts
    ]
    return min(plans, key=allocator.total)


def _sees(i: int, choice: Choice, *, seeing: int) -> bool:
    return i != seeing or choice.attention


def keeps_of(space: Space, chosen: Sequence[Choice], scores: Sequence[Score]) -> list[Keep | None]:
    """What stays of each block, as `surgery.cut` takes it; None where nothing goes."""
    keeps: list[Keep | None] = []
    for dense, option, one in zip(space.whole, chosen, scores, strict=True):
        if option == dense:
            keeps.append(None)
            continue
        hidden = None
        if 0 < option.hidden < dense.hidden:
            curve = one.whole if option.attention == dense.attention else one.bare
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
    walk = cf.Walk(job.inputs.streams(base), folder=job.room, device=device)
    width, count = base.spec.width, len(keeps)
    changed = False  # whether the student's stream differs from the teacher's behind what was done so far
    began = time.monotonic()
    for i, keep in enumerate(keeps):
        tb, new = base.blocks[i], small.blocks[i]
        carries = config.hand_over and _loses_next(base.spec, keeps, i)
        if new.spec.attention is not None and (i, "attention") not in fixed and (changed or carries):
            # what an MLP behind token steps would be given back has other rows than the heads
            carries_here = carries and not tb.has_steps("mid")
            site = None if sites is None else sites[f"mid:{i}"]
            folds = _Folds(new.attention.out.in_features, width, device=device, lost=carries_here)
            for number, rows in enumerate(walk.attention(tb, new)):
                lost = _lost(base, small, i, tb.transform(rows.aim).stream) if carries_here else None
                folds.add(number, rows, lost, site)
            out = new.attention.out
            last = sublayers.Last(sublayers.double(out.weight).T, bias=out.bias is not None)
            _refit(out, out.bias, last, folds, None, metric_of(site, device))
            changed = True
        if new.spec.mlp is not None and (i, "mlp") not in fixed and (changed or keep is not None or carries):
            site = None if sites is None else sites[f"block:{i}"]
            folds = _Folds(new.spec.mlp.hidden, width, device=device, lost=carries)
            for number, rows in enumerate(walk.mlp(tb, new)):
                folds.add(number, rows, _lost(base, small, i, rows.aim) if carries else None, site)
            _refit(new.mlp.reader, new.mlp.fc2.bias, last_linear(new), folds, config.ridge, metric_of(site, device))
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


def _lost(base: Vit, small: Vit, index: int, stream: Stream) -> Tensor:
    """What the teacher adds to its stream behind block `index` with the halves that the student has lost right there."""
    return cf.lookahead(base, small, index, stream).x - stream.x


class _Folds:
    """Regressions of one half in folds: of its own target, and of the update that is lost right behind it."""

    def __init__(self, inputs: int, width: int, *, device: torch.device, lost: bool) -> None:
        self.width, self.lost = width, lost
        outputs = 2 * width if lost else width
        self.folds = [cf.Regression.empty(inputs, outputs, device=device) for _ in range(FOLDS)]

    def add(self, number: int, rows: cf.Rows, lost: Tensor | None, site: cf.Sensitivity | None) -> None:
        """Batch `number`.  lost: [B, N, D]."""
        y = rows.goal if lost is None else torch.cat([rows.goal, lost], dim=-1)
        self.folds[number % FOLDS].add(rows.inputs, y, weights_of(site, rows.goal))

    def split(self) -> tuple[list[cf.Regression], list[cf.Regression]]:
        """Folds of the own target and of what is lost (none if nothing is)."""
        if not self.lost:
            return self.folds, []
        eye = torch.eye(2 * self.width)
        return ([f.on(eye[:, : self.width]) for f in self.folds], [f.on(eye[:, self.width :]) for f in self.folds])


def _refit(
    linear: nn.Linear,
    bias: Tensor | None,
    last: sublayers.Last,
    folds: _Folds,
    ridge: float | None,
    metric: Tensor | None,
) -> None:
    """New weights and bias: the own target with a ridge towards the inherited weights, the lost update with one towards none."""
    own, lost = folds.split()
    ridge = ridge or _left_out(own, last, metric)
    w, b = sublayers.refitted(cf.total(own), last, metric, ridge=ridge, keep=None)
    if lost:
        nothing = last._replace(prior=torch.zeros_like(last.prior))
        ridge = _left_out(lost, nothing, metric, (*cf.RIDGES, 10.0, 1e6))
        more, shift = sublayers.refitted(cf.total(lost), nothing, metric, ridge=ridge, keep=None)
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
