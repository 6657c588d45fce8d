"""Our model -> a module of transformers, or the folder that its `from_pretrained` reads, where transformers can say it.

The class is the one that the model came from if that still says it, else the plainest that does: ViT for a class token,
DeiT for a distillation token, DINOv2 for LayerScale, a concatenated mean or registers, CLIP for a norm before the blocks,
SigLIP for none or for attention pooling. Heads may have any one width (a configuration's `head_dim`), except CLIP's and
SigLIP's, which fill the width of the stream; the dense softmax scale then goes into the queries.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from .. import surgery
from ..errors import SourceError
from ..files import make_whole, sync_file, write_text
from ..model import Vit
from ..spec import AttentionSpec, ConvStem, MlpSpec, ModelSpec, Prefix, Preprocess
from .huggingface_structure import DESIGNS, parts_of, places_of, spec_of

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
}
CONFIGS = {
    "CLIPVisionModel": ("clip", "CLIPVisionConfig"),
    "CLIPVisionModelWithProjection": ("clip", "CLIPVisionConfig"),
    "SiglipVisionModel": ("siglip", "SiglipVisionConfig"),
}
"""Classes whose configuration is not their own `config_class` by name."""
RESAMPLE = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}


def to_module(model: Vit) -> nn.Module:
    """A transformers module in eval mode with the model's numbers, in their precision.

    An exact tail is left out: it changes no output. LayerScale is folded where the class has none, and written as ones
    where it has some. An encoder goes into ViT's or DeiT's with a pooler that changes nothing.
    Raises SourceError naming the block or part that transformers cannot say.
    """
    names, reasons = _candidates(model), []
    for name in names:
        try:
            return _made(model, name)
        except _UnsayableError as error:
            reasons.append(str(error))
    raise SourceError(
        f"transformers cannot say this model: {reasons[0]}. Save it as a folder of vitrim (vitrim.save), which keeps every shape."
    )


def write(model: Vit, out: Path) -> Path:
    """A folder that `from_pretrained` reads: `config.json` with the labels, weights, image settings. Gives the folder.

    Written whole or not at all. Raises SourceError as `to_module` does, and where something is there already.
    """
    if out.exists():
        raise SourceError(f"{out.name!r} is there already; choose another name, or remove it.")
    module: Any = to_module(model)
    labels = model.config.labels
    if labels is not None:
        module.config.id2label = dict(enumerate(labels))
        module.config.label2id = {label: i for i, label in enumerate(labels)}
    processor = None if model.config.preprocess is None else processor_of(model.config.preprocess)

    def fill(staging: Path) -> None:
        with quiet():
            module.save_pretrained(staging)
        if processor is not None:
            write_text(staging / "preprocessor_config.json", json.dumps(processor, indent=2, sort_keys=True) + "\n")
        for path in staging.iterdir():
            sync_file(path)

    try:
        make_whole(out, fill)
    except OSError as error:
        raise SourceError(
            f"{out.name!r} could not be written ({error.strerror or error}); nothing is left of it. Give a folder in which files "
            "can be written."
        ) from error
    return out


def processor_of(preprocess: Preprocess) -> dict[str, Any]:
    """An image processor's settings. Raises SourceError for a border, which no image processor pads."""
    if preprocess.crop_mode == "border":
        raise SourceError(
            "preprocess: crop_mode='border' has no image processor in transformers; take 'center' or 'squash'."
        )
    height, width = preprocess.size_px
    before = {"height": math.floor(height / preprocess.crop), "width": math.floor(width / preprocess.crop)}
    squash = preprocess.crop_mode == "squash"
    cropped = not squash or preprocess.crop < 1
    return {
        "image_processor_type": "ViTImageProcessor"
        if not cropped
        else "DeiTImageProcessor"
        if squash
        else "CLIPImageProcessor",
        "do_resize": True,
        "size": before if squash else {"shortest_edge": min(before.values())},
        "resample": RESAMPLE.get(preprocess.interpolation, 3),
        "do_center_crop": cropped,
        **({"crop_size": {"height": height, "width": width}} if cropped else {}),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocess.mean),
        "image_std": list(preprocess.std),
    }


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bars and reports: what matters of them is raised. Its settings are put back."""
    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


class _UnsayableError(Exception):
    """Why one class cannot say a model."""


def _candidates(model: Vit) -> list[str]:
    """Classes that may say the model, best first."""
    spec, came = model.spec, str(model.provenance.get("architecture", ""))
    reads = tuple(output.reads for output in spec.outputs)
    scaled = any(half.layer_scale for block in spec.blocks for half in (block.attention, block.mlp) if half is not None)
    gated = any(block.mlp is not None and block.mlp.kind == "swiglu" for block in spec.blocks)
    classifier = "ForImageClassification"
    if "cls" not in spec.prefix:
        found = ["SiglipVisionModel" if not reads else f"Siglip{classifier}"]
    elif spec.pre_norm:
        projects = reads == (("pool",),) and not spec.outputs[0].bias
        found = [
            "CLIPVisionModel" if not reads else "CLIPVisionModelWithProjection" if projects else f"CLIP{classifier}"
        ]
        if spec.pool.kind == "mean":
            found = [f"CLIP{classifier}"]
    elif "reg" in spec.prefix:
        found = [f"Dinov2WithRegisters{classifier if reads else 'Model'}"]
    elif "dist" in spec.prefix:
        found = ["DeiTModel" if not reads else f"DeiT{classifier}{'WithTeacher' if len(reads) > 1 else ''}"]
    elif reads == (("pool", "mean"),):
        found = [f"Dinov2{classifier}"]
    elif reads:
        found = [f"ViT{classifier}"]
    elif scaled or gated:
        found = ["Dinov2Model", "ViTModel"]
    else:
        found = ["ViTMAEModel"] if spec.position.kind == "fixed" else ["ViTModel"]
    heads = {tuple(read for _, read in DESIGNS[name].heads.values()) for name in found}
    if came in DESIGNS and tuple(read for _, read in DESIGNS[came].heads.values()) in heads:
        found.insert(0, came)
    return list(dict.fromkeys(found))


def _made(model: Vit, name: str) -> nn.Module:
    """The module of one class. Raises _UnsayableError."""
    design = DESIGNS[name]
    if not name.startswith("Dinov2"):
        model = surgery.fold_layer_scale(model)
    spec = model.spec
    a, m = _equal_halves(spec)
    _check_around(spec, name)
    kwargs: dict[str, Any] = {
        "hidden_size": spec.width,
        "num_hidden_layers": len(spec.blocks),
        "num_attention_heads": a.heads,
        "layer_norm_eps": spec.norm_eps,
        "image_size": _side(_table_px(spec)),
        "patch_size": _side(spec.patch_px),
        "num_channels": spec.channels,
    }
    towers = design.package in ("clip", "siglip")
    if a.heads * a.v_dim != spec.width or a.v_dim != spec.width // a.heads:
        if towers:
            raise _UnsayableError(
                f"block 0 has {a.heads} heads of {a.v_dim}, and {name} wants heads times head width equal to the width {spec.width}"
            )
        kwargs["head_dim"] = a.v_dim
    if towers and not all(isinstance(kwargs[side], int) for side in ("image_size", "patch_size")):
        raise _UnsayableError(f"its image of {spec.image_px} px, and {name} takes square ones")
    if not towers:
        kwargs["qkv_bias"] = any(
            getattr(block.attention, key) for block in spec.blocks for key in ("q_bias", "k_bias", "v_bias")
        )
    if design.package.startswith("dinov2"):
        kwargs.update(_dinov2_mlp(m, spec.width, name))
        if "reg" in spec.prefix:
            kwargs["num_register_tokens"] = spec.prefix.count("reg")
    elif m.kind == "swiglu":
        raise _UnsayableError(f"block 0 has a gated MLP, and {name} has none")
    else:
        kwargs.update(intermediate_size=m.hidden, hidden_act=ACTIVATIONS[m.kind])
    if name in ("ViTModel", "DeiTModel"):
        kwargs.update(pooler_act="linear", pooler_output_size=spec.width)
    if name == "SiglipVisionModel":
        kwargs["vision_use_head"] = spec.pool.kind == "map"
    if name == "CLIPVisionModelWithProjection":
        kwargs["projection_dim"] = spec.outputs[0].classes
    kind, config = _configured(name, kwargs, spec.classes or 0)
    with torch.device("meta"):
        module = kind(config)
    module.load_state_dict(dict(_state(model, module)), strict=True, assign=True)
    for part, leaf, value in list(_lost_buffers(module)):
        part.register_buffer(leaf, value, persistent=False)
    return module.eval()


def _configured(name: str, kwargs: dict[str, Any], classes: int) -> tuple[Any, Any]:
    """The class and its configuration."""
    package = DESIGNS[name].package
    kind = getattr(import_module(f"transformers.models.{package}.modeling_{package}"), name)
    if name in ("CLIPForImageClassification", "SiglipForImageClassification"):
        vision = {"vision_use_head": False} if package == "siglip" else {}
        text = {"hidden_size": 1, "intermediate_size": 1, "num_hidden_layers": 0, "num_attention_heads": 1}
        return kind, kind.config_class(vision_config={**kwargs, **vision}, text_config=text, num_labels=classes)
    if DESIGNS[name].classifiers:
        kwargs = {**kwargs, "num_labels": classes}
    return kind, kind.config_class(**kwargs)


def _lost_buffers(module: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """Buffers that no file holds: the numbers of positions, 0 to N-1, as a row."""
    for part in module.modules():
        for leaf, value in part.named_buffers(recurse=False):
            if value.is_meta:
                assert leaf == "position_ids", leaf
                yield part, leaf, torch.arange(value.shape[-1]).expand(value.shape)


def _table_px(spec: ModelSpec) -> tuple[int, int]:
    """Image size that the position table is for."""
    (rows, columns), (height, width) = spec.position.grid, spec.patch_px
    return (rows * height, columns * width) if spec.position.kind != "none" else spec.image_px


def _side(sides: tuple[int, int]) -> int | list[int]:
    return sides[0] if sides[0] == sides[1] else list(sides)


def _dinov2_mlp(m: MlpSpec, width: int, name: str) -> dict[str, Any]:
    """Its MLP's width is a whole number of times the stream's (a gated one: two thirds of that, rounded up to 8)."""
    gated = m.kind == "swiglu"
    for ratio in range(1, 2 * m.hidden // width + 2):
        hidden = width * ratio
        if (int(hidden * 2 / 3) + 7) // 8 * 8 == m.hidden if gated else hidden == m.hidden:
            return {"mlp_ratio": ratio, "use_swiglu_ffn": gated, "hidden_act": ACTIVATIONS.get(m.kind, "gelu")}
    raise _UnsayableError(
        f"block 0 has {m.hidden} MLP units, and {name} takes a whole number of times the width {width}"
        f"{' (two thirds of it, rounded up to 8)' if gated else ''}"
    )


def _equal_halves(spec: ModelSpec) -> tuple[AttentionSpec, MlpSpec]:
    """The halves that all blocks share, as far as a configuration tells them apart; the first other block is named."""
    first: tuple[AttentionSpec, MlpSpec] | None = None
    for i, block in enumerate(spec.blocks):
        a, m = block.attention, block.mlp
        if a is None or m is None:
            raise _UnsayableError(
                f"block {i} has no {'attention' if a is None else 'MLP'}, and transformers' blocks have both halves"
            )
        if any(not isinstance(step, Prefix) for step in block.steps):
            raise _UnsayableError(f"block {i} merges tokens")
        if a.gate or m.gate:
            raise _UnsayableError(f"block {i} has a gate")
        if m.fc1_rank is not None or m.fc2_rank is not None:
            raise _UnsayableError(f"block {i} has an MLP in two factors")
        if a.qk_dim != a.v_dim:
            raise _UnsayableError(f"block {i} has heads of {a.qk_dim} for queries and {a.v_dim} for values")
        if a.qk_norm != "none":
            raise _UnsayableError(f"block {i} norms its queries and keys")
        first = first or (a, m)
        for what, here, there in (
            ("heads", a.heads, first[0].heads),
            ("head width", a.v_dim, first[0].v_dim),
            ("MLP units", m.hidden, first[1].hidden),
            ("activation", m.kind, first[1].kind),
        ):
            if here != there:
                raise _UnsayableError(f"block {i} differs from block 0 ({what} {here!r}, there {there!r})")
    if first is None:
        raise _UnsayableError("it has no blocks")
    return first


def _check_around(spec: ModelSpec, name: str) -> None:
    """Refuse what stands outside the blocks and has no place in a class."""
    design = DESIGNS[name]
    reads = [output.reads for output in spec.outputs]
    tokens = {
        "deit": ("cls", "dist"),
        "siglip": (),
        "dinov2_with_registers": ("cls", *["reg"] * spec.prefix.count("reg")),
    }
    pools = ("map", "none") if name == "SiglipVisionModel" else (design.pool,)
    norms = (spec.final_norm, spec.pool_norm)
    normed = {
        "tokens": norms == (True, False)
        or (norms == (False, True) and spec.pool.kind == "cls" and reads in ([], [("pool",)])),
        "pooled": norms in ((True, False), (False, True)),
        "unused": norms == (False, False),
    }
    faults = {
        f"its stem is a {type(spec.stem).__name__}": not isinstance(spec.stem, ConvStem),
        f"a bias in its stem, which {name} has not": design.package == "clip" and getattr(spec.stem, "bias", False),
        f"its prefix tokens are {spec.prefix!r}": spec.prefix != tokens.get(design.package, ("cls",)),
        f"its pooling is {spec.pool.kind!r}": spec.pool.kind not in pools,
        f"its attention pooling has {spec.pool.heads} heads, {spec.pool.hidden} MLP units and {spec.pool.act}, unlike its blocks": (
            spec.pool.kind == "map" and not _pool_fits(spec)
        ),
        "a norm before the blocks" if spec.pre_norm else "no norm before the blocks": spec.pre_norm
        != (design.package == "clip"),
        f"its last norms (of tokens: {norms[0]}, of the pooled vector: {norms[1]})": not normed[design.norm],
        f"its position table is for {spec.position.grid}, not {spec.grid} patches": spec.position.kind != "none"
        and spec.position.grid != spec.grid
        and not design.any_size,
        f"its classifiers read {reads!r}": reads != [read for _, read in design.heads.values()],
        "a classifier in two factors": any(output.rank is not None for output in spec.outputs),
    }
    for fault, there in faults.items():
        if there:
            raise _UnsayableError(fault)


def _pool_fits(spec: ModelSpec) -> bool:
    """Whether SigLIP's attention pooling has its blocks' heads, MLP width and activation."""
    a, m = spec.blocks[0].attention, spec.blocks[0].mlp
    assert a is not None
    assert m is not None
    return (spec.pool.heads, spec.pool.hidden, spec.pool.act) == (a.heads, m.hidden, m.kind)


def _state(model: Vit, shell: Any) -> Iterator[tuple[str, Tensor]]:
    """The shell's state dict with the model's numbers; what the model has not is zeros (biases, rows) or ones (scales)."""
    spec = model.spec
    ours = {name: value.detach().cpu() for name, value in model.state_dict().items()}
    like = ours["stem.proj.weight"]
    parts = parts_of(shell)
    places = places_of(shell, spec_of(shell), parts)
    outputs = {name: output.name for (name, _), output in zip(parts.design.heads.values(), spec.outputs, strict=True)}
    tokens, table = _tokens(model, ours, parts.design.package)
    dim = {i: _widths(block.attention) for i, block in enumerate(spec.blocks)}
    for theirs, empty in shell.state_dict().items():
        shape = empty.shape
        zeros = torch.zeros(shape, dtype=like.dtype)
        if theirs not in places:  # a mask token, a pooler, a norm or head that nothing goes through
            leaf = theirs.rsplit(".", 1)[-1]
            identity = theirs.endswith("pooler.dense.weight")
            norm = leaf == "weight" and len(shape) == 1
            yield theirs, torch.eye(*shape, dtype=like.dtype) if identity else torch.ones_like(zeros) if norm else zeros
            continue
        name, order = places[theirs]
        if name == "prefix":
            value = tokens[list(dict.fromkeys(spec.prefix))[order]]
        elif name == "position":
            value = table
        elif name.startswith("pool.qkv."):
            leaf = name.rpartition(".")[2]
            value = torch.cat([ours[f"pool.q.{leaf}"], ours[f"pool.kv.{leaf}"]])
        elif ".attention.qkv" in name or name.endswith(("q_bias", "k_bias", "v_bias")):
            i = int(name.split(".")[1])
            inner, factor = dim[i]
            if name.endswith("_bias"):
                scaled = name.endswith("q_bias")
                value = ours.get(name, zeros)
            else:
                scaled = order == 0
                value = ours[name][order * inner : (order + 1) * inner]
            value = value * factor if scaled and factor != 1.0 else value
        elif ".mlp.fc1." in name and spec.blocks[int(name.split(".")[1])].mlp.kind == "swiglu":  # type: ignore[union-attr]
            found = ours.get(name)
            value = zeros if found is None else found.chunk(2)[order]
        else:
            if name.startswith("heads."):
                _, head, leaf = name.split(".")
                name = f"heads.{outputs[head]}.{leaf}"
            elif name.startswith(("norm.", "pool_norm.")) and name not in ours:
                leaf = name.rpartition(".")[2]
                name = f"pool_norm.{leaf}" if name.startswith("norm.") else f"norm.{leaf}"
            absent = torch.ones_like(zeros) if name.endswith(".gamma") else zeros
            value = ours.get(name, absent)
        yield theirs, value.reshape(shape).clone()


def _widths(a: AttentionSpec | None) -> tuple[int, float]:
    """Rows of the queries, and what they are multiplied by so that `head_dim ** -0.5` gives the dense scale."""
    assert a is not None
    factor = a.scale / a.qk_dim**-0.5
    return a.heads * a.qk_dim, 1.0 if math.isclose(factor, 1.0, rel_tol=1e-12) else factor


def _tokens(model: Vit, ours: dict[str, Tensor], package: str) -> tuple[dict[str, Tensor], Tensor]:
    """Prefix tokens by kind, and the position table with the rows that the class wants in front (none, one, two)."""
    spec = model.spec
    count = len(spec.prefix)
    rows = ours.get("position")
    like = ours["stem.proj.weight"]
    if rows is None:
        rows = torch.zeros(math.prod(spec.grid), spec.width, dtype=like.dtype)
    inside = count if spec.position.prefix_rows and spec.position.kind != "none" else 0
    front, patches = rows[:inside], rows[inside:]
    prefix = ours.get("prefix", torch.zeros(0, spec.width, dtype=like.dtype))
    if package == "dinov2_with_registers":
        prefix = prefix + front if inside else prefix
        front = torch.zeros(1, spec.width, dtype=like.dtype)
    elif not inside:
        front = torch.zeros(count, spec.width, dtype=like.dtype)
    tokens = {
        kind: prefix[[i for i, token in enumerate(spec.prefix) if token == kind]] for kind in ("cls", "dist", "reg")
    }
    return tokens, torch.cat([front, patches])


__all__ = ["processor_of", "quiet", "to_module", "write"]
