"""UVC: the sheet's invariants, the budget, exact cuts, resumption, and every kind of network."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.specs import close, images, make, specs, vit
from tests.training_kit import pictures, tiny, weights
from vitrim.architectures import spec as architecture
from vitrim.budget import Budget
from vitrim.counting import cost
from vitrim.data import Augment
from vitrim.errors import BudgetError, ConfigError, DataError, TrainingError, VitrimError
from vitrim.methods import configure
from vitrim.methods.uvc import run as uvc
from vitrim.methods.uvc.run import (
    Controller,
    Search,
    Shape,
    UvcConfig,
    Width,
    compress,
    finalise,
    floor,
    plan,
    space_of,
    step,
)
from vitrim.model import Vit
from vitrim.spec import ModelSpec, Output, Prefix, spec_hash
from vitrim.surgery import Keep, cut, masked_twin
from vitrim.training import Batch, Step
from vitrim.training.objectives import Distilled, Supervised

HALF = Budget(keep_macs=0.5)
WIDE = vit(width=16, blocks=3, heads=2, head_dim=16, hidden=32, image=8, classes=4)
QUICK: dict[str, Any] = {
    "steps": 8,
    "batch_size": 8,
    "device": "cpu",
    "augment": Augment(crop="none", flip=0.0),
    "log_every": 1,
    "lr": 1e-3,
}

CLOCKED = ("seconds", "images_per_s")
"""What a report says of the clock."""


def quick(budget: Budget = HALF, **changes: Any) -> UvcConfig:
    return UvcConfig(budget=budget, **{**QUICK, **changes})


def searching(spec: ModelSpec = WIDE, **changes: Any) -> tuple[Search, Vit]:
    """A search that has met its model, but not the loop."""
    config = quick(**changes)
    model = tiny(spec)
    space = space_of(spec, config)
    found = Search(space, Supervised(), config, config.bounds.limits(space.reference))
    found.param_groups(model)
    return found, model


def at(index: int, total: int = 100) -> Step:
    return Step(index=index, total=total, epoch=0)


# ------------------------------------------------------------------------------------------------------ 1, 2, 3: the cost


@settings(max_examples=40, deadline=None)
@given(spec=specs(), data=st.data())
def test_expected_cost_is_the_count_of_the_network_that_whole_decisions_make(
    spec: ModelSpec, data: st.DataObject
) -> None:
    """The sheet's 1: one function for the search and for the materialised network, in MACs and in parameters."""
    tie, halves = data.draw(st.booleans()), data.draw(st.sampled_from(["block", "halves", "none"]))
    space = space_of(spec, quick(tie_qk=tie, gates=halves))
    shapes, removed = space.dense(), np.zeros(len(space.widths))
    for w, width in enumerate(space.widths):
        count = data.draw(st.integers(1, width.size))
        shapes[width.block] = space.at(shapes[width.block], width.block, width.part, count)
        removed[w] = 1 - count / width.size
        a = space.spec.blocks[width.block].attention
        if width.part == "v" and a is not None and space.tied(a) and a.qk_dim != a.v_dim:
            return  # widths that differ are rounded when they are cut
    is_open = [data.draw(st.booleans()) for _ in space.gates]
    shapes = space.with_gates(shapes, is_open)
    found = cost(space.spec_with(shapes))
    values, _, _ = space.shares(removed, np.where(is_open, 60.0, -60.0))
    assert values == pytest.approx([found.macs / cost(spec).macs, found.params / cost(spec).params], rel=1e-9)
    assert space.total(shapes) == {"macs": found.macs, "params": found.params}


@settings(max_examples=25, deadline=None)
@given(spec=specs(), data=st.data())
def test_late_in_the_search_the_cost_is_that_of_levels_that_the_finaliser_may_choose(
    spec: ModelSpec, data: st.DataObject
) -> None:
    space = space_of(spec, quick(align=data.draw(st.sampled_from([1, 2, 8]))))
    removed = np.array([data.draw(st.floats(0, 1)) * w.top for w in space.widths])
    shapes = space.dense()
    for w, width in enumerate(space.widths):
        levels = space.levels(width.block, width.part, space.align)
        count = min(levels, key=lambda level: (abs(level - width.size * (1 - removed[w])), level))
        shapes[width.block] = space.at(shapes[width.block], width.block, width.part, count)
    values, slopes, _ = space.shares(removed, np.full(len(space.gates), 60.0), counts="levels")
    assert values[0] == pytest.approx(cost(space.spec_with(shapes)).macs / cost(spec).macs, rel=1e-9)
    assert (slopes <= 1e-12).all()


def test_nothing_removed_and_all_gates_open_costs_one() -> None:
    space = space_of(WIDE, quick())
    values, _, _ = space.shares(np.zeros(len(space.widths)), np.full(len(space.gates), 60.0))
    assert values == pytest.approx([1, 1], abs=1e-12)


@pytest.mark.parametrize(
    ("name", "total", "block", "stem"),
    [
        ("deit_tiny_patch16_224", 1_253_683_200, 8.1412, 2.3057),
        ("deit_small_patch16_224", 4_598_882_304, 8.2286, 1.2570),
        ("deit_base_patch16_224", 17_563_828_224, 8.2785, 0.6582),
    ],
)
def test_reference_totals_and_block_shares(name: str, total: int, block: float, stem: float) -> None:
    """The sheet's 2; its shares leave the classifier out."""
    found = cost(architecture(name))
    without_head = found.macs - found.head_macs
    assert found.macs == total
    assert 100 * found.blocks[0].macs / without_head == pytest.approx(block, abs=6e-5)
    assert 100 * found.stem_macs / without_head == pytest.approx(stem, abs=6e-5)


