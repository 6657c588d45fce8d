"""Searches: settling meets every budget in reach, the cut equals the final masks, masks stand where their slots say."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.specs import close, images, make, specs, vit
from vitrim.budget import exceeded
from vitrim.counting import cost
from vitrim.errors import BudgetError
from vitrim.freezing import HALVES
from vitrim.model import Gates, Masks
from vitrim.search import (
    Axes,
    MaskedModel,
    Settled,
    every_size,
    hard_masks,
    keeps_of,
    lay_out,
    loss_curves,
    masks_of,
    ramp_mask,
    ranks,
    settle,
    share_slopes,
    soft_masks,
    squared_norms,
    window,
)
from vitrim.space import Choice, Space
from vitrim.spec import ModelSpec, Prefix
from vitrim.surgery import cut

PLAIN = vit(width=16, blocks=3, heads=2, head_dim=16, hidden=32, image=8, classes=4)


def axes_of(spec: ModelSpec, gates: str = "halves", *, tied: bool = False, fixed: int | None = None) -> Axes:
    """Everything is on offer but in one block; gates close blocks, halves or nothing."""
    spec = replace(
        spec,
        blocks=tuple(
            replace(
                block,
                attention=block.attention and replace(block.attention, layer_scale=False),
                mlp=block.mlp and replace(block.mlp, layer_scale=False),
            )
            for block in spec.blocks
        ),
    )
    free = [i for i in range(len(spec.blocks)) if i != fixed]
    halves = {i: [(i, half) for half in HALVES if getattr(spec.blocks[i], half) is not None] for i in free}
    closed = {"halves": [(half,) for i in free for half in halves[i]], "blocks": [tuple(halves[i]) for i in free]}
    follow = {i for i in free if tied and (a := spec.blocks[i].attention) is not None and a.qk_norm == "none"}
    levels = tuple(
        every_size(block, [half for _, half in halves.get(i, [])], tied=i in follow)
        for i, block in enumerate(spec.blocks)
    )
    space = Space(given=spec, base=spec, fixed=frozenset(), levels=levels, dense={})
    return Axes(space=space, gates=tuple(g for g in closed.get(gates, []) if g), tied=frozenset(follow))


def settled(axes: Axes, limits: dict[str, int], seed: int, align: int = 1) -> Settled:
    draw = np.random.default_rng(seed)
    sizes = {(i, part): getattr(axes.space.whole[i], part) for i, part in axes.parts}
    return settle(
        axes,
        limits,
        counts={place: 1 + draw.random() * (size - 1) for place, size in sizes.items()},
        logits=draw.normal(size=len(axes.gates)),
        losses={place: np.concatenate([[0.0], np.cumsum(np.sort(draw.random(n)))]) for place, n in sizes.items()},
        align=align,
    )


@settings(max_examples=60, deadline=None)
@given(spec=specs(), data=st.data())
def test_settling_meets_every_budget_in_reach_and_comes_close_to_it(spec: ModelSpec, data: st.DataObject) -> None:
    gates, tied = data.draw(st.sampled_from(["halves", "blocks", "none"])), data.draw(st.booleans())
    axes = axes_of(spec, gates, tied=tied, fixed=data.draw(st.sampled_from([None, 0])))
    names = data.draw(st.sampled_from([("macs",), ("params",), ("macs", "params"), ("file_bytes",), ("memory_bytes",)]))
    resource = "macs" if "macs" in names else "params"
    lowest, reference, tolerance = axes.floor(resource), axes.space.reference, axes.tolerance(resource)
    share = data.draw(st.floats(0, 1))
    limits = {n: math.floor(getattr(lowest, n) + share * (getattr(reference, n) - getattr(lowest, n))) for n in names}
    found = settled(axes, limits, data.draw(st.integers(0, 1000)), data.draw(st.sampled_from([1, 2, 8])))
    now = cost(axes.space.spec(found.choices))
    assert not exceeded(now, limits)
    assert any(
        limit - getattr(now, name) <= max(getattr(reference, name) / 100, tolerance[name])
        or getattr(now, name) == getattr(reference, name)
        for name, limit in limits.items()
    )
    closed = [not all(getattr(found.choices[i], half) for i, half in halves) for halves in axes.gates]
    assert list(found.choices) == axes.gated(found.sizes, [not is_closed for is_closed in closed])


def test_a_budget_below_the_cheapest_network_is_refused() -> None:
    axes = axes_of(PLAIN)
    with pytest.raises(BudgetError, match="cheapest network is above the budget"):
        settled(axes, {"macs": axes.floor().macs - 1}, seed=0)


def test_one_gate_stays_open_where_nothing_else_computes() -> None:
    axes = axes_of(PLAIN, "blocks")
    found = settle(
        axes,
        {"macs": axes.space.reference.macs},
        counts={(i, part): getattr(axes.space.whole[i], part) for i, part in axes.parts},
        logits=np.array([-3.0, -1.0, -2.0]),
        losses={(i, p): np.arange(getattr(axes.space.whole[i], p) + 1.0) for i, p in axes.parts},
    )
    assert [choice.attention for choice in found.before] == [False, True, False]
    assert found.choices == axes.space.whole  # the budget has room for all of them


@settings(max_examples=30, deadline=None)
@given(spec=specs(), data=st.data())
def test_the_cut_by_the_keeps_equals_the_final_masks(spec: ModelSpec, data: st.DataObject) -> None:
    axes = axes_of(spec, data.draw(st.sampled_from(["halves", "blocks"])), tied=data.draw(st.booleans()))
    base, slots = axes.space.base, lay_out(axes)
    model = make(base)
    scores = squared_norms(model, slots)
    limit = math.floor(0.5 * (axes.floor().macs + axes.space.reference.macs))
    found = settled(axes, {"macs": limit}, data.draw(st.integers(0, 1000)))
    final = hard_masks(slots, scores, found.sizes)
    scales = [None if getattr(found.choices[i], half) else torch.tensor(0.0) for ((i, half), *_) in axes.gates]
    masks = masks_of(base, slots, torch.tensor(final), axes.gates, scales)
    small = cut(model, keeps_of(base, slots, final, found.choices), method="test")
    assert small.spec == axes.space.spec(found.choices)
    assert close(small(images(base)), MaskedModel(model, masks)(images(base)))


def test_a_masked_model_asks_for_what_it_is_asked_for() -> None:
    model, x = make(PLAIN), images(PLAIN)
    masks = Masks(block=(torch.tensor(0.5, dtype=torch.float64), None, None))
    found = MaskedModel(model, masks, Gates(policy="open"))(x, want=["logits", "block:0"])
    assert set(found) == {"logits", "block:0"}
    assert torch.equal(found["logits"], model(x, masks=masks))
    assert torch.equal(MaskedModel(model)(x), model(x))


def test_slots_lie_one_behind_the_other_and_tied_queries_follow_their_values() -> None:
    slots = lay_out(axes_of(PLAIN, tied=True, fixed=1))
    assert [(slot.block, slot.part) for slot in slots[:4]] == [(0, "heads"), (0, "v"), (0, "qk"), (0, "hidden")]
    assert {slot.block for slot in slots} == {0, 2}
    assert [slot.start for slot in slots[1:]] == [slot.stop for slot in slots[:-1]]
    assert slots[1].shape == slots[2].shape == (2, 16)


def test_a_gate_of_a_whole_block_with_steps_inside_scales_its_halves() -> None:
    spec = replace(PLAIN, blocks=(*PLAIN.blocks[:-1], replace(PLAIN.blocks[-1], steps=(Prefix(),))))
    axes, half = axes_of(spec, "blocks"), torch.tensor(0.5)
    masks = masks_of(spec, lay_out(axes), None, axes.gates, [half, None, half])
    assert masks.block is not None
    assert masks.attention is not None
    assert [row is not None for row in masks.block] == [True, False, False]
    assert [row is not None for row in masks.attention] == [False, False, True]
    assert masks.hidden is None


def test_rows_may_lose_unequal_numbers_of_units_and_are_priced_each() -> None:
    scores, removed = np.array([[3.0, 1.0, 2.0, 4.0], [1.0, 2.0, 3.0, 4.0]]), np.array([[1.0], [3.0]])
    assert ranks(scores).tolist() == [[2, 0, 1, 3], [0, 1, 2, 3]]
    assert soft_masks(scores, removed).tolist() == [[1, 0, 1, 1], [0, 0, 0, 1]]
    assert soft_masks(scores[0], np.array([2.0])).tolist() == [1, 0, 0, 1]
    slopes = share_slopes(scores, removed, -np.ones(8))
    assert slopes == pytest.approx([4.0, 4.0])  # each unit lowers the loss by 1, and a row has four


def test_losing_all_units_of_any_part_costs_one_and_tied_parts_are_lost_together() -> None:
    draw = np.random.default_rng(0)
    scores = {(0, "v"): draw.random((2, 4)), (0, "qk"): draw.random((2, 4)), (0, "hidden"): draw.random(9)}
    curves = loss_curves(scores, {0})
    assert set(curves) == {(0, "v"), (0, "hidden")}
    assert curves[(0, "hidden")][[0, -1]] == pytest.approx([0, 1])
    assert curves[(0, "v")][[0, -1]] == pytest.approx([0, 2])
    assert all((np.diff(curve, 2) >= -1e-12).all() for curve in curves.values())  # the weakest go first


def test_levels_are_aligned_where_two_of_them_fit() -> None:
    axes = axes_of(PLAIN)
    assert axes.levels((0, "hidden"), 8) == [8, 16, 24, 32]
    assert axes.levels((0, "v"), 16) == list(range(1, 17))
    assert axes.levels((0, "heads"), 8) == [1, 2]
    assert axes.at(Choice.of(PLAIN.blocks[0]), (0, "v"), 4).qk == 16
    assert axes_of(PLAIN, tied=True).at(Choice.of(PLAIN.blocks[0]), (0, "v"), 4).qk == 4


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 40), share=st.floats(0, 1), width=st.floats(1, 12))
def test_soft_masks_sum_to_what_stays_and_the_window_to_one(size: int, share: float, width: float) -> None:
    removed = share * (size - 1)
    masks, prices = ramp_mask(np.arange(size), removed, size, width), window(removed, size, width)
    assert ((masks >= 0) & (masks <= 1)).all()
    assert (np.diff(masks) >= 0).all()
    assert masks.sum() == pytest.approx(size - removed, abs=0.51)
    assert prices.sum() == pytest.approx(1)
    assert (prices >= 0).all()


def test_whole_counts_make_hard_masks_and_nothing_removed_none() -> None:
    assert ramp_mask(np.arange(5), 2.0, 5, 1.0).tolist() == [0, 0, 1, 1, 1]
    assert ramp_mask(np.arange(50), 0.0, 50, 9.0).tolist() == [1.0] * 50
