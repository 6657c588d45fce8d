"""The structure of a timm `VisionTransformer`: module -> spec, and which of its tensors is which of ours.

Parts are recognised by their class; what the spec cannot say is refused by its name, and so is a tensor left over.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from timm.layers import Attention as TimmAttention
from timm.layers import AttentionPoolLatent, GluMlp, LayerScale, PatchEmbed, RmsNorm, SwiGLU
from timm.layers import Mlp as TimmMlp
from timm.models import VisionTransformer
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block as TimmBlock
from torch import Tensor, nn

from ..errors import SourceError, SpecError
from ..spec import AttentionSpec, BlockSpec, ConvStem, MlpKind, MlpSpec, ModelSpec, Output, Pool, Position
from .checkpoints import listed

ADVICE = "vitrim reads timm's plain pre-norm Vision Transformers, such as 'timm:deit_small_patch16_224'."

BLOCKS = {
    "ParallelScalingBlock": "parallel blocks",
    "ParallelThingsBlock": "parallel blocks",
    "DiffParallelScalingBlock": "parallel blocks with differential attention",
    "ResPostBlock": "post-norm blocks",
    "DiffAttention": "differential attention",
    "AttentionRope": "rotary positions",
}
"""What a class of timm's does that the spec cannot say."""

FAMILIES = {
    "beit": "relative position bias",
    "vision_transformer_relpos": "relative position bias",
    "vision_transformer_sam": "windowed attention",
    "hieradet_sam2": "windowed attention",
    "eva": "rotary positions or a norm inside its MLP",
    "gemma4_vit": "rotary positions",
    "qwen3_vit": "rotary positions",
    "deepseek_vit": "rotary positions",
    "naflexvit": "packed images of several sizes",
    "vision_transformer_hybrid": "a convolutional (hybrid) stem",
    "cait": "class attention",
    "xcit": "cross-covariance attention",
    "volo": "outlook attention",
    "crossvit": "two branches of patches",
    "convit": "positional gates in attention",
    "tnt": "a transformer inside each patch",
    "mlp_mixer": "no attention",
    "swin_transformer": "a hierarchy of windows",
    "swin_transformer_v2": "a hierarchy of windows",
    "swin_transformer_v2_cr": "a hierarchy of windows",
    "coat": "a hierarchy of stages",
    "davit": "a hierarchy of stages",
    "edgenext": "a hierarchy of stages",
    "efficientformer": "a hierarchy of stages",
    "efficientformer_v2": "a hierarchy of stages",
    "efficientvit_mit": "a hierarchy of stages",
    "efficientvit_msra": "a hierarchy of stages",
    "fastvit": "a hierarchy of stages",
    "focalnet": "a hierarchy of stages",
    "gcvit": "a hierarchy of stages",
    "hiera": "a hierarchy of stages",
    "iformer": "a hierarchy of stages",
    "levit": "a hierarchy of stages",
    "lowformer": "a hierarchy of stages",
    "maxxvit": "a hierarchy of stages",
    "metaformer": "a hierarchy of stages",
    "mobilevit": "a hierarchy of stages",
    "mvitv2": "a hierarchy of stages",
    "nest": "a hierarchy of stages",
    "nextvit": "a hierarchy of stages",
    "pit": "a hierarchy of stages",
    "pvt_v2": "a hierarchy of stages",
    "shvit": "a hierarchy of stages",
    "swiftformer": "a hierarchy of stages",
    "tiny_vit": "a hierarchy of stages",
    "twins": "a hierarchy of stages",
    "visformer": "a hierarchy of stages",
    "vitamin": "a hierarchy of stages",
}
"""What sets timm's other model files apart; a file that is not here is convolutional."""


