"""timm's modules made small and random, and what must hold between them and ours."""

from __future__ import annotations

from functools import partial
from typing import Any

import timm
import torch
from timm.layers import GluMlp, SwiGLU
from torch import Tensor, nn

from tests.sources.kit import same
from vitrim.model import Vit

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
    "pixels_that_no_patch_covers": {"img_size": (50, 37)},
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
