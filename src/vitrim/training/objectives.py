"""What a network is trained for: labels, a teacher's answers, a teacher's features. And `train`, on labels."""

from __future__ import annotations

import copy
import dataclasses
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitrim import artifact, processes
from vitrim import data as data_module
from vitrim.codec import plain
from vitrim.data import Images
from vitrim.data.draws import seeded
from vitrim.data.labels import are_numbers
from vitrim.errors import ConfigError, DataError, TrainingError
from vitrim.files import locked, names_in
from vitrim.model import Vit, build
from vitrim.progress import Progress
from vitrim.spec import Config, ModelSpec, Output, Preprocess, ProductName, product_of
from vitrim.tasks.classification import Kind, finite_answers, finite_figures, hot, scores
from vitrim.training.config import TrainConfig, filled
from vitrim.training.loop import AMP_DTYPES, FitResult, fit, mapped
from vitrim.training.objective import Batch, Objective, Step

Loss = Callable[[Tensor, Tensor], Tensor]
"""(logits B classes, labels) -> a scalar, a mean over the images."""

_INITIAL = 0x696E_6974  # keeps these draws apart from others with the same seed
log = logging.getLogger("vitrim.training")
NO_DECAY = ("prefix", "position", "latent")


def decay_groups(named: Iterable[tuple[str, nn.Parameter]]) -> list[dict[str, Any]]:
    """Two optimiser groups: matrices and kernels decay; vectors, tokens and position tables do not."""
    groups: list[dict[str, Any]] = [{"params": []}, {"params": [], "weight_decay": 0.0}]
    for name, parameter in named:
        if parameter.requires_grad:
            free = parameter.dim() < 2 or name.rsplit(".", 1)[-1] in NO_DECAY
            groups[free]["params"].append(parameter)
    return [group for group in groups if group["params"]]


class Plain(Objective):
    """What the objectives here share: they train the model's own weights, and tell the parts of the loss."""

    def __init__(self) -> None:
        self.parts: dict[str, Tensor] = {}

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        return decay_groups(model.named_parameters())

    def metrics(self) -> dict[str, float]:
        """The parts of the loss, as the latest micro-batch of this process had them."""
        return {name: float(part) for name, part in self.parts.items()}


class Supervised(Plain):
    """Labels. `loss` replaces the default: cross entropy, or binary cross entropy where an image has several labels."""

    def __init__(self, *, smoothing: float = 0.0, multi_label: bool = False, loss: Loss | None = None) -> None:
        """smoothing: share of a target that is spread over all classes; of the two answers to each label, if multi-label."""
        super().__init__()
        self.smoothing, self.multi_label, self.custom = smoothing, multi_label, loss

    def loss(self, model: nn.Module, batch: Batch, step: Step) -> Tensor:
        return self.score(model(batch.images), batch.labels)

    def score(self, logits: Tensor, labels: Tensor | None) -> Tensor:
        """Loss of logits [B, classes] against the labels of their batch: int64 [B], or [B, classes] of shares or several labels."""
        if labels is None:
            raise DataError(
                "the images have no labels, which this training needs; give labelled ones or train label-free."
            )
        logits = _wide(logits)
        if self.custom is not None:
            return self.custom(logits, labels)
        if self.multi_label:
            targets = hot(labels, logits.shape[-1]).to(logits.dtype) * (1 - self.smoothing) + 0.5 * self.smoothing
            return F.binary_cross_entropy_with_logits(logits, targets)
        return F.cross_entropy(logits, labels, label_smoothing=self.smoothing)


