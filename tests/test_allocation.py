"""Allocation: exact on small instances, never above a budget, and no worse with more of it."""

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.specs import vit
from vitrim.allocation import Allocator, Move, Table, allocate, fill, knapsack, pareto, parts_of, solve, total
from vitrim.budget import Constraints
from vitrim.counting import FLOAT_BYTES, RESOURCES, cost
from vitrim.space import BlockLevels, Choice, Form, Space
from vitrim.spec import MlpSpec, Pool


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


@pytest.mark.parametrize("seed", range(20))
def test_three_budgets_are_met_and_nearly_as_well_as_by_brute_force(seed):
    found = tables(seed, options=6, resources=3)
    limits = [int(n) for n in np.random.default_rng(seed + 1000).integers(70, 160, 3)]
    best, chosen = brute(found, limits), allocate(found, limits)
    assert best is not None
    assert chosen is not None
    costs, loss = total(found, chosen)
    assert (costs <= limits).all()
    worst = sum(float(t.loss.max()) for t in found)
    assert best <= loss + 1e-12 <= best + 0.25 * worst


@pytest.mark.parametrize("seed", range(20))
def test_a_limit_on_memory_is_spent_as_by_brute_force(seed):
    """Few moments: each is tried as the widest."""
    draw = np.random.default_rng(seed)
    found = [replace(t, peaks=draw.choice([40, 80, 120, 160], len(t.loss))) for t in tables(seed, resources=2)]
    outside = np.array([5, 7])
    memory = int(draw.integers(300, 900))
    best = None
    for chosen in product(*(range(len(t.loss)) for t in found)):
        costs, loss = total(found, chosen)
        peak = max(int(t.peaks[j]) for t, j in zip(found, chosen, strict=True))
        if FLOAT_BYTES * int(costs[1] + outside[1]) + peak <= memory and (best is None or loss < best):
            best = loss
    rows = solve(found, Constraints(additive={}, memory_bytes=memory), outside=outside)
    assert (rows is None) == (best is None)
    if rows is not None:
        costs, loss = total(found, rows)
        assert (
            FLOAT_BYTES * int(costs[1] + outside[1]) + max(int(t.peaks[j]) for t, j in zip(found, rows, strict=True))
            <= memory
        )
        assert loss == pytest.approx(best)


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


# ------------------------------------------------------------------------------------------------------- one search space


def convex(seed: int, *, blocks: int = 2, form: Form = "factored") -> Allocator:
    """A small space whose parts lose ever less for each size more, and alike at every size of the others."""
    spec = vit(blocks=blocks, width=12, heads=1, head_dim=6, hidden=10)
    offered = {"qk": tuple(range(6, 0, -1)), "fc2": (None, *range(5, 0, -1))}
    levels = tuple(replace(BlockLevels.whole_of(block), **offered) for block in spec.blocks)  # type: ignore[arg-type]
    draw = np.random.default_rng(seed)
    gains = [{part: sorted(draw.random(len(sizes)), reverse=True) for part, sizes in offered.items()} for _ in levels]
    space = Space(given=spec, base=spec, fixed=frozenset(), levels=levels, form=form, dense={})

    def loss(i: int, choice: Choice) -> float:
        parts = {part: getattr(choice, part) for part in offered}
        return sum(sum(gains[i][p][n:]) for p, n in parts.items() if n != getattr(space.whole[i], p))

    return Allocator(space, loss)


def one(i: int, part: str) -> int:
    return 1


def limits_of(allocator: Allocator, names: tuple[str, ...], share: float) -> dict[str, int]:
    """Limits between the lowest network and the whole one."""
    low, whole = allocator.space.floor, allocator.space.reference
    return {n: int(getattr(low, n) + share * (getattr(whole, n) - getattr(low, n))) for n in names}


def gains(allocator: Allocator, i: int, part: str) -> list[float]:
    """Of each size over the next smaller one."""
    whole = allocator.space.levels[i].whole
    sizes = getattr(allocator.space.levels[i], part)
    return [b - a for a, b in pairwise(allocator.loss(i, whole.sized(part, size)) for size in sizes)]


def best_of(allocator: Allocator, limits: Mapping[str, int]) -> float:
    every = product(*allocator.choices)
    return min(allocator.total(choices) for choices in every if allocator.fits(choices, limits))


NAMES = [("macs",), ("params",), ("macs", "params"), ("memory_bytes",), ("file_bytes", "macs")]


@pytest.mark.parametrize("names", NAMES, ids="-".join)
@pytest.mark.parametrize("seed", range(4))
def test_greed_stays_within_limits_and_within_one_purchase_of_the_best(names, seed):
    allocator = convex(seed)
    currency = "macs" if names[0] == "macs" else "params"
    for share in (0.0, 0.3, 0.7, 0.95):
        limits = limits_of(allocator, names, share)
        found = allocator.greedy(limits, currency, one)
        used = cost(allocator.space.spec(found))
        assert all(getattr(used, name) <= limit for name, limit in limits.items())
        assert allocator.fits(found, limits)
        if len(names) == 1 and currency in names:
            dearest = max(step for i in range(2) for part in ("qk", "fc2") for step in gains(allocator, i, part))
            assert allocator.total(found) <= best_of(allocator, limits) + dearest


