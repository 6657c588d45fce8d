"""Searches: what one decides, the masks under which weights learn meanwhile, and the way to whole numbers within a budget.

Knows no method. Units of a part go in the order of their scores, the lowest first; a count says how many stay, a gate whether
a half does. The masks of all parts stand in one flat leaf, in `Slot`s, whose gradient prices what is decided. `settle` makes
whole numbers of it; the cut by `keeps_of` equals the masks that are final then.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .allocation import ATTENTION, Floats, Ints, Move, fill, parts_of
from .counting import ADDITIVE, FLOAT_BYTES, Cost, cost
from .errors import BudgetError
from .freezing import HALVES, Half
from .model import Gates, Masks, Vit
from .space import BlockLevels, Choice, Space
from .spec import BlockSpec, ModelSpec
from .surgery import Keep

Place = tuple[int, str]
"""A block's number, and a part of it: "heads", "qk", "v" or "hidden"."""
COUNTED = {"attention": ("heads", "v"), "mlp": ("hidden",)}
"""Parts of a half whose units go one by one."""

# --------------------------------------------------------------------------------------------------------- what is decided


@dataclass(frozen=True, kw_only=True)
class Axes:
    """What a search decides on a space: a count for each part with several sizes, and gates.

    gates: for each switch, the halves that it closes. tied: blocks whose queries and keys lose dims with their values.
    """

    space: Space
    gates: tuple[tuple[Half, ...], ...] = ()
    tied: frozenset[int] = frozenset()

    @cached_property
    def parts(self) -> tuple[Place, ...]:
        """Those with a count of their own."""
        every = [(i, part) for i in range(len(self.space.levels)) for part in parts_of(self.space, i)]
        return tuple((i, part) for i, part in every if part != "qk" or i not in self.tied)

    @cached_property
    def gate_of(self) -> dict[Half, int]:
        """The gate of each half that has one."""
        return {half: g for g, halves in enumerate(self.gates) for half in halves}

    @cached_property
    def needed(self) -> tuple[int, ...]:
        """Gates of which one has to stay open, for the network to compute something and, where it needs attention, to see."""
        parts = ("attention",) if self.space.needs_attention else HALVES
        blocks = enumerate(self.space.base.blocks)
        halves: list[Half] = [(i, half) for i, block in blocks for half in parts if getattr(block, half) is not None]
        if any(half not in self.gate_of for half in halves):
            return ()
        return tuple(dict.fromkeys(self.gate_of[half] for half in halves))

    def levels(self, place: Place, align: int) -> list[int]:
        """Counts that one of `parts` may have, rising: multiples of align where two of them fit in, and its own size."""
        i, part = place
        full: int = getattr(self.space.whole[i], part)
        unit = 1 if part == "heads" or full < 2 * align else align
        return [*range(unit, full, unit), full]

    def at(self, choice: Choice, place: Place, count: int) -> Choice:
        """The choice with another count; queries and keys follow the values where they are tied."""
        i, part = place
        choice = choice.sized(part, count)
        if part == "v" and i in self.tied:
            whole = self.space.whole[i]
            choice = choice.sized("qk", max(1, round(whole.qk * count / whole.v)))
        return choice

    def least(self, align: int = 1) -> list[Choice]:
        """Every count at its lowest level, all gates open."""
        found = list(self.space.whole)
        for place in self.parts:
            found[place[0]] = self.at(found[place[0]], place, self.levels(place, align)[0])
        return found

    def gated(self, sizes: Sequence[Choice], is_open: Sequence[bool]) -> list[Choice]:
        """The choices with the gates set."""
        found = list(sizes)
        for (i, half), g in self.gate_of.items():
            if not is_open[g]:
                found[i] = found[i].without(half)
        return found

    def cheapest(self, sizes: Sequence[Choice], resource: str = "macs") -> list[bool]:
        """Gates that leave the cheapest network which still computes something, and sees."""
        column = ADDITIVE.index(resource)
        prices = {
            g: sum(self.space.price(i, half_of(sizes[i], h))[column] for i, h in self.gates[g]) for g in self.needed
        }
        stays = min(prices, key=lambda g: prices[g], default=None)
        return [g == stays for g in range(len(self.gates))]

    def floor(self, resource: str = "macs") -> Cost:
        """Of the cheapest network within reach: every count at one unit, every gate closed but the cheapest."""
        least = self.least()
        return cost(self.space.spec(self.gated(least, self.cheapest(least, resource))))

    def tolerance(self, resource: str = "macs") -> dict[str, int]:
        """How far below a budget `settle` may end, by resource: one unit of a part, or a gate at its least."""
        whole, least, price = self.space.whole, self.least(), self.space.price
        steps = []
        for halves in self.gates:
            both = [price(i, half_of(least[i], half)) for i, half in halves]
            steps.append([sum(column) for column in zip(*both, strict=True)])
        for i, part in self.parts:
            below = price(i, self.at(whole[i], (i, part), getattr(whole[i], part) - 1))
            steps.append([a - b for a, b in zip(price(i, whole[i]), below, strict=True)])
        macs, params = (max((step[r] for step in steps), default=0) for r in range(len(ADDITIVE)))
        peak = self.space.reference.activation_bytes - self.floor(resource).activation_bytes
        in_bytes = FLOAT_BYTES * params
        return {"macs": macs, "params": params, "memory_bytes": in_bytes + peak, "file_bytes": in_bytes}


