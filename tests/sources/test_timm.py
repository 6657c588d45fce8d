"""timm's Vision Transformers: the same numbers in and out, and a refusal by name of what the spec cannot say."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import GluMlp, SwiGLU
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import vitrim
from vitrim import counting, surgery
from vitrim.errors import SourceError
from vitrim.model import Vit, build
from vitrim.sources import timm as source
from vitrim.spec import Preprocess

VARIANTS = [
    "vit_tiny_patch16_224",
    "vit_small_patch32_224",
    "vit_base_patch16_224.augreg_in21k",
    "vit_base_patch16_224_miil",
    "vit_medium_patch16_gap_240",
    "vit_base_patch16_gap_224",
    "vit_huge_patch14_gap_224",
    "vit_base_patch32_clip_224",
    "vit_base_patch16_clip_quickgelu_224",
    "vit_large_patch14_clip_quickgelu_336",
    "vit_huge_patch14_clip_224",
    "vit_small_patch14_dinov2",
    "vit_base_patch14_reg4_dinov2",
    "vit_giant_patch14_dinov2",
    "vit_giant_patch14_reg4_dinov2",
    "vit_wee_patch16_reg1_gap_256",
    "vit_little_patch16_reg4_gap_256",
    "vit_mediumd_patch16_reg4_gap_256",
    "vit_betwixt_patch32_clip_224",
    "vit_base_patch16_siglip_gap_224",
    "vit_base_patch16_siglip_224",
    "vit_so400m_patch14_siglip_224",
    "vit_giantopt_patch16_siglip_256",
    "vit_so400m_patch14_siglip_gap_224",
    "vit_so150m2_patch16_reg1_gap_256",
    "vit_intern300m_patch14_448",
    "flexivit_small",
    "eva_large_patch14_196",
    "deit_tiny_patch16_224",
    "deit_small_patch16_224",
    "deit_tiny_distilled_patch16_224",
    "deit_base_distilled_patch16_384",
    "deit3_small_patch16_224",
    "deit3_huge_patch14_224",
    "test_vit",
    "test_vit2",
    "vit_xsmall_patch16_clip_224",
    "vit_base_patch16_radio_v3",
]

SMALL = {"embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}
MAP: dict[str, Any] = {"global_pool": "map", "class_token": False}


def randomised(module: nn.Module, *, seed: int = 0) -> Any:
    """Every number random: zeros and ones hide mistakes. Norm weights stay around one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.normal_(0.0, 0.3, generator=generator)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1.0)
    return module.eval()


def small(name: str, **options: Any) -> Any:
    """A named variant with its own patch and few numbers, randomised."""
    patch = timm.create_model(name, depth=0, embed_dim=8, num_heads=1, img_size=None).patch_embed.patch_size[0]
    return randomised(timm.create_model(name, **{**SMALL, "img_size": 3 * patch, **options}))


def images(module: Any, count: int = 2) -> Tensor:
    shape = (module.patch_embed.proj.in_channels, *module.patch_embed.img_size)
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(1))


def same(ours: Tensor, theirs: Tensor, tolerance: float = 1e-10) -> bool:
    return ours.shape == theirs.shape and float((ours - theirs).abs().max()) <= tolerance * max(
        1.0, float(theirs.abs().max())
    )


@torch.no_grad()
def assert_same(module: Any, model: Vit, tolerance: float = 1e-10) -> None:
    """Law 5 in float64: logits, and the stream after every block."""
    module, model = module.double(), model.double()
    x = images(module).double()
    depth = len(model.blocks)
    found = model(x, want=("logits", *(f"block:{i}" for i in range(depth))))
    assert same(found["logits"], module(x), tolerance)
    features = module.forward_intermediates(
        x, indices=list(range(depth)), output_fmt="NLC", intermediates_only=True, return_prefix_tokens=True
    )
    for i, feature in enumerate(features):
        theirs = torch.cat([feature[1], feature[0]], dim=1) if isinstance(feature, tuple) else feature
        assert same(found[f"block:{i}"], theirs, tolerance)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# --------------------------------------------------------------------------------------------------------------- law 5


@pytest.mark.parametrize("name", VARIANTS)
def test_a_loaded_model_gives_timms_logits_and_features(name: str) -> None:
    module = small(name)
    assert_same(module, vitrim.from_model(module))


