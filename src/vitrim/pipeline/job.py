"""A job: everything that one `run` was asked for, checked before anything is written."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from vitrim import __version__, surgery
from vitrim import data as rooms
from vitrim.budget import Budget, exceeded
from vitrim.config import keys
from vitrim.counting import Cost, cost
from vitrim.data import Images
from vitrim.errors import ConfigError, DataError
from vitrim.freezing import frozen
from vitrim.methods import METHODS, configure, method_named, method_of
from vitrim.methods import plan as plan_of
from vitrim.methods.method import Method, MethodConfig, Plan
from vitrim.model import Vit
from vitrim.pipeline.configs import EvaluateConfig, MeasureConfig, RecoverConfig
from vitrim.pipeline.folder import Folder
from vitrim.pipeline.recovery import objective_named
from vitrim.pipeline.reference import gets_tail, limited, reference_of
from vitrim.progress import Progress
from vitrim.result import Compressed
from vitrim.tasks.classification import task_of
from vitrim.tasks.task import Task
from vitrim.training import plain, ready

log = logging.getLogger("vitrim.pipeline")


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a caller wants of a run, as `run` takes it. name: of the model, without the folders that it lies in."""

    name: str
    dense: Vit
    config: MethodConfig
    data: Any
    recovery: RecoverConfig | None
    target: MeasureConfig | None
    judging: EvaluateConfig
    relative_to: Literal["given", "original"]
    tail: bool
    init: str | None
    compressor: Callable[..., Compressed]


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run, settled. asked: as the caller said it. config: its shares turned into limits. given: what the method is given.

    tail: whether that has an exact tail. first: the config of `init`, or None. train, held: training and validation images.
    warnings: said so far. dense_top1: of the dense model on a few images, where it was looked at.
    """

    asked: Asked
    folder: Folder
    method: Method
    config: MethodConfig
    given: Vit
    tail: bool
    first: MethodConfig | None
    planned: Plan
    train: Images
    held: Images
    recovery: RecoverConfig | None
    warnings: tuple[str, ...]
    dense_top1: float | None
    progress: Progress | None

    @property
    def dense(self) -> Vit:
        return self.asked.dense

    @property
    def task(self) -> Task:
        return task_of(self.dense.spec)

    @cached_property
    def reference(self) -> Cost:
        """Of the dense model."""
        return cost(self.dense)

    @cached_property
    def weights(self) -> str:
        """Fingerprint of the dense model: a folder can hold others under the same name."""
        return surgery.fingerprint(self.dense)

    @property
    def origin(self) -> dict[str, Any]:
        """Source and first ancestor, handed down from run to run."""
        told, name = self.dense.provenance, self.asked.name
        first = told.get("original") or {"source": name, "spec": self.dense.spec.to_dict()}
        named = name if ":" in name else None  # a name that others can load says more than where that came from
        return {"source": named or told.get("source") or name, "original": first}

    def record(self) -> dict[str, Any]:
        """The resolved config: what a resumed run must agree with. No absolute path."""
        asked = self.asked
        return {
            "schema": 1,
            "vitrim": __version__,
            "model": asked.name,
            "weights": self.weights,
            "method": self.method.name,
            "settings": plain(asked.config),
            "data": {"train": self.train.fingerprint(), "validation": self.held.fingerprint()},
            "recover": None if self.recovery is None else plain(self.recovery),
            "evaluate": plain(asked.judging),
            "measure": None if asked.target is None else plain(asked.target),
            "relative_to": asked.relative_to,
            "exact_tail": self.tail,
            "init": asked.init,
        }


def settled(asked: Asked, folder: Folder, progress: Progress | None) -> Job:
    """The job, or a refusal: of an unreachable budget, of images that would not do, of a dense model that guesses."""
    warnings: list[str] = []

    def warn(text: str) -> None:
        log.warning(text)
        warnings.append(text)

    asked = asked if asked.tail else dataclasses.replace(asked, config=asked.config.without_tail())
    dense, judging = asked.dense, asked.judging
    method = METHODS[method_of(asked.config)]
    config = limited(asked.config, reference_of(dense, asked.relative_to))
    tail = gets_tail(dense.spec, config, wanted=asked.tail)
    given = surgery.exact_tail(dense) if tail else dense
    planned = plan_of(method.name, given.spec, config)
    first = None if asked.init is None else _first_config(asked, method, config, given, warn)
    train, held = _images(asked, planned, warn)
    if method.check is not None:
        method.check(given.spec, config, train)
    recovery = asked.recovery
    if recovery is not None:
        fixed = tuple(dict.fromkeys((*recovery.freeze, *config.freeze)))
        frozen(dense.spec, fixed)
        recovery = dataclasses.replace(recovery, freeze=fixed)
        if len(train) < recovery.batch_size == RecoverConfig().batch_size:  # nobody chose it
            few = max(1, len(train) // 8 * 8 or len(train))
            warn(f"The recovery takes batches of {few}, since there are {len(train)} training images.")
            recovery = dataclasses.replace(recovery, batch_size=few)
        objective_named(recovery, dense, labelled=train.labelled)
        ready(recovery, train)
    top1 = None
    if judging.check_dense and not folder.resume:
        top1 = task_of(dense.spec).refuse_untrained(dense, held, seed=judging.seed, **judging.how)
    return Job(
        asked=asked,
        folder=folder,
        method=method,
        config=config,
        given=given,
        tail=tail,
        first=first,
        planned=planned,
        train=train,
        held=held,
        recovery=recovery,
        warnings=tuple(warnings),
        dense_top1=top1,
        progress=progress,
    )


def _first_config(
    asked: Asked, method: Method, config: MethodConfig, given: Vit, warn: Callable[[str], None]
) -> MethodConfig:
    """The config of `init`, at twice the limits. Raises ConfigError where it does not go with the method or its budget."""
    assert asked.init is not None
    budget = config.budget
    if asked.init == method.name or budget is None:
        raise ConfigError(f"init={asked.init!r}: expected another method than {method.name!r}, and a budget.")
    twice = {key: 2 * value for key, value in budget.to_dict().items()}
    loose = Budget(**{key: min(1.0, value) if key.startswith("keep_") else value for key, value in twice.items()})
    both = {"seed", "freeze", "device", "images"} & {*keys(type(config))} & {*keys(method_named(asked.init).config)}
    shared = {key: value for key in both if (value := getattr(config, key)) not in (None, "auto")}
    first = configure(asked.init, {"budget": loose, **shared})
    first = first if asked.tail else first.without_tail()
    whole = cost(given)
    if not exceeded(whole, loose.limits(whole)):
        warn(f"init={asked.init!r} changes nothing here: the network meets twice the budget as it is.")
    if plan_of(asked.init, given.spec, first)["needs"]["training"]:
        raise ConfigError(f"init={asked.init!r} trains; expected a method of closed forms, such as auto.")
    return first


def _images(asked: Asked, planned: Plan, warn: Callable[[str], None]) -> tuple[Images, Images]:
    """Train and validation; without labels where nothing needs them and they are of other classes."""

    def opened(labelled: bool | None = None) -> tuple[Images, Images]:
        seed = asked.judging.seed
        train, held = (
            rooms.open(asked.data, split=split, seed=seed, labelled=labelled) for split in ("train", "validation")
        )
        return train, held

    train, held = opened()
    learns = asked.recovery is not None and asked.recovery.objective in ("distilled", "supervised")
    if train.labelled or held.labelled:
        try:
            for images in (train, held):
                task_of(asked.dense.spec).check_labels(asked.dense.config, images)
        except DataError as error:
            if planned["needs"]["labels"] or learns:
                raise
            warn(f"Judged without labels, by agreement with the dense model: {error}")
            return opened(labelled=False)
    return train, held


def name_of(model: str | Path | Vit) -> str:
    """What was asked for, without the folders that it lies in."""
    if isinstance(model, Vit):
        return str(model.provenance.get("source") or "a model in memory")
    text = str(model)
    return Path(text).resolve().name if Path(text).exists() else text
