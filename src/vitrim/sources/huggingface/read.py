"""The structure of transformers' plain Vision Transformers: module -> spec, and which of its tensors is which of ours.

What a model reads is told by its class (or the first of its bases that is transformers' own); its parts are found by
what they are within the module, never by the keys of a file, which transformers keeps in an older spelling.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import reduce
from importlib import import_module
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...errors import SourceError
from ...spec import AttentionSpec, BlockSpec, ModelSpec, Pool, Position
from ..parts import Reader, by_name, valid
from ..places import Places, taken

ADVICE = "vitrim reads transformers' plain Vision Transformers: ViT, DeiT, DINOv2, CLIP, SigLIP, ViT-MAE and MSN."
refused = Reader(ADVICE).refused


@dataclass(frozen=True, kw_only=True, slots=True)
class Design:
    """What one class of transformers reads from its tokens.

    package: its folder in `transformers.models`.  heads: attribute -> (our name, what it reads).
    norm: of all tokens, of the pooled vector, or never reached.  resize: of the position table at another resolution.
    any_size: positions are resized unasked, so that the image processor decides the image size.
    unused: parts that the encoder's features do not go through.
    """

    package: str
    pool: Literal["cls", "mean", "map"] = "cls"
    heads: Mapping[str, tuple[str, tuple[str, ...]]] = field(default_factory=dict)
    norm: Literal["tokens", "pooled", "unused"] = "tokens"
    resize: Literal["bicubic", "bicubic_antialias"] = "bicubic"
    any_size: bool = False
    unused: tuple[str, ...] = ("mask_token",)

    @property
    def reads(self) -> tuple[tuple[str, ...], ...]:
        """What each head reads."""
        return tuple(read for _, read in self.heads.values())

    @property
    def classifiers(self) -> tuple[str, ...]:
        """Attributes that hold classifiers; CLIP's projection is none."""
        return tuple(head for head in self.heads if "classifier" in head)


_HEAD = {"classifier": ("head", ("pool",))}
_BOTH = {"classifier": ("head", ("pool", "mean"))}

DESIGNS: dict[str, Design] = {
    "ViTModel": Design(package="vit", unused=("mask_token", "pooler")),
    "ViTForImageClassification": Design(package="vit", heads=_HEAD),
    "DeiTModel": Design(package="deit", unused=("mask_token", "pooler")),
    "DeiTForImageClassification": Design(package="deit", heads=_HEAD),
    "DeiTForImageClassificationWithTeacher": Design(
        package="deit",
        heads={"cls_classifier": ("head", ("pool",)), "distillation_classifier": ("head_dist", ("dist",))},
    ),
    "Dinov2Model": Design(package="dinov2", any_size=True),
    "Dinov2ForImageClassification": Design(package="dinov2", any_size=True, heads=_BOTH),
    "Dinov2WithRegistersModel": Design(package="dinov2_with_registers", any_size=True, resize="bicubic_antialias"),
    "Dinov2WithRegistersForImageClassification": Design(
        package="dinov2_with_registers", any_size=True, resize="bicubic_antialias", heads=_BOTH
    ),
    "CLIPVisionModel": Design(package="clip", norm="pooled"),
    "CLIPVisionModelWithProjection": Design(
        package="clip", norm="pooled", heads={"visual_projection": ("projection", ("pool",))}
    ),
    "CLIPForImageClassification": Design(
        package="clip", pool="mean", norm="unused", heads=_HEAD, unused=("post_layernorm",)
    ),
    "SiglipVisionModel": Design(package="siglip", pool="map"),
    "SiglipForImageClassification": Design(package="siglip", pool="mean", heads=_HEAD, unused=("vision_model.head",)),
    "ViTMAEModel": Design(package="vit_mae"),
    "ViTMSNModel": Design(package="vit_msn"),
    "ViTMSNForImageClassification": Design(package="vit_msn", heads=_HEAD),
}

ENCODERS = {
    "ViTForMaskedImageModeling": ("ViTModel", "vit", "decoder"),
    "DeiTForMaskedImageModeling": ("DeiTModel", "deit", "decoder"),
    "ViTMAEForPreTraining": ("ViTMAEModel", "vit", "decoder"),
    "CLIPModel": ("CLIPVisionModel", "vision_model", "text tower and both projections"),
    "SiglipModel": ("SiglipVisionModel", "vision_model", "text tower"),
}
"""Classes taken for their encoder alone: its class, the attribute that holds it, what is left out."""