OPTIONS: dict[str, dict[str, Any]] = {
    "layer_scale": {"init_values": 1e-5},
    "qk_norm": {"qk_norm": True},
    "no_biases": {"qkv_bias": False, "proj_bias": False},
    "no_class_token": {"class_token": False, "global_pool": "avg"},
    "fc_norm": {"global_pool": "avg", "fc_norm": True},
    "average_before_norm": {"global_pool": "avg", "fc_norm": False},
    "class_token_normed_after_pooling": {"fc_norm": True},
    "registers": {"reg_tokens": 3},
    "registers_without_rows": {"reg_tokens": 3, "no_embed_class": True},
    "no_positions": {"pos_embed": "none"},
    "no_final_norm": {"final_norm": False},
    "pre_norm": {"pre_norm": True},
    "tanh_gelu": {"act_layer": "gelu_tanh"},
    "relu": {"act_layer": "relu"},
    "silu": {"act_layer": "silu"},
    "split_swiglu": {"mlp_layer": SwiGLU, "act_layer": nn.SiLU},
    "packed_swiglu_with_its_gate_last": {"mlp_layer": partial(GluMlp, gate_last=True), "act_layer": nn.SiLU},
    "another_eps": {"norm_layer": partial(nn.LayerNorm, eps=1e-3)},
    "an_encoder": {"num_classes": 0},
    "map_pooling_of_an_encoder": {**MAP, "num_classes": 0},
    "map_pooling_with_tanh_gelu": {**MAP, "act_layer": "gelu_tanh"},
    "map_pooling_with_a_norm_behind_it": {**MAP, "fc_norm": True},
    "map_pooling_over_prefix_tokens_too": {"global_pool": "map", "reg_tokens": 2, "pool_include_prefix": True},
    "all_tokens": {"num_classes": 0, "global_pool": ""},
    "all_tokens_behind_fc_norm": {"num_classes": 0, "global_pool": "", "fc_norm": True},
    "grey_images": {"in_chans": 1},
    "an_oblong_image": {"img_size": (32, 48)},
    "oblong_patches": {"img_size": (32, 48), "patch_size": (16, 8)},
    "dropout_and_patch_dropout": {
        "drop_rate": 0.5,
        "patch_drop_rate": 0.5,
        "attn_drop_rate": 0.5,
        "drop_path_rate": 0.5,
    },
    "dynamic_size": {"dynamic_img_size": True},
    "uneven_mlp": {"mlp_ratio": 2.7},
}


@pytest.mark.parametrize("case", OPTIONS)
def test_every_option_that_the_spec_can_say_is_exact(case: str) -> None:
    module = small("vit_tiny_patch16_224", **OPTIONS[case])
    assert_same(module, vitrim.from_model(module))


@pytest.mark.parametrize(
    "name",
    ["deit_tiny_patch16_224", "deit_small_distilled_patch16_224", "deit3_small_patch16_224", "vit_small_patch14_dinov2",
     "vit_xsmall_patch16_clip_224"],
)  # fmt: skip
def test_full_size_models_agree_in_float32(name: str) -> None:
    with torch.device("meta"):
        module = timm.create_model(name, **({"img_size": 224} if "dinov2" in name else {}))
    module = module.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0.0, 0.05, generator=generator)
        module.eval()
        model = vitrim.from_model(module, verify=False)
        x = images(module, 1)
        assert same(model(x), module(x), 1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "deit3_small_patch16_224", "vit_base_patch14_reg4_dinov2"])
@pytest.mark.parametrize("grid", [(2, 2), (5, 4)])
def test_another_image_size_resizes_positions_as_timm_does(name: str, grid: tuple[int, int]) -> None:
    module = small(name, dynamic_img_size=True)
    model, patch = vitrim.from_model(module), module.patch_embed.patch_size[0]
    x = torch.randn(1, 3, grid[0] * patch, grid[1] * patch, generator=torch.Generator().manual_seed(2))
    assert same(model(x), module(x), 1e-5)


def test_a_fine_tuned_module_with_other_classes_is_read_from_its_parts() -> None:
    module = small("deit3_small_patch16_224")
    module.head = nn.Linear(24, 3, bias=False)  # timm's own `num_classes` says 5 still
    model = vitrim.from_model(randomised(module))
    assert model.spec.classes == 3
    assert_same(module, model)


def test_the_spec_counts_what_timm_has() -> None:
    for name in ("deit_tiny_distilled_patch16_224", "vit_giant_patch14_reg4_dinov2", "vit_base_patch32_clip_224"):
        module = small(name)
        assert counting.params(source.spec_of(module)) == sum(p.numel() for p in module.parameters())


# --------------------------------------------------------------------------------------------- the caller's own things


def test_from_model_leaves_module_and_random_state_as_they_were() -> None:
    module = small("deit_tiny_patch16_224", drop_path_rate=0.3)
    module.train()
    module.blocks[0].eval()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    flags, random = [part.training for part in module.modules()], torch.get_rng_state()
    model = vitrim.from_model(module)
    assert [part.training for part in module.modules()] == flags
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(part._forward_hooks for part in module.modules())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert not model.training


def test_half_precision_modules_come_in_as_float32_and_stay_half() -> None:
    module = small("deit_tiny_patch16_224").to(torch.bfloat16)
    model = vitrim.from_model(module)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
    assert_same(module.float(), model)