def every_size(block: BlockSpec, halves: Collection[str], *, tied: bool = False) -> BlockLevels:
    """Every number of heads, value dims and units on offer in these halves, and with tied values the queries' and keys'.

    What gates close is said by `Axes.gates` alone.
    """
    whole = BlockLevels.whole_of(block)
    now = whole.whole
    sizes = {part: tuple(range(getattr(now, part), 0, -1)) for half in halves for part in COUNTED[half]}
    if tied and "v" in sizes:
        sizes["qk"] = tuple(dict.fromkeys(max(1, round(now.qk * v / now.v)) for v in sizes["v"]))
    return replace(whole, **sizes)  # type: ignore[arg-type]


def half_of(choice: Choice, half: str) -> Choice:
    """That half of a choice alone."""
    return choice.without("mlp" if half == "attention" else "attention")


# ---------------------------------------------------------------------------------------------------------- masks as a leaf


class Slot(NamedTuple):
    """Where the masks of a part of a block stand in the flat leaf."""

    block: int
    part: str
    start: int
    shape: tuple[int, ...]

    @property
    def stop(self) -> int:
        return self.start + math.prod(self.shape)

    @property
    def place(self) -> Place:
        return self.block, self.part

    @property
    def size(self) -> int:
        """Units of one row."""
        return self.shape[-1]


def lay_out(axes: Axes) -> list[Slot]:
    """A slot for each part, and for queries and keys that follow their values: heads [H], qk [H, Q], v [H, V], hidden [M]."""
    found: list[Slot] = []
    for i, part in axes.parts:
        now = axes.space.whole[i]
        shapes = {"heads": (now.heads,), "qk": (now.heads, now.qk), "v": (now.heads, now.v), "hidden": (now.hidden,)}
        for name in ("v", "qk") if part == "v" and i in axes.tied else (part,):
            found.append(Slot(i, name, found[-1].stop if found else 0, shapes[name]))
    return found


@torch.no_grad()
def squared_norms(model: Vit, slots: Sequence[Slot]) -> dict[Place, Floats]:
    """Of each unit's weights: the consumers' columns (out, fc2); for queries and keys, the product of theirs."""
    found: list[Tensor] = []
    for slot in slots:
        block = model.blocks[slot.block]
        if slot.part == "hidden":
            found.append(block.mlp.reader.weight.square().sum(0))
            continue
        a = block.attention
        if slot.part == "qk":
            q, k = a.qkv[: 2 * a.spec.heads * a.spec.qk_dim].square().sum(1).view(2, -1)
            found.append(q * k)
        else:
            columns = a.out.weight.square().sum(0)
            found.append(columns.view(a.spec.heads, -1).sum(1) if slot.part == "heads" else columns)
    flat = torch.cat(found).double().cpu().numpy() if found else np.zeros(0)
    return {slot.place: flat[slot.start : slot.stop].reshape(slot.shape) for slot in slots}


def ranks(scores: Floats) -> Ints:
    """Place of each unit in the order in which they go, along the last axis."""
    order = np.argsort(scores, axis=-1, kind="stable")
    found = np.empty_like(order)
    np.put_along_axis(found, order, np.broadcast_to(np.arange(scores.shape[-1]), scores.shape), axis=-1)
    return found


def ramp_width(size: int) -> float:
    """Ranks on a soft mask's ramp: a sixteenth of them, so that a price is a mean over several units."""
    return max(1.0, size / 16)


