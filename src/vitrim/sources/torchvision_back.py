"""Our model -> arguments and state dict of torchvision's `VisionTransformer`, where torchvision can say it."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import VisionTransformer

from ..errors import SourceError
from ..model import Vit
from ..spec import AttentionSpec, ConvStem, MlpSpec, ModelSpec, Prefix
from ..surgery import fold_layer_scale
from . import checkpoints
from .torchvision_structure import EPS, places_of, spec_of


def to_torchvision(model: Vit) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Arguments of torchvision's `VisionTransformer` and a state dict that it loads strictly.

    `norm_layer` stands among the arguments only where the norms' eps is not torchvision's.
    Raises SourceError naming the block or part that torchvision cannot say. An exact tail is left out: it changes no
    output; LayerScale is multiplied into the linears behind it.
    """
    spec = model.spec
    attention, mlp = _equal_halves(spec)
    _check_sayable(spec)
    kwargs: dict[str, Any] = {
        "image_size": spec.image_px[0],
        "patch_size": spec.patch_px[0],
        "num_layers": len(spec.blocks),
        "num_heads": attention.heads,
        "hidden_dim": spec.width,
        "mlp_dim": mlp.hidden,
        "num_classes": spec.classes,
    }
    if spec.norm_eps != EPS:
        kwargs["norm_layer"] = partial(nn.LayerNorm, eps=spec.norm_eps)
    with torch.device("meta"):
        shell = VisionTransformer(**kwargs)
    return kwargs, _state(fold_layer_scale(model), shell)


def to_module(model: Vit) -> nn.Module:
    """A torchvision module in eval mode with the model's numbers. Raises SourceError as `to_torchvision` does."""
    kwargs, state = to_torchvision(model)
    with torch.device("meta"):
        module = VisionTransformer(**kwargs)
    module.load_state_dict(state, strict=True, assign=True)
    return module.eval()


def write(model: Vit, out: Path) -> Path:
    """A folder with the state dict (`model.safetensors`) and the arguments that make its module (`config.json`).

    To use it without vitrim::

        kwargs = json.load(open("OUT/config.json"))["kwargs"]
        module = torchvision.models.VisionTransformer(**kwargs)
        module.load_state_dict(safetensors.torch.load_file("OUT/model.safetensors"))

    The arguments stand in the header of `model.safetensors` too. Raises SourceError as `to_torchvision` does.
    """
    kwargs, state = to_torchvision(model)
    if "norm_layer" in kwargs:
        raise _unsayable(
            f"its norms have eps {model.spec.norm_eps!r}, and a file can only say torchvision's own {EPS!r}"
        )
    config = {
        "architecture": "torchvision.models.VisionTransformer",
        "kwargs": kwargs,
        "labels": model.config.labels,
        "preprocess": None if model.config.preprocess is None else asdict(model.config.preprocess),
    }
    return checkpoints.write(out, state, config, metadata={"torchvision": json.dumps(kwargs, sort_keys=True)})


def _unsayable(what: str) -> SourceError:
    return SourceError(
        f"torchvision cannot say this model: {what}. Save it as a folder of vitrim (vitrim.save), which keeps every shape."
    )