def test_gradients_reach_every_number_of_a_loaded_model() -> None:
    model = vitrim.from_model(small("deit3_small_patch16_224"))
    model(torch.randn(2, 3, 48, 48)).square().sum().backward()
    assert all(p.grad is not None and p.is_leaf for p in model.parameters())


def test_preprocessing_is_timms_own_unless_given() -> None:
    module = small("vit_base_patch16_clip_224.openai")
    told = vitrim.from_model(module).config.preprocess
    assert told is not None
    assert told.mean == (0.48145466, 0.4578275, 0.40821073)
    assert (told.size_px, told.crop, told.crop_mode, told.interpolation) == ((48, 48), 0.9, "center", "bicubic")
    mine = Preprocess(mean=(0.5,) * 3, std=(0.5,) * 3, size_px=(48, 48))
    assert vitrim.from_model(module, preprocess=mine).config.preprocess == mine
    assert vitrim.from_model(randomised(VisionTransformer(img_size=32, **SMALL))).config.preprocess is None


# ------------------------------------------------------------------------------------------------------------- refusals


def rms(**options: Any) -> dict[str, Any]:
    return {"norm_layer": timm.layers.RmsNorm, **options}


REFUSED_OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "map_beside_prefix": ({"global_pool": "map"}, "map pooling over the patch tokens alone"),
    "map_relu": ({**MAP, "act_layer": "relu"}, "map pooling with the activation relu"),
    "prr": ({"global_pool": "prr"}, "'prr' pooling"),
    "avgmax": ({"global_pool": "avgmax"}, "'avgmax' pooling"),
    "max": ({"global_pool": "max"}, "'max' pooling"),
    "prefix_in_mean": ({"global_pool": "avg", "pool_include_prefix": True}, "pool_include_prefix"),
    "rms": (rms(), "root-mean-square norm"),
    "attention_norm": ({"scale_attn_norm": True}, "scale_attn_norm"),
    "mlp_norm": ({"scale_mlp_norm": True}, "scale_mlp_norm"),
    "norm_in_swiglu": ({"mlp_layer": SwiGLU, "act_layer": nn.SiLU, "scale_mlp_norm": True}, "norm inside its MLP"),
    "glu": ({"mlp_layer": GluMlp, "act_layer": nn.Sigmoid}, "activation Sigmoid"),
    "patch_norm": ({"embed_norm_layer": nn.LayerNorm}, "norm in its patch embedding"),
    "differential": ({"attn_layer": "diff", "num_heads": 2}, "differential attention"),
    "token_classifier": ({"global_pool": ""}, "classifier on every token"),
    "odd_size": ({"img_size": 50}, "multiple of patch_px"),
    "act": ({"act_layer": "tanh"}, "activation Tanh"),
}


@pytest.mark.parametrize("case", REFUSED_OPTIONS)
def test_what_the_spec_cannot_say_is_refused_by_its_name(case: str) -> None:
    options, words = REFUSED_OPTIONS[case]
    with pytest.raises(SourceError, match=words):
        vitrim.from_model(small("vit_tiny_patch16_224", **options))


REFUSED_NAMES = {
    "beit_base_patch16_224": "relative position bias",
    "vit_relpos_small_patch16_224": "relative position bias",
    "eva02_tiny_patch14_224": "rotary positions",
    "samvit_base_patch16": "windowed attention",
    "vit_tiny_r_s16_p8_224": "hybrid",
    "vit_so150m_patch16_reg4_map_256": "map pooling over the patch tokens alone",
    "vit_small_patch16_18x2_224": "parallel blocks",
    "vit_base_patch16_xp_224": "parallel blocks",
    "vit_base_patch16_rpn_224": "post-norm",
    "cait_xxs24_224": "class attention",
    "swin_tiny_patch4_window7_224": "hierarchy of windows",
    "pvt_v2_b0": "hierarchy of stages",
    "resnet18": "convolutional or hierarchical",
    "convnext_tiny": "convolutional or hierarchical",
    "aimv2_large_patch14_224": "norm",
    "beit3_base_patch16_224": "scale_attn_norm",
}


@pytest.mark.parametrize("name", REFUSED_NAMES)
def test_named_models_of_other_designs_are_refused_by_what_they_have(name: str) -> None:
    with torch.device("meta"), pytest.raises(SourceError, match=REFUSED_NAMES[name]):
        vitrim.load(f"timm:{name}", pretrained=False)