def ramp_mask(places: Any, removed: float, size: int, width: float) -> Floats:
    """Masks by rank (0 goes first): 0 below `removed`, 1 above, a straight ramp of `width` ranks between.

    At whole numbers with a width of 1 they are 0 and 1; with nothing removed all are exactly 1, and they sum to size - removed.
    """
    width = min(width, 2 * removed + 1, 2 * (size - removed) + 1)
    return np.clip((np.asarray(places) + 0.5 - removed) / width + 0.5, 0.0, 1.0)


def window(removed: float, size: int, width: float) -> Floats:
    """Weights [size], by rank, of the units on the ramp: whose mask's gradients price the next bit of a count. Sum 1."""
    width = min(width, 2 * removed + 1, 2 * (size - removed) + 1)
    low, high, places = removed - width / 2, removed + width / 2, np.arange(size)
    overlap = np.clip(np.minimum(places + 1, high) - np.maximum(places, low), 0.0, None)
    return overlap / overlap.sum()


def soft_masks(scores: Floats, removed: Floats) -> Floats:
    """Masks in the shape of the scores.  removed: units that go of each row, or of all of them alike."""
    size = scores.shape[-1]
    rows = ranks(scores).reshape(-1, size)
    gone = np.broadcast_to(removed.reshape(-1), len(rows)).tolist()
    found = [ramp_mask(row, s, size, ramp_width(size)) for row, s in zip(rows, gone, strict=True)]
    return np.stack(found).reshape(scores.shape)


def share_slopes(scores: Floats, removed: Floats, gradients: Floats) -> Floats:
    """Slope of the loss in the share removed of each row, from the gradients of the masks on the ramps, flat."""
    size = scores.shape[-1]
    orders = np.argsort(scores.reshape(-1, size), axis=1, kind="stable")
    gone = np.broadcast_to(removed.reshape(-1), len(orders)).tolist()
    rows = zip(orders, gone, gradients.reshape(-1, size), strict=True)
    return np.array([-size * float(window(s, size, ramp_width(size)) @ row[order]) for order, s, row in rows])


def hard_masks(slots: Sequence[Slot], scores: Mapping[Place, Floats], sizes: Sequence[Choice]) -> Floats:
    """0 and 1 of all slots, flat: as many units of each part stay as the sizes say, those of the highest scores."""
    found = np.ones(slots[-1].stop if slots else 0)
    for slot in slots:
        gone = slot.size - getattr(sizes[slot.block], slot.part)
        found[slot.start : slot.stop] = (ranks(scores[slot.place]) >= gone).reshape(-1)
    return found


def masks_of(
    spec: ModelSpec,
    slots: Sequence[Slot],
    leaf: Tensor | None,
    gates: Sequence[Sequence[Half]] = (),
    scales: Sequence[Tensor | None] = (),
) -> Masks:
    """What a forward pass multiplies with.

    leaf: masks of all slots, flat; None: units have none. gates: for each switch, the halves that it closes. scales: what it
    multiplies them with, a scalar or [B]; None: it is open.
    """
    rows: list[dict[str, Tensor]] = [{} for _ in spec.blocks]
    if leaf is not None:
        if torch.is_autocast_enabled(leaf.device.type):
            leaf = leaf.to(torch.get_autocast_dtype(leaf.device.type))  # or the product would be taken in float32
        for slot in slots:
            rows[slot.block][slot.part] = leaf[slot.start : slot.stop].view(slot.shape)
    for halves, scale in zip(gates, scales, strict=True):
        i = halves[0][0]
        whole = len(halves) == 2 and all(step.at == "end" for step in spec.blocks[i].steps)
        if scale is not None:
            rows[i] |= dict.fromkeys(["block"] if whole else [half for _, half in halves], scale)
    return Masks.by_block(rows)


class MaskedModel:
    """A model's forward with masks and gates, for an objective that knows nothing of them."""

    def __init__(self, model: nn.Module, masks: Masks | None = None, gates: Gates | None = None) -> None:
        self.model, self.masks, self.gates = model, masks, gates

    def __call__(self, images: Tensor, want: Sequence[str] | None = None) -> Any:
        return self.model(images, masks=self.masks, gates=self.gates, want=want)


