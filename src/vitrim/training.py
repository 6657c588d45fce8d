"""The one training loop, on Accelerate: into it a method, a recovery or plain training plugs an objective.

The loop owns devices and processes, mixed precision, accumulation, clipping, the schedule, EMA, mixing of images,
logs, the stop at a loss that is no number, and checkpoints. The objective says what is learned and how that is scored.

Every random draw is keyed: order and augmentation by (seed, epoch, sample), all else by (seed, step, micro-batch, rank).
So a run that was killed and resumed goes the way of one that was not, and a checkpoint holds no generator's state.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import accelerate
import numpy as np
import pydantic
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from pydantic import Field
from timm.data.mixup import Mixup
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import checkpoints
from .codec import flat, plain
from .data import Augment, Images, batches
from .data.draws import mix, seeded
from .data.transforms import training as training_transform
from .errors import ConfigError, DataError, TrainingError, did_you_mean
from .files import sync_file
from .model import Vit
from .spec import spec_hash

Progress = Callable[..., None]
"""`progress(stage, done, total, **facts)`."""

LEAST_BETWEEN = 50
"""Steps between two validations of a run whose epochs are shorter."""
AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_MICRO_BATCH = 0x6D62  # keeps these draws apart from the data's with the same seed


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=pydantic.ConfigDict(extra="forbid"))
class TrainConfig:
    """How a network is trained. `read_config` makes one from JSON values; `batch_size` counts the images of all processes."""

    epochs: float = Field(default=30.0, gt=0)
    """Passes over the training images; of no account where `steps` is given."""
    steps: int | None = Field(default=None, ge=1)
    """Optimiser steps of the whole run; None: as many as `epochs` makes."""
    batch_size: int = Field(default=128, ge=1)
    """Images that one optimiser step sees, over all processes and micro-batches."""
    accumulate: int = Field(default=1, ge=1)
    """Micro-batches of one step: more need less memory and give the same gradients."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: float = Field(default=1e-3, gt=0)
    """Learning rate at the top of the schedule."""
    min_lr: float = Field(default=1e-5, ge=0)
    """Learning rate at the end of the cosine."""
    warmup: float = Field(default=0.05, ge=0, lt=1)
    """Share of the run in which the learning rate rises from zero."""
    weight_decay: float = Field(default=0.05, ge=0)
    """Of matrices and kernels; vectors, tokens and position tables have none."""
    clip: float | None = Field(default=1.0, gt=0)
    """Largest norm of the gradient; None: as it comes."""
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    """Keep a running mean of the weights, and validate and return that; None: the weights themselves."""
    amp: Literal["no", "bf16", "fp16"] = "no"
    """Precision of the products; weights stay float32. fp16 needs a GPU."""
    smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of each target that is spread over all classes."""
    mixup: float = Field(default=0.0, ge=0)
    """Alpha of mixup; 0: none."""
    cutmix: float = Field(default=0.0, ge=0)
    """Alpha of cutmix; 0: none. With both, each batch takes one of them."""
    mix_share: float = Field(default=1.0, ge=0, le=1)
    """Share of the batches that are mixed at all."""
    augment: Augment = Augment()
    """What happens to a single image."""
    seed: int = Field(default=0, ge=0)
    workers: int = Field(default=0, ge=0)
    """Processes that decode images; 0: this one. Changes no result."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    world_size: int = Field(default=1, ge=1)
    """Processes that torchrun must have started."""
    grad_checkpoint: bool = False
    """Recompute the blocks in the backward pass: less memory, a third more time."""
    eval_every: int | None = Field(default=None, ge=1)
    """Steps between validations; None: one at the end of each epoch, but at least 50 steps apart: an epoch of few images is
    shorter than a validation. There is always one at the end."""
    log_every: int = Field(default=20, ge=1)
    """Steps between lines of metrics.jsonl."""
    checkpoint_seconds: float = Field(default=180.0, ge=0)
    """Time between checkpoints; 0: one at each step."""
    tracker: str | None = None
    """Another place for the metrics, by its name in accelerate: "tensorboard", "wandb", ..."""

    def __post_init__(self) -> None:
        parts = self.accumulate * self.world_size
        if self.batch_size % parts:
            raise ConfigError(
                f"batch_size={self.batch_size} does not divide into accumulate={self.accumulate} micro-batches on "
                f"world_size={self.world_size} processes; expected a multiple of {parts}."
            )
        if (self.mixup or self.cutmix) and self.micro_batch % 2:
            raise ConfigError(
                f"mixup and cutmix pair the images of a micro-batch, which has {self.micro_batch}; expected an even "
                f"number. Change batch_size or accumulate, or set mixup=0 and cutmix=0."
            )
        if self.min_lr > self.lr:
            raise ConfigError(f"min_lr={self.min_lr!r} above lr={self.lr!r}; expected at most that.")

    @property
    def micro_batch(self) -> int:
        """Images that one process takes at a time."""
        return self.batch_size // (self.accumulate * self.world_size)

    def total_steps(self, images: int) -> int:
        """Optimiser steps of the run on so many images."""
        return self.steps or max(1, round(self.epochs * (images // self.batch_size)))


C = TypeVar("C")


def read_config(kind: type[C], values: Mapping[str, Any], *, where: str = "config") -> C:
    """A config from plain values. Raises ConfigError that names the key, with the near miss, or what was expected."""
    known = [f.name for f in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            raise ConfigError(
                f"{where}: unknown key {key!r}{did_you_mean(str(key), known)}. Known: {', '.join(known)}."
            )
    try:
        return kind(**values)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        given = f"{place}={first['input']!r}: " if place else ""  # what concerns several keys names them itself
        raise ConfigError(f"{where}: {given}{first['msg'].removeprefix('Value error, ')}") from None


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """Where a run is. index: optimiser steps done before this one. micro: micro-batch within it, on this process."""

    index: int
    total: int
    epoch: int
    micro: int = 0
    micros: int = 1
    rank: int = 0
    world: int = 1

    @property
    def share(self) -> float:
        """Share of the run that is done, in [0, 1): what ramps and temperatures are functions of."""
        return self.index / self.total


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """One micro-batch. images: B C h w, perhaps mixed; labels: B int64, or B classes where mixed or multi-label, or None."""

    images: Tensor
    labels: Tensor | None


class Objective(Protocol):
    """What is learned. Only `model(...)`, the wrapped model's forward, may be called in `loss`."""

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Groups for the optimiser, as torch has them; called once, with the model on its device.

        "lr" is the group's own top of the schedule, "schedule": "constant" keeps it there. Tensors that are not the
        model's own may be among them: the loop averages their gradients over the processes.
        """

    def loss(self, model: nn.Module, batch: Batch, step: Step) -> Tensor:
        """The scalar to be lowered: a mean over the images of the batch."""

    def after_backward(self, step: Step) -> None:
        """Once a step, when gradients are whole and not yet clipped."""

    def after_step(self, step: Step) -> None:
        """Once a step, after the optimiser's."""

    def phase(self, step: Step) -> str:
        """Name of the part of the run, for logs."""

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs, as tensors and JSON values."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse; called after `param_groups`."""

    def metrics(self) -> dict[str, float]:
        """Figures of the latest step, for logs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FitResult:
    """model: the one that was given, trained, in eval mode. history: the lines of metrics.jsonl."""

    model: Vit
    history: list[dict[str, Any]]
    steps: int
    seconds: float

    @property
    def images_per_s(self) -> float | None:
        """The median speed of the training steps that were logged; None where none was."""
        speeds = [line["images_per_s"] for line in self.history if line["kind"] == "train"]
        return statistics.median(speeds) if speeds else None


# ---------------------------------------------------------------------------------------------------------- the loop


def fit(
    model: Vit,
    objective: Objective,
    images: Images,
    config: TrainConfig,
    *,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    label_map: Tensor | None = None,
    validate: Callable[[Vit], Mapping[str, Any]] | None = None,
    progress: Progress | None = None,
) -> FitResult:
    """Train `model` in place and give it back on its device of before, in eval mode.

    out: folder for metrics.jsonl and checkpoints; None: nothing is written. resume: go on from the newest checkpoint
    there, or start if there is none. label_map: the model's class for each class of the data. validate: scores the model (its EMA, if there is one) now and then.
    Raises TrainingError on a loss that is no number (the model then holds the last good state, which is also written),
    on too little memory, on a run that does not fit the one to be resumed, and on a wrong number of processes.
    """
    with _left_as_found(model):
        run = _Run(model, objective, images, config, Path(out) if out is not None else None, progress)
        run.label_map = label_map
        try:
            run.start(resume=resume)
            run.loop(validate)
            return run.result()
        finally:
            run.close()


class _Run:
    """The state of one `fit`."""

    def __init__(
        self,
        model: Vit,
        objective: Objective,
        images: Images,
        config: TrainConfig,
        out: Path | None,
        progress: Progress | None,
    ) -> None:
        self.bare, self.objective, self.images, self.config, self.out = model, objective, images, config, out
        self.progress = progress
        ready(config, images)
        self.epoch_steps = len(images) // config.batch_size
        self.total = config.total_steps(len(images))
        if model.config.preprocess is None:
            raise DataError("the model does not say how images are prepared; give its config a Preprocess.")
        self.transform = training_transform(model.config.preprocess, config.augment)
        self.accelerator = _accelerator(config, out)
        self.first = next(p for p in model.parameters())
        self.wrapped: nn.Module = model
        self.done = 0
        self.seconds = 0.0
        self.history: list[dict[str, Any]] = []
        self.data = images.fingerprint()["sha256"]
        self.label_map: Tensor | None = None
        self.mixer = (
            Mixup(
                mixup_alpha=config.mixup,
                cutmix_alpha=config.cutmix,
                prob=config.mix_share,
                label_smoothing=0.0,
                num_classes=config.micro_batch,
            )
            if config.mixup or config.cutmix
            else None
        )

    @property
    def main(self) -> bool:
        return self.accelerator.is_main_process

    # ------------------------------------------------------------------------------------------------ start and end

    def start(self, *, resume: bool) -> None:
        """Put everything on its device, and take up the newest checkpoint if there is one."""
        config = self.config
        self.bare.to(self.accelerator.device)
        groups = self.objective.param_groups(self.bare)
        for group in groups:
            group.setdefault("lr", config.lr)
            group["top_lr"] = group["lr"]
            group.setdefault("schedule", "cosine")
        kinds = {
            "adamw": lambda: torch.optim.AdamW(groups, weight_decay=config.weight_decay, fused=True),
            "sgd": lambda: torch.optim.SGD(groups, momentum=0.9, nesterov=True, weight_decay=config.weight_decay),
        }
        optimizer = kinds[config.optimizer]()
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        own = {id(p) for p in self.bare.parameters()}
        self.foreign = [p for p in self.parameters if id(p) not in own]
        self.ema = (
            {k: t.detach().clone() for k, t in self.bare.state_dict().items()} if config.ema_decay is not None else None
        )
        self.bare.grad_checkpoint = config.grad_checkpoint
        self.wrapped = self.accelerator.prepare_model(self.bare)
        self.optimizer = self.accelerator.prepare_optimizer(optimizer)
        if self.out is not None:
            self._take_up(self.out, resume=resume)
        if config.tracker is not None:
            self.accelerator.init_trackers("vitrim", config=flat(plain(config)))

    def _take_up(self, out: Path, *, resume: bool) -> None:
        folder = out / "checkpoints"
        if self.main:
            checkpoints.sweep(folder)
        self.accelerator.wait_for_everyone()
        found = checkpoints.newest(folder)
        if found is not None and not resume:
            raise TrainingError(
                f"{out.name}/ holds a run already ({found.name}); nothing is overwritten. "
                "Pass resume=True (--resume) to go on with it, or choose another folder."
            )
        if found is not None:
            tensors, values = checkpoints.read(found)
            self._load(tensors, values, found.name)
        self.accelerator.wait_for_everyone()
        if self.main:
            try:
                out.mkdir(parents=True, exist_ok=True)
                (out / "metrics.jsonl").touch()  # says from the first moment that a training lives here
            except OSError as error:
                raise TrainingError(
                    f"{out.name}/ cannot be written ({error.strerror}); expected a folder of your own. Choose another."
                ) from error
            self.history = _cut_back(out / "metrics.jsonl", self.done)
        self.last_saved = time.monotonic()

    def close(self) -> None:
        """Unwrap the model and let go of the trackers."""
        for tracker in self.accelerator.trackers:
            tracker.finish()
        for name in ("_original_forward", "forward", "_is_accelerate_prepared"):
            self.bare.__dict__.pop(name, None)

    def result(self) -> FitResult:
        if self.ema is not None:
            self.bare.load_state_dict(self.ema)
        return FitResult(model=self.bare, history=self.history, steps=self.done, seconds=self.seconds)

    # ------------------------------------------------------------------------------------------------------- stepping

    def loop(self, validate: Callable[[Vit], Mapping[str, Any]] | None) -> None:
        """Steps to the end, with logs, validations and checkpoints between them."""
        config = self.config
        began = time.monotonic()
        while self.done < self.total:
            for micros in self._steps_of_epoch():
                facts = self._step(micros)
                self.done += 1
                took = time.monotonic() - began
                self.seconds += took
                last = self.done == self.total
                facts["images_per_s"] = config.batch_size / took
                if self.done % config.log_every == 0 or last:
                    self._log({"kind": "train", **facts})
                if self.progress is not None and self.main:
                    left = self.seconds / self.done * (self.total - self.done)
                    self.progress("train", self.done, self.total, seconds_left=left, **facts)
                every = config.eval_every or self.epoch_steps * math.ceil(LEAST_BETWEEN / self.epoch_steps)
                if validate is not None and (last or self.done % every == 0):
                    self._validate(validate)
                if self.out is not None and (last or time.monotonic() - self.last_saved >= config.checkpoint_seconds):
                    self._save()
                if last:
                    return
                began = (
                    time.monotonic()
                )  # the next step's images are part of its time; validations and checkpoints are not

    def _steps_of_epoch(self) -> Iterator[list[tuple[Tensor, Tensor | None]]]:
        """Micro-batches of this process, for each step that is left of the epoch."""
        config, world, rank = self.config, self.accelerator.num_processes, self.accelerator.process_index
        epoch, skipped = divmod(self.done, self.epoch_steps)
        stream = batches(
            self.images,
            self.transform,
            config.batch_size // config.accumulate,
            seed=config.seed,
            epoch=epoch,
            shuffle=True,
            workers=config.workers,
            start=skipped * config.accumulate,
            drop_last=True,
            shard=(rank, world),
            device=self.accelerator.device,
        )
        for _ in range(self.epoch_steps - skipped):  # the micro-batches of a last, partial step are left out
            yield [next(stream) for _ in range(config.accumulate)]

    def _step(self, micros: list[tuple[Tensor, Tensor | None]]) -> dict[str, Any]:
        """One optimiser step; gives its figures. Nothing is changed where the loss is no number."""
        config, accelerator = self.config, self.accelerator
        base = Step(
            index=self.done,
            total=self.total,
            epoch=self.done // self.epoch_steps,
            micros=len(micros),
            rank=accelerator.process_index,
            world=accelerator.num_processes,
        )
        height = schedule(base.index, base.total, config.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = group["top_lr"]
            if group["schedule"] == "cosine":
                low = min(config.min_lr, group["top_lr"])
                group["lr"] = low + (group["top_lr"] - low) * height
        self.wrapped.train()
        total = torch.zeros(
            (), device=accelerator.device, dtype=torch.float64 if accelerator.device.type != "mps" else None
        )
        for m, (x, y) in enumerate(micros):
            step = dataclasses.replace(base, micro=m)
            last = m == len(micros) - 1
            with self._keyed(step), self._attention(), nullcontext() if last else accelerator.no_sync(self.wrapped):
                batch = self._batch(x, y)
                try:
                    with accelerator.autocast():
                        loss = self.objective.loss(self.wrapped, batch, step)
                    total += loss.detach().to(total.dtype) / len(micros)
                    accelerator.backward(loss / len(micros))
                except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                    if not _is_out_of_memory(error):
                        raise
                    raise self._too_big(batch, step) from error
        self._average_foreign()
        mean = float(accelerator.reduce(total, reduction="mean"))
        if not math.isfinite(mean):
            self._stop(f"the loss became {mean}")
        accelerator.unscale_gradients()
        self.objective.after_backward(base)
        limit = config.clip if config.clip is not None else math.inf
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, limit))
        if not math.isfinite(norm) and config.amp != "fp16":  # the scaler of fp16 skips such steps itself
            self._stop(f"the gradient became {norm}")
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.ema is not None:
            self._update_ema()
        self.objective.after_step(base)
        facts = {"loss": mean, "lr": self.optimizer.param_groups[0]["lr"], "grad_norm": norm, "epoch": base.epoch}
        return {**facts, "phase": self.objective.phase(base), **self.objective.metrics()}

    def _attention(self) -> AbstractContextManager[None]:
        """On a CPU the fused kernel's backward takes half of a step with short sequences: plain products are faster there."""
        short = math.prod(self.bare.spec.grid) <= 256
        plain = self.accelerator.device.type == "cpu" and short
        return sdpa_kernel(SDPBackend.MATH) if plain else nullcontext()

    @contextmanager
    def _keyed(self, step: Step) -> Iterator[None]:
        key = (_MICRO_BATCH, self.config.seed, step.index, step.micro, step.rank)
        with seeded(*key):
            if self.accelerator.device.type == "cuda":
                torch.cuda.manual_seed(int(mix(*key)[0]) & 0x7FFFFFFFFFFFFFFF)
            yield

    def _batch(self, x: Tensor, y: Tensor | None) -> Batch:
        device = self.accelerator.device
        x = x.to(device, self.first.dtype, non_blocking=True)
        y = None if y is None else mapped(y, self.label_map, self.bare.spec.classes).to(device, non_blocking=True)
        if self.mixer is None:
            return Batch(images=x, labels=y)
        # numbering the images as if each were a class makes timm say who was mixed with whom: B B
        x, shares = self.mixer(x, torch.arange(len(x), device=device))
        classes = self.bare.spec.classes
        if y is None or classes is None:
            return Batch(images=x, labels=None)
        if y.dim() == 1:
            if int(y.max()) >= classes:
                raise DataError(
                    f"label {int(y.max())} for a model of {classes} classes; expected less, to mix labels. "
                    "Set mixup=0 and cutmix=0, or match the classes (label_map)."
                )
            y = nn.functional.one_hot(y, classes)
        return Batch(images=x, labels=shares.to(x.dtype) @ y.to(x.dtype))

    def _average_foreign(self) -> None:
        """Gradients that the data-parallel wrapper does not know of, averaged as it averages its own."""
        if self.accelerator.num_processes == 1:
            return
        for parameter in self.foreign:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad.copy_(self.accelerator.reduce(parameter.grad, reduction="mean"))

    @torch.no_grad()
    def _update_ema(self) -> None:
        assert self.ema is not None
        assert self.config.ema_decay is not None
        decay = min(self.config.ema_decay, (1 + self.done) / (10 + self.done))  # young means forget faster
        for name, tensor in self.bare.state_dict().items():
            if tensor.is_floating_point():
                self.ema[name].lerp_(tensor, 1 - decay)
            else:
                self.ema[name].copy_(tensor)

    # ---------------------------------------------------------------------------------------- logs, checkpoints, stops

    def _validate(self, validate: Callable[[Vit], Mapping[str, Any]]) -> None:
        if self.main:
            live = None
            if self.ema is not None:
                live = {k: t.detach().clone() for k, t in self.bare.state_dict().items()}
                self.bare.load_state_dict(self.ema)
            self.bare.eval()
            found = {k: v for k, v in validate(self.bare).items() if isinstance(v, (int, float, str))}
            if live is not None:
                self.bare.load_state_dict(live)
            self._log({"kind": "validate", **found})
            if self.progress is not None:
                self.progress("validate", self.done, self.total, **found)
        self.accelerator.wait_for_everyone()

    def _log(self, line: dict[str, Any]) -> None:
        if not self.main:
            return
        line = {"step": self.done, "seconds": round(self.seconds, 3), **line}
        self.history.append(line)
        if self.out is not None:
            with (self.out / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        numbers = {f"{line['kind']}/{k}": v for k, v in line.items() if isinstance(v, (int, float)) and k != "step"}
        if self.config.tracker is not None:
            self.accelerator.log(numbers, step=self.done)

    def _save(self) -> None:
        assert self.out is not None
        if self.main:
            metrics = self.out / "metrics.jsonl"
            if metrics.exists():
                sync_file(metrics)  # a checkpoint never knows of lines that the disk does not
            optimizer = self.optimizer.state_dict()
            parts = {
                "model": self.bare.state_dict(),
                "ema": self.ema or {},
                "optimizer": {str(k): v for k, v in optimizer["state"].items()},
                "objective": self.objective.state_dict(),
                "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else {},
            }
            tensors: dict[str, Tensor] = {}
            values: dict[str, Any] = {"seconds": self.seconds, "run": self._identity()}
            for name, part in parts.items():
                held, values[name] = checkpoints.pack(name, part)
                tensors.update(held)
            checkpoints.write(self.out / "checkpoints", self.done, tensors, values)
        self.last_saved = time.monotonic()
        self.accelerator.wait_for_everyone()

    def _load(self, tensors: dict[str, Tensor], values: dict[str, Any], name: str) -> None:
        for key, now in self._identity().items():
            if values["run"].get(key) != now:
                raise TrainingError(
                    f"{name} is of another run: {key} was {values['run'].get(key)!r} and is {now!r}. "
                    "Resume with the same settings and data, or choose another folder."
                )
        parts = {
            part: checkpoints.unpack(part, tensors, values[part])
            for part in ("model", "ema", "optimizer", "objective", "scaler")
        }
        self.bare.load_state_dict(parts["model"])
        if self.ema is not None:
            for key, tensor in parts["ema"].items():
                self.ema[key].copy_(tensor)
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict(
            {"state": {int(k): v for k, v in parts["optimizer"].items()}, "param_groups": groups}
        )
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(parts["scaler"])
        self.objective.load_state_dict(parts["objective"])
        self.done, self.seconds = values["step"], values["seconds"]

    def _identity(self) -> dict[str, Any]:
        """What must agree for a checkpoint to be this run's: everything that changes the numbers."""
        free = ("workers", "device", "eval_every", "log_every", "checkpoint_seconds", "tracker", "grad_checkpoint")
        config = {k: v for k, v in flat(plain(self.config)).items() if k not in free}
        return {**config, "total steps": self.total, "spec": spec_hash(self.bare.spec), "data": self.data}

    def _stop(self, why: str) -> None:
        """End a run that went astray. Weights and checkpoint are those of the last good step."""
        self.optimizer.zero_grad()
        kept = "the model holds the state before that step"
        if self.out is not None and self.done:
            self._save()
            kept = f"the state before it is kept in {self.out.name}/checkpoints"
        lr = self.optimizer.param_groups[0]["lr"]
        raise TrainingError(
            f"{why} at step {self.done + 1} of {self.total} (lr {lr:.3g}, amp {self.config.amp!r}); {kept}. "
            "Lower lr, set clip, or train with amp='no'; check the images if it happens at once."
        )

    def _too_big(self, batch: Batch, step: Step) -> TrainingError:
        """Find by trial how many images at a time would fit."""
        tried = len(batch.images)
        fits = tried // 2
        while fits:
            self.optimizer.zero_grad()
            if self.accelerator.device.type == "cuda":
                torch.cuda.empty_cache()
            part = Batch(images=batch.images[:fits], labels=None if batch.labels is None else batch.labels[:fits])
            try:
                with self.accelerator.autocast():
                    self.objective.loss(self.bare, part, step).backward()
                break
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                if not _is_out_of_memory(error):
                    raise
                fits //= 2
        self.optimizer.zero_grad()
        device = self.accelerator.device.type
        if not fits:
            return TrainingError(
                f"out of memory on {device} with {tried} images at a time, and one image does not fit either. "
                "Set grad_checkpoint=True, use amp='bf16', or train a smaller model."
            )
        parts = next(n for n in range(math.ceil(tried / fits), tried + 1) if tried % n == 0) * self.config.accumulate
        return TrainingError(
            f"out of memory on {device} with {tried} images at a time; {fits} would fit. "
            f"Set accumulate={parts} to keep batch_size={self.config.batch_size}, or grad_checkpoint=True."
        )


def schedule(index: int, total: int, warmup: float) -> float:
    """Height of the learning rate at a step, in (0, 1]: a line up over the share `warmup`, then half a cosine down."""
    rising = round(warmup * total)
    if index < rising:
        return (index + 1) / (rising + 1)  # no step is taken with a rate of zero
    return 0.5 * (1 + math.cos(math.pi * (index - rising) / max(1, total - rising)))


def ready(config: TrainConfig, images: Images) -> None:
    """Raise what can be said before a run begins: TrainingError where this machine cannot do it, DataError for too few images."""
    found = int(os.environ.get("WORLD_SIZE", "1"))
    if found != config.world_size:
        raise TrainingError(
            f"world_size={config.world_size} was asked for, and {found} process(es) run. Start with "
            f"`torchrun --standalone --nproc-per-node {config.world_size} ...` (accelerate launch --cpu starts one, silently)."
        )
    if config.device not in ("auto", "cpu") and not getattr(torch, config.device).is_available():
        raise TrainingError(f"device={config.device!r}: torch finds none here. Use device='cpu' or 'auto'.")
    if config.amp == "fp16" and (config.device == "cpu" or not torch.cuda.is_available()):
        raise TrainingError("amp='fp16' needs a GPU. On a CPU use amp='bf16' or amp='no'.")
    if len(images) < config.batch_size:
        raise DataError(
            f"{images.name}: {len(images)} training images for batch_size={config.batch_size}; "
            "expected at least one full batch. Lower batch_size or give more images."
        )


def _accelerator(config: TrainConfig, out: Path | None) -> accelerate.Accelerator:
    if config.tracker is not None and out is None:
        raise TrainingError(f"tracker={config.tracker!r} needs a folder for its files; pass out= (--out).")
    try:
        return accelerate.Accelerator(
            cpu=config.device == "cpu",
            mixed_precision=config.amp,
            log_with=config.tracker,
            project_dir=out,
            kwargs_handlers=[accelerate.DistributedDataParallelKwargs(find_unused_parameters=True)],
        )
    except ValueError as error:
        raise TrainingError(f"accelerate refused the settings: {' '.join(str(error).split())}") from error


@contextmanager
def _left_as_found(model: Vit) -> Iterator[None]:
    """Put back generators, threads, the model's mode and device, and whatever Accelerate keeps for the whole process."""
    shared = (PartialState._shared_state, AcceleratorState._shared_state, GradientState._shared_state)
    kept = [dict(state) for state in shared]
    generators = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    threads, checkpointed, device = torch.get_num_threads(), model.grad_checkpoint, next(model.parameters()).device
    for state in shared[1:]:
        state.clear()
    if "WORLD_SIZE" not in os.environ:
        shared[0].clear()  # with torchrun it holds the process group, which the next `fit` needs again
    try:
        yield
    finally:
        for state, before in zip(shared, kept, strict=True):
            if before or "WORLD_SIZE" not in os.environ or state is not shared[0]:
                state.clear()
                state.update(before)
        random.setstate(generators[0])
        np.random.set_state(generators[1])
        torch.set_rng_state(generators[2])
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        model.grad_checkpoint = checkpointed
        model.to(device).eval()
        for parameter in model.parameters():
            parameter.grad = None


def mapped(labels: Tensor, label_map: Tensor | None, classes: int | None) -> Tensor:
    """Labels of the data in the model's numbering.  B int64, or B data-classes -> B model-classes."""
    if label_map is None or classes is None:
        return labels
    label_map = label_map.to(labels.device)
    if labels.dim() == 1:
        return label_map[labels]
    return labels.new_zeros(len(labels), classes).index_copy_(1, label_map, labels)


def _cut_back(path: Path, step: int) -> list[dict[str, Any]]:
    """Lines up to the step. What a killed run wrote after its checkpoint leaves the file: it will come again."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:  # the line that was being written when the run was killed
            break
        if line["step"] > step:
            break
        lines.append(line)
    checkpoints.replace_text(path, "".join(json.dumps(line) + "\n" for line in lines))
    return lines


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return "can't allocate memory" in str(error) or "not enough memory" in str(error)
