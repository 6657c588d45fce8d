"""What holds for every method, whatever it cuts."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.specs import images, make, vit
from vitrim import methods
from vitrim.budget import Budget
from vitrim.counting import cost
from vitrim.errors import BudgetError, ConfigError, TrainingError
from vitrim.model import Vit
from vitrim.spec import ModelSpec, Preprocess

SPEC = vit(blocks=3, width=32, heads=2, head_dim=16, hidden=64)
SMALL: dict[str, dict[str, Any]] = {
    "auto": {"images": 8, "batch_size": 4, "builds": 1},
    "comcat": {"images": 6, "probe_images": 2, "batch_size": 4},
    "dcvit": {"images": 8, "probe_images": 2, "batch_size": 4},
    "uvc": {"steps": 12, "batch_size": 4, "device": "cpu"},
}
"""Settings that make a method quick on a tiny network."""


@pytest.fixture(params=list(methods.METHODS))
def method(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def configured(method: str, keep: float = 0.6, **settings: Any) -> Any:
    return methods.configure(method, {"budget": Budget(keep_macs=keep), **SMALL[method], **settings})


def scaled(spec: ModelSpec) -> ModelSpec:
    """With LayerScale, which a cut folds away."""
    blocks = tuple(
        replace(
            block,
            attention=None if block.attention is None else replace(block.attention, layer_scale=True),
            mlp=None if block.mlp is None else replace(block.mlp, layer_scale=True),
        )
        for block in spec.blocks
    )
    return replace(spec, blocks=blocks)


def halves(model: Vit, block: int) -> dict[str, torch.Tensor]:
    return {name: value for name, value in model.state_dict().items() if name.startswith(f"blocks.{block}.")}


def known(spec: ModelSpec) -> Vit:
    """A float32 model that says how its images are normalised."""
    model = make(spec, dtype=torch.float32)
    sides = (spec.image_px[0], spec.image_px[1])
    how = Preprocess(mean=(0.5,) * spec.channels, std=(0.25,) * spec.channels, size_px=sides)
    model.config = replace(model.config, preprocess=how)
    return model


def data_for(spec: ModelSpec, method: str, count: int = 16) -> Any:
    """Pictures as bytes, with labels where the method learns from them."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randint(0, 256, (count, spec.channels, *spec.image_px), generator=generator, dtype=torch.uint8)
    labels = methods.plan(method, spec, None)["needs"]["labels"]
    return (x, torch.arange(count) % (spec.classes or 1)) if labels else x


@pytest.mark.parametrize("spec", [SPEC, scaled(SPEC)], ids=["plain", "layer scale"])
def test_frozen_parts_stay_bit_for_bit(method: str, spec: ModelSpec) -> None:
    model = known(spec)
    small = methods.compress(
        model, configured(method, 0.75, freeze=("blocks.0", "blocks.2.mlp")), data=data_for(spec, method)
    )
    assert cost(small.spec).macs <= 0.75 * cost(spec).macs
    assert small.spec.blocks[0] == spec.blocks[0]
    assert small.spec.blocks[2].mlp == spec.blocks[2].mlp
    before, after = halves(model, 0), halves(small.model, 0)
    assert all(torch.equal(before[name], after[name]) for name in before)
    before, after = halves(model, 2), halves(small.model, 2)
    assert all(torch.equal(before[name], after[name]) for name in before if ".mlp." in name)


def test_freezing_narrows_the_reachable_range(method: str) -> None:
    free, held = (methods.plan(method, SPEC, configured(method, 1.0, freeze=names)) for names in ((), ("blocks.0-1",)))
    assert held["range"]["macs"][0] > free["range"]["macs"][0]
    share = (free["range"]["macs"][0] + held["range"]["macs"][0]) / 2 / cost(SPEC).macs
    methods.plan(method, SPEC, configured(method, share))
    with pytest.raises(BudgetError, match="out of reach"):
        methods.plan(method, SPEC, configured(method, share, freeze=("blocks.0-1",)))


def test_a_wrong_frozen_name_is_refused_before_the_data_are_looked_at(method: str) -> None:
    with pytest.raises(ConfigError, match="freeze="):
        methods.compress(known(SPEC), configured(method, freeze=("blocks.9",)), data="no such folder")