class _Taught(Plain):
    """An objective with a teacher, which is never changed: asked in eval mode, without gradients.

    taps: streams that are matched too, as `want` names them. result: what else the teacher is asked for.
    """

    result = "logits"

    def __init__(self, teacher: Vit, taps: Sequence[str]) -> None:
        super().__init__()
        self.given = self.teacher = teacher
        self.taps = tuple(taps)
        self.shift: tuple[Tensor, Tensor] | None = None

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        first = next(model.parameters())
        own = next(self.given.parameters())
        apart = self.given.training or own.device != first.device or own.dtype != first.dtype
        self.teacher = copy.deepcopy(self.given).to(first.device, first.dtype).eval() if apart else self.given
        if isinstance(model, Vit):
            self._check(model)
        return super().param_groups(model)

    def _check(self, model: Vit) -> None:
        """Refuse a teacher that cannot teach this model."""
        ours, theirs = model.config, self.teacher.config
        if ours.spec.classes != theirs.spec.classes:
            raise ConfigError(
                f"the teacher has {theirs.spec.classes} classes, the model {ours.spec.classes}; expected the same. "
                "Take the network that the model was cut from."
            )
        if ours.labels is not None and theirs.labels is not None and ours.labels != theirs.labels:
            raise ConfigError(
                f"the teacher's classes are not the model's: {theirs.labels[:3]}... against {ours.labels[:3]}...; expected "
                "the same names in the same order. Take the network that the model was cut from."
            )
        if ours.preprocess is not None and theirs.preprocess is not None:
            here, there = ours.preprocess, theirs.preprocess
            if (here.mean, here.std) != (there.mean, there.std):  # the teacher sees images as it was trained on them
                first = next(model.parameters())
                mean, std, their_mean, their_std = (
                    torch.tensor(v, device=first.device, dtype=first.dtype).view(-1, 1, 1)
                    for v in (here.mean, here.std, there.mean, there.std)
                )
                self.shift = std / their_std, (mean - their_mean) / their_std

    @torch.no_grad()
    def ask(self, images: Tensor) -> dict[str, Any]:
        """What the teacher says of the model's images [B, C, h, w]: its result, and its streams at the taps."""
        if self.shift is not None:
            images = images * self.shift[0] + self.shift[1]
        found: dict[str, Any] = self.teacher(images, want=(self.result, *self.taps))
        return found

    def matched(self, total: Tensor, found: dict[str, Any], theirs: dict[str, Any], weight: float = 1.0) -> Tensor:
        """The loss plus the streams' squared distance, as a share of the teacher's mean square, a mean over the taps."""
        if not self.taps:
            return total
        prefix, each = len(self.teacher.spec.prefix), []
        for tap in self.taps:
            ours, goal = _wide(found[tap]), _wide(theirs[tap])
            if ours.shape[1] == prefix != goal.shape[1]:  # after an exact tail only the prefix tokens are left
                goal = goal[:, :prefix]
            if ours.shape != goal.shape:
                raise ConfigError(
                    f"{tap}: the model's stream is {tuple(ours.shape[1:])}, the teacher's {tuple(goal.shape[1:])}; expected "
                    "equal tokens and widths. Match blocks before the first token step, or none."
                )
            each.append((ours - goal).square().mean() / goal.square().mean())
        distance = torch.stack(each).mean()
        self.parts["feature_loss"] = distance.detach()
        return total + weight * distance


class Distilled(_Taught):
    """Labels and a teacher's answers: (1 - alpha) * label loss + alpha * teacher loss [+ the streams' distance].

    A model with a distillation token answers the labels by its other classifiers and the teacher by that one.
    """

    def __init__(
        self,
        teacher: Vit,
        *,
        kind: Literal["soft", "hard"] = "soft",
        alpha: float = 0.5,
        tau: float = 2.0,
        features: Sequence[int] = (),
        feature_weight: float = 1.0,
        smoothing: float = 0.0,
        multi_label: bool = False,
        loss: Loss | None = None,
    ) -> None:
        """kind: "soft" is tau^2 * KL at temperature tau, "hard" cross entropy with the teacher's choice.

        alpha: weight of the teacher in [0, 1]; at 1 no labels are needed. features: blocks whose outputs are matched too.
        multi_label: the teacher's answers are one probability for each label. loss: in place of the label loss.
        """
        super().__init__(teacher, [f"block:{i}" for i in features])
        if kind not in ("soft", "hard"):
            raise ConfigError(f"kind={kind!r}; expected 'soft' or 'hard'.")
        if not 0 <= alpha <= 1 or not tau > 0:
            raise ConfigError(f"alpha={alpha!r}, tau={tau!r}; expected alpha in [0, 1] and tau above 0.")
        if not teacher.spec.outputs:
            raise ConfigError("the teacher has no classifier; train label-free on its features instead.")
        self.kind, self.alpha, self.tau = kind, alpha, tau
        self.feature_weight, self.multi_label = feature_weight, multi_label
        self.labels = Supervised(smoothing=smoothing, multi_label=multi_label, loss=loss)

    def loss(self, model: nn.Module, batch: Batch, step: Step) -> Tensor:
        found = model(batch.images, want=("logits", "outputs", *self.taps))
        theirs = self.ask(batch.images)
        told = [name for name in found["outputs"] if "dist" in name]
        by_label, by_teacher = found["logits"], found["logits"]
        if told and len(told) < len(found["outputs"]):
            by_teacher = torch.stack([found["outputs"][name] for name in told]).mean(0)
            by_label = torch.stack([y for name, y in found["outputs"].items() if name not in told]).mean(0)
        teacher = self._teacher_loss(_wide(by_teacher), _wide(theirs["logits"]))
        total = self.alpha * teacher
        self.parts = {"teacher_loss": teacher.detach()}
        if self.alpha < 1:
            label = self.labels.score(by_label, batch.labels)
            total = total + (1 - self.alpha) * label
            self.parts["label_loss"] = label.detach()
        return self.matched(total, found, theirs, self.feature_weight)

    def _teacher_loss(self, ours: Tensor, theirs: Tensor) -> Tensor:
        if self.multi_label:
            heat = self.tau if self.kind == "soft" else 1.0
            goal = torch.sigmoid(theirs / heat) if self.kind == "soft" else (theirs > 0).to(ours.dtype)
            return heat**2 * F.binary_cross_entropy_with_logits(ours / heat, goal)
        if self.kind == "hard":
            return F.cross_entropy(ours, theirs.argmax(-1))
        return _divergence(ours, theirs, self.tau)


