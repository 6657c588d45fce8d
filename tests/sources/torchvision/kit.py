"""torchvision's modules made small and random, and what must hold between them and ours."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models import VisionTransformer

from tests.sources.kit import same
from vitrim.model import Vit

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


def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Named models with two narrow blocks, so that tests stay small."""
    real = torchvision.models.vision_transformer._vision_transformer
    few = {"num_layers": 2, "num_heads": 3, "hidden_dim": 24, "mlp_dim": 40}
    monkeypatch.setattr(
        torchvision.models.vision_transformer, "_vision_transformer", lambda **given: real(**{**given, **few})
    )