def spec_of(module: nn.Module) -> ModelSpec:
    """The spec of a timm module, read off its parts (so a fine-tuned one with other classes is as good as a named one).

    Works on the meta device. Raises SourceError naming the part that the spec cannot say.
    """
    if not isinstance(module, VisionTransformer):
        raise refused(family(type(module).__module__.rsplit(".", 1)[-1], type(module).__name__))
    eps: set[float] = set()
    blocks = tuple(_block(block, f"block {i}", eps) for i, block in enumerate(module.blocks))
    stem = _stem(module)
    distilled = isinstance(module, VisionTransformerDistilled)
    prefix = _prefix(module, distilled)
    position = _position(module, len(prefix))
    norms = {name: _norm(getattr(module, name), name, eps) for name in ("norm_pre", "norm", "fc_norm")}
    pool, pool_norm = _pool(module, prefix, eps), norms["fc_norm"]
    if pool.kind == "none":  # a norm behind no pooling is the final norm by another name
        norms["norm"], pool_norm = norms["norm"] or pool_norm, pool_norm and norms["norm"]
    patch_px = tuple(module.patch_embed.patch_size)
    if len(eps) > 1:
        raise refused(f"norms with different eps {sorted(eps)!r}")
    try:
        spec = ModelSpec(
            image_px=tuple(module.patch_embed.img_size),
            patch_px=patch_px,
            channels=module.patch_embed.proj.in_channels,
            stem=stem,
            width=module.patch_embed.proj.out_channels,
            prefix=prefix,
            position=position,
            pre_norm=norms["norm_pre"],
            final_norm=norms["norm"],
            pool_norm=pool_norm,
            norm_eps=eps.pop() if eps else 1e-6,
            blocks=blocks,
            pool=pool,
            outputs=_outputs(module, pool, distilled),
        )
    except SpecError as error:
        raise SourceError(f"timm module {type(module).__name__}: {error}") from None
    if left := sorted(set(module.state_dict()) - set(places_of(module, spec))):
        raise refused(f"numbers that a plain one does not have: {listed(left)}")
    return spec


def weights_of(module: Any, spec: ModelSpec) -> dict[str, Tensor]:
    """The module's numbers under our names: float32 copies on the CPU."""
    state = module.state_dict()
    weights: dict[str, Tensor] = {}
    parts: dict[str, dict[int, Tensor]] = {}
    for theirs, (name, order) in places_of(module, spec).items():
        value = state[theirs].detach().to(device="cpu", dtype=torch.float32, copy=True)
        if name == "prefix":
            value = value.reshape(-1, spec.width)  # 1 P D -> P D
        elif name == "position":
            value = value.squeeze(0)
        elif name == "pool.latent":
            value = value.flatten()  # 1 1 D -> D
        parts.setdefault(name, {})[order] = value
    for name, pieces in parts.items():
        weights[name] = (
            torch.cat([pieces[i] for i in sorted(pieces)]) if len(pieces) > 1 else next(iter(pieces.values()))
        )
    for i, block in enumerate(spec.blocks):
        name = f"blocks.{i}.attention.qkv"
        if (bias := weights.pop(f"{name}.bias", None)) is not None:
            assert block.attention is not None
            thirds = zip(("q_bias", "k_bias", "v_bias"), bias.chunk(3), strict=True)
            weights.update({f"blocks.{i}.attention.{key}": third.clone() for key, third in thirds})
        weights[name] = weights.pop(f"{name}.weight")
        mlp = module.blocks[i].mlp
        if isinstance(mlp, GluMlp) and mlp.gate_last:  # we keep the gate in front
            for key in (f"blocks.{i}.mlp.fc1.weight", f"blocks.{i}.mlp.fc1.bias"):
                if key in weights:
                    weights[key] = torch.cat(weights[key].chunk(2)[::-1])
    return weights


def refused(what: str) -> SourceError:
    """The error that names what the spec cannot say."""
    return SourceError(f"this model has {what}, which vitrim cannot take in. {ADVICE}")


def family(file: str, name: str) -> str:
    """What sets a class or model `name` of timm's model file `file` apart from a plain Vision Transformer."""
    if file in ("vision_transformer", "deit"):
        return f"a class of its own ({name})"
    return f"{FAMILIES.get(file, 'another, convolutional or hierarchical design')} ({name} of {file})"


def _stem(module: VisionTransformer) -> ConvStem:
    embed = module.patch_embed
    if not isinstance(embed, PatchEmbed) or not isinstance(getattr(embed, "proj", None), nn.Conv2d):
        raise refused(f"a convolutional (hybrid) or other stem ({type(embed).__name__})")
    if not isinstance(embed.norm, nn.Identity):
        raise refused(f"a norm in its patch embedding ({type(embed.norm).__name__})")
    proj, patch = embed.proj, tuple(embed.patch_size)
    kernel, stride = tuple(proj.kernel_size), tuple(proj.stride)  # lists, where a JSON file told them to timm
    if (kernel, stride, proj.padding, proj.dilation, proj.groups) != (patch, patch, (0, 0), (1, 1), 1):
        raise refused(f"patches that overlap or leave gaps (kernel {kernel}, stride {stride})")
    if embed.img_size is None:
        raise refused("no image size; make it with img_size=")
    return ConvStem(bias=proj.bias is not None)


