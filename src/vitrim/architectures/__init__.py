"""Named Vision Transformers as specs, from tables made by `scripts/make_architectures.py`: `FAMILY.json` for each family.

So that the cost of a named model needs neither torch nor the family's package. Standard library only. A name may carry the
tag of one set of weights (`vit_base_patch16_224.augreg_in21k`, `vit_b_16.IMAGENET1K_SWAG_E2E_V1`): the table knows where
a tag differs from its architecture (image size, classes).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any, Literal

from ..spec import (
    AttentionSpec,
    BlockSpec,
    ConvStem,
    MlpSpec,
    ModelSpec,
    Output,
    Pool,
    Position,
    Stem,
    T2TPerformer,
    T2TTransformer,
)

FAMILIES = ("timm", "torchvision", "t2t")
"""Families that have a table, as names begin with them (`torchvision:vit_b_16`)."""

DEFAULTS: Mapping[str, Any] = {
    "image": [224, 224],
    "patch": [16, 16],
    "channels": 3,
    "stem": "conv",
    "stem_bias": True,
    "token_dim": 64,
    "features": 32,
    "prefix": "cls",
    "position": "learned",
    "prefix_rows": True,
    "resize": "bicubic_antialias",
    "pre_norm": False,
    "final_norm": True,
    "pool_norm": False,
    "eps": 1e-6,
    "kind": "gelu",
    "qkv_bias": True,
    "proj_bias": True,
    "qk_norm": "none",
    "layer_scale": False,
    "pool": "cls",
    "classes": 1000,
}
"""Fields that an entry of a table leaves out; `width`, `depth`, `heads` and `hidden` always stand there.

A map pooling has the heads, the units and the activation of the blocks.
"""


def names(family: str = "timm") -> list[str]:
    """Every name in a family's table, without tags, sorted: what that family's source reads. Empty for another family."""
    return sorted(_table(family))


def tags(name: str, family: str = "timm") -> list[str]:
    """The family's tags of published weights for an architecture, sorted; empty for an unknown name."""
    return sorted(_table(family).get(name, {}).get("tags", {}))


def spec(name: str, classes: int | None = None, *, family: str = "timm") -> ModelSpec | None:
    """The spec of a family's model by name, with or without a tag; None if the table does not have it.

    classes: of the classifier; 0 gives an encoder without one, None what the named model has.
    """
    base, _, tag = name.partition(".")
    entry = _table(family).get(base)
    if entry is None or (tag and tag not in entry["tags"]):
        return None
    fields = {**entry, **(entry["tags"][tag] if tag else {})}
    del fields["tags"]
    if classes is not None:
        fields["classes"] = classes
    return expand(fields)


def expand(fields: Mapping[str, Any]) -> ModelSpec:
    """The spec that an entry of the table stands for: equal blocks, heads times head width equal to the width."""
    f = {**DEFAULTS, **fields}
    bias, scaled = f["proj_bias"], f["layer_scale"]
    block = BlockSpec(
        attention=dense_attention(
            f["heads"],
            f["width"] // f["heads"],
            bias=f["qkv_bias"],
            out_bias=bias,
            qk_norm=f["qk_norm"],
            layer_scale=scaled,
        ),
        mlp=MlpSpec(kind=f["kind"], hidden=f["hidden"], fc1_bias=bias, fc2_bias=bias, layer_scale=scaled),
    )
    (height, width), (patch_h, patch_w) = f["image"], f["patch"]
    prefix = tuple(f["prefix"].split())
    outputs = [Output(name="head", classes=f["classes"])]
    if "dist" in prefix:
        outputs.append(Output(name="head_dist", reads=("dist",), classes=f["classes"]))
    return ModelSpec(
        image_px=(height, width),
        patch_px=(patch_h, patch_w),
        channels=f["channels"],
        stem=_stem(f),
        width=f["width"],
        prefix=prefix,
        position=Position(
            kind=f["position"],
            grid=(height // patch_h, width // patch_w),
            prefix_rows=f["prefix_rows"],
            resize=f["resize"],
        ),
        pre_norm=f["pre_norm"],
        final_norm=f["final_norm"],
        pool_norm=f["pool_norm"],
        norm_eps=f["eps"],
        blocks=(block,) * f["depth"],
        pool=_pool(f),
        outputs=tuple(outputs) if f["classes"] else (),
    )


def dense_attention(
    heads: int,
    dim: int,
    *,
    bias: bool,
    scale: float | None = None,
    out_bias: bool = True,
    qk_norm: Literal["none", "layer", "rms"] = "none",
    layer_scale: bool = False,
) -> AttentionSpec:
    """Attention whose heads have one width and whose queries, keys and values have a bias or not together.

    scale: None is `dim ** -0.5`.
    """
    return AttentionSpec(
        heads=heads,
        qk_dim=dim,
        v_dim=dim,
        scale=dim**-0.5 if scale is None else scale,
        q_bias=bias,
        k_bias=bias,
        v_bias=bias,
        out_bias=out_bias,
        qk_norm=qk_norm,
        layer_scale=layer_scale,
    )


def _stem(f: Mapping[str, Any]) -> Stem:
    if f["stem"] == "conv":
        return ConvStem(bias=f["stem_bias"])
    if f["stem"] == "t2t_transformer":
        return T2TTransformer(token_dim=f["token_dim"])
    return T2TPerformer(token_dim=f["token_dim"], features=f["features"])


def _pool(f: Mapping[str, Any]) -> Pool:
    if f["pool"] == "map":
        return Pool(kind="map", heads=f["heads"], hidden=f["hidden"], act=f["kind"])
    return Pool(kind=f["pool"])


@cache
def _table(family: str) -> Mapping[str, Any]:
    if family not in FAMILIES:
        return {}
    text = resources.files(__package__).joinpath(f"{family}.json").read_text(encoding="utf-8")
    models: dict[str, Any] = json.loads(text)["models"]
    return models


__all__ = ["DEFAULTS", "FAMILIES", "dense_attention", "expand", "names", "spec", "tags"]
