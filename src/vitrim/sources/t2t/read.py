"""The structure of T2T-ViT: module -> spec, the names of its tensors, and what the gates of UVC's copy leave of it.

Its authors' code is no package, so parts are known by their names and classes; what the spec cannot say is refused by its
name, and so is a tensor left over.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...architectures.t2t import EPS
from ...errors import SourceError
from ...model import Vit, sinusoids
from ...spec import BlockSpec, Config, MlpSpec, ModelSpec, Position, T2TPerformer, T2TTransformer
from ...stems import EPSILON, padding
from ..parts import Reader, valid
from ..places import BlockNames, Places, taken
from ..states import listed

ADVICE = "vitrim reads T2T-ViT with the structure of its authors' `t2t_vit_14` and `t2t_vit_t_14`."
refused = Reader(ADVICE).refused
GATES = ("block_skip_gating", "attn_skip_gating", "mlp_skip_gating")
"""What UVC's copy of the network has beside the same tensors: two numbers each, skip and run."""


def spec_of(module: nn.Module) -> ModelSpec:
    """The spec of a module with the structure of T2T-ViT, read off its parts.

    Works on the meta device. Raises SourceError naming the part that the spec cannot say.
    """
    _has(module, ("tokens_to_token", "cls_token", "pos_embed", "blocks", "norm", "head"), "the network")
    theirs: Any = module
    if not isinstance(theirs.pos_embed, Tensor) or theirs.pos_embed.dim() != 3:
        raise refused("no position table of shape [1, rows, width]")
    reader = Reader(ADVICE)
    skipped = skipped_blocks(module.state_dict(), len(theirs.blocks), type(module).__name__)
    state = plain(module.state_dict(), skipped)
    channels, stem = _stem(theirs.tokens_to_token, reader)
    blocks = tuple(
        BlockSpec(attention=None, mlp=None) if i in skipped else _block(block, f"block {i}", reader)
        for i, block in enumerate(theirs.blocks)
    )
    reader.norms({"norm": theirs.norm}, "the network")
    eps = reader.one_eps(EPS)
    rows, width = theirs.pos_embed.shape[-2:]
    side, patch = math.isqrt(max(rows - 1, 0)), math.prod(stem.strides)
    if side * side + 1 != rows:
        raise refused(f"a position table of {rows} rows, which is no class token and square of patches")
    outputs = tuple(reader.outputs(theirs.head, "head"))
    with valid(module, "T2T-ViT"):
        spec = ModelSpec(
            image_px=(side * patch, side * patch),
            patch_px=(patch, patch),
            channels=channels,
            stem=stem,
            width=width,
            position=position_of(theirs.pos_embed[0], side),
            norm_eps=eps,
            blocks=blocks,
            outputs=outputs,
        )
    expected = shapes_of(spec)
    if left := sorted(set(state) - set(expected)):
        raise refused(f"numbers that a plain one does not have: {listed(left)}")
    if wrong := [key for key, shape in expected.items() if key not in state or tuple(state[key].shape) != shape]:
        raise refused(f"parts of other shapes than a plain one: {listed(wrong)}")
    return spec


def weights_of(module: nn.Module, spec: ModelSpec) -> dict[str, Tensor]:
    """The module's numbers under our names: float32 copies on the CPU."""
    return taken(module.state_dict(), places_of(spec), spec.width)


# ------------------------------------------------------------------------------------------------------- names and shapes


def places_of(spec: ModelSpec) -> Places:
    """Their name -> ours, of every tensor."""
    places = Places()
    places.add("cls_token", "prefix")
    places.add("pos_embed", "position")
    performer = isinstance(spec.stem, T2TPerformer)
    for i in (0, 1):
        theirs, ours = f"tokens_to_token.attention{i + 1}", f"stem.stages.{i}"
        places.pair(f"{theirs}.norm1", f"{ours}.norm1")
        places.pair(f"{theirs}.norm2", f"{ours}.norm2")
        if performer:
            places.add(f"{theirs}.w", f"{ours}.features")
            places.pair(f"{theirs}.kqv", f"{ours}.kqv")
            places.pair(f"{theirs}.proj", f"{ours}.proj")
        else:
            places.pair(f"{theirs}.attn.qkv", f"{ours}.qkv", bias=False)
            places.pair(f"{theirs}.attn.proj", f"{ours}.proj")
        places.pair(f"{theirs}.mlp.{'0' if performer else 'fc1'}", f"{ours}.fc1")
        places.pair(f"{theirs}.mlp.{'2' if performer else 'fc2'}", f"{ours}.fc2")
    places.pair("tokens_to_token.project", "stem.project")
    for i, block in enumerate(spec.blocks):
        places.block(f"blocks.{i}", i, block, BlockNames())
    places.pair("norm", "norm")
    for output in spec.outputs:
        places.pair("head", f"heads.{output.name}", output.bias)
    return places


