"""Classification: accuracy, loss and agreement of a classifier; likeness to a dense model for an encoder without one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrim import data
from vitrim.data import Images
from vitrim.data.labels import are_numbers
from vitrim.data.transforms import UNPREPARED
from vitrim.errors import ConfigError, DataError, fitting_in_memory
from vitrim.model import Vit, device_named
from vitrim.progress import Progress
from vitrim.spec import Config, ModelSpec, Preprocess, ProductName, product_of
from vitrim.tasks.samples import samples as shown
from vitrim.tasks.task import Metrics, Task

CHECKED = 200
"""Images on which the dense model has to do better than chance."""
NEIGHBOURS = 5
_CHUNK = 512  # rows of the similarity matrix held at once

Metric = Callable[[Tensor, Tensor], Mapping[str, float]]


def evaluate(
    model: nn.Module,
    images: Any,
    *,
    split: str = "validation",
    batch_size: int = 64,
    device: torch.device | str | None = None,
    amp: str = "no",
    workers: int | None = 0,
    limit: int | None = None,
    seed: int = 0,
    preprocess: Preprocess | None = None,
    labels: Sequence[str] | None = None,
    product: ProductName | None = None,
    reference: nn.Module | Mapping[str, Any] | Sequence[int] | Tensor | None = None,
    metric: Metric | None = None,
    on_broken: str = "raise",
    progress: Progress | None = None,
) -> Metrics:
    """Score a model on images, one pass, in evaluation mode; the model is left as it was found.

    images: Images, or whatever `vitrim.data.open` takes (then `split` is read).
    device: None means where the model is.  amp: "no", "bf16" or "fp16".  limit: as many images, drawn by seed.
    on_broken: "raise" stops at an image that cannot be read, "skip" leaves it out and says so.
    preprocess, labels: None means the model's own (`model.config`).
    product: what the networks are for, `output` or `tokens`; None: the tokens of an encoder, where both networks give as many.
    reference: another model, the metrics of one, or its predictions: what agreement is measured with.
    metric: further figures from all logits [n, classes] and targets, merged into the result.

    A classifier gives top1 and top5 (shares; None without labels, and top5 of five classes or fewer), loss, count, skipped (broken images), predictions (model
    indices), correct (by image; None without labels), and agreement where a reference is given. Where images have several labels,
    map (mean average precision) and loss stand in their place; a model that was trained so (`config.problem_type`) predicts the
    labels above one half, and agrees with another on an image where all of these are the same. An encoder gives cosine and knn_agreement with the
    reference, which must then be a model: the mean share of an image's 5 nearest neighbours that both agree on.
    Where tokens are the product, in place of cosine: token_cosine, the mean over images of that of all tokens behind the final norm,
    worst_image_cosine, the least of an image, and class_cosine, of the class tokens alone, where there are some. Tokens are compared
    batch by batch and not kept; each has 8 bytes of memory.
    DataError for classes that do not match, a missing preprocessing, or a reference of other images; ConfigError for tokens that
    are not there.
    """
    chosen = data.open(data.skipping(images, on_broken), split=split, limit=limit, seed=seed)
    config = getattr(model, "config", None)
    own = config if isinstance(config, Config) else None
    how = preprocess or (own.preprocess if own else None)
    if how is None:
        raise DataError(UNPREPARED)
    encoder = own is not None and not own.spec.outputs
    names = labels if labels is not None else (own.labels if own else None)
    classes = own.spec.classes if own is not None and not encoder else None
    kind = Kind(multi_label=own is not None and own.multi_label, several=chosen.several)
    other = reference if isinstance(reference, nn.Module) else None
    if encoder and reference is not None and other is None:
        raise DataError("an encoder without a classifier is compared with a model; pass the dense model as reference=.")
    index = None if encoder else class_index(names, chosen.classes, classes=classes)
    tokens = _by_tokens(model, reference, product)

    at = _device(model) if device is None else device_named(device) if isinstance(device, str) else device
    view = data.evaluation(how)
    passes = [model] if other is None else [model, other]
    outputs: list[list[Tensor]] = [[] for _ in passes]
    targets: list[Tensor] = []
    cosines: list[Tensor] = []
    done = 0
    if progress is not None:
        progress("evaluate", 0, len(chosen))
    room = fitting_in_memory(
        f"scoring {batch_size} images at a time on {at}",
        "Lower batch_size (--batch, or evaluate.batch_size of a --config), or compute elsewhere (--device cpu).",
    )
    with room, _ready(passes, at), torch.no_grad(), _autocast(at, amp):
        for x, y in data.batches(chosen, view, batch_size, workers=workers, device=at):
            answers = [each(x, want=("logits", "tokens")) if tokens else {"logits": each(x)} for each in passes]
            for kept, said in zip(outputs, answers, strict=True):
                answer = _features(said["logits"]) if encoder else _logits(said["logits"])
                kept.append(answer.float().cpu())
            if tokens:
                cosines.append(alike(*(said["tokens"] for said in answers)))
            if y is not None and not encoder:
                targets.append(_mapped(y.cpu(), index, outputs[0][-1].shape[-1]))
            done += len(x)
            if progress is not None:
                progress("evaluate", done, len(chosen))
    if not done:
        raise DataError(f"{chosen.name}: none of {len(chosen)} images could be read.")
    facts: Metrics = {"count": done, "skipped": len(chosen) - done}
    ours = torch.cat(outputs[0])
    theirs = torch.cat(outputs[1]) if other is not None else None
    for said, found in (("the model", ours), ("the reference", theirs)):
        if found is not None:
            finite_answers(found, said)
    if tokens and own is not None:
        finite_answers(torch.cat(cosines), "one of the two networks")
        facts |= token_likeness(torch.cat(cosines), own.spec)
    if encoder:
        features = {} if theirs is None else likeness(ours, theirs)
        if tokens:
            features.pop("cosine", None)  # of what is pooled: the tokens say more
        return facts | features
    wanted = torch.cat(targets) if targets else None
    facts |= scores(ours, wanted, kind)
    if metric is not None and wanted is not None:
        facts |= finite_figures(metric(ours, wanted))
    if reference is not None:
        facts["agreement"] = _agreement(facts["predictions"], theirs if theirs is not None else reference, kind)
    return facts


def _by_tokens(model: nn.Module, reference: object, product: ProductName | None) -> bool:
    """Whether tokens are compared. Raises ConfigError where they were asked for and there are none to compare."""
    both = isinstance(model, Vit) and isinstance(reference, Vit)
    if product == "tokens" and not both:
        raise ConfigError(
            "product='tokens': tokens are compared with those of another model, both of vitrim; expected the dense one as reference= "
            "(--against)."
        )
    if product not in (None, "output", "tokens"):
        raise ConfigError(f"product={product!r}; expected 'output' or 'tokens'.")
    return (
        isinstance(model, Vit)
        and isinstance(reference, Vit)
        and product_of(model.spec, product, beside=reference.spec) == "tokens"
    )


def finite_answers(found: Tensor, who: str = "the model") -> None:
    """Raise DataError where an answer is no number: every figure made of it would be none, and some would look like one.

    found: n of anything.
    """
    right = torch.isfinite(found).flatten(1).all(1)
    if not right.all():
        raise DataError(
            f"{who} answers {int((~right).sum())} of {len(right)} images with NaN or infinite numbers, so nothing is scored. "
            "Check its weights and the images' normalisation, or score with amp='no' (--amp no)."
        )


def finite_figures(figures: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of a metric that a caller brought, in Python's own numbers. Raises DataError that names one that is none."""
    if not isinstance(figures, Mapping):
        raise DataError(f"metric: gives {type(figures).__name__}; expected a dict of figures by name.")
    plain = {name: value.tolist() if hasattr(value, "tolist") else value for name, value in figures.items()}
    for name, value in plain.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise DataError(f"metric: {name!r} is {value!r}; expected a finite number.")
    return plain


