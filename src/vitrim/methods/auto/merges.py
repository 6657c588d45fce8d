"""auto: tokens as an axis of the plan: where similar ones merge and how many, by what merging loses and what fewer tokens save.

A merged token with its size in the attention (`proportional`) is worth as many equal tokens, so that a merge is a change of the
dense stream, and its loss does not depend on what later blocks become. What a block costs depends on the tokens that reach it:
the state that makes costs additive is their number. `schedule` is dynamic programming over (block, tokens left) at a price of
operations, which bisection finds.

Shapes: L levels of the ladder, C choices of a block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vitrim.counting import attention_macs, mlp_macs, similarity_macs
from vitrim.space import Choice, Space
from vitrim.spec import Prefix, Similarity

LEVELS = 16
"""Counts of patch tokens on the ladder, the whole among them."""
LEAST = 1 / 8
"""Share of the patch tokens below which no merge goes."""
DIRECTIONS = 1 / 4
"""Share of the stream's directions in which tokens are compared, of `MOST` at the most: those that the product minds."""
MOST = 64
LONGEST = 1 / 8
"""Share of the tokens in front of a step that it may merge, or a rung: more at once are worse matched than losses foretell."""
BISECTIONS = 24

Floats = np.ndarray[tuple[int, ...], np.dtype[np.float64]]
Schedule = tuple[tuple[int, Similarity], ...]


def ladder(patches: int) -> tuple[int, ...]:
    """Counts of patch tokens on offer, falling, the whole first; alone where there are too few to merge."""
    least = max(4, round(patches * LEAST))
    levels = min(LEVELS, patches - least + 1)
    if levels < 2:
        return (patches,)
    return tuple(round(patches - (patches - least) * n / (levels - 1)) for n in range(levels))


def directions(width: int) -> int:
    """Of the stream in which tokens are compared."""
    return max(1, min(MOST, round(width * DIRECTIONS)))


def furthest(counts: Sequence[int], level: int) -> int:
    """The lowest level of the ladder that one step reaches from a level."""
    before, found = counts[level], level
    for at in range(level + 1, len(counts)):
        gone = before - counts[at]
        if gone <= before // 2 and (at == level + 1 or gone <= before * LONGEST):
            found = at
    return found


@dataclass(frozen=True)
class Merges:
    """What merging loses.  counts: the ladder.  losses: [blocks, L], rising: of one block's stream brought down to a count."""

    counts: tuple[int, ...]
    losses: Floats

    def loss(self, i: int, before: int, after: int) -> float:
        """Of merging `before` patch tokens to `after` in block `i`."""
        at = np.interp([before, after], self.counts[::-1], self.losses[i][::-1])
        return float(at[1] - at[0])

    def total(self, steps: Sequence[tuple[int, Any]]) -> float:
        """Of a schedule of similarity steps, in the order of the blocks."""
        found, now = 0.0, self.counts[0]
        for i, step in steps:
            found, now = found + self.loss(i, now, step.keep), step.keep
        return found


@dataclass(frozen=True)
class Stage:
    """What one block may become, and lose and cost.

    loss: [C] of its choices. attention: [C, L] operations by the tokens in front, mlp: [C, L] by those behind. merged: [L, L] what
    merging from one level to another loses, inf where no step does it. moves: [L, L] operations of that step.
    """

    loss: Floats
    attention: Floats
    mlp: Floats
    merged: Floats
    moves: Floats


