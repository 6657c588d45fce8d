"""One plan over all axes: within the budget and close to it, exact where nothing is cut, the same after a kill."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vitrim
from tests.specs import close, images, make, specs, vit
from vitrim import closed_form as cf
from vitrim import surgery
from vitrim.allocation import Allocator
from vitrim.budget import Budget, exceeded
from vitrim.closed_form import fisher
from vitrim.counting import RESOURCES, cost
from vitrim.errors import BudgetError, ConfigError, DataError, TrainingError
from vitrim.methods.auto import AXES, AutoConfig, build, choose, merges
from vitrim.methods.auto import run as auto
from vitrim.methods.auto import score as scoring
from vitrim.methods.auto.choose import Candidate
from vitrim.model import Vit
from vitrim.spec import (
    AttentionSpec,
    BlockSpec,
    Merge,
    MlpSpec,
    ModelSpec,
    Output,
    Pool,
    Prefix,
    Preprocess,
    Similarity,
)
from vitrim.surgery import Factors, Keep

CLASSES = fisher.Product("classes")
WIDE = vit(blocks=3, width=32, heads=2, head_dim=16, hidden=64)


def config(keep: float | None = None, **fields: Any) -> AutoConfig:
    budget = {} if keep is None else {"budget": Budget(keep_macs=keep)}
    return AutoConfig(**{"images": 12, "batch_size": 5, "builds": 2, **budget, **fields})


def pixels(spec: ModelSpec, count: int = 12) -> torch.Tensor:
    return images(spec, count)


def working(model: Vit, config_: AutoConfig, folder: Path, data: torch.Tensor | None = None) -> scoring.Job:
    nets = choose.nets_of(model.spec, config_)
    given_ = pixels(model.spec, config_.images) if data is None else data
    return auto.job_of(model, config_, nets, folder, data=given_)


def whole(nets: choose.Nets, width: int | None = None) -> Candidate:
    return replace(nets.uncut(), width=width or nets.base.width)


# ------------------------------------------------------------------------------------------------------------------- laws


def test_a_network_without_blocks_is_cut_in_its_stream_alone():
    spec = replace(vit(blocks=0, width=32, heads=2, head_dim=16, hidden=64), prefix=("cls",))
    small = auto.compress(make(spec), config(0.6), data=pixels(spec, 9))
    assert cost(small.spec).macs <= 0.6 * cost(spec).macs
    assert small.report["steps"] == small.report["blocks"] == []
    with pytest.raises(ConfigError, match="no blocks in which to merge"):
        auto.compress(make(spec), config(0.6, axes=("tokens", "width")), data=pixels(spec, 9))


@settings(max_examples=30)
@given(
    spec=specs(),
    share=st.floats(0.02, 0.98),
    kind=st.sampled_from(["macs", "params", "memory", "file", "two"]),
    score=st.sampled_from(["fisher", "fisher", "measured"]),
)
def test_any_network_is_brought_within_any_reachable_budget_and_close_to_it(spec, share, kind, score):
    model, x, whole_ = make(spec), pixels(spec, 9), cost(spec)
    try:
        said = choose.plan(spec)
    except ConfigError:
        return  # nothing of it can be cut
    at = {name: low + share * (getattr(whole_, name) - low) for name, (low, _) in said["range"].items()}
    budget = {
        "macs": lambda: Budget(max_macs=int(at["macs"]) + 1),
        "params": lambda: Budget(max_params=int(at["params"]) + 1),
        "memory": lambda: Budget(max_memory_mb=(at["memory_bytes"] + 1) / 1e6),
        "file": lambda: Budget(max_file_mb=(at["file_bytes"] + 1) / 1e6),
        "two": lambda: Budget(max_macs=int(at["macs"]) + 1, max_params=int(at["params"]) + 1),
    }[kind]()
    small = auto.compress(model, config(budget=budget, images=9, score=score), data=x)
    found, limits = cost(small.spec), budget.limits(whole_)
    assert not exceeded(found, limits)
    near = {name: max(getattr(whole_, name) // 100, said["step"][name]) for name in RESOURCES}
    assert any(limit - getattr(found, name) <= near[name] for name, limit in limits.items())
    assert found.params == sum(p.numel() for p in small.model.parameters())
    assert torch.isfinite(small.model(x)).all()
    assert small.selection.steps[-1].method == "auto"


@pytest.mark.parametrize("keep", [0.6, 0.25, 0.1])
def test_the_costs_that_plans_are_made_of_are_those_of_the_built_network(keep):
    nets = choose.nets_of(WIDE, config(keep))
    losses = [
        choose.Losses(*({n: 1.0 / (n + 1) for n in (*sizes, 0)} for sizes in (own.qk, own.v, own.hidden, own.hidden)))
        for own in nets.levels
    ]
    for one, levels in zip(losses, nets.levels, strict=True):
        one.settle(levels.whole)
    free = merges.Merges(nets.nodes, np.zeros((3, len(nets.nodes))))
    scores = choose.Scores(tuple(losses), {w: 0.1 * (32 - w) for w in nets.widths}, free)
    for width in nets.widths:
        for steps in (
            (),
            nets.steepest(width),
            *choose.planned(nets, scores, width, {"macs": int(keep * cost(WIDE).macs)}),
        ):
            space = nets.space(width, steps)
            allocator = Allocator(space, partial(scores.loss, nets))
            for pick in (0, -1, len(allocator.choices[1]) // 2):
                plan = Candidate(width, steps, tuple(choices[pick] for choices in allocator.choices))
                found = cost(nets.spec(plan))
                sums = sum(t.costs[pick] for t in allocator.tables)
                assert (found.macs, found.params) == (
                    space.outside["macs"] + sums[0],
                    space.outside["params"] + sums[1],
                )
            assert all(c.qk < width and c.v < width for choices in allocator.choices for c in choices if width < 32)


def test_the_plan_predicts_no_more_than_any_plan_with_fewer_axes(tmp_path):
    model, reference = make(WIDE), cost(WIDE)
    full = config(0.5)
    scores = scoring.score(working(model, full, tmp_path))
    nets = choose.nets_of(WIDE, full)
    several = [(0.5, axes) for axes in (("qk", "vo", "mlp"), ("mlp", "attention", "block"), ("width", "mlp"))]
    single = [(0.9, (axis,)) for axis in ("qk", "vo", "mlp", "attention", "block", "width", "tokens")]
    compared = 0
    for keep, axes in several + single:
        limits = Budget(keep_macs=keep).limits(reference)
        fewer = choose.nets_of(WIDE, config(keep, axes=axes))
        if exceeded(cost(fewer.spec(fewer.lowest)), limits):
            continue
        best = scores.total(nets, choose.best_candidates(nets, scores, limits, count=1)[0])
        plan = choose.best_candidates(fewer, scores, limits, count=1)[0]
        assert best <= scores.total(nets, plan) * (1 + 1e-9)
        compared += 1
    assert compared >= 8


def test_more_budget_predicts_no_worse():
    rows = auto.predict(make(WIDE), config(), [Budget(keep_macs=k) for k in (0.1, 0.2, 0.4, 0.7)], data=pixels(WIDE))
    losses = [row["predicted_kl"] for row in rows]
    assert all(after <= before * 1.02 + 1e-9 for before, after in pairwise(losses))
    assert [row["macs"] <= k * cost(WIDE).macs for row, k in zip(rows, (0.1, 0.2, 0.4, 0.7), strict=True)] == [True] * 4


# -------------------------------------------------------------------------------------------------------------- exactness


@pytest.mark.parametrize("kind", ["plain", "swiglu", "factored", "gates"])
def test_rebuilding_without_a_cut_changes_nothing(kind, tmp_path):
    block = WIDE.blocks[0]
    assert block.attention is not None
    changed = {
        "plain": block,
        "swiglu": replace(block, mlp=MlpSpec(kind="swiglu", hidden=40, layer_scale=True)),
        "factored": replace(block, mlp=MlpSpec(hidden=64, fc1_rank=9, fc2_rank=11)),
        "gates": replace(
            block, attention=replace(block.attention, gate=True, qk_norm="rms"), mlp=MlpSpec(hidden=64, gate=True)
        ),
    }[kind]
    spec = replace(WIDE, blocks=(changed,) * 3)
    model = make(spec)
    model.config = replace(model.config, gate_policy="open")
    job = working(model, config(0.5), tmp_path)
    small = build.Refit(job, whole(job.nets), "all", "build").build()
    assert close(small(pixels(spec)), model(pixels(spec)), 1e-8)
    assert small.spec.blocks[-1].steps == (Prefix(),)


@pytest.mark.parametrize("score", ["fisher", "measured"])
@pytest.mark.parametrize("part", ["qk", "v", "hidden", "off"])
def test_a_score_is_what_the_network_with_that_part_alone_loses(part, score, tmp_path):
    """The `measured` score of a level is the divergence of the network with it; the `fisher` one is of its size."""
    model, x = make(WIDE), pixels(WIDE, 16)
    job = working(model, config(0.5, images=16, score=score, draws=200), tmp_path, x)
    library = scoring.all_parts(job)
    found = library[1].tensors
    size = {"qk": 8, "v": 8, "hidden": 32, "off": 64}[part]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    spec, here = WIDE.blocks[1], "blocks.1"
    keep = None
    if part == "qk":
        factors = Factors(
            q=found["qk/left"][..., :8], k=found["qk/right"].mT[..., :8], q_bias=found["qk/bias"][..., :8]
        )
        changed = surgery.factorise(model, [None, factors, None], method="test")
    elif part == "v":
        o = found["o/8/w"].unflatten(0, (2, 8))
        factors = Factors(v=found["v/left"][..., :8], o=o, out_bias=found["o/8/b"])
        changed = surgery.factorise(model, [None, factors, None], method="test")
    else:
        kind = "mlp" if part == "hidden" else "off"
        keep = tuple(found[f"{kind}/{size}/keep"].tolist())
        cut = surgery.cut(model, [None, Keep(attention=part != "off", hidden=keep), None], method="test")
        state = {
            **cut.state_dict(),
            f"{here}.mlp.fc2.weight": found[f"{kind}/{size}/w"].T,
            f"{here}.mlp.fc2.bias": found[f"{kind}/{size}/b"],
        }
        changed = surgery.with_spec(cut, cut.spec, state)
    assert changed.spec.blocks[1] != spec
    measured = job.divergence(changed)
    scored = getattr(scoring.score_blocks(job, library)[1], part)[size]
    if score == "measured":
        assert scored == pytest.approx(measured, rel=1e-6)
    else:
        assert 0.3 * measured < scored < 3 * measured


def test_a_dead_block_is_cut_to_nothing_and_costs_nothing():
    model = make(WIDE)
    state = dict(model.state_dict())
    for name in state:
        if name.startswith("blocks.1.") and ("out." in name or "fc2." in name):
            state[name] = torch.zeros_like(state[name])
    dead = surgery.with_spec(model, WIDE, state)
    row = auto.predict(dead, config(axes=("block",)), [Budget(keep_macs=0.75)], data=pixels(WIDE))[0]
    assert [b["hidden"][0] for b in row["blocks"]] == [64, 0, 64]
    assert row["predicted_kl"] < 1e-12
    small = auto.compress(dead, config(0.75, axes=("block",)), data=pixels(WIDE))
    assert small.spec.blocks[1] == BlockSpec(attention=None, mlp=None)
    assert close(small.model(pixels(WIDE)), dead(pixels(WIDE)), 1e-8)


def test_a_block_that_goes_leaves_its_mean_to_the_one_before():
    """A block that adds a constant: dropped whole, its constant stays."""
    model = make(WIDE)
    state = dict(model.state_dict())
    for name in state:
        if name.startswith("blocks.1.") and name.endswith(("out.weight", "fc2.weight")):
            state[name] = torch.zeros_like(state[name])
    constant = surgery.with_spec(model, WIDE, state)
    small = auto.compress(constant, config(0.75, axes=("block",)), data=pixels(WIDE))
    assert small.spec.blocks[1] == BlockSpec(attention=None, mlp=None)
    assert close(small.model(pixels(WIDE)), constant(pixels(WIDE)), 1e-8)


def test_the_tail_is_added_where_it_is_allowed_and_used_where_it_is_there():
    for given_ in (make(WIDE), surgery.exact_tail(make(WIDE))):
        small = auto.compress(given_, config(0.5), data=pixels(WIDE))
        assert small.spec.blocks[-1].steps == (Prefix(),)
        assert small.report["exact_tail"]
    off = tuple(axis for axis in AXES if axis != "tail")
    assert not surgery.has_exact_tail(auto.compress(make(WIDE), config(0.5, axes=off), data=pixels(WIDE)).spec)
    mean = replace(WIDE, pool=Pool(kind="mean"))
    assert auto.compress(make(mean), config(0.5), data=pixels(mean)).spec.blocks[-1].steps == ()
    with pytest.raises(ConfigError, match="axis 'tail' does not apply"):
        choose.plan(mean, config(0.5, axes=("mlp", "tail")))


# ------------------------------------------------------------------------------------------------------------------ axes


@pytest.mark.parametrize(
    ("axes", "keep"),
    [
        (("qk",), 0.9),
        (("vo",), 0.9),
        (("mlp",), 0.7),
        (("attention",), 0.9),
        (("block",), 0.7),
        (("width",), 0.6),
        (("tokens",), 0.8),
        (("tail",), 0.95),
    ],
)
def test_each_axis_cuts_what_it_names_and_nothing_else(axes, keep):
    small = auto.compress(make(WIDE), config(keep, axes=axes), data=pixels(WIDE)).spec
    changed = set()
    for before, after in zip(WIDE.blocks, small.blocks, strict=True):
        a, b = before.attention, after.attention
        assert a is not None
        if b is None and after.mlp is None:
            changed.add("block")
        elif b is None:
            changed.add("attention")
        else:
            changed |= {
                name for name, attr in (("qk", "qk_dim"), ("vo", "v_dim")) if getattr(a, attr) != getattr(b, attr)
            }
        if after.mlp is not None and before.mlp is not None and after.mlp.hidden != before.mlp.hidden:
            changed.add("mlp")
        if after.steps:
            changed.add("tail" if isinstance(after.steps[0], Prefix) else "tokens")
    if small.width != WIDE.width:
        changed.add("width")
    assert changed == set(axes)


def encoder(kind: str) -> ModelSpec:
    return replace(WIDE, outputs=(), pool=Pool(kind=kind))  # type: ignore[arg-type]


NETWORKS: dict[str, ModelSpec] = {
    "distilled": replace(
        WIDE, prefix=("cls", "dist"), outputs=(Output(classes=5), Output(name="second", classes=5, reads=("dist",)))
    ),
    "registers": replace(WIDE, prefix=("cls", "reg", "reg"), pool=Pool(kind="mean")),
    "clip": replace(encoder("cls"), pre_norm=True),
    "dino": encoder("cls"),
    "stream": encoder("none"),
    "siglip": replace(WIDE, outputs=(), prefix=(), pool=Pool(kind="map", heads=2, hidden=16)),
    "mean": replace(WIDE, pool=Pool(kind="mean"), final_norm=False, pool_norm=True, prefix=()),
    "swiglu": replace(
        WIDE, blocks=(replace(WIDE.blocks[0], mlp=MlpSpec(kind="swiglu", hidden=40, layer_scale=True)),) * 3
    ),
    "normed scores": replace(
        WIDE,
        blocks=(
            replace(WIDE.blocks[0], attention=AttentionSpec(heads=2, qk_dim=16, v_dim=16, scale=0.25, qk_norm="layer")),
        )
        * 3,
    ),
    "cut by comcat": replace(
        WIDE, blocks=(replace(WIDE.blocks[0], mlp=MlpSpec(hidden=64, fc1_rank=12, fc2_rank=10)),) * 3
    ),
    "cut by dcvit": replace(
        WIDE, blocks=(WIDE.blocks[0], replace(WIDE.blocks[0], attention=None), replace(WIDE.blocks[0], mlp=None))
    ),
    "merged by auto": replace(
        WIDE,
        restore=True,
        blocks=tuple(
            replace(
                WIDE.blocks[0], steps=(Similarity(keep=keep, proportional=True, match="heavier", metric=12, carry=9),)
            )
            for keep in (14, 12, 11)
        ),
    ),
    "merged": replace(
        WIDE,
        blocks=(
            replace(WIDE.blocks[0], steps=(Merge(axis="h", keep=2),)),
            replace(WIDE.blocks[0], steps=(Similarity(keep=6),)),
            WIDE.blocks[0],
        ),
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_every_kind_of_network_is_cut_to_a_third(name):
    spec = NETWORKS[name]
    model, x = make(spec), pixels(spec)
    small = auto.compress(model, config(0.34), data=x)
    assert cost(small.spec).macs <= 0.34 * cost(spec).macs
    product = fisher.Product.of(model.config)

    def told(net: Vit) -> torch.Tensor:
        return product.outcome(net(x, want=(product.want,))[product.want])

    before = told(model)
    lost = product.divergence(before, told(small.model)).mean()
    random = make(small.spec, seed=9)
    assert lost < 0.7 * product.divergence(before, told(random)).mean()
    said = small.report["dense"]
    assert ("stream width" in said) == (name in ("clip", "dino", "stream", "siglip"))
    if name == "normed scores":
        assert all(b.attention is None or b.attention.qk_dim == 16 for b in small.spec.blocks)
        assert "block 0 qk" in said


def test_frozen_parts_keep_the_stream_and_stay_bit_for_bit():
    model = make(WIDE)
    small = auto.compress(model, config(0.7, freeze=("blocks.1.mlp", "blocks.2")), data=pixels(WIDE))
    assert small.spec.width == 32
    assert "frozen" in small.report["dense"]["stream width"]
    assert small.report["dense"]["block 1 mlp"] == "frozen"
    assert "frozen" in small.report["dense"]["exact tail"]
    before, after = model.state_dict(), small.model.state_dict()
    held = [n for n in before if n.startswith(("blocks.1.mlp.", "blocks.1.norm2.", "blocks.2."))]
    assert all(torch.equal(before[name], after[name]) for name in held)
    with pytest.raises(ConfigError, match=r"axis 'width' does not apply .* frozen"):
        choose.plan(WIDE, config(0.7, axes=("width", "mlp"), freeze=("blocks.0",)))


# -------------------------------------------------------------------------------------------------------- runs and reports


def test_several_budgets_from_one_scoring_are_the_networks_of_single_runs():
    model, budgets = make(WIDE), [Budget(keep_macs=k) for k in (1.0, 0.5, 0.2)]
    stages: list[str] = []
    family = auto.compress_family(
        model, config(), budgets, data=pixels(WIDE), progress=lambda stage, done, total, **_: stages.append(stage)
    )
    assert stages.count("score") == 1
    for budget, member in zip(budgets, family, strict=True):
        alone = auto.compress(model, config(budget=budget), data=pixels(WIDE))
        assert alone.spec == member.spec
        assert all(torch.equal(a, b) for a, b in zip(alone.model.parameters(), member.model.parameters(), strict=True))
    assert family[0].spec == WIDE


class Killed(Exception):
    pass


def killed(stage: str, at: int) -> Callable[..., None]:
    def progress(now: str, done: int, total: int, **_: Any) -> None:
        if now == stage and done >= at:
            raise Killed

    return progress


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sensitivity", "parts", "score", "widths", "build", "final"])
def test_a_killed_run_goes_on_to_the_same_network(stage, tmp_path):
    model, asked = make(WIDE), config(0.3)
    never = auto.compress(model, asked, data=pixels(WIDE))
    with pytest.raises(Killed):
        auto.compress(model, asked, data=pixels(WIDE), folder=tmp_path, progress=killed(stage, 2))
    seen: list[tuple[str, int]] = []
    again = auto.compress(
        model, asked, data=pixels(WIDE), folder=tmp_path, resume=True, progress=lambda s, d, t, **_: seen.append((s, d))
    )
    assert again.spec == never.spec
    assert again.report == never.report
    assert all(torch.equal(a, b) for a, b in zip(again.model.parameters(), never.model.parameters(), strict=True))
    if stage in ("build", "final"):
        assert not any(s in ("sensitivity", "parts", "score") for s, _ in seen)


def test_a_folder_of_another_run_is_refused(tmp_path):
    model = make(WIDE)
    auto.compress(model, config(0.3), data=pixels(WIDE), folder=tmp_path)
    with pytest.raises(TrainingError, match="resume=True"):
        auto.compress(model, config(0.3), data=pixels(WIDE), folder=tmp_path)
    with pytest.raises(TrainingError, match="seed was 0 and is 1"):
        auto.compress(model, config(0.3, seed=1), data=pixels(WIDE), folder=tmp_path, resume=True)
    with pytest.raises(TrainingError, match="weights was"):
        auto.compress(make(WIDE, seed=5), config(0.3), data=pixels(WIDE), folder=tmp_path, resume=True)


def test_the_prediction_is_that_of_the_report_and_comes_with_what_would_be_cut():
    model = make(WIDE)
    row = auto.predict(model, config(), [Budget(keep_macs=0.3)], data=pixels(WIDE))[0]
    small = auto.compress(model, config(0.3, builds=1), data=pixels(WIDE))
    assert row["budget"] == {"keep_macs": 0.3}
    assert row["predicted_kl"] == small.report["predicted_kl"]
    foretold = [{k: v for k, v in block.items() if k != "reached_kl"} for block in small.report["blocks"]]
    assert row["blocks"] == foretold
    assert row["width"] == small.report["width"] == [small.spec.width, 32]
    assert row["macs"] == cost(small.spec).macs
    assert small.report["reached_kl"] > 0


def test_what_each_block_adds_is_measured_and_adds_up_to_what_was_reached():
    few = pixels(WIDE)
    report = auto.compress(make(WIDE), config(0.3, builds=1, exact_tail=False, batch_size=4), data=few).report
    added = sum(block["reached_kl"] for block in report["blocks"]) + report["widths"][str(report["width"][0])]
    assert len(report["blocks"]) == len(WIDE.blocks)
    assert added == pytest.approx(report["reached_kl"], rel=0.5)  # the classifier is refitted besides
    assert -1 <= report["rank_correlation"] <= 1


def test_the_best_of_the_built_plans_on_held_out_images_is_kept():
    report = auto.compress(make(WIDE), config(0.3, builds=3), data=pixels(WIDE)).report
    assert len(report["candidates"]) == 3
    assert report["reached_kl"] == min(row["reached_kl"] for row in report["candidates"])
    assert report["images"] == {"all": 12, "fit": 9, "held": 3}


def test_batches_set_the_memory_and_not_the_scores(tmp_path):
    found, grams = [], []
    for size in (3, 12):
        job = working(make(WIDE), config(0.3, batch_size=size), tmp_path)
        found.append(scoring.score(job))
        grams.append(job.gram)
    assert close(*grams)
    for one, two in zip(found[0].blocks, found[1].blocks, strict=True):
        for kind in scoring.KINDS:
            ours, theirs = getattr(one, kind), getattr(two, kind)
            assert ours.keys() == theirs.keys()
            assert all(ours[n] == pytest.approx(theirs[n], rel=1e-6, abs=1e-12) for n in ours)
    assert found[0].widths == pytest.approx(found[1].widths, rel=1e-6)


@pytest.mark.slow
def test_more_images_do_better_on_others():
    model, other = make(WIDE), images(WIDE, 64, seed=77)
    with torch.no_grad():
        before = CLASSES.outcome(model(other))
    losses = []
    for count in (8, 96):
        found = []
        for seed in range(3):
            asked = config(0.3, axes=("qk", "vo", "mlp"), images=count, builds=1)
            small = auto.compress(model, asked, data=images(WIDE, count, seed=seed + 10)).model
            with torch.no_grad():
                after = CLASSES.outcome(small(other))
            found.append(float(CLASSES.divergence(before, after).mean()))
        losses.append(sum(found) / 3)
    assert losses[1] < losses[0]


# -------------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"axes": ()}, "every axis is switched off"),
        ({"axes": ("mpl",)}, "did you mean 'mlp'"),
        ({"images": 1}, "images=1; expected 2 or more"),
        ({"ridge": 0.0}, "ridge=0.0"),
        ({"builds": 0}, "builds=0"),
    ],
)
def test_a_config_that_says_nothing_is_refused(fields, match):
    with pytest.raises(ValueError, match=match):
        config(0.5, **fields)


def test_a_budget_below_the_floor_is_refused_with_the_range_before_the_data_are_looked_at():
    with pytest.raises(BudgetError, match="auto reaches"):
        auto.compress(make(WIDE), config(0.001), data="no such folder")
    with pytest.raises(ConfigError, match="no budget"):
        auto.compress(make(WIDE), config(), data=pixels(WIDE))


@pytest.mark.parametrize(
    ("name", "product", "why"),
    [
        ("clip", "output", "pre_norm|encoder"),
        ("siglip", "output", "encoder|pool map"),
        ("dino", "output", "encoder"),
        ("dino", "tokens", "the tokens of the stream are the product"),
    ],
)
def test_a_stream_width_that_is_asked_for_where_it_cannot_be_is_refused_by_name(name, product, why):
    asked = config(0.5, axes=("width",), product=product)
    with pytest.raises(ConfigError, match=f"axis 'width' does not apply to this network: .*({why})"):
        auto.compress(make(NETWORKS[name]), asked, data=pixels(NETWORKS[name]))


def test_images_that_say_nothing_are_refused():
    model, x = make(WIDE), pixels(WIDE)
    with pytest.raises(DataError, match="all 12 images are equal"):
        auto.compress(model, config(0.5), data=x[:1].expand(12, -1, -1, -1))
    with pytest.raises(DataError, match="1 image; expected two"):
        auto.compress(model, config(0.5), data=x[:1])
    with pytest.raises(DataError, match="none were given"):
        auto.compress(model, config(0.5))
    with pytest.raises(DataError, match="does not say how its images are prepared"):
        auto.compress(model, config(0.5), data="sample")


def test_too_few_images_for_the_unknowns_are_said_with_the_number_that_would_do(caplog):
    small = vitrim.compress(make(WIDE), config(0.5, images=4), data=pixels(WIDE, 4))
    assert "3 images give" not in small.report["warnings"][0]
    assert "4 images give 51 tokens to fit 64 unknowns" in small.report["warnings"][0]
    assert "11 images or more would do" in small.report["warnings"][0]
    assert any("64 unknowns" in message for message in caplog.messages)
    assert auto.compress(make(WIDE), config(0.5), data=pixels(WIDE)).report["warnings"] == []


@pytest.mark.slow
def test_every_setting_changes_something():
    spec = vit(blocks=2, width=32, heads=2, head_dim=16, hidden=128)
    base = auto.compress(make(spec), config(0.3), data=pixels(spec, 16))
    for fields in ({"ridge": 1.0}, {"output_ridge": 1.0}, {"seed": 3}, {"images": 16}, {"score": "measured"}):
        other = auto.compress(make(spec), config(0.3, **fields), data=pixels(spec, 16))
        same = other.spec == base.spec and all(
            torch.equal(a, b) for a, b in zip(other.model.parameters(), base.model.parameters(), strict=True)
        )
        assert not same, fields
    sizes = [choose.nets_of(spec, config(0.3, align=n)).levels[0].hidden for n in (8, 4)]
    assert all(m % 8 == 0 for m in sizes[0])
    assert sizes[0] != sizes[1]


# ------------------------------------------------------------------------------------------------------------- end to end


@pytest.mark.slow
def test_the_built_in_model_keeps_its_accuracy_at_a_seventh_of_its_operations():
    model = vitrim.load("builtin:cifar10-vit-micro")
    assert isinstance(model.config.preprocess, Preprocess)
    small = auto.compress(model, AutoConfig(budget=Budget(keep_macs=0.15), images=64, builds=1), data="sample")
    assert cost(small.spec).macs <= 0.15 * cost(model).macs
    assert small.spec.width < 128
    assert small.report["reached_kl"] < 0.03
    before, after = (
        vitrim.evaluate(m, "sample", split="validation", limit=200, batch_size=50) for m in (model, small.model)
    )
    assert after["top1"] > before["top1"] - 0.05


# --------------------------------------------------------------------------------------- what is frozen, met, or left out


def test_an_attention_that_goes_before_a_frozen_mlp_is_scored_as_it_is_built(tmp_path):
    model, x = make(WIDE), pixels(WIDE, 16)
    frozen = config(0.9, images=16, axes=("attention",), freeze=("blocks.1.mlp",), score="measured")
    job = working(model, frozen, tmp_path, x)
    library = scoring.all_parts(job)
    scored = scoring.score_blocks(job, library)[1].off[64]
    gone = surgery.cut(model, [None, Keep(attention=False), None], method="test")
    assert scored == pytest.approx(job.divergence(gone), rel=1e-6)


def test_a_mean_is_not_put_in_front_of_a_frozen_attention(tmp_path):
    """Where the MLP goes and the attention stays as it is, nothing of the block before may change for it."""
    model = make(WIDE)
    job = working(model, config(0.9, axes=("mlp",), freeze=("blocks.1.attention",)), tmp_path)
    plan = whole(job.nets)
    choices = tuple(c._replace(hidden=0) if i == 1 else c for i, c in enumerate(plan.choices))
    student = build.Refit(job, replace(plan, choices=choices), "all", "build")
    untouched = build.Refit(job, plan, "all", "other").build().state_dict()
    built = student.build().state_dict()
    assert torch.equal(built["blocks.0.mlp.fc2.bias"], untouched["blocks.0.mlp.fc2.bias"])
    assert "blocks.1.mlp.fc1.weight" not in built


def test_what_is_predicted_for_a_budget_that_is_met_is_what_is_made(caplog):
    model = make(WIDE)
    met, cut = auto.predict(model, config(), [Budget(keep_macs=1.0), Budget(keep_macs=0.5)], data=pixels(WIDE))
    made = auto.compress(model, config(1.0), data=pixels(WIDE))
    assert (met["macs"], met["params"]) == (cost(made.spec).macs, cost(made.spec).params) == (
        cost(WIDE).macs,
        cost(WIDE).params,
    )  # fmt: skip
    assert met["predicted_kl"] == 0 < cut["predicted_kl"]
    assert met.keys() == cut.keys()


def test_an_exact_tail_that_is_not_wanted_is_not_added():
    for changes in ({"exact_tail": False}, {"axes": ("qk", "vo", "mlp")}):
        small = auto.compress(make(WIDE), config(0.6, **changes), data=pixels(WIDE))
        assert not surgery.has_exact_tail(small.spec)


def test_a_killed_scoring_goes_on_at_the_batch_where_it_was(tmp_path):
    model, x = make(WIDE), pixels(WIDE, 40)
    one = config(0.4, images=40, builds=1, score="measured")
    unbroken = auto.compress(model, one, data=x)

    def stop(stage: str, done: int, total: int, **facts: Any) -> None:
        if stage == "score":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        auto.compress(model, one, data=x, folder=tmp_path, progress=stop)
    seen: list[int] = []
    counted, calls = scoring.batch_losses, []

    def count(*args: Any) -> Any:
        calls.append(1)
        return counted(*args)

    scoring.batch_losses = count
    try:
        again = auto.compress(
            model,
            one,
            data=x,
            folder=tmp_path,
            resume=True,
            progress=lambda stage, done, *_, **__: seen.append(done) if stage == "score" else None,
        )
    finally:
        scoring.batch_losses = counted
    assert seen == [5, 10]  # of ten held-out images, five at a time
    assert len(calls) == 1
    assert all(torch.equal(a, b) for a, b in zip(again.model.parameters(), unbroken.model.parameters(), strict=True))


@pytest.mark.parametrize("encoder", [False, True])
def test_batches_change_no_sensitivity(encoder):
    spec = replace(WIDE, outputs=(), pool=Pool(kind="mean")) if encoder else WIDE
    model, x = make(spec), pixels(spec, 12)
    one, many = (cf.sensitivity(model, x.split(size), seed=3) for size in (12, 5))
    for name, site in one.items():
        assert close(many[name].matrix, site.matrix)
        assert close(many[name].tokens, site.tokens)


def test_lengths_of_an_encoders_features_cost_nothing():
    """Scores are of the features divided by their length, and so are the weights of the regressions."""
    spec = replace(WIDE, outputs=(), pool=Pool(kind="mean"))
    model, x = make(spec), pixels(spec, 6)
    before = cf.sensitivity(model, [x], seed=0)
    with torch.no_grad():
        for norm in (model.norm, model.pool_norm):
            for parameter in norm.parameters():
                parameter.mul_(10)
    after = cf.sensitivity(model, [x], seed=0)
    assert all(close(after[name].matrix, before[name].matrix) for name in before)


def test_rebuilding_without_a_cut_changes_little_in_single_precision(tmp_path):
    model = make(WIDE, dtype=torch.float32)
    x = pixels(WIDE).float()
    job = working(model, config(0.5), tmp_path, x)
    small = build.Refit(job, whole(job.nets), "all", "build").build()
    assert close(small(x), model(x), 1e-4)


@pytest.mark.parametrize("keep", [0.6, 0.3])
def test_the_operations_of_a_built_plan_are_those_that_torch_counts(keep):
    from torch.utils.flop_counter import FlopCounterMode

    small = auto.compress(make(WIDE), config(keep), data=pixels(WIDE)).model
    counter = FlopCounterMode(display=False)
    with counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        small(pixels(WIDE, 1))
    assert counter.get_total_flops() >= 2 * cost(small.spec).macs * 0.999  # products padded for the kernel count more
    assert cost(small.spec).params == sum(p.numel() for p in small.parameters())
