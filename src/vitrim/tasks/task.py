"""What a task is to the rest of the toolkit: its figures, how a network is scored, and what comparisons need of it. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from vitrim.spec import token_walk, tokens_given

if TYPE_CHECKING:
    from vitrim.data import Images
    from vitrim.model import Vit
    from vitrim.progress import Progress
    from vitrim.spec import Config, ModelSpec, ProductName

Metrics = dict[str, Any]
"""Figures of one network on some images, by the keys of `METRICS`, with `count`, `skipped`, and what comparisons need."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """One figure and its words."""

    title: str
    """At the head of a row."""
    short: str
    """On the terminal."""
    words: str
    """In a sentence."""
    form: Literal["percent", "plain"] = "percent"
    counted: bool = False
    """Whether it is a share of the images, so that a count and an interval stand beside it."""
    against_dense: bool = False
    """A likeness to the dense model, which has none itself."""
    of: str = ""
    """What it is a share of, where that is not plain."""
    kept: str = ""
    """A phrase for how much stayed as the dense model has it, with {} for the figure."""


METRICS: dict[str, Metric] = {
    "token_cosine": Metric(
        title="Cosine of tokens to dense",
        short="cosine of tokens with dense",
        words="cosine to the dense tokens",
        form="plain",
        against_dense=True,
        of="of all tokens",
        kept="tokens at cosine {} to the dense model's",
    ),
    "worst_image_cosine": Metric(
        title="Cosine of tokens, worst image",
        short="cosine of tokens, worst image",
        words="cosine to the dense tokens on the worst image",
        form="plain",
        against_dense=True,
    ),
    "class_cosine": Metric(
        title="Cosine of the class token",
        short="cosine of the class token",
        words="cosine to the dense class token",
        form="plain",
        against_dense=True,
    ),
    "top1": Metric(title="Top-1 accuracy", short="top-1", words="accuracy", counted=True),
    "top5": Metric(title="Top-5 accuracy", short="top-5", words="accuracy among the first five", counted=True),
    "map": Metric(title="Mean average precision", short="mean average precision", words="mean average precision"),
    "loss": Metric(title="Loss", short="loss", words="loss", form="plain"),
    "agreement": Metric(
        title="Agrees with dense",
        short="agreement with dense",
        words="agreement with the dense model",
        counted=True,
        against_dense=True,
        of="of the predictions",
        kept="{} of the predictions as before",
    ),
    "cosine": Metric(
        title="Cosine to dense",
        short="cosine with dense",
        words="cosine to the dense features",
        form="plain",
        against_dense=True,
        of="of the features",
        kept="features at cosine {} to the dense model's",
    ),
    "knn_agreement": Metric(
        title="Neighbours agree", short="neighbours agree", words="agreement of neighbours", against_dense=True
    ),
}
"""Every task's figures, in the order in which they are shown."""

QUALITY = ("token_cosine", "top1", "map", "agreement", "cosine")
"""Which figure stands for quality: the first that is there."""


def quality(metrics: Mapping[str, Any]) -> str | None:
    """The figure that stands for quality among these; None where there is none."""
    return next((key for key in QUALITY if metrics.get(key) is not None), None)


Z = 1.959964
"""Of the normal distribution: 95 % lie within so many deviations."""
FINE_POINTS = 2.0
"""What "no difference seen" promises: an interval that reaches further to either side of 0 is of too few images to say so."""


