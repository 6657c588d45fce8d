"""auto: tokens as an axis of the plan: where they merge and how many, by what merging loses and what fewer tokens save.

A merged token with its size in the attention (`proportional`) is worth as many equal tokens, so that a merge is a change of the
dense stream, and its loss does not depend on what later blocks become. What a block costs depends on the tokens that reach it:
the state that makes costs additive is their number, and their lattice while there is one. `Plan` is dynamic programming over
(block, node) at a price of operations, which bisection finds.

A step is a way from one node to a lower one: to fewer columns or rows of the lattice, pairs chosen by content but where half
go, or to fewer tokens of a count on the ladder, whatever is most alike. From the ladder no way leads back to a lattice.

Shapes: n nodes, E ways between them, C choices of a block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np

from vitrim.allocation import Table, pareto
from vitrim.counting import attention_macs, mlp_macs, similarity_macs
from vitrim.space import Choice, Space
from vitrim.spec import Merge, Prefix, Similarity, Step

LEVELS = 16
"""Counts of patch tokens on the ladder, the whole among them."""
LEAST = 1 / 8
"""Share of the patch tokens below which no merge goes."""
LATTICES = ((3 / 4, 1), (1 / 2, 1), (3 / 4, 3 / 4), (1 / 2, 3 / 4), (1 / 2, 1 / 2))
"""Shares of columns and rows that lattice merges leave."""
DIRECTIONS = 1 / 4
"""Share of the stream's directions in which tokens are compared, of `MOST` at the most: those that the product minds."""
MOST = 64
CARRIED = 1 / 12
"""Rank of what carries differences along, as a share of the stream's width, of `MOST_CARRIED` at the most: twice as much adds little."""
MOST_CARRIED = 32
LONGEST = 1 / 8
"""Share of the tokens in front of a step of similar ones that it may merge, or a rung: more at once are worse matched than losses
foretell."""
BISECTIONS, BETWEEN = 24, 8

Floats = np.ndarray[tuple[int, ...], np.dtype[np.float64]]
Ints = np.ndarray[tuple[int, ...], np.dtype[np.int64]]
Schedule = tuple[tuple[int, Step], ...]
"""Token steps to add, each with its block."""


class Node(NamedTuple):
    """Patch tokens at one place. grid: rows and columns of their lattice; None: similar ones have merged, and it is lost."""

    patches: int
    grid: tuple[int, int] | None = None

    def after(self, step: Step) -> Node:
        """What a step of the plan leaves of these."""
        assert not isinstance(step, Prefix)
        if isinstance(step, Similarity):
            return Node(step.keep)
        assert self.grid is not None
        rows, cols = (self.grid[0], step.keep) if step.axis == "h" else (step.keep, self.grid[1])
        return Node(rows * cols, (rows, cols))


def nodes(grid: tuple[int, int]) -> tuple[Node, ...]:
    """What may be left of a lattice, the whole first, no way leading to an earlier one; alone where there are too few to merge."""
    rows, cols = grid
    patches = rows * cols
    least = max(4, round(patches * LEAST))
    fewer = ((math.ceil(rows * v), math.ceil(cols * h)) for h, v in LATTICES)
    lattices = [at for at in dict.fromkeys(fewer) if at != grid and math.prod(at) >= least]
    levels = min(LEVELS, patches - least + 1)
    rungs = [round(patches - (patches - least) * n / (levels - 1)) for n in range(1, levels)]
    return (Node(patches, grid), *(Node(math.prod(at), at) for at in lattices), *(Node(count) for count in rungs))


def ways(found: Sequence[Node]) -> list[tuple[int, int]]:
    """Pairs of nodes, before and after, of which one step leads from the first to the second; sorted by the second."""
    return [(a, b) for b, after in enumerate(found) for a in range(b) if _leads(found, found[a], after)]