def shapes_of(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Their names and shapes for a network of this spec."""
    with torch.device("meta"):
        ours = {name: tuple(value.shape) for name, value in Vit(Config(spec=spec)).state_dict().items()}
    found: dict[str, tuple[int, ...]] = {}
    for theirs, (name, _) in places_of(spec).items():
        if name.endswith("qkv_bias"):
            found[theirs] = (ours[name.removesuffix("_bias")][0],)
        else:
            found[theirs] = (1, *ours[name]) if name in ("prefix", "position") else ours[name]
    return found


def position_of(table: Tensor, side: int) -> Position:
    """A fixed table; one that is not the sinusoids (it was resized or trained) is resized, not rebuilt, at other sizes."""
    known = table.is_meta or bool(
        (table.detach().cpu().float() - sinusoids(*table.shape)).abs().max() <= 1e-2  # half precision rounds by 4e-3
    )
    return Position(kind="fixed", grid=(side, side), resize="rebuild_1d" if known else "bicubic")


# ----------------------------------------------------------------------------------------------------- gates of UVC's copy


def skipped_blocks(state: Mapping[str, Tensor], depth: int, where: str) -> frozenset[int]:
    """Blocks that the gates of UVC's copy skip: one runs only where its second number is above its first.

    Raises SourceError for a gate of half a block that does not say run: what the half then does is not known.
    """

    def runs(gate: Tensor) -> bool:
        if gate.is_meta:
            raise SourceError(f"{where} has gates without values (meta device); give it its weights first.")
        return bool(gate.reshape(-1)[1] > gate.reshape(-1)[0])

    skipped: frozenset[int] = frozenset()
    if (gates := state.get("block_skip_gating")) is not None:
        if tuple(gates.shape) != (depth, 2):
            raise SourceError(
                f"{where}: block_skip_gating has shape {tuple(gates.shape)}; expected {(depth, 2)}, two numbers a block."
            )
        skipped = frozenset(i for i, gate in enumerate(gates) if not runs(gate))
    for name, value in state.items():
        number = re.fullmatch(r"blocks\.(\d+)\..*?(attn|mlp)_skip_gating", name)
        if number and int(number[1]) not in skipped and not runs(value):
            raise SourceError(
                f"{where}: block {number[1]} has its {number[2]} gate closed ({name}), and what UVC's copy computes then is not "
                "known. Cut the half yourself and save the network without gates."
            )
    return skipped


def plain(state: Mapping[str, Tensor], skipped: Collection[int]) -> dict[str, Tensor]:
    """The tensors without gates and without skipped blocks."""
    gone = tuple(f"blocks.{i}." for i in skipped)
    return {
        key: value
        for key, value in state.items()
        if key.rsplit(".", 1)[-1] not in GATES and not (gone and key.startswith(gone))
    }


# ------------------------------------------------------------------------------------------------------------- structure


def _stem(tokeniser: Any, reader: Reader) -> tuple[int, T2TTransformer | T2TPerformer]:
    """Channels of the images, and the stem."""
    splits = []
    for i in range(3):
        split = getattr(tokeniser, f"soft_split{i}", None)
        if not isinstance(split, nn.Unfold):
            raise refused(f"a tokeniser of another design (soft_split{i}: {type(split).__name__})")
        kernel, stride = _side(split.kernel_size), _side(split.stride)
        if _side(split.padding) != padding(kernel, stride) or _side(split.dilation) != 1:
            raise refused(f"soft splits with another padding or dilation (soft_split{i}: {split})")
        splits.append((kernel, stride))
    kernels, strides = zip(*splits, strict=True)
    stages = [getattr(tokeniser, f"attention{i}", None) for i in (1, 2)]
    performer = all(hasattr(stage, "kqv") and hasattr(stage, "w") for stage in stages)
    if not performer and not all(hasattr(getattr(stage, "attn", None), "qkv") for stage in stages):
        raise refused(f"token stages of another design ({', '.join(type(stage).__name__ for stage in stages)})")
    read = _token_performer if performer else _token_transformer
    (inputs, *sizes), (_, *others) = (
        read(stage, f"tokens_to_token.attention{i}", reader) for i, stage in enumerate(stages, 1)
    )
    reader.linears({"project": getattr(tokeniser, "project", None)}, "tokens_to_token")
    if sizes != others:
        raise refused("token stages of different widths")
    channels, rest = divmod(inputs, kernels[0] ** 2)
    if rest:
        raise refused(
            f"a first stage of width {inputs}, which is no multiple of the soft split's {kernels[0]} x {kernels[0]}"
        )
    if performer:
        return channels, T2TPerformer(token_dim=sizes[0], features=sizes[1], kernels=kernels, strides=strides)
    return channels, T2TTransformer(token_dim=sizes[0], kernels=kernels, strides=strides)


def _side(value: Any) -> int:
    """One number of a pair that must be equal."""
    sides = value if isinstance(value, tuple) else (value, value)
    if sides[0] != sides[1]:
        raise refused(f"soft splits that are not square ({value!r})")
    return int(sides[0])


def _token_performer(stage: Any, where: str, reader: Reader) -> tuple[int, int, int]:
    """Width of the input, of the tokens, and random features."""
    _has(stage, ("mlp", "norm1", "norm2"), where)
    reader.linears({"kqv": stage.kqv, "proj": getattr(stage, "proj", None)}, where)
    if getattr(stage, "epsilon", EPSILON) != EPSILON or getattr(stage, "head_cnt", 1) != 1:
        raise refused(f"linear attention with several heads or another epsilon than {EPSILON} ({where})")
    parts = [part for part in stage.mlp.children() if not isinstance(part, nn.Dropout)]
    if [type(part) for part in parts] != [nn.Linear, nn.GELU, nn.Linear]:
        raise refused(f"an MLP of another design ({where})")
    _gelu(parts[1], where)
    reader.norms({"norm1": stage.norm1, "norm2": stage.norm2}, where)
    features, e = stage.w.shape
    return stage.kqv.in_features, e, features


def _token_transformer(stage: Any, where: str, reader: Reader) -> tuple[int, int, int]:
    """Width of the input, of the tokens, and 0."""
    _has(stage, ("attn", "mlp", "norm1", "norm2"), where)
    attn = stage.attn
    _has(attn, ("qkv", "proj", "scale"), where)
    _mlp(stage.mlp, where, reader)
    reader.linears({"qkv": attn.qkv, "proj": attn.proj}, where)
    reader.norms({"norm1": stage.norm1, "norm2": stage.norm2}, where)
    inputs = attn.qkv.in_features
    if getattr(attn, "num_heads", 1) != 1 or not math.isclose(float(attn.scale), inputs**-0.5, rel_tol=1e-9):
        raise refused(f"token attention with several heads or another scale than {inputs} ** -0.5 ({where})")
    return inputs, attn.proj.out_features, 0


def _block(block: Any, where: str, reader: Reader) -> BlockSpec:
    _has(block, ("norm1", "attn", "norm2", "mlp"), where)
    attn = block.attn
    _has(attn, ("qkv", "proj", "num_heads", "scale"), where)
    reader.norms({"norm1": block.norm1, "norm2": block.norm2}, where)
    heads, scale = int(attn.num_heads), float(attn.scale)
    attention = reader.attention(attn, heads, getattr(attn.proj, "in_features", 0) // heads, where, scale=scale)
    return BlockSpec(attention=attention, mlp=_mlp(block.mlp, where, reader))


def _mlp(mlp: Any, where: str, reader: Reader) -> MlpSpec:
    _has(mlp, ("fc1", "act", "fc2"), where)
    _gelu(mlp.act, where)
    return reader.mlp({"fc1": mlp.fc1, "fc2": mlp.fc2}, mlp.act, where)


def _has(parent: Any, names: Collection[str], where: str) -> None:
    if missing := [name for name in names if not hasattr(parent, name)]:
        raise refused(f"parts of another design ({where}: {type(parent).__name__} without {', '.join(missing)})")


def _gelu(act: Any, where: str) -> None:
    if not isinstance(act, nn.GELU) or act.approximate != "none":
        raise refused(f"the activation {act} ({where})")
