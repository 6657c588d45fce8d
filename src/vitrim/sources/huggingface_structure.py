"""The structure of transformers' plain Vision Transformers: module -> spec, and which of its tensors is which of ours.

What a model reads is told by its class (or the first of its bases that is transformers' own); its parts are found by
what they are within the module, never by the keys of a file, which transformers keeps in an older spelling. What the
spec cannot say is refused by its name, and so is a tensor left over. Importing this file imports no transformers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import SourceError, SpecError
from ..spec import AttentionSpec, BlockSpec, ConvStem, MlpKind, MlpSpec, ModelSpec, Output, Pool, Position
from .checkpoints import listed

ADVICE = "vitrim reads transformers' plain Vision Transformers: ViT, DeiT, DINOv2, CLIP, SigLIP, ViT-MAE and MSN."


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

OTHERS = {
    "resnet": "a convolutional design",
    "regnet": "a convolutional design",
    "convnext": "a convolutional design",
    "convnextv2": "a convolutional design",
    "dinov3_convnext": "a convolutional design",
    "efficientnet": "a convolutional design",
    "mobilenet_v1": "a convolutional design",
    "mobilenet_v2": "a convolutional design",
    "bit": "a convolutional design",
    "van": "a convolutional design",
    "swin": "a hierarchy of windows",
    "swinv2": "a hierarchy of windows",
    "donut-swin": "a hierarchy of windows",
    "maskformer-swin": "a hierarchy of windows",
    "hiera": "a hierarchy of stages",
    "pvt": "a hierarchy of stages",
    "pvt_v2": "a hierarchy of stages",
    "segformer": "a hierarchy of stages",
    "cvt": "a hierarchy of stages",
    "focalnet": "a hierarchy of stages",
    "levit": "a hierarchy of stages",
    "efficientformer": "a hierarchy of stages",
    "mobilevit": "a hierarchy of stages",
    "mobilevitv2": "a hierarchy of stages",
    "swiftformer": "a hierarchy of stages",
    "poolformer": "a hierarchy without attention",
    "dinat": "a hierarchy of neighbourhoods",
    "beit": "relative position bias",
    "data2vec-vision": "relative position bias",
    "dinov3_vit": "rotary positions",
    "vit-hybrid": "a convolutional (hybrid) stem",
    "vitdet": "windowed attention",
    "sam_vision_model": "windowed attention",
    "siglip2": "packed images of several sizes",
    "siglip2_vision_model": "packed images of several sizes",
    "videomae": "video input",
    "vivit": "video input",
    "timesformer": "video input",
    "yolos": "detection tokens",
    "dpt": "a depth decoder",
    "timm_wrapper": "timm's module inside (load it as timm:NAME or hf-hub:USER/NAME)",
}
"""What sets a `model_type` apart from a plain Vision Transformer."""

ACTIVATIONS: dict[str, MlpKind] = {
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "QuickGELUActivation": "quick_gelu",
    "ReLU": "relu",
    "SiLU": "silu",
    "SiLUActivation": "silu",
}


@dataclass(kw_only=True, slots=True)
class BlockParts:
    """The parts of one block. first: the MLP's first linear, or the gate's and the value's."""

    norms: tuple[Any, Any]
    attention: Any
    q: Any
    k: Any
    v: Any
    out: Any
    first: tuple[Any, ...]
    second: Any
    act: Any
    scales: tuple[Any, Any]


@dataclass(kw_only=True, slots=True)
class Parts:
    """The parts of a module. names: dotted name of each part by identity; tokens: parameter names by kind of token."""

    design: Design
    names: dict[int, str]
    embeddings: Any
    conv: Any
    tokens: dict[str, str]
    position: str
    pre_norm: Any
    norm: Any
    block_modules: tuple[nn.Module, ...]
    blocks: list[BlockParts]
    map_head: Any
    heads: dict[str, Any]

    def name(self, part: nn.Module, leaf: str) -> str:
        """Dotted name of a parameter of a part."""
        inside = self.names[id(part)]
        return f"{inside}.{leaf}" if inside else leaf


def takes(module: nn.Module) -> bool:
    """Whether a module is transformers' (of any design), so that this source should read or refuse it."""
    return any(kind.__module__.startswith("transformers.") for kind in type(module).__mro__)


