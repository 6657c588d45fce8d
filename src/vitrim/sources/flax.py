"""Vision Transformers of JAX (`vision_transformer` and `big_vision`, `.npz` files) under timm's names.

Source   the authors' files of ViT and AugReg, and of big_vision, whose blocks may be stacked along a first axis.
Gives    numbers only turned and reshaped: positions and patches keep their size. What has no name of timm's keeps its own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy
import torch
from torch import Tensor

PREFIXES = ("", "opt/target/", "params/", "params/img/")
"""What stands before the names of a network, by what saved it."""
PLAIN = {
    "cls": "cls_token",
    "pos_embedding": "pos_embed",
    "Transformer/posembed_input/pos_embedding": "pos_embed",
    "embedding/kernel": "patch_embed.proj.weight",
    "embedding/bias": "patch_embed.proj.bias",
    "Transformer/encoder_norm/scale": "norm.weight",
    "Transformer/encoder_norm/bias": "norm.bias",
    "pre_logits/kernel": "pre_logits.fc.weight",
    "pre_logits/bias": "pre_logits.fc.bias",
    "head/kernel": "head.weight",
    "head/bias": "head.bias",
}
BLOCK = {
    "LayerNorm_0": "norm1",
    "LayerNorm_1": "norm2",
    "LayerNorm_2": "norm2",
    "MultiHeadDotProductAttention_./query": "attn.q",
    "MultiHeadDotProductAttention_./key": "attn.k",
    "MultiHeadDotProductAttention_./value": "attn.v",
    "MultiHeadDotProductAttention_./out": "attn.proj",
    "MlpBlock_./Dense_0": "mlp.fc1",
    "MlpBlock_./Dense_1": "mlp.fc2",
}
"""Parts of a block; their numbers count the parts of all kinds in one version, and those of their own kind in the other."""


def prefix_of(names: Mapping[str, Any]) -> str | None:
    """What stands before a network's names; None for other arrays."""
    return next(
        (one for one in PREFIXES if {f"{one}embedding/kernel", f"{one}Transformer/encoder_norm/scale"} <= set(names)),
        None,
    )


def renamed(arrays: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """A file's tensors under timm's names; those before the prefix, as of an optimizer, in a mapping of their own."""
    state: dict[str, Any] = {}
    beside: dict[str, Tensor] = {}
    for name in arrays:
        value = _tensor(arrays[name])
        if not name.startswith(prefix):
            beside[name.replace("/", ".")] = value
            continue
        own = name.removeprefix(prefix)
        if own in PLAIN:
            state[PLAIN[own]] = _turned(value, PLAIN[own])
        elif (found := re.fullmatch(r"Transformer/encoderblock(?:_(\d+))?/(.+)/(kernel|scale|bias)", own)) and (
            part := next((ours for theirs, ours in BLOCK.items() if re.fullmatch(theirs, found[2])), None)
        ):
            leaf = "bias" if found[3] == "bias" else "weight"
            for i, one in enumerate(value) if found[1] is None else ((int(found[1]), value),):
                state[f"blocks.{i}.{part}.{leaf}"] = _turned(one, f"{part}.{leaf}")
        else:
            state[own.replace("/", ".")] = value
    return {**state, **({"beside": beside} if beside else {})}


def _tensor(array: numpy.ndarray[Any, Any]) -> Tensor:
    if array.dtype.kind == "V" and array.dtype.itemsize == 2:  # NumPy has no bfloat16
        return torch.from_numpy(array.view(numpy.uint16).astype(numpy.int32) << 16).view(torch.float32)
    return torch.from_numpy(numpy.ascontiguousarray(array)).reshape(array.shape)


def _turned(value: Tensor, name: str) -> Tensor:
    """An array of JAX in timm's axes: inputs before outputs there, heads apart from their dims."""
    part, _, leaf = name.rpartition(".")
    if name == "patch_embed.proj.weight" and value.dim() == 4:
        return value.permute(3, 2, 0, 1)  # h w C D -> D C h w
    if name in ("cls_token", "pos_embed"):
        return value if value.dim() != 2 else value[None]
    if part in ("attn.q", "attn.k", "attn.v"):
        return value.flatten(1).T if leaf == "weight" else value.flatten()  # D H V -> (H V) D
    if part == "attn.proj" and leaf == "weight" and value.dim() == 3:
        return value.flatten(0, 1).T  # H V D -> D (H V)
    return value.T if leaf == "weight" and value.dim() == 2 else value
