"""The closed form's scores: what each block minds, measured on the output from the stream that the dense model hands it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice, pairwise

import numpy as np
import torch
from torch import Tensor

from vitrim import checkpoints
from vitrim import closed_form as cf
from vitrim.checkpoints import Piece
from vitrim.closed_form import sublayers
from vitrim.methods.dcvit.job import FOLDS, Job
from vitrim.methods.dcvit.structure import unit
from vitrim.model import Block, Stream
from vitrim.space import Choice


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One way to cut an MLP. order [M], errors [M + 1]: of the elimination.

    levels, losses: kept widths at which the effect on the output was measured, and the effect.
    """

    order: Tensor
    errors: Tensor
    ridge: float
    levels: list[int]
    losses: list[float]

    def loss(self, hidden: int) -> float:
        """Predicted effect on the output at a width: measured effects joined by powers of the local error."""
        known = sorted((self._error(m), max(loss, 1e-300)) for m, loss in zip(self.levels, self.losses, strict=True))
        errors = [error for error, _ in known]
        losses = [float(v) for v in np.maximum.accumulate([loss for _, loss in known])]
        here = self._error(hidden)
        if here <= errors[0]:
            return losses[0] * here / errors[0]
        for (e0, e1), (l0, l1) in zip(pairwise(errors), pairwise(losses), strict=True):
            if here <= e1:
                between = l0 * (l1 / l0) ** (math.log(here / e0) / max(math.log(e1 / e0), 1e-12))
                # nothing measured falls faster than the square: a level at rounding must not drag its neighbours down
                return max(between, l1 * (here / e1) ** 2)
        return losses[-1] * here / errors[-1]

    def _error(self, hidden: int) -> float:
        return max(float(self.errors[hidden]), 1e-300)

    def kept(self, hidden: int) -> tuple[int, ...]:
        """Units that stay at a width, ascending."""
        return tuple(sorted(int(u) for u in self.order[len(self.order) - hidden :]))


@dataclass(frozen=True, kw_only=True)
class Score:
    """What one block minds. whole: its curve with the attention kept; bare: without it; gone: the loss of all that it has.

    None: not on offer.
    """

    whole: Curve | None = None
    bare: Curve | None = None
    gone: float | None = None

    def curve(self, option: Choice, dense: Choice) -> Curve | None:
        """Of the MLP of an option, by whether the attention is as it was."""
        return self.whole if option.attention == dense.attention else self.bare

    def losses(self, offered: Sequence[Choice]) -> dict[Choice, float]:
        """Of each option; the first is the dense one."""
        dense, *others = offered
        found = {dense: 0.0}
        for option in others:
            curve = self.curve(option, dense)
            lost = self.gone if option == Choice() else None if curve is None else curve.loss(option.hidden)
            assert lost is not None
            found[option] = lost
        return found

    def packed(self) -> Piece:
        """As a journal keeps it."""
        return Piece(*checkpoints.pack("", asdict(self)))

    @staticmethod
    def unpacked(piece: Piece) -> Score:
        """From a journal."""
        values = checkpoints.unpack("", *piece)
        curves = {name: values[name] and Curve(**values[name]) for name in ("whole", "bare")}
        return Score(**curves, gone=values["gone"])


@dataclass
class Scoring:
    """What the blocks' scores are measured with."""

    job: Job
    held: cf.StreamCache
    sites: dict[str, cf.Sensitivity] | None
    answers: list[Tensor]
    probes: list[int]
    """Batches that measure; they are left out of the trial fits."""

    def site(self, index: int) -> cf.Sensitivity | None:
        return None if self.sites is None else self.sites[f"block:{index}"]


def metric_of(site: cf.Sensitivity | None, device: torch.device) -> Tensor | None:
    return None if site is None else site.metric.to("cpu" if device.type == "mps" else device)


def weights_of(site: cf.Sensitivity | None, rows: Tensor) -> Tensor | None:
    """Of the tokens of rows [B, N, D], [N]."""
    return None if site is None else site.weights(rows.shape[1]).to(rows)


@torch.no_grad()
def score_block(s: Scoring, index: int) -> Score:
    """Curves and measured losses of one block, from the stream that the dense model hands it.

    One pass over the held stream for the statistics, and one over the probe images for each candidate.
    """
    block = s.job.base.blocks[index]
    levels = s.job.space.levels[index]
    attends = {"whole": levels.whole.attention, "bare": False}
    folds = _block_statistics(s, index, whole=len(levels.hidden) > 1, bare=levels.off)
    curves = {name: _curve(s, index, own, attention=attends[name]) for name, own in folds.items()}
    gone = _measure(s, index, partial(_without_block, block)) if levels.empty else None
    return Score(**curves, gone=gone)


def _without_block(block: Block, stream: Stream) -> Stream:
    return block.end(block.mid(block.going(block.start(stream))))


def _block_statistics(s: Scoring, index: int, *, whole: bool, bare: bool) -> dict[str, list[cf.Regression]]:
    """In folds: of what the MLP adds (whole), and of what it would have to add without the attention (bare)."""
    names = [name for name, wanted in (("whole", whole), ("bare", bare)) if wanted]
    if not names:
        return {}
    block, site, device = s.job.base.blocks[index], s.site(index), s.job.device
    sizes = block.mlp.spec.hidden, s.job.base.spec.width
    folds = {name: [cf.Regression.empty(*sizes, device=device) for _ in range(FOLDS)] for name in names}
    for number, stream in enumerate(s.held.batches(device)):
        entry = block.start(stream)
        mid = block.attend(entry).stream
        inner = block.mid(mid)
        hidden = block.units(inner)
        update = block.mlp.finish(hidden)
        if whole:
            folds["whole"][number % FOLDS].add(hidden, update, weights_of(site, update))
        if bare:
            theirs, ours = cf.following(block, mid, block.going(entry), "mid")
            steps_ = block.has_steps("mid")  # the teacher's tokens may then be merged otherwise than on its own
            target = (block.transform(theirs).stream.x if steps_ else inner.x + update) - ours.x
            folds["bare"][number % FOLDS].add(block.units(ours), target, weights_of(site, target))
    return folds


