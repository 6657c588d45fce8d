"""Our model -> arguments and state dict of timm's `VisionTransformer`, and the folder that timm loads, where timm can say it."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import LayerNorm, SwiGLUPacked
from timm.models import VisionTransformer
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn

from ..errors import SourceError
from ..model import Vit
from ..spec import AttentionSpec, ConvStem, MlpSpec, ModelSpec, Prefix
from . import checkpoints
from .timm_structure import places_of, spec_of


def to_timm(model: Vit, *, layer_scale: bool = False) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Arguments of timm's `VisionTransformer` (`VisionTransformerDistilled` with a distillation token) and a state dict
    that it loads strictly.

    layer_scale: write a LayerScale of ones where it was folded, for an architecture of timm's that has it.
    Raises SourceError naming the block or part that timm cannot say. An exact tail is left out: it changes no output.
    """
    spec = model.spec
    a, m = _equal_halves(spec)
    _check_sayable(spec)
    _check_pool(spec, a, m)
    scaled = layer_scale or any(
        half.layer_scale for block in spec.blocks for half in (block.attention, block.mlp) if half is not None
    )
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
        "qkv_bias": _any(spec, "q_bias", "k_bias", "v_bias"),
        "qk_norm": a.qk_norm != "none",
        "proj_bias": _any(spec, "out_bias", "fc1_bias", "fc2_bias"),
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


HOSTS = (
    ("vit_base_patch16_224", 1e-6, False),
    ("vit_base_patch16_clip_224", 1e-5, False),
    ("vit_giant_patch14_dinov2", 1e-6, True),
    ("deit_tiny_distilled_patch16_224", 1e-6, False),
)
"""Architectures of timm's, the eps of their norms, and whether their MLPs are swiglu: what a JSON file cannot say otherwise."""