def _prefix(module: VisionTransformer, distilled: bool) -> tuple[Any, ...]:
    registers = 0 if module.reg_token is None else module.reg_token.shape[1]
    if distilled:
        return ("cls", "dist", *["reg"] * registers)  # registers of a distilled one are refused as left-over numbers
    return (*(["cls"] if module.cls_token is not None else []), *["reg"] * registers)


def _position(module: VisionTransformer, prefix: int) -> Position:
    grid = tuple(module.patch_embed.grid_size)
    if module.pos_embed is None:
        return Position(kind="none", grid=grid, prefix_rows=False)
    prefix_rows = not module.no_embed_class
    rows, expected = module.pos_embed.shape[1], math.prod(grid) + prefix * prefix_rows
    if rows != expected:
        raise refused(f"a position table of {rows} rows where {expected} were expected")
    return Position(grid=grid, prefix_rows=prefix_rows and prefix > 0)


def _norm(norm: nn.Module, where: str, eps: set[float]) -> bool:
    """Whether there is a layer norm; its eps is added to `eps`."""
    if isinstance(norm, nn.Identity):
        return False
    if not isinstance(norm, nn.LayerNorm):
        kind = "a root-mean-square norm" if "rms" in type(norm).__name__.lower() else f"a {type(norm).__name__}"
        raise refused(f"{kind} at {where}")
    if norm.weight is None or norm.bias is None:
        raise refused(f"a norm without weight or bias at {where}")
    eps.add(norm.eps)
    return True


def _pool(module: VisionTransformer, prefix: tuple[Any, ...], eps: set[float]) -> Pool:
    if module.attn_pool is not None:
        if module.global_pool != "map":
            raise refused(f"{module.global_pool!r} pooling")
        if prefix and not module.pool_include_prefix:
            raise refused("map pooling over the patch tokens alone, beside prefix tokens")
        return _map_pool(module.attn_pool, module.embed_dim, eps)
    if module.global_pool == "token":
        return Pool(kind="cls")
    if module.global_pool == "":
        return Pool(kind="none")
    if module.global_pool != "avg":
        raise refused(f"{module.global_pool!r} pooling")
    if module.pool_include_prefix and prefix:
        raise refused("average pooling over the prefix tokens too (pool_include_prefix)")
    return Pool(kind="mean")


def _map_pool(pool: Any, width: int, eps: set[float]) -> Pool:
    """Attention pooling with one learned query and an MLP behind it, as SigLIP has it; any other is refused by its part."""
    if type(pool) is not AttentionPoolLatent:
        raise refused(f"map pooling of another design ({type(pool).__name__})")
    mlp: Any = pool.mlp
    faults = {
        "without an MLP": mlp is None,
        "with a position table of its own": pool.pos_embed is not None,
        f"with {pool.latent_len} queries": pool.latent_len != 1,
        f"that gives {pool.pool!r} of its queries": pool.pool not in ("token", "avg"),  # one query: either gives it
        "without a projection of its query": isinstance(pool.q, nn.Identity),
        "with norms of queries and keys": not isinstance(pool.q_norm, nn.Identity)
        or not isinstance(pool.k_norm, nn.Identity),
        f"of another width than {width}": (pool.latent_dim, pool.out_features) != (width, width),
    }
    for fault, there in faults.items():
        if there:
            raise refused(f"map pooling {fault}")
    if type(mlp) is not TimmMlp or not isinstance(mlp.norm, nn.Identity):
        raise refused(f"map pooling with an MLP of another design ({type(mlp).__name__})")
    _linears(pool, ("q", "kv", "proj"), "map pooling")
    _linears(mlp, ("fc1", "fc2"), "map pooling")
    if any(part.bias is None for part in (pool.q, pool.kv, pool.proj, mlp.fc1, mlp.fc2)):
        raise refused("map pooling without biases")
    if not _norm(pool.norm, "map pooling", eps):
        raise refused("map pooling without a norm")
    act = _activation(mlp.act, "map pooling")
    if act not in ("gelu", "gelu_tanh"):
        raise refused(f"map pooling with the activation {act}")
    last: Any = mlp.fc2
    return Pool(
        kind="map", heads=pool.num_heads, hidden=last.in_features, act="gelu_tanh" if act == "gelu_tanh" else "gelu"
    )


