"""One plan: ranks, widths, the residual stream and tokens cut at once under one budget, by closed forms.

Source   ours; no published method. The closed forms are those beside COMCAT (whitened products) and DC-ViT (elimination with
         refit), each in `vitrim.closed_form`; the narrower stream is on the idea of SliceGPT (arXiv 2401.15024). Added here:
         a stream width that is exact under plain LayerNorm, Fisher weights without labels, one allocation over all axes.
Takes    a ViT, a budget, and a few hundred unlabelled images.
Gives    a spec with smaller ranks, hidden widths, stream and token counts, and refitted weights. No training; seconds to minutes.
How      1 sensitivity: a backward pass with random signs, how much the outputs mind a disturbance at each place.
         2 parts: for each block, every rank and every width from one set of sums over the dense stream.
         3 scores: what each part of each block costs alone, in output divergence (`fisher`), or measured (`measured`).
         4 plans: for each stream width and token schedule an exact allocation over blocks; losses add.
         5 builds: the best plans, front to back on the student's stream towards the dense one; the best on held-out images stays.
Departs  from our own sheet: scores and choices are made on the held-out quarter of the images; the network that stays is built
         once more from all of them.

The file in order: config; what may be cut; costs and plans; images; parts and scores; the build; the calls.
"""

from __future__ import annotations

import hashlib
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from vitrim import closed_form as cf
from vitrim import data as opened
from vitrim import surgery
from vitrim.allocation import Allocator
from vitrim.budget import Budget, exceeded
from vitrim.checkpoints import Journal
from vitrim.closed_form import fisher
from vitrim.closed_form import stream_width as narrowing
from vitrim.closed_form import sublayers as parts
from vitrim.counting import RESOURCES, Cost, cost
from vitrim.errors import ConfigError, DataError
from vitrim.freezing import Half, frozen
from vitrim.methods.auto.config import AXES, AutoConfig
from vitrim.model import OPEN, Block, Stream, Vit
from vitrim.progress import Progress
from vitrim.result import Compressed
from vitrim.space import BlockLevels, Choice, Space, frozen_parts, jumps, outlook, sizes
from vitrim.spec import (
    BlockSpec,
    Merge,
    ModelSpec,
    Prefix,
    SelectionStep,
    Similarity,
    Step,
    spec_hash,
    token_walk,
)

HELD_OUT = 4
"""One image in so many is held out: options are scored and plans compared on it."""
PROBE = 64
"""Images from which the readers of a trial stream width are corrected."""
RANKS = (1 / 16, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 3 / 4)
UNITS = (1 / 64, 1 / 32, 3 / 64, 1 / 16, 3 / 32, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 3 / 4)
WIDTHS = (7 / 8, 3 / 4, 5 / 8, 1 / 2, 3 / 8, 5 / 16, 1 / 4, 3 / 16)
"""Levels on offer, as shares of a part's own size."""
FLAT = 1e-3
"""Share of the identity in an output metric, which keeps its root invertible."""
HEAD_RIDGE = 0.3
"""Pull of a classifier towards the inherited one: its rows are one an image."""
PEAKS = 12
"""Bounds on the largest activation that are tried for a memory budget."""


# ------------------------------------------------------------------------------------------------------- what may be cut


PARTS = ("qk", "v", "hidden")
"""What is cut within a block: ranks of the heads' two products, and hidden units."""

Schedule = tuple[tuple[int, Step], ...]
"""Token steps to add, each with its block."""


@dataclass(frozen=True)
class Candidate:
    """A network to build. width: of the stream."""

    width: int
    steps: Schedule
    choices: tuple[Choice, ...]


@dataclass(frozen=True)
class Nets:
    """What may be cut of one network: a `Space` for each stream width and token schedule.

    whole: of the network as it is, LayerScale folded, without prefix step. tail: whether the result has one. widths: of the
    stream, the whole first. schedules: token steps, none first.
    """

    whole: Space
    tail: bool
    align: int
    widths: tuple[int, ...]
    schedules: tuple[Schedule, ...]

    @property
    def given(self) -> ModelSpec:
        """As it was passed in."""
        return self.whole.given

    @property
    def base(self) -> ModelSpec:
        return self.whole.base

    @property
    def levels(self) -> tuple[BlockLevels, ...]:
        return self.whole.levels

    @property
    def dense(self) -> Mapping[str, str]:
        """What stays, and why."""
        return self.whole.dense

    @cached_property
    def _spaces(self) -> dict[tuple[int, Schedule, bool], Space]:
        return {}

    def space(self, width: int, steps: Schedule, *, tail: bool | None = None) -> Space:
        """Blocks' choices in a stream of this width, with these token steps.  tail: None: as the result has it."""
        tail = self.tail if tail is None else tail
        key = (width, steps, tail)
        if key not in self._spaces:
            base = self.base if width == self.base.width else narrowing.narrowed_spec(self.base, width)
            levels = self.levels if width == self.base.width else tuple(one.within(width) for one in self.levels)
            blocks = list(base.blocks)
            for i, step in steps:
                blocks[i] = replace(blocks[i], steps=(*blocks[i].steps, step))
            if tail:
                blocks[-1] = replace(blocks[-1], steps=(*blocks[-1].steps, Prefix()))
            self._spaces[key] = replace(self.whole, base=replace(base, blocks=tuple(blocks)), levels=levels)
        return self._spaces[key]

    def spec(self, candidate: Candidate, *, tail: bool | None = None) -> ModelSpec:
        """The network of a candidate."""
        return self.space(candidate.width, candidate.steps, tail=tail).spec(candidate.choices)

    def uncut(self, steps: Schedule = ()) -> Candidate:
        """The whole network, with these token steps."""
        return Candidate(self.base.width, steps, self.whole.whole)

    @cached_property
    def tolerance(self) -> dict[str, int]:
        """How far below a budget the result may end, by resource."""
        return _tolerance(self)

    @cached_property
    def lowest(self) -> Candidate:
        """The cheapest network."""
        width = self.widths[-1]
        choices = self.space(width, ()).lowest
        found = [Candidate(width, steps, choices) for steps in self.schedules]
        return min(found, key=lambda candidate: cost(self.spec(candidate)).macs)


def nets_of(spec: ModelSpec, config: AutoConfig) -> Nets:
    """What the config may cut of this spec. Raises ConfigError where an axis that was asked for does not apply, or none does."""
    fixed = frozen(spec, config.freeze)
    base = surgery.without_exact_tail(surgery.with_folded(spec, skip=fixed))
    asked = tuple(axis for axis in config.axes or AXES if axis != "tail" or config.exact_tail)
    dense = frozen_parts(fixed)
    if spec.outputs:
        dense["classifier"] = "not cut, only refitted"
    if spec.pool.kind == "map":
        dense["attention pooling"] = "costed, never cut"
    why = {
        "width": "parts are frozen, and another stream width changes every part" if fixed else narrowing.refusal(base),
        "tokens": _tokens_refusal(base),
        "tail": surgery.tail_refusal(spec, fixed),
    }
    axes = set(asked)
    for axis, reason in why.items():
        if axis in axes and reason is not None:
            if config.axes is not None:
                raise ConfigError(
                    f"auto: axis {axis!r} does not apply to this network: {reason}. Leave it out of axes."
                )
            axes.remove(axis)
            dense[{"width": "stream width", "tokens": "tokens", "tail": "exact tail"}[axis]] = reason
    levels = tuple(_levels(base, i, fixed, axes, config.align, dense) for i in range(len(base.blocks)))
    widths: tuple[int, ...] = (base.width,)
    if "width" in axes:
        widths = tuple(n for n in sizes(base.width, WIDTHS, unit_of(base.width, config.align)) if n >= 2)
    had = surgery.has_exact_tail(spec)
    nets = Nets(
        whole=Space(given=spec, base=base, fixed=fixed, levels=levels, form="refitted", dense=dense),
        tail=had or "tail" in axes,
        align=config.align,
        widths=widths,
        schedules=_schedules(base) if "tokens" in axes else ((),),
    )
    single = len(widths) == 1 and len(nets.schedules) == 1 and nets.tail == had
    if single and all(len(one.choices()) == 1 for one in levels):
        raise ConfigError(
            f"auto: nothing of this network can be cut on the axes {', '.join(asked)}"
            f"{' with the parts that are frozen' if fixed else ''}. Allow more of them."
        )
    return nets


