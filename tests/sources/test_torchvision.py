"""torchvision's Vision Transformers: the same numbers in and out, and a refusal by name of what the spec cannot say."""

from __future__ import annotations

import json
import logging
import urllib.error
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models import VisionTransformer
from torchvision.models.vision_transformer import ConvStemConfig, EncoderBlock, interpolate_embeddings

import vitrim
from vitrim import architectures, counting, surgery
from vitrim.errors import SourceError
from vitrim.model import Vit, build
from vitrim.sources import torchvision as source
from vitrim.spec import AttentionSpec, BlockSpec, MlpSpec, ModelSpec, Output, Pool, Position, Preprocess

SMALL: dict[str, Any] = {
    "image_size": 32,
    "patch_size": 8,
    "num_layers": 3,
    "num_heads": 3,
    "hidden_dim": 24,
    "mlp_dim": 40,
    "num_classes": 5,
}


def randomised(module: nn.Module, *, seed: int = 0) -> Any:
    """Every number random: torchvision's own head starts at zero, and zeros and ones hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.normal_(0.0, 0.3, generator=generator)
            if ("ln" in name or "norm" in name) and name.endswith("weight"):
                parameter.add_(1.0)
    return module.eval()


def small(**options: Any) -> Any:
    return randomised(VisionTransformer(**{**SMALL, **options}))


def images(px: int = 32, count: int = 2) -> Tensor:
    return torch.randn(count, 3, px, px, generator=torch.Generator().manual_seed(1))


def same(ours: Tensor, theirs: Tensor, tolerance: float = 1e-10) -> bool:
    return ours.shape == theirs.shape and float((ours - theirs).abs().max()) <= tolerance * max(
        1.0, float(theirs.abs().max())
    )


@torch.no_grad()
def assert_same(module: Any, model: Vit) -> None:
    """Law 5 in float64: logits (or features), and the stream after every block."""
    module, model = module.double(), model.double()
    x = images(module.image_size).double()
    streams: list[Tensor] = []
    hooks = [layer.register_forward_hook(lambda _m, _i, out: streams.append(out)) for layer in module.encoder.layers]
    expected = module(x)
    for hook in hooks:
        hook.remove()
    found = model(x, want=[f"block:{i}" for i in range(len(model.blocks))])
    assert same(model(x), expected)
    assert len(streams) == len(model.blocks)
    assert all(same(found[f"block:{i}"], stream) for i, stream in enumerate(streams))


def headless() -> Any:
    module = small()
    module.heads = nn.Identity()
    return module


def with_head(head: nn.Module) -> Any:
    module = small()
    module.heads = head
    return randomised(module)


def with_act(act: nn.Module) -> Any:
    module = small()
    for layer in module.encoder.layers:
        layer.mlp[1] = act
    return module


def without_biases() -> Any:
    module = small()
    for layer in module.encoder.layers:
        layer.self_attention = nn.MultiheadAttention(24, 3, bias=False, batch_first=True)
        layer.mlp[0] = nn.Linear(24, 40, bias=False)
    return randomised(module)


VARIANTS: dict[str, Any] = {
    "plain": small,
    "one_head": partial(small, num_heads=1),
    "many_small_patches": partial(small, patch_size=4, num_heads=6),
    "one_patch": partial(small, image_size=8),
    "one_block": partial(small, num_layers=1),
    "another_eps": partial(small, norm_layer=partial(nn.LayerNorm, eps=1e-3)),
    "dropout": partial(small, dropout=0.5, attention_dropout=0.5),
    "an_encoder": headless,
    "a_bare_linear_as_head": lambda: with_head(nn.Linear(24, 7)),
    "a_head_behind_dropout_without_bias": lambda: with_head(nn.Sequential(nn.Dropout(), nn.Linear(24, 7, bias=False))),
    "tanh_gelu": lambda: with_act(nn.GELU("tanh")),
    "relu": lambda: with_act(nn.ReLU()),
    "no_biases": without_biases,
}


@pytest.mark.parametrize("case", VARIANTS)
def test_a_loaded_model_gives_torchvisions_logits_and_features(case: str) -> None:
    module = VARIANTS[case]()
    model = vitrim.from_model(module)
    assert counting.params(model.spec) == sum(parameter.numel() for parameter in module.parameters())
    assert_same(module, model)


@pytest.mark.parametrize("name", ["vit_b_16", "vit_b_32", "vit_h_14"])
def test_named_architectures_are_exact_in_few_dims(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    narrow(monkeypatch)
    module = randomised(torchvision.models.get_model(name, image_size=28 if name == "vit_h_14" else 64))
    assert_same(module, vitrim.from_model(module))


def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Named models with two narrow blocks, so that tests stay small."""
    real = torchvision.models.vision_transformer._vision_transformer
    few = {"num_layers": 2, "num_heads": 3, "hidden_dim": 24, "mlp_dim": 40}
    monkeypatch.setattr(
        torchvision.models.vision_transformer, "_vision_transformer", lambda **given: real(**{**given, **few})
    )


