"""Our model -> a state dict that T2T-ViT's authors' class loads strictly, where that class can say it."""

from __future__ import annotations

import io
import zipfile
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...architectures.t2t import EPS
from ...files import replace_file, sync_file
from ...model import Vit
from ...spec import ConvStem, Prefix, T2TPerformer, T2TTransformer
from ...surgery import with_spec, without_empty
from ..expressible import Family, refusal, require
from ..files import MARK, written_or_said
from ..places import given, numbers_of
from .read import places_of, shapes_of

FAMILY = Family(
    name="T2T-ViT",
    stems=(T2TPerformer, T2TTransformer),
    square=True,
    positions=("fixed",),
    prefix_rows=True,
    kinds=("gelu",),
    every_bias=True,
    layer_scale=False,
    eps=EPS,
)

_COMMENT = b"written by vitrim"
"""The mark of a file of `torch.save`, which nobody who loads it sees."""


def to_state(model: Vit) -> dict[str, Tensor]:
    """A state dict that the authors' class loads strictly, made with the depth, heads and MLP ratio of the model.

    Blocks with both halves gone are left out, and so is an exact tail: neither changes an output.
    Raises SourceError naming the block (counted without those) or part that T2T-ViT cannot say.
    """
    blocks = (replace(b, steps=tuple(s for s in b.steps if not isinstance(s, Prefix))) for b in model.spec.blocks)
    spec = replace(model.spec, blocks=tuple(blocks))
    model = without_empty(with_spec(model, spec, model.state_dict(), share=True))
    spec = model.spec
    require(spec, FAMILY)
    stem = spec.stem
    assert not isinstance(stem, ConvStem)
    if (stem.kernels, stem.strides) != ((7, 3, 3), (4, 2, 2)):
        raise refusal(FAMILY.name, f"its soft splits have kernels {stem.kernels} and strides {stem.strides}")
    if isinstance(stem, T2TPerformer) and stem.features != stem.token_dim // 2:
        raise refusal(FAMILY.name, f"its stem has {stem.features} random features for tokens of {stem.token_dim}")
    return given(numbers_of(model, spec), places_of(spec), shapes_of(spec))


def write(model: Vit, out: Path) -> Path:
    """The model as a file of T2T-ViT's own state dict: safetensors by that suffix, else as `torch.save` writes it.

    Written whole or not at all. Raises SourceError as `to_state` does, and where it cannot be written.
    """
    state = to_state(model)

    def fill(partial: Path) -> None:
        if out.suffix == ".safetensors":
            save_file(state, partial, metadata=MARK)
        else:
            content = io.BytesIO()  # torch's own writer does not say that a disk is full
            torch.save(state, content)
            with zipfile.ZipFile(content, "a") as archive:
                archive.comment = _COMMENT
            partial.write_bytes(content.getbuffer())
        sync_file(partial)

    with written_or_said(out):
        replace_file(out, fill)
    return out


def is_ours(path: Path) -> bool:
    """Whether `write` made this file, by the mark in its header or in its archive's comment."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return MARK.keys() <= (file.metadata() or {}).keys()
        with zipfile.ZipFile(path) as archive:
            return archive.comment == _COMMENT
    except (OSError, SafetensorError, zipfile.BadZipFile):
        return False
