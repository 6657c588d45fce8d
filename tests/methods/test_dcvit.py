"""DC-ViT: within the budget and close to it, cut equals masked, no labels, resumable; the paper's golden numbers."""

import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
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
from vitrim import data as opened
from vitrim import surgery
from vitrim.allocation import Allocator
from vitrim.budget import RESOURCES, Budget, exceeded
from vitrim.counting import cost
from vitrim.data import Augment
from vitrim.errors import BudgetError, ConfigError, DataError, TrainingError
from vitrim.methods import comcat
from vitrim.methods.dcvit import DcvitConfig, allocate, floor, narrowed, solve, space_of, step
from vitrim.methods.dcvit import run as dcvit
from vitrim.model import Vit
from vitrim.space import Choice, Space
from vitrim.spec import (
    AttentionSpec,
    BlockSpec,
    Merge,
    MlpSpec,
    ModelSpec,
    Output,
    Pool,
    Position,
    Prefix,
    Preprocess,
    Similarity,
)
from vitrim.surgery import Keep

WIDE = vit(width=32, blocks=4, heads=2, head_dim=16, hidden=64)
PREPROCESS = Preprocess(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), size_px=(16, 16))


def config(budget: Budget | None = None, **fields: object) -> DcvitConfig:
    return DcvitConfig(budget=budget, **{"images": 16, "batch_size": 8, "probe_images": 8, **fields})  # type: ignore[arg-type]


def tuning(budget: Budget | None = None, **fields: object) -> DcvitConfig:
    few = {"steps": 3, "metric_steps": 3, "metric_images": 4, "augment": Augment(), "images": 16, "batch_size": 8}
    return DcvitConfig(budget=budget, variant="finetune", **{**few, **fields})  # type: ignore[arg-type]