def _curve(s: Scoring, index: int, folds: list[cf.Regression], *, attention: bool) -> Curve:
    """Ridge, order and errors from all images; effects measured on images that the trial fits have not seen."""
    block = s.job.base.blocks[index]
    linear = last_linear(block)
    metric = metric_of(s.site(index), folds[0].x.device)
    inner = [sublayers.seen(fold, linear, metric)[0] for fold in folds if fold.weight > 0]
    inner_metric = sublayers.seen(folds[0], linear, metric)[1]
    hidden = len(linear.prior)
    ridge = s.job.config.ridge or cf.choose_ridge(
        inner, linear.prior, keep=torch.arange(0, hidden, 2), bias=linear.bias, metric=inner_metric
    )
    found = cf.eliminate(cf.total(inner), linear.prior, ridge=ridge, bias=linear.bias, metric=inner_metric)
    trial = cf.total([fold for n, fold in enumerate(folds) if n % FOLDS != FOLDS - 1 and fold.weight > 0] or folds)
    loses = not attention and s.job.space.levels[index].whole.attention
    levels, losses = _levels(hidden, unit(hidden, s.job.config.align), top=loses), []
    for _, keep, w, b in sublayers.refitted_at(trial, linear, metric, found, levels, ridge=ridge):
        run = partial(_cut_block, block, attention=attention, linear=linear, keep=keep, w=w, b=b)
        losses.append(_measure(s, index, run))
    return Curve(order=found.order, errors=found.errors, ridge=ridge, levels=levels, losses=losses)


def last_linear(block: Block) -> sublayers.Last:
    """What is refitted of the MLP, with a bias where it has one."""
    return sublayers.last_linear(block.mlp, bias=block.mlp.spec.fc2_bias)


def _levels(hidden: int, step_: int, *, top: bool) -> list[int]:
    """Widths to measure at: a half, an eighth and the least; all of it too where the attention is gone."""
    found = {max(step_, hidden // 2), max(step_, hidden // 8), min(step_, hidden)}
    return sorted(found | ({hidden} if top else set()))


def _cut_block(
    block: Block, stream: Stream, *, attention: bool, linear: sublayers.Last, keep: Tensor, w: Tensor, b: Tensor | None
) -> Stream:
    """The block with a cut and refitted MLP, with or without its attention."""
    entry = block.start(stream)
    mid = block.attend(entry).stream if attention else block.going(entry)
    inner = block.mid(mid)
    update = block.units(inner)[..., keep.to(inner.x.device)] @ w.to(inner.x)
    if linear.outputs is not None:
        update = update @ linear.outputs.to(inner.x).mT
    if b is not None:
        update = update + b.to(inner.x)
    return block.end(inner._replace(x=inner.x + update))


def _measure(s: Scoring, index: int, run: Callable[[Stream], Stream]) -> float:
    """Divergence of the output on the probe images when block `index` is replaced by `run`."""
    found = [
        cf.answers(s.job.base, run(stream), index + 1, s.job.product.want).cpu()
        for number, stream in enumerate(s.held.batches(s.job.device))
        if number in s.probes
    ]
    return s.job.product.apart(torch.cat(s.answers), torch.cat(found))


@torch.no_grad()
def score(job: Job) -> tuple[list[Score], dict[str, cf.Sensitivity] | None]:
    """Scores of all blocks, in one walk of the dense stream, each noted in the job's journal; and the sensitivities."""
    base, inputs, config, device = job.base, job.inputs, job.config, job.device
    held = cf.StreamCache(job.scratch, "dense")
    held.fill(inputs.streams(base))
    number = len(held.parts)
    probes: list[int] = []
    left = config.probe_images
    for n in [*range(FOLDS - 1, number, FOLDS)] or [number - 1]:
        if left > 0:
            probes.append(n)
            left -= len(held.parts[n].x)
    want = job.product.want
    answers = [cf.answers(base, stream, 0, want).cpu() for n, stream in enumerate(held.batches(device)) if n in probes]
    journal = job.journal()
    s = Scoring(
        job=job, held=held, sites=_sensitivity(job) if config.weighted else None, answers=answers, probes=probes
    )
    scores: list[Score] = []
    began, fresh, total = time.monotonic(), 0, len(base.blocks)
    for i, block in enumerate(base.blocks):
        if (noted := journal.get(f"score-{i}")) is not None:
            scores.append(Score.unpacked(noted))
        else:
            scores.append(score_block(s, i))
            journal.put(f"score-{i}", *scores[i].packed())
            fresh += 1
            job.time_left("score", i + 1, total, began, fresh)
        if i + 1 < total:
            held.advance(block.run, device)
    return scores, s.sites


def _sensitivity(job: Job) -> dict[str, cf.Sensitivity]:
    inputs, few = job.inputs, -(-job.config.probe_images // job.inputs.batch_size)  # batches
    told = partial(job.tell, "sensitivity", total=min(few * inputs.batch_size, inputs.count))
    return cf.sensitivity(
        job.base, islice(inputs.batches(), few), product=job.product, seed=job.config.seed, progress=told
    )
