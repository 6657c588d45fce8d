"""The structure of a torchvision `VisionTransformer`: module -> spec, and which of its tensors is which of ours.

Parts are recognised by their class; what the spec cannot say is refused by its name, and so is a tensor left over.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import VisionTransformer
from torchvision.models.vision_transformer import EncoderBlock

from ..errors import SourceError, SpecError
from ..spec import AttentionSpec, BlockSpec, ConvStem, MlpKind, MlpSpec, ModelSpec, Output, Pool, Position
from .checkpoints import listed

ADVICE = "vitrim reads torchvision's Vision Transformers, such as 'torchvision:vit_b_16'."
EPS = 1e-6
"""Of the norms of a `VisionTransformer` that is made without `norm_layer`."""


def spec_of(module: nn.Module) -> ModelSpec:
    """The spec of a torchvision module, read off its parts. Works on the meta device.

    Raises SourceError naming the part that the spec cannot say.
    """
    if not isinstance(module, VisionTransformer):
        raise refused(f"another design ({type(module).__name__})")
    eps: set[float] = set()
    stem, patch_px = _stem(module)
    blocks = tuple(_block(block, f"block {i}", eps) for i, block in enumerate(module.encoder.layers))
    final_norm = _norm(module.encoder.ln, "encoder.ln", eps)
    side = module.image_size
    grid = (side // patch_px[0], side // patch_px[1])
    if (rows := module.encoder.pos_embedding.shape[1]) != math.prod(grid) + 1:
        raise refused(f"a position table of {rows} rows where {math.prod(grid) + 1} were expected")
    if len(eps) > 1:
        raise refused(f"norms with different eps {sorted(eps)!r}")
    head = _head(module)
    output = None if head is None else module.get_submodule(head)
    try:
        spec = ModelSpec(
            image_px=(side, side),
            patch_px=patch_px,
            channels=module.conv_proj.in_channels,
            stem=stem,
            width=module.conv_proj.out_channels,
            prefix=("cls",),
            position=Position(grid=grid, prefix_rows=True, resize="bicubic"),
            final_norm=final_norm,
            norm_eps=eps.pop() if eps else EPS,
            blocks=blocks,
            pool=Pool(kind="cls"),
            outputs=() if output is None else (Output(classes=output.out_features, bias=output.bias is not None),),
        )
    except SpecError as error:
        raise SourceError(f"torchvision module {type(module).__name__}: {error}") from None
    if left := sorted(set(module.state_dict()) - set(places_of(module, spec))):
        raise refused(f"numbers that a plain one does not have: {listed(left)}")
    return spec


def weights_of(module: Any, spec: ModelSpec) -> dict[str, Tensor]:
    """The module's numbers under our names: float32 copies on the CPU."""
    state, weights = module.state_dict(), {}
    for theirs, ours in places_of(module, spec).items():
        value = state[theirs].detach().to(device="cpu", dtype=torch.float32, copy=True)
        if ours in ("prefix", "position"):
            value = value.squeeze(0)  # 1 P D -> P D
        if ours.endswith(".qkv_bias"):
            names = (ours.replace("qkv_bias", key) for key in ("q_bias", "k_bias", "v_bias"))
            weights.update({name: third.clone() for name, third in zip(names, value.chunk(3), strict=True)})
        else:
            weights[ours] = value
    return weights


def places_of(module: Any, spec: ModelSpec) -> dict[str, str]:
    """torchvision's name -> ours, of each tensor; `qkv_bias` stands for the three biases one behind the other."""
    places = {"class_token": "prefix", "encoder.pos_embedding": "position", "conv_proj.weight": "stem.proj.weight"}
    pairs: list[tuple[str, str, bool]] = []
    assert isinstance(spec.stem, ConvStem)
    if spec.stem.bias:
        places["conv_proj.bias"] = "stem.proj.bias"
    if spec.final_norm:
        pairs.append(("encoder.ln", "norm", True))
    layers = [name for name, _ in module.encoder.layers.named_children()]
    for i, (name, block) in enumerate(zip(layers, spec.blocks, strict=True)):
        theirs, ours = f"encoder.layers.{name}", f"blocks.{i}"
        assert block.attention is not None
        assert block.mlp is not None
        places[f"{theirs}.self_attention.in_proj_weight"] = f"{ours}.attention.qkv"
        if block.attention.q_bias:
            places[f"{theirs}.self_attention.in_proj_bias"] = f"{ours}.attention.qkv_bias"
        first, second = _linears(module.encoder.layers[i].mlp)
        pairs += [
            (f"{theirs}.ln_1", f"{ours}.norm1", True),
            (f"{theirs}.self_attention.out_proj", f"{ours}.attention.out", block.attention.out_bias),
            (f"{theirs}.ln_2", f"{ours}.norm2", True),
            (f"{theirs}.mlp.{first}", f"{ours}.mlp.fc1", block.mlp.fc1_bias),
            (f"{theirs}.mlp.{second}", f"{ours}.mlp.fc2", block.mlp.fc2_bias),
        ]
    for output in spec.outputs:
        pairs.append((_head(module) or "", f"heads.{output.name}", output.bias))
    for theirs, ours, bias in pairs:
        places[f"{theirs}.weight"] = f"{ours}.weight"
        if bias:
            places[f"{theirs}.bias"] = f"{ours}.bias"
    return places


