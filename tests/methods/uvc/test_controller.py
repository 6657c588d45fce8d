"""UVC's rule: norms, proximal steps, duals, and decisions that settle on the budget."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from tests.specs import close
from vitrim.methods.uvc.config import PRESETS
from vitrim.methods.uvc.controller import Controller, Width, bottom, prox


def test_bottom_norm_is_the_sum_of_the_smallest_and_its_slope_the_next() -> None:
    energies = np.array([1.0, 2.0, 4.0, 8.0])
    assert bottom(energies, 0.0) == (0.0, 1.0)
    assert bottom(energies, 1.2) == (3.0, 4.0)
    assert bottom(energies, 3.0) == (7.0, 8.0)
    assert bottom(energies, 4.0) == (15.0, 8.0)  # none left: the largest


def test_prox_is_the_numerical_minimiser_and_never_grows_a_group() -> None:
    group = torch.randn(7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for strength in (0.0, 0.3, 5.0):
        found = group.clone().requires_grad_()
        solver = torch.optim.SGD([found], lr=1 / (1 + 2 * strength) / 2)
        for _ in range(80):
            solver.zero_grad()
            ((found - group).square().sum() / 2 + strength * found.square().sum()).backward()
            solver.step()
        assert close(prox(group, strength), found, 1e-6)
        assert prox(group, strength).norm() <= group.norm()


def toy(gates: int, widths: int, budget: float, preset: str = "clean") -> tuple[Controller, Any]:
    """A network of equal blocks: a tenth is fixed, the rest is shared by blocks whose widths save half of it."""
    decisions = [Width(i, "hidden", 64) for i in range(widths)]
    controller = Controller(decisions, gates, (budget, math.inf), PRESETS[preset])

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
    top = PRESETS[preset].z_max
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
