"""Our model -> arguments and state dict of timm's `VisionTransformer`, and the folder that timm loads, where timm can say it."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import LayerNorm, SwiGLUPacked
from timm.models import VisionTransformer
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn

from ...model import Vit
from ...spec import ModelSpec
from .. import files
from ..expressible import ENCODER, ON_POOL, Family, any_half, refusal, require
from ..places import QKV, given, numbers_of
from .read import places_of, spec_of

LOG = logging.getLogger("vitrim.sources")
PLAIN = Family(
    name="timm",
    prefix=r"(cls)?( ?reg)*",
    qk_norms=("none", "layer"),
    pre_norm=(False, True),
    last_norms=((False, False), (True, False), (False, True)),
    pools=("cls", "mean", "map", "none"),
    reads=(ENCODER, ON_POOL),
)
DISTILLED = replace(
    PLAIN,
    prefix="cls dist",
    positions=("learned", "fixed"),
    prefix_rows=True,
    last_norms=((False, False), (True, False)),
    pools=("cls",),
    reads=((("pool",), ("dist",)),),
)
HOSTS = (
    ("vit_base_patch16_224", 1e-6, False),
    ("vit_base_patch16_clip_224", 1e-5, False),
    ("vit_giant_patch14_dinov2", 1e-6, True),
    ("deit_tiny_distilled_patch16_224", 1e-6, False),
)
"""Architectures of timm's, the eps of their norms, and whether their MLPs are swiglu: what a JSON file cannot say otherwise."""


def to_timm(model: Vit, *, layer_scale: bool = False) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Arguments of timm's `VisionTransformer` (`VisionTransformerDistilled` with a distillation token) and a state dict
    that it loads strictly.

    layer_scale: write a LayerScale of ones where it was folded, for an architecture of timm's that has it.
    Raises SourceError naming the block or part that timm cannot say. An exact tail is left out: it changes no output.
    """
    spec = model.spec
    a, m = require(spec, DISTILLED if "dist" in spec.prefix else PLAIN)
    scaled = layer_scale or any_half(spec, "layer_scale")
    kwargs: dict[str, Any] = {
        "img_size": spec.image_px,
        "patch_size": spec.patch_px,
        "in_chans": spec.channels,
        "num_classes": spec.classes or 0,
        "global_pool": {"cls": "token", "mean": "avg", "map": "map", "none": ""}[spec.pool.kind],
        "pool_include_prefix": spec.pool.kind == "map" and bool(spec.prefix),
        "embed_dim": spec.width,
        "depth": len(spec.blocks),
        "num_heads": a.heads,
        "mlp_ratio": _mlp_ratio(2 * m.hidden if m.kind == "swiglu" else m.hidden, spec.width),
        "qkv_bias": any_half(spec, *QKV),
        "qk_norm": a.qk_norm != "none",
        "proj_bias": any_half(spec, "out_bias", "fc1_bias", "fc2_bias"),
        "init_values": 1.0 if scaled else None,
        "class_token": "cls" in spec.prefix,
        "pos_embed": "none" if spec.position.kind == "none" else "learn",
        "no_embed_class": bool(spec.prefix) and not spec.position.prefix_rows and spec.position.kind != "none",
        "reg_tokens": spec.prefix.count("reg"),
        "pre_norm": spec.pre_norm,
        "final_norm": spec.final_norm or spec.pool_norm,
        "fc_norm": spec.pool_norm,
        "norm_layer": partial(LayerNorm, eps=spec.norm_eps),
    }
    if m.kind == "swiglu":
        kwargs["mlp_layer"], kwargs["act_layer"] = SwiGLUPacked, nn.SiLU
    else:
        kwargs["act_layer"] = m.kind
    return kwargs, _state(model, _shell(spec, kwargs))


def to_module(model: Vit, *, layer_scale: bool = False) -> nn.Module:
    """A timm module in eval mode with the model's numbers. Raises SourceError as `to_timm` does."""
    kwargs, state = to_timm(model, layer_scale=layer_scale)
    module = _shell(model.spec, kwargs)
    module.load_state_dict(state, strict=True, assign=True)
    return module.eval()