def cheapest(stages: Sequence[Stage], price: float) -> tuple[list[int], float]:
    """Levels behind each block where losses and operations at this price are least together; and these operations.

    Dynamic programming: exact, since what a block loses and costs depends on the levels in front and behind alone.
    """
    count = len(stages[0].merged)
    best, took, costs = np.full(count, np.inf), [], []
    best[0] = 0.0
    before, after = np.indices((count, count))
    for own in stages:
        each = own.loss[:, None, None] + price * (own.attention[:, :, None] + own.mlp[:, None, :])  # C L L
        pick = each.argmin(0)
        costs.append(own.attention[pick, before] + own.mlp[pick, after] + own.moves)
        value = best[:, None] + each.min(0) + own.merged + price * own.moves
        took.append(value.argmin(0))
        best = value.min(0)
    at = int(best.argmin())
    levels, used = [at], 0.0
    for step, cost in zip(reversed(took), reversed(costs), strict=True):
        levels.append(int(step[at]))
        used += float(cost[levels[-1], at])
        at = levels[-1]
    return levels[-2::-1], used


def schedule(
    space: Space,
    losses: Sequence[Mapping[Choice, float]],
    merges: Merges,
    limit: int,
    *,
    carry: bool,
    weight: float = 1.0,
) -> Schedule | None:
    """Where to merge how many tokens, so that merges and the blocks' choices together lose least within `limit` operations.

    space: without token steps but an exact tail. losses: of each block's choices. weight: of the losses of merging, beside those
    of the choices. None where the limit is out of reach.
    """
    stages = [_stage(space, i, own, merges, carry, weight) for i, own in enumerate(losses)]
    left = limit - space.outside["macs"]

    def at(price: float) -> Schedule | None:
        levels, used = cheapest(stages, price)
        return _steps(levels, merges.counts, space.base.width, carry) if used <= left else None

    if (free := at(0.0)) is not None:
        return free
    high = (sum(float(np.ptp(own.loss)) for own in stages) + float(merges.losses.max()) + 1e-30) / max(left, 1) * 1e6
    low, found = high * 1e-14, at(high)
    for _ in range(BISECTIONS if found is not None else 0):
        middle = (low * high) ** 0.5
        here = at(middle)
        low, high, found = (middle, high, found) if here is None else (low, middle, here)
    return found


def merge(keep: int, width: int, *, carry: bool) -> Similarity:
    """The step that the plan uses."""
    return Similarity(at="mid", keep=keep, proportional=True, match="ward", metric=directions(width), carry=carry)


def _steps(levels: Sequence[int], counts: Sequence[int], width: int, carry: bool) -> Schedule:
    found, now = [], 0
    for i, level in enumerate(levels):
        if level != now:
            found.append((i, merge(counts[level], width, carry=carry)))
        now = level
    return tuple(found)


def _stage(space: Space, i: int, losses: Mapping[Choice, float], merges: Merges, carry: bool, weight: float) -> Stage:
    counts, width, count = merges.counts, space.base.width, len(merges.counts)
    tokens = np.array(counts, dtype=np.float64) + len(space.base.prefix)
    ends = any(isinstance(step, Prefix) for step in space.base.blocks[i].steps)  # only prefix tokens go through it
    going = np.full_like(tokens, len(space.base.prefix)) if ends else tokens
    attention, mlp = np.zeros((2, len(losses), count))
    for n, choice in enumerate(losses):
        block = space.block(i, choice)
        if (a := block.attention) is not None:
            attention[n] = attention_macs(a.heads, a.qk_dim, a.v_dim, tokens=tokens, width=width, queries=going)
        if (m := block.mlp) is not None:
            ranks = {"fc1_rank": m.fc1_rank, "fc2_rank": m.fc2_rank}
            mlp[n] = mlp_macs(m.hidden, tokens=going, width=width, kind=m.kind, **ranks)
    merged, moves = np.full((count, count), np.inf), np.zeros((count, count))
    np.fill_diagonal(merged, 0.0)
    for level, before in enumerate(counts if not ends else ()):
        for to in range(level + 1, furthest(counts, level) + 1):
            merged[level, to] = weight * merges.loss(i, before, counts[to])
            moves[level, to] = similarity_macs(before, counts[to], width, metric=directions(width), carry=carry)
    return Stage(np.array(list(losses.values())), attention, mlp, merged, moves)
