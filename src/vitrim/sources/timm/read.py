"""The structure of a timm `VisionTransformer`: module -> spec, and which of its tensors is which of ours.

Parts are recognised by their class; what the spec cannot say is refused by its name, and so is a tensor left over.
"""

from __future__ import annotations

import math
from typing import Any, Literal

from timm.layers import Attention as TimmAttention
from timm.layers import AttentionPoolLatent, GluMlp, LayerScale, PatchEmbed, RmsNorm, SwiGLU
from timm.layers import Mlp as TimmMlp
from timm.models import VisionTransformer
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block as TimmBlock
from torch import Tensor, cat, nn

from ...errors import SourceError
from ...spec import AttentionSpec, BlockSpec, ConvStem, MlpSpec, ModelSpec, Output, Pool, Position
from ..expressible import halves
from ..parts import Reader, by_name, dense_attention, valid
from ..places import BlockNames, Places, taken

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
SPLIT = BlockNames(fc1=("mlp.fc1_g", "mlp.fc1_x"))
"""Of a block whose gate and value are two linears."""

FAMILIES = by_name(
    {
        "relative position bias": "beit vision_transformer_relpos",
        "windowed attention": "vision_transformer_sam hieradet_sam2",
        "rotary positions or a norm inside its MLP": "eva",
        "rotary positions": "gemma4_vit qwen3_vit deepseek_vit",
        "packed images of several sizes": "naflexvit",
        "a convolutional (hybrid) stem": "vision_transformer_hybrid",
        "class attention": "cait",
        "cross-covariance attention": "xcit",
        "outlook attention": "volo",
        "two branches of patches": "crossvit",
        "positional gates in attention": "convit",
        "a transformer inside each patch": "tnt",
        "no attention": "mlp_mixer",
        "a hierarchy of windows": "swin_transformer swin_transformer_v2 swin_transformer_v2_cr",
        "a hierarchy of stages": "coat davit edgenext efficientformer efficientformer_v2 efficientvit_mit efficientvit_msra "
        "fastvit focalnet gcvit hiera iformer levit lowformer maxxvit metaformer mobilevit mvitv2 nest nextvit pit pvt_v2 "
        "shvit swiftformer tiny_vit twins visformer vitamin",
    }
)
"""What sets timm's other model files apart; a file that is not here is convolutional."""


def spec_of(module: nn.Module) -> ModelSpec:
    """The spec of a timm module, read off its parts (so a fine-tuned one with other classes is as good as a named one).

    Works on the meta device. Raises SourceError naming the part that the spec cannot say.
    """
    if not isinstance(module, VisionTransformer):
        raise refused(family(type(module).__module__.rsplit(".", 1)[-1], type(module).__name__))
    reader = Reader(ADVICE)
    blocks = tuple(_block(block, f"block {i}", reader) for i, block in enumerate(module.blocks))
    stem = _stem(module, reader)
    distilled = isinstance(module, VisionTransformerDistilled)
    prefix = _prefix(module, distilled)
    position = _position(module, len(prefix), reader)
    norms = {name: reader.norm(getattr(module, name), name) for name in ("norm_pre", "norm", "fc_norm")}
    pool, pool_norm = _pool(module, prefix, reader), norms["fc_norm"]
    if pool.kind == "none":  # a norm behind no pooling is the final norm by another name
        norms["norm"], pool_norm = norms["norm"] or pool_norm, pool_norm and norms["norm"]
    eps = reader.one_eps(1e-6)
    with valid(module, "timm"):
        spec = ModelSpec(
            image_px=tuple(module.patch_embed.img_size),
            patch_px=tuple(module.patch_embed.patch_size),
            channels=module.patch_embed.proj.in_channels,
            stem=stem,
            width=module.patch_embed.proj.out_channels,
            prefix=prefix,
            position=position,
            pre_norm=norms["norm_pre"],
            final_norm=norms["norm"],
            pool_norm=pool_norm,
            norm_eps=eps,
            blocks=blocks,
            pool=pool,
            outputs=_outputs(module, pool, distilled, reader),
        )
    reader.all_placed(module, places_of(module, spec))
    return spec


def weights_of(module: Any, spec: ModelSpec) -> dict[str, Tensor]:
    """The module's numbers under our names: float32 copies on the CPU."""
    weights = taken(module.state_dict(), places_of(module, spec), spec.width)
    for i, block in enumerate(module.blocks):
        if isinstance(block.mlp, GluMlp) and block.mlp.gate_last:  # we keep the gate in front
            for key in (f"blocks.{i}.mlp.fc1.weight", f"blocks.{i}.mlp.fc1.bias"):
                if key in weights:
                    weights[key] = cat(weights[key].chunk(2)[::-1])
    return weights


def refused(what: str) -> SourceError:
    """The error that names what the spec cannot say."""
    return Reader(ADVICE).refused(what)