def test_map_pooling_of_another_structure_is_refused_by_its_part() -> None:
    from timm.layers import AttentionPoolLatent

    def pooled(**options: Any) -> Any:
        module = small("vit_tiny_patch16_224", **MAP)
        module.attn_pool = AttentionPoolLatent(24, **{"num_heads": 3, "norm_layer": nn.LayerNorm, **options})
        return randomised(module)

    for options, words in (
        ({"latent_len": 2}, "with 2 queries"),
        ({"pos_embed": "abs", "feat_size": 9}, "a position table of its own"),
        ({"q_proj": False}, "without a projection of its query"),
        ({"qk_norm": True}, "norms of queries and keys"),
        ({"latent_dim": 8}, "another width than 24"),
        ({"qkv_bias": False}, "without biases"),
        ({"norm_layer": None}, "without a norm"),
        ({"norm_layer": partial(nn.LayerNorm, eps=1e-3)}, "different eps"),
        ({"act_layer": nn.SiLU}, "the activation silu"),
        ({"out_features": 0}, "without an MLP"),
    ):
        with pytest.raises(SourceError, match=words):
            vitrim.from_model(pooled(**options))
    wide = vitrim.from_model(pooled(num_heads=4, mlp_ratio=2.0, norm_layer=partial(nn.LayerNorm, eps=1e-6)))
    assert (wide.spec.pool.heads, wide.spec.pool.hidden) == (4, 48)
    with pytest.raises(SourceError, match=r"map pooling differs from the blocks \(heads 4, there 3\)"):
        source.to_timm(wide)


def test_modules_of_other_designs_are_refused_from_memory_too() -> None:
    with torch.device("meta"):
        swin = timm.create_model("swin_tiny_patch4_window7_224")
    with pytest.raises(SourceError, match="hierarchy of windows"):
        vitrim.from_model(swin)
    with pytest.raises(SourceError, match="convolutional or hierarchical"):
        vitrim.from_model(nn.Linear(2, 2))


def test_adapters_and_added_numbers_are_refused() -> None:
    module = small("deit_tiny_patch16_224")
    module.blocks[1].attn.qkv = nn.Sequential(module.blocks[1].attn.qkv)
    with pytest.raises(SourceError, match="Sequential as qkv in block 1"):
        vitrim.from_model(module)
    module = small("deit_tiny_patch16_224")
    module.prompt = nn.Parameter(torch.zeros(2, 24))
    with pytest.raises(SourceError, match="does not have: prompt"):
        vitrim.from_model(module)
    module = small("deit_tiny_patch16_224")
    module.head = nn.Sequential(nn.Dropout(), nn.Linear(24, 5))
    with pytest.raises(SourceError, match="more than one linear"):
        vitrim.from_model(module)


class Doubled(VisionTransformer):
    """A subclass whose forward does something else in block 1."""

    def forward_features(self, x: Tensor, **_: Any) -> Tensor:  # type: ignore[override]
        x = self._pos_embed(self.patch_embed(x))
        for i, block in enumerate(self.blocks):
            x = block(2 * x if i == 1 else x)
        return self.norm(x)


class Scaled(VisionTransformer):
    """A subclass whose forward does something else after its blocks."""

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return 2 * super().forward_head(x, pre_logits)


class Same(VisionTransformer):
    """A subclass that computes what timm computes."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x)


class Telling(VisionTransformer):
    """A subclass that gives more than logits."""

    def forward(self, x: Tensor) -> Any:  # type: ignore[override]
        return super().forward(x), x


class Broken(VisionTransformer):
    """A subclass that cannot be run."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        raise RuntimeError("no way")


def test_a_module_that_gives_no_logits_is_refused() -> None:
    with pytest.raises(SourceError, match="gives a tuple instead of one tensor"):
        vitrim.from_model(randomised(Telling(img_size=32, **SMALL)))
    with pytest.raises(SourceError, match=r"cannot be run on an image.*no way.*verify=False"):
        vitrim.from_model(randomised(Broken(img_size=32, **SMALL)))
    module = small("deit_tiny_patch16_224")
    module.head.bias.data[0] = float("nan")
    with pytest.raises(SourceError, match="NaN"):
        vitrim.from_model(module)


def test_a_changed_forward_is_found_and_the_first_differing_place_named() -> None:
    module = randomised(Doubled(img_size=32, **{**SMALL, "depth": 3}))
    with pytest.raises(SourceError, match="outputs differ, first in block 1"):
        vitrim.from_model(module)
    assert vitrim.from_model(module, verify=False).spec.width == 24
    with pytest.raises(SourceError, match="what follows the blocks"):
        vitrim.from_model(randomised(Scaled(img_size=32, **SMALL)))
    module = randomised(Same(img_size=32, **SMALL))
    assert_same(module, vitrim.from_model(module))


# ------------------------------------------------------------------------------------------------------ names and files


def test_unknown_names_and_tags_give_the_near_miss() -> None:
    with pytest.raises(SourceError, match="did you mean 'deit_small_patch16_224'"):
        vitrim.load("timm:deit_smal_patch16_224", pretrained=False)
    with pytest.raises(SourceError, match="did you mean 'fb_in1k'"):
        vitrim.load("timm:deit_small_patch16_224.fb_in1", pretrained=False)


