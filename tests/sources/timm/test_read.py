"""timm's Vision Transformers: the same numbers in, and a refusal by name of what the spec cannot say."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import timm
import torch
from timm.layers import GluMlp, SwiGLU
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import vitrim
from tests.sources.kit import same
from tests.sources.timm.kit import MAP, OPTIONS, SMALL, VARIANTS, assert_same, images, randomised, small
from vitrim import counting
from vitrim.errors import SourceError
from vitrim.sources import timm as source
from vitrim.spec import Preprocess

# --------------------------------------------------------------------------------------------------------------- law 5


@pytest.mark.parametrize("name", VARIANTS)
def test_a_loaded_model_gives_timms_logits_and_features(name: str) -> None:
    module = small(name)
    assert_same(module, vitrim.from_model(module))


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
    with pytest.raises(SourceError, match=r"attention pooling differs from the blocks \(heads 4, there 3\)"):
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
    module.head = nn.Sequential(nn.LayerNorm(24), nn.Linear(24, 5))
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
