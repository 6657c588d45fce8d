"""UVC from end to end: the budget, resumption, every kind of network, what it says of itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings

from tests.methods.uvc.kit import HALF, QUICK, WIDE, kinds, quick
from tests.specs import images, make, specs
from tests.training.kit import pictures, tiny, weights
from vitrim.budget import Budget
from vitrim.counting import cost
from vitrim.errors import BudgetError, ConfigError, DataError, TrainingError, VitrimError
from vitrim.methods import configure
from vitrim.methods.uvc.config import UvcConfig
from vitrim.methods.uvc.objective import rows_of
from vitrim.methods.uvc.run import check, compress, floor, judged, plan, tolerance
from vitrim.space import Choice
from vitrim.spec import ModelSpec, spec_hash
from vitrim.surgery import Keep, cut

CLOCKED = ("seconds", "images_per_s")
"""What a report says of the clock."""


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
        assert now.macs >= 0.6 * then.macs - max(0.01 * then.macs, tolerance(spec, quick(**options))["macs"]) or (
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


def test_progress_counts_shares_as_the_budget_does() -> None:
    """As behind an exact tail, where the network that is searched is cheaper than the one that shares are of."""
    given = cost(WIDE)
    budget = Budget(keep_macs=0.3).of(replace(given, macs=2 * given.macs))
    told: list[float] = []

    def look(stage: str, done: int, total: int, **facts: Any) -> None:
        told.extend(facts[key] for key in ("keep_macs",) if key in facts)

    compress(tiny(WIDE), quick(budget), data=pictures(), progress=look)
    assert told[0] == pytest.approx(0.5, rel=0.01)


def test_a_model_within_its_budget_comes_back_unchanged() -> None:
    """Law 4."""
    spec = kinds()["layer scale"]
    model, x = make(spec), images(spec)
    found = compress(model, quick(Budget(keep_macs=1.0)))
    assert found.spec == spec
    assert torch.equal(found.model(x), model(x))


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


def test_few_images_are_searched_on_in_a_batch_that_they_fill_and_it_is_said() -> None:
    config = UvcConfig(budget=Budget(keep_macs=0.6), steps=4, device="cpu", log_every=1)  # of 128 images, by its preset
    model = tiny()
    check(model.spec, config, pictures(44))
    made = compress(model, config, data=pictures(44))
    assert made.report["warnings"][0] == "There are 44 training images, so one step takes 40 of them."
    with pytest.raises(DataError, match="batch_size=64"):
        check(model.spec, replace(config, batch_size=64), pictures(44))


def test_a_teacher_alone_needs_no_labels() -> None:
    found = compress(tiny(WIDE), quick(alpha=1.0), data=pictures(labels=False))
    assert cost(found.spec).macs <= 0.5 * cost(WIDE).macs


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
    now = [Choice.of(block) for block in found.spec.blocks]
    assert report["blocks"] == rows_of(now, now) or any(b.attention is None or b.mlp is None for b in found.spec.blocks)


def test_a_search_that_had_no_time_says_how_much_the_finaliser_cut() -> None:
    found = compress(tiny(WIDE), quick(steps=1), data=pictures())
    assert cost(found.spec).macs <= 0.5 * cost(WIDE).macs
    assert found.report["finaliser"]["macs"]["cut"] > 0.05
    assert any("the finaliser itself cut" in line for line in found.report["warnings"])


def trace(*gaps: float) -> list[list[float]]:
    return [[float(i), 0.5 + gap, 0.5] for i, gap in enumerate(gaps)]


def test_how_a_search_ended_is_judged_from_its_last_quarter() -> None:
    quiet, wild = [0.0] * 12, [0.3, -0.3] * 6
    assert judged(trace(*wild, 0.01, -0.01, 0.01, 0.0))[0] == "converged"
    assert judged(trace(*quiet, 0.1, -0.1, 0.1, -0.1))[0] == "oscillated"
    assert judged(trace(*quiet, 0.1, 0.1, 0.1, 0.1))[0] == "short of the budget"
    assert judged(trace(*quiet, -0.1, -0.1, -0.1, -0.1))[0] == "below the budget"


@pytest.mark.slow
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


@pytest.mark.slow
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
