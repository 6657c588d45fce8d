"""DC-ViT as a whole: within the budget and close to it, cut equals masked, the rest untouched."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vitrim
from tests.methods.dcvit.kit import WIDE, config, keeps_of, normalised, photos
from tests.specs import close, images, make, specs
from vitrim import surgery
from vitrim.budget import Budget, exceeded
from vitrim.counting import cost
from vitrim.errors import BudgetError, ConfigError, DataError
from vitrim.methods import comcat, dcvit
from vitrim.methods.dcvit import DcvitConfig, floor, tolerance
from vitrim.model import Vit
from vitrim.spec import (
    Pool,
)


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
    assert limit - found <= max(0.01 * high, tolerance(spec, config(align=2))[resource])
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
    slack = [limits[n] - getattr(found, n) - max(0.01 * getattr(reference, n), tolerance(WIDE)[n]) for n in limits]
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
    with pytest.raises(DataError, match="does not say how its images are prepared"):
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


@pytest.mark.slow
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
