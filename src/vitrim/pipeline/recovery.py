"""Recovery: a compressed network trained for a while to answer as the dense one did."""

from __future__ import annotations

import copy
import dataclasses
import logging
import os
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from vitrim import data as opened
from vitrim import surgery
from vitrim.codec import plain
from vitrim.data import Images
from vitrim.errors import ConfigError, DataError
from vitrim.files import locked
from vitrim.freezing import frozen
from vitrim.model import Vit, require_model
from vitrim.pipeline.configs import RecoverConfig
from vitrim.progress import Progress
from vitrim.result import Compressed, descended
from vitrim.spec import product_of
from vitrim.tasks.classification import class_index, evaluate, same_for_all
from vitrim.tasks.task import METRICS, Metrics, interval, quality
from vitrim.training import FitResult, Objective, fit
from vitrim.training.config import filled
from vitrim.training.objectives import Distilled, LabelFree, Supervised

log = logging.getLogger("vitrim.pipeline")


def recover(
    small: Vit | Compressed,
    *,
    teacher: Vit | None = None,
    data: Any,
    config: RecoverConfig | None = None,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    on_broken: str = "raise",
    progress: Progress | None = None,
) -> Compressed:
    """Train a compressed network; gives a new one, `small` and `teacher` are left as they were.

    Where the validation images say that the training made it worse, the network from before comes back, and a warning says so:
    `report["recovery"]["kept"]` is "recovered" or "cut".
    teacher: the dense model; only objective="supervised" does without.  data: whatever `vitrim.data.open` takes; its train
    split is learned and its validation split scored.  out: folder for metrics.jsonl and checkpoints; resume: go on from there.
    on_broken: "raise" stops at an image that cannot be read, "skip" leaves it out and says so.
    The result's history holds the lines of metrics.jsonl. Raises ConfigError, DataError, and what `vitrim.training.fit` raises.
    """
    config = config or RecoverConfig()
    if not isinstance(config, RecoverConfig):
        raise ConfigError(f"recover: the config is a {type(config).__name__}; expected a RecoverConfig.")
    model = small.model if isinstance(small, Compressed) else small
    require_model(model, "recover: the model")
    if teacher is not None:
        require_model(teacher, "recover: the teacher")
    data = opened.skipping(data, on_broken)
    labelled = False if config.objective == "label_free" else None
    images, held = (opened.open(data, split=split, labelled=labelled) for split in ("train", "validation"))
    product_of(model.spec, config.product, beside=None if teacher is None else teacher.spec)
    config, said = filled(config, len(images))
    for text in said:
        log.warning(text)
    if same_for_all(model):
        raise ConfigError(
            "recover: the model gives the same for every image, which no recovery mends; expected one that sees. Cut it anew, "
            "to a larger budget."
        )
    if teacher is not None and config.objective != "supervised" and same_for_all(teacher):
        raise ConfigError(
            "recover: the teacher gives the same for every image, from which nothing can be learned; expected the dense model."
        )
    place = None if out is None else Path(out)
    with locked(place):
        done = better_again(model, teacher, images, config, held=held, out=place, resume=resume, progress=progress)
    fitted = done.fitted
    made = small if isinstance(small, Compressed) else Compressed(model=model, method="recover", variant=done.objective)
    spent = {
        "objective": done.objective,
        "steps": fitted.steps,
        "seconds": round(fitted.seconds, 1),
        "kept": done.kept,
        "before": done.before,
        "after": done.after,
        "warnings": done.warnings,
    }
    fitted.model.provenance = _told(model) | {
        "data": held.fingerprint() | {"train": images.fingerprint()},
        "metrics": {"before": done.dense, "after": done.before if done.kept == "cut" else done.after},
        "recovery": plain(config) | {"kept": done.kept},
    }
    return dataclasses.replace(
        made, model=fitted.model, history=fitted.history, report={**made.report, "recovery": spent}
    )