def class_index(
    model_labels: Sequence[str] | None, data_classes: Sequence[str] | None, *, classes: int | None
) -> Tensor | None:
    """int64 [data classes] of the model's indices; None where the data's labels are the model's indices already.

    That is so for tensors, which have no names, and for a model without names where the data's are numbers or as many.
    """
    if data_classes is None:
        return None
    if model_labels is not None:
        return data.match_labels(model_labels, data_classes)
    if classes is not None and are_numbers(data_classes) and len(data_classes) <= classes:
        return None
    if classes is not None and classes != len(data_classes):
        raise DataError(
            f"the model has {classes} classes without names, the data {len(data_classes)}: {', '.join(data_classes[:8])}"
            f"{', ...' if len(data_classes) > 8 else ''}. Name the model's labels, or train a head for these classes: "
            "vitrim train --new-head."
        )
    return None


def refuse_chance(model: Vit, images: Images, *, seed: int = 0, **how: Any) -> float | None:
    """Top-1 of a classifier on a few images. Raises DataError where it is no better than chance; None without labels.

    how: batch_size, device, amp, workers and progress, as `evaluate` takes them.
    """
    if not images.labelled or not model.spec.outputs:
        return None
    few = images.take(CHECKED, seed) if len(images) > CHECKED else images
    top1 = evaluate(model, few, **how).get("top1")
    if top1 is None:
        return None
    classes = len(images.classes) if images.classes else model.spec.classes or 1
    chance = 1 / classes
    # on very few images a good model can look like chance: there, only what is not above it is stopped
    margin = 3 * math.sqrt(chance * (1 - chance) / len(few)) if len(few) >= 100 else 0.0
    if top1 <= chance + margin:
        own = model.config.preprocess
        assert own is not None
        raise DataError(
            f"the dense model scores {100 * top1:.1f} % on {len(few)} images of {images.name}, where chance is {100 * chance:.1f} %: "
            f"expected a trained model and its own preprocessing. In use: mean={_short(own.mean)}, std={_short(own.std)}, "
            f"size_px={tuple(own.size_px)}, interpolation={own.interpolation!r}. Load it with the right preprocess=, check that the "
            "labels are of this data, or skip the check with check_dense=False."
        )
    return float(top1)