def keeps_of(spec: ModelSpec, slots: Sequence[Slot], masks: Floats, choices: Sequence[Choice]) -> list[Keep | None]:
    """What stays of each block; the cut by it equals the masks.  masks: 0 and 1 of all slots. choices: which halves stay."""
    found: list[Keep | None] = []
    for i, (block, choice) in enumerate(zip(spec.blocks, choices, strict=True)):
        mine = {slot.part: masks[slot.start : slot.stop].reshape(slot.shape) for slot in slots if slot.block == i}
        keep = Keep(attention=choice.attention or block.attention is None, mlp=choice.mlp or block.mlp is None)
        if not mine and keep == Keep():
            found.append(None)
            continue
        changes: dict[str, Any] = {part: _kept(mine[part]) for part in ("heads", "hidden") if part in mine}
        for part in ("qk", "v"):
            if part in mine:
                changes[part] = tuple(_kept(mine[part][h]) for h in changes.get("heads", range(len(mine[part]))))
        found.append(replace(keep, **changes))
    return found


def _kept(mask: Floats) -> tuple[int, ...]:
    return tuple(int(unit) for unit in np.flatnonzero(mask))


# ------------------------------------------------------------------------------------------------------------ whole numbers


@dataclass(frozen=True, kw_only=True)
class Settled:
    """sizes: counts of every block, as if all gates were open. choices: the same with the gates set.

    before: choices that were nearest to what the search left, whatever they cost.
    """

    sizes: tuple[Choice, ...]
    choices: tuple[Choice, ...]
    before: tuple[Choice, ...]


def loss_curves(scores: Mapping[Place, Floats], tied: Collection[int] = ()) -> dict[Place, Floats]:
    """Of each part, what losing its k weakest units costs, [size + 1]: sums of scores, as shares of the whole part's.

    tied: blocks whose queries and keys go with their values, where they are equally many.
    """
    found = {}
    for place, value in scores.items():
        shares = value / max(1e-30, float(value.sum()))
        rows = np.sort(shares.reshape(-1, shares.shape[-1]), axis=1).sum(0)
        found[place] = np.concatenate([[0.0], np.cumsum(rows)])
    for i in tied:
        if (curve := found.pop((i, "qk"), None)) is not None and len(found[(i, "v")]) == len(curve):
            found[(i, "v")] = found[(i, "v")] + curve
    return found


def nearest(levels: Sequence[int], count: float) -> int:
    """Of two equally near levels, the lower."""
    return min(levels, key=lambda level: (abs(level - count), level))


def settle(
    axes: Axes,
    limits: Mapping[str, int],
    *,
    counts: Mapping[Place, float],
    logits: Floats,
    losses: Mapping[Place, Floats],
    align: int = 1,
) -> Settled:
    """Whole numbers within the limits, nearest to what a search decided.

    counts: units that are to stay, of each part. logits: of the gates, above 0 for open. losses: what losing the k weakest
    units of a part costs, [size + 1], in a common unit. Gates go by their sign, counts are rounded and aligned (less so where
    the limits need it); then the level with the least loss for its cost goes while a limit is exceeded, and the one with the
    most comes back while it fits; where 1 % stays free, single units, then closed gates. Raises BudgetError out of reach.
    """
    return _Settling(axes, limits, logits, losses, align).run(counts)