OTHER_PARTS = re.compile(
    r"(decoder|text_model|text_projection|visual_projection)\.|logit_(scale|bias)$|.*(position_ids|mask_token)$"
)
"""Names of what `ENCODERS` leave out; anything else that a file has too many is refused."""

BASE_MODELS = {
    "vit": "ViTModel",
    "deit": "DeiTModel",
    "dinov2": "Dinov2Model",
    "dinov2_with_registers": "Dinov2WithRegistersModel",
    "clip": "CLIPModel",
    "clip_vision_model": "CLIPVisionModel",
    "siglip": "SiglipModel",
    "siglip_vision_model": "SiglipVisionModel",
    "vit_mae": "ViTMAEModel",
    "vit_msn": "ViTMSNModel",
}
"""A configuration's `model_type` -> the class of a folder that names none."""

OTHERS = by_name(
    {
        "a convolutional design": "resnet regnet convnext convnextv2 dinov3_convnext efficientnet mobilenet_v1 mobilenet_v2 bit "
        "van",
        "a hierarchy of windows": "swin swinv2 donut-swin maskformer-swin",
        "a hierarchy of stages": "hiera pvt pvt_v2 segformer cvt focalnet levit efficientformer mobilevit mobilevitv2 "
        "swiftformer",
        "a hierarchy without attention": "poolformer",
        "a hierarchy of neighbourhoods": "dinat",
        "relative position bias": "beit data2vec-vision",
        "rotary positions": "dinov3_vit",
        "a convolutional (hybrid) stem": "vit-hybrid",
        "windowed attention": "vitdet sam_vision_model",
        "packed images of several sizes": "siglip2 siglip2_vision_model",
        "video input": "videomae vivit timesformer",
        "detection tokens": "yolos",
        "a depth decoder": "dpt",
        "timm's module inside (load it as timm:NAME or hf-hub:USER/NAME)": "timm_wrapper",
    }
)
"""What sets a `model_type` apart from a plain Vision Transformer."""


TOKENS = {"cls_token": "cls", "class_embedding": "cls", "distillation_token": "dist", "register_tokens": "reg"}
BLOCK = {
    "norm1": ("layernorm_before", "norm1", "layer_norm1"),
    "norm2": ("layernorm_after", "norm2", "layer_norm2"),
    "attention": ("attention", "self_attn"),
    "mlp": ("mlp",),
}
ATTENTION = {"q": ("q_proj",), "k": ("k_proj",), "v": ("v_proj",), "out": ("o_proj", "out_proj")}
MLP = {"fc2": ("fc2", "down_proj"), "act": ("activation_fn", "act_fn")}
"""Our name of a block's part -> transformers' names for it."""


@dataclass(kw_only=True, slots=True)
class Parts:
    """The parts of a module.

    names: dotted name of each part by identity.  tokens: parameter names by kind of token.
    blocks: parts by our name; `fc1` is the MLP's first linear, or the gate's and the value's; `scales` of the halves or None.
    """

    design: Design
    names: dict[int, str]
    embeddings: Any
    conv: Any
    tokens: dict[str, str]
    position: str
    pre_norm: Any
    norm: Any
    block_modules: tuple[nn.Module, ...]
    blocks: list[dict[str, Any]]
    map_head: Any
    heads: dict[str, Any]

    def name(self, part: nn.Module, leaf: str = "") -> str:
        """Dotted name of a part, or of a parameter of it."""
        return ".".join(word for word in (self.names[id(part)], leaf) if word)


def class_named(name: str) -> Any:
    """transformers' class of a design."""
    package = DESIGNS[name].package
    return getattr(import_module(f"transformers.models.{package}.modeling_{package}"), name)


def other(model_type: str, name: str) -> SourceError:
    """The error for a model of another family."""
    return refused(f"{OTHERS.get(model_type, 'another design')} ({name}, model_type {model_type!r})")


def class_name(module: nn.Module) -> str:
    """The class of transformers that the module is, or descends from. Raises SourceError for one of another family."""
    for kind in type(module).__mro__:
        if kind.__module__.startswith("transformers.models."):
            if kind.__name__ in DESIGNS or kind.__name__ in ENCODERS:
                return kind.__name__
            break
    raise other(getattr(getattr(module, "config", None), "model_type", ""), type(module).__name__)


