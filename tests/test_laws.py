"""The laws of the design, as properties of random specs. Exact ones run in float64."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

from tests.specs import close, images, keeps, make, specs, vit
from vitrim.counting import cost, macs, params
from vitrim.errors import SpecError
from vitrim.model import Gates
from vitrim.spec import Config, ModelSpec, Selection, from_json, has_own_positions, spec_hash, to_json
from vitrim.surgery import (
    Factors,
    Keep,
    allows_exact_tail,
    cut,
    drop,
    exact_tail,
    factorise,
    fold_layer_scale,
    masked_twin,
    resized,
    without_empty,
)

OPEN = Gates(policy="open")


@given(specs())
def test_law_1_json_round_trip_is_the_identity(spec: ModelSpec) -> None:
    assert from_json(to_json(spec)) == spec
    assert hash(from_json(to_json(spec))) == hash(spec)
    assert spec_hash(from_json(to_json(spec))) == spec_hash(spec)
    config = Config(spec=spec)
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_law_1_unknown_keys_are_refused_with_a_hint() -> None:
    data = vit().to_dict()
    data["blocks"][1]["attention"]["qk_dims"] = 3
    with pytest.raises(SpecError, match=r"blocks\[1\].attention: unknown field 'qk_dims'; did you mean 'qk_dim'\?"):
        ModelSpec.from_dict(data)


@given(specs())
def test_law_2_params_equal_those_of_the_built_model(spec: ModelSpec) -> None:
    assert params(spec) == sum(p.numel() for p in make(spec).parameters())


@given(specs())
def test_law_2_torch_counts_twice_the_macs(spec: ModelSpec) -> None:
    model = make(spec)
    model.pad_heads = False
    with FlopCounterMode(display=False) as counter:
        model(images(spec, 1), gates=OPEN)
    assert counter.get_total_flops() == cost(spec).flops == 2 * macs(spec)


@given(specs())
def test_law_2_torch_counts_the_zeros_of_padded_heads_too(spec: ModelSpec) -> None:
    model, found = make(spec), cost(spec)
    with FlopCounterMode(display=False) as counter:
        model(images(spec, 1), gates=OPEN)
    assert counter.get_total_flops() == 2 * (found.macs + found.padding_macs)
    unequal = [
        block.attention for block in spec.blocks if block.attention and block.attention.qk_dim != block.attention.v_dim
    ]
    assert bool(found.padding_macs) == bool(unequal)


@given(specs(restores=True), st.integers(1, 6), st.integers(1, 6))
@settings(max_examples=30)
def test_a_network_that_restores_gives_the_shapes_of_one_that_merges_nothing(
    spec: ModelSpec, rows: int, cols: int
) -> None:
    whole = replace(spec, restore=False, blocks=tuple(replace(block, steps=()) for block in spec.blocks))
    both = make(spec), make(whole)
    want = ("logits", "outputs", "reads", "pooled", "tokens")
    want += tuple(f"{tap}:{i}" for i in range(len(spec.blocks)) for tap in ("restored", "map"))
    for grid in (spec.grid, (rows, cols)):  # its own image size, and any other
        x = images(replace(whole, image_px=(grid[0] * spec.patch_px[0], grid[1] * spec.patch_px[1])), 1)
        found, expected = (model(x, gates=OPEN, want=want) for model in both)
        assert tree_map(lambda y: y.shape, found) == tree_map(lambda y: y.shape, expected)


@given(specs(steps=False))
def test_padding_heads_changes_nothing(spec: ModelSpec) -> None:
    model, x = make(spec), images(spec)
    model.pad_heads = True
    padded = model(x, gates=OPEN)
    model.pad_heads = False
    assert close(padded, model(x, gates=OPEN), 1e-12)


@given(st.data())
def test_law_3_cut_equals_masked(data: st.DataObject) -> None:
    spec = data.draw(specs())
    model, x = make(spec), images(spec)
    chosen = data.draw(keeps(spec))
    smaller = cut(model, chosen, method="test")
    # A similarity step may choose other pairs only if the stream differs, and a gate may flip only then too.
    want = ("logits", "tokens")
    masked = model(x, masks=masked_twin(model, chosen), gates=OPEN, want=want)
    found = smaller(x, gates=OPEN, want=want)
    assert all(close(masked[name], found[name]) for name in want)
    assert params(smaller.spec) == sum(p.numel() for p in smaller.parameters())


@given(st.data())
def test_law_4_removing_never_costs_more(data: st.DataObject) -> None:
    spec = data.draw(specs())
    before, after = cost(spec), cost(cut(make(spec), data.draw(keeps(spec)), method="test"))
    assert after.macs <= before.macs
    assert after.params <= before.params
    assert after.activation_bytes <= before.activation_bytes


@given(specs())
def test_law_4_keeping_everything_and_folding_change_no_output(spec: ModelSpec) -> None:
    model, x = make(spec), images(spec)
    expected = model(x, gates=OPEN)
    assert close(expected, cut(model, [Keep()] * len(spec.blocks), method="test")(x, gates=OPEN))
    assert close(expected, fold_layer_scale(model)(x, gates=OPEN))


@given(specs())
def test_the_exact_tail_changes_no_output_and_costs_less(spec: ModelSpec) -> None:
    if not allows_exact_tail(spec):
        return
    model, x = make(spec), images(spec)
    # The last MLP's gate reads the mean of the tokens that go on, so gates are open here.
    tail = exact_tail(model)
    assert close(model(x, gates=OPEN), tail(x, gates=OPEN))
    assert macs(tail.spec) <= macs(spec)


def test_the_exact_tail_saves_what_the_design_says_of_deit_small() -> None:
    spec = vit(width=384, blocks=12, heads=6, head_dim=64, hidden=1536, image=224, patch=16, classes=1000)
    from vitrim.spec import Prefix

    last = replace(spec.blocks[-1], steps=(Prefix(),))
    saved = 1 - macs(replace(spec, blocks=(*spec.blocks[:-1], last))) / macs(spec)
    assert round(100 * saved, 1) == 6.9


def test_cutting_leaves_the_input_model_alone() -> None:
    spec = vit()
    model = make(spec)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    smaller = cut(model, [Keep(hidden=(0, 3)), None], method="test")
    with torch.no_grad():
        for p in smaller.parameters():
            p.zero_()
    assert model.spec == spec
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_selections_append_and_name_their_parents() -> None:
    model = make(vit())
    once = cut(model, [Keep(hidden=(0, 3)), None], method="first", variant="v")
    twice = cut(once, [None, Keep(attention=False)], method="second")
    assert [step.method for step in twice.selection.steps] == ["first", "second"]
    assert twice.selection.steps[0].parent == spec_hash(model.spec)
    assert twice.selection.steps[1].parent == spec_hash(once.spec)
    assert twice.selection.steps[1].blocks[1]["attention"] == "gone"
    assert Selection.from_dict(json.loads(json.dumps(twice.selection.to_dict()))) == twice.selection


@given(specs(gates=False), st.integers(0, 5))
@settings(max_examples=25)
def test_law_6_factors_of_full_rank_are_exact(spec: ModelSpec, seed: int) -> None:
    model, x = fold_layer_scale(make(spec, seed)), images(spec)
    factors: list[Factors | None] = []
    for i, block in enumerate(model.spec.blocks):
        if block.mlp is None:
            factors.append(None)
            continue
        mlp = model.blocks[i].mlp
        first = mlp.fc1.weight.detach()  # rows, inputs
        if mlp.fc1a is not None:
            first = first @ mlp.fc1a.weight.detach()
        u, s, v = torch.linalg.svd(first.T, full_matrices=False)
        factors.append(Factors(fc1=(u * s, v, mlp.fc1.bias)))
    result = factorise(model, factors, method="test")
    assert close(model(x), result(x))
    assert params(result.spec) == sum(p.numel() for p in result.parameters())


@pytest.mark.slow
@given(specs())
@settings(max_examples=8)
def test_it_compiles_without_a_graph_break(spec: ModelSpec) -> None:
    model, x = make(spec), images(spec)
    torch._dynamo.reset()
    with torch.no_grad():
        expected = model(x)
        assert close(expected, torch.compile(model, backend="eager", fullgraph=True)(x))


def assert_exports(model: torch.nn.Module, spec: ModelSpec) -> None:
    """Exported at batch 2, it gives the same at others."""
    batch = torch.export.Dim("batch", min=1, max=64)
    with torch.no_grad():
        exported = torch.export.export(model, (images(spec, 2),), dynamic_shapes=({0: batch},)).module()
        for count in (1, 5):
            x = images(spec, count, seed=count)
            assert close(model(x), exported(x), 1e-8)


@pytest.mark.slow
@given(specs())
@settings(max_examples=6)
def test_law_9_it_exports_with_a_dynamic_batch(spec: ModelSpec) -> None:
    assert_exports(make(spec), spec)


class Tokens(torch.nn.Module):
    """What is exported of a network whose tokens are the product."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens: torch.Tensor = self.model(x, want=("tokens",))["tokens"]
        return tokens