def family(file: str, name: str) -> str:
    """What sets a class or model `name` of timm's model file `file` apart from a plain Vision Transformer."""
    if file in ("vision_transformer", "deit"):
        return f"a class of its own ({name})"
    return f"{FAMILIES.get(file, 'another, convolutional or hierarchical design')} ({name} of {file})"


def _stem(module: VisionTransformer, reader: Reader) -> ConvStem:
    embed = module.patch_embed
    if not isinstance(embed, PatchEmbed) or not isinstance(getattr(embed, "proj", None), nn.Conv2d):
        raise refused(f"a convolutional (hybrid) or other stem ({type(embed).__name__})")
    if not isinstance(embed.norm, nn.Identity):
        raise refused(f"a norm in its patch embedding ({type(embed.norm).__name__})")
    stem = reader.stem(embed.proj, tuple(embed.patch_size))
    if embed.img_size is None:
        raise refused("no image size; make it with img_size=")
    return stem


def _prefix(module: VisionTransformer, distilled: bool) -> tuple[Any, ...]:
    registers = 0 if module.reg_token is None else module.reg_token.shape[1]
    if distilled:
        return ("cls", "dist", *["reg"] * registers)  # registers of a distilled one are refused as left-over numbers
    return (*(["cls"] if module.cls_token is not None else []), *["reg"] * registers)


def _position(module: VisionTransformer, prefix: int, reader: Reader) -> Position:
    grid = tuple(module.patch_embed.grid_size)
    if module.pos_embed is None:
        return Position(kind="none", grid=grid, prefix_rows=False)
    prefix_rows = not module.no_embed_class
    reader.table_rows(module.pos_embed.shape[1], math.prod(grid) + prefix * prefix_rows)
    return Position(grid=grid, prefix_rows=prefix_rows and prefix > 0)


def _pool(module: VisionTransformer, prefix: tuple[Any, ...], reader: Reader) -> Pool:
    if module.attn_pool is not None:
        if module.global_pool != "map":
            raise refused(f"{module.global_pool!r} pooling")
        if prefix and not module.pool_include_prefix:
            raise refused("map pooling over the patch tokens alone, beside prefix tokens")
        return _map_pool(module.attn_pool, module.embed_dim, reader)
    if module.global_pool == "token":
        return Pool(kind="cls")
    if module.global_pool == "":
        return Pool(kind="none")
    if module.global_pool != "avg":
        raise refused(f"{module.global_pool!r} pooling")
    if module.pool_include_prefix and prefix:
        raise refused("average pooling over the prefix tokens too (pool_include_prefix)")
    return Pool(kind="mean")


def _map_pool(pool: Any, width: int, reader: Reader) -> Pool:
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
    linears: dict[str, Any] = {"q": pool.q, "kv": pool.kv, "proj": pool.proj, "fc1": mlp.fc1, "fc2": mlp.fc2}
    reader.linears(linears, "map pooling")
    if any(part.bias is None for part in linears.values()):
        raise refused("map pooling without biases")
    if not reader.norm(pool.norm, "map pooling"):
        raise refused("map pooling without a norm")
    act = reader.activation(mlp.act, "map pooling")
    if act not in ("gelu", "gelu_tanh"):
        raise refused(f"map pooling with the activation {act}")
    return Pool(kind="map", heads=pool.num_heads, hidden=linears["fc2"].in_features, act=act)


def _block(block: nn.Module, where: str, reader: Reader) -> BlockSpec:
    kind = type(block)
    if not isinstance(block, TimmBlock) or kind.forward is not TimmBlock.forward or "forward" in vars(block):
        raise refused(f"{BLOCKS.get(kind.__name__, 'blocks of another design')} ({where}: {kind.__name__})")
    reader.norms({"norm1": block.norm1, "norm2": block.norm2}, where)
    for name in ("ls1", "ls2"):
        if not isinstance(getattr(block, name), (LayerScale, nn.Identity)):
            raise refused(f"a {type(getattr(block, name)).__name__} at {where}, {name}")
    return BlockSpec(
        attention=_attention(block.attn, where, reader, isinstance(block.ls1, LayerScale)),
        mlp=_mlp(block.mlp, where, reader, isinstance(block.ls2, LayerScale)),
    )


