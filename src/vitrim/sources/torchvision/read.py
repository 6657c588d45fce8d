"""The structure of a torchvision `VisionTransformer`: module -> spec, and which of its tensors is which of ours."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torchvision.models import VisionTransformer
from torchvision.models.vision_transformer import EncoderBlock

from ...architectures import dense_attention
from ...spec import AttentionSpec, BlockSpec, ConvStem, MlpSpec, ModelSpec, Pool, Position
from ..parts import Reader, valid
from ..places import BlockNames, Places, taken

ADVICE = "vitrim reads torchvision's Vision Transformers, such as 'torchvision:vit_b_16'."
refused = Reader(ADVICE).refused
NAMES = BlockNames(norm1="ln_1", qkv="self_attention.in_proj_", out="self_attention.out_proj", norm2="ln_2")
EPS = 1e-6
"""Of the norms of a `VisionTransformer` that is made without `norm_layer`."""


def spec_of(module: nn.Module) -> ModelSpec:
    """The spec of a torchvision module, read off its parts. Works on the meta device.

    Raises SourceError naming the part that the spec cannot say.
    """
    if not isinstance(module, VisionTransformer):
        raise refused(f"another design ({type(module).__name__})")
    reader = Reader(ADVICE)
    patch_px = (module.patch_size, module.patch_size)
    if type(module.conv_proj) is not nn.Conv2d:
        kind = type(module.conv_proj).__name__
        raise refused(f"a convolutional stem of several layers (conv_stem_configs; {kind})")
    stem = reader.stem(module.conv_proj, patch_px)
    blocks = tuple(_block(block, f"block {i}", reader) for i, block in enumerate(module.encoder.layers))
    final_norm = reader.norm(module.encoder.ln, "encoder.ln")
    side = module.image_size
    grid = (side // patch_px[0], side // patch_px[1])
    reader.table_rows(module.encoder.pos_embedding.shape[1], math.prod(grid) + 1)
    eps, head = reader.one_eps(EPS), _head(module)
    with valid(module, "torchvision"):
        spec = ModelSpec(
            image_px=(side, side),
            patch_px=patch_px,
            channels=module.conv_proj.in_channels,
            stem=stem,
            width=module.conv_proj.out_channels,
            prefix=("cls",),
            position=Position(grid=grid, prefix_rows=True, resize="bicubic"),
            final_norm=final_norm,
            norm_eps=eps,
            blocks=blocks,
            pool=Pool(kind="cls"),
            outputs=() if head is None else tuple(reader.outputs(module.get_submodule(head), head)),
        )
    reader.all_placed(module, places_of(module, spec))
    return spec


def weights_of(module: Any, spec: ModelSpec) -> dict[str, Tensor]:
    """The module's numbers under our names: float32 copies on the CPU."""
    return taken(module.state_dict(), places_of(module, spec), spec.width)


def places_of(module: Any, spec: ModelSpec) -> Places:
    """torchvision's name -> ours, for every number that the spec has a place for."""
    places = Places()
    places.add("class_token", "prefix")
    places.add("encoder.pos_embedding", "position")
    assert isinstance(spec.stem, ConvStem)
    places.pair("conv_proj", "stem.proj", spec.stem.bias)
    if spec.final_norm:
        places.pair("encoder.ln", "norm")
    layers = module.encoder.layers.named_children()
    for i, ((name, layer), block) in enumerate(zip(layers, spec.blocks, strict=True)):
        first, second = [f"mlp.{name}" for name, part in layer.mlp.named_children() if type(part) is nn.Linear]
        places.block(f"encoder.layers.{name}", i, block, replace(NAMES, fc1=(first,), fc2=second))
    for output in spec.outputs:
        places.pair(_head(module) or "", f"heads.{output.name}", output.bias)
    return places


def _block(block: Any, where: str, reader: Reader) -> BlockSpec:
    if not isinstance(block, EncoderBlock):
        raise refused(f"blocks of another design ({where}: {type(block).__name__})")
    reader.norms({"ln_1": block.ln_1, "ln_2": block.ln_2}, where)
    return BlockSpec(attention=_attention(block.self_attention, where, reader), mlp=_mlp(block.mlp, where, reader))


def _attention(attention: Any, where: str, reader: Reader) -> AttentionSpec:
    if type(attention) is not nn.MultiheadAttention:
        raise refused(f"attention of another design ({where}: {type(attention).__name__})")
    faults = {
        "queries, keys and values of different widths": attention.in_proj_weight is None,
        "a learned key and value beside the tokens (add_bias_kv)": attention.bias_k is not None,
        "a key and value of zeros beside the tokens (add_zero_attn)": attention.add_zero_attn,
        "attention across the batch (batch_first=False)": not attention.batch_first,
    }
    reader.without(faults, f"{{}} in {where}")
    bias, out_bias = attention.in_proj_bias is not None, attention.out_proj.bias is not None
    return dense_attention(attention.num_heads, attention.head_dim, bias=bias, out_bias=out_bias)


def _mlp(mlp: nn.Module, where: str, reader: Reader) -> MlpSpec:
    parts = [part for part in mlp.children() if not isinstance(part, nn.Dropout)]
    if [type(part) for part in parts[::2]] != [nn.Linear, nn.Linear] or len(parts) != 3:
        raise refused(f"an MLP of another design ({where}: {', '.join(type(part).__name__ for part in parts)})")
    first, act, second = parts
    return reader.mlp({"fc1": first, "fc2": second}, act, where)


def _head(module: VisionTransformer) -> str | None:
    """Name of the one linear that classifies; None where there is none. Raises SourceError where there is more."""
    idle = (nn.Sequential, nn.Identity, nn.Dropout)
    parts = {name: part for name, part in module.heads.named_modules(prefix="heads") if type(part) not in idle}
    if any(name.endswith("pre_logits") for name in parts):
        raise refused("a layer between pooling and classifier (representation_size, pre_logits)")
    if len(parts) > 1 or any(type(part) is not nn.Linear for part in parts.values()):
        kinds = ", ".join(type(part).__name__ for part in parts.values())
        raise refused(f"a classifier that is more than one linear (heads: {kinds})")
    return next(iter(parts), None)