def _leads(found: Sequence[Node], before: Node, after: Node) -> bool:
    gone = before.patches - after.patches
    if not 0 < gone <= before.patches // 2:
        return False
    if after.grid is None:
        next_rung = max(node.patches for node in found if node.grid is None and node.patches < before.patches)
        return after.patches == next_rung or gone <= before.patches * LONGEST
    if before.grid is None:
        return False
    (rows, cols), (fewer_rows, fewer_cols) = before.grid, after.grid
    return (rows == fewer_rows and cols > fewer_cols) or (cols == fewer_cols and rows > fewer_rows)


def carried(width: int) -> int:
    """Rank of what carries along what sets similar tokens apart."""
    return max(1, min(MOST_CARRIED, round(width * CARRIED)))


def measured(found: Sequence[Node]) -> list[int]:
    """Nodes whose losses are measured: lattices, and every second rung of the ladder, the last and the first among them."""
    rungs = [n for n in range(1, len(found)) if found[n].grid is None]
    lattices = [n for n in range(1, len(found)) if found[n].grid is not None]
    return sorted({*lattices, *rungs[::-2], *rungs[:1]})


def nearest(found: Sequence[Node], n: int) -> Node:
    """The node from which another is measured: the rung above, or the lattice with its columns and all rows, or the whole."""
    if (grid := found[n].grid) is None:
        return found[n - 1] if found[n - 1].grid is None else found[0]
    rows, _ = found[0].grid or grid
    return next((node for node in found[1:n] if node.grid == (rows, grid[1])), found[0])


def directions(width: int) -> int:
    """Of the stream in which tokens are compared."""
    return max(1, min(MOST, round(width * DIRECTIONS)))


def merge(before: Node, after: Node, width: int, *, carry: bool) -> Merge | Similarity:
    """The step that leads from one node to another.  carry: of what sets similar tokens apart."""
    if after.grid is None:
        step = Similarity(at="mid", keep=after.patches, proportional=True, match="ward", metric=directions(width))
        # of a classifier any into heavier ones gains as often as it loses: four times the distances are to pay
        return replace(step, match="heavier", carry=carried(width)) if carry else step
    assert before.grid is not None
    if after.grid[0] == before.grid[0]:
        return Merge(at="mid", axis="h", keep=after.grid[1], proportional=True)
    return Merge(at="mid", axis="v", keep=after.grid[0], proportional=True)


@dataclass(frozen=True)
class Merges:
    """What merging loses.  losses: [blocks, n], of one block's stream brought down from the whole to a node."""

    nodes: tuple[Node, ...]
    losses: Floats

    @staticmethod
    def settled(found: tuple[Node, ...], losses: Floats) -> Merges:
        """Of what has been measured: rungs between on the line of the roots, as losses grow about with the square of what is gone.

        No node at less than one that leads to it in the same way: what noise says otherwise.
        """
        losses = losses.copy()
        known = [0, *(n for n in measured(found) if found[n].grid is None)]
        counts = [found[n].patches for n in known]
        for n in range(1, len(found)):
            if found[n].grid is None and n not in known:
                roots = [np.interp(found[n].patches, counts[::-1], row[known[::-1]] ** 0.5) for row in losses]
                losses[:, n] = np.square(roots)
        for a, b in ways(found):
            if a == 0 or (found[a].grid is None) == (found[b].grid is None):
                losses[:, b] = np.maximum(losses[:, b], losses[:, a])
        return Merges(found, losses)

    @cached_property
    def _places(self) -> dict[Node, int]:
        return {node: n for n, node in enumerate(self.nodes)}

    @cached_property
    def _ladder(self) -> list[int]:
        """The whole and the counts of similar tokens, rising."""
        return [n for n in range(len(self.nodes) - 1, 0, -1) if self.nodes[n].grid is None] + [0]

    def loss(self, i: int, before: Node, after: Node) -> float:
        """Of the step from one node to another in block `i`."""
        if after.grid is not None:
            return float(self.losses[i, self._places[after]] - self.losses[i, self._places[before]])
        counts = [self.nodes[n].patches for n in self._ladder]
        at = np.interp([before.patches, after.patches], counts, self.losses[i, self._ladder])
        return float(at[1] - at[0])

    def total(self, steps: Schedule) -> float:
        """Of a schedule, in the order of the blocks."""
        found, now = 0.0, self.nodes[0]
        for i, step in steps:
            after = now.after(step)
            found, now = found + self.loss(i, now, after), after
        return found