def _told(model: Vit) -> dict[str, Any]:
    """What a network says of itself that holds for one with other weights too; of a dense one, where it comes from."""
    if not model.selection.steps:
        return descended(model.provenance, model.spec)
    told = dict(model.provenance)
    was = {key: told.pop(key) for key in ("sha256", "metrics") if key in told}
    return told | ({"parent": was} if "sha256" in was else {})


class Better(NamedTuple):
    """The better of two networks by the validation images: the recovered one, or the cut one that it began with.

    before, after: figures of both; dense: the teacher's, where it was scored. warnings: said already.
    """

    fitted: FitResult
    objective: str
    kept: Literal["recovered", "cut"]
    dense: Metrics
    before: Metrics
    after: Metrics
    warnings: list[str]


def better_again(
    model: Vit, teacher: Vit | None, images: Images, config: RecoverConfig, *, held: Images, **how: Any
) -> Better:
    """`train_again`, but a network that the training made worse on the validation images is given back as it was."""
    score = _Validator(held, teacher, config)
    fast = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    before = score(model, device=None if config.device == "cpu" else fast)
    fitted, objective = train_again(model, teacher, images, config, validate=score, **how)
    last: dict[str, Any] = next((line for line in reversed(fitted.history) if line["kind"] == "validate"), {})
    after = {key: last[key] for key in (*METRICS, "count") if key in last}
    key, warnings = quality(after), []
    worse = _as_first_says(key is not None and before[key] > after[key])
    if worse:
        if key is not None:
            warnings.append(harm(key, before[key], after[key], len(held)))
            log.warning(warnings[0])
        fitted = dataclasses.replace(fitted, model=copy.deepcopy(model).eval())
    return Better(fitted, objective, "cut" if worse else "recovered", score.dense, before, after, warnings)


def harm(name: str, before: float, after: float, count: int) -> str:
    """The sentence for a recovery that lowered a figure of `count` images, named as `METRICS` has it."""
    metric = METRICS[name]
    form = ".1%" if metric.form == "percent" else ".3f"
    near = metric.counted and after >= interval(round(before * count), count)[0]
    return (
        f"The recovery lowered the {metric.words} on {count} validation images from {before:{form}} to {after:{form}}"
        f"{', a difference that so many images cannot tell from chance' if near else ''}: the network from before it was kept. "
        "Train longer or with a lower lr, or leave it out."
    )


