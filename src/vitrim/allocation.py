"""Allocation: what becomes of each block, so that the sum of losses is least within a budget. No torch, no networks.

Losses add over blocks, and so do costs, of any number of resources. What does not add up is one peak: the activations of the
widest moment, which share the memory with the parameters. With one limited resource `knapsack` chooses exactly; each further
one has a price, found by bisection; a peak is met by a sweep of caps. `fill` spends what whole levels leave.

Shapes: n options of a block, R additive resources, in the order of `counting.ADDITIVE`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Generic, NamedTuple, TypeVar

import numpy as np

from .budget import Constraints
from .counting import ADDITIVE
from .freezing import HALVES
from .space import Choice, Space

CELLS = 4000
"""Cells of the grid to which costs are rounded up, at least."""
BISECTIONS = 30
ROUNDS = 4
"""Times that each price is set anew where several resources have one."""
CAPS = 12
"""Bounds on the widest moment that are tried for a memory budget."""

Ints = np.ndarray[tuple[int, ...], np.dtype[np.int64]]
Floats = np.ndarray[tuple[int, ...], np.dtype[np.float64]]
Flags = np.ndarray[tuple[int, ...], np.dtype[np.bool_]]


@dataclass(frozen=True)
class Table:
    """Options of one block.  costs: [n, R].  loss: [n].  peaks: [n] bytes of activations at its widest moment, or None."""

    costs: Ints
    loss: Floats
    peaks: Ints | None = None


def solve(
    tables: Sequence[Table], constraints: Constraints, *, outside: Ints, allowed: Sequence[Flags] | None = None
) -> list[int] | None:
    """The option of each block, as rows of its table, that together lose least within the constraints; None if none is found.

    outside: [R] costs of what no option changes. allowed: [n] of each block; None: all. Tables need peaks where memory is
    limited.
    """
    masks = [np.ones(len(t.loss), dtype=bool) for t in tables] if allowed is None else list(allowed)
    if constraints.memory_bytes is None:
        return _masked(tables, masks, constraints.additive, outside)
    found: list[tuple[float, list[int]]] = []
    for cap in caps(tables, constraints.memory_bytes):
        kept = [mask & (_peaks(table) <= cap) for mask, table in zip(masks, tables, strict=True)]
        chosen = _masked(tables, kept, constraints.beside(cap), outside)
        if chosen is not None:
            found.append((total(tables, chosen)[1], chosen))
    return min(found, key=lambda one: one[0])[1] if found else None


def caps(tables: Sequence[Table], memory_bytes: int) -> list[int]:
    """Bounds on the widest moment worth trying, rising."""
    least = max((int(_peaks(table).min()) for table in tables), default=0)
    every = sorted({int(v) for table in tables for v in _peaks(table) if least <= v < memory_bytes})
    if len(every) > CAPS:
        every = [every[round(n * (len(every) - 1) / (CAPS - 1))] for n in range(CAPS)]
    return every


def _peaks(table: Table) -> Ints:
    assert table.peaks is not None
    return table.peaks


def _masked(
    tables: Sequence[Table], masks: Sequence[Flags], limits: Mapping[str, int], outside: Ints
) -> list[int] | None:
    if not all(mask.any() for mask in masks):
        return None
    columns = [n for n, name in enumerate(ADDITIVE) if name in limits]
    left = [limits[ADDITIVE[n]] - int(outside[n]) for n in columns]
    rows = [np.flatnonzero(mask) for mask in masks]
    slim = [Table(t.costs[r][:, columns], t.loss[r]) for t, r in zip(tables, rows, strict=True)]
    found = allocate(slim, left)
    return None if found is None else [int(r[j]) for r, j in zip(rows, found, strict=True)]


def allocate(tables: Sequence[Table], limits: Sequence[int]) -> list[int] | None:
    """The option of each block, as rows of its table; None if none is found within the limits.

    limits: what all blocks together may cost, one for each resource; none at all: the least loss.
    """
    if any(sum(int(t.costs[:, r].min()) for t in tables) > limit for r, limit in enumerate(limits)):
        return None
    if not tables:
        return []
    if not limits:
        return [int(t.loss.argmin()) for t in tables]
    rows = [pareto(table) for table in tables]
    slim = [Table(table.costs[kept], table.loss[kept]) for table, kept in zip(tables, rows, strict=True)]
    found = _one(slim, limits[0]) if len(limits) == 1 else _several(slim, limits)
    return None if found is None else [int(kept[j]) for kept, j in zip(rows, found, strict=True)]


def pareto(table: Table) -> Ints:
    """Rows of the options that no other one beats in loss and in every cost, cheapest first; one of equals stays."""
    order = np.lexsort((*table.costs.T[::-1], table.loss))  # by loss, then by cost: who comes later never has less loss
    kept: list[int] = []
    front = np.empty((0, table.costs.shape[1]), dtype=np.int64)
    for row in order:
        here = table.costs[row]
        if not (front <= here).all(1).any():
            kept.append(int(row))
            front = np.concatenate([front, here[None]])
    found = np.array(kept, dtype=np.int64)
    return found[np.lexsort(table.costs[found].T[::-1])]


def total(tables: Sequence[Table], chosen: Sequence[int]) -> tuple[Ints, float]:
    """Costs [R] and loss of a choice."""
    costs = sum((t.costs[j] for t, j in zip(tables, chosen, strict=True)), np.zeros(tables[0].costs.shape[1], np.int64))
    return costs, float(sum(t.loss[j] for t, j in zip(tables, chosen, strict=True)))


def _one(tables: Sequence[Table], limit: int, resource: int = 0, prices: Floats | None = None) -> list[int] | None:
    """One limit; the loss of an option is its own plus the price of what it takes of the other resources."""
    losses = [t.loss if prices is None else t.loss + t.costs @ prices for t in tables]
    return knapsack(losses, [t.costs[:, resource] for t in tables], limit)


def _several(tables: Sequence[Table], limits: Sequence[int]) -> list[int] | None:
    """One resource bounded exactly, the others by prices; each of them in turn. The best choice within all."""
    found: list[tuple[float, list[int]]] = []

    def within(chosen: list[int] | None, resources: Iterable[int]) -> bool:
        if chosen is None:
            return False
        costs, loss = total(tables, chosen)
        if (costs <= np.array(limits)).all():
            found.append((loss, chosen))
        return all(costs[r] <= limits[r] for r in resources)

    span = max(float(t.loss.max() - t.loss.min()) for t in tables) + 1e-30
    for exact in range(len(limits)):
        others = [r for r in range(len(limits)) if r != exact]
        if within(_one(tables, limits[exact], exact), others):
            break  # what is best for one limit alone and meets the others is best
        prices = np.zeros(len(limits))
        for _ in range(ROUNDS if len(others) > 1 else 1):
            for r in others:
                scale = span / max(max(float(np.ptp(t.costs[:, r])) for t in tables), 1.0)
                low, high = 1e-12 * scale, 1e6 * scale
                for _ in range(BISECTIONS):
                    prices[r] = (low * high) ** 0.5
                    fits = within(_one(tables, limits[exact], exact, prices), [r])
                    low, high = (low, prices[r]) if fits else (prices[r], high)
                prices[r] = high
    return min(found, key=lambda one: one[0])[1] if found else None


def knapsack(losses: Sequence[Floats], prices: Sequence[Ints], limit: int) -> list[int] | None:
    """The option of each part that together lose least and cost at most `limit`; None where even the cheapest cost more.

    losses: [options] of each part. prices: [options], at least 0. Costs above each part's cheapest are divided by their common
    divisor; where that leaves up to 5 `CELLS` cells the answer is exact, else costs are rounded up to a grid of `CELLS` or
    more: never above the limit, and below it by at most the parts' number of cells.
    """
    left = limit - sum(int(p.min()) for p in prices)
    if left < 0:
        return None
    extra = [p - p.min() for p in prices]
    divisor = math.gcd(*(int(e) for p in extra for e in p)) or 1
    cells = min(left, sum(int(e.max()) for e in extra)) // divisor
    if cells <= 5 * CELLS:
        scaled = [e // divisor for e in extra]
    else:
        cells = max(CELLS, 500 * len(prices))
        scaled = [-(-e * cells // left) for e in extra]
    best = np.zeros(cells + 1)
    took: list[Ints] = []
    for loss, price in zip(losses, scaled, strict=True):
        after = np.full(cells + 1, np.inf)
        choice: Ints = np.zeros(cells + 1, dtype=np.int64)
        for option in front(price, loss):
            at = int(price[option])
            if at > cells:
                break
            value = best[: cells + 1 - at] + loss[option]
            better = value < after[at:]
            after[at:][better] = value[better]
            choice[at:][better] = option
        best = after
        took.append(choice)
    if not np.isfinite(best[cells]):
        return None
    chosen: list[int] = []
    at = cells
    for price, choice in zip(reversed(scaled), reversed(took), strict=True):
        chosen.append(int(choice[at]))
        at -= int(price[chosen[-1]])
    return chosen[::-1]


def front(prices: Ints, losses: Floats) -> list[int]:
    """Options that no cheaper one equals or beats, cheapest first."""
    found: list[int] = []
    least = np.inf
    for option in np.lexsort((losses, prices)):
        if losses[option] < least:
            found.append(int(option))
            least = losses[option]
    return found


# ------------------------------------------------------------------------------------------------------- what is left over

P = TypeVar("P", bound=Hashable)
T = TypeVar("T")


class Move(NamedTuple, Generic[P, T]):
    """One step up. worth: what it gains for its cost, with whatever decides between equals. place: where. to: what becomes."""

    worth: tuple[float, ...]
    place: P
    to: T


def fill(
    places: Sequence[P],
    look: Callable[[P], Move[P, T] | None],
    take: Callable[[Move[P, T]], bool],
    touched: Callable[[P], Iterable[P]] = lambda place: (place,),
) -> None:
    """Take the most worthy move, again and again, as long as one fits.

    look: the next move at a place, or None. take: does it if it fits, and says so; budgets only fill up, so that a place where
    a move did not fit is left. touched: the places whose moves a taken one changes.
    """
    closed: set[P] = set()
    moves = {place: move for place in places if (move := look(place)) is not None}
    while moves:
        move = max(moves.values(), key=lambda one: one.worth)
        if not take(move):
            closed.add(move.place)
            del moves[move.place]
            continue
        for place in touched(move.place):
            moves.pop(place, None)
            if place not in closed and (after := look(place)) is not None:
                moves[place] = after


class Point(NamedTuple, Generic[T]):
    """A rung of a ladder: what it costs, what it gains, and what it is."""

    cost: int
    gain: float
    what: T

    def worth(self, after: Point[T]) -> float:
        """Gain per cost of the step from here to there."""
        return (after.gain - self.gain) / max(after.cost - self.cost, 1)


def purchases(ladder: Sequence[Point[T]]) -> list[tuple[float, T]]:
    """Steps up a ladder in order of falling worth, each with what it reaches: the upper concave hull of its points."""
    hull = list(ladder[:1])
    for point in ladder[1:]:
        while len(hull) > 1 and hull[-1].worth(point) >= hull[-2].worth(hull[-1]):
            hull.pop()
        hull.append(point)
    return [(a.worth(b), b.what) for a, b in pairwise(hull)]


# ------------------------------------------------------------------------------------------------------- one search space


Losses = Callable[[int, Choice], float]
"""What block i loses by a choice, in a unit that all blocks share."""
Unit = Callable[[int, str], int]
"""The step in which a part of block i grows."""


class Allocator:
    """The choices of one space with what they lose: which of them lose least within limits.

    limits: of `Budget.limits`, always.
    """

    def __init__(self, space: Space, loss: Losses) -> None:
        self.space, self.loss = space, loss

    @cached_property
    def choices(self) -> list[list[Choice]]:
        """All of every block: a product over its parts. `greedy` and `filled`, which go part by part, do without."""
        return [levels.choices() for levels in self.space.levels]

    @cached_property
    def tables(self) -> list[Table]:
        """Every choice of every block, without moments."""
        found = []
        for i, choices in enumerate(self.choices):
            costs = np.array([self.space.price(i, choice) for choice in choices], dtype=np.int64)
            loss = np.array([self.loss(i, choice) for choice in choices], dtype=np.float64)
            found.append(Table(costs.reshape(-1, len(ADDITIVE)), loss))
        return found

    @cached_property
    def peaked(self) -> list[Table]:
        """The same with the widest moments."""
        moments = [[self.space.peak(i, choice) for choice in choices] for i, choices in enumerate(self.choices)]
        return [Table(t.costs, t.loss, np.array(p, dtype=np.int64)) for t, p in zip(self.tables, moments, strict=True)]

    def total(self, choices: Sequence[Choice]) -> float:
        """What these lose together."""
        return sum(self.loss(i, choice) for i, choice in enumerate(choices))

    def fits(self, choices: Sequence[Choice], limits: Mapping[str, int]) -> bool:
        """Whether the network of these choices is within the limits, exactly."""
        return not self.space.over(choices, limits)

    def solve(
        self, limits: Mapping[str, int], allow: Callable[[int, Choice], bool] | None = None
    ) -> tuple[Choice, ...] | None:
        """The choices of the least total loss, or None where none are found.  allow: which of them count; None: all.

        One attention stays where the network needs one: what is added up block by block does not know that a class token
        behind none sees no image.
        """
        return min(self.solutions(limits, allow), key=self.total, default=None)

    def solutions(
        self, limits: Mapping[str, int], allow: Callable[[int, Choice], bool] | None = None
    ) -> list[tuple[Choice, ...]]:
        """The choices of the least total loss; where they leave no attention to a network that needs one, those with each
        block's kept. As `solve` otherwise.
        """
        best = self._solved(limits, allow)
        if best is None or self.space.sees(best):
            return [] if best is None else [best]

        def seeing(block: int) -> Callable[[int, Choice], bool]:
            return lambda i, choice: (i != block or choice.attention) and (allow is None or allow(i, choice))

        holds = [i for i, choice in enumerate(self.space.whole) if choice.attention]
        found = [self._solved(limits, seeing(i)) for i in holds]
        return [one for one in found if one is not None]

    def _solved(
        self, limits: Mapping[str, int], allow: Callable[[int, Choice], bool] | None
    ) -> tuple[Choice, ...] | None:
        constraints = Constraints.of(limits)
        tables = self.tables if constraints.memory_bytes is None else self.peaked
        masks = None
        if allow is not None:
            masks = [np.array([allow(i, c) for c in choices]) for i, choices in enumerate(self.choices)]
        outside = np.array([self.space.outside[name] for name in ADDITIVE], dtype=np.int64)
        rows = solve(tables, constraints, outside=outside, allowed=masks)
        return None if rows is None else tuple(c[row] for c, row in zip(self.choices, rows, strict=True))

    def greedy(self, limits: Mapping[str, int], currency: str, unit: Unit) -> tuple[Choice, ...]:
        """From the least of every part, the longest affordable run of purchases by falling worth.

        For parts whose losses are alike at every size of the others, and mostly convex; rungs are `unit` apart. A whole part is
        bought at its own price, which may be below that of its last rungs. The least of every part has to fit.
        """
        start = self.lowest(unit)
        buys = [
            (worth, i, part, size)
            for i in range(len(start))
            for part in parts_of(self.space, i)
            for worth, size in purchases(self._ladder(i, part, currency, unit))
        ]
        buys.sort(key=lambda buy: -buy[0])  # stable, and each part's own are in order of rising size

        def after(count: int) -> list[Choice]:
            found = list(start)
            for _, i, part, size in buys[:count]:
                found[i] = found[i].sized(part, size)
            return found

        low, high = 0, len(buys)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.fits(after(middle), limits) else (low, middle - 1)
        return tuple(after(low))

    def lowest(self, unit: Unit) -> tuple[Choice, ...]:
        """Every part at one unit."""
        found = list(self.space.whole)
        for i in range(len(found)):
            for part in parts_of(self.space, i):
                found[i] = found[i].sized(part, unit(i, part))
        return tuple(found)

    def _ladder(self, i: int, part: str, currency: str, unit: Unit) -> list[Point[int | None]]:
        whole, step = self.space.whole[i], unit(i, part)
        column, top = ADDITIVE.index(currency), getattr(self.space.levels[i], part)[1]
        rungs = [(size, whole.sized(part, size)) for size in (*range(step, top + 1, step), getattr(whole, part))]
        return [Point(self.space.price(i, choice)[column], -self.loss(i, choice), size) for size, choice in rungs]

    def filled(
        self,
        choices: Sequence[Choice],
        limits: Mapping[str, int],
        currency: str,
        unit: Unit,
        *,
        regain: bool = False,
    ) -> tuple[Choice, ...]:
        """The choices with what is left of the limits spent: part by part, a unit at a time, where a unit is worth most.

        currency: of `counting.ADDITIVE`, what a unit's worth is reckoned in. regain: whether halves that are gone may come back.
        """
        found = list(choices)
        column = ADDITIVE.index(currency)

        def look(place: tuple[int, str]) -> Move[tuple[int, str], Choice] | None:
            i, part = place
            now = found[i]
            after = self._regained(i, part, now) if part in HALVES else self._larger(i, part, now, unit)
            if after is None:
                return None
            price = self.space.price(i, after)[column] - self.space.price(i, now)[column]
            gain = self.loss(i, now) - self.loss(i, after)
            return Move(((gain + 1e-30) / max(price, 1), -i, PLACES.index(part)), place, after)

        def take(move: Move[tuple[int, str], Choice]) -> bool:
            i, _ = move.place
            if not self.fits([*found[:i], move.to, *found[i + 1 :]], limits):
                return False
            found[i] = move.to
            return True

        also = HALVES if regain else ()
        places = [[(i, part) for part in (*parts_of(self.space, i), *also)] for i in range(len(found))]
        fill([place for here in places for place in here], look, take, lambda place: places[place[0]])
        return tuple(found)

    def _regained(self, i: int, half: str, now: Choice) -> Choice | None:
        """Block `i` with that half back at its least; None where it is there, never was, or may not be there alone."""
        levels = self.space.levels[i]
        whole, least = levels.whole, levels.least
        if getattr(now, half) or not getattr(whole, half):
            return None
        if half == "attention":
            return Choice(*least[:3], *now[3:]) if now.mlp or levels.bare or not whole.mlp else None
        return Choice(*now[:3], *least[3:]) if now.attention or levels.off or not whole.attention else None

    def _larger(self, i: int, part: str, now: Choice, unit: Unit) -> Choice | None:
        """Block `i` with a unit more of a part; None where there is no more of it, or its half is gone for good."""
        levels, size = self.space.levels[i], getattr(now, part)
        top = getattr(levels, part)[0]
        if size == top:
            return None
        if not now.attention and levels.whole.attention and not (part not in ATTENTION and levels.off):
            return None
        if part == "hidden" and not size:  # its linears are as they were
            now = now._replace(fc1=levels.least.fc1, fc2=levels.least.fc2)
        step = unit(i, part)
        after = (size // step + 1) * step
        if top is None or self.space.form == "factored":  # a rank: behind the last one on offer comes the whole
            return now.sized(part, after if after <= getattr(levels, part)[1] else top)
        return now.sized(part, min(top, after))


ATTENTION = ("heads", "qk", "v")
PLACES = (*Choice._fields, *HALVES)
"""Where `filled` looks, in the order that decides between equals."""


def parts_of(space: Space, i: int) -> list[str]:
    """Parts of block `i` that have several sizes."""
    return [part for part in Choice._fields if len(getattr(space.levels[i], part)) > 1]