@dataclass(frozen=True)
class Stage:
    """What one block may become, and lose and cost.

    loss: [C] of its choices. attention: [C, n] operations by the tokens in front, mlp: [C, n] by those behind. merged: [E] what the
    step of each way loses, inf where the block has none. moves: [E] operations of that step.
    """

    loss: Floats
    attention: Floats
    mlp: Floats
    merged: Floats
    moves: Floats


def cheapest(stages: Sequence[Stage], along: Sequence[tuple[int, int]], price: float) -> tuple[list[int], float]:
    """Nodes behind each block where losses and operations at this price are least together; and these operations.

    along: the E ways, those that stay where they are among them. Dynamic programming: exact, since what a block loses and costs
    depends on the nodes in front and behind alone.
    """
    before, after = (np.array(ends) for ends in zip(*along, strict=True))
    count = int(after.max()) + 1
    best, took, costs = np.full(count, np.inf), [], []
    best[0] = 0.0
    for own in stages:
        each = own.loss[:, None] + price * (own.attention[:, before] + own.mlp[:, after])  # C E
        pick = each.argmin(0)
        costs.append(own.attention[pick, before] + own.mlp[pick, after] + own.moves)
        value = np.full((count, count), np.inf)
        value[before, after] = best[before] + each.min(0) + own.merged + price * own.moves
        took.append(value.argmin(0))
        best = value.min(0)
    numbers = {way: e for e, way in enumerate(along)}
    at = int(best.argmin())
    found, used = [at], 0.0
    for step, cost in zip(reversed(took), reversed(costs), strict=True):
        before_it = int(step[at])
        used += float(cost[numbers[before_it, at]])
        found.append(before_it)
        at = before_it
    return found[-2::-1], used