class LabelFree(_Taught):
    """A teacher's product, without labels: the streams' distance at the taps, and the result's.

    The result is the logits (KL divergence), the pooled features of an encoder (relative distance), or, where the tokens are the
    product, all of them behind the final norm (relative distance), merged ones restored.
    """

    def __init__(self, teacher: Vit, *, taps: Sequence[str] | None = None, product: ProductName | None = None) -> None:
        """taps: what to match, as `want` names it ("block:5", "restored:5"); None: the last block, () the result alone.

        product: as `spec.product_of` has it.
        """
        last = len(teacher.spec.blocks) - 1
        self.result = "tokens" if product_of(teacher.spec, product) == "tokens" else "logits"
        super().__init__(teacher, ([f"block:{last}"] if last >= 0 else []) if taps is None else taps)

    def _check(self, model: Vit) -> None:
        super()._check(model)
        if self.result == "tokens":
            product_of(model.spec, "tokens", beside=self.teacher.spec)

    def loss(self, model: nn.Module, batch: Batch, step: Step) -> Tensor:
        found, theirs = model(batch.images, want=(self.result, *self.taps)), self.ask(batch.images)
        ours, goal = _wide(found[self.result]), _wide(theirs[self.result])
        if self.result == "logits" and self.teacher.spec.outputs:
            differ = _label_divergence if self.teacher.config.multi_label else _divergence
            total = differ(ours, goal, 1.0)
        else:
            total = (ours - goal).square().mean() / goal.square().mean()
        self.parts = {"result_loss": total.detach()}
        return self.matched(total, found, theirs)


def _wide(x: Tensor) -> Tensor:
    """At least float32: losses are not taken in half precision."""
    return x if x.dtype == torch.float64 else x.float()


def _divergence(ours: Tensor, theirs: Tensor, tau: float) -> Tensor:
    """tau^2 * KL(teacher || model) at temperature tau, a mean over the images.  Both B classes."""
    return _divergence_of(F.log_softmax(ours / tau, -1), F.log_softmax(theirs / tau, -1)) * tau**2


def _divergence_of(ours: Tensor, theirs: Tensor) -> Tensor:
    """KL of log-probabilities, a mean over the images."""
    return F.kl_div(ours, theirs, reduction="batchmean", log_target=True)


def _label_divergence(ours: Tensor, theirs: Tensor, tau: float) -> Tensor:
    """The same where each label stands for itself: tau^2 times the sum of the labels' two-way divergences."""
    return _divergence_of(_ways(ours / tau), _ways(theirs / tau)) * tau**2


def _ways(logits: Tensor) -> Tensor:  # B C -> B 2C
    """Log-probabilities that each label applies, and that it does not."""
    return torch.cat([F.logsigmoid(logits), F.logsigmoid(-logits)], dim=-1)