class _Settling:
    """From continuous decisions to whole numbers within the budget."""

    def __init__(
        self, axes: Axes, limits: Mapping[str, int], logits: Floats, losses: Mapping[Place, Floats], align: int
    ) -> None:
        self.axes, self.space, self.limits, self.losses = axes, axes.space, limits, losses
        self.logits: list[float] = logits.tolist()
        self.sizes = list(self.space.whole)
        self.is_open = [logit > 0 for logit in self.logits]
        if axes.needed and not any(self.is_open[g] for g in axes.needed):
            self.is_open[max(axes.needed, key=lambda g: self.logits[g])] = True
        self.cheapest = axes.cheapest(axes.least(align), "macs" if "macs" in limits else "params")
        while align > 1 and self.over(axes.gated(axes.least(align), self.cheapest)):
            align //= 2
        self.align = align

    def run(self, counts: Mapping[Place, float]) -> Settled:
        for place in self.axes.parts:
            self.put(place, nearest(self.axes.levels(place, self.align), counts[place]))
        before = self.now
        self.trim()
        self.walk(self.limits, self.align, up=True)
        while self.roomy():
            self.walk(self.limits, 1, up=True)
            if not self.roomy() or not self.reopen():
                break
            self.walk(self.limits, self.align, up=True)
        return Settled(sizes=tuple(self.sizes), choices=tuple(self.now), before=tuple(before))

    @property
    def now(self) -> list[Choice]:
        return self.axes.gated(self.sizes, self.is_open)

    def gate(self, place: Place) -> int | None:
        return self.axes.gate_of.get((place[0], _half(place[1])))

    def put(self, place: Place, count: int) -> None:
        self.sizes[place[0]] = self.axes.at(self.sizes[place[0]], place, count)

    def over(self, choices: Sequence[Choice]) -> list[str]:
        """Limited resources of which these take too much."""
        return self.space.over(choices, self.limits)

    def level(self, place: Place, align: int, names: Collection[str], *, up: bool) -> tuple[float, int] | None:
        """The next level of a part: its loss for each share of cost, and its count. None: there is none, or its half is gone."""
        i, part = place
        gate = self.gate(place)
        if gate is not None and not self.is_open[gate]:
            return None
        size, levels = self.sizes[i], self.axes.levels(place, align)
        now = getattr(size, part)
        above, below = (level for level in levels if level > now), (level for level in reversed(levels) if level < now)
        count = next(above if up else below, None)
        if count is None:
            return None
        curve = self.losses[place]
        loss = abs(float(curve[len(curve) - 1 - count] - curve[len(curve) - 1 - now]))
        after, before = (half_of(choice, _half(part)) for choice in (self.axes.at(size, place, count), size))
        price = abs(self.share(i, after, names) - self.share(i, before, names))
        return loss / max(price, 1e-12), count

    def share(self, i: int, choice: Choice, names: Collection[str]) -> float:
        """Price of a block as a share of the reference; bytes are parameters'."""
        columns = {0 if name == "macs" else 1 for name in names}
        return sum(self.space.price(i, choice)[r] / getattr(self.space.reference, ADDITIVE[r]) for r in columns)

    def trim(self) -> None:
        """Down by the level of the least loss for its cost, then gate by gate, until nothing is exceeded."""
        while names := self.over(self.now):
            before = list(self.sizes)
            self.walk(names, self.align, up=False)
            if self.sizes != before:
                continue
            held = [g for g in self.axes.needed if self.is_open[g]]
            closable = [g for g, is_open in enumerate(self.is_open) if is_open and held != [g]]
            if closable:
                self.is_open[min(closable, key=lambda g: self.logits[g])] = False
            elif self.is_open != self.cheapest:
                self.is_open = list(self.cheapest)
            else:
                raise BudgetError("the cheapest network is above the budget; choose a larger one.")

    def walk(self, names: Collection[str], align: int, *, up: bool) -> None:
        """Level after level: up while the limits hold, or down while just these resources are exceeded."""
        sign = 1 if up else -1

        def look(place: Place) -> Move[Place, int] | None:
            found = self.level(place, align, names, up=up)
            if found is None:
                return None
            loss, count = found
            return Move((sign * loss, sign * place[0], sign * NAMES.index(place[1])), place, count)

        def take(move: Move[Place, int]) -> bool:
            if not up and self.over(self.now) != names:
                return False
            before = self.sizes[move.place[0]]
            self.put(move.place, move.to)
            if up and self.over(self.now):
                self.sizes[move.place[0]] = before
                return False
            return True

        fill(self.axes.parts, look, take, lambda at: [place for place in self.axes.parts if place[0] == at[0]])

    def roomy(self) -> bool:
        """Whether every limit has more than 1 % of the reference left."""
        used, whole = self.space.used(self.now), self.space.reference
        return all(limit - used[name] > getattr(whole, name) / 100 for name, limit in self.limits.items())

    def reopen(self) -> bool:
        """Open the closed gate that was nearest to open, at its lowest levels, if it fits."""
        closed = sorted((g for g, is_open in enumerate(self.is_open) if not is_open), key=lambda g: -self.logits[g])
        before = list(self.sizes), list(self.is_open)
        for unit in (self.align, 1):
            for g in closed:
                self.is_open[g] = True
                for place in self.axes.parts:
                    if self.gate(place) == g:
                        self.put(place, self.axes.levels(place, unit)[0])
                if not self.over(self.now):
                    return True
                self.sizes, self.is_open = list(before[0]), list(before[1])
        return False


def _half(part: str) -> str:
    return "attention" if part in ATTENTION else "mlp"


NAMES = sorted(Choice._fields)
"""Of parts that are equally worth it, the last of these grows."""