@torch.no_grad()
def same_for_all(model: Vit) -> bool:
    """Whether the network gives the same whatever the image is, seen on four images of noise; the last linears do not count.

    One that reads what no image changes cannot be mended by training; one with an empty classifier can.
    """
    spec, first = model.spec, next(model.parameters())
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, spec.channels, *spec.image_px, generator=generator).to(first)
    with _ready([model], first.device):
        found = list(model(x, want=("reads",))["reads"].values()) if spec.outputs else [model(x)]
    # as the last bits of sums may have it
    return all(bool((y - y[:1]).abs().max() <= 1e-6 * y.abs().max()) for y in found)


@dataclass(frozen=True, slots=True)
class Kind:
    """How answers are read.  multi_label: the model says of each label whether it applies.  several: so do the images' labels."""

    multi_label: bool = False
    several: bool = False


def scores(logits: Tensor, targets: Tensor | None, kind: Kind = Kind()) -> Metrics:
    """Figures of a classifier.  logits: n C; targets: int64 n, float n C of shares or of several labels, or None."""
    facts: Metrics = {"predictions": decided(logits, kind)}
    if kind.multi_label or kind.several:
        if targets is None:
            return facts | {"map": None, "loss": None}
        wanted = hot(targets, logits.shape[1]).double()
        loss = F.binary_cross_entropy_with_logits(logits.double(), wanted)
        return facts | {"map": mean_average_precision(logits, wanted), "loss": loss.item()}
    if targets is None:
        return facts | {"top1": None, "top5": None, "loss": None, "correct": None}
    best = targets if targets.ndim == 1 else targets.argmax(dim=1)
    correct = logits.argmax(dim=1) == best
    among = logits.topk(min(5, logits.shape[1]), dim=1).indices == best[:, None]
    top5 = among.any(dim=1).double().mean().item() if logits.shape[1] > 5 else None  # else it is 1 whatever the model
    wanted = targets if targets.ndim == 1 else targets.double()
    return facts | {
        "top1": correct.double().mean().item(),
        "top5": top5,
        "loss": F.cross_entropy(logits.double(), wanted).item(),
        "correct": correct.tolist(),
    }


