"""T2T-ViT: a module with its authors' structure, or a file of their tensors -> spec and weights, and back.

Source   Yuan et al., ICCV 2021, arXiv:2101.11986; names and layout of the authors' released networks.
Takes    a published name with a local file (`.pth.tar`) or random weights, or a module from memory.
Gives    our model with the same numbers: float32, on the CPU, in eval mode.
Refuses  by its name whatever the spec cannot say: the convolutional tokeniser, squeeze-and-excitation, dense and ghost
         variants, half-block gates of UVC's copy that say skip.

Their code is no package, so a module is known by its parts, and by running both networks on a random image.
"""

from __future__ import annotations

import math
import os
import re
import secrets
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import SourceError, SpecError
from ..files import sync_file, sync_folder
from ..model import Vit, build, sinusoids
from ..spec import (
    AttentionSpec,
    BlockSpec,
    Config,
    ConvStem,
    MlpSpec,
    ModelSpec,
    Output,
    Pool,
    Position,
    Prefix,
    Preprocess,
    T2TPerformer,
    T2TTransformer,
)
from ..stems import EPSILON, padding
from . import checkpoints, parity, t2t_names

ADVICE = "vitrim reads T2T-ViT with the structure of its authors' `t2t_vit_14` and `t2t_vit_t_14`."
CROP = 0.9
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
GATES = ("block_skip_gating", "attn_skip_gating", "mlp_skip_gating")
"""What UVC's copy of the network has beside the same tensors: two numbers each, skip and run."""


def load(
    name: str,
    *,
    pretrained: bool = True,
    checkpoint: str | Path | None = None,
    classes: int | None = None,
    verify: bool = True,
) -> Vit:
    """A published T2T-ViT by its builder's name (`t2t_vit_14`).

    pretrained: their weights are on no hub that vitrim reads, so give the downloaded file; False: random ones.
    checkpoint: such a file, of any square image size and with a classifier of any size, or of UVC's copy of the network.
    classes: None takes what the weights have; 0 drops the classifier; another number is for random weights.
    verify: a file is held against the names and shapes of the network; there is no module of theirs to run beside it.
    """
    base = t2t_names.spec(name)
    if checkpoint is not None:
        return _from_file(name, base, Path(checkpoint), classes)
    if pretrained:
        raise SourceError(
            f"the weights of {name!r} cannot be fetched: they are published as files of their authors' repository alone. Pass "
            "a downloaded file (--checkpoint PATH, checkpoint=), or take random weights (--no-pretrained, pretrained=False)."
        )
    spec = base if classes is None else t2t_names.spec(name, classes=classes)
    model = build(_config(spec, None, None))
    model.provenance = {"source": f"t2t:{name}", "weights": "random"}
    return model


def from_module(
    module: nn.Module,
    *,
    preprocess: Preprocess | None = None,
    labels: tuple[str, ...] | None = None,
    verify: bool = True,
    provenance: dict[str, Any] | None = None,
) -> Vit:
    """Our model with a copy of a T2T-ViT module's numbers; the module and the random state stay as they are.

    preprocess: None takes ImageNet's at the module's size, as the authors evaluate.
    verify: run both on one random image and compare; False trusts the classes of the module's parts.
    """
    spec = spec_of(module)
    model = _filled(spec, weights_of(module, spec), _config(spec, preprocess, labels), provenance)
    if verify:
        parity.verify(
            module,
            model,
            blocks=lambda theirs: theirs.blocks,
            what="T2T-ViT",
            advice=ADVICE,
            answer=lambda theirs, x: _first(theirs(x)),
        )
    return model