@settings(max_examples=25, deadline=None)
@given(spec=specs(), data=st.data())
def test_cost_falls_with_every_count_and_rises_with_every_gate(spec: ModelSpec, data: st.DataObject) -> None:
    space = space_of(
        spec, quick(gates=data.draw(st.sampled_from(["block", "halves"])), tie_qk=data.draw(st.booleans()))
    )
    share = st.floats(0, 1)
    removed = np.array([data.draw(share) * w.top for w in space.widths])
    logits = np.array([data.draw(st.floats(-4, 4)) for _ in space.gates])
    _, widths, gates = space.shares(removed, logits)
    assert (widths <= 1e-12).all()
    assert (gates >= -1e-12).all()


def test_one_of_several_counts_of_heads_saves_nothing_until_the_widest_head_is_narrower() -> None:
    """Counts by head are padded to the largest, and the cost says so."""
    space = space_of(WIDE, quick(count_per_head=True, gates="none"))
    one, both = np.zeros(len(space.widths)), np.zeros(len(space.widths))
    dims = space.index[(0, "v")]
    assert len(dims) == 2
    one[dims[0]] = both[dims] = 0.5
    nothing = np.zeros(0)
    assert space.shares(one, nothing)[0][0] == pytest.approx(1)
    assert space.shares(both, nothing)[0][0] < 1


# ------------------------------------------------------------------------------------- 4, 5, 6, 7, 8: primal, dual, prox


def test_bottom_norm_is_the_sum_of_the_smallest_and_its_slope_the_next() -> None:
    energies = np.array([1.0, 2.0, 4.0, 8.0])
    assert uvc.bottom(energies, 0.0) == (0.0, 1.0)
    assert uvc.bottom(energies, 1.2) == (3.0, 4.0)
    assert uvc.bottom(energies, 3.0) == (7.0, 8.0)
    assert uvc.bottom(energies, 4.0) == (15.0, 8.0)  # none left: the largest


def test_prox_is_the_numerical_minimiser_and_never_grows_a_group() -> None:
    group = torch.randn(7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for strength in (0.0, 0.3, 5.0):
        found = group.clone().requires_grad_()
        solver = torch.optim.SGD([found], lr=1 / (1 + 2 * strength) / 2)
        for _ in range(80):
            solver.zero_grad()
            ((found - group).square().sum() / 2 + strength * found.square().sum()).backward()
            solver.step()
        assert close(uvc.prox(group, strength), found, 1e-6)
        assert uvc.prox(group, strength).norm() <= group.norm()


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 40), share=st.floats(0, 1), width=st.floats(1, 12))
def test_soft_masks_sum_to_what_stays_and_the_window_to_one(size: int, share: float, width: float) -> None:
    removed = share * (size - 1)
    masks, prices = uvc.ramp_mask(np.arange(size), removed, size, width), uvc.window(removed, size, width)
    assert ((masks >= 0) & (masks <= 1)).all()
    assert (np.diff(masks) >= 0).all()
    assert masks.sum() == pytest.approx(size - removed, abs=0.51)
    assert prices.sum() == pytest.approx(1)
    assert (prices >= 0).all()


def test_whole_counts_make_hard_masks_and_nothing_removed_none() -> None:
    assert uvc.ramp_mask(np.arange(5), 2.0, 5, 1.0).tolist() == [0, 0, 1, 1, 1]
    assert uvc.ramp_mask(np.arange(50), 0.0, 50, 9.0).tolist() == [1.0] * 50