def decided(logits: Tensor, kind: Kind) -> list[Any]:
    """What a classifier says of each image: the likeliest class, or all labels above one half.  logits: n C"""
    if not kind.multi_label:
        return logits.argmax(dim=1).tolist()
    return [row.nonzero()[:, 0].tolist() for row in logits > 0]


def hot(targets: Tensor, classes: int) -> Tensor:
    """n C: of each label whether it applies.  targets: int64 n, or n C as they are."""
    return F.one_hot(targets, classes) if targets.ndim == 1 else targets


def mean_average_precision(logits: Tensor, targets: Tensor) -> float:
    """Mean over the classes that occur of the average precision.  logits, targets: n C."""
    order = logits.argsort(dim=0, descending=True, stable=True)
    hits = (targets > 0.5).double().gather(0, order)
    places = torch.arange(1, len(hits) + 1, dtype=torch.float64)[:, None]
    precision = hits.cumsum(dim=0) / places
    present = hits.sum(dim=0) > 0
    average = (precision * hits).sum(dim=0)[present] / hits.sum(dim=0)[present]
    return average.mean().item() if len(average) else 0.0


def likeness(features: Tensor, dense: Tensor) -> Metrics:
    """Mean cosine similarity by image, and the share of nearest neighbours in common.  n D each, D may differ for the latter."""
    facts: Metrics = {}
    if features.shape == dense.shape:
        facts["cosine"] = F.cosine_similarity(features.double(), dense.double(), dim=1).mean().item()
    if len(features) > NEIGHBOURS:
        ours, theirs = nearest(features), nearest(dense)
        shared = (ours[:, :, None] == theirs[:, None, :]).any(dim=2)
        facts["knn_agreement"] = shared.double().mean().item()
    return facts


def alike(ours: Tensor, dense: Tensor) -> Tensor:
    """Cosine of each token with the dense model's.  Both B N D -> B N, float64 on the CPU."""
    return F.cosine_similarity(ours.float(), dense.float(), dim=-1).cpu().double()


def token_likeness(cosines: Tensor, spec: ModelSpec) -> Metrics:
    """Figures of tokens beside the dense model's.  cosines: n N, prefix tokens first; spec: that has them."""
    images = cosines.mean(dim=1)
    facts: Metrics = {"token_cosine": images.mean().item(), "worst_image_cosine": images.min().item()}
    if "cls" in spec.prefix:
        facts["class_cosine"] = cosines[:, spec.prefix.index("cls")].mean().item()
    return facts


def nearest(features: Tensor, k: int = NEIGHBOURS) -> Tensor:
    """int64 [n,k]: each image's nearest others by cosine.  features: n D."""
    unit = F.normalize(features.double(), dim=1)
    found = []
    for start in range(0, len(unit), _CHUNK):
        near = unit[start : start + _CHUNK] @ unit.T
        near[torch.arange(len(near)), torch.arange(start, start + len(near))] = -2.0  # not itself
        found.append(near.topk(k, dim=1).indices)
    return torch.cat(found)


def _agreement(predictions: list[Any], reference: Any, kind: Kind) -> float:
    if isinstance(reference, Tensor) and reference.ndim == 2:
        reference = decided(reference, kind)
    values = reference.get("predictions") if isinstance(reference, Mapping) else reference
    if values is None:
        raise DataError(
            "the reference has no 'predictions'; expected a model, what `evaluate` gives, or class numbers."
        )
    listed = values.tolist() if hasattr(values, "tolist") else list(values)
    if len(listed) != len(predictions):
        raise DataError(
            f"the reference has predictions for {len(listed)} images, this model for {len(predictions)}; "
            "expected the same images. Evaluate both with the same data, split and limit."
        )
    return sum(a == b for a, b in zip(predictions, listed, strict=True)) / len(predictions)


