"""Our model -> a module of transformers, or the folder that its `from_pretrained` reads, where transformers can say it.

The class is the one that the model came from if that still says it, else the plainest that does: ViT for a class token,
DeiT for a distillation token, DINOv2 for LayerScale, a concatenated mean or registers, CLIP for a norm before the blocks,
SigLIP for none or for attention pooling. Heads may have any one width (a configuration's `head_dim`), except CLIP's and
SigLIP's, which fill the width of the stream; the dense softmax scale then goes into the queries.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from ... import surgery
from ...errors import SourceError
from ...files import sync_file, write_json
from ...model import Vit
from ...spec import MlpSpec, ModelSpec
from ..expressible import ENCODER, KINDS, ON_POOL, Family, any_half, halves, refusal, unsayable
from ..files import MARK, write_folder
from ..places import QKV, given, numbers_of
from .processor import processor_of, unsaid_by_processors
from .read import DESIGNS, class_named, parts_of, places_of, spec_of

LOG = logging.getLogger("vitrim.sources")
ACTIVATIONS = {kind: kind for kind in KINDS if kind != "swiglu"} | {"gelu_tanh": "gelu_pytorch_tanh"}
TOWERS = ("clip", "siglip")
"""Packages whose heads fill the width, whose images are square, and whose linears all have biases."""


def to_module(model: Vit) -> nn.Module:
    """A transformers module in eval mode with the model's numbers, in their precision.

    An exact tail is left out: it changes no output. LayerScale is folded where the class has none, and written as ones
    where it has some. An encoder goes into ViT's or DeiT's with a pooler that changes nothing.
    Raises SourceError naming the block or part that transformers cannot say.
    """
    refused = []
    for name in _candidates(model):
        try:
            return _made(model, name)
        except SourceError as error:
            refused.append(error)
    raise refused[0]


def write(model: Vit, out: Path) -> Path:
    """A folder that `from_pretrained` reads: `config.json` with the labels, weights, image settings. Gives the folder.

    Image settings that no image processor of transformers has are left out, which the log says.
    Written whole or not at all. Raises SourceError as `to_module` does, and where something is there already.
    """
    module: Any = to_module(model)
    labels = model.config.labels
    if labels is not None:
        module.config.id2label = dict(enumerate(labels))
        module.config.label2id = {label: i for i, label in enumerate(labels)}
    module.config.update(MARK)
    if model.config.multi_label:
        module.config.problem_type = model.config.problem_type
    preprocess = model.config.preprocess
    if preprocess is not None and (fault := unsaid_by_processors(preprocess)):
        LOG.warning(
            "no image processor of transformers makes %s: none is written; prepare images for the exported model as vitrim does.",
            fault,
        )
        preprocess = None
    processor = None if preprocess is None else processor_of(preprocess)

    def put(staging: Path) -> None:
        with quiet():
            module.save_pretrained(staging)
        if processor is not None:
            write_json(staging / "preprocessor_config.json", processor)
        for path in staging.iterdir():
            sync_file(path)

    return write_folder(out, put)


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bars and reports: what matters of them is raised. Its settings are put back."""
    bars, level = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def _candidates(model: Vit) -> list[str]:
    """Classes that may say the model, best first."""
    spec, came = model.spec, str(model.provenance.get("architecture", ""))
    reads = tuple(output.reads for output in spec.outputs)
    gated = any(block.mlp is not None and block.mlp.kind == "swiglu" for block in spec.blocks)
    classifier = "ForImageClassification"
    if "cls" not in spec.prefix:
        found = ["SiglipVisionModel" if not reads else f"Siglip{classifier}"]
    elif spec.pre_norm:
        projects = reads == (("pool",),) and not spec.outputs[0].bias
        encoder = f"CLIPVisionModel{'WithProjection' if projects else ''}"
        found = [encoder if spec.pool.kind != "mean" and (projects or not reads) else f"CLIP{classifier}"]
    elif "reg" in spec.prefix:
        found = [f"Dinov2WithRegisters{classifier if reads else 'Model'}"]
    elif "dist" in spec.prefix:
        found = ["DeiTModel" if not reads else f"DeiT{classifier}{'WithTeacher' if len(reads) > 1 else ''}"]
    elif reads == (("pool", "mean"),):
        found = [f"Dinov2{classifier}"]
    elif reads:
        found = [f"ViT{classifier}"]
    elif gated or any_half(spec, "layer_scale"):
        found = ["Dinov2Model", "ViTModel"]
    else:
        found = ["ViTMAEModel"] if spec.position.kind == "fixed" else ["ViTModel"]
    if came in DESIGNS and DESIGNS[came].reads in {DESIGNS[name].reads for name in found}:
        found.insert(0, came)
    return list(dict.fromkeys(found))


