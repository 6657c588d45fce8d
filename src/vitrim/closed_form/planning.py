"""Allocation: one option for each block, with the least total loss within a budget. Plain numbers, no networks.

Losses add over blocks, costs add over blocks. With one limited resource the choice is exact by dynamic programming over the
budget in `GRID` units, costs rounded up, so that a plan is never above its budget; with two, one Lagrange multiplier prices
the second.

Shapes: n options of a block, R resources.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

GRID = 4000
"""Units that the budget above the cheapest plan is divided into."""
BISECTIONS = 30


@dataclass(frozen=True)
class Table:
    """Options of one block.  costs: int64 [n, R].  loss: float64 [n]."""

    costs: np.ndarray
    loss: np.ndarray

    def take(self, rows: np.ndarray) -> Table:
        return Table(self.costs[rows], self.loss[rows])


def pareto(table: Table) -> np.ndarray:
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


def allocate(tables: Sequence[Table], limits: Sequence[int]) -> list[int] | None:
    """The option of each block, as rows of its table; None if none is found within the limits.

    limits: what all blocks together may cost, one for each resource; of one resource or of two.
    """
    if any(sum(int(t.costs[:, r].min()) for t in tables) > limit for r, limit in enumerate(limits)):
        return None
    if not tables:
        return []
    rows = [pareto(table) for table in tables]
    slim = [table.take(kept) for table, kept in zip(tables, rows, strict=True)]
    found = _one(slim, limits[0]) if len(limits) == 1 else _two(slim, limits)
    return None if found is None else [int(kept[j]) for kept, j in zip(rows, found, strict=True)]


def total(tables: Sequence[Table], chosen: Sequence[int]) -> tuple[np.ndarray, float]:
    """Costs [R] and loss of a choice."""
    costs = sum(
        (t.costs[j] for t, j in zip(tables, chosen, strict=True)), np.zeros(tables[0].costs.shape[1], dtype=np.int64)
    )
    return costs, float(sum(t.loss[j] for t, j in zip(tables, chosen, strict=True)))


def _one(tables: Sequence[Table], limit: int, resource: int = 0, price: float = 0.0) -> list[int] | None:
    """Dynamic programming; the loss of an option is its own plus `price` for each unit of the other resource."""
    costs = [t.costs[:, resource] for t in tables]
    least = [int(c.min()) for c in costs]
    room = limit - sum(least)
    if room < 0:
        return None
    unit = max(room / GRID, 1.0)
    cells = int(room // unit)
    best = np.zeros(cells + 1)
    choices = np.zeros((len(tables), cells + 1), dtype=np.int32)
    for b, table in enumerate(tables):
        loss = table.loss if not price else table.loss + price * table.costs[:, 1 - resource]
        need = np.ceil((costs[b] - least[b]) / unit - 1e-12).astype(np.int64)
        now = np.full(cells + 1, np.inf)
        for j in np.flatnonzero(need <= cells):
            n = int(need[j])
            trial = best[: cells + 1 - n] + loss[j]
            better = trial < now[n:]
            now[n:][better] = trial[better]
            choices[b, n:][better] = j
        best = now
    cell, chosen = cells, []
    for b in range(len(tables) - 1, -1, -1):
        j = int(choices[b, cell])
        chosen.append(j)
        cell -= int(np.ceil((costs[b][j] - least[b]) / unit - 1e-12))
    return chosen[::-1]


def _two(tables: Sequence[Table], limits: Sequence[int]) -> list[int] | None:
    """The first resource bounded exactly, the second by a price; then the other way round. The better one within both."""
    found: list[tuple[float, list[int]]] = []

    def note(chosen: list[int] | None) -> bool:
        if chosen is None:
            return False
        costs, loss = total(tables, chosen)
        within = bool((costs <= np.array(limits)).all())
        if within:
            found.append((loss, chosen))
        return within

    span = max(float(t.loss.max() - t.loss.min()) for t in tables) + 1e-30
    for resource in (0, 1):
        if note(_one(tables, limits[resource], resource)):
            break  # what is best for one limit alone and meets the other is best
        widest = max(float(np.ptp(t.costs[:, 1 - resource])) for t in tables)
        scale = span / max(widest, 1.0)
        low, high = 1e-12 * scale, 1e6 * scale
        for _ in range(BISECTIONS):
            price = (low * high) ** 0.5
            low, high = (low, price) if note(_one(tables, limits[resource], resource, price)) else (price, high)
    return min(found, key=lambda one: one[0])[1] if found else None


__all__ = ["GRID", "Table", "allocate", "pareto", "total"]