def _as_first_says(found: bool) -> bool:
    """The first process has the figures; all of them keep the same network."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return found
    box = [found]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def training_speeds(
    models: Mapping[str, Vit], teacher: Vit | None, images: Images, config: RecoverConfig, *, rounds: int = 3
) -> dict[str, float]:
    """Images a second of a recovery step of each model, in turns: medians over the rounds. The models are left as they were.

    A round takes three steps of each, the first of which is not counted.
    """
    short = dataclasses.replace(config, steps=3, log_every=1, tracker=None)
    rates: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds):
        for name, model in models.items():
            history = train_again(model, teacher, images, short)[0].history
            rates[name] += [line["images_per_s"] for line in history[1:]]
    return {name: statistics.median(found) for name, found in rates.items()}


def train_again(
    model: Vit,
    teacher: Vit | None,
    images: Images,
    config: RecoverConfig,
    **how: Any,
) -> tuple[FitResult, str]:
    """Fit a copy of the model; gives the result and the objective's name as it was resolved.

    images: learned.  how: validate, out, resume and progress, as `fit` takes them.
    """
    name = objective_named(config, model, labelled=images.labelled)
    objective = _objective(name, config, model, teacher, images)
    # a label-free run never looks at labels, which may be of other classes than the model's
    labels = None if name == "label_free" else images.classes
    label_map = class_index(model.config.labels, labels, classes=model.spec.classes)
    student = copy.deepcopy(model)
    learns = {name: parameter.requires_grad for name, parameter in student.named_parameters()}
    surgery.hold(student, frozen(student.spec, config.freeze))
    fitted = fit(student, objective, images, config, label_map=label_map, **how)
    for key, parameter in fitted.model.named_parameters():
        parameter.requires_grad_(learns[key])
    return fitted, name


def objective_named(config: RecoverConfig, model: Vit, *, labelled: bool) -> str:
    """What "auto" means here. Raises DataError where labels are needed and there are none."""
    usable = labelled and bool(model.spec.outputs)
    if config.objective == "auto":
        answers = product_of(model.spec, config.product) == "output"
        return "distilled" if usable and answers else "label_free"
    if config.objective != "label_free" and not usable:
        lacks = "the images have no labels" if model.spec.outputs else "the model has no classifier"
        raise DataError(
            f"objective={config.objective!r}: {lacks}. Use objective='label_free', or give labelled images."
        )
    return config.objective


def _objective(name: str, config: RecoverConfig, model: Vit, teacher: Vit | None, images: Images) -> Objective:
    several = images.several or model.config.multi_label
    if name == "supervised":
        return Supervised(smoothing=config.smoothing, multi_label=several)
    if teacher is None:
        raise ConfigError(
            f"objective={name!r} needs the dense model; pass teacher= (--teacher), or use objective='supervised'."
        )
    if name == "distilled":
        return Distilled(
            teacher,
            kind=config.distillation,
            alpha=config.alpha,
            tau=config.tau,
            features=config.features,
            smoothing=config.smoothing,
            multi_label=several,
        )
    product = product_of(model.spec, config.product, beside=teacher.spec)
    return LabelFree(teacher, taps=taps_for(model, teacher), product=product)


def taps_for(model: Vit, teacher: Vit) -> tuple[str, ...]:
    """The block outputs that label-free training matches: the last of each third, where tokens still stand as in the dense model.

    Where the model restores its tokens, those of all blocks, restored. None for a narrower stream, whose channels are others: there
    the result alone is matched.
    """
    if model.spec.width != teacher.spec.width or len(model.spec.blocks) != len(teacher.spec.blocks):
        return ()
    if model.spec.restore:
        depth = len(model.spec.blocks)
        return tuple(f"restored:{depth * part // 3 - 1}" for part in (1, 2, 3) if depth * part // 3)
    whole = [i for i, block in enumerate(model.spec.blocks) if not block.steps]
    before = next((i for i, block in enumerate(model.spec.blocks) if block.steps), len(model.spec.blocks))
    usable = [i for i in whole if i < before]
    thirds = sorted({usable[(len(usable) * part) // 3 - 1] for part in (1, 2, 3) if (len(usable) * part) // 3})
    return tuple(f"block:{i}" for i in thirds)


class _Validator:
    """Scores networks on the validation images, against the teacher's answers.  dense: the teacher's own figures, once known."""

    def __init__(self, held: Images, teacher: Vit | None, config: RecoverConfig) -> None:
        self.held, self.teacher, self.config = held, teacher, config
        self.reference: dict[str, Any] = {}

    @property
    def dense(self) -> Metrics:
        return _figures(self.reference)

    def __call__(self, model: Vit, *, device: torch.device | None = None) -> Metrics:
        """Figures, computed on this device; None: where the model is."""
        how: dict[str, Any] = {"batch_size": 256, "workers": self.config.workers, "device": device}
        teacher, product = self.teacher, self.config.product
        if teacher is not None and not self.reference and model.spec.outputs:
            self.reference = evaluate(teacher, self.held, **how)
        if teacher is not None and product_of(model.spec, product, beside=teacher.spec) == "tokens":
            return _figures(evaluate(model, self.held, reference=teacher, product="tokens", **how))
        return _figures(evaluate(model, self.held, reference=self.reference or teacher, product="output", **how))


def _figures(found: Metrics) -> Metrics:
    return {key: float(found[key]) for key in (*METRICS, "count") if found.get(key) is not None}
