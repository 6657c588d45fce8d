"""Settings of transformers' image processors <-> our preprocessing, where each can say the other."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

from ...errors import SourceError
from ...spec import Preprocess

LOG = logging.getLogger("vitrim.sources")
INTERPOLATIONS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
"""Pillow's numbers, which image processors store."""
NUMBERS = {name: number for number, name in INTERPOLATIONS.items()}


def preprocess_of(
    said: Mapping[str, Any], image_px: tuple[int, int] | None = None, channels: int = 3
) -> Preprocess | None:
    """An image processor's settings (its `to_dict()`) as ours; None where ours cannot say them.

    Theirs resize both sides, or the shorter one, to `size`, and then crop the middle if `do_center_crop`.
    image_px: the size that the model takes; None: any.  channels: that the model takes.
    """
    size, squash = _sides(said.get("size"))
    final = _sides(said.get("crop_size"))[0] if said.get("do_center_crop") else size
    if not said.get("do_resize", True) or not said.get("do_rescale", True) or size is None or final is None:
        return None
    if image_px is not None and final != image_px:
        LOG.warning("its image processor makes %s x %s px, the model takes %s x %s: not taken.", *final, *image_px)
        return None
    shares = [share_of(inner, outer) for inner, outer in zip(final, size, strict=True)]
    if max(shares) > 1 or len(set(shares)) > 1 or (final[0] != final[1] and not squash):
        return None
    plain = not said.get("do_normalize", True)
    mean, std = ((0.0,), (1.0,)) if plain else (said.get("image_mean") or (), said.get("image_std") or ())
    mean, std = (tuple(float(value) for value in values) for values in (mean, std))
    if len(mean) == len(std) == 1:
        mean, std = mean * channels, std * channels
    if len(mean) != channels or len(std) != channels:
        return None
    return Preprocess(
        mean=mean,
        std=std,
        size_px=final,
        crop=shares[0],
        crop_mode="squash" if squash else "center",
        interpolation=INTERPOLATIONS.get(int(said.get("resample", 2)), "bilinear"),
    )


def _sides(size: Any) -> tuple[tuple[int, int] | None, bool]:
    """Height and width, and whether both are set (else the shorter side is, and the shape stays); None: neither."""
    if isinstance(size, int):
        return (size, size), False
    said = dict(size or {})
    if said.get("height") and said.get("width"):
        return (int(said["height"]), int(said["width"])), True
    edge = said.get("shortest_edge")
    return (None if not edge or said.get("longest_edge") else (int(edge), int(edge))), False


def share_of(inner: int, outer: int) -> float:
    """The crop from which `floor(inner / crop)` gives exactly `outer`, as the transforms take it."""
    share = inner / outer
    return share if share > 1 or math.floor(inner / share) == outer else inner / (outer + 0.5)


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
    family = "CLIP" if not squash else "DeiT" if cropped else "ViT"
    return {
        "image_processor_type": f"{family}ImageProcessor",
        "do_resize": True,
        "size": before if squash else {"shortest_edge": min(before.values())},
        "resample": NUMBERS.get(preprocess.interpolation, NUMBERS["bicubic"]),
        "do_center_crop": cropped,
        **({"crop_size": {"height": height, "width": width}} if cropped else {}),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocess.mean),
        "image_std": list(preprocess.std),
    }
