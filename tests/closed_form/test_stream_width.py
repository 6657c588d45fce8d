"""A narrower stream: exact where nothing is dropped, plain LayerNorm throughout, and a correction that only helps."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.specs import close, images, make, specs, vit
from vitrim import surgery
from vitrim.closed_form import stream_width as narrowing
from vitrim.counting import cost, macs, params
from vitrim.errors import SpecError
from vitrim.model import Vit
from vitrim.spec import ModelSpec, Output, Pool, Position, Similarity, T2TPerformer

SPEC = vit(blocks=2, width=16)


def stream_of(model: Vit, x: torch.Tensor) -> torch.Tensor:
    total = narrowing.Stream.empty(model.spec.width)
    for _, seen in narrowing.readings(model, x):
        total.add(seen, len(model.spec.prefix))
    return total.gram


@st.composite
def narrowable(draw: st.DrawFn) -> ModelSpec:
    """Any network whose stream may become narrower; without token steps, which match by the cosine of the stream."""
    spec = draw(specs(steps=False))
    if spec.pool.kind in ("map", "none"):
        spec = replace(spec, pool=Pool(kind="mean"), outputs=())
    behind = draw(st.booleans()) and spec.pool.kind == "mean" and all(o.reads == ("pool",) for o in spec.outputs)
    outputs = spec.outputs or (Output(classes=5, bias=draw(st.booleans())),)
    return replace(spec, pre_norm=False, final_norm=not behind, pool_norm=behind, outputs=outputs)


@settings(max_examples=80)
@given(spec=narrowable())
def test_the_full_width_is_exact_for_every_network_that_may_be_narrowed(spec):
    assert narrowing.refusal(spec) is None
    model, x = surgery.fold_layer_scale(make(spec)), images(spec, 3)
    basis = narrowing.directions(stream_of(model, x), spec.width)
    for corrected in (None, narrowing.corrections(model, basis, [x])):
        assert close(narrowing.narrow(model, basis, corrected)(x), model(x), 1e-9)


@pytest.mark.parametrize(
    "changes",
    [
        {"prefix": ("cls", "dist"), "outputs": (Output(classes=5), Output(name="second", classes=5, reads=("dist",)))},
        {"prefix": ("cls", "reg", "reg")},
        {"pool": Pool(kind="mean"), "final_norm": False, "pool_norm": True, "prefix": ("reg",)},
        {"stem": T2TPerformer(token_dim=4, features=3, kernels=(7, 3, 3), strides=(4, 1, 1))},
        {"outputs": (Output(classes=5, reads=("pool", "mean"), rank=2, bias=False),)},
        {"position": Position(kind="fixed", grid=(4, 4), resize="rebuild_1d")},
    ],
    ids=["distilled", "registers", "mean behind its norm", "tokens to tokens", "concatenated", "fixed table"],
)
def test_the_full_width_is_exact_for_every_family(changes):
    spec = replace(SPEC, **changes)
    model, x = make(spec), images(spec, 3)
    assert close(narrowing.narrow(model, narrowing.directions(stream_of(model, x), 16))(x), model(x))


def carrying(rank: int) -> Vit:
    """A classifier that merges, compares tokens in `rank` directions and carries along as many, blind to the mean of the channels."""
    step = Similarity(keep=11, proportional=True, match="heavier", metric=rank, carry=rank)
    spec = replace(
        SPEC, restore=True, blocks=(replace(SPEC.blocks[0], steps=(step,)), SPEC.blocks[1]), pool=Pool(kind="mean")
    )
    model = make(spec)
    with torch.no_grad():
        for name in ("metric", "importance", "carry_a"):
            value = getattr(model.blocks[0].steps[0], name)
            value.sub_(value.mean(0))
    return model


@pytest.mark.parametrize("rank", [3, 16])
def test_steps_that_compare_and_carry_go_into_the_narrow_stream(rank):
    model, x = carrying(rank), images(SPEC, 3)
    gram = stream_of(model, x)
    assert close(narrowing.narrow(model, narrowing.directions(gram, 16))(x), model(x))
    narrow = narrowing.narrow(model, narrowing.directions(gram, 9))
    step = narrow.spec.blocks[0].steps[0]
    assert isinstance(step, Similarity)
    assert (step.metric, step.carry) == (min(rank, 9),) * 2
    assert params(narrow.spec) == sum(p.numel() for p in narrow.parameters())
    assert narrow(x).isfinite().all()


def test_fewer_directions_give_the_same_distances():
    metric, x = torch.randn(4, 7, dtype=torch.float64), torch.randn(9, 4, dtype=torch.float64)
    fewer = narrowing.compared(metric)
    assert fewer.shape == (4, 4)
    assert close(torch.cdist(x @ fewer, x @ fewer), torch.cdist(x @ metric, x @ metric), 1e-9)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"outputs": ()}, "encoder"),
        ({"pre_norm": True}, "pre_norm"),
        ({"pool": Pool(kind="map", heads=2, hidden=8)}, "pool map"),
        ({"pool_norm": True}, "pool_norm"),
        ({"final_norm": False}, "without a norm"),
    ],
)
def test_what_cannot_be_narrowed_is_refused_by_name(changes, why):
    spec = replace(SPEC, **changes)
    with pytest.raises(SpecError, match=why):
        narrowing.narrowed_spec(spec, 8)


@settings(max_examples=40)
@given(spec=narrowable())
def test_the_narrow_network_is_the_spec_it_says(spec):
    model, x = surgery.fold_layer_scale(make(spec)), images(spec, 2)
    small = narrowing.narrow(model, narrowing.directions(stream_of(model, x), spec.width - 3))
    assert small.spec == narrowing.narrowed_spec(model.spec, spec.width - 3)
    assert params(small.spec) == sum(p.numel() for p in small.parameters())
    assert torch.isfinite(small(x)).all()


def test_a_narrow_token_has_mean_zero_and_the_variance_that_the_wide_projection_has():
    model, x = make(SPEC), images(SPEC, 3)
    basis = narrowing.directions(stream_of(model, x), 7)
    q = basis.q
    assert close(q.mT @ q, torch.eye(6, dtype=q.dtype))
    assert q.sum(0).abs().max() < 1e-12
    wide = model.embed(x).x
    t = wide @ basis.down
    inner = (wide - wide.mean(-1, keepdim=True)) @ q
    assert t.mean(-1).abs().max() < 1e-12
    assert close(t.var(-1, unbiased=False), inner.square().sum(-1) / 16)
    small = narrowing.narrow(model, basis)
    assert close(small.embed(x).x, t)
    assert all(bool((p == 1).all()) for n, p in small.named_parameters() if "norm" in n and n.endswith("weight"))


def flat(directions: int, *, constant: bool) -> tuple[Vit, torch.Tensor]:
    """A network whose stream moves in so few directions only, one of them a constant if asked."""
    model, x = make(SPEC), images(SPEC, 4)
    generator = torch.Generator().manual_seed(3)
    free = narrowing.helmert(16) @ torch.linalg.qr(torch.randn(15, 15, generator=generator, dtype=torch.float64))[0]
    moving, fixed = free[:, : directions - constant], free[:, directions - 1]
    state = dict(model.state_dict())
    for name in state:
        if name.endswith(("out.weight", "fc2.weight", "out.bias", "fc2.bias")):
            state[name] = moving @ moving.mT @ state[name]
        elif name == "stem.proj.weight":
            state[name] = (moving @ moving.mT @ state[name].flatten(1)).view_as(state[name])
        elif name in ("prefix", "position"):
            state[name] = state[name] @ moving @ moving.mT
    state["stem.proj.bias"] = 5.0 * fixed if constant else moving @ moving.mT @ state["stem.proj.bias"]
    if constant:
        state["prefix"] = state["prefix"] + 5.0 * fixed
    return surgery.with_spec(model, model.spec, state), x


@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("constant", [False, True])
def test_a_stream_of_few_directions_is_narrowed_exactly(constant, weighed):
    model, x = flat(5, constant=constant)
    metric = torch.diag(torch.arange(1.0, 17.0, dtype=torch.float64)) if weighed else None
    basis = narrowing.directions(stream_of(model, x), 6, metric)
    assert close(narrowing.narrow(model, basis)(x), model(x), 1e-8)


def test_a_gram_centred_over_tokens_loses_the_constant_part():
    model, x = flat(5, constant=True)
    seen = [tokens.flatten(0, 1) for _, tokens in narrowing.readings(model, x)]
    tokens = torch.cat([rows - rows.mean(-1, keepdim=True) for rows in seen])
    centred = tokens - tokens.mean(0)
    basis = narrowing.directions(centred.mT @ centred, 6)
    uncentred = narrowing.directions(tokens.mT @ tokens, 6)
    assert close(narrowing.narrow(model, uncentred)(x), model(x), 1e-8)
    assert not close(narrowing.narrow(model, basis)(x), model(x), 1e-2)


def test_a_constant_added_to_every_channel_of_a_token_changes_nothing():
    model, x = make(SPEC), images(SPEC, 3)
    state = dict(model.state_dict())
    shifted = {**state, "position": state["position"] + torch.arange(17.0, dtype=torch.float64)[:, None]}
    other = surgery.with_spec(model, SPEC, shifted)
    basis = narrowing.directions(stream_of(model, x), 9)
    assert close(other(x), model(x))
    assert close(narrowing.narrow(other, basis)(x), narrowing.narrow(model, basis)(x))


def test_the_correction_of_the_readers_brings_the_narrow_tokens_nearer():
    model, x = make(vit(blocks=2, width=24)), images(SPEC, 24)
    basis = narrowing.directions(stream_of(model, x), 14)
    corrected = narrowing.corrections(model, basis, [x], ridge=1e-6)
    seen = dict(narrowing.readings(model, x))
    for name in ("norm1:0", "norm2:1"):
        narrow, wide = narrowing.normalised(seen[name], basis, 1e-6)
        errors = [
            float((wide - narrow @ reader.matrix.mT - reader.shift).square().mean())
            for reader in (narrowing.Reader.bare(basis), corrected[name])
        ]
        assert errors[1] < errors[0]


def test_token_weights_decide_which_tokens_a_reader_is_fitted_on():
    model, x = make(SPEC), images(SPEC, 40)
    basis = narrowing.directions(stream_of(model, x), 6)

    def only_class(_: str, tokens: int) -> torch.Tensor:
        return torch.tensor([1.0] + [0.0] * (tokens - 1))

    fits = [narrowing.corrections(model, basis, [x], weights=w, ridge=1e-9) for w in (None, only_class)]
    seen = dict(narrowing.readings(model, x))
    narrow, wide = narrowing.normalised(seen["norm2:0"][:, :1], basis, 1e-6)
    errors = [float((wide - narrow @ f["norm2:0"].matrix.mT - f["norm2:0"].shift).square().mean()) for f in fits]
    assert errors[1] < errors[0]


def test_a_narrower_stream_costs_less_in_everything():
    before, after = cost(SPEC), cost(narrowing.narrowed_spec(SPEC, 12))
    assert after.macs < before.macs
    assert after.params < before.params
    assert macs(narrowing.narrowed_spec(SPEC, 8)) < after.macs