def toy(gates: int, widths: int, budget: float, preset: str = "clean") -> tuple[Controller, Any]:
    """A network of equal blocks: a tenth is fixed, the rest is shared by blocks whose widths save half of it."""
    decisions = [Width(i, "hidden", 64) for i in range(widths)]
    controller = Controller(decisions, gates, (budget, math.inf), uvc.PRESETS[preset])

    def shares(removed: np.ndarray, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        keep = 1 / (1 + np.exp(-logits))
        each = 0.9 / max(gates, widths)
        kept = 1 - 0.5 * removed if widths else np.ones(gates)
        open_ = keep if gates else np.ones(widths)
        value = 0.1 + each * float((kept * open_).sum())
        slope_w = -0.5 * each * open_ if widths else np.zeros(0)
        slope_g = each * kept * keep * (1 - keep) if gates else np.zeros(0)
        return np.array([value, 1.0]), np.stack([slope_w, 0 * slope_w]), np.stack([slope_g, 0 * slope_g])

    return controller, shares


def play(
    budget: float, *, gates: int, widths: int, steps: int, preset: str = "clean", noise: float = 0.0
) -> tuple[Controller, list[dict[str, Any]]]:
    """The controller alone against losses that rise with what is removed, each block with its own weight."""
    controller, shares = toy(gates, widths, budget, preset)
    random = np.random.default_rng(0)
    weight_g, weight_w = 0.05 + 0.02 * np.arange(gates), 0.1 + 0.05 * np.arange(widths)
    lines = []
    for index in range(steps):
        keep = 1 / (1 + np.exp(-controller.effective(index / steps)))
        slope_g = -weight_g * keep * (1 - keep) * (1 + noise * random.standard_normal(gates))
        slope_w = weight_w * controller.removed * (1 + noise * random.standard_normal(widths))
        before = controller.z.copy()
        energies = [np.full(64, 1 / 64)] * widths
        controller.advance(index / steps, steps, slope_w, slope_g, energies, shares)
        lines.append(
            {"cost": controller.cost[0], "goal": controller.goal[0], "before": before[0], "z": controller.z[0]}
        )
        assert (controller.y >= 0).all()
        assert (controller.z >= 0).all()
        assert (controller.removed >= 0).all()
        assert (controller.removed <= controller.tops).all()
    return controller, lines


@pytest.mark.parametrize("preset", ["clean", "paper"])
def test_duals_stay_positive_and_the_budget_dual_rises_just_where_the_cost_is_above(preset: str) -> None:
    _, lines = play(0.5, gates=4, widths=4, steps=120, preset=preset)
    top = uvc.PRESETS[preset].z_max
    for line in lines:
        if line["cost"] > line["goal"] and line["before"] < top:
            assert line["z"] > line["before"]
        if line["cost"] <= line["goal"]:
            assert line["z"] <= line["before"]
    assert max(line["z"] for line in lines) <= top


@pytest.mark.parametrize("noise", [0.0, 0.5])
@pytest.mark.parametrize("budget", [0.3, 0.5, 0.7, 0.9])
def test_the_controller_settles_on_the_budget_with_gates_alone(budget: float, noise: float) -> None:
    """The sheet's 18: no collapse, and the end within one block."""
    controller, lines = play(budget, gates=12, widths=0, steps=600, noise=noise)
    assert min(line["cost"] for line in lines) > 0.5 * budget
    hard = 0.1 + 0.9 * float((controller.logits > 0).mean())
    assert abs(hard - budget) <= 0.9 / 12 + 1e-9


@pytest.mark.parametrize("steps", [150, 600, 3000])
@pytest.mark.parametrize("budget", [0.3, 0.6, 0.9])
def test_the_controller_settles_in_short_and_long_runs_alike(budget: float, steps: int) -> None:
    _, lines = play(budget, gates=6, widths=6, steps=steps, noise=0.3)
    assert abs(lines[-1]["cost"] - budget) < 0.03
    assert min(line["cost"] for line in lines) > 0.5 * budget


def test_a_width_can_cross_its_range_in_a_third_of_the_search() -> None:
    controller, shares = toy(0, 4, 0.3)
    controller.z[:] = 20.0
    for index in range(34):
        controller.advance(index / 100, 100, np.zeros(4), np.zeros(0), [np.full(64, 1 / 64)] * 4, shares)
    assert controller.removed.min() > 0.9


@pytest.mark.parametrize("preset", ["clean", "paper"])
def test_a_count_at_its_bound_comes_down_when_the_gradient_asks(preset: str) -> None:
    """The sheet's 8: no latch, at either end."""
    controller, shares = toy(0, 2, 0.9, preset)
    controller.removed[:] = controller.tops
    controller.y[:] = 1.0
    controller.z[:] = 0.0
    for index in range(5):
        controller.advance(0.5 + index / 100, 100, np.full(2, 5.0), np.zeros(0), [np.full(64, 1 / 64)] * 2, shares)
    assert (controller.removed < controller.tops).all()


# ---------------------------------------------------------------------------------------------- 12, 13, 14, 17: the search


def test_gates_keep_their_block_with_the_papers_probability_at_the_start() -> None:
    """The sheet's 17: 0.881 of 4,000 draws within 0.02, which is four standard deviations."""
    search, _ = searching(gates="block", warmup=0.0)
    torch.manual_seed(0)
    search._refresh(at(0))
    rows = search.soft(at(0), 4000).block
    assert rows is not None
    assert rows[0] is not None
    assert float((rows[0] > 0.5).double().mean()) == pytest.approx(1 / (1 + math.exp(-2)), abs=0.02)


def test_warm_up_leaves_every_decision_untouched_and_the_network_whole() -> None:
    """The sheet's 13."""
    search, model = searching(warmup=0.5)
    x = torch.randn(4, 3, 8, 8)
    before = search.controller.state()
    for index in range(4):
        where = at(index, 10)
        search.leaf.grad = None
        search.loss(model, Batch(images=x, labels=torch.zeros(4, dtype=torch.int64)), where).backward()
        assert torch.equal(model(x, masks=search.soft(where, 4)), model(x))
        search.after_backward(where)
        search.after_step(where)
    after = search.controller.state()
    assert all(torch.equal(torch.as_tensor(before[k]), torch.as_tensor(after[k])) for k in before)


def test_the_leaf_never_meets_clipping_or_the_optimiser() -> None:
    search, model = searching()
    batch = Batch(images=torch.randn(4, 3, 8, 8), labels=torch.zeros(4, dtype=torch.int64))
    search.loss(model, batch, at(50)).backward()
    assert search.leaf.grad is not None
    search.after_backward(at(50))
    assert search.leaf.grad is None
    assert np.abs(search.slopes).sum() > 0


def test_counts_move_without_gates_in_the_published_form() -> None:
    """No soft tensor is in its forward pass then, so the leaf has no gradient: the counts go on all the same."""
    search, model = searching(preset="paper", gates="none", warmup=0.0)
    batch = Batch(images=torch.randn(4, 3, 8, 8), labels=torch.zeros(4, dtype=torch.int64))
    for index in range(3):
        search.loss(model, batch, at(index)).backward()
        search.after_backward(at(index))
        search.after_step(at(index))
    assert (search.controller.removed > 0).any()


def test_a_step_that_overflowed_moves_no_decision() -> None:
    search, _ = searching(warmup=0.0)
    search.leaf.grad = torch.full_like(search.leaf, math.inf)
    search.after_backward(at(3))
    before = search.controller.state()
    search.after_step(at(3))
    assert all(
        torch.equal(torch.as_tensor(v), torch.as_tensor(search.controller.state()[k])) for k, v in before.items()
    )


def test_removed_groups_shrink_at_both_levels_and_others_stay() -> None:
    search, model = searching(preset="paper", count_per_head=False)
    columns = model.blocks[0].attention.out.weight.detach().clone()
    search.controller.removed[search.space.index[(0, "heads")]] = 0.5
    search.controller.removed[search.space.index[(0, "v")]] = 0.25
    search.controller.y[:] = 1e3
    search._shrink(at(50))
    share = (model.blocks[0].attention.out.weight / columns).mean(0).view(2, 16).detach()
    gone, kept = sorted(np.sort(share.numpy(), axis=1).tolist(), key=sum)
    assert max(gone) < 1
    assert gone[0] == pytest.approx(gone[-1] ** 2, rel=1e-3)
    assert len([s for s in kept if s < 0.999]) == 4
    assert kept[-1] == pytest.approx(1)


def test_settled_masks_are_hard_and_take_no_gradient() -> None:
    """The sheet's 14: after the decision, positions that went stay zero, and gates are left alone."""
    search, model = searching()
    search.controller.removed[:] = 0.5
    search.controller.logits[0] = -3
    search._settle()
    search._refresh(at(99))
    soft = search.soft(at(99), 4)
    x, y = torch.randn(4, 3, 8, 8), torch.zeros(4, dtype=torch.int64)
    search.loss(model, Batch(images=x, labels=y), at(99)).backward()
    assert search.leaf.grad is None
    assert soft.hidden is not None
    assert all(set(row.tolist()) <= {0.0, 1.0} for row in soft.hidden if row is not None)
    twice = [model(x, masks=search.soft(at(99), 4)) for _ in range(2)]
    assert torch.equal(*twice)


def test_distillation_from_an_equal_teacher_is_zero_for_any_batch_and_leaves_the_teacher_alone() -> None:
    """The sheet's 15."""
    model = tiny(WIDE)
    objective = Distilled(model, alpha=1.0, tau=2.0)
    objective.param_groups(model)
    other = tiny(WIDE, seed=3)
    x = torch.randn(8, 3, 8, 8)
    assert abs(float(objective.loss(model, Batch(images=x, labels=None), at(0)).detach())) < 1e-6
    whole = float(objective.loss(other, Batch(images=x, labels=None), at(0)).detach())
    parts = [
        float(objective.loss(other, Batch(images=x[i : i + 2], labels=None), at(0)).detach()) for i in (0, 2, 4, 6)
    ]
    assert whole == pytest.approx(sum(parts) / 4, rel=1e-4)
    objective.loss(other, Batch(images=x, labels=None), at(0)).backward()
    assert all(p.grad is None for p in model.parameters())


def test_units_go_by_their_consumers_norm_and_are_priced_by_their_masks() -> None:
    search, model = searching(gates="none")
    slot = next(s for s in search.slots if s.part == "hidden")
    with torch.no_grad():
        model.blocks[slot.block].mlp.fc2.weight.copy_(torch.arange(1.0, 33.0).expand(16, 32))
    search.norms = search._measure()
    gradients = np.zeros(len(search.leaf))
    gradients[slot.start : slot.stop] = -np.arange(1.0, 33.0)  # every unit lowers the loss, later ones more
    assert np.argsort(search.scores(slot)).tolist() == list(range(32))
    w = search.space.index[(slot.block, "hidden")][0]
    low = search._count_slopes(gradients)[w]
    search.controller.removed[w] = 0.75
    high = search._count_slopes(gradients)[w]
    assert 0 < low < high
    assert high == pytest.approx(32 * 24.5, rel=0.05)


def test_the_slope_of_a_count_is_the_numerical_one() -> None:
    """The price in the controller is the derivative of the loss along the soft masks, where the ramp's ends lie on ranks."""
    search, model = searching(gates="none", warmup=0.0, distill=False)
    model.double()
    search.leaf = search.leaf.detach().double().requires_grad_()
    batch = Batch(images=torch.randn(8, 3, 8, 8, dtype=torch.float64), labels=torch.arange(8) % 4)
    search.controller.removed[:] = 12 / 32
    w = search.space.index[(1, "hidden")][0]

    def value(shift: float) -> float:
        search.controller.removed[w] = 12 / 32 + shift
        return float(search.loss(model, batch, at(5)).detach())

    search.loss(model, batch, at(5)).backward()
    search.after_backward(at(5))
    found = search._count_slopes(search.slopes)[w]
    assert found == pytest.approx((value(1e-5) - value(-1e-5)) / 2e-5, rel=1e-5)


# --------------------------------------------------------------------------------------- 7, 11: the finaliser, the budget


def losses_for(space: uvc.Space, seed: int = 0) -> dict[tuple[int, str], np.ndarray]:
    random = np.random.default_rng(seed)
    sizes = {(w.block, w.part): w.size for w in space.widths}
    return {key: np.concatenate([[0.0], np.cumsum(np.sort(random.random(n)))]) for key, n in sizes.items()}


@settings(max_examples=60, deadline=None)
@given(spec=specs(), data=st.data())
def test_the_finaliser_meets_every_reachable_budget_from_wherever_the_search_ended(
    spec: ModelSpec, data: st.DataObject
) -> None:
    """Law 7, and the sheet's 7 and 11, for any network, any limits in reach and any state of the search."""
    gates = data.draw(st.sampled_from(["block", "halves", "none"]))
    widths = gates == "none" or data.draw(st.booleans())
    names = data.draw(st.sampled_from([("macs",), ("params",), ("macs", "params"), ("file_bytes",), ("memory_bytes",)]))
    config = quick(
        gates=gates, widths=widths, tie_qk=data.draw(st.booleans()), align=data.draw(st.sampled_from([1, 2, 8]))
    )
    reference = cost(spec)
    probe = {"macs": Budget(max_macs=10**9), "params": Budget(max_params=10**9)}
    config = replace(config, budget=probe["macs" if "macs" in names else "params"])
    lowest = floor(spec, config)
    share = data.draw(st.floats(0, 1))
    limits = {n: math.floor(getattr(lowest, n) + share * (getattr(reference, n) - getattr(lowest, n))) for n in names}
    space = space_of(spec, config)
    removed = np.array([data.draw(st.floats(0, 1)) * w.top for w in space.widths])
    logits = np.array([data.draw(st.floats(-4, 4)) for _ in space.gates])
    layout = finalise(space, limits, removed, logits, losses_for(space))
    found = cost(space.spec_with(layout.shapes))
    assert all(getattr(found, name) <= limit for name, limit in limits.items())
    tolerance = step(spec, config)
    slack = [
        limit - getattr(found, n) <= max(getattr(reference, n) / 100, tolerance[n])
        or getattr(found, n) >= getattr(cost(space.spec), n)
        for n, limit in limits.items()
    ]
    assert any(slack)
    for shape, block in zip(layout.shapes, spec.blocks, strict=True):
        assert min(shape.heads, shape.qk, shape.v, shape.hidden) >= 1
        assert block.attention is None or shape.heads <= block.attention.heads


def test_dims_and_units_are_multiples_of_eight_where_the_budget_can_be_met_so() -> None:
    spec = vit(width=32, blocks=4, heads=4, head_dim=32, hidden=128)
    space = space_of(spec, quick())
    layout = finalise(
        space,
        {"macs": cost(spec).macs // 2},
        np.full(len(space.widths), 0.37),
        np.full(len(space.gates), 3.0),
        losses_for(space),
    )
    assert all(shape.v % 8 == 0 and shape.hidden % 8 == 0 for shape in layout.shapes)
    space = space_of(spec, quick(align=1))
    free = finalise(
        space,
        {"macs": cost(spec).macs // 2},
        np.full(len(space.widths), 0.37),
        np.full(len(space.gates), 3.0),
        losses_for(space),
    )
    assert any(shape.v % 8 or shape.hidden % 8 for shape in free.shapes)


def test_what_the_search_decided_stands_where_it_meets_the_budget() -> None:
    """The finaliser moves nothing that needs no moving."""
    spec = vit(width=32, blocks=4, heads=4, head_dim=32, hidden=128)
    space = space_of(spec, quick())
    shapes = [Shape(attention=True, mlp=True, heads=3, qk=32, v=24, hidden=64 + 8 * i) for i in range(4)]
    wanted = space.with_gates(shapes, [True, False, True, True])
    removed = np.zeros(len(space.widths))
    for w, width in enumerate(space.widths):
        removed[w] = 1 - getattr(shapes[width.block], width.part) / width.size
    limits = {"macs": cost(space.spec_with(wanted)).macs}
    layout = finalise(space, limits, removed, np.array([2.0, -2.0, 2.0, 2.0]), losses_for(space))
    assert layout.shapes == layout.before == wanted


@pytest.mark.parametrize("gates", ["block", "halves", "none"])
def test_budgets_out_of_reach_are_refused_before_anything_is_read(gates: str) -> None:
    with pytest.raises(BudgetError, match=r"out of reach.*uvc reaches"):
        compress(tiny(WIDE), quick(Budget(keep_macs=0.005), gates=gates), data="nowhere")
    with pytest.raises(BudgetError, match="out of reach"):
        plan(WIDE, quick(Budget(keep_macs=0.005), gates=gates))
    lowest = floor(WIDE, quick(gates=gates))
    assert any(b.attention_macs + b.mlp_macs for b in lowest.blocks)  # some block always stays
    assert plan(WIDE, quick(Budget(max_macs=lowest.macs), gates=gates))["range"]["macs"][0] == lowest.macs


def test_freezing_raises_the_floor_and_holds_weights_and_shape() -> None:
    config = quick(Budget(keep_macs=0.7), freeze=("blocks.0", "blocks.1.attention"))
    assert floor(WIDE, config).macs > floor(WIDE, quick()).macs
    model = tiny(WIDE)
    found = compress(model, config, data=pictures())
    assert found.spec.blocks[0] == WIDE.blocks[0]
    assert found.spec.blocks[1].attention == WIDE.blocks[1].attention
    now, then = found.model.state_dict(), model.state_dict()
    same = [n for n in then if n.startswith(("blocks.0.", "blocks.1.attention", "blocks.1.norm1"))]
    assert same
    assert all(torch.equal(now[n], then[n]) for n in same)
    scaled = compress(tiny(kinds()["layer scale"]), config, data=pictures())
    assert scaled.spec.blocks[0] == kinds()["layer scale"].blocks[0]


# ----------------------------------------------------------------------------------------------- 9, 10, 19: exact networks


@pytest.mark.parametrize(
    "options", [{}, {"tie_qk": True}, {"gates": "halves"}, {"count_per_head": True}, {"gates": "none"}]
)
def test_the_cut_network_is_the_masked_one_of_the_settled_search(options: dict[str, Any]) -> None:
    """Law 3 and the sheet's 9: soft masks of the last phase, the masked twin and the cut give the same logits."""
    search, model = searching(**options)
    model.double()
    random = np.random.default_rng(1)
    search.norms = {key: random.random(value.shape) for key, value in search.norms.items()}
    search.controller.removed = 0.7 * random.random(len(search.space.widths))
    if len(search.space.gates):
        search.controller.logits[-1] = -3.0
    search._settle()
    search._refresh(at(99))
    search.leaf = search.leaf.detach().double().requires_grad_()
    search._refresh(at(99))
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    masked = model(x, masks=search.soft(at(99), 4))
    small = cut(model, search.keeps(), method="uvc")
    assert search.layout is not None
    assert small.spec == search.space.spec_with(search.layout.shapes)
    assert close(small(x), masked)
    assert close(model(x, masks=masked_twin(model, search.keeps())), masked)
    assert small.spec.width == WIDE.width
    for name in ("position", "prefix", "norm.weight", "stem.proj.weight"):
        assert torch.equal(small.state_dict()[name], model.state_dict()[name])


def test_both_linears_of_an_mlp_lose_the_same_units_after_any_changes_of_count() -> None:
    """The sheet's 19."""
    search, model = searching()
    random = np.random.default_rng(2)
    for _ in range(5):
        search.norms = {key: random.random(value.shape) for key, value in search.norms.items()}
        search.controller.removed = 0.8 * random.random(len(search.space.widths))
        search._refresh(at(50))
    search._settle()
    small = cut(model, search.keeps(), method="uvc")
    for i, keep in enumerate(search.keeps()):
        if keep is None or keep.hidden is None or small.spec.blocks[i].mlp is None:
            continue
        units = list(keep.hidden)
        assert torch.equal(small.blocks[i].mlp.fc1.weight, model.blocks[i].mlp.fc1.weight[units])
        assert torch.equal(small.blocks[i].mlp.fc1.bias, model.blocks[i].mlp.fc1.bias[units])
        assert torch.equal(small.blocks[i].mlp.fc2.weight, model.blocks[i].mlp.fc2.weight[:, units])


def kinds() -> dict[str, ModelSpec]:
    block = WIDE.blocks[0]
    a, m = block.attention, block.mlp
    assert a is not None
    assert m is not None
    tail = replace(WIDE, blocks=(*WIDE.blocks[:-1], replace(WIDE.blocks[-1], steps=(Prefix(),))))
    uneven = (
        replace(block, attention=replace(a, heads=1, v_dim=8), mlp=replace(m, hidden=20)),
        replace(block, attention=None, mlp=replace(m, fc1_rank=6, fc2_rank=5)),
        replace(block, attention=replace(a, qk_dim=5), mlp=None),
        block,
    )
    two = (Output(classes=4), Output(name="dist", classes=4, reads=("dist",)))
    return {
        "plain": WIDE,
        "exact tail": tail,
        "already cut": replace(WIDE, blocks=uneven),
        "distilled heads": replace(WIDE, prefix=("cls", "dist"), outputs=two),
        "registers": replace(WIDE, prefix=("cls", "reg", "reg")),
        "swiglu": replace(WIDE, blocks=(replace(block, mlp=replace(m, kind="swiglu")),) * 3),
        "query norms": replace(WIDE, blocks=(replace(block, attention=replace(a, qk_norm="rms")),) * 3),
        "layer scale": replace(
            WIDE, blocks=(replace(block, attention=replace(a, layer_scale=True), mlp=replace(m, layer_scale=True)),) * 3
        ),
        "encoder": replace(WIDE, outputs=()),
    }


@pytest.mark.parametrize("name", list(kinds()))
def test_every_kind_of_network_comes_within_its_budget(name: str) -> None:
    spec = kinds()[name]
    model = tiny(spec)
    before = weights(model)
    for options in ({"tie_qk": True}, {"gates": "halves"}):
        found = compress(model, quick(Budget(keep_macs=0.6, keep_params=0.9), **options), data=pictures())
        now, then = cost(found.spec), cost(spec)
        assert now.macs <= 0.6 * then.macs
        assert now.params <= 0.9 * then.params
        assert now.macs >= 0.6 * then.macs - max(0.01 * then.macs, step(spec, quick(**options))["macs"]) or (
            now.params >= 0.88 * then.params
        )
        assert found.model(torch.randn(2, 3, 8, 8)).isfinite().all()
        assert found.selection.steps[-1].parent == spec_hash(spec)
    assert torch.equal(weights(model), before)


@settings(max_examples=6, deadline=None)
@given(spec=specs().filter(lambda s: s.channels == 3 and len(s.blocks) > 0 and s.pool.kind != "none"))
def test_a_short_search_works_on_any_network(spec: ModelSpec) -> None:
    labelled = bool(spec.outputs)
    x = torch.randint(0, 255, (16, 3, *spec.image_px), dtype=torch.uint8)
    model = tiny(spec)
    config = quick(steps=4)
    lowest, whole = floor(spec, config), cost(spec)
    if whole.macs - lowest.macs < 2:
        return
    limit = (lowest.macs + whole.macs) // 2
    found = compress(
        model, replace(config, budget=Budget(max_macs=limit)), data=(x, torch.arange(16) % 5) if labelled else x
    )
    assert cost(found.spec).macs <= limit
    assert found.model(images(spec, dtype=torch.float32)).isfinite().all()


def test_composes_with_its_own_result() -> None:
    first = compress(tiny(WIDE), quick(Budget(keep_macs=0.7)), data=pictures())
    again = compress(first.model, quick(Budget(keep_macs=0.7)), data=pictures())
    assert [s.method for s in again.selection.steps] == ["uvc", "uvc"]
    assert again.selection.steps[1].parent == spec_hash(first.spec)
    assert cost(again.spec).macs <= 0.49 * cost(WIDE).macs + 1


def test_a_model_within_its_budget_comes_back_unchanged() -> None:
    """Law 4."""
    spec = kinds()["layer scale"]
    model, x = make(spec), images(spec)
    found = compress(model, quick(Budget(keep_macs=1.0)))
    assert found.spec == spec
    assert torch.equal(found.model(x), model(x))


# ------------------------------------------------------------------------------------------------------ 16, laws 8 and 10


def test_a_search_repeats_itself_and_leaves_the_generators_alone() -> None:
    before = torch.get_rng_state()
    runs = [compress(tiny(WIDE), quick(), data=pictures()) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), before)
    assert runs[0].spec == runs[1].spec
    assert torch.equal(weights(runs[0].model), weights(runs[1].model))
    assert runs[0].history == runs[1].history
    other = compress(tiny(WIDE), quick(seed=1), data=pictures())
    assert not torch.equal(weights(other.model), weights(runs[0].model)) or other.spec != runs[0].spec


class Killed(Exception):
    pass


@pytest.mark.parametrize("preset", ["clean", "paper"])
@pytest.mark.parametrize("when", [3, 7, 9])
def test_killed_in_search_or_after_it_and_resumed_equals_never_killed(tmp_path: Path, when: int, preset: str) -> None:
    config = quick(steps=10, checkpoint_seconds=0, preset=preset, batch_size=8, warmup=0.2, settle=0.3)
    whole = compress(tiny(WIDE), config, data=pictures(), folder=tmp_path / "whole")

    def kill(stage: str, done: int, total: int, **facts: Any) -> None:
        if done == when:
            raise Killed

    with pytest.raises(Killed):
        compress(tiny(WIDE), config, data=pictures(), folder=tmp_path / "cut", progress=kill)
    again = compress(tiny(WIDE), config, data=pictures(), folder=tmp_path / "cut", resume=True)
    assert again.spec == whole.spec
    assert torch.equal(weights(again.model), weights(whole.model))
    assert again.history == whole.history
    assert {k: v for k, v in again.report.items() if k not in CLOCKED} == {
        k: v for k, v in whole.report.items() if k not in CLOCKED
    }


def test_a_search_with_another_budget_is_not_resumed(tmp_path: Path) -> None:
    compress(tiny(WIDE), quick(steps=4), data=pictures(), folder=tmp_path)
    with pytest.raises(TrainingError, match=r"budget.*0\.5.*0\.4"):
        compress(tiny(WIDE), quick(Budget(keep_macs=0.4), steps=4), data=pictures(), folder=tmp_path, resume=True)


def test_mixed_precision_searches_too() -> None:
    found = compress(tiny(WIDE), quick(amp="bf16", tie_qk=True), data=pictures())
    assert cost(found.spec).macs <= 0.5 * cost(WIDE).macs
    assert next(found.model.parameters()).dtype == torch.float32


def test_accumulated_micro_batches_and_many_heads_counts_search_too() -> None:
    found = compress(tiny(WIDE), quick(accumulate=2, count_per_head=True), data=pictures())
    assert cost(found.spec).macs <= 0.5 * cost(WIDE).macs


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"gates": "none", "widths": False}, "leaves nothing to remove"),
        ({"warmup": 0.6, "settle": 0.4}, "leave no steps for the search"),
    ],
)
def test_contradictory_settings_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quick(**wrong)
    with pytest.raises(ValueError, match=r"no budget.*keep_macs=0\.5"):
        UvcConfig()