def spec_of(module: nn.Module) -> ModelSpec:
    """The spec of a module with the structure of T2T-ViT, read off its parts.

    Works on the meta device. Raises SourceError naming the part that the spec cannot say.
    """
    _has(module, ("tokens_to_token", "cls_token", "pos_embed", "blocks", "norm", "head"), "the network")
    theirs: Any = module
    if not isinstance(theirs.pos_embed, Tensor) or theirs.pos_embed.dim() != 3:
        raise _refused("no position table of shape [1, rows, width]")
    eps: set[float] = set()
    skipped = _skipped(module.state_dict(), len(theirs.blocks), type(module).__name__)
    state = _plain(module.state_dict(), skipped)
    channels, stem = _stem(theirs.tokens_to_token, eps)
    blocks = tuple(
        BlockSpec(attention=None, mlp=None) if i in skipped else _block(block, f"block {i}", eps)
        for i, block in enumerate(theirs.blocks)
    )
    _norm(theirs.norm, "norm", eps)
    if len(eps) > 1:
        raise _refused(f"norms with different eps {sorted(eps)!r}")
    rows, width = theirs.pos_embed.shape[-2:]
    side, patch = math.isqrt(max(rows - 1, 0)), math.prod(stem.strides)
    if side * side + 1 != rows:
        raise _refused(f"a position table of {rows} rows, which is no class token and square of patches")
    outputs: tuple[Output, ...] = ()
    if type(theirs.head) is nn.Linear:
        outputs = (Output(classes=theirs.head.out_features, bias=theirs.head.bias is not None),)
    elif not isinstance(theirs.head, nn.Identity):
        raise _refused(f"a classifier that is more than one linear ({type(theirs.head).__name__})")
    try:
        spec = ModelSpec(
            image_px=(side * patch, side * patch),
            patch_px=(patch, patch),
            channels=channels,
            stem=stem,
            width=width,
            position=_position(theirs.pos_embed[0], side),
            norm_eps=eps.pop(),
            blocks=blocks,
            outputs=outputs,
        )
    except SpecError as error:
        raise SourceError(f"T2T-ViT module {type(module).__name__}: {error}") from None
    expected = _shapes(spec)
    if left := sorted(set(state) - set(expected)):
        raise _refused(f"numbers that a plain one does not have: {checkpoints.listed(left)}")
    if wrong := [key for key, shape in expected.items() if key not in state or tuple(state[key].shape) != shape]:
        raise _refused(f"parts of other shapes than a plain one: {checkpoints.listed(wrong)}")
    return spec


def weights_of(module: nn.Module, spec: ModelSpec) -> dict[str, Tensor]:
    """The module's numbers under our names: float32 copies on the CPU."""
    return _translated(module.state_dict(), spec)


def to_state(model: Vit) -> dict[str, Tensor]:
    """A state dict that the authors' class loads strictly, made with the depth, heads and MLP ratio of the model.

    Blocks with both halves gone are left out, and so is an exact tail: neither changes an output.
    Raises SourceError naming the block or part that T2T-ViT cannot say.
    """
    spec = model.spec
    kept = [
        i
        for i, block in enumerate(spec.blocks)
        if block.attention or block.mlp or any(not isinstance(step, Prefix) for step in block.steps)
    ]
    _check_sayable(spec, kept)
    ours = {name: value.detach().cpu() for name, value in model.state_dict().items()}
    state: dict[str, Tensor] = {}
    for theirs, name in _places(spec).items():
        if number := re.match(r"blocks\.(\d+)\.", theirs):
            theirs = f"blocks.{kept.index(int(number[1]))}.{theirs[number.end() :]}"
        if name.endswith("qkv_bias"):
            block = name.removesuffix("qkv_bias")
            parts = [ours.get(block + key) for key in ("q_bias", "k_bias", "v_bias")]
            width = ours["prefix"].shape[1]
            value = torch.cat([ours["prefix"].new_zeros(width) if part is None else part for part in parts])
        else:
            value = ours[name]
        state[theirs] = value.reshape(_theirs(name, tuple(value.shape))).clone()
    return state


def write(model: Vit, out: Path) -> Path:
    """The model as a file of T2T-ViT's own state dict: safetensors by that suffix, else as `torch.save` writes it.

    Written whole or not at all. Raises SourceError as `to_state` does.
    """
    state = to_state(model)
    out = Path(out)
    partial = out.with_name(f".{secrets.token_hex(8)}.partial")
    try:
        if out.suffix == ".safetensors":
            save_file({name: value.contiguous() for name, value in state.items()}, partial)
        else:
            torch.save(state, partial)
        sync_file(partial)
        os.replace(partial, out)
    finally:
        partial.unlink(missing_ok=True)
    sync_folder(out.parent)
    return out


# ---------------------------------------------------------------------------------------------------------------- files


