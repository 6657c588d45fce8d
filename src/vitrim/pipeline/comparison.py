"""Before and after on the same images: figures, their difference with its interval, and images to look at."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from vitrim.data import Images, evaluation, match_labels, readable
from vitrim.errors import DataError
from vitrim.model import Vit
from vitrim.pipeline.configs import EvaluateConfig
from vitrim.progress import Progress
from vitrim.tasks.classification import evaluate

KEPT = ("top1", "top5", "loss", "map", "agreement", "cosine", "knn_agreement", "count", "skipped")
CHECKED = 200
SHOWN_PX = 192


def compare(
    models: Mapping[str, Vit], images: Images, config: EvaluateConfig, progress: Progress | None
) -> tuple[dict[str, Any], dict[str, Any] | None, dict[str, Any] | None, dict[str, Any]]:
    """Metrics by model, the final model's difference from the dense one, what the recovery changed, samples to show.

    models: "dense" first, the final one last. The recovery's change is in top-1, or in agreement without labels; None
    without a recovery or a classifier.
    """
    chosen = images if config.limit is None or config.limit >= len(images) else images.take(config.limit, config.seed)
    found: dict[str, dict[str, Any]] = {}
    dense = models["dense"]
    for name, model in models.items():
        if name == "dense":
            reference: Any = None
        else:
            reference = found["dense"] if dense.spec.outputs else dense
        found[name] = evaluate(
            model,
            chosen,
            batch_size=config.batch_size,
            device=config.device,
            amp=config.amp,
            workers=config.workers,
            reference=reference,
            progress=_named(progress, name),
        )
    metrics = {name: {key: facts[key] for key in KEPT if key in facts} for name, facts in found.items()}
    last = list(models)[-1]
    gap = difference(found["dense"].get("correct"), found[last].get("correct"), seed=config.seed)
    shown = samples(models, found, chosen, config) if dense.spec.outputs and config.samples else {"samples": []}
    gained = None
    if "recovered" in models and dense.spec.outputs:
        gained = difference(*(_right(found[name], found["dense"]) for name in ("compressed", last)), seed=config.seed)
    return metrics, gap, gained, shown


def _right(facts: Mapping[str, Any], dense: Mapping[str, Any]) -> list[bool]:
    """Which images were classified rightly, or without labels as the dense model does."""
    if facts.get("correct"):
        return list(facts["correct"])
    return [a == b for a, b in zip(facts["predictions"], dense["predictions"], strict=True)]


def difference(before: Sequence[bool] | None, after: Sequence[bool] | None, *, seed: int = 0) -> dict[str, Any] | None:
    """Percentage points of top-1 gained (or, below 0, lost) with the paired bootstrap's 95 % interval; None without labels."""
    if not before or not after:
        return None
    steps = np.asarray(after, dtype=np.int64) - np.asarray(before, dtype=np.int64)
    count = len(steps)
    shares = [float((steps == value).mean()) for value in (-1, 0, 1)]
    # drawing images anew is drawing how many got worse, stayed, got better
    drawn = np.random.default_rng(seed).multinomial(count, shares, size=4000)
    low, high = np.percentile(100 * (drawn[:, 2] - drawn[:, 0]) / count, [2.5, 97.5])
    return {"points": 100 * float(steps.mean()), "low": float(low), "high": float(high), "count": count}


def samples(
    models: Mapping[str, Vit], found: Mapping[str, Mapping[str, Any]], images: Images, config: EvaluateConfig
) -> dict[str, Any]:
    """Images as data URIs with what each model says of them: first some on which dense and final differ, then others."""
    readable = [i for i, key in enumerate(images.keys) if key not in images.broken]
    dense, final = (found[name]["predictions"] for name in ("dense", list(models)[-1]))
    order = np.random.default_rng(config.seed).permutation(len(dense)).tolist()
    changed = [i for i in order if dense[i] != final[i]][: config.samples // 2]
    same = [i for i in order if dense[i] == final[i]][: config.samples - len(changed)]
    picked = changed + same
    preprocess = models["dense"].config.preprocess
    assert preprocess is not None  # `evaluate` refused the model otherwise
    view = evaluation(preprocess)
    pictures = [images[readable[i]][0] for i in picked]
    batch = torch.stack([view(picture) for picture in pictures])  # B C h w
    said = {name: _answers(model, batch) for name, model in models.items()}
    labels = _true_labels(models["dense"], images)
    cards = [
        {
            "image": data_uri(picture),
            "name": images.keys[readable[i]],
            "label": labels[readable[i]] if labels else None,
            "predictions": {name: answers[place] for name, answers in said.items()},
        }
        for place, (i, picture) in enumerate(zip(picked, pictures, strict=True))
    ]
    total = sum(a != b for a, b in zip(dense, final, strict=True))
    note = (
        f"The answer changed on {total} of {len(dense)} images. Of the {len(cards)} shown, {len(changed)} were drawn from "
        f"those, the others from the rest."
    )
    return {"samples": cards, "samples_note": note}


def refuse_chance(model: Vit, images: Images, config: EvaluateConfig) -> float | None:
    """Top-1 of the dense model on a few images. Raises DataError where it is no better than chance; None without labels."""
    if not images.labelled or not model.spec.outputs:
        return None
    few = images.take(CHECKED, config.seed) if len(images) > CHECKED else images
    top1 = evaluate(
        model, few, batch_size=config.batch_size, device=config.device, amp=config.amp, workers=config.workers
    ).get("top1")
    if top1 is None:
        return None
    classes = len(images.classes) if images.classes else model.spec.classes or 1
    chance = 1 / classes
    # on very few images a good model can look like chance: there, only what is not above it is stopped
    margin = 3 * math.sqrt(chance * (1 - chance) / len(few)) if len(few) >= 100 else 0.0
    if top1 <= chance + margin:
        how = model.config.preprocess
        assert how is not None
        raise DataError(
            f"the dense model scores {100 * top1:.1f} % on {len(few)} images of {images.name}, where chance is {100 * chance:.1f} %: "
            f"expected a trained model and its own preprocessing. In use: mean={_short(how.mean)}, std={_short(how.std)}, "
            f"size_px={tuple(how.size_px)}, interpolation={how.interpolation!r}. Load it with the right preprocess=, check that the "
            "labels are of this data, or skip the check with check_dense=False."
        )
    return float(top1)


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


def _answers(model: nn.Module, batch: torch.Tensor) -> list[dict[str, Any]]:
    with torch.inference_mode():
        first = next(model.parameters())
        chances = model(batch.to(first.device, first.dtype)).float().softmax(-1).cpu()  # B classes
    tops, indices = chances.max(-1)
    labels = readable(model.config.labels or ()) if isinstance(model, Vit) else None
    return [
        {"label": labels[i] if labels else f"class {i}", "probability": top}
        for top, i in zip(tops.tolist(), indices.tolist(), strict=True)
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


def _named(progress: Progress | None, name: str) -> Progress | None:
    if progress is None:
        return None
    return lambda stage, done, total, **facts: progress(f"evaluate {name}", done, total, **facts)


def _short(values: Sequence[float]) -> tuple[float, ...]:
    return tuple(round(value, 4) for value in values)