def test_the_callers_model_random_state_and_threads_are_left_alone(method: str) -> None:
    model = known(SPEC)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random, threads, grad = torch.get_rng_state(), torch.get_num_threads(), torch.is_grad_enabled()
    small = methods.compress(model, configured(method), data=data_for(SPEC, method))
    assert torch.equal(random, torch.get_rng_state())
    assert (torch.get_num_threads(), torch.is_grad_enabled()) == (threads, grad)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    with torch.no_grad():
        for parameter in small.model.parameters():
            parameter.zero_()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_same_seed_gives_the_same_network(method: str) -> None:
    first, second = (
        methods.compress(known(SPEC), configured(method), data=data_for(SPEC, method)).model for _ in range(2)
    )
    assert first.spec == second.spec
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_nothing_to_cut_leaves_the_network_as_it_is(method: str) -> None:
    model, x = known(SPEC), images(SPEC, dtype=torch.float32)
    small = methods.compress(model, configured(method, 1.0), data=data_for(SPEC, method))
    assert torch.equal(small.model(x), model(x))


def test_the_plan_says_range_tolerance_needs_and_what_stays(method: str) -> None:
    planned = methods.plan(method, SPEC, configured(method))
    assert set(planned) == {"method", "variant", "range", "step", "needs", "dense"}
    assert set(planned["needs"]) == {"images", "labels", "training"}
    whole = cost(SPEC)
    for name in ("macs", "params", "memory_bytes", "file_bytes"):
        low, high = planned["range"][name]
        assert 0 < low < high == getattr(whole, name)
        assert 0 <= planned["step"][name] < high


def test_the_lowest_share_of_the_range_is_reached_and_less_is_refused(method: str) -> None:
    low, _ = methods.plan(method, SPEC, configured(method))["range"]["macs"]
    share = low / cost(SPEC).macs
    small = methods.compress(known(SPEC), configured(method, share * 1.001), data=data_for(SPEC, method))
    assert cost(small.spec).macs <= share * 1.001 * cost(SPEC).macs
    with pytest.raises(BudgetError, match="out of reach"):
        methods.compress(known(SPEC), configured(method, share * 0.99), data="no such folder")


def test_the_result_is_near_its_budget(method: str) -> None:
    small, whole = methods.compress(known(SPEC), configured(method), data=data_for(SPEC, method)), cost(SPEC)
    step = methods.plan(method, SPEC, configured(method))["step"]["macs"]
    assert 0.6 * whole.macs - max(0.01 * whole.macs, step) <= cost(small.spec).macs <= 0.6 * whole.macs


def test_a_finished_run_is_refused_and_resumed_to_the_same_network(method: str, tmp_path: Path) -> None:
    """A run that leaves nothing behind begins anew instead."""
    made = methods.compress(known(SPEC), configured(method), data=data_for(SPEC, method), folder=tmp_path)
    if any(tmp_path.iterdir()):
        with pytest.raises(TrainingError, match="resume"):
            methods.compress(known(SPEC), configured(method), data=data_for(SPEC, method), folder=tmp_path)
        with pytest.raises(TrainingError, match="another"):
            methods.compress(
                known(SPEC), configured(method, seed=3), data=data_for(SPEC, method), folder=tmp_path, resume=True
            )
    again = methods.compress(known(SPEC), configured(method), data=data_for(SPEC, method), folder=tmp_path, resume=True)
    assert again.spec == made.spec
    assert all(torch.equal(a, b) for a, b in zip(made.model.parameters(), again.model.parameters(), strict=True))


def test_the_report_is_plain_json_and_names_its_warnings_as_sentences(method: str) -> None:
    small = methods.compress(known(SPEC), configured(method), data=data_for(SPEC, method))
    assert json.loads(json.dumps(small.report)) == small.report
    assert json.loads(json.dumps(small.history)) == small.history
    assert all(isinstance(text, str) and text.endswith(".") for text in small.report.get("warnings", ()))


def test_units_that_change_nothing_are_not_paid_for(method: str) -> None:
    """Whatever the slack of the budget: a third of each MLP, the first block's whole but for two units."""
    model = known(SPEC)
    with torch.no_grad():
        for block, alive in zip(model.blocks, (2, 40, 40), strict=True):
            block.mlp.fc2.weight[:, alive:] = 0
    small = methods.compress(model, configured(method, 0.97), data=data_for(SPEC, method)).model
    for block in small.blocks:
        if block.spec.mlp is not None and block.spec.mlp.hidden > 1:
            assert block.mlp.reader.weight.any(dim=0).all()