def deit(width: int, depth: int = 12, patch: int = 16) -> ModelSpec:
    block = BlockSpec(
        attention=AttentionSpec(heads=width // 64, qk_dim=64, v_dim=64, scale=0.125), mlp=MlpSpec(hidden=4 * width)
    )
    return ModelSpec(
        image_px=(224, 224),
        patch_px=(patch, patch),
        width=width,
        position=Position(grid=(224 // patch, 224 // patch)),
        blocks=(block,) * depth,
        outputs=(Output(classes=1000),),
    )


SPACE = space_of(WIDE, DcvitConfig())


def option(index: int, attention: bool, hidden: int, space: Space = SPACE) -> Choice:
    """A block with or without its attention, and with so many hidden units."""
    whole = space.whole[index]
    kept = whole if attention else whole.without("attention")
    return kept._replace(hidden=hidden) if hidden else kept.without("mlp")


def keeps_of(parent: ModelSpec, child: Vit) -> list[Keep | None]:
    """What the last selection step says was kept."""
    found: list[Keep | None] = []
    for block, entry in zip(parent.blocks, child.selection.steps[-1].blocks, strict=True):
        if entry is None:
            found.append(None)
            continue
        mlp = entry.get("mlp")
        hidden = tuple(mlp["hidden"]) if isinstance(mlp, dict) and mlp["hidden"] is not None else None
        found.append(
            Keep(
                attention=block.attention is not None and entry.get("attention") != "gone",
                mlp=block.mlp is not None and mlp != "gone",
                hidden=hidden,
            )
        )
    return found


def normalised(spec: ModelSpec = WIDE, dtype: torch.dtype = torch.float32) -> Vit:
    model = make(spec, dtype=dtype)
    model.config = replace(model.config, preprocess=replace(PREPROCESS, size_px=spec.image_px))
    return model


def photos(count: int = 16, side: int = 16, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, side, side), generator=g, dtype=torch.uint8)


# ---------------------------------------------------------------------------------------------------------- golden numbers


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
    assert dcvit.paper_counts(spec) == (total, attention, mlp)


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
    found = solve(*dcvit.paper_counts(deit(768)), 768, keep)
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
    found = dcvit.structure(space_of(deit(768), chosen), chosen, Budget(keep_macs=0.751734186))
    assert found.k == 4
    assert set(found.hidden.values()) == {1151}


def test_the_papers_structure_is_dense_in_the_budget():
    total, attention, mlp = dcvit.paper_counts(deit(384))
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


# -------------------------------------------------------------------------------------------------------------------- laws


@settings(max_examples=25)
@given(spec=specs(), share=st.floats(0, 1), resource=st.sampled_from(["macs", "params"]))
def test_any_network_ends_within_the_budget_and_as_its_masked_twin(spec, share, resource):
    model, x = make(spec), images(spec, 9)
    low, high = getattr(floor(spec), resource), getattr(cost(spec), resource)
    limit = int(low + share * (high - low))
    if limit < 1:
        return
    budget = Budget(max_macs=limit) if resource == "macs" else Budget(max_params=limit)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    small = dcvit.compress(model, config(budget, images=9, align=2), data=x)
    found = getattr(cost(small.spec), resource)
    assert found <= limit
    assert limit - found <= max(0.01 * high, step(spec, config(align=2))[resource])
    assert all(torch.equal(before[n], v) for n, v in model.state_dict().items())
    keeps = keeps_of(spec, small.model)
    plain = surgery.cut(model, keeps, method="dcvit")
    assert surgery.with_folded(small.spec) == surgery.with_folded(plain.spec)
    masked = model(x, masks=surgery.masked_twin(model, keeps))
    assert close(plain(x), masked)
    assert torch.isfinite(small.model(x)).all()


@settings(max_examples=15)
@given(spec=specs())
def test_the_budget_of_everything_changes_nothing(spec):
    model, x = make(spec), images(spec)
    small = dcvit.compress(model, config(Budget(keep_macs=1.0)), data=images(spec, 8))
    assert small.spec == spec
    assert torch.equal(small.model(x), model(x))


@pytest.mark.parametrize(
    "budget",
    [
        Budget(keep_macs=0.6),
        Budget(keep_params=0.6),
        Budget(keep_macs=0.7, keep_params=0.5),
        Budget(keep_macs=0.5, keep_params=0.9),
        Budget(max_file_mb=0.07),
        Budget(max_memory_mb=0.1),
        Budget(max_memory_mb=0.1, keep_macs=0.6),
    ],
)
def test_every_kind_of_limit_is_met_and_nearly_used(budget):
    small = dcvit.compress(make(WIDE), config(budget), data=images(WIDE, 16))
    reference, found = cost(WIDE), cost(small.spec)
    limits = budget.limits(reference)
    assert not exceeded(found, limits)
    slack = [limits[n] - getattr(found, n) - max(0.01 * getattr(reference, n), step(WIDE)[n]) for n in limits]
    assert min(slack) <= 0


def test_halves_that_are_frozen_stay_bit_for_bit():
    model = make(WIDE)
    small = dcvit.compress(
        model,
        config(Budget(keep_macs=0.6), freeze=("blocks.0", "blocks.2.attention", "blocks.3.mlp")),
        data=images(WIDE, 16),
    )
    before, after = model.state_dict(), small.model.state_dict()
    for name in before:
        if name.startswith(("blocks.0.", "blocks.2.attention", "blocks.3.mlp", "heads", "stem")):
            assert torch.equal(before[name], after[name]), name
    with pytest.raises(BudgetError, match="out of reach"):
        dcvit.plan(WIDE, config(Budget(keep_macs=0.3), freeze=("blocks.0-3",)))
    assert floor(WIDE, config(freeze=("blocks.1",))).macs > floor(WIDE).macs


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


@pytest.mark.parametrize("seed", [0, 1])
def test_same_seed_same_weights_and_float32_is_smooth(seed):
    spec, x = WIDE, photos(20)
    model = normalised()
    runs = [dcvit.compress(model, config(Budget(keep_macs=0.5), seed=seed), data=x) for _ in range(2)]
    assert runs[0].spec == runs[1].spec
    for a, b in zip(runs[0].model.parameters(), runs[1].model.parameters(), strict=True):
        assert torch.equal(a, b)
        assert torch.isfinite(a).all()
    assert spec == model.spec


def test_global_state_is_left_as_found():
    model = make(WIDE).train()
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    dcvit.compress(model, config(Budget(keep_macs=0.5)), data=images(WIDE, 16))
    assert torch.equal(before, torch.get_rng_state())
    assert threads == torch.get_num_threads()
    assert model.training
    assert all(p.requires_grad for p in model.parameters())


# ------------------------------------------------------------------------------------------------------------- closed form


def test_scores_serve_every_budget_of_a_family():
    model, x = make(WIDE), images(WIDE, 16)
    told: list[str] = []
    budgets = [Budget(keep_macs=k) for k in (0.8, 0.6, 0.4)]
    family = dcvit.compress_family(
        model, config(), budgets, data=x, progress=lambda stage, done, total, **facts: told.append(stage)
    )
    assert told.count("score") == 4
    assert told.count("refit") == 12
    alone = dcvit.compress(model, config(budgets[1]), data=x)
    assert alone.spec == family[1].spec
    for a, b in zip(alone.model.parameters(), family[1].model.parameters(), strict=True):
        assert torch.equal(a, b)
    macs = [cost(one.spec).macs for one in family]
    assert macs == sorted(macs, reverse=True)
    predicted = [one.report["predicted"] for one in family]
    assert predicted == sorted(predicted)


def _losses(space: Space, seed: int) -> list[dict[Choice, float]]:
    """Random losses that rise as less is kept."""
    g = np.random.default_rng(seed)
    found = []
    for levels in space.levels:
        fixed, scale = g.random() * 3, g.random() * 5
        hidden = levels.whole.hidden
        found.append(
            {
                o: (0.0 if n == 0 else scale * (1 - o.hidden / hidden) ** 2 + fixed * (not o.attention))
                for n, o in enumerate(levels.choices())
            }
        )
    return found


@pytest.mark.parametrize("seed", range(3))
def test_the_allocation_never_predicts_worse_than_equal_widths_or_than_a_smaller_budget(seed):
    losses = _losses(SPACE, seed)
    last = float("inf")
    for keep in np.linspace(0.3, 1.0, 6):
        budget = Budget(keep_macs=float(keep))
        chosen = allocate(SPACE, losses, budget)
        limit = budget.limits(cost(WIDE))
        assert not exceeded(cost(SPACE.spec(chosen)), limit)
        total = sum(loss[o] for loss, o in zip(losses, chosen, strict=True))
        for m in range(8, 65, 8):
            for lost in range(5):
                equal = tuple(option(i, i >= lost, m) for i in range(4))
                if not exceeded(cost(SPACE.spec(equal)), limit):
                    assert total <= sum(loss[o] for loss, o in zip(losses, equal, strict=True)) + 1e-12
        assert total <= last + 1e-12
        last = total


def test_the_table_prices_are_those_of_the_built_specs():
    allocator = Allocator(SPACE, lambda i, choice: 0.0)
    for i, (choices, table) in enumerate(zip(allocator.choices, allocator.tables, strict=True)):
        for choice, (macs, params) in zip(choices, table.costs.tolist(), strict=True):
            one = cost(SPACE.spec(SPACE.with_choice(i, choice))).blocks[i]
            assert (one.macs, one.params) == (macs, params)


def _planted(spec: ModelSpec = WIDE, at: int = 2) -> Vit:
    """A block whose attention writes a constant and most of whose hidden units write nothing."""
    model = make(spec)
    block = model.blocks[at]
    with torch.no_grad():
        block.attention.out.weight.zero_()
        block.attention.out.bias.fill_(0.7)
        block.mlp.fc2.weight[:, 8:] = 0
    return model


def test_a_planted_block_is_cut_first_and_without_loss():
    """Its constant goes into the bias: exactly, since LN2 does not see a constant along ones."""
    model, x = _planted(), images(WIDE, 16)
    least = cost(SPACE.spec(SPACE.with_choice(2, option(2, False, 8)))).macs
    small = dcvit.compress(model, config(Budget(max_macs=least), ridge=1e-10), data=x)
    row = small.report["blocks"][2]
    assert (row["attention"], row["hidden"]) == ("lost", 8)
    assert close(small.model(x), model(x), 1e-5)


def test_the_trials_rank_a_planted_block_first():
    model = normalised(replace(WIDE, blocks=WIDE.blocks[:1] * 5))
    with torch.no_grad():
        for name in ("attention.out", "mlp.fc2"):
            model.blocks[2].get_submodule(name).weight.zero_()
        model.blocks[2].attention.out.bias.zero_()
    small = dcvit.compress(model, tuning(Budget(keep_macs=0.9)), data=photos())
    assert small.report["order"][0] == 2


def test_duplicate_units_go_without_loss():
    model, x = make(WIDE), images(WIDE, 16)
    with torch.no_grad():
        for block in model.blocks:
            block.mlp.fc1.weight[32:] = block.mlp.fc1.weight[:32]
            block.mlp.fc1.bias[32:] = block.mlp.fc1.bias[:32]
    gone = cost(SPACE.spec([option(i, True, 32) for i in range(4)])).macs
    small = dcvit.compress(model, config(Budget(max_macs=gone), ridge=1e-8), data=x)
    fresh = images(WIDE, 4, seed=7)
    assert [row["hidden"] for row in small.report["blocks"]] == [32] * 4
    assert close(small.model(fresh), model(fresh), 1e-4)


def test_the_refit_loses_less_than_the_plain_cut():
    model, x = make(WIDE), images(WIDE, 48)
    small = dcvit.compress(model, config(Budget(keep_macs=0.6), images=48), data=x)
    plain = surgery.cut(model, keeps_of(WIDE, small.model), method="cut")
    fresh = images(WIDE, 16, seed=11)
    aim = model(fresh).detach()
    assert (small.model(fresh).detach() - aim).square().mean() < 0.8 * (plain(fresh).detach() - aim).square().mean()


def test_more_images_lose_less_on_fresh_ones():
    model, fresh = make(WIDE), images(WIDE, 32, seed=99)
    aim = model(fresh).detach()
    lost = []
    for count in (8, 64):
        errors = []
        for seed in range(3):
            small = dcvit.compress(
                model, config(Budget(keep_macs=0.6), images=count, seed=seed), data=images(WIDE, count, seed=20 + seed)
            )
            errors.append(float((small.model(fresh).detach() - aim).square().mean()))
        lost.append(sum(errors))
    assert lost[1] < lost[0]


@pytest.mark.parametrize(
    "field", [{"weighted": False}, {"hand_over": True}, {"ridge": 0.5}, {"align": 4}, {"probe_images": 2}]
)
def test_each_setting_of_the_closed_form_is_heard(field):
    model, x = make(WIDE), images(WIDE, 16)
    budget = Budget(keep_macs=0.42)
    plain, other = (dcvit.compress(model, config(budget, **f), data=x) for f in ({}, field))
    same = plain.spec == other.spec and all(
        torch.equal(a, b) for a, b in zip(plain.model.parameters(), other.model.parameters(), strict=True)
    )
    assert not same


@pytest.mark.parametrize(
    ("variant", "field"),
    [
        *(
            ("closed", f)
            for f in ({"k": 1}, {"preset": "paper"}, {"steps": 7}, {"metric_images": 7}, {"metric_steps": 7})
        ),
        *(("finetune", f) for f in ({"align": 4}, {"ridge": 0.1}, {"weighted": False}, {"hand_over": True})),
        *(("finetune", f) for f in ({"probe_images": 7}, {"finetune_steps": 7})),
    ],
)
def test_a_setting_that_the_variant_does_not_look_at_is_refused(variant, field):
    (name,) = field
    with pytest.raises(ValueError, match=f"{name}=.* has no meaning in variant '{variant}'"):
        DcvitConfig(variant=variant, **field)


def test_a_compressed_block_mixes_no_tokens_and_forgets_the_order_of_its_units():
    model, x = make(WIDE), images(WIDE, 2)
    small, _ = dcvit._narrow(model, 1, 20, tuning())
    stream = model.embed(x)
    moved = stream.x.clone()
    moved[:, 3] += 1
    one, two = (small.blocks[1](stream._replace(x=v))[0].x for v in (stream.x, moved))
    assert torch.equal(one[:, 4:], two[:, 4:])
    assert not torch.equal(one[:, 3], two[:, 3])
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    again = surgery.cut(small, [None, Keep(hidden=tuple(order.tolist())), None, None], method="order")
    assert close(again(x), small(x))


@pytest.mark.parametrize(
    "change",
    [
        {"steps": (Prefix(),), "at": -1},
        {"steps": (Merge(axis="h", keep=3),), "at": 1},
        {"steps": (Similarity(keep=12, at="mid"),), "at": 1},
        {"steps": (Similarity(keep=12, at="start"),), "at": 2},
    ],
)
def test_token_steps_are_kept_and_followed(change):
    at = change["at"] % 4
    blocks = list(WIDE.blocks)
    blocks[at] = replace(blocks[at], steps=change["steps"])
    spec = replace(WIDE, blocks=tuple(blocks))
    model, x = make(spec), images(spec, 24)
    small = dcvit.compress(model, config(Budget(keep_macs=0.6), images=24), data=x)
    assert small.spec.blocks[at].steps == change["steps"]
    plain = surgery.cut(model, keeps_of(spec, small.model), method="cut")
    aim = model(x).detach()
    assert (small.model(x).detach() - aim).square().mean() < (plain(x).detach() - aim).square().mean()


@pytest.mark.parametrize("kind", ["swiglu", "gelu"])
@pytest.mark.parametrize("first", ["comcat", "dcvit"])
def test_comcat_and_dcvit_work_on_each_others_results(first, kind):
    spec = replace(WIDE, blocks=tuple(replace(b, mlp=replace(b.mlp, kind=kind)) for b in WIDE.blocks))  # type: ignore[type-var]
    model, x = make(spec), images(spec, 16)

    def low_rank(net: Vit) -> Vit:
        ranks = tuple(
            {"fc1": 8, "fc2": 6} | ({"qk": 8} if b.attention else {}) if b.mlp and b.mlp.hidden >= 24 else {}
            for b in net.spec.blocks
        )
        return comcat.compress(net, comcat.ComcatConfig(ranks=ranks, images=8, probe_images=2), data=x).model

    def narrow(net: Vit) -> Vit:
        return dcvit.compress(net, config(Budget(keep_macs=0.75)), data=x).model

    chain = [low_rank, narrow] if first == "comcat" else [narrow, low_rank]
    small = chain[1](chain[0](model))
    assert [s.method for s in small.selection.steps] == (
        ["comcat", "dcvit"] if first == "comcat" else ["dcvit", "comcat"]
    )
    assert cost(small.spec).macs < cost(spec).macs
    assert torch.isfinite(small(x)).all()
    if first == "comcat":
        ranks = {b.mlp.fc2_rank for b in small.spec.blocks if b.mlp}
        assert ranks == {6}  # the ranks stay, the hidden units go


# ------------------------------------------------------------------------------------------------------------ resume, data


def _stopping(at: int):
    def progress(stage: str, done: int, total: int, **facts: object) -> None:
        if stage == "score" and done == at:
            raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize("at", [1, 3])
def test_a_killed_scoring_goes_on_behind_the_last_block(tmp_path, at):
    model, x = make(WIDE), images(WIDE, 16)
    settings_ = config(Budget(keep_macs=0.5))
    whole = dcvit.compress(model, settings_, data=x)
    with pytest.raises(KeyboardInterrupt):
        dcvit.compress(model, settings_, data=x, folder=tmp_path, progress=_stopping(at))
    with pytest.raises(TrainingError, match="holds a run already"):
        dcvit.compress(model, settings_, data=x, folder=tmp_path)
    with pytest.raises(TrainingError, match="images was 16 and is 12"):
        dcvit.compress(model, replace(settings_, images=12), data=x, folder=tmp_path, resume=True)
    scored: list[int] = []
    again = dcvit.compress(
        model,
        settings_,
        data=x,
        folder=tmp_path,
        resume=True,
        progress=lambda stage, done, total, **facts: scored.append(done) if stage == "score" else None,
    )
    assert scored == list(range(at + 1, 5))
    assert again.spec == whole.spec
    for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_process_killed_in_the_scoring_goes_on(tmp_path):
    script = textwrap.dedent(
        """
        import os, signal, sys
        import torch
        torch.set_num_threads(1)
        from tests.methods.test_dcvit import WIDE, config
        from tests.specs import images, make
        from pathlib import Path
        from vitrim.budget import Budget
        from vitrim.methods.dcvit import run as dcvit

        def progress(stage, done, total, **facts):
            if stage == "score" and done == 2:
                os.kill(os.getpid(), signal.SIGKILL)

        dcvit.compress(make(WIDE), config(Budget(keep_macs=0.5)), data=images(WIDE, 16), folder=Path(sys.argv[1]), progress=progress)
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], env={**os.environ}, check=False, capture_output=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    model, x, settings_ = make(WIDE), images(WIDE, 16), config(Budget(keep_macs=0.5))
    whole = dcvit.compress(model, settings_, data=x)
    again = dcvit.compress(model, settings_, data=x, folder=tmp_path, resume=True)
    assert again.spec == whole.spec
    for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_labels_are_never_read():
    model = normalised()
    labels = torch.arange(16) % 5
    runs = [
        dcvit.compress(model, config(Budget(keep_macs=0.5)), data=d)
        for d in ((photos(), labels), (photos(), labels.flip(0)))
    ]
    runs += [dcvit.compress(model, config(Budget(keep_macs=0.5)), data=photos())]
    for other in runs[1:]:
        for a, b in zip(runs[0].model.parameters(), other.model.parameters(), strict=True):
            assert torch.equal(a, b)


def test_bad_input_is_named():
    model = normalised()
    with pytest.raises(DataError, match="images are equal"):
        dcvit.compress(model, config(Budget(keep_macs=0.5)), data=photos(1).expand(12, -1, -1, -1))
    with pytest.raises(DataError, match="no images were given"):
        dcvit.compress(model, config(Budget(keep_macs=0.5)))
    with pytest.warns(UserWarning, match="4 images; expected 50 to 1000"):
        dcvit.compress(model, config(Budget(keep_macs=0.5)), data=photos(5))
    with pytest.raises(ConfigError, match="no budget"):
        dcvit.compress(model, config(), data=photos())
    with pytest.raises(DataError, match="how images are normalised"):
        dcvit.compress(make(WIDE), config(Budget(keep_macs=0.5)), data=photos())
    with pytest.raises(ValueError, match="has no meaning in variant 'closed'"):  # pydantic wraps ours
        config(k=3)
    with pytest.raises(ValueError, match="images=0"):
        config(images=0)
    broken = make(WIDE)
    with torch.no_grad():
        broken.blocks[1].mlp.fc1.weight[0, 0] = float("nan")
    with pytest.raises(DataError, match="not finite"):
        dcvit.compress(broken, config(Budget(keep_macs=0.5)), data=images(WIDE, 16))


def test_an_encoder_and_a_single_block_are_compressed():
    for spec in (
        replace(WIDE, outputs=()),
        replace(WIDE, blocks=WIDE.blocks[:1]),
        replace(WIDE, pool=Pool(kind="map", heads=2, hidden=10), outputs=()),
        replace(WIDE, pool=Pool(kind="none"), outputs=()),
    ):
        small = dcvit.compress(make(spec), config(Budget(keep_macs=0.7)), data=images(spec, 16))
        assert cost(small.spec).macs <= 0.7 * cost(spec).macs


# ------------------------------------------------------------------------------------------------------------- fine-tuning


def test_subsets_are_a_function_of_seed_and_block():
    assert dcvit.subset(40, 10, seed=0, block=3) == dcvit.subset(40, 10, seed=0, block=3)
    assert len({dcvit.subset(40, 10, seed=s, block=b) for s in range(2) for b in range(3)}) == 6
    assert set(dcvit.subset(40, 9, seed=0, block=3)) < set(dcvit.subset(40, 10, seed=0, block=3))


def test_the_fine_tuned_form_meets_the_budget_and_spares_the_ends():
    model = normalised(replace(WIDE, blocks=WIDE.blocks[:1] * 5))
    before = {n: v.clone() for n, v in model.state_dict().items()}
    for keep in (0.85, 0.6):
        small = dcvit.compress(model, tuning(Budget(keep_macs=keep)), data=photos())
        reference, found = cost(model.spec), cost(small.spec)
        assert found.macs <= keep * reference.macs
        assert keep * reference.macs - found.macs <= max(0.01 * reference.macs, step(model.spec, tuning())["macs"])
        rows = small.report["blocks"]
        assert [rows[0]["attention"], rows[-1]["attention"]] == ["kept", "kept"]
        assert sorted(small.report["order"]) == [r["block"] for r in rows if r["attention"] == "lost"]
        assert small.variant == "finetune"
        kept = keeps_of(model.spec, small.model)
        assert surgery.with_folded(surgery.cut(model, kept, method="x").spec) == surgery.with_folded(small.spec)
        last = max(small.report["order"]) + 1
        for name, value in small.model.state_dict().items():
            if name.startswith("heads") or (name.startswith("blocks") and int(name.split(".")[1]) > last):
                assert torch.equal(value, before[name]), name
    assert all(torch.equal(before[n], v) for n, v in model.state_dict().items())
    assert all(p.requires_grad for p in small.model.parameters())


def test_only_the_front_learns_and_nothing_is_lost_where_nothing_was_cut():
    teacher = normalised()
    inputs = dcvit.Inputs(teacher, photos(), tuning())
    student = surgery.copy(teacher)
    still = dcvit.Mimic(teacher, last=1, fixed=frozenset())
    still.param_groups(student)
    from vitrim.training import Batch, Step

    loss = still.loss(
        student, Batch(images=images(WIDE, 2, dtype=torch.float32), labels=None), Step(index=0, total=1, epoch=0)
    )
    assert float(loss.detach()) == 0
    cut, _ = dcvit._narrow(surgery.copy(teacher), 1, 20, tuning())
    before = {n: v.clone() for n, v in cut.state_dict().items()}
    dcvit.finetune(
        cut,
        teacher,
        inputs,
        tuning(lr=1e-3),
        last=2,
        steps=30,
        fixed=frozenset(),
        out=None,
        resume=False,
        progress=None,
    )
    for name, value in cut.state_dict().items():
        learns = not name.startswith(("heads", "blocks.3"))
        assert torch.equal(before[name], value) != learns, name
    start = {**cut.state_dict(), **before}
    x = images(WIDE, 8, dtype=torch.float32)
    aim = teacher(x, want=("tokens",))["tokens"]
    after = (cut(x, want=("tokens",))["tokens"] - aim).square().mean()
    cut.load_state_dict(start)
    assert after < (cut(x, want=("tokens",))["tokens"] - aim).square().mean()


def test_fine_tuning_is_resumed_between_trials(tmp_path):
    model, settings_ = normalised(), tuning(Budget(keep_macs=0.7))
    whole = dcvit.compress(model, settings_, data=photos())

    def stop(stage: str, done: int, total: int, **facts: object) -> None:
        if stage.startswith("trial of block 2") and done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dcvit.compress(model, settings_, data=photos(), folder=tmp_path, progress=stop)
    again = dcvit.compress(model, settings_, data=photos(), folder=tmp_path, resume=True)
    assert again.report["order"] == whole.report["order"]
    for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_paper_preset_and_steps_after_the_closed_form_run():
    spec = replace(WIDE, blocks=tuple(replace(b, mlp=MlpSpec(hidden=128)) for b in WIDE.blocks))
    model = normalised(spec)
    paper = dcvit.compress(model, tuning(Budget(keep_macs=0.7), preset="paper", steps=2), data=photos())
    assert cost(paper.spec).macs <= 0.7 * cost(spec).macs
    runs = [
        dcvit.compress(
            model, config(Budget(keep_macs=0.6), finetune_steps=n, lr=1e-3, augment=Augment()), data=photos()
        )
        for n in (0, 20)
    ]
    assert runs[0].spec == runs[1].spec
    assert not all(
        torch.equal(a, b) for a, b in zip(runs[0].model.parameters(), runs[1].model.parameters(), strict=True)
    )


def test_metric_images_become_typical_and_depend_on_the_seed_alone():
    model = normalised()
    one = dcvit.synthesise(model, 4, 30, seed=0, size_px=(16, 16))
    assert torch.equal(one, dcvit.synthesise(model, 4, 30, seed=0, size_px=(16, 16)))
    assert not torch.equal(one, dcvit.synthesise(model, 4, 30, seed=1, size_px=(16, 16)))
    assert one.abs().max() <= 2 + 1e-6  # valid pixels
    noise = dcvit.synthesise(model, 4, 1, seed=0, size_px=(16, 16))
    sharp, flat = (model(v).softmax(-1).max(-1).values.mean() for v in (one, noise))
    assert sharp > flat
    assert dcvit.jpeg_round_trip(one, PREPROCESS).shape == one.shape


# -------------------------------------------------------------------------------------------------------------- end to end


def test_fifty_photos_keep_the_built_in_model(tmp_path):
    model = vitrim.load("builtin:cifar10-vit-micro")
    family = dcvit.compress_family(
        model, DcvitConfig(images=50), [Budget(keep_macs=k) for k in (0.8, 0.5)], data="sample"
    )
    plain = surgery.cut(model, keeps_of(model.spec, family[1].model), method="cut")
    count = 300
    dense = vitrim.evaluate(model, "sample", limit=count)["top1"]
    gentle, hard, cut = (
        vitrim.evaluate(m, "sample", limit=count)["top1"] for m in (family[0].model, family[1].model, plain)
    )
    dropped = vitrim.evaluate(surgery.drop(model, blocks=[2, 3, 4]), "sample", limit=count)["top1"]
    assert gentle > dense - 0.03
    assert hard > dense - 0.06
    assert hard > cut + 0.05
    assert hard > dropped + 0.05
    family[1].save(tmp_path / "small")
    again = vitrim.load(str(tmp_path / "small"))
    x = images(model.spec, 2, dtype=torch.float32)
    assert torch.equal(again(x), family[1].model(x))
    assert again.selection == family[1].selection


def test_blocks_are_ranked_as_real_images_rank_their_plain_cuts(tmp_path: Path) -> None:
    model = vitrim.load("builtin:cifar10-vit-micro")
    config = DcvitConfig(images=64, probe_images=16)
    inputs = dcvit.Inputs(model, "sample", config)
    rest: dict[str, Any] = {"space": space_of(model.spec, config), "folder": None, "resume": False, "progress": None}
    scores, _ = dcvit.score(model, inputs, config, room=tmp_path, **rest)
    ours = [one.bare.loss(256) for one in scores if one.bare is not None]
    held = opened.open("sample", split="validation", labelled=False).take(64, 0, balanced=False)
    assert model.config.preprocess is not None
    ((x, _),) = opened.batches(held, opened.evaluation(model.config.preprocess), 64)
    cuts = [dcvit._narrow(model, i, 256, config)[0] for i in range(len(model.blocks))]
    theirs = [dcvit._mismatch(model, small, x, 64) for small in cuts]
    ranks = torch.stack([torch.tensor(values).argsort().argsort().double() for values in (ours, theirs)])
    assert len(ours) == 6
    assert float(torch.corrcoef(ranks)[0, 1]) > 0.5


# ----------------------------------------------------------------------------------------- two limits, at and above the floor


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
            shape = dcvit.structure(space, chosen, budget)
            order = dcvit.candidates(space)
            scores = {str(i): data.draw(st.floats(0, 1)) for i in order}
            ranked = sorted(order, key=lambda i: (scores[str(i)], i))
            if not shape.k:
                continue
            picked, kept = dcvit.chosen_blocks(space, ranked, shape, limits, scores)
        except BudgetError:
            continue
        found = cost(space.spec(narrowed(space, {i: kept[i] for i in picked})))
        assert not exceeded(found, limits)
        assert kept[picked[0]] == shape.hidden[picked[0]]


@pytest.mark.parametrize("limits", [{"keep_macs": 0.69, "keep_params": 0.6}, {"keep_macs": 0.8}])
def test_fine_tuning_keeps_two_limits_on_an_uneven_network(limits):
    merge = Merge(at="end", axis="h", keep=2)
    blocks = list(WIDE.blocks)
    blocks[1] = replace(blocks[1], steps=(merge,))
    blocks[2] = replace(blocks[2], mlp=MlpSpec(hidden=160))
    model = normalised(replace(WIDE, blocks=tuple(blocks)))
    budget = Budget(**limits)
    small = dcvit.compress(model, tuning(budget), data=photos())
    assert not exceeded(cost(small.spec), budget.limits(cost(model.spec)))


def test_equal_images_and_unsaid_normalisation_are_refused_by_every_form_before_work():
    seen: list[str] = []
    same = photos(1).expand(16, -1, -1, -1)
    with pytest.raises(DataError, match="are equal"):
        dcvit.compress(normalised(), tuning(Budget(keep_macs=0.6)), data=same)
    with pytest.raises(DataError, match="how the model normalises"):
        dcvit.compress(
            make(WIDE),
            config(Budget(keep_macs=0.6), finetune_steps=2),
            data=images(WIDE, 16),
            progress=lambda stage, *_, **__: seen.append(stage),
        )
    assert not seen


def test_scores_of_another_model_are_not_taken_up(tmp_path):
    x = photos()
    dcvit.compress(normalised(), config(Budget(keep_macs=0.6)), data=x, folder=tmp_path)
    other = normalised()
    with torch.no_grad():
        other.blocks[0].mlp.fc1.weight.mul_(1.01)
    with pytest.raises(TrainingError, match="weights"):
        dcvit.compress(other, config(Budget(keep_macs=0.6)), data=x, folder=tmp_path, resume=True)


def test_an_encoders_metric_images_are_no_more_than_were_asked_for():
    model = normalised(replace(WIDE, outputs=()))
    inputs = dcvit.Inputs(model, photos(40), tuning(metric_images=6, images=40))
    read = []
    plain_batches = inputs.batches
    inputs.batches = lambda: (read.append(len(x)) or x for x in plain_batches())  # type: ignore[method-assign]
    assert len(dcvit._metric_set(model, inputs, tuning(metric_images=6), None)) == 6
    assert sum(read) < 20


def test_streams_above_the_bound_lie_in_files(monkeypatch):
    """So memory does not grow with the images: each batch of each place goes through one file, and none stays behind."""
    monkeypatch.setattr(cf.streams, "IN_MEMORY_BYTES", 0)
    seen: dict[str, int] = {"put": 0, "file": 0}
    put, file = cf.StreamCache.put, cf.StreamCache._file

    def watch_put(self, stream):
        seen["put"] += 1
        put(self, stream)

    def watch_file(self, i, x):
        seen["file"] += 1
        assert self.folder is not None
        assert len(list(self.folder.glob(f"{self.name}-*.bin"))) <= 2 * 64  # this place and the one before
        return file(self, i, x)

    monkeypatch.setattr(cf.StreamCache, "put", watch_put)
    monkeypatch.setattr(cf.StreamCache, "_file", watch_file)
    in_files = dcvit.compress(normalised(), config(Budget(keep_macs=0.6)), data=photos())
    assert seen["put"] == seen["file"] > 8
    monkeypatch.undo()
    in_memory = dcvit.compress(normalised(), config(Budget(keep_macs=0.6)), data=photos())
    state = in_memory.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in in_files.model.state_dict().items())


def test_the_last_attention_stays_where_the_budget_allows_it():
    """Losses are added block by block, and say that attentions are worth little; the class token needs one."""
    losses = [{o: (2e-3 - 1e-3 * o.attention) + 1 - o.hidden / 64 for o in lv.choices()} for lv in SPACE.levels]
    budget = Budget(keep_macs=0.45)
    blind, sighted = (allocate(SPACE, losses, budget, sighted=way) for way in (False, True))
    assert not any(o.attention for o in blind)
    assert sum(o.attention for o in sighted) == 1
    limits = budget.limits(cost(WIDE))
    assert not exceeded(cost(SPACE.spec(sighted)), limits)
    least = cost(SPACE.spec([Choice()] * 4)).macs
    tight = Budget(max_macs=least + 1000)
    assert not any(o.attention for o in allocate(SPACE, losses, tight, sighted=True))
