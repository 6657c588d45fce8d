"""The published T2T-ViT networks by the names of their authors' builders, as specs. Standard library only."""

from __future__ import annotations

import math
from dataclasses import replace

from ..errors import SourceError, did_you_mean
from ..spec import ModelSpec, Output, T2TPerformer, T2TTransformer
from . import expand

# width, depth, heads, MLP units per unit of width, stem
SIZES: dict[str, tuple[int, int, int, int, T2TPerformer | T2TTransformer]] = {
    "t2t_vit_7": (256, 7, 4, 2, T2TPerformer()),
    "t2t_vit_10": (256, 10, 4, 2, T2TPerformer()),
    "t2t_vit_12": (256, 12, 4, 2, T2TPerformer()),
    "t2t_vit_14": (384, 14, 6, 3, T2TPerformer()),
    "t2t_vit_19": (448, 19, 7, 3, T2TPerformer()),
    "t2t_vit_24": (512, 24, 8, 3, T2TPerformer()),
    "t2t_vit_t_14": (384, 14, 6, 3, T2TTransformer()),
    "t2t_vit_t_19": (448, 19, 7, 3, T2TTransformer()),
    "t2t_vit_t_24": (512, 24, 8, 3, T2TTransformer()),
    "t2t_vit_14_resnext": (384, 14, 32, 3, T2TPerformer()),
    "t2t_vit_14_wide": (768, 4, 12, 3, T2TPerformer()),
}
EPS = 1e-5
"""Of every layer norm of these networks."""


def names() -> list[str]:
    """Names of the published networks, sorted."""
    return sorted(SIZES)


def spec(name: str, *, classes: int = 1000, image_px: int = 224) -> ModelSpec:
    """A published network. classes: 0 gives an encoder without a classifier. Raises SourceError with the near miss."""
    if name not in SIZES:
        raise SourceError(f"T2T-ViT has no model {name!r}{did_you_mean(name, SIZES)}; known: {', '.join(names())}.")
    width, depth, heads, ratio, stem = SIZES[name]
    patch = math.prod(stem.strides)
    fields = {"image": (image_px, image_px), "patch": (patch, patch), "eps": EPS, "classes": classes, "qkv_bias": False}
    fields |= {"width": width, "depth": depth, "heads": heads, "hidden": ratio * width}
    return replace(expand({**fields, "position": "fixed", "resize": "rebuild_1d"}), stem=stem)


def specs() -> dict[str, ModelSpec]:
    """Every published network at 224 px."""
    return {name: spec(name) for name in names()}


def resized(base: ModelSpec, rows: int, classes: int) -> ModelSpec:
    """The same network with a position table of so many rows (class token included) and another classifier.

    Raises SourceError where the rows are no square grid.
    """
    side = math.isqrt(rows - 1) if rows > 1 else 0
    if rows - 1 != side * side or not side:
        raise SourceError(f"a position table of {rows} rows; expected one for the class token and a square of patches.")
    return replace(
        base,
        image_px=(side * base.patch_px[0], side * base.patch_px[1]),
        position=replace(base.position, grid=(side, side)),
        outputs=(Output(classes=classes),) if classes else (),
    )
