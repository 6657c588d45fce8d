"""What a network is trained for: labels, a teacher's answers, a teacher's features. And the two verbs that use them."""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import artifact
from . import data as data_module
from .data import Images
from .data.draws import seeded
from .errors import ConfigError, DataError, TrainingError
from .model import Vit, build
from .spec import Config, ModelSpec, Output, Preprocess
from .training import HALF, Batch, FitResult, Progress, Step, TrainConfig, fit, mapped, plain

Loss = Callable[[Tensor, Tensor], Tensor]
"""(logits B classes, labels) -> a scalar, a mean over the images."""

_INITIAL = 0x696E_6974  # keeps these draws apart from others with the same seed
NO_DECAY = ("prefix", "position", "latent")


def decay_groups(named: Iterable[tuple[str, nn.Parameter]]) -> list[dict[str, Any]]:
    """Two optimiser groups: matrices and kernels decay; vectors, tokens and position tables do not."""
    decayed, free = [], []
    for name, parameter in named:
        if parameter.requires_grad:
            plain = parameter.dim() < 2 or name.rsplit(".", 1)[-1] in NO_DECAY
            (free if plain else decayed).append(parameter)
    groups = [{"params": decayed}, {"params": free, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


class Plain:
    """What the objectives here share: they train the model's own weights, in one phase, and have no state."""

    def __init__(self) -> None:
        self.seen: dict[str, float] = {}

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        return decay_groups(model.named_parameters())

    def after_backward(self, step: Step) -> None:
        """Nothing to do."""

    def after_step(self, step: Step) -> None:
        """Nothing to do."""

    def phase(self, step: Step) -> str:
        return "train"

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""

    def metrics(self) -> dict[str, float]:
        return dict(self.seen)


class Supervised(Plain):
    """Labels. `loss` replaces the default: cross entropy, or binary cross entropy where an image has several labels."""

    def __init__(self, *, smoothing: float = 0.0, multi_label: bool = False, loss: Loss | None = None) -> None:
        """smoothing: share of a target that is spread over all classes; of the two answers to each label, if multi-label."""
        super().__init__()
        self.smoothing, self.multi_label, self.custom = smoothing, multi_label, loss

    def loss(self, model: nn.Module, batch: Batch, step: Step) -> Tensor:
        return self.score(model(batch.images), batch.labels)

    def score(self, logits: Tensor, labels: Tensor | None) -> Tensor:
        """Loss of logits [B, classes] against the labels of their batch."""
        if labels is None:
            raise DataError("the images have no labels, which this training needs; give labels or train label-free.")
        logits = logits if logits.dtype == torch.float64 else logits.float()
        if self.custom is not None:
            return self.custom(logits, labels)
        if self.multi_label:
            targets = labels.to(logits.dtype) * (1 - self.smoothing) + 0.5 * self.smoothing
            return F.binary_cross_entropy_with_logits(logits, targets)
        return F.cross_entropy(logits, labels, label_smoothing=self.smoothing)


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
    provenance: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> FitResult:
    """Train on labels: from scratch (a spec or a config), or on from a model's weights. Gives a new model.

    data: whatever `vitrim.data.open` takes; its train split is learned, its validation split scored.
    out: folder that becomes the artifact, beside metrics.jsonl and checkpoints. resume: go on where a run there stopped.
    new_head: fresh classifiers for the classes of the data. Without it, classes are matched by name.
    loss, metric: in place of cross entropy (binary where an image has several labels) and of top-1.
    Raises DataError on classes that do not match, and what `fit` raises.
    """
    config = config or TrainConfig()
    images, held = (data_module.open(data, split=split, labelled=True) for split in ("train", "validation"))
    with seeded(_INITIAL, config.seed):  # the same start on every process, and after every restart
        model = _starting_model(source, images.classes, _classes(images), new_head=new_head)
    mapping = _label_map(model, images)
    labels = images.labels
    multi_label = labels is not None and labels.dim() > 1
    objective = Supervised(smoothing=config.smoothing, multi_label=multi_label, loss=loss)
    _refuse_foreign_folder(out, resume=resume)
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
    if out is not None and int(os.environ.get("RANK", "0")) == 0:
        scores = next((line for line in reversed(result.history) if line["kind"] == "validate"), {})
        known = {
            "method": "train",
            "config": plain(config),
            "data": images.fingerprint(),
            "seed": config.seed,
            "metrics": {"validation": {k: v for k, v in scores.items() if k not in ("kind", "step", "seconds")}},
            "steps": result.steps,
            "seconds": round(result.seconds, 1),
            **(provenance or {}),
        }
        artifact.save(result.model, out, provenance=known, force=True)
    return result


def _classes(images: Images) -> int:
    if images.classes is not None:
        return len(images.classes)
    labels = images.labels
    assert labels is not None
    return labels.shape[1] if labels.dim() > 1 else int(labels.max()) + 1


def _starting_model(
    source: ModelSpec | Config | Vit, names: tuple[str, ...] | None, classes: int, *, new_head: bool
) -> Vit:
    """A new model; the caller's is only read."""
    if isinstance(source, Vit):
        model = with_new_head(source, classes, names) if new_head else copy.deepcopy(source)
    else:
        config = source if isinstance(source, Config) else Config(spec=source)
        if new_head:
            config = _config_with_head(config, classes, names)
        if config.labels is None and config.spec.classes == classes:
            config = dataclasses.replace(config, labels=names)
        model = build(config)
    if model.config.preprocess is None:
        size = model.spec.image_px
        middle = (0.5,) * model.spec.channels
        model.config = dataclasses.replace(
            model.config, preprocess=Preprocess(mean=middle, std=middle, size_px=size, crop=1.0)
        )
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
    return dataclasses.replace(config, spec=spec, labels=labels, task="classification")


def _label_map(model: Vit, images: Images) -> Tensor | None:
    if model.config.labels is None or images.classes is None:
        return None
    return data_module.match_labels(model.config.labels, images.classes)


def _refuse_foreign_folder(out: str | os.PathLike[str] | None, *, resume: bool) -> None:
    if out is None or not Path(out).exists():
        return
    if not Path(out).is_dir():
        raise TrainingError(f"{Path(out).name}: is a file; expected a folder to write. Give another name.")
    if not resume and (names := sorted(path.name for path in Path(out).iterdir())):
        raise TrainingError(
            f"{Path(out).name}/ exists and holds {names[0]!r}; nothing is overwritten unasked. "
            "Pass resume=True (--resume) to go on with a run there, or choose another folder."
        )


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
            with torch.autocast(parameter.device.type, enabled=config.amp != "no", dtype=HALF.get(config.amp)):
                answers.append(model(x.to(parameter.dtype)).to(parameter.dtype).cpu())
            truths.append(y.cpu())
        logits, labels = torch.cat(answers), mapped(torch.cat(truths), label_map, model.spec.classes)
        found = {"loss": float(objective.score(logits, labels)), "count": float(len(labels))}
        if metric is not None:
            return {**found, **metric(logits, labels)}
        if labels.dim() > 1:
            return {**found, "label_accuracy": float(((logits > 0) == (labels > 0.5)).double().mean())}
        return {**found, "top1": float((logits.argmax(1) == labels).double().mean())}

    return score