def _mapped(targets: Tensor, index: Tensor | None, classes: int) -> Tensor:
    if targets.ndim == 2:
        if index is None and targets.shape[1] == classes:
            return targets
        if index is None:
            raise DataError(f"targets of {targets.shape[1]} labels for a model of {classes} classes; expected as many.")
        wide = targets.new_zeros((len(targets), classes))
        wide[:, index] = targets
        return wide
    mapped = targets if index is None else index[targets]
    if int(mapped.max()) >= classes:
        raise DataError(
            f"label {int(mapped.max())} for a model of {classes} classes; expected labels from 0 to {classes - 1}. "
            "For other classes train a head: vitrim train --new-head."
        )
    return mapped


def _logits(answer: Any) -> Tensor:  # B C
    """What a classifier of any library answers: a tensor, or an output that holds `logits`, as those of transformers do."""
    found = answer.get("logits") if isinstance(answer, Mapping) else getattr(answer, "logits", answer)
    if not isinstance(found, Tensor) or found.ndim != 2:
        shape = f"a tensor of shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(answer).__name__
        raise DataError(
            f"the model answers with {shape}; expected logits [images, classes]. Give the classifier alone."
        )
    return found


def _features(y: Tensor) -> Tensor:  # B D, or B N D -> B D
    return y.mean(dim=1) if y.ndim == 3 else y


def _device(model: nn.Module) -> torch.device:
    first = next(model.parameters(), None)
    return torch.device("cpu") if first is None else first.device


@contextmanager
def _ready(models: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """Evaluation mode on the device; mode (of every part) and device are put back."""
    before = [(model, _device(model), [(part, part.training) for part in model.modules()]) for model in models]
    try:
        for model in models:
            model.eval().to(device)
        yield
    finally:
        for model, home, modes in before:
            model.to(home)
            for part, mode in modes:
                part.training = mode


def _autocast(device: torch.device, amp: str) -> torch.autocast:
    kinds = {"no": torch.bfloat16, "bf16": torch.bfloat16, "fp16": torch.float16}
    if amp not in kinds:
        raise DataError(f"amp={amp!r}; expected 'no', 'bf16' or 'fp16'.")
    return torch.autocast(device.type, dtype=kinds[amp], enabled=amp != "no")


def _short(values: Sequence[float]) -> tuple[float, ...]:
    return tuple(round(value, 4) for value in values)


# ------------------------------------------------------------------------------------------------------------- as tasks


class Features(Task):
    """`Task` of encoders without a classifier: their features beside the dense model's."""

    name = "features"

    def check_labels(self, config: Config, images: Images) -> None:
        """Labels are not looked at."""

    def evaluate(self, model: Vit, images: Images, *, reference: Any = None, **how: Any) -> Metrics:
        return evaluate(model, images, reference=reference, **how)


class Classification(Features):
    """`Task` of networks with a classifier."""

    name = "classification"
    predicts = True

    def check_labels(self, config: Config, images: Images) -> None:
        class_index(config.labels, images.classes, classes=config.spec.classes)

    def refuse_untrained(self, model: Vit, images: Images, **how: Any) -> float | None:
        return refuse_chance(model, images, **how)

    def reference_of(self, dense: Vit, facts: Metrics) -> Any:
        return facts

    def successes(self, facts: Metrics, dense: Metrics | None = None) -> list[bool] | None:
        if facts.get("correct"):
            return list(facts["correct"])
        if dense is None:
            return None
        return [a == b for a, b in zip(facts["predictions"], dense["predictions"], strict=True)]

    def samples(
        self, models: Mapping[str, Vit], facts: Mapping[str, Metrics], images: Images, *, count: int, seed: int
    ) -> dict[str, Any]:
        return shown(models, facts, images, count=count, seed=seed) if count else {"samples": []}


def task_of(spec: ModelSpec) -> Task:
    """What networks of this spec are judged by."""
    return Classification() if spec.outputs else Features()