def refused(what: str) -> SourceError:
    """The error that names what the spec cannot say."""
    return SourceError(f"this model has {what}, which vitrim cannot take in. {ADVICE}")


def _stem(module: VisionTransformer) -> tuple[ConvStem, tuple[int, int]]:
    proj, patch = module.conv_proj, (module.patch_size, module.patch_size)
    if type(proj) is not nn.Conv2d:
        raise refused(f"a convolutional stem of several layers (conv_stem_configs; {type(proj).__name__})")
    if (proj.kernel_size, proj.stride, proj.padding, proj.dilation, proj.groups) != (patch, patch, (0, 0), (1, 1), 1):
        raise refused(f"patches that overlap or leave gaps (kernel {proj.kernel_size}, stride {proj.stride})")
    return ConvStem(bias=proj.bias is not None), patch


def _norm(norm: nn.Module, where: str, eps: set[float]) -> bool:
    """Whether there is a layer norm; its eps is added to `eps`."""
    if isinstance(norm, nn.Identity):
        return False
    if not isinstance(norm, nn.LayerNorm):
        raise refused(f"a {type(norm).__name__} at {where}")
    if norm.weight is None or norm.bias is None:
        raise refused(f"a norm without weight or bias at {where}")
    eps.add(norm.eps)
    return True


def _block(block: Any, where: str, eps: set[float]) -> BlockSpec:
    if not isinstance(block, EncoderBlock):
        raise refused(f"blocks of another design ({where}: {type(block).__name__})")
    for name in ("ln_1", "ln_2"):
        if not _norm(getattr(block, name), f"{where}, {name}", eps):
            raise refused(f"no {name} ({where})")
    return BlockSpec(attention=_attention(block.self_attention, where), mlp=_mlp(block.mlp, where))


def _attention(attention: Any, where: str) -> AttentionSpec:
    if type(attention) is not nn.MultiheadAttention:
        raise refused(f"attention of another design ({where}: {type(attention).__name__})")
    faults = {
        "queries, keys and values of different widths": attention.in_proj_weight is None,
        "a learned key and value beside the tokens (add_bias_kv)": attention.bias_k is not None,
        "a key and value of zeros beside the tokens (add_zero_attn)": attention.add_zero_attn,
        "attention across the batch (batch_first=False)": not attention.batch_first,
    }
    for fault, there in faults.items():
        if there:
            raise refused(f"{fault} in {where}")
    bias = attention.in_proj_bias is not None
    return AttentionSpec(
        heads=attention.num_heads,
        qk_dim=attention.head_dim,
        v_dim=attention.head_dim,
        scale=attention.head_dim**-0.5,
        q_bias=bias,
        k_bias=bias,
        v_bias=bias,
        out_bias=attention.out_proj.bias is not None,
    )


def _mlp(mlp: nn.Module, where: str) -> MlpSpec:
    parts = [part for part in mlp.children() if not isinstance(part, nn.Dropout)]
    if [type(part) for part in parts[::2]] != [nn.Linear, nn.Linear] or len(parts) != 3:
        raise refused(f"an MLP of another design ({where}: {', '.join(type(part).__name__ for part in parts)})")
    first, act, second = parts
    assert isinstance(second, nn.Linear)
    return MlpSpec(
        kind=_activation(act, where),
        hidden=second.in_features,
        fc1_bias=first.bias is not None,
        fc2_bias=second.bias is not None,
    )


def _activation(act: nn.Module, where: str) -> MlpKind:
    if type(act) is nn.GELU:
        return "gelu_tanh" if act.approximate == "tanh" else "gelu"
    known: dict[type, MlpKind] = {nn.ReLU: "relu", nn.SiLU: "silu"}
    if type(act) not in known:
        raise refused(f"the activation {type(act).__name__} ({where})")
    return known[type(act)]


def _linears(mlp: nn.Module) -> list[str]:
    return [name for name, part in mlp.named_children() if type(part) is nn.Linear]


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
