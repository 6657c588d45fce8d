"""UVC's search: warm-up, masks, prices, the final decision and the exact cut."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from tests.methods.uvc.kit import WIDE, at, searching
from tests.specs import close
from tests.training.kit import tiny
from vitrim.search import squared_norms
from vitrim.surgery import cut, masked_twin
from vitrim.training import Batch
from vitrim.training.objectives import Distilled


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
    search.controller.removed[search.decisions.index[(0, "heads")]] = 0.5
    search.controller.removed[search.decisions.index[(0, "v")]] = 0.25
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
    search.norms = squared_norms(model, search.slots)
    gradients = np.zeros(len(search.leaf))
    gradients[slot.start : slot.stop] = -np.arange(1.0, 33.0)  # every unit lowers the loss, later ones more
    assert np.argsort(search.scores(slot)).tolist() == list(range(32))
    w = search.decisions.index[(slot.block, "hidden")][0]
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
    w = search.decisions.index[(1, "hidden")][0]

    def value(shift: float) -> float:
        search.controller.removed[w] = 12 / 32 + shift
        return float(search.loss(model, batch, at(5)).detach())

    search.loss(model, batch, at(5)).backward()
    search.after_backward(at(5))
    found = search._count_slopes(search.slopes)[w]
    assert found == pytest.approx((value(1e-5) - value(-1e-5)) / 2e-5, rel=1e-5)


@pytest.mark.parametrize(
    "options", [{}, {"tie_qk": True}, {"gates": "halves"}, {"count_per_head": True}, {"gates": "none"}]
)
def test_the_cut_network_is_the_masked_one_of_the_settled_search(options: dict[str, Any]) -> None:
    """Law 3 and the sheet's 9: soft masks of the last phase, the masked twin and the cut give the same logits."""
    search, model = searching(**options)
    model.double()
    random = np.random.default_rng(1)
    search.norms = {key: random.random(value.shape) for key, value in search.norms.items()}
    search.controller.removed = 0.7 * random.random(len(search.decisions.widths))
    if len(search.decisions.gates):
        search.controller.logits[-1] = -3.0
    search._settle()
    search._refresh(at(99))
    search.leaf = search.leaf.detach().double().requires_grad_()
    search._refresh(at(99))
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    masked = model(x, masks=search.soft(at(99), 4))
    small = cut(model, search.keeps(), method="uvc")
    assert search.layout is not None
    assert small.spec == search.decisions.space.spec(search.layout.choices)
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
        search.controller.removed = 0.8 * random.random(len(search.decisions.widths))
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


def test_the_gates_that_are_told_are_those_of_the_forward_pass() -> None:
    search, _ = searching()
    search.controller.logits[:] = 1.0
    late = at(68)
    search._refresh(late)
    used = 1 / (1 + np.exp(-search.leaf.detach().numpy()[search.masks :]))
    told = [value for key, value in search.metrics().items() if key.startswith("gate/")]
    assert told == pytest.approx(list(used), rel=1e-5)
    assert told[0] > 1 / (1 + math.exp(-1.0)) + 0.1  # colder than the logit itself
