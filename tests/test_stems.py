"""Tokens-to-token stems: what the sheet of T2T-ViT says of them, part by part."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from tests.specs import close, images, make, vit
from vitrim import recipes
from vitrim.architectures import t2t
from vitrim.config import read
from vitrim.counting import cost
from vitrim.errors import SpecError
from vitrim.model import Vit, build, initialise
from vitrim.spec import Config, ModelSpec, Position, T2TPerformer, T2TTransformer, from_json, to_json
from vitrim.stems import TokenPerformer, TokenTransformer, padding, soft_split
from vitrim.training import TrainConfig
from vitrim.training.objectives import train

STEMS = [T2TPerformer(token_dim=8, features=4), T2TTransformer(token_dim=8)]
SPLITS = [((7, 3, 3), (4, 2, 2)), ((7, 3, 3), (2, 2, 1)), ((3, 5, 1), (3, 1, 1)), ((7, 3, 3), (1, 1, 2))]


def small(stem: T2TPerformer | T2TTransformer, image: int = 48, **fields: object) -> ModelSpec:
    """A small network with this stem."""
    patch = math.prod(stem.strides)
    position = Position(kind="fixed", grid=(image // patch, image // patch), resize="rebuild_1d")
    return vit(image=image, patch=patch, stem=stem, position=position, norm_eps=1e-5, **fields)


def performer(seed: int = 0) -> TokenPerformer:
    model = make(small(STEMS[0]), seed)
    stage = model.stem.stages[0]
    assert isinstance(stage, TokenPerformer)
    return stage


def tokens(inputs: int, count: int = 9) -> torch.Tensor:
    return torch.randn(2, count, inputs, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def test_a_soft_split_keeps_the_unfolds_order_of_features() -> None:
    for channel in range(3):
        x = torch.zeros(1, 3, 32, 32)
        x[:, channel] = 1
        found = soft_split(x, 7, 4)
        assert found.shape == (1, 64, 147)
        assert found[..., 49 * channel : 49 * (channel + 1)].sum() == found.sum() > 0
    x = torch.zeros(1, 1, 12, 12)
    x[0, 0, 4, 7] = 1  # row 4, column 7: in the window of grid place (1, 1), whose corner is at (2, 2)
    assert soft_split(x, 7, 4)[0, 3 + 1, 2 * 7 + 5] == 1


@pytest.mark.parametrize(("kernel", "stride"), [(7, 4), (3, 2), (7, 1), (3, 1), (7, 2), (5, 3), (3, 3), (1, 1)])
def test_a_soft_split_shrinks_a_side_by_its_stride_exactly(kernel: int, stride: int) -> None:
    for n in range(stride, 9 * stride, stride):
        if n + 2 * padding(kernel, stride) >= kernel:
            assert soft_split(torch.zeros(1, 1, n, 2 * n), kernel, stride).shape[1] == 2 * (n // stride) ** 2
    assert (padding(7, 4), padding(3, 2)) == (2, 1)


@pytest.mark.parametrize("stem", STEMS)
def test_every_layer_norm_has_the_specs_eps(stem: T2TPerformer | T2TTransformer) -> None:
    norms = [m for m in build(small(stem)).modules() if isinstance(m, torch.nn.LayerNorm)]
    assert len(norms) == 4 + 2 * 2 + 1
    assert {norm.eps for norm in norms} == {1e-5}


def test_the_transformer_scales_by_the_width_of_its_input() -> None:
    with torch.device("meta"):
        model = Vit(Config(spec=t2t.spec("t2t_vit_t_14")))
    assert [stage.scale for stage in model.stem.stages] == [147**-0.5, 576**-0.5]
    stage = make(small(STEMS[1])).stem.stages[1]
    assert isinstance(stage, TokenTransformer)
    x = tokens(72)
    q, k, v = stage.qkv(stage.norm1(x)).split(8, -1)
    y = v + stage.proj(torch.softmax(q @ k.transpose(1, 2) * 72**-0.5, -1) @ v)
    assert close(stage(x), y + stage.fc2(F.gelu(stage.fc1(stage.norm2(y)))), 1e-12)


def test_the_performer_permutes_with_its_tokens_and_repeats() -> None:
    stage, x = performer(), tokens(147)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    assert torch.equal(stage(x), stage(x))
    assert close(stage(x[:, order]), stage(x)[:, order], 1e-12)
    assert not close(stage(x[:, order]), stage(x), 1e-3)


def test_the_performers_rows_are_keys_queries_values() -> None:
    """Linear attention in one sentence: the values, weighed by the features of keys and queries."""
    stage, x = performer(), tokens(147)
    rows = stage.norm1(x) @ stage.kqv.weight.T + stage.kqv.bias
    k, q, v = rows[..., :8], rows[..., 8:16], rows[..., 16:]

    def phi(u: torch.Tensor) -> torch.Tensor:
        return torch.exp(u @ stage.features.T - (u**2).sum(-1, keepdim=True) / 2) / 2  # sqrt(4 features)

    weights = phi(q) @ phi(k).transpose(1, 2)  # B T T
    y = v + stage.proj(weights @ v / (weights.sum(-1, keepdim=True) + 1e-8))
    assert close(stage(x), y + stage.fc2(F.gelu(stage.fc1(stage.norm2(y)))), 1e-10)
    with torch.no_grad():
        before = stage(x)
        stage.kqv.weight.copy_(torch.cat([stage.kqv.weight[8:16], stage.kqv.weight[:8], stage.kqv.weight[16:]]))
        assert not close(before, stage(x), 1e-4)


def test_the_performer_adds_its_epsilon_where_all_features_vanish() -> None:
    """Without it 0 / 0: long keys and queries have features below the smallest number."""
    stage = performer()
    with torch.no_grad():
        stage.kqv.weight.mul_(100)
    assert stage(tokens(147)).isfinite().all()


def test_random_features_start_at_right_angles_with_length_root_m_and_are_never_trained() -> None:
    torch.manual_seed(0)
    model = build(small(T2TPerformer()))
    for stage in model.stem.stages:
        w = stage.features
        assert w.shape == (32, 64)
        assert not w.requires_grad
        assert torch.allclose(w @ w.T, 32 * torch.eye(32), atol=1e-4)
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == {
        "position",
        "stem.stages.0.features",
        "stem.stages.1.features",
    }


def test_mixed_precision_leaves_the_random_features_in_float32() -> None:
    stage = performer().float()
    k, q, v = torch.randn(3, 2, 9, 8, generator=torch.Generator().manual_seed(0)).unbind()
    expected = stage._attend(k, q, v)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = stage._attend(k, q, v)
        coarse = stage._attend(k.bfloat16(), q.bfloat16(), v.bfloat16())
        assert stage(tokens(147).float()).isfinite().all()
    assert found.dtype == coarse.dtype == torch.float32
    assert torch.equal(found, expected)
    assert torch.equal(coarse, stage._attend(*(t.bfloat16().float() for t in (k, q, v))))


def test_the_fixed_table_is_interleaved_sines_and_cosines_in_raster_order() -> None:
    position = build(small(STEMS[0])).position
    assert position is not None
    assert position.shape == (10, 16)
    assert (position[0, 0::2] == 0).all()
    assert (position[0, 1::2] == 1).all()
    assert position[1, 0] == pytest.approx(math.sin(1), abs=1e-7)
    assert position[1, 1] == pytest.approx(math.cos(1), abs=1e-7)
    assert position[7, 5] == pytest.approx(math.cos(7 / 10000 ** (4 / 16)), abs=1e-7)


@pytest.mark.parametrize("name", ["t2t_vit_14", "t2t_vit_t_14"])
def test_other_resolutions_give_their_own_number_of_tokens(name: str) -> None:
    with torch.device("meta"):
        model = Vit(Config(spec=t2t.spec(name)))
        found = [model.embed(torch.empty(1, 3, px, px)).x.shape[1] for px in (224, 256, 384)]
    assert found == [197, 257, 577]


@pytest.mark.parametrize("stem", STEMS)
def test_another_resolution_rebuilds_the_table(stem: T2TPerformer | T2TTransformer) -> None:
    model, larger = make(small(stem, 48)), make(small(stem, 64))
    larger.load_state_dict({**model.state_dict(), "position": larger.position})
    with torch.no_grad():
        larger.position.copy_(build(small(stem, 64)).position)
    x = images(larger.spec)
    assert close(model(x), larger(x), 1e-12)
    assert model(torch.randn(1, 3, 32, 80, dtype=torch.float64)).isfinite().all()


@pytest.mark.parametrize("splits", SPLITS)
@pytest.mark.parametrize("stem", STEMS)
def test_law_2_params_and_torchs_operations_with_any_soft_splits(
    stem: T2TPerformer | T2TTransformer, splits: tuple[tuple[int, int, int], tuple[int, int, int]]
) -> None:
    spec = small(replace(stem, kernels=splits[0], strides=splits[1]), image=math.prod(splits[1]) * 3)
    model = make(spec)
    with FlopCounterMode(display=False) as counter:
        model(images(spec, 1))
    assert counter.get_total_flops() == cost(spec).flops
    assert cost(spec).params == sum(p.numel() for p in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("stem", STEMS)
def test_a_stem_compiles_whole_and_exports_with_any_batch(stem: T2TPerformer | T2TTransformer) -> None:
    model = make(small(stem, 32))
    x = images(model.spec, 3)
    batch = torch.export.Dim("batch", min=1, max=64)
    torch._dynamo.reset()
    with torch.no_grad():
        assert close(model(x), torch.compile(model, backend="eager", fullgraph=True)(x))
        exported = torch.export.export(model, (x,), dynamic_shapes=({0: batch},)).module()
        for count in (1, 5):
            x = images(model.spec, count, seed=count)
            assert close(model(x), exported(x), 1e-10)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            single = model.float()
            compiled = torch.compile(single, backend="eager", fullgraph=True)(x.float())
            assert close(single(x.float()).float(), compiled.float(), 1e-5)


@pytest.mark.parametrize(
    ("stem", "patch", "message"),
    [
        (
            T2TPerformer(),
            8,
            r"patch_px=\(8, 8\) with a tokens-to-token stem of strides \(4, 2, 2\); expected \(16, 16\)",
        ),
        (T2TPerformer(kernels=(6, 3, 3)), 16, "expected odd kernels, none below its stride"),
        (T2TTransformer(kernels=(3, 3, 3)), 16, "expected odd kernels, none below its stride"),
        (T2TTransformer(strides=(4, 2, 0)), 16, "expected a number above 0"),
        (T2TPerformer(features=0), 16, "features=0"),
    ],
)
def test_an_impossible_stem_is_refused(stem: T2TPerformer | T2TTransformer, patch: int, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        vit(image=48, patch=patch, stem=stem)


def test_a_stem_written_without_soft_splits_has_the_published_ones() -> None:
    spec = small(STEMS[0])
    data = spec.to_dict()
    del data["stem"]["kernels"], data["stem"]["strides"]
    assert ModelSpec.from_dict(data) == spec == from_json(to_json(spec))


def test_the_recipe_trains_in_mixed_precision_and_leaves_what_is_fixed() -> None:
    recipe = recipes.read("cifar10-t2t-micro")
    config = replace(Config.from_dict(recipe["model"]), labels=None)
    assert config.spec.grid == (8, 8)
    torch.manual_seed(0)
    start = Vit(config)
    initialise(start)
    before = {name: p.detach().clone() for name, p in start.named_parameters()}
    values = {**recipe["train"], "steps": 3, "batch_size": 4, "device": "cpu", "eval_every": None}
    assert values["amp"] == "bf16"
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 255, (20, 3, 32, 32), generator=generator, dtype=torch.uint8)
    seen: list[torch.dtype] = []
    hook = TokenPerformer.phi
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TokenPerformer, "phi", lambda self, x: (seen.append(x.dtype), hook(self, x))[1])
        model = train(start, (pixels, torch.arange(20) % 10), read(TrainConfig, values)).model
    assert set(seen) == {torch.float32}
    fixed = {"position", "stem.stages.0.features", "stem.stages.1.features"}
    assert {name for name, p in model.named_parameters() if torch.equal(p, before[name])} == fixed
    assert all(p.isfinite().all() for p in model.parameters())