def test_a_name_gives_timms_random_model_with_the_classes_asked_for() -> None:
    model = vitrim.load("timm:deit_tiny_patch16_224", pretrained=False, classes=7)
    assert model.spec.classes == 7
    assert model.provenance["source"] == "timm:deit_tiny_patch16_224"
    assert model.provenance["weights"] == "random"
    assert not model.training


def test_a_missing_network_names_the_two_ways_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import LocalEntryNotFoundError

    def offline(*_: Any, **__: Any) -> None:
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(SourceError, match=r"--checkpoint PATH.*--no-pretrained"):
        vitrim.load("timm:deit_tiny_patch16_224")
    with pytest.raises(SourceError, match="description of 'hf-hub:someone/thing'"):
        vitrim.load("hf-hub:someone/thing", pretrained=False)


def test_an_error_of_ours_is_not_taken_for_a_missing_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(timm, "create_model", broken)
    with pytest.raises(KeyError):
        vitrim.load("timm:deit_tiny_patch16_224")


def published(monkeypatch: pytest.MonkeyPatch, **options: Any) -> Any:
    """timm's `create_model` as if the weights had been fetched."""
    real = timm.create_model
    module = randomised(real("deit_tiny_patch16_224", depth=1, **options))
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: module)
    return module


def test_published_weights_bring_labels_and_their_origin(monkeypatch: pytest.MonkeyPatch) -> None:
    published(monkeypatch)
    model = vitrim.load("timm:deit_tiny_patch16_224")
    assert model.config.labels is not None
    assert model.config.labels[0] == "n01440764"
    assert model.provenance["base_model"].startswith("timm/deit_tiny")
    assert model.provenance["license"] == "apache-2.0"


