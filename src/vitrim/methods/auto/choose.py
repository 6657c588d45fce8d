"""auto: what may be cut, what it loses, and the candidates that lose least within a budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import product
from typing import Any

import numpy as np

from vitrim import surgery
from vitrim.allocation import Allocator
from vitrim.budget import Budget, exceeded
from vitrim.closed_form import stream_width as narrowing
from vitrim.counting import RESOURCES, Cost, cost
from vitrim.errors import ConfigError
from vitrim.freezing import Half, frozen
from vitrim.methods.auto import merges
from vitrim.methods.auto.config import AXES, AutoConfig
from vitrim.methods.auto.merges import Merges, Node, Plan, Schedule
from vitrim.space import BlockLevels, Choice, Space, frozen_parts, jumps, outlook, sizes
from vitrim.spec import BlockSpec, Merge, ModelSpec, Prefix, product_of

RANKS = (1 / 16, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 3 / 4)
UNITS = (1 / 64, 1 / 32, 3 / 64, 1 / 16, 3 / 32, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 3 / 4)
WIDTHS = (7 / 8, 3 / 4, 5 / 8, 1 / 2, 3 / 8, 5 / 16, 1 / 4, 3 / 16)
"""Levels on offer, as shares of a part's own size."""


PARTS = ("qk", "v", "hidden")
"""What is cut within a block: ranks of the heads' two products, and hidden units."""


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
    stream, the whole first. nodes: what merges may leave of the patch tokens in any block, the whole first, and alone where none
    may merge. restores: whether a network that merges gives all tokens back.
    """

    whole: Space
    tail: bool
    align: int
    widths: tuple[int, ...]
    nodes: tuple[Node, ...]
    restores: bool

    @property
    def base(self) -> ModelSpec:
        return self.whole.base

    @property
    def levels(self) -> tuple[BlockLevels, ...]:
        return self.whole.levels

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
            restore = base.restore or (self.restores and bool(steps))
            self._spaces[key] = replace(
                self.whole, base=replace(base, blocks=tuple(blocks), restore=restore), levels=levels
            )
        return self._spaces[key]

    def spec(self, candidate: Candidate, *, tail: bool | None = None) -> ModelSpec:
        """The network of a candidate."""
        return self.space(candidate.width, candidate.steps, tail=tail).spec(candidate.choices)

    def uncut(self, steps: Schedule = ()) -> Candidate:
        """The whole network, with these token steps."""
        return Candidate(self.base.width, steps, self.whole.whole)

    @cached_property
    def tolerance(self) -> dict[str, int]:
        """How far below a budget the result may end, by resource: `step`."""
        whole = self.uncut()
        before = cost(self.spec(whole))
        pairs = [(self.whole.reference, before)]
        seen: set[tuple[BlockSpec, BlockLevels, bool]] = set()
        for i, levels in enumerate(self.levels):
            kind = self.base.blocks[i], levels, i == len(self.levels) - 1
            if kind in seen:
                continue
            seen.add(kind)
            for name in PARTS:
                size, *fewer = getattr(levels, name)
                if fewer:
                    less = levels.whole.sized(name, max(1, size - unit_of(size, self.align)))
                    choices = self.whole.with_choice(i, less)
                    pairs.append((before, cost(self.spec(replace(whole, choices=choices)))))
        found, gaps = jumps(pairs), _gaps(self, whole)
        return {name: max(found[name], gaps[name]) for name in RESOURCES}

    @cached_property
    def slimmest(self) -> Candidate:
        """The cheapest network without merges."""
        width = self.widths[-1]
        return Candidate(width, (), self.space(width, ()).lowest)

    @cached_property
    def lowest(self) -> Candidate:
        """The network of the fewest operations."""
        merged = replace(self.slimmest, steps=self.steepest(self.slimmest.width))
        return min(self.slimmest, merged, key=lambda candidate: cost(self.spec(candidate)).macs)

    def steepest(self, width: int) -> Schedule:
        """Merges that leave the fewest operations to the cheapest network in a stream of this width."""
        space = self.space(width, ())
        free = Merges(self.nodes, np.zeros((len(self.levels), len(self.nodes))))
        return Plan(space, [{choice: 0.0} for choice in space.lowest], free, carry=self.restores).steepest()

    def floor(self, budget: Budget | None = None) -> Cost:
        """Of the cheapest network; for a budget that merging cannot help, of the cheapest without."""
        limits = {"macs": 0} if budget is None else budget.limits(self.whole.reference)
        return cost(self.spec(self.lowest if pays(limits) else self.slimmest))


def pays(limits: Mapping[str, int]) -> bool:
    """Whether fewer tokens bring a network within such limits: not within one of parameters."""
    return "macs" in limits or "memory_bytes" in limits


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
    tokens = product_of(spec, config.product) == "tokens" or spec.pool.kind == "none"
    why = {
        "width": "parts are frozen, and another stream width changes every part"
        if fixed
        else "the tokens of the stream are the product"
        if tokens
        else narrowing.refusal(base),
        "tokens": _tokens_refusal(base),
        "tail": "its tokens are the product" if tokens and spec.outputs else surgery.tail_refusal(spec, fixed),
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
        nodes=merges.nodes(base.grid)[: None if "tokens" in axes else 1],
        restores=tokens,
    )
    single = len(widths) == len(nets.nodes) == 1 and nets.tail == had
    if single and all(len(one.choices()) == 1 for one in levels):
        raise ConfigError(
            f"auto: nothing of this network can be cut on the axes {', '.join(asked)}"
            f"{' with the parts that are frozen' if fixed else ''}. Allow more of them."
        )
    return nets


def _tokens_refusal(spec: ModelSpec) -> str | None:
    if any(block.steps for block in spec.blocks):
        return "the network merges tokens already"
    if not spec.blocks:
        return "there are no blocks in which to merge"
    if len(merges.nodes(spec.grid)) == 1:
        rows, cols = spec.grid
        return f"a grid of {rows} x {cols} patches is too small to merge"
    return None


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
    return nets_of(spec, config or AutoConfig()).floor()


def tolerance(spec: ModelSpec, config: AutoConfig | None = None) -> dict[str, int]:
    """How far below a budget the result may end, by resource (law 7): one unit of the part whose unit costs most.

    Where ranks and hidden units do not fill all of the range, the largest jump between what they fill counts.
    """
    return nets_of(spec, config or AutoConfig()).tolerance


def _gaps(nets: Nets, whole: Candidate) -> dict[str, int]:
    """The largest stretch of each resource that no ranks and hidden widths fill.

    They fill the stretches below each stream width with no half gone, and with those of the first blocks gone. Between these
    lie jumps; so do they between the network as given and the same with an exact tail.
    """
    count = len(nets.levels)
    kinds = [kind for kind in ("off", "empty") if any(getattr(levels, kind) for levels in nets.levels)]
    given = nets.whole.reference

    def stretch(width: int, kind: str, lost: int, steps: Schedule = ()) -> tuple[Cost, Cost]:
        ends = []
        for choices in ([levels.least for levels in nets.space(width, ()).levels], list(nets.whole.whole)):
            for i in range(lost):
                if getattr(nets.levels[i], kind):
                    choices[i] = choices[i].without("attention") if kind == "off" else Choice()
            ends.append(cost(nets.spec(Candidate(width, steps, tuple(choices)))))
        return ends[0], ends[1]

    stretches = [(at, at) for at in (given, cost(nets.spec(nets.lowest)))]
    stretches += [stretch(width, "", 0) for width in nets.widths]
    stretches += [stretch(nets.lowest.width, "", 0, nets.lowest.steps)]
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
        floor=nets.floor(config.budget),
        reference=nets.whole.reference,
        tolerance=nets.tolerance,
        needs={"images": config.images, "labels": False, "training": False},
        dense=nets.whole.dense,
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
    """What the plans are made of.  widths: divergences of the narrower stream alone. merges: None where none may be."""

    blocks: tuple[Losses, ...]
    widths: dict[int, float]
    merges: Merges | None = None

    def loss(self, nets: Nets, i: int, choice: Choice) -> float:
        """Of what becomes of block `i` alone."""
        return self.blocks[i].of(choice, nets.levels[i].whole)

    def net(self, nets: Nets, width: int, steps: Schedule) -> float:
        """Of a stream width and token steps alone."""
        return self.widths[width] + (self.merges.total(steps) if self.merges else 0.0)

    def total(self, nets: Nets, one: Candidate) -> float:
        """The predicted divergence of a candidate: the sum of its parts."""
        return self.net(nets, one.width, one.steps) + sum(
            self.loss(nets, i, choice) for i, choice in enumerate(one.choices)
        )


def best_candidates(nets: Nets, scores: Scores, limits: Mapping[str, int], *, count: int) -> list[Candidate]:
    """The candidates of the least predicted divergence within the limits, each of another stream width or other merges.

    Exact over blocks within each of them; merges are planned for each width. Those that leave more of the budget than law 7
    allows count only where there are no others.
    """
    pairs = [(w, steps) for w in nets.widths for steps in planned(nets, scores, w, limits)]
    if pays(limits) and scores.merges is not None:
        pairs.append((nets.lowest.width, nets.lowest.steps))
    pairs = list(dict.fromkeys(pairs))
    order = sorted(((scores.net(nets, w, steps), w, n) for n, (w, steps) in enumerate(pairs)))
    near = {name: max(getattr(nets.whole.reference, name) // 100, most) for name, most in nets.tolerance.items()}
    found: list[tuple[bool, float, Candidate]] = []
    for net, width, n in order:
        full = sorted(total for loose, total, _ in found if not loose)
        if len(full) >= count and net >= full[count - 1]:
            break  # its parts can only add to that
        steps = pairs[n][1]
        allocator = Allocator(nets.space(width, steps), lambda i, choice: scores.loss(nets, i, choice))
        for whole_parts in (False, True):
            choices = allocator.solve(limits, partial(_no_half_gone, nets) if whole_parts else None)
            if choices is None:
                break
            one = Candidate(width, steps, filled(nets, allocator, choices, limits))
            at = cost(nets.spec(one))
            loose = all(limit - getattr(at, name) > near[name] for name, limit in limits.items())
            if not loose or not whole_parts:
                found.append((loose, scores.total(nets, one), one))
            if not loose:
                break
    if not found:
        last = nets.lowest if pays(limits) else nets.slimmest
        found.append((True, scores.total(nets, last), last))
    found.sort(key=lambda one: one[:2])
    chosen = list(dict.fromkeys(one for loose, _, one in found if loose == found[0][0]))[:count]
    assert not any(exceeded(cost(nets.spec(one)), limits) for one in chosen)
    return chosen


WEIGHTS = (1.0, 2.0, 0.5)
"""What losses of merging count beside those of the choices: where they do not add up as assumed, another weight does better."""
SHARES = (0.8, 0.6, 0.4, 0.2)
"""Of the operations, for which merges are planned where memory alone is limited: fewer tokens are fewer activations."""


def planned(nets: Nets, scores: Scores, width: int, limits: Mapping[str, int]) -> list[Schedule]:
    """Merges worth an exact allocation in a stream of this width, none of them first."""
    if scores.merges is None or not pays(limits):
        return [()]
    space = nets.space(width, ())
    losses = [
        {choice: scores.loss(nets, i, choice) for choice in levels.choices()} for i, levels in enumerate(space.levels)
    ]
    plan = Plan(space, losses, scores.merges, carry=nets.restores)
    whole = nets.whole.reference.macs
    found: list[Schedule] = [()]

    def uncut(steps: Schedule) -> int:
        return cost(nets.spec(Candidate(width, steps, space.whole))).macs

    tried = (
        [(limits["macs"], weight) for weight in WEIGHTS]
        if "macs" in limits
        else [(int(n * whole), 1.0) for n in SHARES]
    )
    for bound, weight in tried:
        found += _merged(plan, bound, weight, lambda steps, most=bound: uncut(steps) <= most)  # type: ignore[misc]
    return list(dict.fromkeys(found))


def _merged(plan: Plan, bound: int, weight: float, fits: Callable[[Schedule], bool]) -> list[Schedule]:
    """Of all kinds of merges, and of similar tokens alone where a lattice is among those.  fits: whether nothing else need be cut."""
    found: list[Schedule] = []
    for lattice in (True, False):
        ends = plan.schedules(bound, weight=weight, lattice=lattice)
        found += ends
        if len(ends) > 1 and fits(ends[0]):  # what is left can be spent on tokens alone
            found.append(plan.between(ends[0], ends[1], fits))
        if not any(isinstance(step, Merge) for steps in ends for _, step in steps):
            break
    return found


def _no_half_gone(nets: Nets, i: int, choice: Choice) -> bool:
    whole = nets.levels[i].whole
    return choice.attention == whole.attention and choice.mlp == whole.mlp


def filled(
    nets: Nets, allocator: Allocator, choices: tuple[Choice, ...], limits: Mapping[str, int]
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
        used = allocator.space.used(choices)
        if any(limit - used[name] <= getattr(nets.whole.reference, name) / 100 for name, limit in limits.items()):
            break
    return choices