def _block(block: nn.Module, where: str, eps: set[float]) -> BlockSpec:
    kind = type(block)
    if not isinstance(block, TimmBlock) or kind.forward is not TimmBlock.forward or "forward" in vars(block):
        raise refused(f"{BLOCKS.get(kind.__name__, 'blocks of another design')} ({where}: {kind.__name__})")
    for name in ("norm1", "norm2"):
        if not _norm(getattr(block, name), f"{where}, {name}", eps):
            raise refused(f"no {name} ({where})")
    for name in ("ls1", "ls2"):
        if not isinstance(getattr(block, name), (LayerScale, nn.Identity)):
            raise refused(f"a {type(getattr(block, name)).__name__} at {where}, {name}")
    return BlockSpec(
        attention=_attention(block.attn, where, eps, isinstance(block.ls1, LayerScale)),
        mlp=_mlp(block.mlp, where, isinstance(block.ls2, LayerScale)),
    )


def _attention(attn: Any, where: str, eps: set[float], layer_scale: bool) -> AttentionSpec:
    kind = type(attn)
    if not isinstance(attn, TimmAttention) or kind.forward is not TimmAttention.forward:
        raise refused(f"{BLOCKS.get(kind.__name__, 'attention of another design')} ({where}: {kind.__name__})")
    if not isinstance(getattr(attn, "norm", nn.Identity()), nn.Identity):
        raise refused(f"a norm inside its attention (scale_attn_norm, {where})")
    if getattr(attn, "gate", None) is not None:
        raise refused(f"gated attention ({where})")
    _linears(attn, ("qkv", "proj"), where)
    norms: list[Literal["none", "layer", "rms"]] = []
    for name in ("q_norm", "k_norm"):
        norm = getattr(attn, name)
        if isinstance(norm, RmsNorm) and norm.weight is not None:
            eps.add(norm.eps)
            norms.append("rms")
        else:
            norms.append("layer" if _norm(norm, f"{where}, {name}", eps) else "none")
    if norms[0] != norms[1]:
        raise refused(f"different norms of queries and keys ({where})")
    heads, head_dim = attn.num_heads, attn.head_dim
    if attn.qkv.out_features != 3 * heads * head_dim or attn.proj.in_features != heads * head_dim:
        raise refused(f"attention whose linears do not fit {heads} heads of {head_dim} ({where})")
    bias = attn.qkv.bias is not None
    return AttentionSpec(
        heads=heads,
        qk_dim=head_dim,
        v_dim=head_dim,
        scale=head_dim**-0.5 if attn.fused_attn else float(attn.scale),  # timm's fused call never looks at `scale`
        q_bias=bias,
        k_bias=bias,
        v_bias=bias,
        out_bias=attn.proj.bias is not None,
        qk_norm=norms[0],
        layer_scale=layer_scale,
    )


def _mlp(mlp: Any, where: str, layer_scale: bool) -> MlpSpec:
    if type(mlp) not in (TimmMlp, GluMlp, SwiGLU):
        raise refused(f"an MLP of another design ({where}: {type(mlp).__name__})")
    if not isinstance(mlp.norm, nn.Identity):
        raise refused(f"a norm inside its MLP (scale_mlp_norm, {where})")
    gated = not isinstance(mlp, TimmMlp)
    _linears(mlp, ("fc1_g", "fc1_x", "fc2") if isinstance(mlp, SwiGLU) else ("fc1", "fc2"), where)
    kind = _activation(mlp.act, where)
    if gated and kind != "silu":
        raise refused(f"an MLP gated by {kind} ({where}: {type(mlp).__name__})")
    first = mlp.fc1_g if isinstance(mlp, SwiGLU) else mlp.fc1
    return MlpSpec(
        kind="swiglu" if gated else kind,
        hidden=mlp.fc2.in_features,
        fc1_bias=first.bias is not None,
        fc2_bias=mlp.fc2.bias is not None,
        layer_scale=layer_scale,
    )


def _activation(act: nn.Module, where: str) -> MlpKind:
    if isinstance(act, nn.GELU):
        return "gelu_tanh" if act.approximate == "tanh" else "gelu"
    known: dict[str, MlpKind] = {
        "GELU": "gelu",
        "GELUTanh": "gelu_tanh",
        "QuickGELU": "quick_gelu",
        "ReLU": "relu",
        "SiLU": "silu",
        "Swish": "silu",
    }
    if type(act).__name__ not in known:
        raise refused(f"the activation {type(act).__name__} ({where})")
    return known[type(act).__name__]


def _linears(parent: nn.Module, names: tuple[str, ...], where: str) -> None:
    for name in names:
        if type(part := getattr(parent, name)) is not nn.Linear:
            raise refused(f"a {type(part).__name__} as {name} in {where} (merge adapters and undo quantisation first)")


