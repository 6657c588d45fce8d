"""timm's plain Vision Transformers as specs, from a table made by `scripts/make_architectures.py`.

So that the cost of a named model needs neither torch nor timm. Standard library only. A name may carry timm's tag
(`vit_base_patch16_224.augreg_in21k`): the table knows where a tag differs from its architecture (image size, classes).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import resources
from typing import Any

from ..spec import Attention, Block, ConvStem, Mlp, ModelSpec, Output, Pool, Position

DEFAULTS: Mapping[str, Any] = {
    "image": [224, 224],
    "patch": [16, 16],
    "channels": 3,
    "stem_bias": True,
    "prefix": "cls",
    "position": "learned",
    "prefix_rows": True,
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
"""Fields that an entry of the table leaves out; `width`, `depth`, `heads` and `hidden` always stand there."""


def names() -> list[str]:
    """Every name that the timm source reads, without tags, sorted."""
    return sorted(_table())


def tags(name: str) -> list[str]:
    """timm's tags of pretrained weights for an architecture, sorted; empty for an unknown name."""
    return sorted(_table().get(name, {}).get("tags", {}))


def spec(name: str, classes: int | None = None) -> ModelSpec | None:
    """The spec of a timm model by name, with or without a tag; None if the table does not have it.

    classes: of the classifier; 0 gives an encoder without one, None what the named model has.
    """
    base, _, tag = name.partition(".")
    entry = _table().get(base)
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
    head_dim = f["width"] // f["heads"]
    block = Block(
        attention=Attention(
            heads=f["heads"],
            qk_dim=head_dim,
            v_dim=head_dim,
            scale=head_dim**-0.5,
            q_bias=f["qkv_bias"],
            k_bias=f["qkv_bias"],
            v_bias=f["qkv_bias"],
            out_bias=f["proj_bias"],
            qk_norm=f["qk_norm"],
            layer_scale=f["layer_scale"],
        ),
        mlp=Mlp(
            kind=f["kind"],
            hidden=f["hidden"],
            fc1_bias=f["proj_bias"],
            fc2_bias=f["proj_bias"],
            layer_scale=f["layer_scale"],
        ),
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
        stem=ConvStem(bias=f["stem_bias"]),
        width=f["width"],
        prefix=prefix,
        position=Position(kind=f["position"], grid=(height // patch_h, width // patch_w), prefix_rows=f["prefix_rows"]),
        pre_norm=f["pre_norm"],
        final_norm=f["final_norm"],
        pool_norm=f["pool_norm"],
        norm_eps=f["eps"],
        blocks=(block,) * f["depth"],
        pool=Pool(kind=f["pool"]),
        outputs=tuple(outputs) if f["classes"] else (),
    )


def _table() -> dict[str, Any]:
    text = resources.files(__package__).joinpath("timm.json").read_text(encoding="utf-8")
    models: dict[str, Any] = json.loads(text)["models"]
    return models


__all__ = ["DEFAULTS", "expand", "names", "spec", "tags"]
