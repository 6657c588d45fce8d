"""The structure of a timm `VisionTransformer`: module -> spec, and which of its tensors is which of ours."""

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

from ...spec import AttentionSpec, BlockSpec, ConvStem, MlpSpec, ModelSpec, Output, Pool, Position
from ..expressible import halves
from ..parts import Reader, by_name, valid
from ..places import BlockNames, Places, taken

ADVICE = "vitrim reads timm's plain pre-norm Vision Transformers, such as 'timm:deit_small_patch16_224'."
refused = Reader(ADVICE).refused

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
    stem, embed = _stem(module, reader), module.patch_embed
    distilled = isinstance(module, VisionTransformerDistilled)
    registers = 0 if module.reg_token is None else module.reg_token.shape[1]
    tokens = ["cls", "dist"] if distilled else ["cls"] if module.cls_token is not None else []
    prefix: tuple[Any, ...] = (*tokens, *["reg"] * registers)  # a distilled one's are refused as left-over numbers
    position = _position(module, len(prefix), reader)
    norms = {name: reader.norm(getattr(module, name), name) for name in ("norm_pre", "norm", "fc_norm")}
    pool, pool_norm = _pool(module, prefix, reader), norms["fc_norm"]
    if pool.kind == "none":  # a norm behind no pooling is the final norm by another name
        norms["norm"], pool_norm = norms["norm"] or pool_norm, pool_norm and norms["norm"]
    eps = reader.one_eps(1e-6)
    with valid(module, "timm"):
        spec = ModelSpec(
            image_px=tuple(embed.img_size),
            patch_px=tuple(embed.patch_size),
            channels=embed.proj.in_channels,
            stem=stem,
            width=embed.proj.out_channels,
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


def family(file: str, name: str) -> str:
    """What sets a class or model `name` of timm's model file `file` apart from a plain Vision Transformer."""
    if file in ("vision_transformer", "deit"):
        return f"a class of its own ({name})"
    return f"{FAMILIES.get(file, 'another, convolutional or hierarchical design')} ({name} of {file})"


def _stem(module: VisionTransformer, reader: Reader) -> ConvStem:
    embed = module.patch_embed
    if not isinstance(embed, PatchEmbed) or not isinstance(getattr(embed, "proj", None), nn.Conv2d):
        raise refused(f"a convolutional (hybrid) or other stem ({type(embed).__name__})")
    if not _idle(embed.norm):
        raise refused(f"a norm in its patch embedding ({type(embed.norm).__name__})")
    stem = reader.stem(embed.proj, tuple(embed.patch_size))
    if embed.img_size is None:
        raise refused("no image size; make it with img_size=")
    return stem


def _position(module: VisionTransformer, prefix: int, reader: Reader) -> Position:
    grid = tuple(module.patch_embed.grid_size)
    if module.pos_embed is None:
        return Position(kind="none", grid=grid, prefix_rows=False)
    prefix_rows = not module.no_embed_class
    reader.table_rows(module.pos_embed.shape[1], math.prod(grid) + prefix * prefix_rows)
    return Position(grid=grid, prefix_rows=prefix_rows and prefix > 0)


def _pool(module: VisionTransformer, prefix: tuple[Any, ...], reader: Reader) -> Pool:
    pooling, latent = module.global_pool, module.attn_pool is not None
    kinds: dict[str, Literal["cls", "mean", "none"]] = {"token": "cls", "avg": "mean", "": "none"}
    among = prefix and module.pool_include_prefix
    reader.without(
        {
            f"{pooling!r} pooling": pooling != "map" if latent else pooling not in kinds,
            "map pooling over the patch tokens alone, beside prefix tokens": latent and bool(prefix) and not among,
            "average pooling over the prefix tokens too (pool_include_prefix)": pooling == "avg" and bool(among),
        }
    )
    return _map_pool(module.attn_pool, module.embed_dim, reader) if latent else Pool(kind=kinds[pooling])


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
        "without a projection of its query": _idle(pool.q),
        "with norms of queries and keys": not (_idle(pool.q_norm) and _idle(pool.k_norm)),
        f"of another width than {width}": (pool.latent_dim, pool.out_features) != (width, width),
        f"with an MLP of another design ({type(mlp).__name__})": type(mlp) is not TimmMlp or not _idle(mlp.norm),
    }
    reader.without(faults, "map pooling {}")
    linears = {"q": pool.q, "kv": pool.kv, "proj": pool.proj, "fc1": mlp.fc1, "fc2": mlp.fc2}
    reader.linears(linears, "map pooling")
    act = reader.activation(mlp.act, "map pooling")
    faults = {
        "without biases": any(part.bias is None for part in linears.values()),
        "without a norm": not reader.norm(pool.norm, "map pooling"),
    }
    reader.without(faults, "map pooling {}")
    if act not in ("gelu", "gelu_tanh"):
        raise refused(f"map pooling with the activation {act}")
    return Pool(kind="map", heads=pool.num_heads, hidden=mlp.fc2.in_features, act=act)


