"""Our model -> arguments and state dict of torchvision's `VisionTransformer`, where torchvision can say it."""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import VisionTransformer

from ...model import Vit
from ...surgery import fold_layer_scale
from .. import files
from ..expressible import ON_POOL, Family, refusal, require
from ..places import given, numbers_of
from .read import EPS, places_of, spec_of

FAMILY = Family(
    name="torchvision",
    channels=3,
    square=True,
    whole_patches=True,
    kinds=("gelu",),
    last_norms=((True, False), (False, True)),  # behind the class token's pooling it is the last norm by another name
    reads=(ON_POOL,),
)


def to_torchvision(model: Vit) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Arguments of torchvision's `VisionTransformer` and a state dict that it loads strictly.

    `norm_layer` stands among the arguments only where the norms' eps is not torchvision's.
    Raises SourceError naming the block or part that torchvision cannot say. An exact tail is left out: it changes no
    output; LayerScale is multiplied into the linears behind it.
    """
    spec = model.spec
    attention, mlp = require(spec, FAMILY)
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
        raise refusal(
            "torchvision",
            f"its norms have eps {model.spec.norm_eps!r}, and a file can only say torchvision's own {EPS!r}",
        )
    config = {
        "architecture": "torchvision.models.VisionTransformer",
        "kwargs": kwargs,
        "labels": model.config.labels,
        "problem_type": model.config.problem_type,
        "preprocess": None if model.config.preprocess is None else asdict(model.config.preprocess),
    }
    return files.write(out, state, config, metadata={"torchvision": json.dumps(kwargs, sort_keys=True)})


def _state(model: Vit, shell: nn.Module) -> dict[str, Tensor]:
    """The shell's state dict with the model's numbers; a bias or position that the model has not is zeros."""
    there, shapes = spec_of(shell), {name: value.shape for name, value in shell.state_dict().items()}
    numbers = numbers_of(model, there)
    if "position" in numbers and not model.spec.position.prefix_rows:
        numbers["position"] = torch.cat([torch.zeros_like(numbers["position"][:1]), numbers["position"]])
    return given(numbers, places_of(shell, there), shapes)