def _from_file(name: str, base: ModelSpec, path: Path, classes: int | None) -> Vit:
    raw = checkpoints.read(path)
    known = {key: torch.empty(shape, device="meta") for key, shape in _shapes(base).items()}
    raw = checkpoints.reconciled(raw, known, file=path.name)
    skipped = _skipped(raw, len(base.blocks), path.name)
    state = _plain(raw, skipped)
    if classes == 0:
        state = checkpoints.without_heads(state, file=path.name)
    found = state["head.weight"].shape[0] if "head.weight" in state else 0
    if classes is not None and classes != found:
        raise SourceError(
            f"classes={classes}: the classifier in {path.name} has {found} classes. Leave classes out to keep it, or give the "
            "model a new head (`vitrim train --new-head`)."
        )
    table = state.get("pos_embed")
    rows = table.shape[1] if table is not None and table.dim() == 3 else base.position_rows
    try:
        spec = t2t_names.resized(base, rows, found)
    except SourceError as error:
        raise SourceError(f"{path.name}: {error}") from None
    gone = BlockSpec(attention=None, mlp=None)
    spec = replace(spec, blocks=tuple(gone if i in skipped else block for i, block in enumerate(spec.blocks)))
    checkpoints.check(path, {key: tuple(value.shape) for key, value in state.items()}, _shapes(spec), f"{name!r}")
    spec = replace(spec, position=_position(state["pos_embed"][0], spec.grid[0]))
    told = {"source": f"t2t:{name}", "weights": path.name}
    if skipped:
        told["skipped_blocks"] = ", ".join(str(i) for i in sorted(skipped))
    return _filled(spec, _translated(state, spec), _config(spec, None, None), told)


def _config(spec: ModelSpec, preprocess: Preprocess | None, labels: tuple[str, ...] | None) -> Config:
    if preprocess is None and spec.channels == len(MEAN):
        preprocess = Preprocess(mean=MEAN, std=STD, size_px=spec.image_px, crop=CROP)
    return Config(
        spec=spec, task="classification" if spec.outputs else "features", preprocess=preprocess, labels=labels
    )


def _filled(spec: ModelSpec, weights: dict[str, Tensor], config: Config, provenance: dict[str, Any] | None) -> Vit:
    with torch.device("meta"):  # no memory and no random numbers for values that are replaced at once
        model = Vit(config, provenance=provenance)
    model.load_state_dict(weights, strict=True, assign=True)
    return model.eval()


def _skipped(state: Mapping[str, Tensor], depth: int, where: str) -> frozenset[int]:
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


def _plain(state: Mapping[str, Tensor], skipped: Collection[int]) -> dict[str, Tensor]:
    """The tensors without gates and without skipped blocks."""
    gone = tuple(f"blocks.{i}." for i in skipped)
    return {
        key: value
        for key, value in state.items()
        if key.rsplit(".", 1)[-1] not in GATES and not (gone and key.startswith(gone))
    }


# ------------------------------------------------------------------------------------------------------- names and shapes


def _places(spec: ModelSpec) -> dict[str, str]:
    """Their name -> ours. A joint bias of queries, keys and values stands as `...attention.qkv_bias`."""
    places = {"cls_token": "prefix", "pos_embed": "position"}

    def pair(theirs: str, ours: str, bias: bool = True) -> None:
        places[f"{theirs}.weight"] = f"{ours}.weight"
        if bias:
            places[f"{theirs}.bias"] = f"{ours}.bias"

    performer = isinstance(spec.stem, T2TPerformer)
    for i in (0, 1):
        theirs, ours = f"tokens_to_token.attention{i + 1}", f"stem.stages.{i}"
        pair(f"{theirs}.norm1", f"{ours}.norm1")
        pair(f"{theirs}.norm2", f"{ours}.norm2")
        if performer:
            places[f"{theirs}.w"] = f"{ours}.features"
            pair(f"{theirs}.kqv", f"{ours}.kqv")
            pair(f"{theirs}.proj", f"{ours}.proj")
        else:
            pair(f"{theirs}.attn.qkv", f"{ours}.qkv", bias=False)
            pair(f"{theirs}.attn.proj", f"{ours}.proj")
        pair(f"{theirs}.mlp.{'0' if performer else 'fc1'}", f"{ours}.fc1")
        pair(f"{theirs}.mlp.{'2' if performer else 'fc2'}", f"{ours}.fc2")
    pair("tokens_to_token.project", "stem.project")
    for i, block in enumerate(spec.blocks):
        if (a := block.attention) is not None:
            pair(f"blocks.{i}.norm1", f"blocks.{i}.norm1")
            places[f"blocks.{i}.attn.qkv.weight"] = f"blocks.{i}.attention.qkv"
            if a.q_bias or a.k_bias or a.v_bias:
                places[f"blocks.{i}.attn.qkv.bias"] = f"blocks.{i}.attention.qkv_bias"
            pair(f"blocks.{i}.attn.proj", f"blocks.{i}.attention.out", a.out_bias)
        if (m := block.mlp) is not None:
            pair(f"blocks.{i}.norm2", f"blocks.{i}.norm2")
            pair(f"blocks.{i}.mlp.fc1", f"blocks.{i}.mlp.fc1", m.fc1_bias)
            pair(f"blocks.{i}.mlp.fc2", f"blocks.{i}.mlp.fc2", m.fc2_bias)
    pair("norm", "norm")
    for output in spec.outputs:
        pair("head", f"heads.{output.name}", output.bias)
    return places