def test_other_classes_of_published_weights_are_refused_and_none_drops_the_classifier(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    published(monkeypatch)
    with pytest.raises(SourceError, match=r"1000 classes.*--new-head"):
        vitrim.load("timm:deit_tiny_patch16_224", classes=10)
    model = vitrim.load("timm:deit_tiny_patch16_224", classes=0)
    assert model.spec.outputs == ()
    assert model.config.task == "features"


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A small deit_tiny under its full name, so that checkpoints in tests stay small."""
    real = timm.create_model

    def create(name: str, **options: Any) -> Any:
        return real(name, **{"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 3, **options})

    monkeypatch.setattr(timm, "create_model", create)
    return lambda **options: randomised(create("deit_tiny_patch16_224", **options))


def test_a_local_checkpoint_gives_its_weights_and_its_own_classes(tiny: Any, tmp_path: Path) -> None:
    module = tiny(num_classes=3)
    torch.save({"model": module.state_dict(), "epoch": 3}, tmp_path / "mine.pth")
    random = torch.get_rng_state()
    model = vitrim.load("timm:deit_tiny_patch16_224", checkpoint=tmp_path / "mine.pth")
    assert torch.equal(torch.get_rng_state(), random)
    assert model.spec.classes == 3
    assert model.provenance["weights"] == "mine.pth"
    assert_same(module, model)


def test_published_layouts_are_translated_by_timms_own_filter(tiny: Any, tmp_path: Path) -> None:
    module = tiny(init_values=1e-5)
    old = {
        key.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): v for key, v in module.state_dict().items()
    }
    torch.save(old, tmp_path / "deit3.pth")
    real = timm.create_model
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timm, "create_model", lambda name, **options: real(name, **{"init_values": 1e-5, **options}))
        model = vitrim.load("timm:deit_tiny_patch16_224", checkpoint=tmp_path / "deit3.pth")
    assert_same(module, model)


def test_a_checkpoint_with_other_classes_than_asked_for_is_refused(tiny: Any, tmp_path: Path) -> None:
    torch.save(tiny(num_classes=3).state_dict(), tmp_path / "mine.pth")
    with pytest.raises(SourceError, match=r"classes=10: the classifier in mine\.pth has 3"):
        vitrim.load("timm:deit_tiny_patch16_224", checkpoint=tmp_path / "mine.pth", classes=10)
    assert vitrim.load("timm:deit_tiny_patch16_224", checkpoint=tmp_path / "mine.pth", classes=0).spec.outputs == ()


def test_a_checkpoint_without_classifier_gives_an_encoder(tiny: Any, tmp_path: Path) -> None:
    module = tiny(num_classes=0)
    torch.save(module.state_dict(), tmp_path / "encoder.pth")
    model = vitrim.load("timm:deit_tiny_patch16_224", checkpoint=tmp_path / "encoder.pth")
    assert model.config.task == "features"
    assert_same(module, model)


def test_missing_and_unexpected_keys_are_listed_ten_at_most(tiny: Any, tmp_path: Path) -> None:
    state = {f"encoder.{key}" if "blocks.1" in key else key: value for key, value in tiny().state_dict().items()}
    torch.save(state, tmp_path / "foreign.pth")
    with pytest.raises(
        SourceError, match=r"missing: blocks\.1.* and 2 more; unexpected: encoder.* and 2 more"
    ) as caught:
        vitrim.load("timm:deit_tiny_patch16_224", checkpoint=tmp_path / "foreign.pth")
    assert str(caught.value).count("encoder.blocks") == 10


def test_a_checkpoint_of_another_image_size_is_refused(tiny: Any, tmp_path: Path) -> None:
    torch.save(tiny(img_size=64).state_dict(), tmp_path / "large.pth")
    with pytest.raises(SourceError, match=r"pos_embed has shape \(1, 17, 24\).*expects \(1, 5, 24\)"):
        vitrim.load("timm:deit_tiny_patch16_224", checkpoint=tmp_path / "large.pth")


def test_a_checkpoint_of_another_width_is_refused(tiny: Any, tmp_path: Path) -> None:
    state = tiny().state_dict()
    state["blocks.0.mlp.fc1.weight"] = torch.zeros(5, 24)
    torch.save(state, tmp_path / "odd.pth")
    with pytest.raises(
        SourceError, match=r"of another shape: blocks\.0\.mlp\.fc1\.weight \(5, 24\) \(expected \(96, 24\)\)"
    ):
        vitrim.load("timm:deit_tiny_patch16_224", checkpoint=tmp_path / "odd.pth")


@pytest.mark.parametrize("style", ["q k v", "q_proj k_proj v_proj", "to_q to_k to_v", "query key value"])
def test_split_queries_keys_and_values_are_joined(tiny: Any, tmp_path: Path, style: str) -> None:
    module, split = tiny(num_classes=3), {}
    for key, value in module.state_dict().items():
        if ".qkv." in key:
            split.update({key.replace("qkv", part): v for part, v in zip(style.split(), value.chunk(3), strict=True)})
        else:
            split[key] = value
    save_file({key: value.contiguous() for key, value in split.items()}, tmp_path / "split.safetensors")
    assert_same(module, vitrim.load("timm:deit_tiny_patch16_224", checkpoint=tmp_path / "split.safetensors"))


@pytest.mark.parametrize("prefix", ["model.", "net.vit.", "module.backbone."])
def test_a_prefix_that_every_name_shares_is_left_out_and_said(
    tiny: Any, tmp_path: Path, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    module = tiny(num_classes=3)
    state = {f"{prefix}{key}": value for key, value in module.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 1, "hyper_parameters": {"lr": 0.1}}, tmp_path / "last.ckpt")
    with caplog.at_level(logging.INFO, "vitrim.sources"):
        model = vitrim.load("timm:deit_tiny_patch16_224", checkpoint=tmp_path / "last.ckpt")
    assert f"every name begins with {prefix.removeprefix('module.')!r}" in caplog.text
    assert "its classifier of 3 classes is kept" in caplog.text
    assert_same(module, model)
    torch.save({**state, "criterion.weight": torch.ones(3)}, tmp_path / "more.ckpt")
    with pytest.raises(SourceError, match=r"unexpected: .*criterion\.weight|missing: cls_token"):
        vitrim.load("timm:deit_tiny_patch16_224", checkpoint=tmp_path / "more.ckpt")


def test_a_training_checkpoint_of_timm_gives_its_averaged_weights(tiny: Any, tmp_path: Path) -> None:
    module, raw = tiny(num_classes=3), tiny(num_classes=3, init_values=None).state_dict()
    optimizer = torch.optim.AdamW(module.parameters())
    module.requires_grad_(True)
    module(images(module)).sum().backward()
    optimizer.step()
    torch.save(
        {
            "epoch": 3,
            "arch": "deit_tiny_patch16_224",
            "state_dict": raw,
            "state_dict_ema": module.state_dict(),
            "optimizer": optimizer.state_dict(),
            "version": 2,
            "args": argparse.Namespace(lr=0.1, mean=(0.5, 0.5, 0.5), model="deit_tiny_patch16_224"),
            "amp_scaler": {"scale": 65536.0, "growth_factor": 2.0},
            "metric": 71.2,
        },
        tmp_path / "model_best.pth.tar",
    )
    assert_same(module, vitrim.load("timm:deit_tiny_patch16_224", checkpoint=tmp_path / "model_best.pth.tar"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_come_in_as_float32(tiny: Any, tmp_path: Path, dtype: torch.dtype) -> None:
    module = tiny(num_classes=3).to(dtype)
    save_file(module.state_dict(), tmp_path / "half.safetensors")
    model = vitrim.load("timm:deit_tiny_patch16_224", checkpoint=tmp_path / "half.safetensors")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert_same(module.float(), model)


def test_extra_classifiers_are_refused_by_name_or_left_out_with_the_classifier(
    tiny: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    module = tiny()
    extra = {
        "head_dist.weight": torch.ones(1000, 24),
        "head_dist.bias": torch.ones(1000),
        "aux_head.fc.bias": torch.ones(2),
    }
    save_file({**module.state_dict(), **extra}, tmp_path / "extra.safetensors")
    with pytest.raises(
        SourceError, match=r"unexpected: aux_head\.fc\.bias, head_dist\.bias, head_dist\.weight.*classes=0"
    ):
        vitrim.load("timm:deit_tiny_patch16_224", checkpoint=tmp_path / "extra.safetensors")
    with caplog.at_level(logging.INFO, "vitrim.sources"):
        model = vitrim.load("timm:deit_tiny_patch16_224", checkpoint=tmp_path / "extra.safetensors", classes=0)
    assert "without its classifier: aux_head.fc.bias, head.bias, head.weight, head_dist.bias" in caplog.text
    module.reset_classifier(0)
    assert_same(module, model)


def test_a_layer_in_front_of_the_classifier_is_not_left_out_in_silence(tiny: Any, tmp_path: Path) -> None:
    module = tiny()
    torch.save({**module.state_dict(), "pre_logits.fc.weight": torch.ones(24, 24)}, tmp_path / "old.pth")
    with pytest.raises(SourceError, match=r"pre_logits.*classes=0"):
        vitrim.load("timm:deit_tiny_patch16_224", checkpoint=tmp_path / "old.pth")
    assert vitrim.load("timm:deit_tiny_patch16_224", checkpoint=tmp_path / "old.pth", classes=0).spec.outputs == ()


def test_a_quantised_file_is_refused(tiny: Any, tmp_path: Path) -> None:
    state = tiny().state_dict()
    state["blocks.0.attn.qkv.weight"] = torch.ones(72, 24, dtype=torch.int8)
    save_file(state, tmp_path / "q.safetensors")
    with pytest.raises(SourceError, match=r"blocks\.0\.attn\.qkv\.weight \(int8\).*quantised"):
        vitrim.load("timm:deit_tiny_patch16_224", checkpoint=tmp_path / "q.safetensors")


# ----------------------------------------------------------------------------------------------------------------- back


@torch.no_grad()
def assert_back(model: Vit, **options: Any) -> nn.Module:
    """timm loads the state strictly, and its logits are ours."""
    kwargs, state = source.to_timm(model, **options)
    name = "deit_tiny_distilled_patch16_224" if "dist" in model.spec.prefix else "vit_base_patch16_224"
    module = timm.create_model(name, **kwargs).eval()
    module.load_state_dict(state, strict=True)
    x = images(module).double()
    assert same(model.double()(x), module.double()(x))
    return module


@pytest.mark.parametrize("name", VARIANTS)
def test_what_came_from_timm_goes_back(name: str) -> None:
    assert_back(vitrim.from_model(small(name), verify=False))


@pytest.mark.parametrize("case", [case for case in OPTIONS if case != "all_tokens_behind_fc_norm"])
def test_every_option_goes_back(case: str) -> None:
    assert_back(vitrim.from_model(small("vit_tiny_patch16_224", **OPTIONS[case]), verify=False))


def test_a_folded_layer_scale_goes_back_as_ones() -> None:
    folded = surgery.fold_layer_scale(vitrim.from_model(small("deit3_small_patch16_224")))
    assert "blocks.0.ls1.gamma" not in source.to_timm(folded)[1]
    module = assert_back(folded, layer_scale=True)
    assert torch.equal(module.state_dict()["blocks.1.ls2.gamma"], torch.ones(24, dtype=torch.float64))
    small("deit3_small_patch16_224").load_state_dict(module.state_dict(), strict=True)


def test_fewer_blocks_and_a_narrower_mlp_go_back() -> None:
    model = vitrim.from_model(small("deit_tiny_patch16_224", depth=3))
    model = surgery.cut(model, [surgery.Keep(hidden=tuple(range(17)))] * 3, method="test")
    assert_back(surgery.exact_tail(model))


def test_the_block_that_timm_cannot_say_is_named() -> None:
    model = vitrim.from_model(small("deit_tiny_patch16_224", depth=3))
    for keep, words in (
        (surgery.Keep(attention=False), "block 1 has no attention"),
        (surgery.Keep(mlp=False), "block 1 has no MLP"),
        (surgery.Keep(heads=(0, 2)), "block 1 has 2 heads of 8"),
        (surgery.Keep(hidden=tuple(range(9))), r"block 1 differs from block 0 \(MLP units 9"),
    ):
        cut = surgery.cut(model, [None, keep, None], method="test")
        with pytest.raises(SourceError, match=words):
            source.to_timm(cut)


def test_a_module_made_back_has_the_same_spec() -> None:
    model = vitrim.from_model(small("vit_giant_patch14_reg4_dinov2"))
    module = source.to_module(model)
    assert source.spec_of(module) == model.spec
    assert not module.training


def test_a_model_built_here_goes_to_timm() -> None:
    spec = source.spec_of(small("deit_small_distilled_patch16_224"))
    assert_back(randomised(build(spec)))


# ---------------------------------------------------------------------------------------------------- a folder for timm


@torch.no_grad()
def assert_written(model: Vit, out: Path) -> Any:
    """timm makes and fills the module from the folder alone, and its logits are ours in float64."""
    assert source.write(model, out) == out
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.safetensors"]
    module = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    x = images(module).double()
    assert same(model.double()(x), module.double()(x))
    return module


WRITTEN = [
    "vit_tiny_patch16_224",
    "vit_base_patch16_siglip_224",
    "vit_giantopt_patch16_siglip_256",
    "vit_base_patch32_clip_224",
    "vit_base_patch16_clip_quickgelu_224",
    "vit_giant_patch14_reg4_dinov2",
    "vit_small_patch14_dinov2",
    "vit_little_patch16_reg4_gap_256",
    "deit_tiny_distilled_patch16_224",
    "deit3_small_patch16_224",
]


@pytest.mark.parametrize("name", WRITTEN)
def test_a_written_folder_is_loaded_by_timm_with_the_same_logits(name: str, tmp_path: Path) -> None:
    model = vitrim.from_model(small(name), verify=False)
    module = assert_written(model, tmp_path / "out")
    assert replace(source.spec_of(module), blocks=model.spec.blocks) == model.spec


@pytest.mark.parametrize(
    "case", ["an_encoder", "all_tokens", "an_oblong_image", "oblong_patches", "grey_images", "uneven_mlp", "no_biases",
             "no_positions", "fc_norm", "pre_norm", "registers_without_rows", "map_pooling_over_prefix_tokens_too"]
)  # fmt: skip
def test_options_are_written_too(case: str, tmp_path: Path) -> None:
    assert_written(vitrim.from_model(small("vit_tiny_patch16_224", **OPTIONS[case]), verify=False), tmp_path / "out")


def test_a_compressed_model_is_written_with_its_labels_and_preprocessing_and_read_again(tmp_path: Path) -> None:
    preprocess = Preprocess(
        mean=(0.1, 0.2, 0.3),
        std=(0.4, 0.5, 0.6),
        size_px=(48, 48),
        crop=0.8,
        crop_mode="squash",
        interpolation="bilinear",
    )
    model = vitrim.from_model(small("deit_tiny_patch16_224", depth=3), preprocess=preprocess, labels=tuple("abcde"))
    model = surgery.cut(model, [surgery.Keep(hidden=tuple(range(17)))] * 3, method="test")
    module = assert_written(surgery.exact_tail(model), tmp_path / "out")
    data = timm.data.resolve_model_data_config(module)
    assert (tuple(data["mean"]), tuple(data["std"]), data["input_size"]) == (
        preprocess.mean,
        preprocess.std,
        (3, 48, 48),
    )
    assert (data["crop_pct"], data["crop_mode"], data["interpolation"]) == (0.8, "squash", "bilinear")
    again = vitrim.load(f"timm:local-dir:{tmp_path / 'out'}")
    assert (again.config.labels, again.config.preprocess) == (tuple("abcde"), preprocess)
    assert again.spec == model.spec
    assert again.provenance["source"] == "timm:local-dir:out"
    (tmp_path / "out" / "model.safetensors").unlink()
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "config.json").write_text("{}")
    for name in ("out", "nowhere", "ours"):
        with pytest.raises(SourceError, match=f"'timm:local-dir:{name}' is no folder that timm loads"):
            vitrim.load(f"timm:local-dir:{tmp_path / name}")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["label_names"] == list("abcde")


def test_swiglu_without_layer_scale_is_written_with_one_of_ones(tmp_path: Path) -> None:
    model = surgery.fold_layer_scale(vitrim.from_model(small("vit_giant_patch14_dinov2")))
    module = assert_written(model.double(), tmp_path / "out")
    assert torch.equal(module.blocks[1].ls2.gamma, torch.ones(24, dtype=torch.float64))


def test_what_timm_has_no_architecture_for_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    odd = vitrim.from_model(small("vit_tiny_patch16_224", norm_layer=partial(nn.LayerNorm, eps=1e-12)))
    with pytest.raises(SourceError, match="none of its architectures with plain MLPs has norms of eps 1e-12"):
        source.write(odd, tmp_path / "out")
    cut = surgery.cut(vitrim.from_model(small("deit_tiny_patch16_224")), [None, surgery.Keep(mlp=False)], method="test")
    with pytest.raises(SourceError, match="block 1 has no MLP"):
        source.write(cut, tmp_path / "out")
    model = vitrim.from_model(small("deit_tiny_patch16_224"))
    (tmp_path / "file").write_text("x")
    with pytest.raises(SourceError, match="'file' is there already"):
        source.write(model, tmp_path / "file")
    with pytest.raises(SourceError, match="could not be written"):
        source.write(model, tmp_path / "file" / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