def _outputs(module: VisionTransformer, pool: Pool, distilled: bool) -> tuple[Output, ...]:
    heads = {"head": "pool", **({"head_dist": "dist"} if distilled else {})}
    outputs = []
    for name, read in heads.items():
        head = getattr(module, name)
        if type(head) is nn.Linear:
            outputs.append(Output(name=name, reads=(read,), classes=head.out_features, bias=head.bias is not None))
        elif not isinstance(head, nn.Identity):
            raise refused(f"a classifier that is more than one linear ({name}: {type(head).__name__})")
    if distilled and len(outputs) != 2:
        raise refused("a distillation token without two classifiers")
    if outputs and pool.kind == "none":
        raise refused("a classifier on every token (no pooling)")
    return tuple(outputs)


def places_of(module: Any, spec: ModelSpec) -> dict[str, tuple[str, int]]:
    """timm's name -> (our name, order among the tensors that are joined under it along their first axis)."""
    places: dict[str, tuple[str, int]] = {}

    def add(theirs: str, ours: str, order: int = 0) -> None:
        places[theirs] = (ours, order)

    def pair(theirs: str, ours: str, bias: bool = True, order: int = 0) -> None:
        add(f"{theirs}.weight", f"{ours}.weight", order)
        if bias:
            add(f"{theirs}.bias", f"{ours}.bias", order)

    assert isinstance(spec.stem, ConvStem)
    pair("patch_embed.proj", "stem.proj", spec.stem.bias)
    tokens = {"cls": "cls_token", "dist": "dist_token", "reg": "reg_token"}
    if isinstance(module, VisionTransformerDistilled):
        del tokens["reg"]
    for order, token in enumerate(dict.fromkeys(spec.prefix)):
        if token in tokens:
            add(tokens[token], "prefix", order)
    if spec.position.kind != "none":
        add("pos_embed", "position")
    if spec.pre_norm:
        pair("norm_pre", "pre_norm")
    behind_pool = spec.pool.kind == "none" and isinstance(getattr(module, "norm", None), nn.Identity)
    if spec.final_norm:
        pair("fc_norm" if behind_pool else "norm", "norm")
    if spec.pool_norm and not isinstance(module, VisionTransformerDistilled):  # whose forward never reaches it
        pair("fc_norm", "pool_norm")
    for i, block in enumerate(spec.blocks):
        theirs, ours = f"blocks.{i}", f"blocks.{i}"
        attention, mlp = block.attention, block.mlp
        assert attention is not None
        assert mlp is not None
        pair(f"{theirs}.norm1", f"{ours}.norm1")
        pair(f"{theirs}.attn.qkv", f"{ours}.attention.qkv", attention.q_bias)
        for norm in ("q_norm", "k_norm"):
            if attention.qk_norm != "none":
                pair(f"{theirs}.attn.{norm}", f"{ours}.attention.{norm}", attention.qk_norm == "layer")
        pair(f"{theirs}.attn.proj", f"{ours}.attention.out", attention.out_bias)
        if attention.layer_scale:
            add(f"{theirs}.ls1.gamma", f"{ours}.attention.gamma")
        pair(f"{theirs}.norm2", f"{ours}.norm2")
        if isinstance(module.blocks[i].mlp, SwiGLU):
            pair(f"{theirs}.mlp.fc1_g", f"{ours}.mlp.fc1", mlp.fc1_bias, 0)
            pair(f"{theirs}.mlp.fc1_x", f"{ours}.mlp.fc1", mlp.fc1_bias, 1)
        else:
            pair(f"{theirs}.mlp.fc1", f"{ours}.mlp.fc1", mlp.fc1_bias)
        pair(f"{theirs}.mlp.fc2", f"{ours}.mlp.fc2", mlp.fc2_bias)
        if mlp.layer_scale:
            add(f"{theirs}.ls2.gamma", f"{ours}.mlp.gamma")
    if spec.pool.kind == "map":
        add("attn_pool.latent", "pool.latent")
        for theirs, ours in (
            ("q", "q"),
            ("kv", "kv"),
            ("proj", "out"),
            ("norm", "norm"),
            ("mlp.fc1", "fc1"),
            ("mlp.fc2", "fc2"),
        ):
            pair(f"attn_pool.{theirs}", f"pool.{ours}")
    for output in spec.outputs:
        pair(output.name, f"heads.{output.name}", output.bias)
    return places
