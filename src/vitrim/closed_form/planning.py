"""Allocation: one option for each block, with the least total loss within a budget. Plain numbers, no networks.

Losses add over blocks, costs add over blocks. With one limited resource `knapsack` chooses; with two, one Lagrange multiplier
prices the second.

Shapes: n options of a block, R resources.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vitrim.closed_form.knapsack import knapsack

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
    """One limit; the loss of an option is its own plus `price` for each unit of the other resource."""
    losses = [t.loss if not price else t.loss + price * t.costs[:, 1 - resource] for t in tables]
    return knapsack(losses, [t.costs[:, resource] for t in tables], limit)


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


__all__ = ["Table", "allocate", "pareto", "total"]
