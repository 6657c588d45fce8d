"""One option for each part at the least total loss within a room: exact dynamic programming over whole costs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

CELLS = 4000
"""Cells of the grid to which costs are rounded up, at least."""


def knapsack(losses: Sequence[np.ndarray], prices: Sequence[np.ndarray], room: int) -> list[int] | None:
    """The option of each part that together lose least and cost at most `room`; None where even the cheapest cost more.

    losses: float [options] of each part. prices: int [options], at least 0. Costs above each part's cheapest are divided by
    their common divisor; where that leaves up to 5 `CELLS` cells the answer is exact, else costs are rounded up to a grid of
    `CELLS` or more: never above the room, and below it by at most the parts' number of cells.
    """
    room -= sum(int(p.min()) for p in prices)
    if room < 0:
        return None
    extra = [p - p.min() for p in prices]
    divisor = math.gcd(*(int(e) for p in extra for e in p)) or 1
    cells = min(room, sum(int(e.max()) for e in extra)) // divisor
    if cells <= 5 * CELLS:
        scaled = [e // divisor for e in extra]
    else:
        cells = max(CELLS, 500 * len(prices))
        scaled = [-(-e * cells // room) for e in extra]
    best = np.zeros(cells + 1)
    took: list[np.ndarray] = []
    for loss, price in zip(losses, scaled, strict=True):
        after = np.full(cells + 1, np.inf)
        choice = np.zeros(cells + 1, dtype=np.int64)
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


def front(prices: np.ndarray, losses: np.ndarray) -> list[int]:
    """Options that no cheaper one equals or beats, cheapest first."""
    found: list[int] = []
    least = np.inf
    for option in np.lexsort((losses, prices)):
        if losses[option] < least:
            found.append(int(option))
            least = losses[option]
    return found


__all__ = ["CELLS", "front", "knapsack"]