def check(spec: ModelSpec) -> str:
    """The architecture of timm's that a checkpoint names. Raises SourceError as `write` does, from the spec alone."""
    swiglu, distilled = _gated(spec), "dist" in spec.prefix
    require(spec, DISTILLED if distilled else PLAIN)
    for host, eps, gated in HOSTS:
        if eps == spec.norm_eps and gated == swiglu and distilled == ("dist" in host):
            return host
    raise refusal(
        "timm",
        f"none of its architectures with {'a distillation token and ' if distilled else ''}"
        f"{'swiglu' if swiglu else 'plain'} MLPs has norms of eps {spec.norm_eps!r}",
    )


def _gated(spec: ModelSpec) -> bool:
    return any(block.mlp is not None and block.mlp.kind == "swiglu" for block in spec.blocks)


def write(model: Vit, out: Path) -> Path:
    """A folder as timm has it on the Hub: `timm.create_model("local-dir:OUT", pretrained=True)` gives the same logits.

    Preprocessing and class names go along. Raises SourceError as `to_timm` does, and where none of timm's architectures
    has these norms and MLPs, which timm takes as classes and not as JSON.
    """
    spec, distilled = model.spec, "dist" in model.spec.prefix
    host = check(spec)
    kwargs, state = to_timm(
        model, layer_scale=_gated(spec)
    )  # the one host of swiglu has LayerScale, and None cannot undo it
    said = (int, float, str, tuple)  # by JSON, unlike the classes of layers
    arguments: dict[str, Any] = {key: value for key, value in kwargs.items() if isinstance(value, said)}
    with torch.device("meta"):
        made = timm.create_model(host, **arguments)
    assert spec_of(made) == spec_of(_shell(spec, kwargs)), host
    preprocess = model.config.preprocess
    told: dict[str, Any] = {}
    if preprocess is not None:
        told = {"mean": preprocess.mean, "std": preprocess.std, "interpolation": preprocess.interpolation}
        told.update(crop_pct=preprocess.crop, crop_mode=preprocess.crop_mode)
        if preprocess.crop_rounding != "even":
            LOG.info("timm starts a crop at the half rounded to even: it can lie one pixel behind the model's own.")
    config: dict[str, Any] = {
        "architecture": host,
        "num_classes": spec.classes or 0,
        "num_features": spec.width,
        "global_pool": kwargs["global_pool"],
        "model_args": arguments,
        "pretrained_cfg": {
            "input_size": (spec.channels, *spec.image_px),
            "fixed_input_size": True,
            "num_classes": spec.classes or 0,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": ["head", "head_dist"] if distilled else "head",
            "custom_load": False,
            **told,
        },
    }
    if model.config.labels is not None:
        config["label_names"] = model.config.labels
    if model.config.multi_label:
        config["problem_type"] = model.config.problem_type  # not timm's: for whoever reads the folder here again
    return files.write(out, state, config)


def _shell(spec: ModelSpec, kwargs: dict[str, Any]) -> nn.Module:
    """timm's module without memory."""
    with torch.device("meta"):
        return (VisionTransformerDistilled if "dist" in spec.prefix else VisionTransformer)(**kwargs)


def _mlp_ratio(rows: int, width: int) -> float:
    """The ratio from which timm's `int(width * ratio)` gives exactly `rows`."""
    ratio = rows / width
    return ratio if int(width * ratio) == rows else (rows + 0.5) / width


def _state(model: Vit, shell: nn.Module) -> dict[str, Tensor]:
    """The shell's state dict with the model's numbers; a bias or LayerScale that the model has not is zeros or ones."""
    there = spec_of(shell)
    shapes = {name: value.shape for name, value in shell.state_dict().items()}
    return given(numbers_of(model, there), places_of(shell, there), shapes)
