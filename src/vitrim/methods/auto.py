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
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass as checked
from torch import Tensor, nn

from vitrim import allocation as planning
from vitrim import checkpoints, surgery
from vitrim import closed_form as cf
from vitrim import data as opened
from vitrim.budget import RESOURCES, Budget, exceeded
from vitrim.closed_form import fisher
from vitrim.closed_form import stream_width as narrowing
from vitrim.closed_form import sublayers as parts
from vitrim.counting import FLOAT_BYTES, Cost, attention_macs, attention_params, cost, mlp_macs, mlp_params
from vitrim.errors import ConfigError, DataError, TrainingError, did_you_mean
from vitrim.freezing import frozen
from vitrim.model import OPEN, Block, Stream, Vit
from vitrim.result import Compressed
from vitrim.spec import (
    AttentionSpec,
    BlockSpec,
    BlockTokens,
    Merge,
    MlpSpec,
    ModelSpec,
    Prefix,
    SelectionStep,
    Similarity,
    Step,
    spec_hash,
    token_walk,
)

AXES = ("qk", "vo", "mlp", "attention", "block", "width", "tokens", "tail")
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

Progress = Callable[..., None]
Half = tuple[int, str]


@checked(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class AutoConfig:
    """What to reach and how."""

    budget: Budget | None = None
    """Bounds on the result; None only where `compress_family` or `predict` is given several."""
    axes: tuple[str, ...] | None = None
    """What may be cut: qk, vo (ranks of the two products of attention), mlp (hidden units), attention (all of it), block (both
    halves), width (of the residual stream), tokens (merges), tail (only prefix tokens through the last block, exact). None: all
    that the network allows."""
    score: Literal["fisher", "measured"] = "fisher"
    """How options are scored: `fisher` by one backward pass, `measured` by running the rest of the network for each."""
    images: int = 256
    """Unlabelled images, drawn by seed; a quarter of them judges."""
    batch_size: int = 16
    """Images at a time; sets the memory, and the last bits of sums."""
    builds: int = 3
    """How many of the best plans are built and compared. Each has another stream width or token schedule: without these axes
    there is one, the best."""
    draws: int = 4
    """Sign vectors an image in the scores."""
    align: int = 8
    """Hidden widths and the stream's are multiples of it, and ranks of wide heads; less in narrow parts."""
    ridge: float = 3e-3
    """Pull of the MLP's last linear towards the inherited weights, as a share of the mean variance of its inputs."""
    output_ridge: float = 1e-3
    """The same of attention's output projection."""
    exact_tail: bool = True
    """False: as if `tail` were not among the axes."""
    freeze: tuple[str, ...] = ()
    """Parts that stay as they are, such as `blocks.0-2` or `blocks.11.attention`; the stream then keeps its width."""
    seed: int = 0
    """Draws the images and the signs."""
    device: str | None = None
    """Where to compute, such as cuda; None: where the model is."""

    def __post_init__(self) -> None:
        for name, least in (("images", 2), ("batch_size", 1), ("builds", 1), ("draws", 1), ("align", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"auto: {name}={getattr(self, name)!r}; expected {least} or more.")
        for name in ("ridge", "output_ridge"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigError(
                    f"auto: {name}={getattr(self, name)!r}; expected a finite number above 0, such as 0.003."
                )
        for axis in self.axes or ():
            if axis not in AXES:
                raise ConfigError(
                    f"auto: axes: unknown axis {axis!r}{did_you_mean(axis, AXES)}; known: {', '.join(AXES)}."
                )
        if self.axes is not None and not self.axes:
            raise ConfigError(f"auto: every axis is switched off; leave at least one of {', '.join(AXES)}.")


# ------------------------------------------------------------------------------------------------------- what may be cut


class Choice(NamedTuple):
    """What becomes of one block: ranks per head (0: no attention) and hidden units (0: no MLP)."""

    qk: int
    v: int
    hidden: int


Schedule = tuple[tuple[int, Step], ...]
"""Token steps to add, each with its block."""


@dataclass(frozen=True)
class Plan:
    """A network to build. width: of the stream."""

    width: int
    steps: Schedule
    choices: tuple[Choice, ...]


@dataclass(frozen=True)
class Levels:
    """What may become of one block. qk, v, hidden: sizes on offer, falling, the whole first; (0,) where the part is not there.

    off: the attention may go and the MLP stay. bare: the MLP may go and the attention stay. empty: both may go.
    refit: which halves are fitted anew, cut or not.
    """

    qk: tuple[int, ...]
    v: tuple[int, ...]
    hidden: tuple[int, ...]
    off: bool
    bare: bool
    empty: bool
    refit: tuple[bool, bool]

    @property
    def whole(self) -> Choice:
        return Choice(self.qk[0], self.v[0], self.hidden[0])


def has_tail(spec: ModelSpec) -> bool:
    return bool(spec.blocks) and any(isinstance(step, Prefix) for step in spec.blocks[-1].steps)


def without_tail(spec: ModelSpec) -> ModelSpec:
    """The spec without its prefix step: the same outputs, all tokens through the last block."""
    if not has_tail(spec):
        return spec
    last = spec.blocks[-1]
    kept = tuple(step for step in last.steps if not isinstance(step, Prefix))
    return replace(spec, blocks=(*spec.blocks[:-1], replace(last, steps=kept)))


@dataclass(frozen=True)
class Room:
    """What may be cut of one network. base: its spec, LayerScale folded, without prefix step. tail: the result has one.

    dense: what stays, and why. widths: of the stream, the whole first. schedules: token steps, none first.
    """

    given: ModelSpec
    base: ModelSpec
    fixed: frozenset[Half]
    tail: bool
    axes: frozenset[str]
    dense: dict[str, str]
    align: int
    levels: tuple[Levels, ...]
    widths: tuple[int, ...]
    schedules: tuple[Schedule, ...]

    def at_width(self, width: int) -> ModelSpec:
        """The base with another stream."""
        if width not in self._bases:
            self._bases[width] = self.base if width == self.base.width else narrowing.narrowed_spec(self.base, width)
        return self._bases[width]

    @cached_property
    def _bases(self) -> dict[int, ModelSpec]:
        return {}

    def bounded(self, i: int, width: int) -> Levels:
        """A block's levels in a stream of this width, whose products have no rank of it or above."""
        levels = self.levels[i]
        if width == self.base.width:
            return levels
        below = [tuple(n for n in sizes if n < width) or sizes[:1] for sizes in (levels.qk, levels.v)]
        return replace(levels, qk=below[0], v=below[1])

    def cut(self, i: int, block: BlockSpec, choice: Choice) -> BlockSpec:
        """A block of the base, or of a narrowed one, after a choice."""
        a, m = block.attention, block.mlp
        levels = self.levels[i]
        if a is not None and levels.refit[0]:
            if not choice.qk:
                a = None
            else:
                a = replace(a, out_bias=True)
                if choice.qk < a.qk_dim:
                    a = replace(a, qk_dim=choice.qk, k_bias=False)
                if choice.v < a.v_dim:
                    a = replace(a, v_dim=choice.v, v_bias=False)
        if m is not None and levels.refit[1]:
            m = replace(m, hidden=choice.hidden, fc2_bias=True) if choice.hidden else None
        return replace(block, attention=a, mlp=m)

    def spec(self, plan: Plan, *, tail: bool | None = None) -> ModelSpec:
        """The network of a plan. tail: whether with the prefix step; None: as the result has it."""
        base = self.at_width(plan.width)
        blocks = [
            self.cut(i, block, choice) for i, (block, choice) in enumerate(zip(base.blocks, plan.choices, strict=True))
        ]
        for i, step in plan.steps:
            blocks[i] = replace(blocks[i], steps=(*blocks[i].steps, step))
        if self.tail if tail is None else tail:
            blocks[-1] = replace(blocks[-1], steps=(*blocks[-1].steps, Prefix()))
        return replace(base, blocks=tuple(blocks))

    def choices(self, i: int, width: int) -> list[Choice]:
        """All that block `i` may become in a stream of this width."""
        levels = self.bounded(i, width)
        if levels not in self._choices:
            found = [Choice(*sizes) for sizes in product(levels.qk, levels.v, levels.hidden)]
            if levels.bare:
                found += [Choice(a, v, 0) for a, v in product(levels.qk, levels.v)]
            if levels.off:
                found += [Choice(0, 0, m) for m in levels.hidden]
            if levels.empty:
                found.append(Choice(0, 0, 0))
            self._choices[levels] = found
        return self._choices[levels]

    @cached_property
    def _choices(self) -> dict[Levels, list[Choice]]:
        return {}

    @cached_property
    def unit(self) -> dict[str, int]:
        """How far below a budget the result may end, by resource."""
        return _step(self)

    @cached_property
    def lowest(self) -> Plan:
        """The cheapest network."""
        width = self.widths[-1]
        choices = []
        for i in range(len(self.base.blocks)):
            levels = self.bounded(i, width)
            least = Choice(levels.qk[-1], levels.v[-1], levels.hidden[-1])
            if levels.empty:
                least = Choice(0, 0, 0)
            elif levels.bare or levels.off:
                trials = [least] + [least._replace(hidden=0)] * levels.bare + [Choice(0, 0, least.hidden)] * levels.off
                at = token_walk(self.spec(Plan(width, (), (least,) * len(self.base.blocks))))[i]
                least = min(trials, key=lambda c, i=i, at=at: self.price(i, self.at_width(width), at, c))  # type: ignore[misc]
            choices.append(least)
        plans = [Plan(width, steps, tuple(choices)) for steps in self.schedules]
        return min(plans, key=lambda plan: cost(self.spec(plan)).macs)

    def price(self, i: int, base: ModelSpec, at: BlockTokens, choice: Choice) -> tuple[int, int]:
        """MACs and parameters of block `i` of `at_width`'s base after a choice, token steps apart."""
        block = self.cut(i, base.blocks[i], choice)
        return tuple(
            x + y for x, y in zip(_attention(block.attention, base, at), _mlp(block.mlp, base, at), strict=True)
        )  # type: ignore[return-value]


def _attention(a: AttentionSpec | None, base: ModelSpec, at: BlockTokens) -> tuple[int, int]:
    if a is None:
        return 0, 0
    macs = attention_macs(a.heads, a.qk_dim, a.v_dim, tokens=at.keys.count, width=base.width, queries=at.queries.count)
    return macs + 2 * base.width * a.gate, attention_params(a, base.width)


def _mlp(m: MlpSpec | None, base: ModelSpec, at: BlockTokens) -> tuple[int, int]:
    if m is None:
        return 0, 0
    macs = mlp_macs(
        m.hidden, tokens=at.mlp.count, width=base.width, kind=m.kind, fc1_rank=m.fc1_rank, fc2_rank=m.fc2_rank
    )
    return macs + 2 * base.width * m.gate, mlp_params(m, base.width)


def room_of(spec: ModelSpec, config: AutoConfig) -> Room:
    """What the config may cut of this spec. Raises ConfigError where an axis that was asked for does not apply, or none does."""
    fixed = frozen(spec, config.freeze)
    base = without_tail(surgery.with_folded(spec, skip=fixed))
    asked = tuple(axis for axis in config.axes or AXES if axis != "tail" or config.exact_tail)
    dense = {f"block {i} {half}": "frozen" for i, half in sorted(fixed)}
    if spec.outputs:
        dense["classifier"] = "not cut, only refitted"
    if spec.pool.kind == "map":
        dense["attention pooling"] = "costed, never cut"
    why = {
        "width": "parts are frozen, and another stream width changes every part" if fixed else narrowing.refusal(base),
        "tokens": _tokens_refusal(base),
        "tail": _tail_refusal(spec, fixed),
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
        unit = step_of(base.width, config.align)
        widths = tuple(n for n in _sizes(base.width, WIDTHS, unit) if n >= 2)
    room = Room(
        given=spec,
        base=base,
        fixed=fixed,
        tail=has_tail(spec) or "tail" in axes,
        axes=frozenset(axes),
        dense=dense,
        align=config.align,
        levels=levels,
        widths=widths,
        schedules=_schedules(base) if "tokens" in axes else ((),),
    )
    single = len(widths) == 1 and len(room.schedules) == 1 and room.tail == has_tail(spec)
    if single and all(len(room.choices(i, base.width)) == 1 for i in range(len(base.blocks))):
        raise ConfigError(
            f"auto: nothing of this network can be cut on the axes {', '.join(asked)}"
            f"{' with the parts that are frozen' if fixed else ''}. Allow more of them."
        )
    return room


def _tail_refusal(spec: ModelSpec, fixed: frozenset[Half]) -> str | None:
    if has_tail(spec):
        return None
    if not surgery.allows_exact_tail(spec):
        return "the network reads more than prefix tokens, or its last block has token steps"
    if any(i == len(spec.blocks) - 1 for i, _ in fixed):
        return "the last block is frozen"
    return None


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


def step_of(size: int, align: int) -> int:
    """The unit of a hidden width or of the stream: `align`, or a sixteenth of a part too narrow for eight of them."""
    return align if size >= 8 * align else max(1, size // 16)


def _sizes(size: int, shares: Sequence[float], unit: int) -> tuple[int, ...]:
    """Sizes on offer, falling, the whole first: multiples of the unit."""
    found = {min(size, max(unit, round(share * size / unit) * unit)) for share in shares} | {size}
    return tuple(sorted(found, reverse=True))


def _levels(
    spec: ModelSpec, i: int, fixed: frozenset[Half], axes: set[str], align: int, dense: dict[str, str]
) -> Levels:
    block = spec.blocks[i]
    a, m = block.attention, block.mlp
    free = ((i, "attention") not in fixed, (i, "mlp") not in fixed)
    qk: tuple[int, ...] = (0,)
    v: tuple[int, ...] = (0,)
    hidden: tuple[int, ...] = (0,)
    if a is not None:
        qk, v = (a.qk_dim,), (a.v_dim,)
        if free[0] and "qk" in axes:
            if a.qk_norm != "none":
                dense[f"block {i} qk"] = f"{a.qk_norm} norm between queries and keys"
            else:
                qk = tuple(
                    n for n in _sizes(a.qk_dim, RANKS, step_of(a.qk_dim, align)) if n in (a.qk_dim,) or n < spec.width
                )
        if free[0] and "vo" in axes:
            v = tuple(n for n in _sizes(a.v_dim, RANKS, step_of(a.v_dim, align)) if n in (a.v_dim,) or n < spec.width)
    if m is not None:
        hidden = (m.hidden,)
        if free[1] and "mlp" in axes:
            hidden = _sizes(m.hidden, UNITS, step_of(m.hidden, align))
    return Levels(
        qk=qk,
        v=v,
        hidden=hidden,
        off=a is not None and m is not None and free[0] and "attention" in axes,
        bare=a is not None and m is not None and free[1] and "mlp" in axes,
        empty=(a is not None or m is not None) and all(free) and "block" in axes,
        refit=(a is not None and free[0], m is not None and free[1]),
    )


def floor(spec: ModelSpec, config: AutoConfig | None = None) -> Cost:
    """The cheapest network that the method makes of this spec."""
    room = room_of(spec, config or AutoConfig())
    return cost(room.spec(room.lowest))


def step(spec: ModelSpec, config: AutoConfig | None = None) -> dict[str, int]:
    """How far below a budget the result may end, by resource (law 7): one unit of the part whose unit costs most.

    Where ranks and hidden units do not fill all of the range, the largest jump between what they fill counts.
    """
    return room_of(spec, config or AutoConfig()).unit


def _step(room: Room) -> dict[str, int]:
    whole = Plan(room.base.width, (), tuple(levels.whole for levels in room.levels))
    before = cost(room.spec(whole))
    found = {name: max(0, getattr(cost(room.given), name) - getattr(before, name)) for name in RESOURCES}

    def count(plan: Plan, above: Plan = whole) -> None:
        high, low = cost(room.spec(above)), cost(room.spec(plan))
        for name in RESOURCES:
            found[name] = max(found[name], getattr(high, name) - getattr(low, name))

    def with_choice(i: int, choice: Choice) -> Plan:
        return replace(whole, choices=(*whole.choices[:i], choice, *whole.choices[i + 1 :]))

    seen: set[tuple[Any, ...]] = set()
    for i, levels in enumerate(room.levels):
        top = levels.whole
        key = (room.base.blocks[i], levels, i == len(room.levels) - 1)
        if key in seen:
            continue
        seen.add(key)
        for name, sizes in (("qk", levels.qk), ("v", levels.v), ("hidden", levels.hidden)):
            if len(sizes) > 1:
                size = sizes[0]
                count(with_choice(i, top._replace(**{name: max(1, size - step_of(size, room.align))})))
    for name, most in _gaps(room, whole).items():
        found[name] = max(found[name], most)
    return found


def _gaps(room: Room, whole: Plan) -> dict[str, int]:
    """The largest stretch of each resource that no ranks and hidden widths fill.

    They fill the stretches below each stream width with no half gone, and with those of the first blocks gone. Between these
    lie jumps; so do they between the network as given and the same with an exact tail.
    """
    count = len(room.levels)
    kinds = [kind for kind in ("off", "empty") if any(getattr(levels, kind) for levels in room.levels)]
    given = cost(room.given)

    def stretch(width: int, kind: str, lost: int) -> tuple[Cost, Cost]:
        bounds = [room.bounded(i, width) for i in range(count)]
        ends = []
        for sizes in (
            [Choice(levels.qk[-1], levels.v[-1], levels.hidden[-1]) for levels in bounds],
            [levels.whole for levels in room.levels],
        ):
            for i in range(lost):
                if getattr(room.levels[i], kind):
                    sizes[i] = Choice(0, 0, sizes[i].hidden if kind == "off" else 0)
            ends.append(cost(room.spec(Plan(width, (), tuple(sizes)))))
        return ends[0], ends[1]

    points = [room.lowest, *(replace(whole, steps=steps) for steps in room.schedules[1:])]
    stretches = [(at, at) for at in (given, *(cost(room.spec(one)) for one in points))]
    stretches += [stretch(width, "", 0) for width in room.widths]
    found = _jumps(stretches)
    if any(jump > getattr(given, name) / 100 for name, jump in found.items()):
        more = product(room.widths[-1:], kinds, range(1, count + 1))
        found = _jumps([*stretches, *(stretch(*one) for one in more)])
    return found


def _jumps(stretches: Sequence[tuple[Cost, Cost]]) -> dict[str, int]:
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
    """What can be said from the spec alone: range, step, needs, what stays dense and why.

    Raises BudgetError when the config's budget is out of reach, ConfigError where an axis does not apply.
    """
    config = config or AutoConfig()
    room = room_of(spec, config)
    reference, least = cost(spec), cost(room.spec(room.lowest))
    if config.budget is not None:
        config.budget.refuse_unreachable(floor=least, reference=reference, method="auto")
    return {
        "method": "auto",
        "variant": config.score,
        "range": {name: [getattr(least, name), getattr(reference, name)] for name in RESOURCES},
        "step": room.unit,
        "needs": {"images": config.images, "labels": False, "training": False},
        "dense": room.dense,
    }


# ------------------------------------------------------------------------------------------------------- costs and plans


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

    def total(self, room: Room, plan: Plan) -> float:
        """The predicted divergence of a plan: the sum of its parts."""
        net = self.widths[plan.width] + self.schedules[room.schedules.index(plan.steps)]
        rows = zip(self.blocks, plan.choices, room.levels, strict=True)
        return net + sum(losses.of(choice, levels.whole) for losses, choice, levels in rows)


class Bench:
    """Costs of every option in one stream width and token schedule."""

    def __init__(self, room: Room, scores: Scores, width: int, steps: Schedule) -> None:
        self.room, self.scores, self.width, self.steps = room, scores, width, steps
        self.base = room.at_width(width)
        whole = Plan(width, steps, tuple(levels.whole for levels in room.levels))
        self.walk = token_walk(room.spec(whole))
        self.rest: np.ndarray | None = None
        self.choices: list[list[Choice]] = []
        self.tables: list[planning.Table] = []
        self.peaks: list[np.ndarray] | None = None
        for i in range(len(self.base.blocks)):
            choices = room.choices(i, width)
            first: dict[tuple[int, int], tuple[int, int]] = {}
            second: dict[int, tuple[int, int]] = {}
            for choice in choices:
                if choice[:2] not in first or choice.hidden not in second:
                    block = room.cut(i, self.base.blocks[i], choice)
                    first.setdefault(choice[:2], _attention(block.attention, self.base, self.walk[i]))
                    second.setdefault(choice.hidden, _mlp(block.mlp, self.base, self.walk[i]))
            costs = np.array([first[c[:2]] for c in choices]) + np.array([second[c.hidden] for c in choices])
            top = room.levels[i].whole
            loss = np.array([scores.blocks[i].of(c, top) for c in choices])
            self.choices.append(choices)
            self.tables.append(planning.Table(costs.astype(np.int64).reshape(-1, 2), loss))
        found = cost(room.spec(self.plan([c[0] for c in self.choices])))
        self.rest = np.array([found.macs, found.params]) - sum(
            (t.costs[0] for t in self.tables), np.zeros(2, dtype=np.int64)
        )

    def plan(self, choices: Sequence[Choice]) -> Plan:
        return Plan(self.width, self.steps, tuple(choices))

    def solve(self, limits: Mapping[str, int], *, whole_parts: bool) -> Plan | None:
        """The least loss within the limits. whole_parts: no half may go altogether."""
        bounds = {"macs": limits.get("macs"), "params": limits.get("params")}
        if "file_bytes" in limits:
            bounds["params"] = min(limits["file_bytes"] // FLOAT_BYTES, bounds["params"] or limits["file_bytes"])
        allowed = [np.ones(len(c), dtype=bool) for c in self.choices]
        if whole_parts:
            allowed = [
                np.array(
                    [bool(c.qk) == bool(own.whole.qk) and bool(c.hidden) == bool(own.whole.hidden) for c in choices]
                )
                for choices, own in zip(self.choices, self.room.levels, strict=True)
            ]
        if "memory_bytes" not in limits:
            return self._within(bounds, allowed)
        found = []
        for cap in self._caps(limits["memory_bytes"]):
            most = (limits["memory_bytes"] - cap) // FLOAT_BYTES
            tighter = {**bounds, "params": most if bounds["params"] is None else min(most, bounds["params"])}
            assert self.peaks is not None
            kept = [a & (p <= cap) for a, p in zip(allowed, self.peaks, strict=True)]
            if all(k.any() for k in kept) and (one := self._within(tighter, kept)) is not None:
                found.append(one)
        return min(found, key=lambda one: self.scores.total(self.room, one), default=None)

    def _within(self, bounds: Mapping[str, int | None], allowed: Sequence[np.ndarray]) -> Plan | None:
        columns = [n for n, name in enumerate(("macs", "params")) if bounds[name] is not None]
        assert self.rest is not None
        room = [int(bounds[("macs", "params")[n]]) - int(self.rest[n]) for n in columns]  # type: ignore[arg-type]
        rows = [np.flatnonzero(a) for a in allowed]
        tables = [planning.Table(t.costs[r][:, columns], t.loss[r]) for t, r in zip(self.tables, rows, strict=True)]
        found = planning.allocate(tables, room)
        return (
            None if found is None else self.plan([c[r[j]] for c, r, j in zip(self.choices, rows, found, strict=True)])
        )

    def _caps(self, limit: int) -> list[int]:
        """Bounds on the largest activation worth trying, and with them the peak of every option."""
        if self.peaks is None:
            self.peaks = [np.array([self._peak(i, c) for c in choices]) for i, choices in enumerate(self.choices)]
        least = max((int(p.min()) for p in self.peaks), default=0)
        every = sorted({int(v) for p in self.peaks for v in p if least <= v < limit})
        if len(every) > PEAKS:
            every = [every[round(n * (len(every) - 1) / (PEAKS - 1))] for n in range(PEAKS)]
        return every

    def _peak(self, i: int, choice: Choice) -> int:
        """Activation bytes of a network in which this is the only block."""
        if not hasattr(self, "_seen"):
            self._seen: dict[tuple[int, int, int], int] = {}
        key = (i, choice.qk + choice.v, choice.hidden)
        if key not in self._seen:
            empty = tuple(replace(b, attention=None, mlp=None) for b in self.base.blocks)
            spec = self.room.spec(self.plan([Choice(0, 0, 0)] * len(empty)))
            block = self.room.cut(i, self.base.blocks[i], choice)
            blocks = [replace(b, attention=None, mlp=None) for b in spec.blocks]
            blocks[i] = replace(blocks[i], attention=block.attention, mlp=block.mlp)
            self._seen[key] = cost(replace(spec, blocks=tuple(blocks))).activation_bytes
        return self._seen[key]

    def filled(self, plan: Plan, limits: Mapping[str, int], reference: Cost) -> Plan:
        """The plan with what is left of the budget spent: unit by unit where a unit is worth most."""
        plan = self._fill(plan, limits, self.room.align)
        used = cost(self.room.spec(plan))
        if all(limit - getattr(used, name) > getattr(reference, name) / 100 for name, limit in limits.items()):
            plan = self._fill(plan, limits, 1)
        return plan

    def _fill(self, plan: Plan, limits: Mapping[str, int], align: int) -> Plan:
        choices = list(plan.choices)
        spent = cost(self.room.spec(plan))
        used = {"macs": spent.macs, "params": spent.params}
        bounds = {"macs": limits.get("macs", spent.macs * 10**6), "params": limits.get("params", 10**18)}
        bounds["params"] = min(bounds["params"], limits.get("file_bytes", 10**18) // FLOAT_BYTES)
        currency = "macs" if "macs" in limits else "params"
        moves: dict[tuple[int, str], tuple[float, Choice, int, int]] = {}
        closed: set[tuple[int, str]] = set()

        def look(i: int) -> None:
            levels, now = self.room.bounded(i, self.width), choices[i]
            whole = self.room.levels[i].whole
            before = self.room.price(i, self.base, self.walk[i], now)
            for name in Choice._fields:
                moves.pop((i, name), None)
                sizes, size = getattr(levels, name), getattr(now, name)
                gone = not now.qk and bool(whole.qk) and not (name == "hidden" and levels.off)
                if len(sizes) == 1 or size >= sizes[0] or (i, name) in closed or gone:
                    continue
                unit = step_of(getattr(whole, name), align)
                after = now._replace(**{name: min(sizes[0], (size // unit + 1) * unit)})
                price = self.room.price(i, self.base, self.walk[i], after)
                macs, params = price[0] - before[0], price[1] - before[1]
                gain = self.scores.blocks[i].of(now, whole) - self.scores.blocks[i].of(after, whole)
                worth = (gain + 1e-30) / max(macs if currency == "macs" else params, 1)
                moves[i, name] = (worth, after, macs, params)

        for i in range(len(choices)):
            look(i)
        while moves:
            key = max(moves, key=lambda k: (moves[k][0], -k[0], k[1]))
            _, after, macs, params = moves.pop(key)
            fits = used["macs"] + macs <= bounds["macs"] and used["params"] + params <= bounds["params"]
            if fits and "memory_bytes" in limits:
                trial = self.plan([*choices[: key[0]], after, *choices[key[0] + 1 :]])
                fits = cost(self.room.spec(trial)).memory_bytes <= limits["memory_bytes"]
            if not fits:
                closed.add(key)  # budgets only fill up: what does not fit now never will
                continue
            choices[key[0]] = after
            used = {"macs": used["macs"] + macs, "params": used["params"] + params}
            look(key[0])
        return self.plan(choices)


def best_plans(room: Room, scores: Scores, limits: Mapping[str, int], reference: Cost, *, count: int) -> list[Plan]:
    """The plans of the least predicted divergence within the limits, each of another stream width or token schedule.

    Exact over blocks within each of them. Those that leave more of the budget than law 7 allows
    count only where there are no others.
    """
    nets = sorted(
        (scores.widths[w] + scores.schedules[s], w, s) for w in room.widths for s in range(len(room.schedules))
    )
    near = {name: max(getattr(reference, name) // 100, unit) for name, unit in room.unit.items()}
    found: list[tuple[bool, float, Plan]] = []
    for net, width, s in nets:
        full = sorted(total for loose, total, _ in found if not loose)
        if len(full) >= count and net >= full[count - 1]:
            break  # its parts can only add to that
        bench = Bench(room, scores, width, room.schedules[s])
        for whole_parts in (False, True):
            plan = bench.solve(limits, whole_parts=whole_parts)
            if plan is None:
                break
            plan = bench.filled(plan, limits, reference)
            at = cost(room.spec(plan))
            loose = all(limit - getattr(at, name) > near[name] for name, limit in limits.items())
            if not loose or not whole_parts:
                found.append((loose, scores.total(room, plan), plan))
            if not loose:
                break
    if not found:
        assert not exceeded(cost(room.spec(room.lowest)), limits)
        found.append((True, scores.total(room, room.lowest), room.lowest))
    found.sort(key=lambda one: one[:2])
    chosen: list[Plan] = []
    for loose, _, plan in found:
        if plan not in chosen and loose == found[0][0]:
            assert not exceeded(cost(room.spec(plan)), limits)
            chosen.append(plan)
    return chosen[:count]


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


def _warnings(base: ModelSpec, room: Room, inputs: Inputs) -> list[str]:
    """What the images are too few for."""
    unknowns = 0
    for block, levels in zip(base.blocks, room.levels, strict=True):
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


class Notes:
    """What a killed run goes on from: one small checkpoint for each finished piece of work. folder None: keeps nothing."""

    def __init__(self, folder: Path | None, identity: Mapping[str, Any], *, resume: bool) -> None:
        self.folder = None if folder is None else folder / "auto"
        if self.folder is None:
            return
        there = self.folder.is_dir() and any(self.folder.iterdir())
        if there and not resume:
            raise TrainingError(
                f"{self.folder.parent.name}/ holds an auto run already; nothing is overwritten. Pass resume=True (--resume) to go "
                "on with it, or choose another folder."
            )
        before = self.get("run")
        if before is None:
            self.put("run", {}, dict(identity))
            return
        for key, value in identity.items():
            if before[1].get(key) != value:
                raise TrainingError(
                    f"{self.folder.parent.name}/ holds another run: {key} was {before[1].get(key)!r} and is {value!r}. Resume "
                    "with the same model, settings and data, or choose another folder."
                )

    def get(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Tensors and plain values of a finished piece."""
        if self.folder is None:
            return None
        checkpoints.sweep(self.folder / name)
        path = checkpoints.newest(self.folder / name)
        if path is None:
            return None
        tensors, values = checkpoints.read(path)
        # copies: sums over memory that starts elsewhere may round otherwise, and a resumed run must not differ
        return {name: tensor.clone() for name, tensor in tensors.items()}, values

    def put(self, name: str, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        if self.folder is not None:
            checkpoints.write(self.folder / name, 0, tensors or {"none": torch.zeros(1)}, values)


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
    """What all steps share. model: as given. base: LayerScale folded, no prefix step. room_folder: for held streams."""

    model: Vit
    base: Vit
    room: Room
    config: AutoConfig
    inputs: Inputs
    notes: Notes
    room_folder: Path
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
        noted = self.notes.get("sensitivity")
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
            self.notes.put("sensitivity", tensors, {})
            return found
        names = [f"{kind}:{i}" for i in range(len(self.base.blocks)) for kind in ("mid", "block")]
        return {n: cf.Sensitivity(tokens=noted[0][f"{n}/tokens"], matrix=noted[0][f"{n}/matrix"]) for n in names}

    def takes_mean(self, i: int) -> bool:
        """Whether what block `i` adds on average can go into a bias before it, should the block go."""
        if not i:
            return False
        before, refit = self.base.spec.blocks[i - 1], self.room.levels[i - 1].refit
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
        noted = self.notes.get("stream")
        if noted is not None:
            return noted[0]["gram"]
        total = narrowing.Stream.empty(self.base.spec.width)
        prefix = len(self.base.spec.prefix)

        like = next(self.base.parameters())
        for x in self.inputs.batches("fit"):
            for _, seen in narrowing.readings(self.base, x.to(like)):
                total.add(seen, prefix)
        self.notes.put("stream", {"gram": total.gram}, {})
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
    spec, levels = block.spec, work.room.levels[i]
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
    for name, stats, sizes in (("mlp", mlp, levels.hidden[1:]), ("off", off, levels.hidden)):
        if stats is None:
            continue
        last, metric = parts.last_linear(block.mlp), _metric(work, f"block:{i}")
        order = parts.elimination(stats, last, metric, ridge=work.config.ridge)
        for size in sizes:
            kept = order.kept(size)
            w, b = parts.refitted(stats, last, metric, ridge=work.config.ridge, keep=kept)
            keep(f"{name}/{size}/keep", kept)
            keep(f"{name}/{size}/w", w)
            keep(f"{name}/{size}/b", b)
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


def changes(block: Block, i: int, levels: Levels, found: Parts, entry: Stream, emit: Emit) -> None:
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
    held = cf.StreamCache(work.room_folder, "dense")
    like = next(work.base.parameters())
    with torch.no_grad():
        held.fill(work.base.embed(x.to(like)) for x in work.inputs.batches("fit"))
    for i, block in enumerate(work.base.blocks):
        noted = work.notes.get(f"parts-{i}")
        if noted is None:
            found.append(block_parts(work, i, held))
            work.notes.put(f"parts-{i}", found[-1].tensors, {})
        else:
            found.append(Parts({name: value for name, value in noted[0].items() if name != "none"}))
        if i + 1 < count:
            with torch.no_grad():
                held.advance(block.run, work.device)
        work.tell("parts", i + 1, count)
    return found


def score(work: Work) -> Scores:
    """What every option costs alone: blocks' parts, stream widths, token schedules."""
    noted = work.notes.get("scores")
    if noted is None:
        rows = score_blocks(work, all_parts(work))
        values = [
            {kind: [[n, loss] for n, loss in sorted(getattr(one, kind).items())] for kind in KINDS} for one in rows
        ]
        work.notes.put("scores", {}, {"blocks": values})
    else:
        rows = [
            Losses(**{kind: {int(n): loss for n, loss in row[kind]} for kind in KINDS}) for row in noted[1]["blocks"]
        ]
    room, base = work.room, work.base
    nets = [("width", w) for w in room.widths[1:]] + [("schedule", s) for s in range(1, len(room.schedules))]
    found: dict[tuple[str, int], float] = {("width", room.widths[0]): 0.0, ("schedule", 0): 0.0}
    for done, (kind, n) in enumerate(nets, start=1):
        known = work.notes.get(f"{kind}-{n}")
        if known is not None:
            found[kind, n] = known[1]["loss"]
        elif kind == "width":
            found[kind, n] = work.divergence(work.narrowed(n, "probe")[0])
        else:
            spec = room.spec(
                Plan(base.spec.width, room.schedules[n], tuple(levels.whole for levels in room.levels)), tail=False
            )
            blocks = tuple(
                replace(b, steps=after.steps) for b, after in zip(base.spec.blocks, spec.blocks, strict=True)
            )
            merged = surgery.with_spec(base, replace(base.spec, blocks=blocks), base.state_dict(), share=True)
            found[kind, n] = work.divergence(merged)
        if known is None:
            work.notes.put(f"{kind}-{n}", {}, {"loss": found[kind, n]})
        work.tell("widths" if kind == "width" else "schedules", done, len(nets))
    widths: dict[int, float] = {}
    most = 0.0
    for w in room.widths:  # no narrower stream below a wider one: what noise says otherwise
        widths[w] = most = max(most, found["width", w])
    return Scores(tuple(rows), widths, tuple(found["schedule", s] for s in range(len(room.schedules))))


KINDS = ("qk", "v", "hidden", "off")


def score_blocks(work: Work, library: Sequence[Parts]) -> list[Losses]:
    """Each level alone, everything else dense, on the held-out images. Each scored batch is noted."""
    generator = torch.Generator().manual_seed(work.config.seed)
    total, done = len(work.inputs.rows["held"]), 0
    sums: list[dict[tuple[str, int], float]] = [{} for _ in work.base.blocks]
    for n, x in enumerate(work.inputs.batches("held")):
        noted = work.notes.get(f"scored-{n}")
        if noted is None:
            found = batch_losses(work, library, x, generator)
            plain = [[[*key, loss] for key, loss in one.items()] for one in found]
            work.notes.put(f"scored-{n}", {"signs": generator.get_state()}, {"blocks": plain})
        else:
            found = [{(part, size): loss for part, size, loss in one} for one in noted[1]["blocks"]]
            generator.set_state(noted[0]["signs"])
        for so_far, one in zip(sums, found, strict=True):
            for key, loss in one.items():
                so_far[key] = so_far.get(key, 0.0) + loss
        done += len(x)
        work.tell("score", done, total)
    rows = []
    for found_sums, levels in zip(sums, work.room.levels, strict=True):
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

            changes(block, i, work.room.levels[i], found, entry, emit)
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


class Student:
    """A plan's network as it is built, block by block, from the dense one in the plan's stream."""

    def __init__(self, work: Work, plan: Plan, part: str, name: str) -> None:
        self.work, self.plan, self.part, self.name = work, plan, part, name
        self.basis: narrowing.Basis | None = None
        self.start = work.base
        if plan.width != work.base.spec.width:
            self.start, self.basis = work.narrowed(plan.width, part)
        self.goal = work.room.spec(plan, tail=False)
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
        if before is None or not self.work.room.levels[i].refit[0]:
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
        levels = self.work.room.levels[i]
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
        self.put(f"{here}.{'fc2' if last.outputs is None else 'fc2a'}.weight", w.T)
        self.put(f"{here}.fc2.bias", b)
        return keep, None

    def hand_back(self, i: int, mean: Tensor) -> bool:
        """Let the last half before block `i` add this too. False where there is none, or it is frozen."""
        if not i:
            return False
        block, refit = self.goal.blocks[i - 1], self.work.room.levels[i - 1].refit
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
        ours, theirs = cf.StreamCache(work.room_folder, "student"), cf.StreamCache(work.room_folder, "teacher")
        ours.fill(self.start.embed(x.to(like)) for x in work.inputs.batches(self.part))
        theirs.fill(work.base.embed(x.to(like)) for x in work.inputs.batches(self.part))
        for i in range(count):
            noted = work.notes.get(f"{self.name}-{i}")
            shift: Tensor | None = None
            if noted is None:
                self.attention(i, ours, theirs)
                keep, mean = self.mlp(i, ours, theirs)
                if mean is not None and self.hand_back(i, mean):
                    shift = mean
                self.state |= {name: _own(self.state[name]) for name in self.names(i)}
                tensors = {name: self.state[name] for name in self.names(i)}
                extra = {"keep": keep, "shift": shift}
                work.notes.put(
                    f"{self.name}-{i}", {**tensors, **{f"/{n}": v for n, v in extra.items() if v is not None}}, {}
                )
            else:
                self.forget(f"blocks.{i}")
                self.state |= {
                    name: value.to(like.device) for name, value in noted[0].items() if name.startswith("blocks.")
                }
                keep, shift = noted[0].get("/keep"), noted[0].get("/shift")
                if shift is not None:
                    self.hand_back(i, shift)
            self.kept.append(keep)
            if i + 1 < count:
                self.walk(i, ours, theirs, shift)
            work.tell(self.name.split("-")[0], i + 1, count)
        spec = work.room.spec(self.plan)
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
        before, after = self.work.room.base.blocks[i], self.goal.blocks[i]
        levels = self.work.room.levels[i]
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
    room = _reachable(model, config, budgets)
    cut = [budget for budget in budgets if exceeded(reference, budget.limits(reference))]
    if not cut:
        return [_untouched(model, config, room) for _ in budgets]
    with tempfile.TemporaryDirectory(prefix="vitrim-auto-") as temporary:
        work = _work(model, config, room, data, progress, folder, resume, Path(temporary))
        scores = score(work)
        return [_one(work, scores, budget) if budget in cut else _untouched(model, config, room) for budget in budgets]


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
    room = _reachable(model, config, budgets)
    scores: Scores | None = None
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="vitrim-auto-") as temporary:
        for budget in budgets:
            limits = budget.limits(reference)
            if not exceeded(reference, limits):
                found = _described_whole(room)
            else:
                scores = scores or score(_work(model, config, room, data, progress, folder, resume, Path(temporary)))
                found = _described(room, scores, best_plans(room, scores, limits, reference, count=1)[0])
            rows.append({"budget": budget.to_dict(), **found})
    return rows


def _reachable(model: Vit, config: AutoConfig, budgets: Sequence[Budget]) -> Room:
    if not budgets:
        raise ConfigError("auto: no budgets; expected one or more.")
    room = room_of(model.spec, config)
    lowest = cost(room.spec(room.lowest))
    for budget in budgets:
        budget.refuse_unreachable(floor=lowest, reference=cost(model), method="auto")
    return room


def _work(
    model: Vit,
    config: AutoConfig,
    room: Room,
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
    notes = Notes(folder, identity, resume=resume)
    folded = surgery.fold_layer_scale(model, skip=room.fixed)
    base = surgery.with_spec(folded, room.base, folded.state_dict(), share=True).eval()
    if config.device is not None:
        base = base.to(config.device)
    return Work(model, base, room, config, inputs, notes, temporary, progress, _warnings(room.base, room, inputs))


def _untouched(model: Vit, config: AutoConfig, room: Room) -> Compressed:
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
        "dense": room.dense,
        "warnings": [],
    }
    return Compressed(model=same, method="auto", variant=config.score, report=report)


def _one(work: Work, scores: Scores, budget: Budget) -> Compressed:
    """The best of the built plans for a budget."""
    room, config, reference = work.room, work.config, cost(work.model)
    plans = best_plans(room, scores, budget.limits(reference), reference, count=config.builds)
    candidates = []
    for number, one in enumerate(plans):
        name = f"build-{_name(one)}"
        work.tell("candidates", number, len(plans), predicted=scores.total(room, one))
        known = work.notes.get(f"{name}-reached")
        if known is None:
            reached = work.divergence(Student(work, one, "fit", name).build())
            work.notes.put(f"{name}-reached", {}, {"reached": reached})
        else:
            reached = known[1]["reached"]
        candidates.append({**_described(room, scores, one), "reached_kl": reached})
    work.tell("candidates", len(plans), len(plans))
    best = min(range(len(plans)), key=lambda n: (candidates[n]["reached_kl"], n))
    small = Student(work, plans[best], "all", f"final-{_name(plans[best])}").build()
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
        "dense": room.dense,
        "warnings": work.warnings,
    }
    history = [
        {"stage": "candidate", **{n: row[n] for n in ("width", "predicted_kl", "reached_kl")}} for row in candidates
    ]
    return Compressed(model=small, method="auto", variant=config.score, history=history, report=report)


def _name(plan: Plan) -> str:
    return hashlib.sha256(repr(plan).encode()).hexdigest()[:12]


def _described(room: Room, scores: Scores, one: Plan) -> dict[str, Any]:
    """A plan and its prediction, as plain JSON values."""
    at = cost(room.spec(one))
    rows = []
    for i, (choice, levels, losses) in enumerate(zip(one.choices, room.levels, scores.blocks, strict=True)):
        whole = levels.whole
        row: dict[str, Any] = {"block": i, "predicted_kl": losses.of(choice, whole)}
        row |= {name: [getattr(choice, name), getattr(whole, name)] for name in Choice._fields}
        rows.append(row)
    steps = [
        {"block": i, "kind": type(s).__name__.lower(), **{n: getattr(s, n) for n in s.__slots__}} for i, s in one.steps
    ]
    return {
        "predicted_kl": scores.total(room, one),
        "width": [one.width, room.base.width],
        "steps": steps,
        "exact_tail": room.tail,
        "macs": at.macs,
        "params": at.params,
        "blocks": rows,
    }


def _described_whole(room: Room) -> dict[str, Any]:
    """The same of the network as given, for a budget that it meets."""
    at = cost(room.given)
    return {
        "predicted_kl": 0.0,
        "width": [room.base.width, room.base.width],
        "steps": [],
        "exact_tail": has_tail(room.given),
        "macs": at.macs,
        "params": at.params,
        "blocks": [
            {"block": i, "predicted_kl": 0.0} | {name: [getattr(levels.whole, name)] * 2 for name in Choice._fields}
            for i, levels in enumerate(room.levels)
        ],
    }


__all__ = ["AXES", "AutoConfig", "compress", "compress_family", "floor", "plan", "predict", "step"]