def _made(model: Vit, name: str) -> nn.Module:
    """The module of one class. Raises SourceError with what that cannot say."""
    design = DESIGNS[name]
    if not name.startswith("Dinov2"):
        model = surgery.fold_layer_scale(model)
    spec = model.spec
    for fault in unsayable(spec, family_of(name, spec)):
        raise refusal("transformers", fault)
    a, m = halves(spec.blocks[0])
    kwargs: dict[str, Any] = {
        "hidden_size": spec.width,
        "num_hidden_layers": len(spec.blocks),
        "num_attention_heads": a.heads,
        "layer_norm_eps": spec.norm_eps,
        "image_size": _side(_table_px(spec)),
        "patch_size": _side(spec.patch_px),
        "num_channels": spec.channels,
    }
    if design.package not in TOWERS:
        kwargs["qkv_bias"] = any_half(spec, *QKV)
        if a.heads * a.v_dim != spec.width:
            kwargs["head_dim"] = a.v_dim
    if design.package.startswith("dinov2"):
        kwargs.update(_dinov2_mlp(m, spec.width, name))
        if "reg" in spec.prefix:
            kwargs["num_register_tokens"] = spec.prefix.count("reg")
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
    module.load_state_dict(_state(model, module), strict=True, assign=True)
    for part in module.modules():
        for leaf, value in list(part.named_buffers(recurse=False)):
            if value.is_meta:  # no file holds it: the numbers of positions, 0 to N-1, as a row
                assert leaf == "position_ids", leaf
                part.register_buffer(leaf, torch.arange(value.shape[-1]).expand(value.shape), persistent=False)
    return module.eval()


def _configured(name: str, kwargs: dict[str, Any], classes: int) -> tuple[Any, Any]:
    """The class and its configuration."""
    package, kind = DESIGNS[name].package, class_named(name)
    if name in ("CLIPForImageClassification", "SiglipForImageClassification"):
        vision = {"vision_use_head": False} if package == "siglip" else {}
        text = {"hidden_size": 1, "intermediate_size": 1, "num_hidden_layers": 0, "num_attention_heads": 1}
        return kind, kind.config_class(vision_config={**kwargs, **vision}, text_config=text, num_labels=classes)
    if DESIGNS[name].classifiers:
        kwargs = {**kwargs, "num_labels": classes}
    return kind, kind.config_class(**kwargs)


def _table_px(spec: ModelSpec) -> tuple[int, int]:
    """Image size that the position table is for."""
    (rows, columns), (height, width) = spec.position.grid, spec.patch_px
    elsewhere = spec.position.kind != "none" and spec.position.grid != spec.grid
    return (rows * height, columns * width) if elsewhere else spec.image_px


def _side(sides: tuple[int, int]) -> int | list[int]:
    return sides[0] if sides[0] == sides[1] else list(sides)