def _tokens_refusal(spec: ModelSpec) -> str | None:
    if spec.pool.kind == "none" and not spec.outputs:
        return "the tokens are what the encoder gives"
    if any(block.steps for block in spec.blocks):
        return "the network merges tokens already"
    if not any(_schedules(spec)):
        return "too few blocks or tokens"
    return None


def _schedules(spec: ModelSpec) -> tuple[Schedule, ...]:
    """None; one or two lattice merges after a block; similarity merges. Places are shares of the depth."""
    depth, (rows, cols) = len(spec.blocks), spec.grid
    ends = sorted({i for share in (1 / 3, 1 / 2, 2 / 3, 5 / 6) if 0 <= (i := round(depth * share) - 1) <= depth - 2})
    found: list[Schedule] = [()]

    def half(axis: Literal["h", "v"]) -> Merge:
        return Merge(at="end", axis=axis, keep=-(-(cols if axis == "h" else rows) // 2))

    if cols > 1:
        found += [((i, half("h")),) for i in ends]
    if cols > 1 and rows > 1:
        found += [((i, half("h")), (j, half("v"))) for i in ends for j in ends if i < j]
    patches = rows * cols
    for i in ends[-2:] if patches >= 8 else ():
        found += [((i, Similarity(at="mid", keep=patches - patches // n)),) for n in (4, 2)]
    return tuple(found)


def unit_of(size: int, align: int) -> int:
    """The unit of a hidden width or of the stream: `align`, or a sixteenth of a part too narrow for eight of them."""
    return align if size >= 8 * align else max(1, size // 16)


def _levels(
    spec: ModelSpec, i: int, fixed: frozenset[Half], axes: set[str], align: int, dense: dict[str, str]
) -> BlockLevels:
    block = spec.blocks[i]
    a, m = block.attention, block.mlp
    free = (a is not None and (i, "attention") not in fixed, m is not None and (i, "mlp") not in fixed)
    levels = BlockLevels.whole_of(block)

    def ranks(size: int) -> tuple[int, ...]:
        return tuple(n for n in sizes(size, RANKS, unit_of(size, align)) if n == size or n < spec.width)

    if a is not None and free[0]:
        if "qk" in axes and a.qk_norm != "none":
            dense[f"block {i} qk"] = f"{a.qk_norm} norm between queries and keys"
        elif "qk" in axes:
            levels = replace(levels, qk=ranks(a.qk_dim))
        if "vo" in axes:
            levels = replace(levels, v=ranks(a.v_dim))
    if m is not None and free[1] and "mlp" in axes:
        levels = replace(levels, hidden=sizes(m.hidden, UNITS, unit_of(m.hidden, align)))
    both = a is not None and m is not None
    return replace(
        levels,
        off=both and free[0] and "attention" in axes,
        bare=both and free[1] and "mlp" in axes,
        empty=(free[0] or a is None) and (free[1] or m is None) and any(free) and "block" in axes,
        refit=free,
    )


def floor(spec: ModelSpec, config: AutoConfig | None = None) -> Cost:
    """The cheapest network that the method makes of this spec."""
    nets = nets_of(spec, config or AutoConfig())
    return cost(nets.spec(nets.lowest))


def step(spec: ModelSpec, config: AutoConfig | None = None) -> dict[str, int]:
    """How far below a budget the result may end, by resource (law 7): one unit of the part whose unit costs most.

    Where ranks and hidden units do not fill all of the range, the largest jump between what they fill counts.
    """
    return nets_of(spec, config or AutoConfig()).tolerance


def _tolerance(nets: Nets) -> dict[str, int]:
    whole = nets.uncut()
    before = cost(nets.spec(whole))
    pairs = [(cost(nets.given), before)]
    seen: set[tuple[Any, ...]] = set()
    for i, levels in enumerate(nets.levels):
        key = (nets.base.blocks[i], levels, i == len(nets.levels) - 1)
        if key in seen:
            continue
        seen.add(key)
        for name in PARTS:
            size = getattr(levels, name)[0]
            if len(getattr(levels, name)) > 1:
                less = levels.whole.sized(name, max(1, size - unit_of(size, nets.align)))
                choices = nets.whole.with_choice(i, less)
                pairs.append((before, cost(nets.spec(replace(whole, choices=choices)))))
    found, gaps = jumps(pairs), _gaps(nets, whole)
    return {name: max(found[name], gaps[name]) for name in RESOURCES}


def _gaps(nets: Nets, whole: Candidate) -> dict[str, int]:
    """The largest stretch of each resource that no ranks and hidden widths fill.

    They fill the stretches below each stream width with no half gone, and with those of the first blocks gone. Between these
    lie jumps; so do they between the network as given and the same with an exact tail.
    """
    count = len(nets.levels)
    kinds = [kind for kind in ("off", "empty") if any(getattr(levels, kind) for levels in nets.levels)]
    given = cost(nets.given)

    def stretch(width: int, kind: str, lost: int) -> tuple[Cost, Cost]:
        ends = []
        for choices in ([levels.least for levels in nets.space(width, ()).levels], list(nets.whole.whole)):
            for i in range(lost):
                if getattr(nets.levels[i], kind):
                    choices[i] = choices[i].without("attention") if kind == "off" else Choice()
            ends.append(cost(nets.spec(Candidate(width, (), tuple(choices)))))
        return ends[0], ends[1]

    points = [nets.lowest, *(nets.uncut(steps) for steps in nets.schedules[1:])]
    stretches = [(at, at) for at in (given, *(cost(nets.spec(one)) for one in points))]
    stretches += [stretch(width, "", 0) for width in nets.widths]
    found = _unfilled(stretches)
    if any(gap > getattr(given, name) / 100 for name, gap in found.items()):
        more = product(nets.widths[-1:], kinds, range(1, count + 1))
        found = _unfilled([*stretches, *(stretch(*one) for one in more)])
    return found


def _unfilled(stretches: Sequence[tuple[Cost, Cost]]) -> dict[str, int]:
    """The largest gap between stretches of costs, by resource."""
    found = {}
    for name in RESOURCES:
        spans = sorted((getattr(low, name), getattr(high, name)) for low, high in stretches)
        most, reached = 0, spans[0][1]
        for start, end in spans:
            most, reached = max(most, start - reached), max(reached, end)
        found[name] = most
    return found


def plan(spec: ModelSpec, config: AutoConfig | None = None) -> dict[str, Any]:
    """What can be said from the spec alone: range, tolerance, needs, what stays dense and why.

    Raises BudgetError when the config's budget is out of reach, ConfigError where an axis does not apply.
    """
    config = config or AutoConfig()
    nets = nets_of(spec, config)
    return outlook(
        "auto",
        config.score,
        config.budget,
        floor=cost(nets.spec(nets.lowest)),
        reference=cost(spec),
        tolerance=nets.tolerance,
        needs={"images": config.images, "labels": False, "training": False},
        dense=nets.dense,
    )


# ------------------------------------------------------------------------------------------------- losses and candidates


@dataclass
class Losses:
    """What each level of one block's parts costs alone, in output divergence, by size; the whole costs nothing.

    off: MLP sizes without the attention. hidden, off: 0 for no MLP.
    """

    qk: dict[int, float] = field(default_factory=dict)
    v: dict[int, float] = field(default_factory=dict)
    hidden: dict[int, float] = field(default_factory=dict)
    off: dict[int, float] = field(default_factory=dict)

    def of(self, choice: Choice, whole: Choice) -> float:
        if whole.qk and not choice.qk:
            return between(self.off, choice.hidden)
        return between(self.qk, choice.qk) + between(self.v, choice.v) + between(self.hidden, choice.hidden)

    def settle(self, whole: Choice) -> None:
        """The whole at 0, and no smaller part below a larger one: what noise says otherwise."""
        for losses, top in ((self.qk, whole.qk), (self.v, whole.v), (self.hidden, whole.hidden)):
            losses[top] = 0.0
        for losses in (self.qk, self.v, self.hidden, self.off):
            most = 0.0
            for size in sorted(losses, reverse=True):
                losses[size] = most = max(most, losses[size])


def between(losses: Mapping[int, float], size: int) -> float:
    """The loss at a size, on the line between its neighbours."""
    if size in losses:
        return losses[size]
    low = max((n for n in losses if n < size), default=None)
    high = min((n for n in losses if n > size), default=None)
    if low is None or high is None:
        return losses[high if low is None else low]  # type: ignore[index]
    share = (size - low) / (high - low)
    return losses[low] * (1 - share) + losses[high] * share


@dataclass(frozen=True)
class Scores:
    """What the plans are made of.  widths, schedules: divergences of the narrower stream and of the merges alone."""

    blocks: tuple[Losses, ...]
    widths: dict[int, float]
    schedules: tuple[float, ...]

    def loss(self, nets: Nets, i: int, choice: Choice) -> float:
        """Of what becomes of block `i` alone."""
        return self.blocks[i].of(choice, nets.levels[i].whole)

    def total(self, nets: Nets, one: Candidate) -> float:
        """The predicted divergence of a candidate: the sum of its parts."""
        net = self.widths[one.width] + self.schedules[nets.schedules.index(one.steps)]
        return net + sum(self.loss(nets, i, choice) for i, choice in enumerate(one.choices))


def best_candidates(
    nets: Nets, scores: Scores, limits: Mapping[str, int], reference: Cost, *, count: int
) -> list[Candidate]:
    """The candidates of the least predicted divergence within the limits, each of another stream width or token schedule.

    Exact over blocks within each of them. Those that leave more of the budget than law 7 allows
    count only where there are no others.
    """
    order = sorted(
        (scores.widths[w] + scores.schedules[s], w, s) for w in nets.widths for s in range(len(nets.schedules))
    )
    near = {name: max(getattr(reference, name) // 100, most) for name, most in nets.tolerance.items()}
    found: list[tuple[bool, float, Candidate]] = []
    for net, width, s in order:
        full = sorted(total for loose, total, _ in found if not loose)
        if len(full) >= count and net >= full[count - 1]:
            break  # its parts can only add to that
        steps = nets.schedules[s]
        allocator = Allocator(nets.space(width, steps), lambda i, choice: scores.loss(nets, i, choice))
        for whole_parts in (False, True):
            choices = allocator.solve(limits, partial(_no_half_gone, nets) if whole_parts else None)
            if choices is None:
                break
            one = Candidate(width, steps, filled(nets, allocator, choices, limits, reference))
            at = cost(nets.spec(one))
            loose = all(limit - getattr(at, name) > near[name] for name, limit in limits.items())
            if not loose or not whole_parts:
                found.append((loose, scores.total(nets, one), one))
            if not loose:
                break
    if not found:
        assert not exceeded(cost(nets.spec(nets.lowest)), limits)
        found.append((True, scores.total(nets, nets.lowest), nets.lowest))
    found.sort(key=lambda one: one[:2])
    chosen: list[Candidate] = []
    for loose, _, one in found:
        if one not in chosen and loose == found[0][0]:
            assert not exceeded(cost(nets.spec(one)), limits)
            chosen.append(one)
    return chosen[:count]


def _no_half_gone(nets: Nets, i: int, choice: Choice) -> bool:
    whole = nets.levels[i].whole
    return choice.attention == whole.attention and choice.mlp == whole.mlp


def filled(
    nets: Nets, allocator: Allocator, choices: tuple[Choice, ...], limits: Mapping[str, int], reference: Cost
) -> tuple[Choice, ...]:
    """The choices with what is left of the budget spent: in whole units, then in single ones where 1 % is left."""
    currency = "macs" if "macs" in limits else "params"
    for align in (nets.align, 1):
        choices = allocator.filled(
            choices,
            limits,
            currency,
            lambda i, part, align=align: unit_of(getattr(nets.levels[i].whole, part), align),  # type: ignore[misc]
        )
        used = cost(allocator.space.spec(choices))
        if any(limit - getattr(used, name) <= getattr(reference, name) / 100 for name, limit in limits.items()):
            break
    return choices


# ---------------------------------------------------------------------------------------------------------------- images


class Inputs:
    """The calibration images as the network takes them, read anew by each pass, a batch at a time.

    Parts: `fit`, `held` (every fourth image), `probe` (the first of `fit`), `all`.
    """

    def __init__(self, model: Vit, source: Any, config: AutoConfig) -> None:
        if source is None:
            raise DataError("auto: it needs a few hundred unlabelled images, and none were given. Pass data=.")
        self.batch_size = config.batch_size
        self.feed = opened.calibration_images(
            source, model.config.preprocess, count=config.images, seed=config.seed, method="auto"
        )
        self.count, self.mark = len(self.feed), self.feed.mark[:16]
        if self.count < 2:
            raise DataError(
                f"auto: {self.count} image; expected two at least (one judges), and a few hundred to do well."
            )
        every = np.arange(self.count)
        step_ = min(HELD_OUT, self.count)
        held = every % step_ == step_ - 1
        self.rows = {"all": every, "held": every[held], "fit": every[~held], "probe": every[~held][:PROBE]}
        if self.feed.alike(self.batch_size):
            raise DataError(
                f"auto: all {self.count} images are equal; expected different ones, such as a few hundred photos."
            )

    def batches(self, part: str) -> Iterator[Tensor]:
        """Batches [B, C, h, w]."""
        return self.feed.subset(self.rows[part]).batches(self.batch_size)


def _warnings(base: ModelSpec, nets: Nets, inputs: Inputs) -> list[str]:
    """What the images are too few for."""
    unknowns = 0
    for block, levels in zip(base.blocks, nets.levels, strict=True):
        if block.attention is not None and levels.refit[0]:
            unknowns = max(unknowns, block.attention.heads * block.attention.v_dim)
        if block.mlp is not None and levels.refit[1]:
            unknowns = max(unknowns, block.mlp.hidden)
    least = min((at.mlp.count for at in token_walk(base)), default=1)
    rows = len(inputs.rows["fit"]) * least
    if rows >= 2 * unknowns:
        return []
    enough = math.ceil(2 * unknowns / least * HELD_OUT / (HELD_OUT - 1))
    return [
        f"{inputs.count} images give {rows} tokens to fit {unknowns} unknowns; the ridge keeps the fit close to the inherited "
        f"weights. {enough} images or more would do."
    ]


# ------------------------------------------------------------------------------------------------------ parts and scores


@dataclass
class Parts:
    """One block's parts at every level on offer, as tensors by name in the model's dtype.

    `qk/left` [H, D, R], `qk/right` [H, R, D], `qk/bias` [H, R]; `v/left`; for each rank v `o/v/w` [H v, D], `o/v/b`;
    for each width m `mlp/m/keep`, `/w` [m, E], `/b` [D]; the same as `off/m/...` without the attention.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)

    def sizes(self, kind: str) -> list[int]:
        return sorted({int(name.split("/")[1]) for name in self.tensors if name.startswith(f"{kind}/")})


@dataclass
class Work:
    """What all steps share. model: as given. base: LayerScale folded, no prefix step. scratch: for held streams."""

    model: Vit
    base: Vit
    nets: Nets
    config: AutoConfig
    inputs: Inputs
    journal: Journal
    scratch: Path
    progress: Progress | None
    warnings: list[str]

    def tell(self, stage: str, done: int, total: int, **facts: Any) -> None:
        if self.progress is not None:
            self.progress(stage, done, total, **facts)

    @property
    def device(self) -> torch.device:
        return next(self.base.parameters()).device

    @cached_property
    def classifies(self) -> bool:
        return bool(self.base.spec.outputs)

    @torch.no_grad()
    def answer(self, model: Vit, x: Tensor) -> Tensor:
        """What the model answers to a batch, [B, C] on the CPU. Raises DataError where it is not finite."""
        found = fisher.outcome(model(x.to(next(model.parameters())), gates=OPEN), classifies=self.classifies).cpu()
        if not torch.isfinite(found).all():
            raise DataError("auto: the model's output is not finite. Check the weights and the images' normalisation.")
        return found

    @cached_property
    def logs(self) -> list[Tensor] | None:
        """The dense model's answers to the held-out images, batch by batch; None where they are too many to keep."""
        found, size = [], 0
        for x in self.inputs.batches("held"):
            found.append(self.answer(self.base, x))
            size += found[-1].numel() * found[-1].element_size()
            if size > cf.IN_MEMORY_BYTES:
                return None
        return found

    def divergence(self, model: Vit) -> float:
        """Of the model from the dense one, on the held-out images."""
        total = 0.0
        for n, x in enumerate(self.inputs.batches("held")):
            before = self.answer(self.base, x) if self.logs is None else self.logs[n]
            total += float(fisher.divergence(before, self.answer(model, x), classifies=self.classifies).sum())
        return total / len(self.inputs.rows["held"])

    @cached_property
    def sites(self) -> dict[str, cf.Sensitivity]:
        """Sensitivity at every place, from the images that parts are fitted on."""
        if not self.base.blocks:
            return {}
        noted = self.journal.get("sensitivity")
        if noted is None:
            total = len(self.inputs.rows["fit"])
            found = cf.sensitivity(
                self.base,
                self.inputs.batches("fit"),
                seed=self.config.seed,
                progress=lambda done: self.tell("sensitivity", done, total),
            )
            tensors = {
                f"{name}/{kind}": getattr(site, kind) for name, site in found.items() for kind in ("tokens", "matrix")
            }
            self.journal.put("sensitivity", tensors)
            return found
        names = [f"{kind}:{i}" for i in range(len(self.base.blocks)) for kind in ("mid", "block")]
        return {
            n: cf.Sensitivity(tokens=noted.tensors[f"{n}/tokens"], matrix=noted.tensors[f"{n}/matrix"]) for n in names
        }

    def takes_mean(self, i: int) -> bool:
        """Whether what block `i` adds on average can go into a bias before it, should the block go."""
        if not i:
            return False
        before, refit = self.base.spec.blocks[i - 1], self.nets.levels[i - 1].refit
        return refit[1] if before.mlp is not None else refit[0]

    def weights(self, name: str, tokens: int) -> Tensor:
        return self.sites[name].weights(tokens)

    def reader_weights(self, name: str, tokens: int) -> Tensor | None:
        """Of the tokens that a reader of the stream sees: those of the place in front of it."""
        kind, i = name.split(":")
        if kind == "norm2":
            return self.weights(f"mid:{i}", tokens)
        return self.weights("mid:0" if i == "0" else f"block:{int(i) - 1}", tokens)

    @cached_property
    def gram(self) -> Tensor:
        """[D, D] of the stream at all its readers."""
        noted = self.journal.get("stream")
        if noted is not None:
            return noted.tensors["gram"]
        total = narrowing.Stream.empty(self.base.spec.width)
        prefix = len(self.base.spec.prefix)

        like = next(self.base.parameters())
        for x in self.inputs.batches("fit"):
            for _, seen in narrowing.readings(self.base, x.to(like)):
                total.add(seen, prefix)
        self.journal.put("stream", {"gram": total.gram})
        return total.gram

    def narrowed(self, width: int, part: str) -> tuple[Vit, narrowing.Basis]:
        """The dense network in a narrower stream, its readers corrected on these images."""
        effect = torch.stack([self.sites[name].matrix for name in sorted(self.sites)]).sum(0) if self.sites else None
        basis = narrowing.directions(self.gram, width, effect)
        corrected = narrowing.corrections(self.base, basis, self.inputs.batches(part), weights=self.reader_weights)
        return narrowing.narrow(self.base, basis, corrected), basis


def _metric(work: Work, name: str) -> Tensor:
    return work.sites[name].metric


def _own(tensor: Tensor) -> Tensor:
    """A copy with memory of its own, as it comes back from a checkpoint."""
    return tensor.detach().clone(memory_format=torch.contiguous_format)


@torch.no_grad()
def block_parts(work: Work, i: int, held: cf.StreamCache) -> Parts:
    """The parts of block `i`, from one pass over the dense stream in front of it."""
    block = work.base.blocks[i]
    spec, levels = block.spec, work.nets.levels[i]
    device, width = work.device, work.base.spec.width
    a = spec.attention
    scores = parts.Scores()
    wants_qk, wants_v = len(levels.qk) > 1, len(levels.v) > 1
    heads = cf.Regression.empty(block.attention.out.in_features, width, device=device) if wants_v else None
    hidden_units = 0 if spec.mlp is None else spec.mlp.hidden
    mlp = cf.Regression.empty(hidden_units, width, device=device) if len(levels.hidden) > 1 or levels.bare else None
    off = cf.Regression.empty(hidden_units, width, device=device) if levels.off and levels.refit[1] else None
    gone = cf.Regression.empty(1, width, device=device) if levels.empty else None
    for stream in held.batches(device):
        entry = block.start(stream)
        at_mid = work.weights(f"mid:{i}", entry.x.shape[1]).to(entry.x)
        if wants_qk:
            q, k, _ = block.attention.qkv_heads(block.norm1(entry.x))
            scores.add(q, k, at_mid)
        mid, mixed, _ = block.attend(entry)
        if heads is not None and mixed is not None:
            heads.add(mixed, mid.x - entry.x, at_mid)
        theirs, ours = cf.following(block, mid, entry, "mid")
        inner = block.mid(mid)
        at_end = work.weights(f"block:{i}", inner.x.shape[1]).to(inner.x)
        after = None
        if mlp is not None:
            hidden = block.units(inner)
            update = block.mlp.finish(hidden)
            mlp.add(hidden, update, at_end)
            after = None if block.has_steps("mid") else inner.x + update
        if off is not None or gone is not None:
            target = (block.transform(theirs).stream.x if after is None else after) - ours.x
            if off is not None:
                off.add(block.units(ours), target, at_end)
            if gone is not None:
                gone.add(target.new_ones(*target.shape[:2], 1), target, at_end)
    found = Parts()
    like = next(block.parameters(), torch.empty(0))

    def keep(name: str, value: Tensor | None) -> None:
        if value is not None:
            found.tensors[name] = _own(value.to("cpu", like.dtype) if value.is_floating_point() else value)

    if wants_qk:
        factors = scores.factors(block.attention)
        keep("qk/left", factors.left)
        keep("qk/right", factors.right)
        keep("qk/bias", factors.left_bias)
    if heads is not None:
        directions = parts.values(block.attention, heads, _metric(work, f"mid:{i}"))
        keep("v/left", directions.left)
        for rank in levels.v[1:]:
            w, b = parts.output(heads, directions, rank, block.attention.v_bias, ridge=work.config.output_ridge)
            keep(f"o/{rank}/w", w)
            keep(f"o/{rank}/b", b)
    for name, stats, kept_sizes in (("mlp", mlp, levels.hidden[1:]), ("off", off, levels.hidden)):
        if stats is None:
            continue
        last, metric = parts.last_linear(block.mlp), _metric(work, f"block:{i}")
        order = parts.elimination(stats, last, metric, ridge=work.config.ridge)
        for size in kept_sizes:
            kept = order.kept(size)
            w, shift = parts.refitted(stats, last, metric, ridge=work.config.ridge, keep=kept)
            assert shift is not None
            keep(f"{name}/{size}/keep", kept)
            keep(f"{name}/{size}/w", w)
            keep(f"{name}/{size}/b", shift)
    if levels.off and not levels.refit[1]:
        keep(f"off/{hidden_units}/frozen", torch.ones(1))
    # a mean counts only where a bias can take it: the attention's own, or that of the half before the block
    if mlp is not None and levels.bare:
        mean = parts.mean_target(mlp)
        keep("mlp/0/b", mean if levels.refit[0] else torch.zeros_like(mean))
    if gone is not None:
        mean = parts.mean_target(gone)
        keep("off/0/b" if a is not None else "mlp/0/b", mean if work.takes_mean(i) else torch.zeros_like(mean))
    return found


Emit = Callable[[str, int, str, Tensor], None]
"""Told of each level: part, size, place, and how the stream there changes [B, N, D]."""


def changes(block: Block, i: int, levels: BlockLevels, found: Parts, entry: Stream, emit: Emit) -> None:
    """What each level of each part does to the dense stream.  entry: after the steps at the block's start."""
    t = {name: value.to(entry.x.device) for name, value in found.tensors.items()}
    spec = block.spec
    mid, mixed, _ = block.attend(entry)
    if mixed is not None:
        x, a = block.norm1(entry.x), block.attention
        q, k, v = a.qkv_heads(x)
        bias = entry.size_bias()
        if "qk/left" in t:
            new_q = torch.einsum("bnd,hdr->bhnr", x, t["qk/left"])
            if "qk/bias" in t:
                new_q = new_q + t["qk/bias"][:, None]
            new_k = torch.einsum("bnd,hrd->bhnr", x, t["qk/right"])
            for rank in levels.qk[1:]:
                y = a.attend(new_q[..., :rank], new_k[..., :rank], v, bias)
                emit("qk", rank, f"mid:{i}", (y.transpose(1, 2).flatten(2) - mixed) @ a.out.weight.T)
        if "v/left" in t:
            new_v = torch.einsum("bnd,hdr->bhnr", x, t["v/left"])
            y = a.attend(q, k, new_v, bias).transpose(1, 2)  # B N H R
            for rank in levels.v[1:]:
                update = y[..., :rank].flatten(2) @ t[f"o/{rank}/w"] + t[f"o/{rank}/b"]
                emit("v", rank, f"mid:{i}", update - (mid.x - entry.x))
    theirs, ours = cf.following(block, mid, entry, "mid")
    inner = block.mid(mid)
    for kind, before, after in (
        ("mlp", inner, block.transform(inner).stream),
        ("off", ours, block.transform(theirs).stream),
    ):
        sizes = found.sizes(kind)
        if not sizes:
            continue
        hidden = block.units(before) if spec.mlp is not None else None
        for size in sizes:
            if not size:
                emit("hidden" if kind == "mlp" else "off", size, f"block:{i}", before.x + t[f"{kind}/0/b"] - after.x)
                continue
            assert hidden is not None
            if f"{kind}/{size}/frozen" in t:
                update = block.mlp.finish(hidden)
            else:
                new = hidden[..., t[f"{kind}/{size}/keep"]] @ t[f"{kind}/{size}/w"]
                if block.mlp.fc2a is not None:
                    new = new @ block.mlp.fc2.weight.T
                update = new + t[f"{kind}/{size}/b"]
            emit("hidden" if kind == "mlp" else "off", size, f"block:{i}", before.x + update - after.x)


def all_parts(work: Work) -> list[Parts]:
    """The parts of all blocks, in one walk of the dense stream."""
    found: list[Parts] = []
    count = len(work.base.blocks)
    held = cf.StreamCache(work.scratch, "dense")
    like = next(work.base.parameters())
    with torch.no_grad():
        held.fill(work.base.embed(x.to(like)) for x in work.inputs.batches("fit"))
    for i, block in enumerate(work.base.blocks):
        noted = work.journal.get(f"parts-{i}")
        if noted is None:
            found.append(block_parts(work, i, held))
            work.journal.put(f"parts-{i}", found[-1].tensors)
        else:
            found.append(Parts(noted.tensors))
        if i + 1 < count:
            with torch.no_grad():
                held.advance(block.run, work.device)
        work.tell("parts", i + 1, count)
    return found


def score(work: Work) -> Scores:
    """What every option costs alone: blocks' parts, stream widths, token schedules."""
    noted = work.journal.get("scores")
    if noted is None:
        rows = score_blocks(work, all_parts(work))
        values = [
            {kind: [[n, loss] for n, loss in sorted(getattr(one, kind).items())] for kind in KINDS} for one in rows
        ]
        work.journal.put("scores", values={"blocks": values})
    else:
        rows = [
            Losses(**{kind: {int(n): loss for n, loss in row[kind]} for kind in KINDS})
            for row in noted.values["blocks"]
        ]
    nets, base = work.nets, work.base
    trials = [("width", w) for w in nets.widths[1:]] + [("schedule", s) for s in range(1, len(nets.schedules))]
    found: dict[tuple[str, int], float] = {("width", nets.widths[0]): 0.0, ("schedule", 0): 0.0}
    for done, (kind, n) in enumerate(trials, start=1):
        known = work.journal.get(f"{kind}-{n}")
        if known is not None:
            found[kind, n] = known.values["loss"]
        elif kind == "width":
            found[kind, n] = work.divergence(work.narrowed(n, "probe")[0])
        else:
            spec = nets.spec(nets.uncut(nets.schedules[n]), tail=False)
            blocks = tuple(
                replace(b, steps=after.steps) for b, after in zip(base.spec.blocks, spec.blocks, strict=True)
            )
            merged = surgery.with_spec(base, replace(base.spec, blocks=blocks), base.state_dict(), share=True)
            found[kind, n] = work.divergence(merged)
        if known is None:
            work.journal.put(f"{kind}-{n}", values={"loss": found[kind, n]})
        work.tell("widths" if kind == "width" else "schedules", done, len(trials))
    widths: dict[int, float] = {}
    most = 0.0
    for w in nets.widths:  # no narrower stream below a wider one: what noise says otherwise
        widths[w] = most = max(most, found["width", w])
    return Scores(tuple(rows), widths, tuple(found["schedule", s] for s in range(len(nets.schedules))))


KINDS = ("qk", "v", "hidden", "off")


def score_blocks(work: Work, library: Sequence[Parts]) -> list[Losses]:
    """Each level alone, everything else dense, on the held-out images. Each scored batch is noted."""
    generator = torch.Generator().manual_seed(work.config.seed)
    total, done = len(work.inputs.rows["held"]), 0
    sums: list[dict[tuple[str, int], float]] = [{} for _ in work.base.blocks]
    for n, x in enumerate(work.inputs.batches("held")):
        noted = work.journal.get(f"scored-{n}")
        if noted is None:
            found = batch_losses(work, library, x, generator)
            plain = [[[*key, loss] for key, loss in one.items()] for one in found]
            work.journal.put(f"scored-{n}", {"signs": generator.get_state()}, {"blocks": plain})
        else:
            found = [{(part, size): loss for part, size, loss in one} for one in noted.values["blocks"]]
            generator.set_state(noted.tensors["signs"])
        for so_far, one in zip(sums, found, strict=True):
            for key, loss in one.items():
                so_far[key] = so_far.get(key, 0.0) + loss
        done += len(x)
        work.tell("score", done, total)
    rows = []
    for found_sums, levels in zip(sums, work.nets.levels, strict=True):
        losses = Losses()
        for (part, size), value in found_sums.items():
            if not math.isfinite(value):
                raise DataError("auto: a score is not finite. Check the weights and the images' normalisation.")
            getattr(losses, part)[size] = value / total
        losses.settle(levels.whole)
        rows.append(losses)
    return rows


def batch_losses(
    work: Work, library: Sequence[Parts], x: Tensor, generator: torch.Generator
) -> list[dict[tuple[str, int], float]]:
    """Of each block, by part and size: the divergences that a level causes, summed over these images [B, C, h, w]."""
    base, classifies = work.base, work.classifies
    names = tuple(f"{kind}:{i}" for i in range(len(base.blocks)) for kind in ("mid", "block"))
    x = x.to(next(base.parameters()))
    grads: fisher.Gradients | None = None
    if work.config.score == "fisher":
        grads = fisher.gradients(base, x, names, draws=work.config.draws, generator=generator)
    rows: list[dict[tuple[str, int], float]] = []
    with torch.no_grad():
        before = fisher.outcome(base(x, gates=OPEN), classifies=classifies)
        stream = base.embed(x)
        for i, (block, found) in enumerate(zip(base.blocks, library, strict=True)):
            entry = block.start(stream)
            rows.append({})

            def emit(part: str, size: int, place: str, change: Tensor, i: int = i, entry: Stream = entry) -> None:
                if grads is not None:
                    lost = grads.cost(place, change).mean(0)
                else:
                    after = fisher.outcome(_outcome_after(base, i, place, entry, change), classifies=classifies)
                    lost = fisher.divergence(before, after, classifies=classifies)
                rows[i][part, size] = float(lost.sum())

            changes(block, i, work.nets.levels[i], found, entry, emit)
            stream = block.run(stream)
    return rows


def _outcome_after(base: Vit, i: int, place: str, entry: Stream, change: Tensor) -> Tensor:
    """What the dense network answers when the stream at this place of block `i` is changed."""
    block = base.blocks[i]
    stream = block.attend(entry).stream
    if place.startswith("mid"):
        stream = stream._replace(x=stream.x + change)
    stream = block.transform(block.mid(stream)).stream
    if place.startswith("block"):
        stream = stream._replace(x=stream.x + change)
    return cf.answers(base, block.end(stream), i + 1)


# ------------------------------------------------------------------------------------------------------------- the build


class Refit:
    """A plan's network as it is built, block by block, from the dense one in the plan's stream."""

    def __init__(self, work: Work, plan: Candidate, part: str, name: str) -> None:
        self.work, self.plan, self.part, self.name = work, plan, part, name
        self.basis: narrowing.Basis | None = None
        self.start = work.base
        if plan.width != work.base.spec.width:
            self.start, self.basis = work.narrowed(plan.width, part)
        self.goal = work.nets.spec(plan, tail=False)
        self.state = dict(self.start.state_dict())
        self.kept: list[Tensor | None] = []
        """Hidden units that stay of each block; None: as they are, or none."""

    def target(self, x: Tensor) -> Tensor:
        """The dense stream as the student would have it.  B N D -> B N D'"""
        return x if self.basis is None else x @ self.basis.down.to(x)

    def metric(self, name: str) -> Tensor:
        """The place's output metric in the student's stream, mean diagonal 1."""
        wide = self.work.sites[name].metric
        if self.basis is None:
            return wide
        f = self.basis.up.mT @ wide @ self.basis.up
        mean, eye = float(f.diagonal().mean()), torch.eye(len(f), dtype=f.dtype)
        return (f / mean + FLAT * eye) / (1 + FLAT) if mean > 0 else eye  # a narrow stream has one empty direction

    def module(self, i: int, spec: BlockSpec) -> Block:
        """Block `i` with the halves of `spec` and the weights so far."""
        here = f"blocks.{i}."
        with torch.device("meta"):
            block = Block(spec, self.goal.width, self.goal.norm_eps, token_walk(self.goal)[i])
        own = {name.removeprefix(here): value for name, value in self.state.items() if name.startswith(here)}
        block.load_state_dict(own, strict=True, assign=True)
        return block.eval()

    def names(self, i: int) -> list[str]:
        return [name for name in self.state if name.startswith(f"blocks.{i}.")]

    def put(self, name: str, value: Tensor) -> None:
        like = next(iter(self.start.parameters()))
        self.state[name] = _own(value.to(like))

    def forget(self, *modules: str) -> None:
        for name in [n for n in self.state if n.startswith(tuple(f"{module}." for module in modules))]:
            del self.state[name]

    # -- one block

    def attention(self, i: int, ours: cf.StreamCache, theirs: cf.StreamCache) -> None:
        """Cut and refit the attention of block `i` on the student's stream towards the dense one."""
        before, after = self.start.spec.blocks[i].attention, self.goal.blocks[i].attention
        if before is None or not self.work.nets.levels[i].refit[0]:
            return
        here, site = f"blocks.{i}.attention", f"mid:{i}"
        if after is None:
            self.forget(here, f"blocks.{i}.norm1")
            return
        spec = replace(self.goal.blocks[i], attention=before, mlp=self.start.spec.blocks[i].mlp)
        if after.qk_dim < before.qk_dim:
            block: Block = self.module(i, spec)
            scores = parts.Scores()
            for stream in ours.batches(self.work.device):
                entry = block.start(stream)
                q, k, _ = block.attention.qkv_heads(block.norm1(entry.x))
                scores.add(q, k, self.work.weights(site, q.shape[2]).to(q))
            factors = scores.factors(block.attention).sliced(after.qk_dim)
            _, _, v, _ = parts.head_weights(block.attention)
            rows = [_rows(factors.left), _rows(factors.right.mT), _rows(v)]
            self.put(f"{here}.qkv", torch.cat(rows))
            self.state.pop(f"{here}.k_bias", None)
            if factors.left_bias is not None:
                self.put(f"{here}.q_bias", factors.left_bias.flatten())
            before = replace(before, qk_dim=after.qk_dim, k_bias=False)
            spec = replace(spec, attention=before)
        block = self.module(i, spec)
        teacher = self.work.base.blocks[i]
        stats = cf.Regression.empty(before.heads * before.v_dim, self.goal.width, device=self.work.device)
        for stream, dense in zip(ours.batches(self.work.device), theirs.batches(self.work.device), strict=True):
            dense, entry = cf.following(block, dense, stream, "start")
            mixed = block.attend(entry).mixed
            assert mixed is not None
            goal = self.target(teacher.attend(dense).stream.x) - entry.x
            stats.add(mixed, goal, self.work.weights(site, goal.shape[1]).to(goal))
        if after.v_dim < before.v_dim:
            found = parts.values(block.attention, stats, self.metric(site))
            w, b = parts.output(stats, found, after.v_dim, block.attention.v_bias, ridge=self.work.config.output_ridge)
            kept = parts.double(block.attention.qkv)[: 2 * before.heads * before.qk_dim]
            self.put(f"{here}.qkv", torch.cat([kept, _rows(found.left[..., : after.v_dim])]))
            self.state.pop(f"{here}.v_bias", None)
        else:
            w, shift = cf.refit(stats, parts.double(block.attention.out.weight).T, ridge=self.work.config.output_ridge)
            assert shift is not None
            b = shift
        self.put(f"{here}.out.weight", w.T)
        self.put(f"{here}.out.bias", b)

    def mlp(self, i: int, ours: cf.StreamCache, theirs: cf.StreamCache) -> tuple[Tensor | None, Tensor | None]:
        """Cut and refit the MLP of block `i`; gives the hidden units that stay (None: all, or none).

        Also what a block without any half should add to the stream, [D'], for the block before it.
        """
        before, after = self.start.spec.blocks[i].mlp, self.goal.blocks[i].mlp
        levels = self.work.nets.levels[i]
        lost = self.start.spec.blocks[i].attention is not None and self.goal.blocks[i].attention is None
        if not levels.refit[1] and not (before is None and lost):
            return None, None
        here, site = f"blocks.{i}.mlp", f"block:{i}"
        block: Block = self.module(i, replace(self.goal.blocks[i], mlp=before))
        teacher = self.work.base.blocks[i]
        stats = cf.Regression.empty(1 if after is None else before.hidden, self.goal.width, device=self.work.device)  # type: ignore[union-attr]
        for stream, dense in zip(ours.batches(self.work.device), theirs.batches(self.work.device), strict=True):
            dense, entry = cf.following(block, dense, stream, "start")
            dense, inner = cf.following(block, teacher.attend(dense).stream, block.attend(entry).stream, "mid")
            goal = self.target(teacher.transform(dense).stream.x) - inner.x
            hidden = goal.new_ones(*goal.shape[:2], 1) if after is None else block.units(inner)
            stats.add(hidden, goal, self.work.weights(site, goal.shape[1]).to(goal))
        if after is None:
            self.forget(here, f"blocks.{i}.norm2")
            mean = parts.mean_target(stats)
            if self.goal.blocks[i].attention is None:
                return None, mean
            if levels.refit[0]:
                bias = f"blocks.{i}.attention.out.bias"
                self.put(bias, parts.double(self.state[bias]) + mean)
            return None, None  # in front of a frozen attention the mean would change what it reads
        assert before is not None
        last, metric = parts.last_linear(block.mlp), self.metric(site)
        keep = None
        if after.hidden < before.hidden:
            order = parts.elimination(stats, last, metric, ridge=self.work.config.ridge)
            keep = order.kept(after.hidden)
            rows = torch.cat([keep, keep + before.hidden]) if before.kind == "swiglu" else keep
            for name in ("weight", "bias"):
                if f"{here}.fc1.{name}" in self.state:
                    value = self.state[f"{here}.fc1.{name}"]
                    self.put(f"{here}.fc1.{name}", value[rows.to(value.device)])
        w, b = parts.refitted(stats, last, metric, ridge=self.work.config.ridge, keep=keep)
        assert b is not None
        self.put(f"{here}.{'fc2' if last.outputs is None else 'fc2a'}.weight", w.T)
        self.put(f"{here}.fc2.bias", b)
        return keep, None

    def hand_back(self, i: int, mean: Tensor) -> bool:
        """Let the last half before block `i` add this too. False where there is none, or it is frozen."""
        if not i:
            return False
        block, refit = self.goal.blocks[i - 1], self.work.nets.levels[i - 1].refit
        if block.mlp is not None:
            name, free = f"blocks.{i - 1}.mlp.fc2.bias", refit[1]
        else:
            name, free = f"blocks.{i - 1}.attention.out.bias", refit[0] and block.attention is not None
        if free:
            self.put(name, parts.double(self.state[name]) + mean)
        return free

    @torch.no_grad()
    def build(self) -> Vit:
        """The network, with the prefix step if the result has one."""
        work, count = self.work, len(self.goal.blocks)
        like = next(work.base.parameters())
        ours, theirs = cf.StreamCache(work.scratch, "student"), cf.StreamCache(work.scratch, "teacher")
        ours.fill(self.start.embed(x.to(like)) for x in work.inputs.batches(self.part))
        theirs.fill(work.base.embed(x.to(like)) for x in work.inputs.batches(self.part))
        for i in range(count):
            noted = work.journal.get(f"{self.name}-{i}")
            shift: Tensor | None = None
            if noted is None:
                self.attention(i, ours, theirs)
                keep, mean = self.mlp(i, ours, theirs)
                if mean is not None and self.hand_back(i, mean):
                    shift = mean
                self.state |= {name: _own(self.state[name]) for name in self.names(i)}
                tensors = {name: self.state[name] for name in self.names(i)}
                extra = {"keep": keep, "shift": shift}
                work.journal.put(
                    f"{self.name}-{i}", {**tensors, **{f"/{n}": v for n, v in extra.items() if v is not None}}, {}
                )
            else:
                self.forget(f"blocks.{i}")
                self.state |= {
                    name: value.to(like.device) for name, value in noted.tensors.items() if name.startswith("blocks.")
                }
                keep, shift = noted.tensors.get("/keep"), noted.tensors.get("/shift")
                if shift is not None:
                    self.hand_back(i, shift)
            self.kept.append(keep)
            if i + 1 < count:
                self.walk(i, ours, theirs, shift)
            work.tell(self.name.split("-")[0], i + 1, count)
        spec = work.nets.spec(self.plan)
        step_ = SelectionStep(
            method="auto",
            variant=work.config.score,
            parent=spec_hash(work.model.spec),
            refit=True,
            blocks=tuple(self.record(i) for i in range(count)),
        )
        small = surgery.with_spec(work.model, spec, self.state, step_).eval()
        self.refit_heads(small)
        return small

    def refit_heads(self, small: Vit) -> None:
        """The last linear of each classifier, on what the student gives it, towards the dense logits."""
        base, like = self.work.base, next(self.work.base.parameters())
        found: dict[str, cf.Regression] = {}
        for x in self.work.inputs.batches(self.part) if small.spec.outputs else ():
            theirs = base(x.to(like), gates=OPEN, want=("outputs",))["outputs"]
            for name, seen in small(x.to(like), gates=OPEN, want=("reads",))["reads"].items():
                if name not in found:
                    found[name] = cf.Regression.empty(seen.shape[1], theirs[name].shape[1], device=self.work.device)
                found[name].add(seen, theirs[name])
        for name, stats in found.items():
            head = small.heads[name]
            assert isinstance(head, nn.Linear)
            w, b = cf.refit(stats, parts.double(head.weight).T, ridge=HEAD_RIDGE, bias=head.bias is not None)
            head.weight.copy_(w.T)
            if b is not None:
                head.bias.copy_(b)

    def walk(self, i: int, ours: cf.StreamCache, theirs: cf.StreamCache, shift: Tensor | None) -> None:
        """Both streams through block `i`, the dense one's tokens merged as the student's are."""
        block: Block = self.module(i, self.goal.blocks[i])
        teacher = self.work.base.blocks[i]
        device = self.work.device

        def shifted(stream: Stream) -> Stream:
            return stream if shift is None else stream._replace(x=stream.x + shift.to(stream.x))

        def dense(student: Stream, stream: Stream) -> Stream:
            if not block.spec.steps:
                return teacher.transform(teacher.attend(stream).stream).stream
            stream, student = cf.following(block, stream, shifted(student), "start")
            stream, student = cf.following(block, teacher.attend(stream).stream, block.attend(student).stream, "mid")
            return cf.following(block, teacher.transform(stream).stream, block.transform(student).stream, "end")[0]

        pairs = zip(ours.batches(device), theirs.batches(device), strict=True)
        theirs.fill(dense(*pair) for pair in pairs)
        ours.advance(lambda stream: block.run(shifted(stream)), device)

    def record(self, i: int) -> dict[str, Any] | None:
        """How block `i` was cut, for the selection."""
        before, after = self.work.nets.base.blocks[i], self.goal.blocks[i]
        levels = self.work.nets.levels[i]
        entry: dict[str, Any] = {}
        if before.attention is not None and levels.refit[0]:
            entry["attention"] = "gone" if after.attention is None else "rotated"
        if before.mlp is not None and levels.refit[1]:
            keep = self.kept[i]
            if after.mlp is None:
                entry["mlp"] = "gone"
            elif self.plan.width != self.work.base.spec.width:
                entry["mlp"] = "rotated"
            else:
                entry["mlp"] = {"hidden": None if keep is None else keep.tolist()}
        return entry or None


def _rows(factor: Tensor) -> Tensor:  # H D R -> (H R) D
    return factor.mT.flatten(0, 1)


# ------------------------------------------------------------------------------------------------------------- the calls


def compress(
    model: Vit,
    config: AutoConfig,
    *,
    data: Any = None,
    progress: Progress | None = None,
    folder: Path | None = None,
    resume: bool = False,
) -> Compressed:
    """Cut `model` to the config's budget on all its axes; no training, and `model` is left as it was.

    data: images, whatever `vitrim.data.open` takes (its training split, labels unused); a float tensor [n, C, h, w] is taken as
    the network's own input if the model says no preprocessing. folder: where finished pieces of work are noted, so that with
    `resume` a killed run goes on from them to the same result.
    Raises BudgetError, before anything is read, when the budget is out of reach; ConfigError where an axis does not apply;
    DataError for images that are none, too few, or all equal.
    """
    if config.budget is None:
        raise ConfigError("auto: no budget. To keep a tenth of the operations, pass budget=Budget(keep_macs=0.1).")
    return compress_family(model, config, [config.budget], data=data, progress=progress, folder=folder, resume=resume)[
        0
    ]


def compress_family(
    model: Vit,
    config: AutoConfig,
    budgets: Sequence[Budget],
    *,
    data: Any = None,
    progress: Progress | None = None,
    folder: Path | None = None,
    resume: bool = False,
) -> list[Compressed]:
    """A network for each budget, in their order, from one scoring. The config's own budget does not count. Else as `compress`."""
    reference = cost(model)
    nets = _reachable(model, config, budgets)
    cut = [budget for budget in budgets if exceeded(reference, budget.limits(reference))]
    if not cut:
        return [_untouched(model, config, nets) for _ in budgets]
    with tempfile.TemporaryDirectory(prefix="vitrim-auto-") as temporary:
        work = work_of(model, config, nets, data, progress, folder, resume, Path(temporary))
        scores = score(work)
        return [_one(work, scores, budget) if budget in cut else _untouched(model, config, nets) for budget in budgets]


def predict(
    model: Vit,
    config: AutoConfig,
    budgets: Sequence[Budget],
    *,
    data: Any = None,
    progress: Progress | None = None,
    folder: Path | None = None,
    resume: bool = False,
) -> list[dict[str, Any]]:
    """For each budget what would be cut and the divergence predicted for it, before anything is built; plain JSON values."""
    reference = cost(model)
    nets = _reachable(model, config, budgets)
    scores: Scores | None = None
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="vitrim-auto-") as temporary:
        for budget in budgets:
            limits = budget.limits(reference)
            if not exceeded(reference, limits):
                found = _described_whole(nets)
            else:
                scores = scores or score(work_of(model, config, nets, data, progress, folder, resume, Path(temporary)))
                found = _described(nets, scores, best_candidates(nets, scores, limits, reference, count=1)[0])
            rows.append({"budget": budget.to_dict(), **found})
    return rows


def _reachable(model: Vit, config: AutoConfig, budgets: Sequence[Budget]) -> Nets:
    if not budgets:
        raise ConfigError("auto: no budgets; expected one or more.")
    nets = nets_of(model.spec, config)
    lowest = cost(nets.spec(nets.lowest))
    for budget in budgets:
        budget.refuse_unreachable(floor=lowest, reference=cost(model), method="auto")
    return nets


def work_of(
    model: Vit,
    config: AutoConfig,
    nets: Nets,
    data: Any,
    progress: Progress | None,
    folder: Path | None,
    resume: bool,
    temporary: Path,
) -> Work:
    inputs = Inputs(model, data, config)
    names = (
        "axes",
        "score",
        "images",
        "batch_size",
        "draws",
        "align",
        "ridge",
        "output_ridge",
        "freeze",
        "seed",
        "exact_tail",
    )
    identity: dict[str, Any] = {name: getattr(config, name) for name in names}
    identity = {n: list(v) if isinstance(v, tuple) else v for n, v in identity.items()}
    identity |= {"spec": spec_hash(model.spec), "weights": surgery.fingerprint(model), "data": inputs.mark}
    journal = Journal(folder, "auto", identity, resume=resume)
    folded = surgery.fold_layer_scale(model, skip=nets.whole.fixed)
    base = surgery.with_spec(folded, nets.base, folded.state_dict(), share=True).eval()
    if config.device is not None:
        base = base.to(config.device)
    return Work(model, base, nets, config, inputs, journal, temporary, progress, _warnings(nets.base, nets, inputs))


def _untouched(model: Vit, config: AutoConfig, nets: Nets) -> Compressed:
    """The network as it is, for a budget that it meets."""
    record = SelectionStep(
        method="auto", variant=config.score, parent=spec_hash(model.spec), blocks=(None,) * len(model.spec.blocks)
    )
    same = surgery.with_spec(model, model.spec, model.state_dict(), record)
    report: dict[str, Any] = {
        "variant": config.score,
        "predicted_kl": 0.0,
        "reached_kl": 0.0,
        "blocks": [],
        "dense": nets.dense,
        "warnings": [],
    }
    return Compressed(model=same, method="auto", variant=config.score, report=report)


def _one(work: Work, scores: Scores, budget: Budget) -> Compressed:
    """The best of the built plans for a budget."""
    nets, config, reference = work.nets, work.config, cost(work.model)
    plans = best_candidates(nets, scores, budget.limits(reference), reference, count=config.builds)
    candidates = []
    for number, one in enumerate(plans):
        name = f"build-{_name(one)}"
        work.tell("candidates", number, len(plans), predicted=scores.total(nets, one))
        known = work.journal.get(f"{name}-reached")
        if known is None:
            reached = work.divergence(Refit(work, one, "fit", name).build())
            work.journal.put(f"{name}-reached", values={"reached": reached})
        else:
            reached = known.values["reached"]
        candidates.append({**_described(nets, scores, one), "reached_kl": reached})
    work.tell("candidates", len(plans), len(plans))
    best = min(range(len(plans)), key=lambda n: (candidates[n]["reached_kl"], n))
    small = Refit(work, plans[best], "all", f"final-{_name(plans[best])}").build()
    small = small.to(next(work.model.parameters()).device).train(work.model.training)
    chosen = candidates[best]
    report = {
        "variant": config.score,
        "metric": "KL(dense || compressed), nats"
        if work.classifies
        else "squared error of the features divided by their length",
        **chosen,
        "candidates": [
            {n: row[n] for n in ("width", "steps", "macs", "params", "predicted_kl", "reached_kl")}
            for row in candidates
        ],
        "widths": {str(w): loss for w, loss in scores.widths.items()},
        "images": {name: len(work.inputs.rows[name]) for name in ("all", "fit", "held")},
        "dense": nets.dense,
        "warnings": work.warnings,
    }
    history = [
        {"stage": "candidate", **{n: row[n] for n in ("width", "predicted_kl", "reached_kl")}} for row in candidates
    ]
    return Compressed(model=small, method="auto", variant=config.score, history=history, report=report)


def _name(plan: Candidate) -> str:
    return hashlib.sha256(repr(plan).encode()).hexdigest()[:12]


def _described(nets: Nets, scores: Scores, one: Candidate) -> dict[str, Any]:
    """A plan and its prediction, as plain JSON values."""
    at = cost(nets.spec(one))
    rows = []
    for i, (choice, levels, losses) in enumerate(zip(one.choices, nets.levels, scores.blocks, strict=True)):
        whole = levels.whole
        row: dict[str, Any] = {"block": i, "predicted_kl": losses.of(choice, whole)}
        row |= {name: [getattr(choice, name), getattr(whole, name)] for name in PARTS}
        rows.append(row)
    steps = [
        {"block": i, "kind": type(s).__name__.lower(), **{n: getattr(s, n) for n in s.__slots__}} for i, s in one.steps
    ]
    return {
        "predicted_kl": scores.total(nets, one),
        "width": [one.width, nets.base.width],
        "steps": steps,
        "exact_tail": nets.tail,
        "macs": at.macs,
        "params": at.params,
        "blocks": rows,
    }


def _described_whole(nets: Nets) -> dict[str, Any]:
    """The same of the network as given, for a budget that it meets."""
    at = cost(nets.given)
    return {
        "predicted_kl": 0.0,
        "width": [nets.base.width, nets.base.width],
        "steps": [],
        "exact_tail": surgery.has_exact_tail(nets.given),
        "macs": at.macs,
        "params": at.params,
        "blocks": [
            {"block": i, "predicted_kl": 0.0} | {name: [getattr(levels.whole, name)] * 2 for name in PARTS}
            for i, levels in enumerate(nets.levels)
        ],
    }


__all__ = ["AXES", "AutoConfig", "compress", "compress_family", "floor", "plan", "predict", "step"]