def test_from_model_leaves_module_and_random_state_as_they_were() -> None:
    module = small(dropout=0.3)
    module.train()
    module.encoder.layers[0].eval()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    flags, random = [part.training for part in module.modules()], torch.get_rng_state()
    model = vitrim.from_model(module)
    assert [part.training for part in module.modules()] == flags
    assert torch.equal(torch.get_rng_state(), random)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert not model.training


def test_half_precision_modules_come_in_as_float32_and_stay_half() -> None:
    module = small().half()
    model = vitrim.from_model(module)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float16}
    assert_same(module.float(), model)


# ------------------------------------------------------------------------------------------------------------- refusals


class Same(VisionTransformer):
    """A subclass that computes what torchvision computes."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Doubling(EncoderBlock):
    """A block that looks the same and computes something else."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Mean(VisionTransformer):
    """A subclass that pools otherwise."""

    def forward(self, x: Tensor) -> Tensor:
        x = self._process_input(x)
        x = self.encoder(torch.cat([self.class_token.expand(len(x), -1, -1), x], dim=1))
        return self.heads(x.mean(1))


def test_a_subclass_of_the_same_structure_loads() -> None:
    module = randomised(Same(**SMALL))
    assert_same(module, vitrim.from_model(module))


def test_a_changed_forward_is_refused_with_the_first_block_that_differs() -> None:
    module = small()
    module.encoder.layers[1].__class__ = Doubling
    with pytest.raises(SourceError, match="torchvision's VisionTransformer: outputs differ, first in block 1"):
        vitrim.from_model(module)
    assert vitrim.from_model(module, verify=False).spec.width == 24
    with pytest.raises(SourceError, match="what follows the blocks"):
        vitrim.from_model(randomised(Mean(**SMALL)))


def test_what_the_spec_cannot_say_is_refused_by_its_name() -> None:
    def odd(**changes: Any) -> Any:
        module = small()
        for path, part in changes.items():
            module.set_submodule(path.replace("__", "."), part)
        return module

    layer = "encoder__layers__encoder_layer_1"
    attention = partial(nn.MultiheadAttention, 24, 3, batch_first=True)
    norms = partial(nn.LayerNorm, 24)
    for module, words in (
        (small(representation_size=9), "representation_size, pre_logits"),
        (small(conv_stem_configs=[ConvStemConfig(8, 3, 2)], patch_size=2), "conv_stem_configs"),
        (odd(**{f"{layer}__self_attention": attention(add_bias_kv=True)}), "add_bias_kv.* in block 1"),
        (odd(**{f"{layer}__self_attention": attention(add_zero_attn=True)}), "add_zero_attn.* in block 1"),
        (odd(**{f"{layer}__self_attention": attention(kdim=8)}), "different widths in block 1"),
        (odd(**{f"{layer}__self_attention": nn.MultiheadAttention(24, 3)}), "batch_first=False"),
        (odd(**{f"{layer}__ln_2": nn.Identity()}), "no ln_2 .block 1"),
        (odd(**{f"{layer}__ln_2": nn.RMSNorm(24)}), "a RMSNorm at block 1, ln_2"),
        (odd(**{f"{layer}__ln_2": norms(eps=1e-3)}), "different eps"),
        (odd(**{f"{layer}__mlp": nn.Linear(24, 24)}), "an MLP of another design .block 1"),
        (odd(**{f"{layer}__mlp__1": nn.Tanh()}), "the activation Tanh .block 1"),
        (odd(**{layer: nn.Identity()}), "blocks of another design .block 1: Identity"),
        (odd(heads=nn.Sequential(nn.Linear(24, 8), nn.Tanh(), nn.Linear(8, 5))), "more than one linear"),
        (odd(conv_proj=nn.Conv2d(3, 24, 16, 8, padding=4)), "overlap or leave gaps"),
    ):
        with pytest.raises(SourceError, match=words):
            vitrim.from_model(module)
    module = small()
    module.encoder.prompt = nn.Parameter(torch.zeros(2, 24))
    with pytest.raises(SourceError, match=r"does not have: encoder\.prompt"):
        vitrim.from_model(module)
    with torch.device("meta"):
        resnet = torchvision.models.resnet18()
    with pytest.raises(SourceError, match=r"another design \(ResNet"):
        source.from_module(resnet)