def is_known(module: nn.Module) -> bool:
    """Whether the module is of a class that is read, or descends from one."""
    try:
        class_name(module)
    except SourceError:
        return False
    return True


def encoder_of(module: nn.Module) -> tuple[Any, tuple[str, ...]]:
    """The part that is taken in, and what that leaves out: the encoder of a pretraining or two-tower model, and of a
    classifier of no classes; any other module itself.
    """
    name = class_name(module)
    if name in ENCODERS:
        _, attribute, left = ENCODERS[name]
        return getattr(module, attribute), (left,)
    design = DESIGNS[name]
    without = [isinstance(getattr(module, head), nn.Identity) for head in design.heads]
    if without and all(without) and design.pool == "cls":
        return _tower(module), ()
    return module, ()


def left_out(module: Any) -> tuple[str, ...]:
    """Parts that change the module's own pooled output and that the spec cannot say: a pooler that is no identity."""
    pooler = getattr(module, "pooler", None)
    return () if pooler is None or _is_identity(pooler) else ("pooler",)


def _is_identity(pooler: Any) -> bool:
    """Whether a pooler gives the class token as it is, which is how this package writes an encoder."""
    dense = getattr(pooler, "dense", None)
    if type(dense) is not nn.Linear or type(pooler.activation).__name__ != "LinearActivation" or dense.weight.is_meta:
        return False
    rows, columns = dense.weight.shape
    return rows == columns and bool((dense.weight == torch.eye(rows).to(dense.weight)).all() and not dense.bias.any())


