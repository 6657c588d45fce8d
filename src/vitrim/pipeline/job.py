"""A job: everything that one `run` was asked for, checked before anything is written."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

from vitrim import __version__, surgery
from vitrim import data as opened
from vitrim.budget import exceeded
from vitrim.config import keys
from vitrim.counting import Cost, cost
from vitrim.data import Images
from vitrim.errors import ConfigError, DataError
from vitrim.freezing import frozen
from vitrim.methods import METHODS, configure, method_named, method_of, product_for, require_device
from vitrim.methods import plan as plan_of
from vitrim.methods.method import MethodConfig
from vitrim.model import Vit
from vitrim.pipeline.configs import EvaluateConfig, MeasureConfig, RecoverConfig
from vitrim.pipeline.folder import Folder
from vitrim.pipeline.recovery import objective_named
from vitrim.pipeline.reference import gets_tail, limited, reference_of
from vitrim.progress import Progress
from vitrim.result import Compressed, descended
from vitrim.spec import ProductName, product_of
from vitrim.tasks.classification import task_of
from vitrim.tasks.task import Task, named
from vitrim.timing import require_compiler
from vitrim.training import plain, ready
from vitrim.training.config import filled

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
    image_px: tuple[int, int] | None
    compressor: Callable[..., Compressed]


class Job:
    """One run, settled: what was asked, checked and made definite, with the folder that it goes to.

    asked: as the caller said it. method, config: its shares turned into limits. tail: whether the network that the method is
    given, `given`, has an exact tail. first: the config of `init`, or None. train, held: training and validation images.
    product: what the network is for. judging: how networks are compared, by that product unless it names its own.
    warnings: said so far. dense_top1: of the dense model on a few images, where it was looked at.
    """

    def __init__(self, asked: Asked, folder: Folder, progress: Progress | None) -> None:
        """Refuses an unreachable budget, images that would not do, and a dense model that guesses."""
        self.asked = asked = asked if asked.tail else dataclasses.replace(asked, config=asked.config.without_tail())
        self.folder, self.progress = folder, progress
        self.dense = asked.dense
        self.warnings: list[str] = []
        self.method = METHODS[method_of(asked.config)]
        require_device(asked.config)
        self.product = product_for(self.dense.spec, asked.config)
        self.judging = judging = dataclasses.replace(asked.judging, product=asked.judging.product or self._named)
        self.config = limited(asked.config, reference_of(self.dense, asked.relative_to))
        self.tail = gets_tail(self.dense.spec, self.config, wanted=asked.tail)
        self.given = surgery.exact_tail(self.dense) if self.tail else self.dense
        product_of(self.given.spec, judging.product)
        self.planned = plan_of(self.method.name, self.given.spec, self.config)
        self.first = None if asked.init is None else self._first_config(asked.init)
        self.train, self.held = self._images()
        if asked.target is not None and "compile" in asked.target.kinds:
            require_compiler()
        if self.method.check is not None:
            self.method.check(self.given.spec, self.config, self.train)
        self.recovery = None if asked.recovery is None else self._recovery(asked.recovery)
        self.dense_top1: float | None = None
        if judging.check_dense and not folder.resume:
            how = {**judging.how, "seed": judging.seed, "progress": named(progress, "dense, a few images")}
            self.dense_top1 = self.task.refuse_untrained(self.dense, self.held, **how)

    @property
    def _named(self) -> ProductName | None:
        """The product as the method was told it."""
        found: ProductName | None = getattr(self.asked.config, "product", None)
        return found

    @property
    def task(self) -> Task:
        return task_of(self.dense.spec)

    @cached_property
    def has_test_split(self) -> bool:
        """Whether the data on this disk has one; others are not asked, which could fetch a split that nobody wants."""
        data = self.asked.data
        if not isinstance(data, str | Path) or str(data).startswith("hf:"):
            return False
        try:
            opened.open(data, split="test", labelled=self.held.labelled or False)
        except DataError:
            return False
        return True

    @cached_property
    def reference(self) -> Cost:
        """Of the dense model."""
        return cost(self.dense)

    @property
    def original(self) -> tuple[str, Cost] | None:
        """The first network that the dense model was cut from, by name, and its cost; None where it was never cut or does not say."""
        told = self.dense.provenance.get("original")
        if not told or not self.dense.selection.steps:
            return None
        return str(told.get("source")), reference_of(self.dense, "original")

    @cached_property
    def weights(self) -> str:
        """Fingerprint of the dense model: a folder can hold others under the same name."""
        return surgery.fingerprint(self.dense)

    @property
    def origin(self) -> dict[str, Any]:
        """What the dense model says of where it comes from, and itself as the first ancestor."""
        return descended(self.dense.provenance, self.dense.spec, self.asked.name)

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
            **({} if asked.image_px is None else {"image_px": list(asked.image_px)}),
            **({"on_broken": "skip"} if self.train.on_broken == "skip" else {}),
            "recover": None if self.recovery is None else plain(self.recovery),
            "evaluate": plain(self.judging),
            "measure": None if asked.target is None else plain(asked.target),
            "relative_to": asked.relative_to,
            "exact_tail": self.tail,
            "init": asked.init,
            "threads": torch.get_num_threads(),
        }

    def _warn(self, text: str) -> None:
        log.warning(text)
        self.warnings.append(text)

    def _recovery(self, wanted: RecoverConfig) -> RecoverConfig:
        """With the method's frozen parts among its own, and a batch that the images fill. Raises where it cannot begin."""
        freeze = tuple(dict.fromkeys((*wanted.freeze, *self.config.freeze)))
        frozen(self.dense.spec, freeze)
        learns_answers = wanted.objective in ("distilled", "supervised")
        product = wanted.product if learns_answers else wanted.product or self._named
        wanted = dataclasses.replace(wanted, freeze=freeze, product=product)
        wanted, said = filled(wanted, len(self.train))
        for text in said:
            self._warn(f"Recovery: {text}")
        product_of(self.given.spec, product)
        objective_named(wanted, self.dense, labelled=self.train.labelled)
        ready(wanted, self.train)
        return wanted

    def _first_config(self, init: str) -> MethodConfig:
        """The config of `init`, at twice the limits. Raises ConfigError where it does not go with the method or its budget."""
        config, budget = self.config, self.config.budget
        if init == self.method.name or budget is None:
            raise ConfigError(f"init={init!r}: expected another method than {self.method.name!r}, and a budget.")
        twice = {key: 2 * value for key, value in budget.to_dict().items()}
        capped = {key: min(1.0, value) if key.startswith("keep_") else value for key, value in twice.items()}
        loose = dataclasses.replace(budget, **capped)
        both = (
            {"seed", "freeze", "device", "images", "product"}
            & {*keys(type(config))}
            & {*keys(method_named(init).config)}
        )
        shared = {key: value for key in both if (value := getattr(config, key)) not in (None, "auto")}
        first: MethodConfig = configure(init, {"budget": loose, **shared})
        first = first if self.asked.tail else first.without_tail()
        whole = cost(self.given)
        if not exceeded(whole, loose.limits(whole)):
            self._warn(f"init={init!r} changes nothing here: the network meets twice the budget as it is.")
        if plan_of(init, self.given.spec, first)["needs"]["training"]:
            raise ConfigError(f"init={init!r} trains; expected a method of closed forms, such as auto.")
        return first

    def _images(self) -> tuple[Images, Images]:
        """Train and validation; without labels where nothing needs them and they are of other classes."""
        asked = self.asked

        def split_of(split: str, labelled: bool | None = None) -> Images:
            return opened.open(asked.data, split=split, seed=asked.judging.seed, labelled=labelled)

        train, held = split_of("train"), split_of("validation")
        learns = asked.recovery is not None and asked.recovery.objective in ("distilled", "supervised")
        if not (train.labelled or held.labelled):
            return train, held
        try:
            for images in (train, held):
                self.task.check_labels(self.dense.config, images)
        except DataError as error:
            if self.planned["needs"]["labels"] or learns:
                raise
            self._warn(f"Judged without labels, by agreement with the dense model: {error}")
            return split_of("train", False), split_of("validation", False)
        return train, held


def name_of(model: str | Path | Vit) -> str:
    """What was asked for, without the folders that it lies in."""
    if isinstance(model, Vit):
        return str(model.provenance.get("source") or "a model in memory")
    text = str(model)
    return Path(text).resolve().name if Path(text).exists() else text