@pytest.mark.slow
@given(specs(restores=True))
@settings(max_examples=4)
def test_law_9_restored_tokens_are_exported_with_a_dynamic_batch(spec: ModelSpec) -> None:
    assert_exports(Tokens(make(spec)), spec)


@given(specs())
@settings(max_examples=15)
def test_float32_agrees_with_float64(spec: ModelSpec) -> None:
    model = make(replace(spec, blocks=tuple(replace(b, steps=()) for b in spec.blocks)))
    x = images(spec)
    exact = model(x, gates=OPEN)
    single = model.to(torch.float32)(x.float(), gates=OPEN)
    assert close(exact, single.double(), 1e-4)


@settings(max_examples=20)
@given(spec=specs(), data=st.data())
def test_leaving_out_empty_blocks_changes_no_output(spec, data):
    plain = [i for i, block in enumerate(spec.blocks) if not block.steps]
    gone = data.draw(st.lists(st.sampled_from(plain), unique=True)) if plain else []
    model, x = make(spec), images(spec)
    emptied = drop(model, blocks=gone)
    small = without_empty(emptied)
    assert torch.equal(small(x), emptied(x))
    assert len(small.spec.blocks) <= len(spec.blocks) - len(gone)


@given(spec=specs(), rows=st.integers(1, 6), cols=st.integers(1, 6))
def test_resizing_once_equals_resizing_in_every_forward_pass(spec: ModelSpec, rows: int, cols: int) -> None:
    model = make(spec)
    size = (rows * spec.patch_px[0], cols * spec.patch_px[1])
    sized = resized(model, size)
    x = images(sized.spec)
    assert x.shape[-2:] == size
    assert close(model(x, gates=OPEN), sized(x, gates=OPEN), 1e-12)
    assert has_own_positions(sized.spec)
    assert params(sized.spec) == sum(p.numel() for p in sized.parameters())
    assert resized(model, spec.image_px).spec == spec