def _attention(attn: Any, where: str, reader: Reader, layer_scale: bool) -> AttentionSpec:
    kind = type(attn)
    if not isinstance(attn, TimmAttention) or kind.forward is not TimmAttention.forward:
        raise refused(f"{BLOCKS.get(kind.__name__, 'attention of another design')} ({where}: {kind.__name__})")
    if not isinstance(getattr(attn, "norm", nn.Identity()), nn.Identity):
        raise refused(f"a norm inside its attention (scale_attn_norm, {where})")
    if getattr(attn, "gate", None) is not None:
        raise refused(f"gated attention ({where})")
    reader.linears({"qkv": attn.qkv, "proj": attn.proj}, where)
    norms: list[Literal["none", "layer", "rms"]] = []
    for name in ("q_norm", "k_norm"):
        norm = getattr(attn, name)
        if isinstance(norm, RmsNorm) and norm.weight is not None:
            reader.eps.add(norm.eps)
            norms.append("rms")
        else:
            norms.append("layer" if reader.norm(norm, f"{where}, {name}") else "none")
    if norms[0] != norms[1]:
        raise refused(f"different norms of queries and keys ({where})")
    reader.joint_fits(attn.qkv, attn.proj, attn.num_heads, attn.head_dim, where)
    return dense_attention(
        attn.num_heads,
        attn.head_dim,
        bias=attn.qkv.bias is not None,
        scale=None if attn.fused_attn else float(attn.scale),  # timm's fused call never looks at `scale`
        out_bias=attn.proj.bias is not None,
        qk_norm=norms[0],
        layer_scale=layer_scale,
    )


def _mlp(mlp: Any, where: str, reader: Reader, layer_scale: bool) -> MlpSpec:
    if type(mlp) not in (TimmMlp, GluMlp, SwiGLU):
        raise refused(f"an MLP of another design ({where}: {type(mlp).__name__})")
    if not isinstance(mlp.norm, nn.Identity):
        raise refused(f"a norm inside its MLP (scale_mlp_norm, {where})")
    gated = not isinstance(mlp, TimmMlp)
    first = ("fc1_g", "fc1_x") if isinstance(mlp, SwiGLU) else ("fc1",)
    reader.linears({name: getattr(mlp, name) for name in (*first, "fc2")}, where)
    kind = reader.activation(mlp.act, where)
    if gated and kind != "silu":
        raise refused(f"an MLP gated by {kind} ({where}: {type(mlp).__name__})")
    return MlpSpec(
        kind="swiglu" if gated else kind,
        hidden=mlp.fc2.in_features,
        fc1_bias=getattr(mlp, first[0]).bias is not None,
        fc2_bias=mlp.fc2.bias is not None,
        layer_scale=layer_scale,
    )


def _outputs(module: VisionTransformer, pool: Pool, distilled: bool, reader: Reader) -> tuple[Output, ...]:
    heads = {"head": "pool", **({"head_dist": "dist"} if distilled else {})}
    outputs = [
        output for name, read in heads.items() for output in reader.outputs(getattr(module, name), name, name, (read,))
    ]
    if distilled and len(outputs) != 2:
        raise refused("a distillation token without two classifiers")
    if outputs and pool.kind == "none":
        raise refused("a classifier on every token (no pooling)")
    return tuple(outputs)


def places_of(module: Any, spec: ModelSpec) -> Places:
    """timm's name -> our name, for every number that the spec has a place for."""
    places = Places()
    assert isinstance(spec.stem, ConvStem)
    places.pair("patch_embed.proj", "stem.proj", spec.stem.bias)
    tokens = {"cls": "cls_token", "dist": "dist_token", "reg": "reg_token"}
    if isinstance(module, VisionTransformerDistilled):
        del tokens["reg"]
    for order, token in enumerate(dict.fromkeys(spec.prefix)):
        if token in tokens:
            places.add(tokens[token], "prefix", order)
    if spec.position.kind != "none":
        places.add("pos_embed", "position")
    if spec.pre_norm:
        places.pair("norm_pre", "pre_norm")
    behind_pool = spec.pool.kind == "none" and isinstance(getattr(module, "norm", None), nn.Identity)
    if spec.final_norm:
        places.pair("fc_norm" if behind_pool else "norm", "norm")
    if spec.pool_norm and not isinstance(module, VisionTransformerDistilled):  # whose forward never reaches it
        places.pair("fc_norm", "pool_norm")
    for i, block in enumerate(spec.blocks):
        attention, mlp = halves(block)
        split = isinstance(module.blocks[i].mlp, SwiGLU)
        places.block(f"blocks.{i}", i, block, SPLIT if split else BlockNames())
        for norm in ("q_norm", "k_norm"):
            if attention.qk_norm != "none":
                places.pair(f"blocks.{i}.attn.{norm}", f"blocks.{i}.attention.{norm}", attention.qk_norm == "layer")
        if attention.layer_scale:
            places.add(f"blocks.{i}.ls1.gamma", f"blocks.{i}.attention.gamma")
        if mlp.layer_scale:
            places.add(f"blocks.{i}.ls2.gamma", f"blocks.{i}.mlp.gamma")
    if spec.pool.kind == "map":
        places.add("attn_pool.latent", "pool.latent")
        for theirs, ours in (
            ("q", "q"),
            ("kv", "kv"),
            ("proj", "out"),
            ("norm", "norm"),
            ("mlp.fc1", "fc1"),
            ("mlp.fc2", "fc2"),
        ):
            places.pair(f"attn_pool.{theirs}", f"pool.{ours}")
    for output in spec.outputs:
        places.pair(output.name, f"heads.{output.name}", output.bias)
    return places