# ------------------------------------------------------------------------------------------------------ names and files


def test_names_that_are_none_give_the_near_miss() -> None:
    for name, words in (
        ("vit_b_15", "did you mean 'vit_b_16'.*known: vit_b_16, vit_b_32"),
        ("vit_b_16.IMAGENET1K_V3", "did you mean 'IMAGENET1K_V1'.*IMAGENET1K_SWAG_E2E_V1"),
        ("swin_t", r"convolutional or hierarchical design \(swin_t\)"),
        ("resnet50", r"convolutional or hierarchical design \(resnet50\)"),
        ("nowhere/at_all", "is no folder"),
    ):
        with pytest.raises(SourceError, match=words):
            vitrim.load(f"torchvision:{name}", pretrained=False)


def test_a_name_gives_the_random_model_that_the_table_has(monkeypatch: pytest.MonkeyPatch) -> None:
    narrow(monkeypatch)
    for name in ("vit_b_16", "vit_b_16.IMAGENET1K_SWAG_E2E_V1", "ViT_B_16_Weights.IMAGENET1K_V1", "vit_b_32.DEFAULT"):
        model = vitrim.load(f"torchvision:{name}", pretrained=False, classes=7, verify=False)
        assert model.spec.classes == 7
        table = architectures.spec(
            name.replace("ViT_B_16_Weights", "vit_b_16").removesuffix(".DEFAULT"), family="torchvision"
        )
        assert table is not None
        assert (model.spec.image_px, model.spec.patch_px) == (table.image_px, table.patch_px)
        assert model.config.preprocess is not None
        assert model.config.labels is None
        assert model.provenance["weights"] == "random"
    assert vitrim.load("torchvision:vit_b_32", pretrained=False, classes=0, verify=False).spec.outputs == ()


def published(monkeypatch: pytest.MonkeyPatch, error: Exception | None = None) -> dict[str, Any]:
    """torchvision's weights as if they had been fetched, or had failed to; gives what the fetch was asked."""
    narrow(monkeypatch)
    asked: dict[str, Any] = {}
    states = {px: randomised(torchvision.models.vit_b_16(image_size=px)).state_dict() for px in (224, 384)}

    def fetch(url: str, **options: Any) -> Any:
        asked.update(options, url=url)
        if error is not None:
            raise error
        return states[384 if "swag-9" in url else 224]

    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", fetch)
    return asked


