"""Images to look at: what each of several classifiers says of the same pictures."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vitrim.data import Images, evaluation, match_labels, readable
from vitrim.errors import DataError
from vitrim.model import Vit

SHOWN_PX = 192


def samples(
    models: Mapping[str, Vit], found: Mapping[str, Mapping[str, Any]], images: Images, *, count: int, seed: int
) -> dict[str, Any]:
    """Images as data URIs with what each model says of them: first some on which dense and final differ, then others."""
    readable = [i for i, key in enumerate(images.keys) if key not in images.broken]
    dense, final = (found[name]["predictions"] for name in ("dense", list(models)[-1]))
    order = np.random.default_rng(seed).permutation(len(dense)).tolist()
    changed = [i for i in order if dense[i] != final[i]][: count // 2]
    same = [i for i in order if dense[i] == final[i]][: count - len(changed)]
    picked = changed + same
    preprocess = models["dense"].config.preprocess
    assert preprocess is not None  # `evaluate` refused the model otherwise
    view = evaluation(preprocess)
    pictures = [images[readable[i]][0] for i in picked]
    batch = torch.stack([view(picture) for picture in pictures])  # B C h w
    said = {name: [first for first, *_ in answers(model, batch)] for name, model in models.items()}
    labels = _true_labels(models["dense"], images)
    cards = [
        {
            "image": data_uri(picture),
            "name": images.keys[readable[i]],
            "label": labels[readable[i]] if labels else None,
            "predictions": {
                name: {key: of[place][key] for key in ("label", "probability")} for name, of in said.items()
            },
        }
        for place, (i, picture) in enumerate(zip(picked, pictures, strict=True))
    ]
    total = sum(a != b for a, b in zip(dense, final, strict=True))
    note = (
        f"The answer changed on {total} of {len(dense)} images. Of the {len(cards)} shown, {len(changed)} were drawn from "
        f"those, the others from the rest."
    )
    return {"samples": cards, "samples_note": note}


def data_uri(picture: Image.Image) -> str:
    """Small pictures as they are (PNG), large ones scaled down (JPEG)."""
    settings: dict[str, Any]
    if max(picture.size) <= 64:
        kind, settings = "png", {"optimize": True}
    else:
        picture = picture.copy()
        picture.thumbnail((SHOWN_PX, SHOWN_PX))
        kind, settings = "jpeg", {"quality": 85}
    held = io.BytesIO()
    picture.save(held, format=kind, **settings)
    return f"data:image/{kind};base64,{base64.b64encode(held.getvalue()).decode()}"


def answers(model: Vit, batch: Tensor, *, top: int = 1) -> list[list[dict[str, Any]]]:
    """The likeliest classes of each image: label (its number where the model has no names) and probability.  batch: B C h w.

    Probabilities sum to 1, unless an image has several labels: then each stands for itself.
    """
    first = next(model.parameters())
    with torch.inference_mode():
        logits = model(batch.to(first.device, first.dtype)).float()  # B classes
        if not torch.isfinite(logits).all():
            raise DataError(
                "the model answers with NaN or infinite numbers; expected logits. Check its weights and its preprocessing."
            )
        chances = (logits.sigmoid() if model.config.multi_label else logits.softmax(-1)).cpu()
    values, indices = chances.topk(min(top, chances.shape[-1]))
    labels = readable(model.config.labels or ())
    return [
        [
            {"label": labels[i] if labels else f"class {i}", "index": i, "probability": share}
            for i, share in zip(places, shares, strict=True)
        ]
        for places, shares in zip(indices.tolist(), values.tolist(), strict=True)
    ]


def _true_labels(model: Vit, images: Images) -> list[str] | None:
    """Names as the model has them, so that a right answer reads the same."""
    labels = images.labels
    if labels is None or labels.dim() > 1:
        return None
    own, theirs = model.config.labels, images.classes
    if own is None:
        return [f"class {int(label)}" for label in labels]
    index = match_labels(own, theirs) if theirs is not None else None
    named = readable(own)
    return [named[int(label) if index is None else int(index[label])] for label in labels]