@pytest.mark.parametrize("names", NAMES, ids="-".join)
@pytest.mark.parametrize("form", ["factored", "refitted"])
def test_filling_leaves_no_unit_that_fits_and_loses_no_more(names, form):
    for seed, share in product(range(4), (0.1, 0.5, 0.9)):
        allocator = convex(seed, blocks=3, form=form)
        limits = limits_of(allocator, names, share)
        start = allocator.lowest(one)
        found = allocator.filled(start, limits, "params", one)
        assert allocator.fits(found, limits)
        assert allocator.total(found) <= allocator.total(start)
        for i, levels in enumerate(allocator.space.levels):
            for part in parts_of(allocator.space, i):
                sizes = getattr(levels, part)
                at = sizes.index(getattr(found[i], part))
                if at:
                    more = [*found[:i], found[i].sized(part, sizes[at - 1]), *found[i + 1 :]]
                    assert not allocator.fits(more, limits)


def test_filling_goes_from_the_highest_rank_to_the_whole():
    """Ranks between the last that is cheaper and the whole are never taken: no factors of that rank are made."""
    spec = vit(blocks=1, width=12, heads=1, head_dim=16, hidden=40)
    assert spec.blocks[0].mlp is not None
    mlp = replace(spec.blocks[0].mlp, fc1_rank=8)
    spec = replace(spec, blocks=(replace(spec.blocks[0], mlp=mlp),))
    offered = {"qk": (16, *range(12, 0, -1)), "fc1": (8, *range(6, 0, -1))}
    levels = (replace(BlockLevels.whole_of(spec.blocks[0]), **offered),)  # type: ignore[arg-type]
    space = Space(given=spec, base=spec, fixed=frozenset(), levels=levels, form="factored", dense={})
    allocator = Allocator(space, lambda i, choice: 1.0 / choice.qk + 1.0 / (choice.fc1 or 99))
    for share in np.linspace(0, 1, 40):
        found = allocator.filled(allocator.lowest(one), limits_of(allocator, ("macs",), share), "macs", one)[0]
        assert found.qk in offered["qk"]
        assert found.fc1 in offered["fc1"]


@pytest.mark.parametrize("names", [*NAMES, RESOURCES], ids="-".join)
def test_the_exact_choice_meets_limits_and_no_greed_beats_it(names):
    allocator = convex(3)
    for share in (0.2, 0.6, 1.0):
        limits = limits_of(allocator, names, share)
        found = allocator.solve(limits)
        assert found is not None
        assert allocator.fits(found, limits)
        best = best_of(allocator, limits)
        if len(names) == 1:
            assert allocator.total(found) == pytest.approx(best)
        assert best <= allocator.total(found) + 1e-12
    whole = allocator.space.whole
    held = allocator.solve(limits_of(allocator, names, 0.6), lambda i, choice: i > 0 or choice == whole[0])
    assert held is not None
    assert held[0] == whole[0]


def test_a_wide_space_is_gone_through_part_by_part():
    """A product over its parts would not fit any memory."""
    spec = vit(blocks=2, width=384, heads=6, head_dim=64, hidden=1536)
    ranks = (None, *range(300, 0, -1))
    wide = {"qk": tuple(range(64, 0, -1)), "v": tuple(range(64, 0, -1)), "fc1": ranks, "fc2": ranks}
    levels = tuple(replace(BlockLevels.whole_of(block), **wide) for block in spec.blocks)  # type: ignore[arg-type]
    space = Space(given=spec, base=spec, fixed=frozenset(), levels=levels, form="factored", dense={})
    allocator = Allocator(
        space, lambda i, choice: 1.0 / (choice.qk + choice.v + (choice.fc1 or 999) + (choice.fc2 or 999))
    )
    limits = limits_of(allocator, ("macs",), 0.5)
    found = allocator.filled(allocator.greedy(limits, "macs", lambda i, part: 8), limits, "macs", lambda i, part: 8)
    assert allocator.fits(found, limits)


def test_filling_takes_the_worthiest_move_and_looks_again_where_it_touched():
    heights, taken = {"a": 0, "b": 0}, []

    def look(place: str) -> Move[str, int] | None:
        return Move((1.0 / (heights[place] + (place == "b") + 1), place), place, heights[place] + 1)  # type: ignore[arg-type]

    def take(move: Move[str, int]) -> bool:
        if move.to > 2:
            return False
        heights[move.place] = move.to
        taken.append(move.place)
        return True

    fill(["a", "b"], look, take)
    assert heights == {"a": 2, "b": 2}
    assert taken == ["a", "b", "a", "b"]


@pytest.mark.parametrize("regain", [True, False])
def test_halves_that_are_gone_come_back_only_where_they_may(regain):
    """With room for everything: an attention, a factored MLP with its ranks, an MLP of one unit, which has no sizes."""
    block = vit().blocks[0]
    mlps = (MlpSpec(hidden=24), MlpSpec(hidden=24, fc1_rank=4, fc2_rank=6), MlpSpec(hidden=1))
    blocks = tuple(replace(block, mlp=mlp) for mlp in mlps)
    spec = replace(vit(blocks=3), blocks=blocks, pool=Pool(kind="mean"))  # which needs no attention
    levels = tuple(
        replace(BlockLevels.whole_of(one), hidden=tuple(range(one.mlp.hidden, 0, -8)), off=True, empty=True)
        for one in blocks
        if one.mlp is not None
    )
    space = Space(given=spec, base=spec, fixed=frozenset(), levels=levels, dense={})
    allocator = Allocator(space, lambda i, choice: -float(sum(size or 0 for size in choice[:4])))
    limits = {"macs": space.reference.macs, "params": space.reference.params}
    filled = allocator.filled(space.lowest, limits, "macs", lambda i, part: 8, regain=regain)
    if regain:
        assert filled == space.whole
    else:
        assert not any(choice.attention for choice in filled)
        assert [choice[3:] for choice in filled] == [(24, None, None), (24, 4, 6), (0, None, None)]
    tight = {"macs": space.floor.macs + 1}
    assert allocator.filled(space.lowest, tight, "macs", lambda i, part: 8, regain=regain) == space.lowest