def test_published_weights_bring_labels_preprocessing_and_their_origin(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = published(monkeypatch)
    random = torch.get_rng_state()
    model = vitrim.load("torchvision:vit_b_16")
    assert torch.equal(torch.get_rng_state(), random)
    assert asked["weights_only"] is True
    assert model.config.labels is not None
    assert model.config.labels[:2] == ("tench", "goldfish")
    told = model.config.preprocess
    assert told is not None
    assert (told.size_px, told.crop, told.interpolation) == ((224, 224), 224 / 256, "bilinear")
    assert told.mean == (0.485, 0.456, 0.406)
    assert model.provenance["weights_name"] == "ViT_B_16_Weights.IMAGENET1K_V1"
    larger = vitrim.load("torchvision:vit_b_16.IMAGENET1K_SWAG_E2E_V1", verify=False)
    assert larger.spec.image_px == (384, 384)
    assert larger.config.preprocess is not None
    assert (larger.config.preprocess.crop, larger.config.preprocess.interpolation) == (1.0, "bicubic")
    assert "SWAG" in larger.provenance["license"]


def test_other_classes_of_published_weights_are_refused_and_none_drops_the_classifier(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    published(monkeypatch)
    with pytest.raises(SourceError, match=r"'vit_b_16' have 1000 classes.*--new-head"):
        vitrim.load("torchvision:vit_b_16", classes=10)
    model = vitrim.load("torchvision:vit_b_16", classes=0)
    assert (model.spec.outputs, model.config.task, model.config.labels) == ((), "features", None)


@pytest.mark.parametrize("error", [urllib.error.URLError("no network"), RuntimeError("invalid hash value")])
def test_a_fetch_that_fails_is_one_sentence_with_the_two_ways_out(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    published(monkeypatch, error)
    with pytest.raises(SourceError, match=rf"{type(error).__name__}.*--checkpoint PATH.*--no-pretrained") as caught:
        vitrim.load("torchvision:vit_b_16")
    assert "\n" not in str(caught.value)


def test_a_local_state_dict_keeps_its_own_classes_and_image_size(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    narrow(monkeypatch)
    module = randomised(torchvision.models.vit_b_16(image_size=48, num_classes=3))
    old = {
        key.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."): value
        for key, value in module.state_dict().items()
    }
    old["encoder.layers.encoder_layer_0.self_attention.q_proj_weight"], *rest = old.pop(
        "encoder.layers.encoder_layer_0.self_attention.in_proj_weight"
    ).chunk(3)
    old["encoder.layers.encoder_layer_0.self_attention.k_proj_weight"] = rest[0]
    old["encoder.layers.encoder_layer_0.self_attention.v_proj_weight"] = rest[1]
    torch.save({"model": {f"module.{key}": value for key, value in old.items()}, "epoch": 1}, tmp_path / "mine.pth")
    with caplog.at_level(logging.INFO, "vitrim.sources"):
        model = vitrim.load("torchvision:vit_b_16", checkpoint=tmp_path / "mine.pth")
    assert "classifier of 3 classes is kept" in caplog.text
    assert "image size of 48 px is kept" in caplog.text
    assert (model.spec.classes, model.spec.image_px) == (3, (48, 48))
    assert model.provenance["weights"] == "mine.pth"
    assert_same(module, model)
    with pytest.raises(SourceError, match=r"classes=9: the classifier in mine\.pth has 3 classes.*--new-head"):
        vitrim.load("torchvision:vit_b_16", checkpoint=tmp_path / "mine.pth", classes=9)
    encoder = vitrim.load("torchvision:vit_b_16", checkpoint=tmp_path / "mine.pth", classes=0)
    assert encoder.spec.outputs == ()
    with pytest.raises(SourceError, match=r"of another shape: conv_proj\.weight"):
        vitrim.load("torchvision:vit_b_32", checkpoint=tmp_path / "mine.pth")


def test_a_state_dict_of_interpolated_embeddings_is_read_at_its_own_size(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    narrow(monkeypatch)
    state = randomised(torchvision.models.vit_b_16(image_size=64, num_classes=3)).state_dict()
    larger = torchvision.models.vit_b_16(image_size=96, num_classes=3)
    larger.load_state_dict(interpolate_embeddings(96, 16, state))
    torch.save(larger.state_dict(), tmp_path / "larger.pth")
    model = vitrim.load("torchvision:vit_b_16", checkpoint=tmp_path / "larger.pth")
    assert_same(larger.eval(), model)


def test_a_state_dict_that_does_not_fit_is_listed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    narrow(monkeypatch)
    state = torchvision.models.vit_b_16(image_size=48).state_dict()
    torch.save({**state, "aux_head.weight": torch.ones(2, 24)}, tmp_path / "aux.pth")
    with pytest.raises(SourceError, match=r"unexpected: aux_head\.weight.*classes=0"):
        vitrim.load("torchvision:vit_b_16", checkpoint=tmp_path / "aux.pth")
    assert vitrim.load("torchvision:vit_b_16", checkpoint=tmp_path / "aux.pth", classes=0).spec.outputs == ()
    del state["encoder.ln.bias"]
    torch.save(state, tmp_path / "less.pth")
    with pytest.raises(SourceError, match=r"missing: encoder\.ln\.bias"):
        vitrim.load("torchvision:vit_b_16", checkpoint=tmp_path / "less.pth")
    state["encoder.pos_embedding"] = torch.zeros(1, 8, 24)
    torch.save(state, tmp_path / "odd.pth")
    with pytest.raises(SourceError, match="8 rows; expected one for the class token and a square"):
        vitrim.load("torchvision:vit_b_16", checkpoint=tmp_path / "odd.pth")


# ----------------------------------------------------------------------------------------------------------------- back


@torch.no_grad()
def assert_back(model: Vit) -> Any:
    """torchvision loads the state strictly, and its logits are ours in float64."""
    module, x = source.to_module(model.double()), images(model.spec.image_px[0]).double()
    assert not module.training
    assert same(module(x), model(x))
    return module


@pytest.mark.parametrize("case", [c for c in VARIANTS if c not in ("an_encoder", "tanh_gelu", "relu")])
def test_what_came_from_torchvision_goes_back(case: str) -> None:
    module = VARIANTS[case]()
    back = assert_back(vitrim.from_model(module))
    if case == "plain":
        assert all(torch.equal(value, back.state_dict()[key].float()) for key, value in module.state_dict().items())


def test_fewer_blocks_and_a_narrower_mlp_are_written_and_loaded_without_vitrim(tmp_path: Path) -> None:
    model = vitrim.from_model(small(num_layers=2))
    model = surgery.cut(model, [surgery.Keep(hidden=tuple(range(17)))] * 2, method="test")
    model = surgery.exact_tail(model)
    out = vitrim.sources.write(model, "torchvision", tmp_path / "out")
    kwargs = json.loads((out / "config.json").read_text())["kwargs"]
    assert (kwargs["num_layers"], kwargs["mlp_dim"]) == (2, 17)
    module = VisionTransformer(**kwargs).eval()
    module.load_state_dict(load_file(out / "model.safetensors"), strict=True)
    with safe_open(out / "model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["torchvision"]) == kwargs
    x = images().double()
    with torch.no_grad():
        assert same(module.double()(x), model.double()(x))


def test_a_written_folder_is_read_again_with_its_labels_and_preprocessing(tmp_path: Path) -> None:
    model = vitrim.from_model(
        small(),
        preprocess=Preprocess(mean=(0.1, 0.2, 0.3), std=(0.5,) * 3, size_px=(32, 32), crop=0.9),
        labels=tuple("abcde"),
    )
    source.write(model, tmp_path / "out")
    again = vitrim.load(f"torchvision:{tmp_path / 'out'}")
    assert again.config == model.config
    assert str(tmp_path) not in json.dumps(again.provenance)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())
    assert vitrim.load(f"torchvision:{tmp_path / 'out'}", pretrained=False, classes=3).spec.classes == 3
    with pytest.raises(SourceError, match="is there already"):
        source.write(model, tmp_path / "out")


def test_what_is_the_same_network_in_other_words_goes_back() -> None:
    attention = AttentionSpec(heads=3, qk_dim=8, v_dim=8, scale=8**-0.5, k_bias=False, out_bias=False, layer_scale=True)
    spec = ModelSpec(
        image_px=(16, 16),
        patch_px=(8, 8),
        width=24,
        position=Position(grid=(2, 2), prefix_rows=False),
        final_norm=False,
        pool_norm=True,
        blocks=(BlockSpec(attention=attention, mlp=MlpSpec(hidden=9, fc1_bias=False, layer_scale=True)),) * 2,
        outputs=(Output(name="answer", classes=4, bias=False),),
    )
    assert_back(randomised(build(spec)))


def test_the_block_or_part_that_torchvision_cannot_say_is_named(tmp_path: Path) -> None:
    model = vitrim.from_model(small())
    for keep, words in (
        (surgery.Keep(attention=False), "block 1 has no attention"),
        (surgery.Keep(mlp=False), "block 1 has no MLP"),
        (surgery.Keep(heads=(0, 2)), "block 1 has 2 heads of 8"),
        (surgery.Keep(hidden=tuple(range(9))), r"block 1 differs from block 0 \(MLP units 9, there 40\)"),
    ):
        with pytest.raises(SourceError, match=f"torchvision cannot say this model: {words}"):
            source.write(surgery.cut(model, [None, keep, None], method="test"), tmp_path / "out")
    for module, words in (
        (headless(), "no classifier"),
        (with_act(nn.ReLU()), "block 0 has the activation 'relu'"),
        (small(norm_layer=partial(nn.LayerNorm, eps=1e-3)), "eps 0.001"),
    ):
        with pytest.raises(SourceError, match=words):
            source.write(vitrim.from_model(module), tmp_path / "out")
    pooled = build(replace(model.spec, pool=Pool(kind="mean")))
    with pytest.raises(SourceError, match="its pooling is 'mean'"):
        source.write(pooled, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