def test_missing_images_labels_and_too_few_of_them_are_refused() -> None:
    with pytest.raises(DataError, match=r"none were given"):
        compress(tiny(WIDE), quick())
    with pytest.raises(DataError, match=r"labels"):
        compress(tiny(WIDE), quick(), data=pictures(labels=False))
    with pytest.raises(DataError, match=r"expected at least one full batch"):
        compress(tiny(WIDE), quick(batch_size=64), data=pictures())
    with pytest.raises(ConfigError, match=r"distill=False on an encoder"):
        compress(tiny(kinds()["encoder"]), quick(distill=False), data=pictures())
    with pytest.raises(VitrimError, match=r"blocks 0 to 2"):
        compress(tiny(WIDE), quick(freeze=("blocks.7",)), data=pictures())


def test_a_teacher_alone_needs_no_labels() -> None:
    found = compress(tiny(WIDE), quick(alpha=1.0), data=pictures(labels=False))
    assert cost(found.spec).macs <= 0.5 * cost(WIDE).macs


# ----------------------------------------------------------------------------------------------------- what it says of itself


def test_history_and_report_say_what_was_decided_and_by_whom() -> None:
    found = compress(tiny(WIDE), quick(steps=20), data=pictures())
    rows = found.history
    assert [row["step"] for row in rows] == list(range(1, 21))
    assert {row["phase"] for row in rows} == {"warm-up", "search", "settle"}
    last = rows[-1]
    assert last["budget"]["macs"] == pytest.approx(0.5, abs=1e-4)
    names = ["block 0", "block 1", "block 2"]
    assert list(last["gates"]) == list(last["removed"]["hidden"]) == list(last["y"]["heads"]) == names
    report = found.report
    for share in report["saving"].values():
        assert share["widths"] + share["skipping"] == pytest.approx(1)
    after = report["finaliser"]["macs"]
    assert after["final"] == pytest.approx(cost(found.spec).macs / cost(WIDE).macs)
    assert after["cut"] == pytest.approx(max(0, max(after["searched"], after["rounded"]) - after["final"]))
    assert report["search"]["ended"] in ("converged", "oscillated", "short of the budget", "below the budget")
    assert report["blocks"] == [uvc._numbers(s) for s in (uvc._shape(b) for b in found.spec.blocks)] or any(
        b.attention is None or b.mlp is None for b in found.spec.blocks
    )