def interval(right: int, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share, `right` of `count` images; it holds at 0, at 1 and for few images."""
    share, spread = right / count, Z * Z / count
    middle = (share + spread / 2) / (1 + spread)
    half = Z * math.sqrt(share * (1 - share) / count + spread / (4 * count)) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)


def counts(metrics: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Of each figure that is a share of the images: `right` of `count`, and the 95 % interval, `low` to `high`."""
    found = {}
    for key, metric in METRICS.items():
        if metric.counted and metrics.get(key) is not None:
            right = round(metrics[key] * metrics["count"])
            low, high = interval(right, metrics["count"])
            found[key] = {"right": right, "count": metrics["count"], "low": low, "high": high}
    return found


def paired(worse: int, better: int, count: int) -> tuple[float, float]:
    """The 95 % interval of a difference of two shares of the same images, of which so many got worse and better.

    Bonett and Price's: an image is added to each kind, so that it does not shrink to nothing where few images show no change.
    """
    lost, gained = (worse + 1) / (count + 2), (better + 1) / (count + 2)
    half = Z * math.sqrt((lost + gained - (gained - lost) ** 2) / (count + 2))
    return max(-1.0, gained - lost - half), min(1.0, gained - lost + half)


def seen(difference: Mapping[str, Any]) -> str:
    """What a difference in points with its interval says in words; also that its images are too few to say anything."""
    low, high = difference["low"], difference["high"]
    if not low <= 0 <= high:
        return f"{difference['points']:+.2f} points"
    reach = max(-low, high)
    if reach <= FINE_POINTS:
        return "no difference seen"
    return f"too few images to tell: on {difference['count']}, less than {reach:.0f} points cannot be seen"


PRODUCTS = {
    "classify": "its answers",
    "cls": "its features, the class token",
    "mean": "its features, the mean of the patch tokens",
    "map": "its features, which attention pools from the tokens",
    "none": "its tokens",
}
"""What `model(x)` gives, by its pool, in words."""


def product_words(dense: ModelSpec, small: ModelSpec, product: ProductName) -> str:
    """What a network is for, what else the cut may have lost, and how many tokens its blocks run on: one sentence or two."""
    (before, _), (after, _) = tokens_given(dense), tokens_given(small)
    if product == "tokens":
        found = f"It is for all its {after} tokens behind the final norm{', the class token among them' if 'cls' in small.prefix else ''}"
        found += "; the classifier's answers are not, and may be lost." if small.outputs else "."
    else:
        kind = "classify" if small.outputs else small.pool.kind
        found = (
            f"It is for {PRODUCTS[kind]}; tokens by themselves are not, and may be lost"
            if kind != "none"
            else "It is for its tokens"
        )
        found += f": it gives {after} where the dense one gives {before}." if after != before else "."
    counts = [at.mlp.count for at in token_walk(small)]
    if small.restore and min(counts, default=after) < after:
        found += f" Its blocks run on {counts[0]} tokens in the first to {counts[-1]} in the last; behind that all {after} come back."
    return found


class Task(Protocol):
    """What networks of one kind are judged by. What a task does not say stands here, as for one without labels or answers."""

    name: str
    predicts: bool = False
    """Whether single images have answers that a person reads."""

    def check_labels(self, config: Config, images: Images) -> None:
        """Raise DataError where the labels of these images are not the model's."""

    def refuse_untrained(self, model: Vit, images: Images, **how: Any) -> float | None:
        """Raise DataError where the dense model only guesses; its quality on a few images, or None where nothing says so."""
        return None

    def evaluate(self, model: Vit, images: Images, *, reference: Any = None, **how: Any) -> Metrics:
        """Score a network in one pass.  reference: of `reference_of`, or a model; how: as `classification.evaluate` has it."""
        ...

    def reference_of(self, dense: Vit, facts: Metrics) -> Any:
        """What the networks cut from a dense one are compared with.  facts: the dense one's own."""
        return dense

    def successes(self, facts: Metrics, dense: Metrics | None = None) -> list[bool] | None:
        """By image, whether it was right; without labels, whether it was as the dense model has it. None: neither is known."""
        return None

    def samples(
        self, models: Mapping[str, Vit], facts: Mapping[str, Metrics], images: Images, *, count: int, seed: int
    ) -> dict[str, Any]:
        """Images to look at with what each model says of them, and how they were chosen; no `samples` where nothing can be shown."""
        return {"samples": []}


def named(progress: Progress | None, name: str) -> Progress | None:
    """The same progress, of the evaluation of one of several networks."""
    if progress is None:
        return None
    return lambda stage, done, total, **facts: progress(f"evaluate {name}", done, total, **facts)