def _dinov2_mlp(m: MlpSpec, width: int, name: str) -> dict[str, Any]:
    """Its MLP's width is a whole number of times the stream's (a gated one: two thirds of that, rounded up to 8)."""
    gated = m.kind == "swiglu"
    for ratio in range(1, 2 * m.hidden // width + 2):
        hidden = width * ratio
        if (int(hidden * 2 / 3) + 7) // 8 * 8 == m.hidden if gated else hidden == m.hidden:
            return {"mlp_ratio": ratio, "use_swiglu_ffn": gated, "hidden_act": ACTIVATIONS.get(m.kind, "gelu")}
    raise refusal(
        "transformers",
        f"block 0 has {m.hidden} MLP units, and {name} takes a whole number of times the width {width}"
        f"{' (two thirds of it, rounded up to 8)' if gated else ''}",
    )


def family_of(name: str, spec: ModelSpec) -> Family:
    """What one class can say. A norm of the pooled vector is one of all tokens where only the class token is read."""
    design, towers = DESIGNS[name], DESIGNS[name].package in TOWERS
    alike = spec.pool.kind == "cls" and design.reads in (ENCODER, ON_POOL)
    last_norms = {
        "tokens": ((True, False), (False, alike)),
        "pooled": ((True, False), (False, True)),
        "unused": ((False, False),),
    }
    return Family(
        name=name,
        square=towers,
        prefix={"deit": "cls dist", "siglip": "", "dinov2_with_registers": r"cls( reg)*"}.get(design.package, "cls"),
        any_grid=design.any_size,
        fills_width=towers,
        any_scale=True,  # it goes into the queries
        kinds=KINDS if name.startswith("Dinov2") else tuple(ACTIVATIONS),
        pre_norm=(design.package == "clip",),
        last_norms=last_norms[design.norm],
        pools=("map", "none") if name == "SiglipVisionModel" else (design.pool,),
        reads=(design.reads,),
    )


def _state(model: Vit, shell: nn.Module) -> dict[str, Tensor]:
    """The shell's state dict with the model's numbers; what the model has not is zeros (biases, rows) or ones (scales)."""
    parts, there = parts_of(shell), spec_of(shell)
    numbers, places = numbers_of(model, there), places_of(shell, there, parts)
    for i, block in enumerate(model.spec.blocks):
        a, _ = halves(block)
        factor = a.scale / a.qk_dim**-0.5  # so that `head_dim ** -0.5` gives the dense scale
        if not math.isclose(factor, 1.0, rel_tol=1e-12):
            qkv, bias = f"blocks.{i}.attention.qkv", f"blocks.{i}.attention.q_bias"
            q, kv = numbers[qkv].split((a.heads * a.qk_dim, 2 * a.heads * a.v_dim))
            numbers[qkv] = torch.cat([q * factor, kv])
            if bias in numbers:
                numbers[bias] = numbers[bias] * factor
    if model.spec.pool.kind == "map":
        for leaf in ("weight", "bias"):
            numbers[f"pool.qkv.{leaf}"] = torch.cat([numbers[f"pool.q.{leaf}"], numbers[f"pool.kv.{leaf}"]])
    _place_tokens(model.spec, numbers, parts.design.package)
    shapes = {name: value.shape for name, value in shell.state_dict().items()}
    state = given(numbers, places, shapes)
    like = numbers["stem.proj.weight"]
    for name, shape in shapes.items():
        if name not in places:  # a mask token, a pooler, a norm or head that nothing goes through
            norm = name.endswith("weight") and len(shape) == 1
            identity = name.endswith("pooler.dense.weight")
            state[name] = torch.eye(*shape).to(like) if identity else like.new_full(shape, float(norm))
    return state


def _place_tokens(spec: ModelSpec, numbers: dict[str, Tensor], package: str) -> None:
    """Bring prefix tokens and the position table into the rows that the class wants in front (none, one, two)."""
    count, like = len(spec.prefix), numbers["stem.proj.weight"]
    table = numbers.get("position", like.new_zeros(math.prod(spec.grid), spec.width))
    inside = count if spec.position.prefix_rows and spec.position.kind != "none" else 0
    front, patches = table[:inside], table[inside:]
    if package == "dinov2_with_registers":
        numbers["prefix"] = numbers["prefix"] + front if inside else numbers["prefix"]
        front = like.new_zeros(1, spec.width)
    elif not inside:
        front = like.new_zeros(count, spec.width)
    numbers["position"] = torch.cat([front, patches])