def write(model: Vit, out: Path) -> Path:
    """A folder as timm has it on the Hub: `timm.create_model("local-dir:OUT", pretrained=True)` gives the same logits.

    Preprocessing and class names go along. Raises SourceError as `to_timm` does, and where none of timm's architectures
    has these norms and MLPs, which timm takes as classes and not as JSON.
    """
    spec = model.spec
    swiglu, distilled = any(b.mlp is not None and b.mlp.kind == "swiglu" for b in spec.blocks), "dist" in spec.prefix
    hosts = [
        host for host, eps, gated in HOSTS if eps == spec.norm_eps and gated == swiglu and distilled == ("dist" in host)
    ]
    kwargs, state = to_timm(model, layer_scale=swiglu)  # the one host of swiglu has LayerScale, and None cannot undo it
    if not hosts:
        raise _unsayable(
            f"none of its architectures with {'a distillation token and ' if distilled else ''}"
            f"{'swiglu' if swiglu else 'plain'} MLPs has norms of eps {spec.norm_eps!r}"
        )
    arguments = {
        key: value for key, value in kwargs.items() if key not in ("norm_layer", "mlp_layer") and value is not None
    }
    arguments = {key: value for key, value in arguments.items() if key != "act_layer" or isinstance(value, str)}
    with torch.device("meta"):
        made = timm.create_model(hosts[0], **arguments)
    assert spec_of(made) == spec_of(_shell(spec, kwargs)), hosts[0]
    preprocess = model.config.preprocess
    told: dict[str, Any] = {}
    if preprocess is not None:
        told = {"mean": preprocess.mean, "std": preprocess.std, "interpolation": preprocess.interpolation}
        told.update(crop_pct=preprocess.crop, crop_mode=preprocess.crop_mode)
    config: dict[str, Any] = {
        "architecture": hosts[0],
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
    return checkpoints.write(out, state, config)


def _shell(spec: ModelSpec, kwargs: dict[str, Any]) -> nn.Module:
    """timm's module without memory."""
    with torch.device("meta"):
        return (VisionTransformerDistilled if "dist" in spec.prefix else VisionTransformer)(**kwargs)


def _unsayable(what: str) -> SourceError:
    return SourceError(
        f"timm cannot say this model: {what}. Save it as a folder of vitrim (vitrim.save), which keeps every shape."
    )


def _equal_halves(spec: ModelSpec) -> tuple[AttentionSpec, MlpSpec]:
    """The halves that all blocks share, as far as timm's arguments tell them apart; the first other block is named."""
    first: tuple[AttentionSpec, MlpSpec] | None = None
    for i, block in enumerate(spec.blocks):
        a, m = block.attention, block.mlp
        if a is None or m is None:
            raise _unsayable(
                f"block {i} has no {'attention' if a is None else 'MLP'}, and timm's blocks have both halves"
            )
        if any(not isinstance(step, Prefix) for step in block.steps):
            raise _unsayable(f"block {i} merges tokens")
        if a.gate or m.gate:
            raise _unsayable(f"block {i} has a gate")
        if m.fc1_rank is not None or m.fc2_rank is not None:
            raise _unsayable(f"block {i} has an MLP in two factors")
        if a.qk_dim != a.v_dim or a.heads * a.v_dim != spec.width:
            raise _unsayable(
                f"block {i} has {a.heads} heads of {a.qk_dim} (values {a.v_dim}), and timm wants heads times head width equal "
                f"to the width {spec.width}"
            )
        if not math.isclose(a.scale, a.qk_dim**-0.5, rel_tol=1e-12):
            raise _unsayable(f"block {i} scales its scores by {a.scale!r}, not by {a.qk_dim**-0.5!r}")
        if a.qk_norm == "rms":
            raise _unsayable(f"block {i} has root-mean-square norms of queries and keys beside layer norms")
        first = first or (a, m)
        for name, here, there in (
            ("heads", a.heads, first[0].heads),
            ("qk_norm", a.qk_norm, first[0].qk_norm),
            ("MLP units", m.hidden, first[1].hidden),
            ("activation", m.kind, first[1].kind),
        ):
            if here != there:
                raise _unsayable(f"block {i} differs from block 0 ({name} {here!r}, there {there!r})")
    if first is None:
        raise _unsayable("it has no blocks")
    return first


def _check_sayable(spec: ModelSpec) -> None:
    """Refuse what stands outside the blocks and has no argument in timm."""
    distilled = "dist" in spec.prefix
    canonical = ("cls", "dist") if distilled else tuple(sorted(spec.prefix))  # cls before reg
    reads = [output.reads for output in spec.outputs]
    faults = {
        f"its stem is a {type(spec.stem).__name__}": not isinstance(spec.stem, ConvStem),
        "a norm before the blocks beside a bias in the stem": spec.pre_norm and getattr(spec.stem, "bias", False),
        f"its prefix tokens are {spec.prefix!r}": spec.prefix != canonical,
        "a norm before and another after pooling": spec.final_norm and spec.pool_norm,
        "a norm behind no pooling": spec.pool.kind == "none" and spec.pool_norm,
        f"its position table is for {spec.position.grid}, not {spec.grid} patches": spec.position.kind != "none"
        and spec.position.grid != spec.grid,
        f"its classifiers read {reads!r}": reads != [("pool",), ("dist",)]
        if distilled
        else reads not in ([], [("pool",)]),
        "a classifier in two factors": any(output.rank is not None for output in spec.outputs),
        "a distillation token without a position row, or without class-token pooling": distilled
        and (
            spec.position.kind == "none" or not spec.position.prefix_rows or spec.pool.kind != "cls" or spec.pool_norm
        ),
    }
    for fault, there in faults.items():
        if there:
            raise _unsayable(fault)


def _check_pool(spec: ModelSpec, a: AttentionSpec, m: MlpSpec) -> None:
    """Refuse a map pooling that differs from the blocks, whose arguments timm gives it."""
    if spec.pool.kind != "map":
        return
    for name, here, blocks in (
        ("heads", spec.pool.heads, a.heads),
        ("MLP units", spec.pool.hidden, m.hidden),
        ("activation", spec.pool.act, m.kind),
    ):
        if here != blocks:
            raise _unsayable(f"its map pooling differs from the blocks ({name} {here!r}, there {blocks!r})")


def _mlp_ratio(rows: int, width: int) -> float:
    """The ratio from which timm's `int(width * ratio)` gives exactly `rows`."""
    ratio = rows / width
    return ratio if int(width * ratio) == rows else (rows + 0.5) / width


def _any(spec: ModelSpec, *names: str) -> bool:
    return any(
        getattr(half, name, False) for block in spec.blocks for half in (block.attention, block.mlp) for name in names
    )


def _state(model: Vit, shell: nn.Module) -> dict[str, Tensor]:
    """The shell's state dict with the model's numbers; a bias or LayerScale that the model has not is zeros or ones."""
    ours = {name: value.detach().cpu() for name, value in model.state_dict().items()}
    places, shapes = places_of(shell, spec_of(shell)), {name: value.shape for name, value in shell.state_dict().items()}
    prefix = model.spec.prefix
    rows = {
        "cls_token": prefix.index("cls") if "cls" in prefix else 0,
        "dist_token": prefix.index("dist") if "dist" in prefix else 0,
        "reg_token": prefix.index("reg") if "reg" in prefix else 0,
    }
    by_read = {"head": ("pool",), "head_dist": ("dist",)}
    outputs = {theirs: o.name for theirs, read in by_read.items() for o in model.spec.outputs if o.reads == read}
    state: dict[str, Tensor] = {}
    for theirs, shape in shapes.items():
        name, _ = places[theirs]
        if theirs in rows:
            value = ours["prefix"][rows[theirs] : rows[theirs] + shape[1]]
        elif theirs.endswith("attn.qkv.weight"):
            value = ours[name.removesuffix(".weight")]
        elif theirs.endswith("attn.qkv.bias"):
            parts = (ours.get(name.replace("qkv.bias", key)) for key in ("q_bias", "k_bias", "v_bias"))
            zeros = torch.zeros(shape[0] // 3)
            value = torch.cat([zeros if part is None else part for part in parts])
        else:
            head = theirs.partition(".")[0]
            name = name.replace(f"heads.{head}.", f"heads.{outputs[head]}.") if head in outputs else name
            found = ours.get(name)
            if found is None:
                assert theirs.endswith((".bias", ".gamma")), theirs
                found = torch.ones(shape) if theirs.endswith(".gamma") else torch.zeros(shape)
            value = found
        state[theirs] = value.reshape(shape).clone()
    return state
