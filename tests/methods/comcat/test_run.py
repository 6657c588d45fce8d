"""COMCAT: exact at full rank, within the budget and close to it, dense where that is cheaper."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.specs import close, images, make, specs, vit
from vitrim import surgery
from vitrim.allocation import Allocator, parts_of
from vitrim.budget import Budget
from vitrim.counting import RESOURCES, cost
from vitrim.errors import BudgetError, ConfigError, DataError
from vitrim.methods import compress, configure, plan
from vitrim.methods.comcat import ComcatConfig, allocate, floor, losses, ranks_of, space_of, tolerance, with_ranks
from vitrim.methods.comcat.run import Energies, bounds, explicit
from vitrim.spec import AttentionSpec, BlockSpec, MlpSpec, ModelSpec, Output, Position, Preprocess, spec_hash
from vitrim.surgery import Keep, cut

WIDE = vit(width=32, heads=2, head_dim=16, hidden=64)


def settings_for(budget: Budget | None = None, **fields: object) -> ComcatConfig:
    return ComcatConfig(budget=budget, **{"images": 6, "probe_images": 2, "batch_size": 4, **fields})  # type: ignore[arg-type]


def pixels(spec: ModelSpec, count: int = 6) -> torch.Tensor:
    return images(spec, count)


def deit(width: int, classes: int = 1000) -> ModelSpec:
    heads = width // 64
    block = BlockSpec(
        attention=AttentionSpec(heads=heads, qk_dim=64, v_dim=64, scale=0.125), mlp=MlpSpec(hidden=4 * width)
    )
    return ModelSpec(
        image_px=(224, 224),
        patch_px=(16, 16),
        width=width,
        position=Position(grid=(14, 14)),
        blocks=(block,) * 12,
        outputs=(Output(classes=classes),),
    )


def uniform(spec: ModelSpec, **ranks: int) -> ModelSpec:
    return with_ranks(spec, [ranks] * len(spec.blocks))


def drawn(spec: ModelSpec, energy: Callable[[int, str, int], list[float]]) -> list[dict[str, list[float]]]:
    """Energies of every part on offer, from its block, its name and how many components it has."""
    space = space_of(spec)
    return [
        {part: energy(i, part, bounds(block, spec.width)[part].full) for part in parts_of(space, i)}
        for i, block in enumerate(space.base.blocks)
    ]


def falling(generator: torch.Generator) -> Callable[[int, str, int], list[float]]:
    """Random energies, largest first."""
    return lambda i, part, count: sorted(torch.rand(count, generator=generator).square().tolist(), reverse=True)


def ranks_for(spec: ModelSpec, energies: Energies, budget: Budget, align: int = 8) -> list[dict[str, int]]:
    space = space_of(spec)
    choices = allocate(Allocator(space, losses(space, energies)), budget, align=align)
    return [dict(own) for own in ranks_of(space, choices)]


def lost_by(energies: Energies, ranks: list[dict[str, int]]) -> float:
    return sum(sum(energies[i][part][rank:]) for i, own in enumerate(ranks) for part, rank in own.items())


# -------------------------------------------------------------------------------------------------------------- exactness


@pytest.mark.parametrize("variant", ["whitened", "svd"])
@settings(max_examples=25)
@given(spec=specs())
def test_full_rank_changes_no_output(variant, spec):
    model, x = make(spec), images(spec)
    space = space_of(spec)
    ranks: list[dict[str, int]] = [{} for _ in spec.blocks]
    for i, whole in enumerate(space.whole):
        for part, name in (("qk", "qk"), ("v", "vo")):
            if part in parts_of(space, i) and getattr(whole, part) <= spec.width:
                ranks[i][name] = getattr(whole, part)
    small = compress(model, settings_for(ranks=tuple(ranks), variant=variant), data=pixels(spec))
    assert close(small.model(x), model(x), 1e-9)
    rotated = {part for entry in small.selection.steps[-1].blocks if entry for part in entry.values()}
    assert rotated <= {"rotated"}


def test_a_linear_at_its_own_rank_is_exact():
    """Weights of a rank below break-even lose nothing."""
    spec = replace(WIDE, blocks=(replace(WIDE.blocks[0], mlp=MlpSpec(hidden=64, fc1_rank=6, fc2_rank=5)),) * 2)
    model, x = make(spec), images(spec)
    cheaper = {"fc1": 5, "fc2": 5}
    with pytest.raises(ConfigError, match="fc2 rank 5; expected 1 to 4"):
        compress(model, settings_for(ranks=(cheaper, None)), data=pixels(spec))
    with torch.no_grad():
        model.blocks[0].mlp.fc1a.weight[5] = 0
    small = compress(model, settings_for(ranks=({"fc1": 5}, None)), data=pixels(spec))
    assert small.spec.blocks[0].mlp.fc1_rank == 5
    assert close(small.model(x), model(x), 1e-9)


def test_float32_full_rank_is_close():
    spec = vit(width=64, blocks=4, heads=2, head_dim=32, hidden=128)
    model = make(spec, dtype=torch.float32)
    small = compress(model, settings_for(ranks=({"qk": 32, "vo": 32},) * 4), data=pixels(spec).float())
    x = images(spec, dtype=torch.float32)
    assert close(small.model(x), model(x), 1e-4)


@pytest.mark.parametrize("variant", ["whitened", "svd"])
def test_the_stated_budget_of_everything_changes_nothing(variant):
    spec = replace(WIDE, blocks=tuple(replace(b, mlp=replace(b.mlp, layer_scale=True)) for b in WIDE.blocks))
    model, x = make(spec), images(spec)
    small = compress(model, settings_for(Budget(keep_macs=1.0), variant=variant), data=pixels(spec))
    assert small.spec == spec
    assert torch.equal(small.model(x), model(x))
    assert small.selection.steps[-1].blocks == (None, None)


def test_output_error_falls_as_the_budget_grows():
    model, x = make(WIDE), images(WIDE, 8)
    lost = []
    for share in (0.3, 0.5, 0.7, 0.9):
        small = compress(model, settings_for(Budget(keep_macs=share), images=8), data=x)
        lost.append(float((small.model(x) - model(x)).detach().square().mean()))
    assert lost == sorted(lost, reverse=True)


def test_whitening_loses_less_than_the_plain_decomposition():
    model, x = make(WIDE), images(WIDE, 64)
    mix = torch.randn(WIDE.channels, WIDE.channels, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    x = torch.einsum("cd,bdhw->bchw", mix, x).cumsum(-1) / 4  # smooth images, as real ones are
    lost = {}
    for variant in ("whitened", "svd"):
        ranks = ({"qk": 4, "vo": 4, "fc1": 8, "fc2": 8},) * 2
        small = compress(model, settings_for(ranks=ranks, variant=variant, images=64), data=x)
        lost[variant] = float((small.model(x) - model(x)).detach().square().mean())
    assert lost["whitened"] < lost["svd"]


# ------------------------------------------------------------------------------------------------------- counts and budget


def test_counts_are_those_of_the_paper_and_of_its_corrections():
    small, base = deit(384), deit(768)
    assert cost(small).macs == 4_598_882_304
    assert cost(base).macs == 17_563_828_224
    attend = 12 * 197 * 197 * 2 * 384
    assert cost(small).macs - attend == pytest.approx(4.2412e9, rel=1e-4)
    a = cost(uniform(small, qk=32, v=32, fc1=152, fc2=152))
    assert (a.params, a.macs) == (11_348_584, 2_314_010_112)
    b = cost(uniform(base, qk=24, v=24, fc1=256, fc2=256))
    assert (b.params, b.macs) == (35_818_600, 7_123_950_336)


@settings(max_examples=60)
@given(spec=specs(), data=st.data())
def test_the_result_is_within_the_budget_and_near_it(spec, data):
    """Law 7, over random networks, resources and energies."""
    dense, lowest = cost(spec), floor(spec)
    name = data.draw(st.sampled_from(["keep_macs", "keep_params", "max_memory_mb", "max_file_mb"]))
    resource = {
        "keep_macs": "macs",
        "keep_params": "params",
        "max_memory_mb": "memory_bytes",
        "max_file_mb": "file_bytes",
    }[name]
    share = data.draw(st.floats(0.05, 1.0))
    value = share if name.startswith("keep") else share * getattr(dense, resource) / 1e6
    budget = Budget(**{name: value})
    energies = drawn(spec, falling(torch.Generator().manual_seed(data.draw(st.integers(0, 99)))))
    if budget.limits(dense)[resource] < getattr(lowest, resource):
        with pytest.raises(BudgetError, match="out of reach"):
            ranks_for(spec, energies, budget)
        return
    ranks = ranks_for(spec, energies, budget)
    used = cost(with_ranks(surgery.with_folded(spec), ranks))
    limit = budget.limits(dense)[resource]
    assert getattr(used, resource) <= limit
    if any(ranks):
        slack = limit - getattr(used, resource)
        assert slack <= max(getattr(dense, resource) / 100, tolerance(spec)[resource])


@pytest.mark.parametrize(
    "budget",
    [
        Budget(keep_macs=0.5),
        Budget(keep_params=0.4),
        Budget(keep_macs=0.7, keep_params=0.5),
        Budget(keep_macs=0.45, max_file_mb=50.0, max_memory_mb=60.0),
    ],
    ids=str,
)
def test_deit_small_meets_every_kind_of_budget_with_aligned_ranks(budget):
    spec = deit(384)
    ranks = ranks_for(spec, drawn(spec, lambda i, part, count: [0.97**k for k in range(count)]), budget)
    used, limits = cost(with_ranks(spec, ranks)), budget.limits(cost(spec))
    slack = {name: (limit - getattr(used, name)) / getattr(cost(spec), name) for name, limit in limits.items()}
    assert min(slack.values()) >= 0
    assert min(slack.values()) <= 0.01
    assert all(rank % 8 == 0 for own in ranks for rank in own.values())


def test_no_linear_is_kept_in_factors_that_are_dearer_than_itself():
    spec = deit(192, classes=10)
    flat = drawn(spec, lambda i, part, count: [1.0] * count)
    for share in (0.5, 0.9, 0.95, 0.99):
        for own in ranks_for(spec, flat, Budget(keep_macs=share)):
            assert all(own.get(part, 0) * (192 + 768) < 192 * 768 for part in ("fc1", "fc2"))
    with pytest.raises(ConfigError, match="expected 1 to 153"):
        explicit(space_of(spec), settings_for(ranks=({"fc1": 154}, *(None,) * 11)))


def test_greedy_is_within_one_purchase_of_the_best():
    spec = vit(width=8, blocks=1, heads=1, head_dim=6, hidden=12, channels=1)
    space = space_of(spec)
    generator = torch.Generator().manual_seed(0)
    for share in (0.5, 0.6, 0.75, 0.9):
        energies = drawn(
            spec, lambda i, part, count: sorted(torch.rand(count, generator=generator).tolist(), reverse=True)
        )
        budget = Budget(keep_macs=share)
        limit = budget.limits(cost(spec))["macs"]
        options = ([own] for own in every_rank(spec))
        best = min(lost_by(energies, ranks) for ranks in options if cost(with_ranks(spec, ranks)).macs <= limit)
        found = lost_by(energies, ranks_for(spec, energies, budget, align=1))
        jump = max(sum(e[getattr(space.levels[0], part)[1] :]) for part, e in energies[0].items())
        largest = max(max(e) for e in energies[0].values())
        assert best - 1e-9 <= found <= best + max(largest, jump)


def every_rank(spec: ModelSpec) -> list[dict[str, int]]:
    """All that the first block may become."""
    space = space_of(spec)
    choices = space.levels[0].choices()
    return [dict(ranks_of(space, space.with_choice(0, choice))[0]) for choice in choices]


def test_allocation_beats_uniform_ranks_on_its_own_objective():
    spec = deit(192)
    generator = torch.Generator().manual_seed(1)

    def energy(i: int, part: str, count: int) -> list[float]:
        rate, size = 0.9 + 0.09 * float(torch.rand((), generator=generator)), float(torch.rand((), generator=generator))
        return [size * rate**k for k in range(count)]

    energies = drawn(spec, energy)
    flat = uniform(spec, qk=32, v=32, fc1=80, fc2=80)
    ranks = ranks_for(spec, energies, Budget(max_macs=cost(flat).macs))
    same = [{part: 32 if part in ("qk", "v") else 80 for part in own} for own in energies]
    assert lost_by(energies, ranks) < lost_by(energies, same)


def test_a_finer_alignment_that_does_not_fit_is_passed_over():
    """The least of a narrow part may be 3 of 12 ranks where steps are of eight, and 4 where they are of four."""
    spec = vit(width=12, blocks=2, heads=1, head_dim=2, hidden=12, channels=1)
    energies = drawn(spec, falling(torch.Generator().manual_seed(0)))
    lowest, whole = floor(spec), cost(spec)
    for share in (0.02, 0.05, 0.1, 0.15, 0.2):
        budget = Budget(max_params=lowest.params + int(share * (whole.params - lowest.params)))
        assert budget.met_by(cost(with_ranks(spec, ranks_for(spec, energies, budget))), whole)


# -------------------------------------------------------------------------------------------------------------- the method


@settings(max_examples=20)
@given(spec=specs(), share=st.floats(0.1, 0.95))
def test_any_network_is_cut_to_its_budget_or_refused(spec, share):
    model = make(spec)
    budget = Budget(keep_macs=share)
    config = settings_for(budget)
    if not budget.met_by(floor(spec), cost(spec)):
        with pytest.raises(BudgetError, match="out of reach"):
            compress(model, config, data=pixels(spec))
        return
    small = compress(model, config, data=pixels(spec))
    assert budget.met_by(cost(small), cost(spec))
    assert torch.isfinite(small.model(images(spec))).all()
    assert small.spec == small.model.spec
    parts = {(row["block"], row["part"]) for row in small.report["groups"]}
    for i, block in enumerate(spec.blocks):
        here = (["qk", "vo"] if block.attention else []) + (["fc1", "fc2"] if block.mlp else [])
        assert all((i, part) in parts or f"block {i} {part}" in small.report["dense"] for part in here)


def test_the_caller_keeps_model_and_random_state_and_gets_the_same_twice():
    model = make(WIDE)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state, random = torch.get_rng_state(), images(WIDE, 20)
    config = settings_for(Budget(keep_macs=0.5))
    one, two = (compress(model, config, data=random, seed=3) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert one.spec == two.spec
    assert all(
        torch.equal(a, b) for a, b in zip(one.model.state_dict().values(), two.model.state_dict().values(), strict=True)
    )
    other = compress(model, config, data=random, seed=4)
    assert any(
        a.shape != b.shape or not torch.equal(a, b)
        for a, b in zip(one.model.state_dict().values(), other.model.state_dict().values(), strict=True)
    )


def test_a_network_that_is_cut_already_is_cut_again_and_says_so():
    keep = Keep(heads=(1,), qk=((0, 2, 3, 5, 6, 7, 8, 9),), v=(tuple(range(12)),), hidden=tuple(range(40)))
    model = cut(make(WIDE), (keep, Keep(attention=False)), method="uvc")
    once = compress(model, settings_for(Budget(keep_macs=0.7)), data=pixels(WIDE))
    twice = compress(once.model, settings_for(Budget(keep_macs=0.7)), data=pixels(WIDE))
    assert cost(twice).macs <= 0.7 * cost(once).macs <= 0.49 * cost(model).macs
    assert [s.method for s in twice.selection.steps] == ["uvc", "comcat", "comcat"]
    assert twice.selection.steps[-1].parent == spec_hash(once.spec)
    assert twice.selection.steps[-1].variant == twice.variant == "whitened"


def test_one_rank_a_head_runs_and_queries_and_values_may_differ():
    small = compress(make(WIDE), settings_for(ranks=({"qk": 1, "vo": 5}, {"fc1": 1})), data=pixels(WIDE))
    a = small.spec.blocks[0].attention
    assert a is not None
    assert (a.qk_dim, a.v_dim, a.scale) == (1, 5, WIDE.blocks[0].attention.scale)
    assert torch.isfinite(small.model(images(WIDE))).all()


def test_layer_scale_is_folded_and_the_parent_is_the_given_model():
    block = WIDE.blocks[0]
    spec = replace(WIDE, blocks=(replace(block, attention=replace(block.attention, layer_scale=True)),) * 2)
    model, x = make(spec), images(spec)
    small = compress(model, settings_for(ranks=({"vo": 16, "qk": 16},) * 2), data=pixels(spec))
    assert close(small.model(x), model(x))
    assert small.selection.steps[-1].parent == spec_hash(spec)


def test_images_go_through_the_models_own_preprocessing():
    model = make(WIDE, dtype=torch.float32)
    model.config = replace(model.config, preprocess=Preprocess(mean=(0.5,) * 3, std=(0.5,) * 3, size_px=(16, 16)))
    raw = torch.randint(0, 256, (12, 3, 20, 20), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    seen: list[tuple[str, int, int]] = []
    small = compress(
        model,
        settings_for(Budget(keep_macs=0.5)),
        data=raw,
        progress=lambda stage, done, total, **_: seen.append((stage, done, total)),
    )
    assert cost(small).macs <= 0.5 * cost(model).macs
    assert ("calibrate", 6, 6) in seen
    assert {stage for stage, _, _ in seen} == {"calibrate", "factorise", "probe"}


def test_plain_svd_needs_no_images_and_whitening_does():
    small = compress(make(WIDE), settings_for(Budget(keep_macs=0.5), variant="svd"))
    assert small.variant == small.selection.steps[-1].variant == "svd"
    assert small.report["metric"] == "share of each group's energy"
    with pytest.raises(DataError, match="unlabelled images"):
        compress(make(WIDE), settings_for(Budget(keep_macs=0.5)))


@pytest.mark.parametrize(
    "change",
    [{"factorise_mlp": False}, {"align": 8}, {"probe_images": 0}, {"ridge": 10.0}, {"images": 3}, {"variant": "svd"}],
    ids=str,
)
def test_each_setting_changes_something(change):
    model, x = make(vit(width=32, heads=2, head_dim=16, hidden=64, image=24)), images(vit(image=24), 6)
    usual, other = (
        compress(model, settings_for(Budget(keep_macs=0.6), **{"align": 1, **fields}), data=x).model.state_dict()
        for fields in ({}, change)
    )
    assert usual.keys() != other.keys() or any(
        usual[name].shape != other[name].shape or not torch.allclose(usual[name], other[name]) for name in usual
    )


def test_the_batch_size_changes_nothing_but_rounding():
    model, x = make(WIDE), images(WIDE)
    one, two = (
        compress(model, settings_for(Budget(keep_macs=0.5), batch_size=size), data=pixels(WIDE)).model
        for size in (2, 6)
    )
    assert one.spec == two.spec
    assert close(one(x), two(x), 1e-8)


# ------------------------------------------------------------------------------------------------------ plans and refusals


def test_a_plan_needs_the_spec_alone():
    found = plan("comcat", deit(384))
    low, high = found["range"]["macs"]
    assert 0 < low < 0.1 * high == 0.1 * 4_598_882_304
    assert found["needs"] == {"images": 256, "labels": False, "training": False}
    assert set(found["step"]) == set(RESOURCES)
    assert found["step"]["macs"] < 0.01 * high
    with pytest.raises(BudgetError, match="comcat reaches"):
        plan("comcat", deit(384), ComcatConfig(budget=Budget(keep_macs=0.001)))


def test_an_unreachable_budget_is_refused_before_any_image_is_read():
    class Untouchable:
        def __len__(self) -> int:
            raise AssertionError("read")

    with pytest.raises(BudgetError, match="out of reach"):
        compress(make(WIDE), settings_for(Budget(keep_macs=0.001)), data=Untouchable())


@pytest.mark.parametrize(
    ("ranks", "said"),
    [
        (({"qk": 4},), "ranks for 1 blocks"),
        (({"fc3": 4}, None), "did you mean 'fc[12]'"),
        (({"qk": 17}, None), "expected 1 to 16"),
        (({"vo": 0}, None), "expected 1 to 16"),
    ],
    ids=["blocks", "part", "high", "zero"],
)
def test_ranks_that_fit_no_network_are_refused(ranks, said):
    with pytest.raises(ConfigError, match=said):
        compress(make(WIDE), settings_for(ranks=ranks), data=pixels(WIDE))


def test_ranks_above_the_budget_are_refused():
    with pytest.raises(BudgetError, match="exceed the budget"):
        compress(make(WIDE), settings_for(Budget(keep_macs=0.3), ranks=({"qk": 4}, None)), data=pixels(WIDE))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "neither budget nor ranks"),
        ({"bugdet": 1}, "did you mean 'budget'"),
        ({"budget": {"keep_macs": 0.5}, "align": 0}, "align=0; expected 1 or more"),
        ({"budget": {"keep_macs": 0.5}, "ridge": 0.0}, "ridge=0.0"),
        ({"budget": {"keep_macs": 2.0}}, "expected a share"),
        ({"budget": {"keep_macs": 0.5}, "variant": "white"}, "'whitened' or 'svd'"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_bad_settings_are_refused(fields, said):
    with pytest.raises(ConfigError, match=said):
        configure("comcat", fields)


def test_unknown_methods_and_configs_are_refused():
    with pytest.raises(ConfigError, match="did you mean 'comcat'"):
        configure("commcat", {})
    with pytest.raises(ConfigError, match="ComcatConfig"):
        compress(make(WIDE), Budget(keep_macs=0.5))


@pytest.mark.parametrize("keep", [0.25, 0.35, 0.5])
def test_aligned_ranks_lose_little_more_than_single_ones(keep):
    """Near the floor of a budget, steps of eight leave no freedom; they give way there."""
    spec = vit(width=64, heads=2, head_dim=32, hidden=128, blocks=3)

    def energy(i: int, part: str, count: int) -> list[float]:
        return [2.0 ** -(r * (1 + i * 2 + (part == "fc1"))) * 10 ** (2 - i) for r in range(count)]

    energies = drawn(spec, energy)

    def lost(align: int) -> float:
        ranks = ranks_for(spec, energies, Budget(keep_macs=keep), align=align)
        assert cost(with_ranks(spec, ranks)).macs <= keep * cost(spec).macs
        return lost_by(energies, ranks)

    assert lost(8) <= 1.2 * lost(1) + 1e-12


def test_another_device_gives_the_same_network_where_the_model_is() -> None:
    spec = vit(blocks=2)
    model, x = make(spec), images(spec, 8)
    here, there = (
        compress(model, settings_for(budget=Budget(keep_macs=0.6), images=8, device=device), data=x).model
        for device in (None, "cpu:0")  # another name for the same place
    )
    assert next(there.parameters()).device == next(model.parameters()).device
    assert here.spec == there.spec
    assert all(torch.equal(a, b) for a, b in zip(here.parameters(), there.parameters(), strict=True))