def _theirs(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    return (1, *shape) if name in ("prefix", "position") else shape


def _shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Their names and shapes for a network of this spec."""
    with torch.device("meta"):
        ours = {name: tuple(value.shape) for name, value in Vit(Config(spec=spec)).state_dict().items()}
    found: dict[str, tuple[int, ...]] = {}
    for theirs, name in _places(spec).items():
        if name.endswith("qkv_bias"):
            found[theirs] = (ours[name.removesuffix("_bias")][0],)
        else:
            found[theirs] = _theirs(name, ours[name])
    return found


def _translated(state: Mapping[str, Tensor], spec: ModelSpec) -> dict[str, Tensor]:
    """Tensors under their names -> float32 copies on the CPU under ours."""
    weights: dict[str, Tensor] = {}
    for theirs, name in _places(spec).items():
        value = state[theirs].detach().to(device="cpu", dtype=torch.float32, copy=True)
        if name.endswith("qkv_bias"):
            block = name.removesuffix("qkv_bias")
            thirds = zip(("q_bias", "k_bias", "v_bias"), value.chunk(3), strict=True)
            weights.update({block + key: third.clone() for key, third in thirds})
        else:
            weights[name] = value[0] if name in ("prefix", "position") else value
    weights["prefix"] = weights["prefix"].reshape(1, -1)
    return weights


def _position(table: Tensor, side: int) -> Position:
    """A fixed table; one that is not the sinusoids (it was resized or trained) is resized, not rebuilt, at other sizes."""
    known = table.is_meta or bool(
        (table.detach().cpu().float() - sinusoids(*table.shape)).abs().max() <= 1e-2  # half precision rounds by 4e-3
    )
    return Position(kind="fixed", grid=(side, side), resize="rebuild_1d" if known else "bicubic")


# ------------------------------------------------------------------------------------------------------------- structure


def _refused(what: str) -> SourceError:
    return SourceError(f"this model has {what}, which vitrim cannot take in. {ADVICE}")


def _first(found: Any) -> Any:
    """UVC's copy answers with its operations beside the logits."""
    return found[0] if isinstance(found, tuple) else found


def _stem(tokeniser: Any, eps: set[float]) -> tuple[int, T2TTransformer | T2TPerformer]:
    """Channels of the images, and the stem."""
    splits = []
    for i in range(3):
        split = getattr(tokeniser, f"soft_split{i}", None)
        if not isinstance(split, nn.Unfold):
            raise _refused(f"a tokeniser of another design (soft_split{i}: {type(split).__name__})")
        kernel, stride = _side(split.kernel_size), _side(split.stride)
        if _side(split.padding) != padding(kernel, stride) or _side(split.dilation) != 1:
            raise _refused(f"soft splits with another padding or dilation (soft_split{i}: {split})")
        splits.append((kernel, stride))
    kernels, strides = zip(*splits, strict=True)
    stages = [getattr(tokeniser, f"attention{i}", None) for i in (1, 2)]
    performer = all(hasattr(stage, "kqv") and hasattr(stage, "w") for stage in stages)
    if not performer and not all(hasattr(getattr(stage, "attn", None), "qkv") for stage in stages):
        raise _refused(f"token stages of another design ({', '.join(type(stage).__name__ for stage in stages)})")
    read = _token_performer if performer else _token_transformer
    sizes = [read(stage, f"tokens_to_token.attention{i + 1}", eps) for i, stage in enumerate(stages)]
    _linears(tokeniser, ("project",), "tokens_to_token")
    if sizes[0][1] != sizes[1][1] or sizes[0][2] != sizes[1][2]:
        raise _refused("token stages of different widths")
    channels, rest = divmod(sizes[0][0], kernels[0] ** 2)
    if rest:
        raise _refused(
            f"a first stage of width {sizes[0][0]}, which is no multiple of the soft split's {kernels[0]} x {kernels[0]}"
        )
    _, e, m = sizes[0]
    if performer:
        return channels, T2TPerformer(token_dim=e, features=m, kernels=kernels, strides=strides)
    return channels, T2TTransformer(token_dim=e, kernels=kernels, strides=strides)


def _side(value: Any) -> int:
    """One number of a pair that must be equal."""
    sides = value if isinstance(value, tuple) else (value, value)
    if sides[0] != sides[1]:
        raise _refused(f"soft splits that are not square ({value!r})")
    return int(sides[0])


def _token_performer(stage: Any, where: str, eps: set[float]) -> tuple[int, int, int]:
    """Width of the input, of the tokens, and random features."""
    _has(stage, ("mlp", "norm1", "norm2"), where)
    _linears(stage, ("kqv", "proj"), where)
    if getattr(stage, "epsilon", EPSILON) != EPSILON or getattr(stage, "head_cnt", 1) != 1:
        raise _refused(f"linear attention with several heads or another epsilon than {EPSILON} ({where})")
    parts = [part for part in stage.mlp.children() if not isinstance(part, nn.Dropout)]
    if [type(part) for part in parts] != [nn.Linear, nn.GELU, nn.Linear]:
        raise _refused(f"an MLP of another design ({where})")
    _gelu(parts[1], where)
    _norm(stage.norm1, f"{where}, norm1", eps)
    _norm(stage.norm2, f"{where}, norm2", eps)
    features, e = stage.w.shape
    return stage.kqv.in_features, e, features


def _token_transformer(stage: Any, where: str, eps: set[float]) -> tuple[int, int, int]:
    """Width of the input, of the tokens, and 0."""
    _has(stage, ("attn", "mlp", "norm1", "norm2"), where)
    attn = stage.attn
    _has(attn, ("scale",), where)
    _has(stage.mlp, ("fc1", "act", "fc2"), where)
    _linears(attn, ("qkv", "proj"), where)
    _linears(stage.mlp, ("fc1", "fc2"), where)
    _gelu(stage.mlp.act, where)
    _norm(stage.norm1, f"{where}, norm1", eps)
    _norm(stage.norm2, f"{where}, norm2", eps)
    inputs = attn.qkv.in_features
    if getattr(attn, "num_heads", 1) != 1 or not math.isclose(float(attn.scale), inputs**-0.5, rel_tol=1e-9):
        raise _refused(f"token attention with several heads or another scale than {inputs} ** -0.5 ({where})")
    return inputs, attn.proj.out_features, 0


def _block(block: Any, where: str, eps: set[float]) -> BlockSpec:
    _has(block, ("norm1", "attn", "norm2", "mlp"), where)
    attn, mlp = block.attn, block.mlp
    _has(attn, ("qkv", "proj", "num_heads", "scale"), where)
    _has(mlp, ("fc1", "act", "fc2"), where)
    _linears(attn, ("qkv", "proj"), where)
    _linears(mlp, ("fc1", "fc2"), where)
    _gelu(mlp.act, where)
    _norm(block.norm1, f"{where}, norm1", eps)
    _norm(block.norm2, f"{where}, norm2", eps)
    heads, head_dim = int(attn.num_heads), attn.proj.in_features // int(attn.num_heads)
    if attn.qkv.out_features != 3 * heads * head_dim or attn.proj.in_features != heads * head_dim:
        raise _refused(f"attention whose linears do not fit {heads} heads of {head_dim} ({where})")
    bias = attn.qkv.bias is not None
    return BlockSpec(
        attention=AttentionSpec(
            heads=heads,
            qk_dim=head_dim,
            v_dim=head_dim,
            scale=float(attn.scale),
            q_bias=bias,
            k_bias=bias,
            v_bias=bias,
            out_bias=attn.proj.bias is not None,
        ),
        mlp=MlpSpec(hidden=mlp.fc2.in_features, fc1_bias=mlp.fc1.bias is not None, fc2_bias=mlp.fc2.bias is not None),
    )


def _has(parent: Any, names: Collection[str], where: str) -> None:
    if missing := [name for name in names if not hasattr(parent, name)]:
        raise _refused(f"parts of another design ({where}: {type(parent).__name__} without {', '.join(missing)})")


def _norm(norm: Any, where: str, eps: set[float]) -> None:
    if type(norm) is not nn.LayerNorm or norm.weight is None or norm.bias is None:
        raise _refused(f"a {type(norm).__name__} at {where}, where a layer norm with weight and bias was expected")
    eps.add(norm.eps)


def _gelu(act: Any, where: str) -> None:
    if not isinstance(act, nn.GELU) or act.approximate != "none":
        raise _refused(f"the activation {act} ({where})")


def _linears(parent: Any, names: Collection[str], where: str) -> None:
    for name in names:
        if type(part := getattr(parent, name, None)) is not nn.Linear:
            raise _refused(f"a {type(part).__name__} as {name} in {where} (merge adapters and undo quantisation first)")


# ------------------------------------------------------------------------------------------------------------------ back


def _unsayable(what: str) -> SourceError:
    return SourceError(
        f"T2T-ViT cannot say this model: {what}. Save it as a folder of vitrim (vitrim.save), which keeps every shape."
    )


def _check_sayable(spec: ModelSpec, kept: list[int]) -> None:
    """Refuse what the authors' class has no argument for; the first block in the way is named."""
    stem = spec.stem
    if isinstance(stem, ConvStem):
        raise _unsayable("its stem is one convolution")
    faults = {
        f"its soft splits have kernels {stem.kernels} and strides {stem.strides}": (stem.kernels, stem.strides)
        != ((7, 3, 3), (4, 2, 2)),
        f"its stem has {getattr(stem, 'features', 0)} random features for tokens of {stem.token_dim}": isinstance(
            stem, T2TPerformer
        )
        and stem.features != stem.token_dim // 2,
        f"its prefix tokens are {spec.prefix!r}": spec.prefix != ("cls",),
        "its position table is not a fixed one of its own square size": spec.position.kind != "fixed"
        or spec.position.grid != spec.grid
        or spec.grid[0] != spec.grid[1]
        or not spec.position.prefix_rows,
        "it has other norms around the blocks than one behind them": spec.pre_norm
        or spec.pool_norm
        or not spec.final_norm,
        f"its norms have eps {spec.norm_eps!r}": spec.norm_eps != t2t_names.EPS,
        f"its pooling is {spec.pool.kind!r}": spec.pool != Pool(),
        "it has no blocks": not kept,
        "its classifier is not one linear on the class token": len(spec.outputs) > 1
        or any(o.reads != ("pool",) or o.rank is not None or not o.bias for o in spec.outputs),
    }
    for fault, there in faults.items():
        if there:
            raise _unsayable(fault)
    first: tuple[int, int, bool] | None = None
    for i in kept:
        a, m = spec.blocks[i].attention, spec.blocks[i].mlp
        if a is None or m is None:
            raise _unsayable(
                f"block {i} has no {'attention' if a is None else 'MLP'}, and T2T-ViT's blocks have both halves"
            )
        if any(not isinstance(step, Prefix) for step in spec.blocks[i].steps):
            raise _unsayable(f"block {i} merges tokens")
        if a.qk_dim != a.v_dim or a.heads * a.v_dim != spec.width:
            raise _unsayable(
                f"block {i} has {a.heads} heads of {a.qk_dim} (values {a.v_dim}), and T2T-ViT wants heads times head width equal "
                f"to the width {spec.width}"
            )
        if not math.isclose(a.scale, a.qk_dim**-0.5, rel_tol=1e-12):
            raise _unsayable(f"block {i} scales its scores by {a.scale!r}, not by {a.qk_dim**-0.5!r}")
        if m.kind != "gelu" or m.fc1_rank is not None or m.fc2_rank is not None:
            raise _unsayable(f"block {i} has an MLP in factors or with {m.kind!r}")
        if a.gate or m.gate or a.layer_scale or m.layer_scale or a.qk_norm != "none":
            raise _unsayable(f"block {i} has a gate, a LayerScale or norms of queries and keys")
        if not (a.out_bias and m.fc1_bias and m.fc2_bias):
            raise _unsayable(f"block {i} has a linear without bias behind its attention or in its MLP")
        here = (a.heads, m.hidden, a.q_bias or a.k_bias or a.v_bias)
        first = first or here
        for what, one, other in zip(("heads", "MLP units", "qkv bias"), here, first, strict=True):
            if one != other:
                raise _unsayable(f"block {i} differs from block {kept[0]} ({what} {one!r}, there {other!r})")


__all__ = ["from_module", "load", "spec_of", "to_state", "weights_of", "write"]