def _idle(part: Any) -> bool:
    return isinstance(part, nn.Identity)


def _block(block: nn.Module, where: str, reader: Reader) -> BlockSpec:
    kind = type(block)
    if not isinstance(block, TimmBlock) or kind.forward is not TimmBlock.forward or "forward" in vars(block):
        raise refused(f"{BLOCKS.get(kind.__name__, 'blocks of another design')} ({where}: {kind.__name__})")
    reader.norms({"norm1": block.norm1, "norm2": block.norm2}, where)
    for name, scale in {"ls1": block.ls1, "ls2": block.ls2}.items():
        if not isinstance(scale, LayerScale | nn.Identity):
            raise refused(f"a {type(scale).__name__} at {where}, {name}")
    return BlockSpec(
        attention=_attention(block.attn, where, reader, not _idle(block.ls1)),
        mlp=_mlp(block.mlp, where, reader, not _idle(block.ls2)),
    )


def _attention(attn: Any, where: str, reader: Reader, layer_scale: bool) -> AttentionSpec:
    kind = type(attn)
    if not isinstance(attn, TimmAttention) or kind.forward is not TimmAttention.forward:
        raise refused(f"{BLOCKS.get(kind.__name__, 'attention of another design')} ({where}: {kind.__name__})")
    inside, gated = not _idle(getattr(attn, "norm", nn.Identity())), getattr(attn, "gate", None) is not None
    reader.without(
        {f"a norm inside its attention (scale_attn_norm, {where})": inside, f"gated attention ({where})": gated}
    )
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
    scale = None if attn.fused_attn else float(attn.scale)  # timm's fused call never looks at `scale`
    return reader.attention(
        attn, attn.num_heads, attn.head_dim, where, scale=scale, qk_norm=norms[0], layer_scale=layer_scale
    )


def _mlp(mlp: Any, where: str, reader: Reader, layer_scale: bool) -> MlpSpec:
    if type(mlp) not in (TimmMlp, GluMlp, SwiGLU):
        raise refused(f"an MLP of another design ({where}: {type(mlp).__name__})")
    if not _idle(mlp.norm):
        raise refused(f"a norm inside its MLP (scale_mlp_norm, {where})")
    names = ("fc1_g", "fc1_x", "fc2") if isinstance(mlp, SwiGLU) else ("fc1", "fc2")
    linears = {name: getattr(mlp, name) for name in names}
    return reader.mlp(linears, mlp.act, where, layer_scale=layer_scale, gated=not isinstance(mlp, TimmMlp))


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
        ours, (attention, mlp) = f"blocks.{i}", halves(block)
        places.block(ours, i, block, SPLIT if isinstance(module.blocks[i].mlp, SwiGLU) else BlockNames())
        for norm in ("q_norm", "k_norm") if attention.qk_norm != "none" else ():
            places.pair(f"{ours}.attn.{norm}", f"{ours}.attention.{norm}", attention.qk_norm == "layer")
        for scale, half, there in (("ls1", "attention", attention.layer_scale), ("ls2", "mlp", mlp.layer_scale)):
            if there:
                places.add(f"{ours}.{scale}.gamma", f"{ours}.{half}.gamma")
    if spec.pool.kind == "map":
        places.add("attn_pool.latent", "pool.latent")
        own = {"q": "q", "kv": "kv", "proj": "out", "norm": "norm", "mlp.fc1": "fc1", "mlp.fc2": "fc2"}
        for theirs, name in own.items():
            places.pair(f"attn_pool.{theirs}", f"pool.{name}")
    for output in spec.outputs:
        places.pair(output.name, f"heads.{output.name}", output.bias)
    return places