def _equal_halves(spec: ModelSpec) -> tuple[AttentionSpec, MlpSpec]:
    """The halves that all blocks share as far as torchvision's arguments tell; the first block in the way is named."""
    first: tuple[AttentionSpec, MlpSpec] | None = None
    for i, block in enumerate(spec.blocks):
        a, m = block.attention, block.mlp
        if a is None or m is None:
            gone = "attention" if a is None else "MLP"
            raise _unsayable(f"block {i} has no {gone}, and torchvision's blocks have both halves")
        faults = {
            "merges tokens": any(not isinstance(step, Prefix) for step in block.steps),
            "has a gate": a.gate or m.gate,
            "has an MLP in two factors": m.fc1_rank is not None or m.fc2_rank is not None,
            f"has {a.heads} heads of {a.qk_dim} (values {a.v_dim}), and torchvision wants heads times head width equal to "
            f"the width {spec.width}": a.qk_dim != a.v_dim or a.heads * a.v_dim != spec.width,
            f"scales its scores by {a.scale!r}, not by {a.qk_dim**-0.5!r}": not math.isclose(
                a.scale, a.qk_dim**-0.5, rel_tol=1e-12
            ),
            "has norms of queries and keys": a.qk_norm != "none",
            f"has the activation {m.kind!r}, and torchvision's is 'gelu'": m.kind != "gelu",
        }
        for fault, there in faults.items():
            if there:
                raise _unsayable(f"block {i} {fault}")
        first = first or (a, m)
        for name, here, other in (("heads", a.heads, first[0].heads), ("MLP units", m.hidden, first[1].hidden)):
            if here != other:
                raise _unsayable(f"block {i} differs from block 0 ({name} {here!r}, there {other!r})")
    if first is None:
        raise _unsayable("it has no blocks")
    return first


def _check_sayable(spec: ModelSpec) -> None:
    """Refuse what stands outside the blocks and has no argument in torchvision."""
    faults = {
        f"its stem is a {type(spec.stem).__name__}": not isinstance(spec.stem, ConvStem),
        f"its images have {spec.channels} channels, not 3": spec.channels != 3,
        f"its images are {spec.image_px} and its patches {spec.patch_px}, not square": spec.image_px[0]
        != spec.image_px[1]
        or spec.patch_px[0] != spec.patch_px[1],
        f"its prefix tokens are {spec.prefix!r}, not one class token": spec.prefix != ("cls",),
        f"its pooling is {spec.pool.kind!r}": spec.pool.kind != "cls",
        f"its position table is for {spec.position.grid}, not {spec.grid} patches": spec.position.kind != "none"
        and spec.position.grid != spec.grid,
        "a norm before its blocks": spec.pre_norm,
        "not exactly one norm behind its blocks": spec.final_norm == spec.pool_norm,
        "it has no classifier": not spec.outputs,
        f"its classifiers read {[output.reads for output in spec.outputs]!r}": bool(spec.outputs)
        and [output.reads for output in spec.outputs] != [("pool",)],
        "a classifier in two factors": any(output.rank is not None for output in spec.outputs),
    }
    for fault, there in faults.items():
        if there:
            raise _unsayable(fault)


def _state(model: Vit, shell: Any) -> dict[str, Tensor]:
    """The shell's state dict with the model's numbers; a bias or position that the model has not is zeros."""
    spec = model.spec
    ours = {name: value.detach().cpu() for name, value in model.state_dict().items()}
    if spec.pool_norm:  # behind the class token's pooling it is the final norm by another name
        ours.update({f"norm.{key}": ours[f"pool_norm.{key}"] for key in ("weight", "bias")})
    if "position" in ours and not spec.position.prefix_rows:
        ours["position"] = torch.cat([torch.zeros_like(ours["position"][:1]), ours["position"]])
    ours.update(
        {f"heads.head.{key}": ours[name] for key in ("weight", "bias") if (name := _head_name(spec, key)) in ours}
    )
    like = ours["prefix"]
    state: dict[str, Tensor] = {}
    shapes = {name: value.shape for name, value in shell.state_dict().items()}
    for theirs, name in places_of(shell, spec_of(shell)).items():
        shape = shapes[theirs]
        if name.endswith(".qkv_bias"):
            thirds = (ours.get(name.replace("qkv_bias", key)) for key in ("q_bias", "k_bias", "v_bias"))
            zeros = like.new_zeros(shape[0] // 3)
            value = torch.cat([zeros if third is None else third for third in thirds])
        elif name in ours:
            value = ours[name]
        else:
            assert name == "position" or name.endswith(".bias"), name
            value = like.new_zeros(shape)
        state[theirs] = value.reshape(shape).clone()
    return state


def _head_name(spec: ModelSpec, key: str) -> str:
    return f"heads.{spec.outputs[0].name}.{key}"
