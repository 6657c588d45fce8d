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

The file in order: config; what is possible; options and allocation; images; closed form; fine-tuning; the calls.
"""

from __future__ import annotations

import io
import math
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import combinations, islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitrim import checkpoints, surgery
from vitrim import closed_form as cf
from vitrim import data as opened
from vitrim.allocation import Allocator
from vitrim.budget import Budget, exceeded
from vitrim.checkpoints import Journal, Piece
from vitrim.closed_form import fisher, sublayers
from vitrim.codec import plain
from vitrim.counting import ADDITIVE, Cost, cost
from vitrim.data.draws import mix, ranked
from vitrim.errors import BudgetError, ConfigError, DataError
from vitrim.freezing import Half, frozen
from vitrim.methods.dcvit.config import DcvitConfig
from vitrim.model import OPEN, Block, Stream, Vit
from vitrim.progress import Progress
from vitrim.result import Compressed
from vitrim.space import BlockLevels, Choice, Space, frozen_parts, jumps, outlook
from vitrim.spec import BlockSpec, ModelSpec, Preprocess, SelectionStep, spec_hash
from vitrim.surgery import Keep
from vitrim.training import Batch, Step, TrainConfig, fit
from vitrim.training.objectives import Plain

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
FOLDS = 4
"""Parts of the images of which one is left out at a time."""
_ORDER, _SUBSET, _NOISE = 0x6463_6F72, 0x6463_7375, 0x6463_6E6F


# -------------------------------------------------------------------------------------------------------- what is possible


def space_of(spec: ModelSpec, config: DcvitConfig) -> Space:
    """What may become of each block. Raises ConfigError when a frozen part is not there."""
    fixed = frozen(spec, config.freeze)
    dense = frozen_parts(fixed) | ({"classifier": "kept dense"} if spec.outputs else {})
    if config.variant == "closed":
        levels = [_closed_levels(block, i, fixed, align=config.align) for i, block in enumerate(spec.blocks)]
    else:
        levels = [_paper_levels(spec, i, fixed) for i in range(len(spec.blocks))]
        for i, one in enumerate(levels):
            if not one.off and f"block {i} attention" not in dense:
                ends = i in (0, len(levels) - 1)
                why = "first and last block are never compressed" if ends else "a half of it is gone or frozen"
                dense[f"block {i}"] = why
    base = surgery.with_folded(spec, skip=fixed)
    return Space(given=spec, base=base, fixed=fixed, levels=tuple(levels), dense=dense)


def unit(hidden: int, align: int) -> int:
    """Hidden units in one step: `align`, or an eighth of an MLP too narrow for eight of them."""
    return max(1, min(align, hidden // 8))


def _closed_levels(block: BlockSpec, i: int, fixed: frozenset[Half], *, align: int) -> BlockLevels:
    """Of `closed`: widths a unit apart, with or without the attention; or nothing."""
    whole = BlockLevels.whole_of(block)
    (m,) = whole.hidden
    may_lose = block.attention is not None and (i, "attention") not in fixed
    may_cut = m > 0 and (i, "mlp") not in fixed
    step_ = unit(m, align)
    return replace(
        whole,
        hidden=(m, *reversed(range(step_, m, step_))) if may_cut else (m,),
        off=may_lose and m > 0,
        empty=(may_lose or block.attention is None) and (may_cut or not m) and whole.whole != Choice(),
    )


def _paper_levels(spec: ModelSpec, i: int, fixed: frozenset[Half]) -> BlockLevels:
    """Of `finetune`: no attention and any width, for a block that is neither first nor last and has both halves, free."""
    whole = BlockLevels.whole_of(spec.blocks[i])
    here = whole.whole
    if not (0 < i < len(spec.blocks) - 1 and here.attention and here.mlp) or fixed & {(i, "attention"), (i, "mlp")}:
        return whole
    return replace(whole, hidden=tuple(range(here.hidden, 0, -1)), off=True)


def candidates(space: Space) -> list[int]:
    """Blocks that may lose their attention."""
    return [i for i, levels in enumerate(space.levels) if levels.off]


def narrowed(space: Space, hidden: Mapping[int, int]) -> tuple[Choice, ...]:
    """All blocks whole but these, which lose their attention and keep so many units."""
    return tuple(
        choice.without("attention")._replace(hidden=hidden[i]) if i in hidden else choice
        for i, choice in enumerate(space.whole)
    )


def _narrowed_cost(space: Space, hidden: Mapping[int, int]) -> Cost:
    return cost(space.spec(narrowed(space, hidden)))


def floor(spec: ModelSpec, config: DcvitConfig | None = None) -> Cost:
    """The cheapest network that the method makes of this spec; frozen parts stay."""
    config = config or DcvitConfig()
    return _floor(space_of(spec, config), config)


def _floor(space: Space, config: DcvitConfig) -> Cost:
    if config.variant == "closed":
        return space.floor
    found = candidates(space)[: config.k]
    return _narrowed_cost(space, dict.fromkeys(found, 1)) if found else space.reference


def step(spec: ModelSpec, config: DcvitConfig | None = None) -> dict[str, int]:
    """The largest jump in cost between neighbouring results, by resource (law 7): one attention, or one step of width."""
    config = config or DcvitConfig()
    space = space_of(spec, config)
    whole = cost(space.base)
    pairs = [(space.reference, whole)]
    for i, choice in enumerate(space.whole):
        after = [choice.without("attention")] if choice.attention else []
        if choice.hidden > 1:
            less = 1 if config.variant == "finetune" else unit(choice.hidden, config.align)
            after.append(choice._replace(hidden=choice.hidden - less))
        if choice.mlp and (choice.hidden == 1 or not choice.attention):
            after.append(choice.without("mlp"))
        pairs += [(whole, cost(space.spec(space.with_choice(i, one)))) for one in after]
    return jumps(pairs)


def plan(spec: ModelSpec, config: DcvitConfig | None = None) -> dict[str, Any]:
    """What can be said from the spec alone: range, step, needs, what stays dense.

    Raises BudgetError when the config's budget is out of reach, ConfigError when a frozen part is not there.
    """
    config = config or DcvitConfig()
    space = space_of(spec, config)
    if config.budget is not None:
        _check_budget(space, config, config.budget)
    trains = config.variant == "finetune" or config.finetune_steps > 0
    return outlook(
        "dcvit",
        config.variant,
        config.budget,
        floor=_floor(space, config),
        reference=space.reference,
        tolerance=step(spec, config),
        needs={"images": config.images, "labels": False, "training": trains},
        dense=space.dense,
    )


def _check_budget(space: Space, config: DcvitConfig, budget: Budget) -> None:
    """Raise BudgetError, with the range or the reason, where the variant cannot meet the budget."""
    if config.variant == "finetune":
        structure(space, config, budget)
    budget.refuse_unreachable(floor=_floor(space, config), reference=space.reference, method="dcvit")


# ------------------------------------------------------------------------------------------- structure of the paper's form


def solve(total: float, attention: float, mlp: float, width: int, keep: float) -> tuple[int, float, int]:
    """k, r and m = floor(width r) of the released code, from a kept share of `total` (section 4 of the code's solver).

    attention, mlp: what one block's attention (with its norm) and its dense MLP of ratio 4 cost, in the unit of `total`.
    Raises BudgetError where less than one attention has to go.
    """
    gone = (1 - keep) * total
    if gone < attention:
        raise BudgetError(
            f"keep {keep!r}: {gone / total:.2%} would have to go, and one attention is {attention / total:.2%}, the least "
            f"that this form removes. Keep {1 - attention / total:.4f} or less, or choose variant='closed'."
        )
    k = math.ceil(gone / (attention + mlp) - 1e-12)
    ratio = 4 * (1 - (gone / k - attention) / mlp)
    return k, ratio, math.floor(width * ratio + 1e-6)


def paper_counts(spec: ModelSpec) -> tuple[int, int, int]:
    """Total, attention and MLP of a block in the authors' counting: linears and norms, no attention products.

    Of an untouched ViT with blocks alike; raises ConfigError for another.
    """
    alike = len({(b.attention, b.mlp, b.steps) for b in spec.blocks}) == 1
    block = spec.blocks[0] if spec.blocks else BlockSpec(attention=None, mlp=None)
    if not alike or block.attention is None or block.mlp is None or block.steps or block.mlp.kind == "swiglu":
        raise ConfigError("dcvit: preset 'paper' counts blocks that are all alike and whole; choose preset='clean'.")
    if block.mlp.hidden != 4 * spec.width:
        raise ConfigError("dcvit: preset 'paper' knows MLPs four times as wide as the stream; choose preset='clean'.")
    n, d = len(spec.prefix) + math.prod(spec.grid), spec.width
    attention, mlp, norm = 4 * n * d * d + 4 * n * d, 8 * n * d * d, 4 * n * d
    whole = cost(spec)
    total = whole.stem_macs + whole.head_macs + len(spec.blocks) * (attention + mlp + norm) + norm
    return total, attention, mlp


@dataclass(frozen=True, kw_only=True)
class Structure:
    """How many blocks are compressed, and how many units each would keep if it were chosen first.

    counted: whose MACs it was solved in. The authors' leave out the attention products; where their structure ends above
    the budget in this project's, preset `paper` takes this project's too, and the report says so.
    """

    k: int
    hidden: dict[int, int]
    counted: str = "all products"


def structure(space: Space, config: DcvitConfig, budget: Budget) -> Structure:
    """k and the common share of hidden units, before any block is chosen: k is the least that the budget allows.

    Blocks that cost differently: for the k cheapest, so that whichever are chosen, the budget can be met.
    Raises BudgetError where no k fits.
    """
    reference, limits, found = space.reference, budget.limits(space.reference), candidates(space)
    if not exceeded(reference, limits):
        return Structure(k=0, hidden={})
    if not found:
        raise BudgetError(
            f"dcvit: variant 'finetune' compresses blocks between the first and the last, and none of {len(space.levels)} is "
            "left whole and free. Choose variant='closed'."
        )
    if config.preset == "paper":
        if set(limits) != {"macs"}:
            raise ConfigError("dcvit: preset 'paper' meets MACs alone; choose preset='clean' for other limits.")
        total, attention, mlp = paper_counts(space.base)
        k, _, m = solve(total, attention, mlp, space.base.width, limits["macs"] / reference.macs)
        if k <= len(found) and m >= 1 and not exceeded(_narrowed_cost(space, dict.fromkeys(found[:k], m)), limits):
            return Structure(k=k, hidden=dict.fromkeys(found, m), counted="as the authors count")
    main = next(iter(limits))
    cheapest = sorted(found, key=lambda i: getattr(reference, main) - getattr(_narrowed_cost(space, {i: 1}), main))
    for k in range(1, len(found) + 1) if config.k is None else (config.k,):
        if k > len(found):
            raise BudgetError(f"dcvit: k={k} blocks; only {len(found)} can be compressed. Lower k.")
        hidden = widest(space, cheapest[:k], limits)
        if hidden is None:
            continue
        if all(hidden[i] == space.whole[i].hidden for i in hidden):
            _refuse_gentle(space, hidden, limits)
        share = min(hidden[i] / space.whole[i].hidden for i in hidden)
        every = {i: max(1, math.floor(share * space.whole[i].hidden + 1e-6)) for i in found}
        return Structure(k=k, hidden=every | hidden)
    least = _narrowed_cost(space, dict.fromkeys(found, 1))
    budget.refuse_unreachable(floor=least, reference=reference, method="dcvit")
    raise BudgetError(f"dcvit: k={config.k} blocks cannot meet the budget; raise k, or leave it out.")


def _refuse_gentle(space: Space, hidden: Mapping[int, int], limits: Mapping[str, int]) -> None:
    """Raise BudgetError where the attentions of these blocks are much more than the limits ask for."""
    reference, after = space.reference, _narrowed_cost(space, hidden)
    if all(limits[name] - getattr(after, name) > 0.01 * getattr(reference, name) for name in limits):
        gone = ", ".join(f"{getattr(reference, n) - getattr(after, n):,} {n}" for n in limits)
        raise BudgetError(
            f"dcvit: variant 'finetune' removes at least one attention for each block it compresses, {gone} here, which is more "
            "than the budget asks for. Lower the budget or k, or choose variant='closed'."
        )


def widest(
    space: Space, blocks: Sequence[int], limits: Mapping[str, int], beside: Mapping[int, int] | None = None
) -> dict[int, int] | None:
    """The widest MLPs of an equal share that meet the limits when these blocks lose their attention; None if none do.

    beside: units of blocks that have lost theirs already. What is left over goes to the first blocks, a unit each, so that
    the miss is below one unit.
    """
    dense = {i: space.whole[i].hidden for i in blocks}
    top = max(dense.values(), default=0)

    def at(tick: int) -> dict[int, int]:
        return {i: max(1, m * tick // top) for i, m in dense.items()}

    def fits(hidden: Mapping[int, int]) -> bool:
        return not exceeded(_narrowed_cost(space, {**(beside or {}), **hidden}), limits)

    if not fits(at(0)):
        return None
    low, high = 0, top
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(at(middle)) else (low, middle - 1)
    hidden = at(low)
    for i in blocks:
        if hidden[i] < dense[i] and fits(more := {**hidden, i: hidden[i] + 1}):
            hidden = more
    return hidden


# -------------------------------------------------------------------------------------------------------------- allocation


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


# ------------------------------------------------------------------------------------------------------------------ images


class Inputs:
    """The images as the network takes them, read anew by each pass, in an order drawn by seed. Labels stay unread."""

    def __init__(self, model: Vit, source: Any, config: DcvitConfig) -> None:
        if source is None:
            raise DataError(
                "dcvit: no images were given; expected 50 to 1000 unlabelled ones. Pass data=, such as a folder."
            )
        feed = opened.calibration_images(
            source, model.config.preprocess, count=config.images, seed=config.seed, method="dcvit"
        )
        self.images, self.mark, self.count = feed.images, feed.mark, len(feed)
        self.feed = feed
        if feed.images is not None:
            self.feed = opened.CalibrationImages(
                feed.preprocess, images=feed.images.subset(ranked(config.seed, _ORDER, feed.images.rows))
            )
        if not self.count:
            raise DataError("dcvit: no images. Pass 50 to 1000 unlabelled ones.")
        if self.count < 8:
            warnings.warn(
                f"dcvit: {self.count} images; expected 50 to 1000. The fit rests on their tokens alone.", stacklevel=4
            )
        self.batch_size = max(1, min(config.batch_size, self.count // (2 * FOLDS)))

    def batches(self) -> Iterator[Tensor]:
        """[B, C, h, w] each, the same in every pass."""
        return self.feed.batches(self.batch_size)

    def streams(self, model: Vit) -> Iterator[Stream]:
        """What enters the first block. Raises DataError when all images are equal."""
        like = next(model.parameters())
        first: Tensor | None = None
        differ = self.count == 1
        for x in self.batches():
            first = x[:1] if first is None else first
            differ = differ or bool((x != first).any())
            yield model.embed(x.to(like))
        if not differ:
            raise self.alike()

    def alike(self) -> DataError:
        return DataError(f"dcvit: all {self.count} images are equal; expected different photos. Check the folder.")


# ------------------------------------------------------------------------------------------- closed form: the score of a block


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
    """What one block minds. whole: its curve with the attention kept; bare: without it; gone: the loss of its drop.

    lost: the loss of its attention where it has no MLP. None: not on offer.
    """

    whole: Curve | None = None
    bare: Curve | None = None
    gone: float | None = None
    lost: float | None = None

    def losses(self, offered: Sequence[Choice]) -> dict[Choice, float]:
        """Of each option; the first is the dense one."""
        found: dict[Choice, float] = {}
        for n, option in enumerate(offered):
            if n == 0:
                found[option] = 0.0
            elif option == Choice():
                value = self.gone if self.gone is not None else self.lost
                assert value is not None
                found[option] = value
            else:
                curve = self.whole if option.attention == offered[0].attention else self.bare
                assert curve is not None
                found[option] = curve.loss(option.hidden)
        return found

    def packed(self) -> Piece:
        """As a journal keeps it."""
        return Piece(*checkpoints.pack("", asdict(self)))

    @staticmethod
    def unpacked(piece: Piece) -> Score:
        """From a journal."""
        values = checkpoints.unpack("", *piece)
        curves = {name: values[name] and Curve(**values[name]) for name in ("whole", "bare")}
        return Score(**curves, gone=values["gone"], lost=values["lost"])


@dataclass
class Scoring:
    """What the blocks' scores are measured with."""

    base: Vit
    held: cf.StreamCache
    sites: dict[str, cf.Sensitivity] | None
    config: DcvitConfig
    space: Space
    answers: list[Tensor]
    probes: list[int]
    """Batches that measure; they are left out of the trial fits."""

    def site(self, index: int, kind: str = "block") -> cf.Sensitivity | None:
        return None if self.sites is None else self.sites[f"{kind}:{index}"]


def _metric(site: cf.Sensitivity | None, device: torch.device) -> Tensor | None:
    return None if site is None else site.metric.to("cpu" if device.type == "mps" else device)


def _weights(site: cf.Sensitivity | None, rows: Tensor) -> Tensor | None:
    """Of the tokens of rows [B, N, D], [N]."""
    return None if site is None else site.weights(rows.shape[1]).to(rows)


@torch.no_grad()
def score_block(s: Scoring, index: int) -> Score:
    """Curves and measured losses of one block, from the stream that the dense model hands it.

    One pass over the held stream for the statistics, and one over the probe images for each candidate.
    """
    block = s.base.blocks[index]
    levels = s.space.levels[index]
    cuts, bares, attention = len(levels.hidden) > 1, levels.off, levels.whole.attention
    whole = bare = None
    if cuts or bares:
        folds = _block_statistics(s, index, whole=cuts, bare=bares)
        if cuts:
            whole = _curve(s, index, folds["whole"], attention=attention)
        if bares:
            bare = _curve(s, index, folds["bare"], attention=False)
    gone = _measure(s, index, partial(_without_block, block)) if levels.empty else None
    lost = None
    if not levels.whole.mlp:
        lost, gone = gone, None
    return Score(whole=whole, bare=bare, gone=gone, lost=lost)


def _without_block(block: Block, stream: Stream) -> Stream:
    return block.end(block.mid(block.going(block.start(stream))))


def _block_statistics(s: Scoring, index: int, *, whole: bool, bare: bool) -> dict[str, list[cf.Regression]]:
    block = s.base.blocks[index]
    site = s.site(index)
    m = s.base.spec.blocks[index].mlp
    assert m is not None
    device = next(s.base.parameters()).device
    names = [name for name, wanted in (("whole", whole), ("bare", bare)) if wanted]
    folds = {
        name: [cf.Regression.empty(m.hidden, s.base.spec.width, device=device) for _ in range(FOLDS)] for name in names
    }
    for number, stream in enumerate(s.held.batches(device)):
        entry = block.start(stream)
        mid = block.attend(entry).stream
        inner = block.mid(mid)
        hidden = block.units(inner)
        update = block.mlp.finish(hidden)
        if whole:
            folds["whole"][number % FOLDS].add(hidden, update, _weights(site, update))
        if bare:
            theirs, ours = cf.following(block, mid, block.going(entry), "mid")
            steps_ = block.has_steps("mid")  # the teacher's tokens may then be merged otherwise than on its own
            target = (block.transform(theirs).stream.x if steps_ else inner.x + update) - ours.x
            folds["bare"][number % FOLDS].add(block.units(ours), target, _weights(site, target))
    return folds


def _curve(s: Scoring, index: int, folds: list[cf.Regression], *, attention: bool) -> Curve:
    """Ridge, order and errors from all images; effects measured on images that the trial fits have not seen."""
    block = s.base.blocks[index]
    linear = _last_linear(block)
    metric = _metric(s.site(index), folds[0].x.device)
    inner = [sublayers.seen(fold, linear, metric)[0] for fold in folds if fold.weight > 0]
    inner_metric = sublayers.seen(folds[0], linear, metric)[1]
    hidden = len(linear.prior)
    ridge = s.config.ridge or cf.choose_ridge(
        inner, linear.prior, keep=torch.arange(0, hidden, 2), bias=linear.bias, metric=inner_metric
    )
    total = _sum(inner)
    found = cf.eliminate(total, linear.prior, ridge=ridge, bias=linear.bias, metric=inner_metric)
    trial = _sum([fold for n, fold in enumerate(folds) if n % FOLDS != FOLDS - 1 and fold.weight > 0] or folds)
    levels = _levels(
        hidden, unit(hidden, s.config.align), top=not attention and s.base.spec.blocks[index].attention is not None
    )
    losses = []
    for m in levels:
        keep = found.kept(m)
        w, b = sublayers.refitted(trial, linear, metric, ridge=ridge, keep=keep)
        run = partial(_cut_block, block, attention=attention, linear=linear, keep=keep, w=w, b=b)
        losses.append(_measure(s, index, run))
    return Curve(order=found.order, errors=found.errors, ridge=ridge, levels=levels, losses=losses)


def _last_linear(block: Block) -> sublayers.Last:
    """What is refitted of the MLP, with a bias where it has one."""
    return sublayers.last_linear(block.mlp, bias=block.mlp.spec.fc2_bias)


def _sum(folds: Sequence[cf.Regression]) -> cf.Regression:
    total = folds[0]
    for fold in folds[1:]:
        total = total + fold
    return total


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
    device = next(s.base.parameters()).device
    found = [
        cf.answers(s.base, run(stream), index + 1).cpu()
        for number, stream in enumerate(s.held.batches(device))
        if number in s.probes
    ]
    return _divergence(torch.cat(s.answers), torch.cat(found), classifies=bool(s.base.spec.outputs))


def _divergence(before: Tensor, after: Tensor, *, classifies: bool) -> float:
    """A mean over images, from what networks answered [B, ...]."""
    before, after = (fisher.outcome(answer.double(), classifies=classifies) for answer in (before, after))
    return float(fisher.divergence(before, after, classifies=classifies).mean())


@torch.no_grad()
def score(
    base: Vit,
    inputs: Inputs,
    config: DcvitConfig,
    *,
    space: Space,
    room: Path,
    folder: Path | None,
    resume: bool,
    progress: Progress | None,
) -> tuple[list[Score], dict[str, cf.Sensitivity] | None]:
    """Scores of all blocks, in one walk of the dense stream.  base: LayerScale folded.

    room: for held streams. folder: where each scored block is noted, so that a killed scoring goes on behind it.
    """
    device = next(base.parameters()).device
    held = cf.StreamCache(room, "dense")
    held.fill(inputs.streams(base))
    number = len(held.parts)
    probes: list[int] = []
    left = config.probe_images
    for n in [*range(FOLDS - 1, number, FOLDS)] or [number - 1]:
        if left > 0:
            probes.append(n)
            left -= len(held.parts[n].x)
    answers_ = [cf.answers(base, stream, 0).cpu() for n, stream in enumerate(held.batches(device)) if n in probes]
    journal = Journal(folder, "dcvit", _identity(base.spec, base, inputs, config), resume=resume)
    sites = None
    if config.weighted:

        def told(done: int) -> None:
            if progress is not None:
                progress("sensitivity", done, min(few * inputs.batch_size, inputs.count))

        few = -(-config.probe_images // inputs.batch_size)  # batches
        sites = cf.sensitivity(base, islice(inputs.batches(), few), seed=config.seed, progress=told)
    s = Scoring(base=base, held=held, sites=sites, config=config, space=space, answers=answers_, probes=probes)
    scores: list[Score] = []
    began, fresh = time.monotonic(), 0
    for i, block in enumerate(base.blocks):
        if (noted := journal.get(f"score-{i}")) is not None:
            scores.append(Score.unpacked(noted))
        else:
            scores.append(score_block(s, i))
            journal.put(f"score-{i}", *scores[i].packed())
            fresh += 1
            if progress is not None:
                each = (time.monotonic() - began) / fresh
                progress("score", i + 1, len(base.blocks), seconds_left=each * (len(base.blocks) - i - 1))
        if i + 1 < len(base.blocks):
            held.advance(block.run, device)
    return scores, sites


def _identity(spec: ModelSpec, model: Vit, inputs: Inputs, config: DcvitConfig) -> dict[str, Any]:
    """What must agree for noted scores to belong to this run. model: that is scored."""
    every = (
        "ridge",
        "weighted",
        "probe_images",
        "batch_size",
        "images",
        "seed",
        "align",
        "freeze",
        "variant",
        "preset",
    )
    more = ("steps", "lr", "metric_images", "metric_steps", "k")
    names = every if config.variant == "closed" else (*every, *more)
    values = {name: getattr(config, name) for name in names}
    if config.variant == "finetune":
        values["augment"] = plain(config.augment)
    weights_ = surgery.fingerprint(model)
    return {**values, "freeze": list(config.freeze), "spec": spec_hash(spec), "weights": weights_, "data": inputs.mark}


# ---------------------------------------------------------------------------------------------- closed form: the network


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
def reconstruct(
    base: Vit,
    keeps: Sequence[Keep | None],
    sites: Mapping[str, cf.Sensitivity] | None,
    inputs: Inputs,
    config: DcvitConfig,
    *,
    fixed: frozenset[Half],
    room: Path,
    progress: Progress | None,
) -> Vit:
    """Cut, then refit front to back: on the stream that the cut network has by then, towards the teacher's.

    With `hand_over`, a half also takes on what it can foretell of the update that is lost right behind it. Halves in front
    of the first change, and frozen ones, are left alone.
    """
    small = surgery.cut(base, keeps, method="dcvit", variant="closed", skip=fixed)
    if all(keep is None for keep in keeps):
        return small
    device = next(base.parameters()).device
    walk = cf.Walk(inputs.streams(base), folder=room, device=device)
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
            _refit(out, out.bias, last, folds, None, _metric(site, device))
            changed = True
        if new.spec.mlp is not None and (i, "mlp") not in fixed and (changed or keep is not None or carries):
            site = None if sites is None else sites[f"block:{i}"]
            folds = _Folds(new.spec.mlp.hidden, width, device=device, lost=carries)
            for number, rows in enumerate(walk.mlp(tb, new)):
                folds.add(number, rows, _lost(base, small, i, rows.aim) if carries else None, site)
            _refit(new.mlp.reader, new.mlp.fc2.bias, _last_linear(new), folds, config.ridge, _metric(site, device))
            changed = True
        if i + 1 < count:
            changed = changed or keep is not None
            walk.advance(tb, new, apart=changed)
        if progress is not None:
            each = (time.monotonic() - began) / (i + 1)
            progress("refit", i + 1, count, seconds_left=each * (count - i - 1))
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
        self.folds[number % FOLDS].add(rows.inputs, y, _weights(site, rows.goal))

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
    w, b = sublayers.refitted(_sum(own), last, metric, ridge=ridge, keep=None)
    if lost:
        nothing = last._replace(prior=torch.zeros_like(last.prior))
        ridge = _left_out(lost, nothing, metric, (*cf.RIDGES, 10.0, 1e6))
        more, shift = sublayers.refitted(_sum(lost), nothing, metric, ridge=ridge, keep=None)
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


# ----------------------------------------------------------------------------------------------------------- fine-tuning


class Mimic(Plain):
    """The teacher's token features after the final norm; squared error, a mean over all elements. No labels, no logits.

    Trains everything up to and including block `last`, and the final norm; later blocks and the classifier are frozen, and
    gradients pass through them. warmup_epochs: the released code's loss scaling, 0 in the first epoch; 0: none.
    """

    def __init__(self, teacher: Vit, *, last: int, fixed: frozenset[Half], warmup_epochs: int = 0) -> None:
        super().__init__()
        self.teacher, self.last, self.fixed, self.warmup_epochs = teacher, last, fixed, warmup_epochs

    def trained(self, name: str) -> bool:
        """Whether the parameter of this name learns."""
        parts = name.split(".")
        if parts[0] in ("heads", "pool", "pool_norm"):
            return False
        if parts[0] != "blocks":
            return True
        half = {"norm1": "attention", "norm2": "mlp"}.get(parts[2], parts[2])
        return int(parts[1]) <= self.last and (int(parts[1]), half) not in self.fixed

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        first = next(model.parameters())
        self.teacher = self.teacher.to(first.device)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and self.trained(name))
        return [{"params": [p for p in model.parameters() if p.requires_grad]}]

    def loss(self, model: nn.Module, batch: Batch, step: Step) -> Tensor:
        with torch.no_grad():
            aim = self.teacher(batch.images, gates=OPEN, want=("tokens",))["tokens"]
        found = model(batch.images, gates=OPEN, want=("tokens",))["tokens"]
        scale = min(1.0, step.epoch / self.warmup_epochs) if self.warmup_epochs else 1.0
        return scale * F.mse_loss(found, aim)


def finetune(
    student: Vit,
    teacher: Vit,
    inputs: Inputs,
    config: DcvitConfig,
    *,
    last: int,
    steps: int,
    fixed: frozenset[Half],
    out: Path | None,
    resume: bool,
    progress: Progress | None,
) -> Vit:
    """The student after section 8's fine-tuning; what was given is trained in place. Float32 (or the model's own) throughout."""
    assert inputs.images is not None  # `compress_family` has refused that
    paper = config.variant == "finetune" and config.preset == "paper"
    batch = min(64, inputs.count)
    settings = TrainConfig(
        steps=steps * -(-inputs.count // batch) if paper else steps,
        batch_size=batch,
        lr=config.lr,
        min_lr=0.0,
        warmup=0.0 if paper else min(0.5, 20 / max(steps, 40)),
        weight_decay=1e-4,
        clip=None,
        augment=config.augment,
        seed=config.seed,
        device=_kind(student),
        log_every=max(1, steps // 20),
    )
    own = student.config
    if paper and own.preprocess is not None and len(own.preprocess.mean) == 3:
        student.config = replace(own, preprocess=replace(own.preprocess, mean=IMAGENET[0], std=IMAGENET[1]))
    wanted = {name: p.requires_grad for name, p in student.named_parameters()}
    try:
        fit(
            student,
            Mimic(teacher, last=last, fixed=fixed, warmup_epochs=20 if paper else 0),
            inputs.images,
            settings,
            out=out,
            resume=resume,
            progress=progress,
        )
    finally:
        student.config = own
        for name, p in student.named_parameters():
            p.requires_grad_(wanted[name])
    return student


def _kind(model: Vit) -> Any:
    return next(model.parameters()).device.type


def synthesise(
    teacher: Vit, count: int, steps: int, *, seed: int, size_px: tuple[int, int], progress: Progress | None = None
) -> Tensor:
    """Images [count, C, h, w] that the teacher finds typical of as many classes, from noise: the metric set.

    DeepInversion (arXiv 1912.08795) without its feature term: cross entropy, total variation 1e-4, norm 1e-5; Adam 0.25
    with betas 0.5 and 0.9, 100 steps of warm-up, half a cosine. The whole batch with the lowest loss is kept. With fewer
    classes than images, classes repeat.
    """
    preprocess, spec = teacher.config.preprocess, teacher.spec
    assert spec.classes is not None
    like = next(teacher.parameters())
    generator = torch.Generator().manual_seed(int(mix(seed, _NOISE)[0] >> np.uint64(1)))
    shape = (count, spec.channels, *size_px)
    classes = torch.cat([torch.randperm(spec.classes, generator=generator) for _ in range(-(-count // spec.classes))])
    classes = classes[:count].sort().values.to(like.device)
    images = torch.randn(shape, generator=generator).to(like).requires_grad_()
    low = high = None
    if preprocess is not None:
        mean, std = (torch.tensor(v).view(-1, 1, 1).to(like) for v in (preprocess.mean, preprocess.std))
        low, high = -mean / std, (1 - mean) / std
    optimizer = torch.optim.Adam([images], lr=0.25, betas=(0.5, 0.9), eps=1e-8)
    best, lowest = images.detach().clone(), math.inf
    warm = min(100, max(1, steps // 10))
    reach = max(1, round(30 / 224 * max(size_px)))
    for at in range(steps):
        rate = (at + 1) / warm if at < warm else 0.5 * (1 + math.cos(math.pi * (at - warm) / max(1, steps - warm)))
        for group in optimizer.param_groups:
            group["lr"] = 0.25 * rate
        drawn = torch.randint(-reach, reach + 1, (2,), generator=generator).tolist()
        turned = images.roll(drawn, dims=(2, 3))
        if bool(torch.rand((), generator=generator) < 0.5):
            turned = turned.flip(3)
        with torch.enable_grad():
            logits = teacher(turned, gates=OPEN)
            spread = sum(
                d.square().sum().clamp_min(1e-20).sqrt() ** 0.6
                for d in (
                    turned[..., :, 1:] - turned[..., :, :-1],
                    turned[..., 1:, :] - turned[..., :-1, :],
                    turned[..., 1:, 1:] - turned[..., :-1, :-1],
                    turned[..., 1:, :-1] - turned[..., :-1, 1:],
                )
            )
            loss = F.cross_entropy(logits, classes) + 1e-4 * spread + 1e-5 * turned.flatten(1).norm(dim=1).mean()
            (gradient,) = torch.autograd.grad(loss, images)
        now = float(loss.detach())
        if now < lowest:
            best, lowest = images.detach().clone(), now
        images.grad = gradient
        optimizer.step()
        if low is not None and high is not None:
            with torch.no_grad():
                images.copy_(images.clamp(low, high))
        if progress is not None:
            progress("synthesise", at + 1, steps, loss=now)
    return best


def jpeg_round_trip(images: Tensor, preprocess: Preprocess) -> Tensor:
    """The released code's way of the metric images over the disk: stretched, JPEG, resized, cropped, ImageNet constants."""
    from PIL import Image
    from torchvision.transforms import functional as transforms

    found = []
    height, width = images.shape[-2:]
    for image in images.cpu().float():
        low, high = image.min(), image.max()
        pixels = ((image - low) / (high - low).clamp_min(1e-12) * 255).round().to(torch.uint8)
        file = io.BytesIO()
        transforms.to_pil_image(pixels).save(file, format="JPEG")
        with Image.open(file) as back:
            resized = transforms.resize(back.convert("RGB"), round(min(height, width) * 256 / 224))
        x = transforms.to_tensor(transforms.center_crop(resized, [height, width]))
        found.append(transforms.normalize(x, *IMAGENET))
    return torch.stack(found).to(images)


def subset(hidden: int, keep: int, *, seed: int, block: int, draw: int = 0) -> tuple[int, ...]:
    """A uniform subset of the hidden units, sorted: a function of (seed, block, draw) alone."""
    return tuple(sorted(int(u) for u in ranked(seed, _SUBSET, block, draw, np.arange(hidden))[:keep]))


def _narrow(student: Vit, index: int, hidden: int, config: DcvitConfig, *, draw: int = 0) -> tuple[Vit, Keep]:
    """The student with one block compressed, weights inherited as they are, and what was kept."""
    mlp = student.spec.blocks[index].mlp
    assert mlp is not None
    keep = Keep(attention=False, hidden=subset(mlp.hidden, hidden, seed=config.seed, block=index, draw=draw))
    keeps: list[Keep | None] = [None] * len(student.spec.blocks)
    keeps[index] = keep
    fixed = frozen(student.spec, config.freeze)
    return surgery.cut(student, keeps, method="dcvit", variant="finetune", skip=fixed), keep


@torch.no_grad()
def _mismatch(teacher: Vit, student: Vit, x: Tensor, batch_size: int) -> float:
    """KL(teacher || student) on the metric images; of an encoder the squared error of its features' directions."""
    like = next(teacher.parameters())
    before, after = (
        torch.cat([cf.answers(net, net.embed(part.to(like)), 0).cpu() for part in x.split(batch_size)])
        for net in (teacher, student)
    )
    return _divergence(before, after, classifies=bool(teacher.spec.outputs))


def by_finetuning(
    base: Vit,
    inputs: Inputs,
    config: DcvitConfig,
    budget: Budget,
    space: Space,
    *,
    folder: Path | None,
    resume: bool,
    progress: Progress | None,
) -> tuple[Vit, list[Keep | None], list[dict[str, Any]], dict[str, Any]]:
    """The paper's way: structure, metric images, a trial for each candidate, progressive compression.

    Gives the student, what was kept of each block, the history and the report.
    """
    if inputs.feed.alike(inputs.batch_size):
        raise inputs.alike()
    shape = structure(space, config, budget)
    limits = budget.limits(space.reference)
    none: list[Keep | None] = [None] * len(base.blocks)
    if not shape.k:
        return base, none, [], {"k": 0}
    paper = config.preset == "paper"
    identity = {**_identity(space.given, base, inputs, config), "limits": limits}
    journal = Journal(folder, "dcvit", identity, resume=resume)
    found = candidates(space)
    scores, best = _trials(
        base, inputs, config, shape, found, journal, fixed=space.fixed, folder=folder, resume=resume, progress=progress
    )
    ranked_ = sorted(found, key=lambda i: (scores[str(i)], i))
    if paper:
        order = ranked_[: shape.k]
        widths = {i: shape.hidden[i] for i in order}
    else:
        order, widths = chosen_blocks(space, ranked_, shape, limits, scores)
    keeps = list(none)
    student, trained = base, 0
    if order[0] == ranked_[0]:  # its trial was the best
        student, keeps[order[0]] = _narrow(base, order[0], widths[order[0]], config)
        student.load_state_dict({n: t.to(next(base.parameters())) for n, t in best.items()})
        trained = 1
    for nth, i in enumerate(order[trained:], start=trained):
        student, keeps[i] = _narrow(student, i, widths[i], config, draw=nth if paper else 0)
        place = None if folder is None else folder / f"stage-{i}"
        last = min(max(order[: nth + 1]) + 1, len(base.blocks) - 1)
        finetune(
            student, base, inputs, config, last=last, steps=config.steps, fixed=space.fixed, out=place, resume=resume,
            progress=_told(progress, f"compress block {i}, {nth + 1 - trained} of {len(order) - trained}"),
        )  # fmt: skip
    history = [{"stage": "trial", "block": i, "mismatch": scores[str(i)]} for i in found]
    report = {
        "k": len(order),
        "order": order,
        "metric": "synthetic images" if base.spec.outputs else "the few images themselves",
        "counted": shape.counted,
        "preset": config.preset,
        "steps": config.steps,
    }
    return student, keeps, history, report


def _trials(
    base: Vit,
    inputs: Inputs,
    config: DcvitConfig,
    shape: Structure,
    found: Sequence[int],
    journal: Journal,
    *,
    fixed: frozenset[Half],
    folder: Path | None,
    resume: bool,
    progress: Progress | None,
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """The mismatch after compressing each of these blocks alone, and the weights of the best student."""
    if (noted := journal.get("metric")) is not None:
        metric = noted.tensors["images"]
    else:
        metric = _metric_set(base, inputs, config, progress)
        journal.put("metric", {"images": metric})
    scores: dict[str, float] = {}
    best: dict[str, Tensor] = {}
    for done, i in enumerate(found, start=1):
        weights: dict[str, Tensor] = {}
        if (noted := journal.get(f"trial-{i}")) is not None:
            weights, mismatch = noted.tensors, noted.values["mismatch"]
        else:
            student, _ = _narrow(base, i, shape.hidden[i], config)
            place = None if folder is None else folder / f"trial-{i}"
            finetune(
                student, base, inputs, config, last=min(i + 1, len(base.blocks) - 1), steps=config.steps, fixed=fixed,
                out=place, resume=resume, progress=_told(progress, f"trial of block {i}, {done} of {len(found)}"),
            )  # fmt: skip
            mismatch = _mismatch(base, student, metric, config.batch_size)
            if mismatch < min(scores.values(), default=math.inf):  # the best is not trained again
                weights = {name: tensor.detach().cpu().clone() for name, tensor in student.state_dict().items()}
            journal.put(f"trial-{i}", weights, {"mismatch": mismatch})
            if place is not None:
                shutil.rmtree(place, ignore_errors=True)
        best = weights or best
        scores[str(i)] = mismatch
    return scores, best


def chosen_blocks(
    space: Space,
    ranked_: Sequence[int],
    shape: Structure,
    limits: Mapping[str, int],
    scores: Mapping[str, float],
) -> tuple[list[int], dict[int, int]]:
    """The blocks to compress, the most recoverable first, and the units that each keeps: the first as its trial had it.

    The best k by their trials if they can meet the limits; else the set of the least sum that does, of more blocks if need be.
    Raises BudgetError where none does.
    """
    for k in range(shape.k, len(ranked_) + 1):
        sets = sorted(combinations(ranked_, k), key=lambda blocks: sum(scores[str(i)] for i in blocks))
        for order in sets:
            first, *rest = order
            begun = {first: shape.hidden[first]}
            hidden = widest(space, rest, limits, begun)
            if hidden is not None:
                return list(order), begun | hidden
    raise BudgetError(
        "dcvit: no set of blocks meets the budget with the width that was tried. Raise the budget a little, pass a larger k, or "
        "choose variant='closed'."
    )


def _metric_set(base: Vit, inputs: Inputs, config: DcvitConfig, progress: Progress | None) -> Tensor:
    """Images in the network's own input, on the CPU."""
    if not base.spec.outputs:  # nothing to synthesise from: the images themselves, as the paper's ablation has them
        enough = islice(inputs.batches(), -(-config.metric_images // inputs.batch_size))
        return torch.cat(list(enough))[: config.metric_images].cpu()
    images = synthesise(
        base, config.metric_images, config.metric_steps, seed=config.seed, size_px=base.spec.image_px, progress=progress
    )
    preprocess = base.config.preprocess
    if config.preset == "paper" and preprocess is not None and len(preprocess.mean) == 3:
        images = jpeg_round_trip(images, preprocess)
    return images.cpu()


def _told(progress: Progress | None, what: str) -> Progress | None:
    if progress is None:
        return None

    def tell(stage: str, done: int, total: int, **facts: Any) -> None:
        progress(what, done, total, **facts)

    return tell


# ------------------------------------------------------------------------------------------------------------- the method


def compress(
    model: Vit,
    config: DcvitConfig,
    *,
    data: Any = None,
    progress: Progress | None = None,
    folder: Path | None = None,
    resume: bool = False,
) -> Compressed:
    """Compress `model` to the config's budget; `model` is left as it was.

    data: images, whatever `vitrim.data.open` takes (labels are not read); a float tensor [n, C, h, w] is taken as the
    network's own input if the model says no preprocessing. folder: where partial state goes, so that a killed run can go on
    with resume. Raises BudgetError before anything is read when the budget is out of reach, ConfigError for a frozen part
    that is not there, DataError for images that are missing or all equal.
    """
    if config.budget is None:
        raise ConfigError("dcvit: no budget. To halve the operations, pass budget=Budget(keep_macs=0.5).")
    return compress_family(model, config, [config.budget], data=data, progress=progress, folder=folder, resume=resume)[
        0
    ]


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
    reference = space.reference
    for budget in budgets:
        _check_budget(space, config, budget)
    device = torch.device(config.device) if config.device is not None else next(model.parameters()).device
    home = next(model.parameters()).device
    base = surgery.fold_layer_scale(model, skip=space.fixed).to(device).eval()
    inputs = Inputs(model, data, config)
    if inputs.images is None and (config.variant == "finetune" or config.finetune_steps):
        raise DataError(
            "dcvit: fine-tuning varies the images, and needs to know how the model normalises them. Load it with preprocess=."
        )
    results = []
    with tempfile.TemporaryDirectory(prefix="vitrim-") as temporary:
        room = Path(temporary)
        scores: list[Score] = []
        sites: dict[str, cf.Sensitivity] | None = None
        if config.variant == "closed" and any(exceeded(reference, b.limits(reference)) for b in budgets):
            scores, sites = score(
                base, inputs, config, space=space, room=room, folder=folder, resume=resume, progress=progress
            )
        for n, budget in enumerate(budgets):
            own = None if folder is None else (folder if len(budgets) == 1 else folder / f"member-{n}")
            if not exceeded(reference, budget.limits(reference)):
                results.append(_unchanged(model, config))
            elif config.variant == "closed":
                found = _closed(
                    model, base, scores, sites, inputs, config, budget,
                    space=space, room=room, folder=own, resume=resume, progress=progress,
                )  # fmt: skip
                found.model.to(home)
                results.append(found)
            else:
                student, keeps, history, report = by_finetuning(
                    base, inputs, config, budget, space, folder=own, resume=resume, progress=progress
                )  # fmt: skip
                done = _finished(model, base, student.to(home), keeps, config)
                report = {"variant": "finetune", **report, "blocks": _rows(model.spec, done.spec)}
                results.append(
                    Compressed(model=done, method="dcvit", variant="finetune", history=history, report=report)
                )
    return results


def _closed(
    model: Vit,
    base: Vit,
    scores: Sequence[Score],
    sites: Mapping[str, cf.Sensitivity] | None,
    inputs: Inputs,
    config: DcvitConfig,
    budget: Budget,
    *,
    space: Space,
    room: Path,
    folder: Path | None,
    resume: bool,
    progress: Progress | None,
) -> Compressed:
    losses = [one.losses(levels.choices()) for one, levels in zip(scores, space.levels, strict=True)]
    chosen = allocate(space, losses, budget, sighted=model.spec.pool.kind == "cls")
    keeps = keeps_of(space, chosen, scores)
    small = reconstruct(base, keeps, sites, inputs, config, fixed=space.fixed, room=room, progress=progress)
    if config.finetune_steps:
        last = max((i for i, keep in enumerate(keeps) if keep is not None), default=0)
        finetune(
            small, base, inputs, config, last=min(last + 1, len(base.blocks) - 1), steps=config.finetune_steps, fixed=space.fixed,
            out=None if folder is None else folder / "finetune", resume=resume, progress=_told(progress, "finetune"),
        )  # fmt: skip
    predicted = sum(loss[option] for loss, option in zip(losses, chosen, strict=True))
    report = {
        "variant": "closed",
        "metric": "KL to the given model" if model.spec.outputs else "squared error of unit features",
        "predicted": predicted,
        "handed_over": config.hand_over,
        "images": inputs.count,
        "probe_images": min(config.probe_images, inputs.count),
        "blocks": _rows(model.spec, small.spec, [loss[o] for loss, o in zip(losses, chosen, strict=True)], scores),
    }
    history = [{"stage": "allocate", "predicted": predicted}]
    done = _finished(model, base, small, keeps, config)
    return Compressed(model=done, method="dcvit", variant="closed", history=history, report=report)


def _unchanged(model: Vit, config: DcvitConfig) -> Compressed:
    """A copy: the budget asks for nothing."""
    step_ = SelectionStep(
        method="dcvit", variant=config.variant, parent=spec_hash(model.spec), blocks=(None,) * len(model.spec.blocks)
    )
    same = surgery.with_spec(model, model.spec, model.state_dict(), step_)
    report = {"variant": config.variant, "blocks": _rows(model.spec, model.spec)}
    return Compressed(model=same, method="dcvit", variant=config.variant, report=report)


def _finished(model: Vit, base: Vit, small: Vit, keeps: Sequence[Keep | None], config: DcvitConfig) -> Vit:
    """The result with one selection step, from the given model to it, in that model's mode."""
    step_ = SelectionStep(
        method="dcvit",
        variant=config.variant,
        parent=spec_hash(model.spec),
        refit=True,
        blocks=tuple(
            None if keep is None else _kept(block, keep) for block, keep in zip(model.spec.blocks, keeps, strict=True)
        ),
    )
    small.selection = model.selection.then(step_)
    return small.train(model.training)


def _kept(block: BlockSpec, keep: Keep) -> dict[str, Any]:
    """The selection's entry of a block, in the form that `surgery.cut` writes."""
    entry: dict[str, Any] = {}
    if block.attention is not None:
        entry["attention"] = {"heads": None, "qk": None, "v": None} if keep.attention else "gone"
    if block.mlp is not None:
        entry["mlp"] = {"hidden": None if keep.hidden is None else list(keep.hidden)} if keep.mlp else "gone"
    return entry


def _rows(
    dense: ModelSpec, small: ModelSpec, losses: Sequence[float] | None = None, scores: Sequence[Score] | None = None
) -> list[dict[str, Any]]:
    """What became of each block; plain JSON values."""
    rows = []
    for i, blocks in enumerate(zip(dense.blocks, small.blocks, strict=True)):
        before, after = map(Choice.of, blocks)
        row: dict[str, Any] = {
            "block": i,
            "attention": "kept" if after.attention else ("lost" if before.attention else "none"),
            "hidden": after.hidden,
            "of": before.hidden,
        }
        if losses is not None and scores is not None:
            curve = scores[i].whole if after.attention == before.attention else scores[i].bare
            row |= {"predicted": losses[i], "ridge": None if curve is None else curve.ridge}
        rows.append(row)
    return rows
