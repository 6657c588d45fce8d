"""Before and after on the same images: figures, their difference with its interval, and images to look at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from vitrim.data import Images
from vitrim.model import Vit
from vitrim.pipeline.configs import EvaluateConfig
from vitrim.progress import Progress
from vitrim.spec import product_of
from vitrim.tasks.classification import task_of
from vitrim.tasks.task import METRICS, Metrics, named, paired

KEPT = (*METRICS, "count", "skipped")


class Comparison(NamedTuple):
    """metrics: by model. gap: the final model's difference from the dense one, in points of what was right; None without labels.

    samples: images to look at.
    """

    metrics: dict[str, Metrics]
    gap: dict[str, Any] | None
    samples: dict[str, Any]


def compare(models: Mapping[str, Vit], images: Images, config: EvaluateConfig, progress: Progress | None) -> Comparison:
    """Score all models on the same images.  models: "dense" first, the final one last. Raises ConfigError for tokens that are not there."""
    chosen = images if config.limit is None or config.limit >= len(images) else images.take(config.limit, config.seed)
    dense, last = models["dense"], list(models)[-1]
    task = task_of(dense.spec)
    tokens = product_of(models[last].spec, config.product, beside=dense.spec) == "tokens"
    found: dict[str, Metrics] = {}
    for name, model in models.items():
        how: dict[str, Any] = {**config.how, "progress": named(progress, name)}
        if name != "dense":
            how["reference"] = dense if tokens else task.reference_of(dense, found["dense"])
            how["product"] = "tokens" if tokens else "output"
        found[name] = task.evaluate(model, chosen, **how)
    return Comparison(
        metrics={name: {key: facts[key] for key in KEPT if key in facts} for name, facts in found.items()},
        gap=difference(task.successes(found["dense"]), task.successes(found[last])),
        samples=task.samples(models, found, chosen, count=config.samples, seed=config.seed),
    )


def difference(before: Sequence[bool] | None, after: Sequence[bool] | None) -> dict[str, Any] | None:
    """Percentage points gained (or, below 0, lost) on the same images with their 95 % interval; None without labels.

    worse, better: how many images changed to wrong and to right.
    """
    if not before or not after:
        return None
    worse, better = (
        sum(a is not b and b is right for a, b in zip(before, after, strict=True)) for right in (False, True)
    )
    count = len(before)
    low, high = paired(worse, better, count)
    return {
        "points": 100 * (better - worse) / count,
        "low": 100 * low,
        "high": 100 * high,
        "count": count,
        "worse": worse,
        "better": better,
    }
