"""The paper's golden numbers; what is in reach, from the spec alone."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.methods.dcvit.kit import SPACE, WIDE, config, deit, tuning
from tests.specs import vit
from vitrim.allocation import Allocator
from vitrim.budget import Budget, exceeded
from vitrim.counting import RESOURCES, cost
from vitrim.errors import BudgetError
from vitrim.methods import dcvit
from vitrim.methods.dcvit import DcvitConfig, allocate, floor, narrowed, solve, space_of
from vitrim.methods.dcvit.structure import candidates, chosen_blocks, paper_counts, structure
from vitrim.spec import (
    BlockSpec,
    Merge,
    MlpSpec,
)


@pytest.mark.parametrize(
    ("spec", "total", "attention", "mlp"),
    [
        (deit(192), 1_078_633_728, 29_200_128, 58_097_664),
        (deit(384), 4_248_783_360, 116_497_920, 232_390_656),
        (deit(768), 16_863_630_336, 465_386_496, 929_562_624),
        (deit(768, patch=32), 4_366_946_304, 118_118_400, 235_929_600),
    ],
)
def test_the_authors_counting_is_reproduced(spec, total, attention, mlp):
    assert paper_counts(spec) == (total, attention, mlp)


@pytest.mark.parametrize(
    ("keep", "k", "ratio", "width"),
    [
        (0.917244729, 2, 3.0, 2304),
        (0.834489457, 3, 1.9991, 1535),
        (0.751734186, 4, 1.4987, 1151),
        (0.668978915, 5, 1.1984, 920),
        (0.586223643, 6, 0.9983, 766),
    ],
)
def test_the_structure_of_each_block_equivalent_budget(keep, k, ratio, width):
    found = solve(*paper_counts(deit(768)), 768, keep)
    assert found[0] == k
    assert found[1] == pytest.approx(ratio, abs=1e-4)
    assert found[2] == width


def test_parameters_of_the_readmes_example():
    spec = deit(768)
    assert cost(spec).params == 86_567_656
    space = space_of(spec, DcvitConfig(variant="finetune"))
    gone = space.spec(narrowed(space, dict.fromkeys(range(1, 5), 1151)))
    assert cost(gone).params == 65_301_732
    three = replace(spec, blocks=(*spec.blocks[:9], *(BlockSpec(attention=None, mlp=None),) * 3))
    assert cost(three).params == 65_304_040
    # with the attention products counted, the four narrowed blocks are the cheaper form
    assert cost(gone).macs < cost(three).macs


def test_the_paper_preset_takes_the_paper_structure():
    chosen = tuning(preset="paper")
    found = structure(space_of(deit(768), chosen), chosen, Budget(keep_macs=0.751734186))
    assert found.k == 4
    assert set(found.hidden.values()) == {1151}


def test_the_papers_structure_is_dense_in_the_budget():
    total, attention, mlp = paper_counts(deit(384))
    tokens, width, depth = 197, 384, 12
    last = None
    for gone in np.linspace(attention / total, (depth - 2) * (attention + mlp) / total, 80):
        k, ratio, m = solve(total, attention, mlp, width, 1 - float(gone))
        assert 0 < ratio <= 4 + 1e-9 or m == 0
        achieved = k * (attention + mlp - 2 * tokens * width * m)
        assert -1e-6 * total <= achieved - gone * total < k * 2 * tokens * width + 1e-6 * total
        if last is not None and last[0] == k:
            assert m <= last[1]
        last = k, m
    with pytest.raises(BudgetError, match="one attention"):
        solve(total, attention, mlp, width, 0.999)


def test_a_plan_says_the_range_and_refuses_what_is_outside():
    found = dcvit.plan(WIDE, config())
    assert found["range"]["macs"] == [floor(WIDE).macs, cost(WIDE).macs]
    assert set(found["range"]) == set(found["step"]) == set(RESOURCES)
    assert found["needs"] == {"images": 16, "labels": False, "training": False}
    with pytest.raises(BudgetError, match="dcvit reaches"):
        dcvit.plan(WIDE, config(Budget(keep_macs=0.01)))
    with pytest.raises(BudgetError, match="at least one attention"):
        dcvit.plan(deit(192), tuning(Budget(keep_macs=0.995)))
    with pytest.raises(BudgetError, match="none of 2"):
        dcvit.plan(vit(blocks=2), tuning(Budget(keep_macs=0.8)))
    assert "first and last" in dcvit.plan(WIDE, tuning())["dense"]["block 0"]


def test_the_table_prices_are_those_of_the_built_specs():
    allocator = Allocator(SPACE, lambda i, choice: 0.0)
    for i, (choices, table) in enumerate(zip(allocator.choices, allocator.tables, strict=True)):
        for choice, (macs, params) in zip(choices, table.costs.tolist(), strict=True):
            one = cost(SPACE.spec(SPACE.with_choice(i, choice))).blocks[i]
            assert (one.macs, one.params) == (macs, params)


@settings(max_examples=25)
@given(data=st.data())
def test_two_limits_hold_in_both_forms_from_the_floor_up(data):
    """The allocation of `closed` and the blocks of `finetune`, for uneven networks; out of reach is refused, never missed."""
    widths = data.draw(st.lists(st.sampled_from([16, 24, 64, 128]), min_size=4, max_size=4))
    blocks = tuple(replace(b, mlp=MlpSpec(hidden=m)) for b, m in zip(WIDE.blocks, widths, strict=True))
    merge = Merge(at="end", axis="h", keep=2)
    blocks = (blocks[0], replace(blocks[1], steps=(merge,) if data.draw(st.booleans()) else ()), *blocks[2:])
    spec = replace(WIDE, blocks=blocks)
    reference = cost(spec)
    for variant in ("closed", "finetune"):
        least = floor(spec, DcvitConfig(variant=variant))
        shares = [data.draw(st.sampled_from([0.0, 0.0, 0.1, 0.3, 0.6, 0.95])) for _ in range(2)]
        limits = {
            name: getattr(least, name) + int(share * (getattr(reference, name) - getattr(least, name)))
            for name, share in zip(("macs", "params"), shares, strict=True)
        }
        budget = Budget(max_macs=limits["macs"], max_params=limits["params"])
        chosen = DcvitConfig(variant=variant, budget=budget)
        space = space_of(spec, chosen)
        if variant == "closed":
            losses = [{o: (not o.attention) + 1 - o.hidden / 200 for o in levels.choices()} for levels in space.levels]
            found = cost(space.spec(allocate(space, losses, budget)))
            assert not exceeded(found, limits)
            continue
        try:
            shape = structure(space, chosen, budget)
            order = candidates(space)
            scores = {i: data.draw(st.floats(0, 1)) for i in order}
            ranked = sorted(order, key=lambda i: (scores[i], i))
            if not shape.k:
                continue
            picked, kept = chosen_blocks(space, ranked, shape, limits, scores)
        except BudgetError:
            continue
        found = cost(space.spec(narrowed(space, {i: kept[i] for i in picked})))
        assert not exceeded(found, limits)
        assert kept[picked[0]] == shape.hidden[picked[0]]