def spec_of(module: nn.Module, image_px: tuple[int, int] | None = None) -> ModelSpec:
    """The spec of a transformers module, read off its parts (so a fine-tuned one is as good as a named one).

    image_px: where the image processor decides the size (DINOv2); None: the size that the position table is for.
    Works on the meta device. Raises SourceError naming the part that the spec cannot say.
    """
    module, _ = encoder_of(module)
    parts = parts_of(module)
    design, conv, reader = parts.design, parts.conv, Reader(ADVICE)
    patch_px = (int(conv.kernel_size[0]), int(conv.kernel_size[1]))
    stem = reader.stem(conv, patch_px)
    made_px = _pair(_first(parts.embeddings, "image_size", "patch_embeddings.image_size"))
    grid = (made_px[0] // patch_px[0], made_px[1] // patch_px[1])
    norms = {"norm before the blocks": parts.pre_norm, "last norm": parts.norm}
    reader.norms({name: norm for name, norm in norms.items() if norm is not None}, "the network")
    blocks = tuple(_block(block, f"block {i}", reader) for i, block in enumerate(parts.blocks))
    pool = _pool(parts, reader)
    eps = reader.one_eps(1e-6)
    registers = module.get_parameter(parts.tokens["reg"]).shape[-2] if "reg" in parts.tokens else 0
    prefix: tuple[Any, ...] = (*(token for token in ("cls", "dist") if token in parts.tokens), *["reg"] * registers)
    table = module.get_parameter(parts.position)
    reader.table_rows(table.shape[-2], math.prod(grid) + len(prefix) - registers)
    with valid(module, "transformers"):
        spec = ModelSpec(
            image_px=image_px or made_px,
            patch_px=patch_px,
            channels=conv.in_channels,
            stem=stem,
            width=conv.out_channels,
            prefix=prefix,
            position=Position(
                kind="fixed" if design.package == "vit_mae" else "learned",  # `from_pretrained` forgets requires_grad
                grid=grid,
                prefix_rows=bool(prefix) and not registers,  # beside registers, the class token's row is added to it
                resize=design.resize,
            ),
            pre_norm=parts.pre_norm is not None,
            final_norm=design.norm == "tokens",
            pool_norm=design.norm == "pooled",
            norm_eps=eps,
            blocks=blocks,
            pool=pool,
            outputs=tuple(
                output
                for key, (name, reads) in design.heads.items()
                for output in reader.outputs(parts.heads[key], key, name, reads)
            ),
        )
    unused = {key for key in module.state_dict() if any(f".{part}." in f".{key}." for part in design.unused)}
    reader.all_placed(module, unused | set(places_of(module, spec, parts)))
    return spec


def parts_of(module: nn.Module) -> Parts:
    """The parts of a module that `encoder_of` gave. Raises SourceError where one is missing or of another kind."""
    design, tower = DESIGNS[class_name(module)], _tower(module)
    names = {id(part): name for name, part in module.named_modules()}
    embeddings = tower.embeddings
    convs = [part for part in embeddings.modules() if isinstance(part, nn.Conv2d)]
    if len(convs) != 1:
        raise refused(f"a stem of {len(convs)} convolutions ({type(embeddings).__name__})")
    lists = [part for part in tower.modules() if isinstance(part, nn.ModuleList) and len(part)]
    if len(lists) != 1:
        raise refused(f"{len(lists)} lists of blocks ({type(tower).__name__})")
    inside = names[id(embeddings)]
    own = {name: f"{inside}.{name}" for name, _ in embeddings.named_parameters()}
    position = own.get("position_embeddings", own.get("position_embedding.weight"))
    if position is None:
        raise refused("no table of positions")
    return Parts(
        design=design,
        names=names,
        embeddings=embeddings,
        conv=convs[0],
        tokens={TOKENS[name]: path for name, path in own.items() if name in TOKENS},
        position=position,
        pre_norm=_found(tower, "pre_layrnorm", "pre_layernorm"),
        norm=None if design.norm == "unused" else _first(tower, "layernorm", "post_layernorm"),
        block_modules=tuple(lists[0]),
        blocks=[_block_parts(block, f"block {i}") for i, block in enumerate(lists[0])],
        map_head=_found(tower, "head") if design.pool == "map" else None,
        heads={head: getattr(module, head) for head in design.heads},
    )


def _tower(module: Any) -> Any:
    """The part that holds the embeddings and the blocks."""
    if isinstance(getattr(module, "embeddings", None), nn.Module):
        return module
    inside = [part for part in module.children() if isinstance(getattr(part, "embeddings", None), nn.Module)]
    if len(inside) != 1:
        raise refused(f"{len(inside)} encoders ({type(module).__name__})")
    return inside[0]


def _found(parent: Any, *paths: str) -> Any:
    """The first of the attributes that is there and not None; None where none is."""
    found = (reduce(lambda part, name: getattr(part, name, None), path.split("."), parent) for path in paths)
    return next((part for part in found if part is not None), None)


def _first(parent: Any, *paths: str, where: str = "") -> Any:
    """As `_found`. Raises SourceError where none is."""
    if (found := _found(parent, *paths)) is None:
        raise refused(f"no {paths[0]} in {type(parent).__name__}{where and f' ({where})'}")
    return found


def _block_parts(block: Any, where: str) -> dict[str, Any]:
    parts = {ours: _first(block, *theirs, where=where) for ours, theirs in BLOCK.items()}
    for half, names in (("attention", ATTENTION), ("mlp", MLP)):
        parts.update({ours: _first(parts[half], *theirs, where=where) for ours, theirs in names.items()})
    gate = _found(parts["mlp"], "gate_proj")
    first = (gate, _first(parts["mlp"], "fc1" if gate is None else "up_proj", where=where))
    parts["fc1"] = first[1:] if gate is None else first
    parts["scales"] = [_found(block, name) for name in ("layer_scale1", "layer_scale2")]
    return parts


def _block(parts: dict[str, Any], where: str, reader: Reader) -> BlockSpec:
    reader.norms({name: parts[name] for name in ("norm1", "norm2")}, where)
    q, k, v, out = (parts[name] for name in ("q", "k", "v", "out"))
    reader.linears({"q": q, "k": k, "v": v, "out": out}, where)
    head_dim, inner = _first(parts["attention"], "head_dim", where=where), q.out_features
    if inner % head_dim or {k.out_features, v.out_features, out.in_features} != {inner}:
        raise refused(f"attention whose linears do not fit heads of {head_dim} ({where})")
    scales = [scale is not None for scale in parts["scales"]]
    first = {f"fc1 ({i})": part for i, part in enumerate(parts["fc1"])}
    return BlockSpec(
        attention=AttentionSpec(
            heads=inner // head_dim,
            qk_dim=head_dim,
            v_dim=head_dim,
            scale=float(_first(parts["attention"], "scaling", "scale", where=where)),
            layer_scale=scales[0],
            q_bias=q.bias is not None,
            k_bias=k.bias is not None,
            v_bias=v.bias is not None,
            out_bias=out.bias is not None,
        ),
        mlp=reader.mlp(
            {**first, "fc2": parts["fc2"]}, parts["act"], where, layer_scale=scales[1], gated=len(first) == 2
        ),
    )


def _pool(parts: Parts, reader: Reader) -> Pool:
    if parts.design.pool != "map":
        return Pool(kind=parts.design.pool)
    if parts.map_head is None:
        return Pool(kind="none")
    head, where = parts.map_head, "the pooling head"
    attention, mlp = _first(head, "attention"), _first(head, "mlp")
    if not isinstance(attention, nn.MultiheadAttention) or attention.in_proj_bias is None:
        raise refused(f"a {type(attention).__name__} without bias or of another kind in its pooling head")
    reader.norms({"norm": _first(head, "layernorm")}, where)
    if (kind := reader.activation(mlp.activation_fn, where)) not in ("gelu", "gelu_tanh"):
        raise refused(f"the activation {kind} in its pooling head")
    reader.linears({"fc1": mlp.fc1}, where)
    return Pool(kind="map", heads=attention.num_heads, hidden=mlp.fc1.out_features, act=kind)


def _pair(value: Any) -> tuple[int, int]:
    sides = (value, value) if isinstance(value, int) else tuple(int(side) for side in value)
    return sides[0], sides[1]


def places_of(module: nn.Module, spec: ModelSpec, parts: Parts | None = None) -> Places:
    """Their name -> ours, for every number that the spec has a place for.

    Of attention pooling the joint queries, keys and values are called `pool.qkv`.
    """
    parts, places = parts or parts_of(module), Places()

    def pair(part: Any, ours: str, order: int = 0) -> None:
        places.pair(parts.name(part), ours, part.bias is not None, order)

    pair(parts.conv, "stem.proj")
    for order, token in enumerate(dict.fromkeys(spec.prefix)):
        places.add(parts.tokens[token], "prefix", order)
    places.add(parts.position, "position")
    if parts.pre_norm is not None:
        pair(parts.pre_norm, "pre_norm")
    if parts.norm is not None:
        pair(parts.norm, "norm" if parts.design.norm == "tokens" else "pool_norm")
    for i, block in enumerate(parts.blocks):
        ours = f"blocks.{i}"
        for name, part in (("norm1", "norm1"), ("norm2", "norm2"), ("attention.out", "out"), ("mlp.fc2", "fc2")):
            pair(block[part], f"{ours}.{name}")
        for half, scale in zip(("attention", "mlp"), block["scales"], strict=True):
            if scale is not None:
                places.add(parts.name(scale, "lambda1"), f"{ours}.{half}.gamma")
        for order, letter in enumerate("qkv"):
            places.add(parts.name(block[letter], "weight"), f"{ours}.attention.qkv", order)
            if block[letter].bias is not None:
                places.add(parts.name(block[letter], "bias"), f"{ours}.attention.{letter}_bias")
        for order, part in enumerate(block["fc1"]):
            pair(part, f"{ours}.mlp.fc1", order)
    if (head := parts.map_head) is not None:
        places.add(parts.name(head, "probe"), "pool.latent")
        places.add(parts.name(head.attention, "in_proj_weight"), "pool.qkv.weight")
        places.add(parts.name(head.attention, "in_proj_bias"), "pool.qkv.bias")
        pair(head.attention.out_proj, "pool.out")
        pair(head.layernorm, "pool.norm")
        pair(head.mlp.fc1, "pool.fc1")
        pair(head.mlp.fc2, "pool.fc2")
    for attribute, (name, _) in parts.design.heads.items():
        if not isinstance(parts.heads[attribute], nn.Identity):
            pair(parts.heads[attribute], f"heads.{name}")
    return places


def weights_of(module: nn.Module, spec: ModelSpec) -> dict[str, Tensor]:
    """The module's numbers under our names: float32 copies on the CPU."""
    module, _ = encoder_of(module)
    weights = taken(module.state_dict(), places_of(module, spec), spec.width)
    if "reg" in spec.prefix:  # only the class token has a row in the table; the sum of both is what the model adds
        weights["prefix"][0] += weights["position"][0]
        weights["position"] = weights["position"][1:].clone()
    for leaf in ("weight", "bias"):
        if (joined := weights.pop(f"pool.qkv.{leaf}", None)) is not None:
            weights[f"pool.q.{leaf}"] = joined[: spec.width].clone()
            weights[f"pool.kv.{leaf}"] = joined[spec.width :].clone()
    return weights