# ------------------------------------------------------------------------------------------------- training on labels

Metric = Callable[[Tensor, Tensor], Mapping[str, float]]
"""(logits n classes, labels) of all validation images -> figures."""


def train(
    source: ModelSpec | Config | Vit,
    data: Any,
    config: TrainConfig | None = None,
    *,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    new_head: bool = False,
    loss: Loss | None = None,
    metric: Metric | None = None,
    on_broken: str = "raise",
    provenance: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> FitResult:
    """Train on labels: from scratch (a spec or a config), or on from a model's weights. Gives a new model.

    data: whatever `vitrim.data.open` takes; its train split is learned, its validation split scored.
    out: folder that becomes the artifact, beside metrics.jsonl and checkpoints. resume: go on where a run there stopped.
    new_head: fresh classifiers for the classes of the data. Without it, classes are matched by name.
    on_broken: "raise" stops at an image that cannot be read, "skip" leaves it out and says so.
    loss, metric: in place of cross entropy (binary where an image has several labels) and of top-1.
    Raises DataError on classes that do not match, and what `fit` raises.
    """
    place = None if out is None else Path(out)
    data = data_module.skipping(data, on_broken)
    with locked(place):
        _refuse_foreign_folder(place, resume=resume)
        return _train(
            source, data, config or TrainConfig(), place, resume, new_head, loss, metric, provenance or {}, progress
        )


def _train(
    source: ModelSpec | Config | Vit,
    data: Any,
    config: TrainConfig,
    out: Path | None,
    resume: bool,
    new_head: bool,
    loss: Loss | None,
    metric: Metric | None,
    provenance: Mapping[str, Any],
    progress: Progress | None,
) -> FitResult:
    images, held = (data_module.open(data, split=split, labelled=True) for split in ("train", "validation"))
    config, said = filled(config, len(images))
    for text in said:
        log.warning(text)
    with seeded(_INITIAL, config.seed):  # the same start on every process, and after every restart
        model = _starting_model(source, images, new_head=new_head)
    mapping = None
    if model.config.labels is not None and images.classes is not None:
        mapping = data_module.match_labels(model.config.labels, images.classes)
    objective = Supervised(smoothing=config.smoothing, multi_label=model.config.multi_label, loss=loss)
    result = fit(
        model,
        objective,
        images,
        config,
        out=out,
        resume=resume,
        label_map=mapping,
        validate=_scorer(held, objective, config, mapping, metric),
        progress=progress,
    )
    if out is not None and processes.is_first():
        scores: dict[str, Any] = next((r for r in reversed(result.history) if r["kind"] == "validate"), {})
        known = {
            "method": "train",
            "config": plain(config),
            "data": images.fingerprint(),
            "seed": config.seed,
            "metrics": {"validation": {k: v for k, v in scores.items() if k not in ("kind", "step", "seconds")}},
            "steps": result.steps,
            "seconds": round(result.seconds, 1),
            **provenance,
        }
        artifact.save(result.model, out, provenance=known, force=True)
    return result


def _starting_model(source: ModelSpec | Config | Vit, images: Images, *, new_head: bool) -> Vit:
    """A new model, which answers as the images are labelled; the caller's is only read."""
    names, classes = images.classes, images.class_count
    assert classes is not None  # labels were demanded
    if new_head:
        _refuse_gaps(images, classes)
    if isinstance(source, Vit):
        model = with_new_head(source, classes, names) if new_head else copy.deepcopy(source)
    else:
        config = source if isinstance(source, Config) else Config(spec=source)
        if new_head:
            config = _config_with_head(config, classes, names)
        if config.labels is None and config.spec.classes == classes:
            config = dataclasses.replace(config, labels=names)
        model = build(config)
    if images.several:
        model.config = dataclasses.replace(model.config, problem_type="multi_label_classification")
    if model.config.preprocess is None:
        middle = (0.5,) * model.spec.channels
        log.warning(
            "the model says no preprocessing: trained with mean 0.5 and deviation 0.5 of each channel, which it says from now on "
            "(others: --mean, --std)."
        )
        preprocess = Preprocess(mean=middle, std=middle, size_px=model.spec.image_px, crop=1.0)
        model.config = dataclasses.replace(model.config, preprocess=preprocess)
    if not model.spec.outputs:
        raise ConfigError("the model has no classifier to train; pass new_head=True (--new-head) for one.")
    if model.config.labels is None and model.spec.classes is not None and classes > model.spec.classes:
        raise DataError(
            f"the data has {classes} classes, the model {model.spec.classes}; pass new_head=True (--new-head) for a "
            "classifier that fits."
        )
    return model


def with_new_head(model: Vit, classes: int, labels: tuple[str, ...] | None) -> Vit:
    """A copy with fresh classifiers for other classes; everything else keeps its weights. Draws from the global generator."""
    fresh = build(_config_with_head(model.config, classes, labels))
    state = {name: t for name, t in model.state_dict().items() if not name.startswith("heads.")}
    fresh.load_state_dict(state, strict=False)
    fresh.selection, fresh.provenance = model.selection, dict(model.provenance)
    return fresh.to(next(model.parameters()).dtype)


def _config_with_head(config: Config, classes: int, labels: tuple[str, ...] | None) -> Config:
    old = config.spec.outputs or (Output(classes=classes),)
    outputs = tuple(dataclasses.replace(output, classes=classes, rank=None) for output in old)
    spec = dataclasses.replace(config.spec, outputs=outputs)
    return dataclasses.replace(
        config, spec=spec, labels=labels, task="classification", problem_type="single_label_classification"
    )


def _refuse_gaps(images: Images, classes: int) -> None:
    """Raise DataError for a single class, and where classes are numbered with gaps: a head for them would answer what no image shows."""
    labels = images.source.labels
    if labels is not None and labels.ndim == 1 and classes < 2:
        raise DataError(
            f"{images.name}: every image has the same label, so that there is nothing to learn; expected two classes or more."
        )
    if labels is None or labels.ndim > 1 or not (images.classes is None or are_numbers(images.classes)):
        return
    lacking = np.setdiff1d(np.arange(classes), labels)
    if len(lacking):
        raise DataError(
            f"{images.name}: class numbers run from 0 to {classes - 1}, and {len(lacking)} of them are no image's (the first is "
            f"{lacking[0]}); expected every number, for a new head. Number the classes without gaps, or write their names."
        )


def _refuse_foreign_folder(out: Path | None, *, resume: bool) -> None:
    """The first process alone: it writes there, and has perhaps begun to when another one looks."""
    if out is None or not out.exists() or not processes.is_first():
        return
    if not out.is_dir():
        raise TrainingError(f"{out.name}: is a file; expected a folder to write. Give another name.")
    names = names_in(out)
    if names and not resume:
        raise TrainingError(
            f"{out.name}/ exists and holds {names[0]!r}; nothing is overwritten unasked. "
            "Pass resume=True (--resume) to go on with a run there, or choose another folder."
        )
    if names and "metrics.jsonl" not in names:
        raise TrainingError(
            f"{out.name}/ holds {names[0]!r} and no metrics.jsonl, so there is no training to resume; "
            "choose another folder."
        )
    artifact.refuse_overwriting(out, force=True)  # said now, and not when the training is over


def _scorer(
    images: Images, objective: Supervised, config: TrainConfig, label_map: Tensor | None, metric: Metric | None
) -> Callable[[Vit], dict[str, float]]:
    """Score a model on all images of a split."""

    @torch.no_grad()
    def score(model: Vit) -> dict[str, float]:
        assert model.config.preprocess is not None
        parameter = next(model.parameters())
        transform = data_module.evaluation(model.config.preprocess)
        answers, truths = [], []
        for x, y in data_module.batches(images, transform, 256, workers=config.workers, device=parameter.device):
            assert y is not None
            with torch.autocast(parameter.device.type, enabled=config.amp != "no", dtype=AMP_DTYPES.get(config.amp)):
                answers.append(model(x.to(parameter.dtype)).to(parameter.dtype).cpu())
            truths.append(y.cpu())
        logits, labels = torch.cat(answers), mapped(torch.cat(truths), label_map, model.spec.classes)
        finite_answers(logits)
        found = {"loss": float(objective.score(logits, labels)), "count": float(len(labels))}
        if metric is not None:
            return found | finite_figures(metric(logits, labels))
        shares = scores(logits, labels, Kind(multi_label=objective.multi_label))
        return found | {key: float(shares[key]) for key in ("top1", "map") if key in shares}

    return score