class Plan:
    """Where to merge how many tokens of one space, beside its blocks' choices.

    space: without token steps but an exact tail. losses: of each block's choices.
    """

    def __init__(self, space: Space, losses: Sequence[Mapping[Choice, float]], merges: Merges, *, carry: bool) -> None:
        self.space, self.merges, self.carry = space, merges, carry
        self.ways = [*((n, n) for n in range(len(merges.nodes))), *ways(merges.nodes)]
        self.stages = [self._stage(i, own) for i, own in enumerate(losses)]

    def schedules(self, limit: int, *, weight: float = 1.0, lattice: bool = True) -> list[Schedule]:
        """The steps with which merges and choices together lose least within `limit` operations; none where it is out of reach.

        weight: of the losses of merging, beside those of the choices. lattice: whether columns and rows may merge. Also the steps of the least price at which too many
        operations are left: with other choices these may be within.
        """
        allowed = [lattice or start == end or self.merges.nodes[end].grid is None for start, end in self.ways]
        stages = [replace(own, merged=np.where(allowed, weight * own.merged, np.inf)) for own in self.stages]
        left = limit - self.space.outside["macs"]

        def at(price: float) -> tuple[Schedule, bool]:
            path, used = cheapest(stages, self.ways, price)
            return self._steps([self.merges.nodes[n] for n in path]), used <= left

        free, fits = at(0.0)
        if fits:
            return [free]
        most = float(self.merges.losses.max()) * weight
        high = (sum(float(np.ptp(own.loss)) for own in stages) + most + 1e-30) / max(left, 1) * 1e6
        low, over = high * 1e-14, free
        found, fits = at(high)
        for _ in range(BISECTIONS if fits else 0):
            middle = (low * high) ** 0.5
            steps, within = at(middle)
            if within:
                high, found = middle, steps
            else:
                low, over = middle, steps
        return [found, over] if fits else []

    def between(self, within: Schedule, over: Schedule, fits: Callable[[Schedule], bool]) -> Schedule:
        """The last schedule that fits on the way from one that does to one that leaves more tokens; of similar tokens alone.

        A price finds no plan between two on the hull of losses and operations; counts have no gaps.
        """
        whole, pairs = self.merges.nodes[0], list(zip(self._path(within), self._path(over), strict=True))
        if any(a != b and any(node.grid and node != whole for node in (a, b)) for a, b in pairs):
            return within  # no lattice lies between two
        low, high = 0.0, 1.0
        for _ in range(BETWEEN):
            share = (low + high) / 2
            counts = [math.ceil(a.patches + share * (b.patches - a.patches)) for a, b in pairs]
            path = [
                a if a == b else whole if count == whole.patches else Node(count)
                for count, (a, b) in zip(counts, pairs, strict=True)
            ]
            if fits(steps := self._steps(path)):
                low, within = share, steps
            else:
                high = share
        return within

    def _path(self, steps: Schedule) -> list[Node]:
        """What is left behind each block."""
        found, now, at = [], self.merges.nodes[0], dict(steps)
        for i in range(len(self.stages)):
            now = now.after(at[i]) if i in at else now
            found.append(now)
        return found

    def steepest(self) -> Schedule:
        """The steps with which the fewest operations are left, where neither choices nor merges lose anything."""
        return self._steps([self.merges.nodes[n] for n in cheapest(self.stages, self.ways, 1.0)[0]])

    def _steps(self, path: Sequence[Node]) -> Schedule:
        found: list[tuple[int, Step]] = []
        now = self.merges.nodes[0]
        for i, after in enumerate(path):
            if after != now:
                found.append((i, merge(now, after, self.space.base.width, carry=self.carry)))
                now = after
        return tuple(found)

    def _stage(self, i: int, losses: Mapping[Choice, float]) -> Stage:
        space, found, width = self.space, self.merges.nodes, self.space.base.width
        tokens = np.array([node.patches + len(space.base.prefix) for node in found], dtype=np.float64)
        ends = any(isinstance(step, Prefix) for step in space.base.blocks[i].steps)  # only prefix tokens go through it
        going = np.full_like(tokens, len(space.base.prefix)) if ends else tokens
        choices = self._worthy(i, losses)
        attention, mlp = np.zeros((2, len(choices), len(found)))
        for n, choice in enumerate(choices):
            block = space.block(i, choice)
            if (a := block.attention) is not None:
                attention[n] = attention_macs(a.heads, a.qk_dim, a.v_dim, tokens=tokens, width=width, queries=going)
            if (m := block.mlp) is not None:
                ranks = {"fc1_rank": m.fc1_rank, "fc2_rank": m.fc2_rank}
                mlp[n] = mlp_macs(m.hidden, tokens=going, width=width, kind=m.kind, **ranks)
        merged, moves = np.zeros((2, len(self.ways)))
        for e, (start, end) in enumerate(self.ways):
            if start == end:
                continue
            merged[e] = math.inf if ends else self.merges.loss(i, found[start], found[end])
            step = merge(found[start], found[end], width, carry=self.carry)
            if isinstance(step, Similarity):
                moves[e] = similarity_macs(step, found[start].patches, width)
        return Stage(np.array([losses[choice] for choice in choices]), attention, mlp, merged, moves)

    def _worthy(self, i: int, losses: Mapping[Choice, float]) -> list[Choice]:
        """Choices that no other one beats in loss and in both halves' operations: those grow with the tokens alike."""
        halves = [[self.space.price(i, c.without(half))[0] for half in ("mlp", "attention")] for c in losses]
        rows = pareto(Table(np.array(halves, dtype=np.int64), np.array(list(losses.values()))))
        choices = list(losses)
        return [choices[row] for row in rows]