def test_a_search_that_had_no_time_says_how_much_the_finaliser_cut() -> None:
    found = compress(tiny(WIDE), quick(steps=1), data=pictures())
    assert cost(found.spec).macs <= 0.5 * cost(WIDE).macs
    assert found.report["finaliser"]["macs"]["cut"] > 0.05
    assert any("the finaliser itself cut" in line for line in found.report["warnings"])


def trace(*gaps: float) -> list[list[float]]:
    return [[float(i), 0.5 + gap, 0.5] for i, gap in enumerate(gaps)]


def test_how_a_search_ended_is_judged_from_its_last_quarter() -> None:
    quiet, wild = [0.0] * 12, [0.3, -0.3] * 6
    assert uvc.judged(trace(*wild, 0.01, -0.01, 0.01, 0.0))[0] == "converged"
    assert uvc.judged(trace(*quiet, 0.1, -0.1, 0.1, -0.1))[0] == "oscillated"
    assert uvc.judged(trace(*quiet, 0.1, 0.1, 0.1, 0.1))[0] == "short of the budget"
    assert uvc.judged(trace(*quiet, -0.1, -0.1, -0.1, -0.1))[0] == "below the budget"


def test_every_setting_changes_something() -> None:
    """No dead flags: each of these gives another network, other weights or another history."""
    base = compress(tiny(WIDE), quick(), data=pictures())
    changes: list[dict[str, Any]] = [
        {"gates": "halves"},
        {"widths": False},
        {"distill": False},
        {"tie_qk": True},
        {"warmup": 0.4},
        {"settle": 0.5},
        {"ramp": 0.1},
        {"cold": 1.0},
        {"alpha": 0.9},
        {"tau": 8.0},
        {"preset": "paper"},
    ]
    for change in changes:
        found = compress(tiny(WIDE), quick(**change), data=pictures())
        same = found.spec == base.spec and torch.equal(weights(found.model), weights(base.model))
        assert not same or found.history != base.history, change


