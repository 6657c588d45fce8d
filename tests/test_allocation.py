"""Allocation: exact on small instances, never above a budget, and no worse with more of it."""

from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vitrim.allocation import Table, allocate, knapsack, pareto, total


def tables(seed: int, blocks: int = 4, options: int = 6, resources: int = 1) -> list[Table]:
    draw = np.random.default_rng(seed)
    return [Table(draw.integers(1, 50, (options, resources)), draw.random(options)) for _ in range(blocks)]


def brute(found: list[Table], limits: list[int]) -> float | None:
    best = None
    for chosen in product(*(range(len(t.loss)) for t in found)):
        costs, loss = total(found, chosen)
        if (costs <= limits).all() and (best is None or loss < best):
            best = loss
    return best


@pytest.mark.parametrize("seed", range(50))
def test_one_budget_is_spent_as_brute_force_spends_it(seed):
    found = tables(seed)
    limit = int(np.random.default_rng(seed + 1000).integers(10, 180))
    best = brute(found, [limit])
    chosen = allocate(found, [limit])
    assert (chosen is None) == (best is None)
    if chosen is not None:
        costs, loss = total(found, chosen)
        assert costs[0] <= limit
        assert loss == pytest.approx(best)


@pytest.mark.parametrize("seed", range(20))
def test_two_budgets_are_met_and_nearly_as_well_as_by_brute_force(seed):
    found = tables(seed, options=8, resources=2)
    limits = [int(n) for n in np.random.default_rng(seed + 1000).integers(60, 160, 2)]
    best, chosen = brute(found, limits), allocate(found, limits)
    assert best is not None
    assert chosen is not None
    costs, loss = total(found, chosen)
    assert (costs <= limits).all()
    worst = sum(float(t.loss.max()) for t in found)
    assert best <= loss + 1e-12 <= best + 0.25 * worst  # a price can miss what lies inside the hull


def test_more_budget_never_predicts_worse():
    found = tables(7, blocks=6, options=9)
    losses = [
        total(found, chosen)[1] for limit in range(40, 300, 5) if (chosen := allocate(found, [limit])) is not None
    ]
    assert len(losses) > 20
    assert all(after <= before + 1e-12 for before, after in pairwise(losses))


@pytest.mark.parametrize("resources", [1, 2])
def test_pruning_keeps_the_options_that_no_other_beats(resources):
    table = tables(3, blocks=1, options=60, resources=resources)[0]
    kept = set(pareto(table).tolist())
    for row in range(60):
        beaten = any(
            (table.costs[other] <= table.costs[row]).all() and table.loss[other] <= table.loss[row]
            for other in kept
            if other != row
        )
        assert beaten or row in kept


def test_a_budget_that_buys_everything_buys_the_least_loss():
    found = tables(1)
    chosen = allocate(found, [10**9])
    assert chosen is not None
    assert total(found, chosen)[1] == pytest.approx(sum(float(t.loss.min()) for t in found))


def test_two_options_a_block_are_spent_as_by_greed_up_to_one_item():
    draw = np.random.default_rng(5)
    gains, limit = draw.random(30), 12
    found = [Table(np.array([[0], [1]]), np.array([gain, 0.0])) for gain in gains]
    chosen = allocate(found, [limit])
    assert chosen is not None
    assert sum(chosen) == limit
    assert {i for i, j in enumerate(chosen) if j} == set(np.argsort(-gains)[:limit].tolist())


@settings(max_examples=50)
@given(data=st.data())
def test_the_programme_equals_brute_force(data):
    parts = data.draw(st.integers(1, 4))
    losses = [
        np.array(data.draw(st.lists(st.integers(0, 50), min_size=1, max_size=4)), dtype=float) for _ in range(parts)
    ]
    prices = [np.array([data.draw(st.integers(0, 30)) for _ in loss]) for loss in losses]
    room = data.draw(st.integers(0, 80))
    every = [
        sum(loss[o] for loss, o in zip(losses, pick, strict=True))
        for pick in product(*(range(len(loss)) for loss in losses))
        if sum(p[o] for p, o in zip(prices, pick, strict=True)) <= room
    ]
    found = knapsack(losses, prices, room)
    if not every:
        assert found is None
        return
    assert found is not None
    assert sum(p[o] for p, o in zip(prices, found, strict=True)) <= room
    assert sum(loss[o] for loss, o in zip(losses, found, strict=True)) == min(every)


def test_a_grid_of_large_costs_is_never_exceeded_and_nearly_used():
    g = np.random.default_rng(0)
    prices = [np.sort(g.integers(0, 10**12, 60)) for _ in range(12)]
    losses = [1.0 / (1 + p.astype(float)) for p in prices]
    room = 4 * 10**12
    found = knapsack(losses, prices, room)
    assert found is not None
    used = sum(int(p[o]) for p, o in zip(prices, found, strict=True))
    assert room * 0.9 < used <= room