def refused(what: str) -> SourceError:
    """The error that names what the spec cannot say."""
    return SourceError(f"this model has {what}, which vitrim cannot take in. {ADVICE}")


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
    design, conv = parts.design, parts.conv
    patch_px = tuple(conv.kernel_size)
    made_px = _pair(_first(parts.embeddings, "image_size", "patch_embeddings.image_size"))
    grid = (made_px[0] // patch_px[0], made_px[1] // patch_px[1])
    eps: set[float] = set()
    for norm, where in ((parts.pre_norm, "the norm before the blocks"), (parts.norm, "the last norm")):
        if norm is not None:
            _norm(norm, where, eps)
    blocks = tuple(_block(block, f"block {i}", eps) for i, block in enumerate(parts.blocks))
    pool = _pool(parts, eps)
    if len(eps) > 1:
        raise refused(f"norms with different eps {sorted(eps)!r}")
    registers = _registers(module, parts)
    prefix: tuple[Any, ...] = (*(token for token in ("cls", "dist") if token in parts.tokens), *["reg"] * registers)
    table = module.get_parameter(parts.position)
    rows, expected = table.shape[-2], math.prod(grid) + len(prefix) - registers
    if rows != expected:
        raise refused(f"a position table of {rows} rows where {expected} were expected")
    try:
        spec = ModelSpec(
            image_px=image_px or made_px,
            patch_px=patch_px,  # type: ignore[arg-type]
            channels=conv.in_channels,
            stem=ConvStem(bias=conv.bias is not None),
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
            norm_eps=eps.pop() if eps else 1e-6,
            blocks=blocks,
            pool=pool,
            outputs=_outputs(parts),
        )
    except SpecError as error:
        raise SourceError(f"{type(module).__name__}: {error}") from None
    known = set(places_of(module, spec, parts))
    if left := sorted(key for key in module.state_dict() if key not in known and not _is_unused(key, design)):
        raise refused(f"numbers that a plain one does not have: {listed(left)}")
    return spec


def parts_of(module: nn.Module) -> Parts:
    """The parts of a module that `encoder_of` gave. Raises SourceError where one is missing or of another kind."""
    design, tower = DESIGNS[class_name(module)], _tower(module)
    names = {id(part): name for name, part in module.named_modules()}
    embeddings = tower.embeddings
    convs = [part for part in embeddings.modules() if isinstance(part, nn.Conv2d)]
    if len(convs) != 1:
        raise refused(f"a stem of {len(convs)} convolutions ({type(embeddings).__name__})")
    conv = convs[0]
    sides = (conv.stride, conv.dilation, conv.groups)
    if sides != (conv.kernel_size, (1, 1), 1) or conv.padding not in ("valid", (0, 0), 0):
        raise refused(f"patches that overlap or leave gaps (kernel {conv.kernel_size}, stride {conv.stride})")
    lists = [part for part in tower.modules() if isinstance(part, nn.ModuleList) and len(part)]
    if len(lists) != 1:
        raise refused(f"{len(lists)} lists of blocks ({type(tower).__name__})")
    inside = names[id(embeddings)]
    own = {name: f"{inside}.{name}" for name, _ in embeddings.named_parameters()}
    tokens = {
        token: own[name]
        for token, options in (
            ("cls", ("cls_token", "class_embedding")),
            ("dist", ("distillation_token",)),
            ("reg", ("register_tokens",)),
        )
        for name in options
        if name in own
    }
    position = next((own[name] for name in ("position_embeddings", "position_embedding.weight") if name in own), None)
    if position is None:
        raise refused("no table of positions")
    return Parts(
        design=design,
        names=names,
        embeddings=embeddings,
        conv=conv,
        tokens=tokens,
        position=position,
        pre_norm=_first(tower, "pre_layrnorm", "pre_layernorm", default=None),
        norm=None if design.norm == "unused" else _first(tower, "layernorm", "post_layernorm"),
        block_modules=tuple(lists[0]),
        blocks=[_block_parts(block, f"block {i}") for i, block in enumerate(lists[0])],
        map_head=_first(tower, "head", default=None) if design.pool == "map" else None,
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


_MISSING = object()


def _first(parent: Any, *paths: str, default: Any = _MISSING, where: str = "") -> Any:
    """The first of the attributes that is there and not None. Raises SourceError where none is and no default."""
    for path in paths:
        found: Any = parent
        for name in path.split("."):
            found = getattr(found, name, None)
        if found is not None:
            return found
    if default is not _MISSING:
        return default
    raise refused(f"no {paths[0]} in {type(parent).__name__}{where and f' ({where})'}")


def _block_parts(block: Any, where: str) -> BlockParts:
    attention, mlp = _first(block, "attention", "self_attn", where=where), _first(block, "mlp", where=where)
    gate = _first(mlp, "gate_proj", default=None)
    first = (_first(mlp, "fc1", where=where),) if gate is None else (gate, _first(mlp, "up_proj", where=where))
    return BlockParts(
        norms=(
            _first(block, "layernorm_before", "norm1", "layer_norm1", where=where),
            _first(block, "layernorm_after", "norm2", "layer_norm2", where=where),
        ),
        attention=attention,
        q=_first(attention, "q_proj", where=where),
        k=_first(attention, "k_proj", where=where),
        v=_first(attention, "v_proj", where=where),
        out=_first(attention, "o_proj", "out_proj", where=where),
        first=first,
        second=_first(mlp, "fc2", "down_proj", where=where),
        act=_first(mlp, "activation_fn", "act_fn", where=where),
        scales=(_first(block, "layer_scale1", default=None), _first(block, "layer_scale2", default=None)),
    )


def _norm(norm: Any, where: str, eps: set[float]) -> None:
    if not isinstance(norm, nn.LayerNorm) or norm.weight is None or norm.bias is None:
        raise refused(f"a {type(norm).__name__} in place of a layer norm with weight and bias at {where}")
    eps.add(norm.eps)


def _linear(part: Any, where: str) -> Any:
    if type(part) is not nn.Linear:
        raise refused(
            f"a {type(part).__name__} in place of a linear in {where} (merge adapters and undo quantisation first)"
        )
    return part


def _block(parts: BlockParts, where: str, eps: set[float]) -> BlockSpec:
    for norm in parts.norms:
        _norm(norm, where, eps)
    for part in (parts.q, parts.k, parts.v, parts.out, *parts.first, parts.second):
        _linear(part, where)
    scaled = [scale is not None for scale in parts.scales]
    head_dim = _first(parts.attention, "head_dim", where=where)
    inner = parts.q.out_features
    if inner % head_dim or {parts.k.out_features, parts.v.out_features, parts.out.in_features} != {inner}:
        raise refused(f"attention whose linears do not fit heads of {head_dim} ({where})")
    kind = _activation(parts.act, where)
    if len(parts.first) == 2 and kind != "silu":
        raise refused(f"an MLP gated by {kind} ({where})")
    biases = {part.bias is not None for part in parts.first}
    if len(biases) != 1:
        raise refused(f"a bias on one of the gated MLP's two first linears ({where})")
    return BlockSpec(
        attention=AttentionSpec(
            heads=inner // head_dim,
            qk_dim=head_dim,
            v_dim=head_dim,
            scale=float(_first(parts.attention, "scaling", "scale", where=where)),
            q_bias=parts.q.bias is not None,
            k_bias=parts.k.bias is not None,
            v_bias=parts.v.bias is not None,
            out_bias=parts.out.bias is not None,
            layer_scale=scaled[0],
        ),
        mlp=MlpSpec(
            kind="swiglu" if len(parts.first) == 2 else kind,
            hidden=parts.second.in_features,
            fc1_bias=biases.pop(),
            fc2_bias=parts.second.bias is not None,
            layer_scale=scaled[1],
        ),
    )


def _activation(act: Any, where: str) -> MlpKind:
    if isinstance(act, nn.GELU):
        return "gelu_tanh" if act.approximate == "tanh" else "gelu"
    name = getattr(act, "__name__", type(act).__name__)
    if name not in ACTIVATIONS:
        raise refused(f"the activation {name} ({where})")
    return ACTIVATIONS[name]


def _pool(parts: Parts, eps: set[float]) -> Pool:
    if parts.design.pool != "map":
        return Pool(kind=parts.design.pool)
    if parts.map_head is None:
        return Pool(kind="none")
    head = parts.map_head
    attention = _first(head, "attention")
    if not isinstance(attention, nn.MultiheadAttention) or attention.in_proj_bias is None:
        raise refused(f"a {type(attention).__name__} without bias or of another kind in its pooling head")
    _norm(_first(head, "layernorm"), "the pooling head", eps)
    mlp = _first(head, "mlp")
    if (kind := _activation(mlp.activation_fn, "the pooling head")) not in ("gelu", "gelu_tanh"):
        raise refused(f"the activation {kind} in its pooling head")
    hidden = _linear(mlp.fc1, "the pooling head").out_features
    return Pool(kind="map", heads=attention.num_heads, hidden=hidden, act=kind)


def _outputs(parts: Parts) -> tuple[Output, ...]:
    outputs = []
    for attribute, (name, reads) in parts.design.heads.items():
        head = parts.heads[attribute]
        if isinstance(head, nn.Identity):
            continue
        if type(head) is not nn.Linear:
            raise refused(f"a classifier that is more than one linear ({attribute}: {type(head).__name__})")
        outputs.append(Output(name=name, reads=reads, classes=head.out_features, bias=head.bias is not None))
    return tuple(outputs)


def _registers(module: nn.Module, parts: Parts) -> int:
    return int(module.get_parameter(parts.tokens["reg"]).shape[-2]) if "reg" in parts.tokens else 0


def _pair(value: Any) -> tuple[int, int]:
    sides = (value, value) if isinstance(value, int) else tuple(int(side) for side in value)
    return sides[0], sides[1]


def _is_unused(key: str, design: Design) -> bool:
    return any(f".{part}." in f".{key}." for part in design.unused)


def places_of(module: nn.Module, spec: ModelSpec, parts: Parts | None = None) -> dict[str, tuple[str, int]]:
    """Their name -> (our name, order among the tensors that are joined under it along their first axis)."""
    parts = parts or parts_of(module)
    places: dict[str, tuple[str, int]] = {}

    def add(theirs: str, ours: str, order: int = 0) -> None:
        places[theirs] = (ours, order)

    def pair(part: nn.Module, ours: str, order: int = 0) -> None:
        add(parts.name(part, "weight"), f"{ours}.weight", order)
        if part.bias is not None:
            add(parts.name(part, "bias"), f"{ours}.bias", order)

    pair(parts.conv, "stem.proj")
    for order, token in enumerate(dict.fromkeys(spec.prefix)):
        add(parts.tokens[token], "prefix", order)
    add(parts.position, "position")
    if parts.pre_norm is not None:
        pair(parts.pre_norm, "pre_norm")
    if parts.norm is not None:
        pair(parts.norm, "norm" if parts.design.norm == "tokens" else "pool_norm")
    for i, block in enumerate(parts.blocks):
        ours = f"blocks.{i}"
        for number, (norm, scale, half) in enumerate(
            zip(block.norms, block.scales, ("attention", "mlp"), strict=True), 1
        ):
            pair(norm, f"{ours}.norm{number}")
            if scale is not None:
                add(parts.name(scale, "lambda1"), f"{ours}.{half}.gamma")
        for order, (letter, part) in enumerate((("q", block.q), ("k", block.k), ("v", block.v))):
            add(parts.name(part, "weight"), f"{ours}.attention.qkv", order)
            if part.bias is not None:
                add(parts.name(part, "bias"), f"{ours}.attention.{letter}_bias")
        pair(block.out, f"{ours}.attention.out")
        for order, part in enumerate(block.first):
            pair(part, f"{ours}.mlp.fc1", order)
        pair(block.second, f"{ours}.mlp.fc2")
    if (head := parts.map_head) is not None:
        add(parts.name(head, "probe"), "pool.latent")
        add(parts.name(head.attention, "in_proj_weight"), "pool.qkv.weight")
        add(parts.name(head.attention, "in_proj_bias"), "pool.qkv.bias")
        for part, name in (
            (head.attention.out_proj, "out"),
            (head.layernorm, "norm"),
            (head.mlp.fc1, "fc1"),
            (head.mlp.fc2, "fc2"),
        ):
            pair(part, f"pool.{name}")
    for attribute, (name, _) in parts.design.heads.items():
        if not isinstance(parts.heads[attribute], nn.Identity):
            pair(parts.heads[attribute], f"heads.{name}")
    return places


def weights_of(module: nn.Module, spec: ModelSpec) -> dict[str, Tensor]:
    """The module's numbers under our names: float32 copies on the CPU."""
    module, _ = encoder_of(module)
    state: Mapping[str, Tensor] = module.state_dict()
    pieces: dict[str, dict[int, Tensor]] = {}
    for theirs, (name, order) in places_of(module, spec).items():
        value = state[theirs].detach().to(device="cpu", dtype=torch.float32, copy=True)
        if name in ("prefix", "position"):
            value = value.reshape(-1, spec.width)
        elif name == "pool.latent":
            value = value.reshape(spec.width)
        pieces.setdefault(name, {})[order] = value
    weights = {name: _joined([found[order] for order in sorted(found)]) for name, found in pieces.items()}
    if "reg" in spec.prefix:  # only the class token has a row in the table; the sum of both is what the model adds
        weights["prefix"][0] += weights["position"][0]
        weights["position"] = weights["position"][1:].clone()
    for leaf in ("weight", "bias"):
        if (joined := weights.pop(f"pool.qkv.{leaf}", None)) is not None:
            weights[f"pool.q.{leaf}"] = joined[: spec.width].clone()
            weights[f"pool.kv.{leaf}"] = joined[spec.width :].clone()
    return weights


def _joined(values: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(values)) if len(values) > 1 else values[0]


__all__ = [
    "ADVICE",
    "BASE_MODELS",
    "DESIGNS",
    "ENCODERS",
    "Design",
    "class_name",
    "encoder_of",
    "left_out",
    "other",
    "places_of",
    "refused",
    "spec_of",
    "takes",
    "weights_of",
]