def test_the_papers_preset_has_the_released_commands_values() -> None:
    config = UvcConfig(budget=HALF, preset="paper")
    training, rules = config.training, config.rules
    assert (training.epochs, training.batch_size, training.lr, training.weight_decay, training.clip) == (
        30,
        1024,
        1e-4,
        0.05,
        1.0,
    )
    assert (training.mixup, training.cutmix, training.mix_share, training.smoothing) == (0.8, 1.0, 0.8, 0.1)
    assert (rules.count_step, rules.y_step, rules.z_steps) == (0.02, 1e-4, (1, 5, 9, 13, 17))
    assert (rules.gate_step, rules.gate_weight, rules.gate_every, rules.alpha, rules.tau) == (0.1, 5e-4, 50, 0.1, 1)
    assert config.per_head
    assert training.warmup * 30 * (1_281_167 // 1024) == pytest.approx(500, rel=0.01)


def test_plan_reads_nothing_and_says_what_is_needed() -> None:
    found = plan(WIDE)
    assert found["needs"] == {"images": 128, "labels": True, "training": True}
    assert found["range"]["macs"][1] == cost(WIDE).macs
    assert found["dense"]["block 0 qk"] == "tie_qk is off"
    assert "block 0 qk" not in plan(WIDE, quick(tie_qk=True))["dense"]
    assert plan(kinds()["encoder"])["needs"]["labels"] is False
    assert plan(WIDE, quick(freeze=("blocks.1.mlp",)))["dense"]["block 1 mlp"] == "frozen"


def test_the_built_in_model_is_searched_from_end_to_end() -> None:
    import vitrim

    model = vitrim.load("builtin:cifar10-vit-micro")
    found = compress(model, UvcConfig(budget=HALF, steps=4, batch_size=8, device="cpu"), data="sample")
    assert cost(found.spec).macs <= 0.5 * cost(model).macs
    assert cost(found.spec).macs >= 0.49 * cost(model).macs
    assert found.model(torch.zeros(1, 3, 32, 32)).shape == (1, 10)


def test_decisions_are_named_by_what_they_are_about() -> None:
    found = compress(tiny(WIDE), quick(gates="halves", count_per_head=True, freeze=("blocks.0",)), data=pictures())
    last = found.history[-1]
    assert list(last["gates"]) == ["block 1 attention", "block 1 mlp", "block 2 attention", "block 2 mlp"]
    assert list(last["removed"]["v"]) == [f"block {i} head {h}" for i in (1, 2) for h in (0, 1)]
    assert list(last["removed"]["hidden"]) == ["block 1", "block 2"]


def test_the_gates_that_are_told_are_those_of_the_forward_pass() -> None:
    search, _ = searching()
    search.controller.logits[:] = 1.0
    late = at(68)
    search._refresh(late)
    used = 1 / (1 + np.exp(-search.leaf.detach().numpy()[search.masks :]))
    told = [value for key, value in search.metrics().items() if key.startswith("gate/")]
    assert told == pytest.approx(list(used), rel=1e-5)
    assert told[0] > 1 / (1 + math.exp(-1.0)) + 0.1  # colder than the logit itself


def test_a_second_budget_that_binds_is_the_one_that_is_judged() -> None:
    budget = Budget(keep_macs=0.9, keep_params=0.4)
    found = compress(tiny(WIDE), quick(budget, steps=60), data=pictures())
    assert cost(found.spec).params <= 0.4 * cost(WIDE).params
    trace = found.report["search"]["trace"]
    assert trace[-1][2] == pytest.approx(0.4, abs=1e-3)  # its goal, not that of the operations


def test_settings_that_the_loop_refuses_are_refused_at_once() -> None:
    for wrong in ({"batch_size": 8, "accumulate": 3}, {"preset": "paper", "batch_size": 7}):
        with pytest.raises(ConfigError, match=r"uvc: .*(accumulate|mix)"):
            configure("uvc", {"budget": HALF, **wrong})


def test_dims_of_heads_that_go_do_not_count() -> None:
    """Two heads: the weaker goes and had lost nothing, the other lost three quarters: the block keeps a quarter."""
    config = quick(count_per_head=True, gates="none", align=1)
    space = space_of(WIDE, config)
    removed = np.zeros(len(space.widths))
    for w, width in enumerate(space.widths):
        if width.part == "heads":
            removed[w] = 0.5
        elif width.part == "v" and width.head == 1:
            removed[w] = 0.75
    ranks = {i: np.array([0, 1]) for i in range(3)}
    limits = {"macs": cost(WIDE).macs}
    layout = finalise(space, limits, removed, np.zeros(0), losses_for(space), ranks)
    assert [(shape.heads, shape.v) for shape in layout.before] == [(1, 4)] * 3
    other = finalise(space, limits, removed, np.zeros(0), losses_for(space), {i: np.array([1, 0]) for i in range(3)})
    assert [(shape.heads, shape.v) for shape in other.before] == [(1, 16)] * 3
    gates = np.zeros(0)
    fewer, more = (space.shares(removed, gates, ranks=r)[0][0] for r in (ranks, None))
    assert fewer < more


def test_a_teacher_of_another_shape_may_be_given() -> None:
    from vitrim import compress as compress_by

    start = cut(tiny(WIDE), [None, Keep(attention=False), None], method="test")
    one = compress_by(start, quick(Budget(keep_macs=0.6)), data=pictures(), teacher=tiny(WIDE, seed=3))
    two = compress_by(start, quick(Budget(keep_macs=0.6)), data=pictures())
    assert not torch.equal(weights(one.model), weights(two.model))
    from vitrim.methods.auto import AutoConfig

    with pytest.raises(ConfigError, match="learns from no teacher"):
        compress_by(start, AutoConfig(budget=HALF), data=pictures(), teacher=tiny(WIDE))


@pytest.mark.parametrize("order", [("dcvit", "uvc", "comcat"), ("comcat", "uvc", "dcvit"), ("auto", "uvc", "auto")])
def test_methods_compose_in_any_order(order: tuple[str, ...]) -> None:
    """Real results, one cut after the other, each within its own budget."""
    from vitrim.methods import compress as compress_by

    model, few = tiny(WIDE), {"images": 24, "batch_size": 6}
    for name in order:
        more = QUICK if name == "uvc" else {**few, "probe_images": 8} if name in ("dcvit", "comcat") else few
        if name == "comcat":
            more = {key: value for key, value in more.items() if key != "batch_size"}
        before = cost(model).macs
        model = compress_by(model, configure(name, {"budget": Budget(keep_macs=0.7), **more}), data=pictures()).model
        assert cost(model).macs <= 0.7 * before
    assert [step.method for step in model.selection.steps] == list(order)
