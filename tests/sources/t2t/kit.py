"""T2T-ViT's published networks and the small ones that tests read."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from tests.specs import images
from vitrim.model import Vit
from vitrim.sources import t2t
from vitrim.sources.t2t.read import places_of

# name: arguments of the authors' class, parameters, trainable ones, GMACs (the sheet's counted columns)
PUBLISHED: dict[str, tuple[dict[str, Any], int, int, float]] = {
    "t2t_vit_7": ({"embed_dim": 256, "depth": 7, "num_heads": 4, "mlp_ratio": 2.0}, 4_310_222, 4_255_694, 1.156),
    "t2t_vit_10": ({"embed_dim": 256, "depth": 10, "num_heads": 4, "mlp_ratio": 2.0}, 5_889_230, 5_834_702, 1.527),
    "t2t_vit_12": ({"embed_dim": 256, "depth": 12, "num_heads": 4, "mlp_ratio": 2.0}, 6_941_902, 6_887_374, 1.775),
    "t2t_vit_14": ({"embed_dim": 384, "depth": 14, "num_heads": 6, "mlp_ratio": 3.0}, 21_545_550, 21_465_806, 4.800),
    "t2t_vit_19": ({"embed_dim": 448, "depth": 19, "num_heads": 7, "mlp_ratio": 3.0}, 39_177_422, 39_085_070, 8.503),
    "t2t_vit_24": ({"embed_dim": 512, "depth": 24, "num_heads": 8, "mlp_ratio": 3.0}, 64_105_934, 64_000_974, 13.69),
    "t2t_vit_t_14": ({"embed_dim": 384, "depth": 14, "num_heads": 6, "mlp_ratio": 3.0}, 21_541_070, 21_465_422, 6.106),
    "t2t_vit_t_19": ({"embed_dim": 448, "depth": 19, "num_heads": 7, "mlp_ratio": 3.0}, 39_172_942, 39_084_686, 9.808),
    "t2t_vit_t_24": ({"embed_dim": 512, "depth": 24, "num_heads": 8, "mlp_ratio": 3.0}, 64_101_454, 64_000_590, 15.00),
    "t2t_vit_14_wide": (
        {"embed_dim": 768, "depth": 4, "num_heads": 12, "mlp_ratio": 3.0},
        25_156_302,
        25_000_910,
        5.242,
    ),
    "t2t_vit_14_resnext": (
        {"embed_dim": 384, "depth": 14, "num_heads": 32, "mlp_ratio": 3.0},
        21_545_550,
        21_465_806,
        4.800,
    ),
}
VARIANTS: dict[str, dict[str, Any]] = {
    "performer": {},
    "transformer": {"tokens_type": "transformer"},
    "performer, qkv bias, other scale": {"qkv_bias": True, "qk_scale": 24**-0.5},
    "transformer, one channel, encoder": {"tokens_type": "transformer", "in_chans": 1, "num_classes": 0},
    "performer, 48 px, many heads": {"img_size": 48, "num_heads": 8, "mlp_ratio": 3.0},
}


def read(module: nn.Module, **options: Any) -> Vit:
    """Our model of a reference network, in float64 with all digits."""
    model = t2t.from_module(module, **options).double()
    exact = t2t.weights_of(module, model.spec)
    assert all(torch.equal(exact[name].double(), value) for name, value in model.state_dict().items())
    state = {name: value.double() for name, value in module.state_dict().items()}
    with torch.no_grad():
        for theirs, (ours, _) in places_of(model.spec).items():
            if not ours.endswith("qkv_bias"):
                target = model.get_parameter(ours)
                target.copy_(state[theirs].reshape(target.shape))
    return model


def pictures(module: nn.Module, count: int = 2, px: int | None = None) -> torch.Tensor:
    spec = t2t.spec_of(module)
    return images(spec if px is None else replace(spec, image_px=(px, px)), count)
