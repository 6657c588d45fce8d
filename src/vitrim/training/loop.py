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
import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import accelerate
import torch
from timm.data.mixup import Mixup
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from vitrim import checkpoints, processes
from vitrim.codec import flat, plain
from vitrim.data import Images, batches
from vitrim.data.draws import mix, seeded
from vitrim.data.transforms import UNPREPARED
from vitrim.data.transforms import training as training_transform
from vitrim.errors import DataError, TrainingError, is_out_of_memory
from vitrim.files import locked
from vitrim.model import Vit, not_finite
from vitrim.progress import Progress
from vitrim.training.config import TrainConfig
from vitrim.training.objective import Batch, Objective, Step
from vitrim.training.state import METRICS, State, identity, left_as_found

LEAST_BETWEEN = 50
"""Steps between two validations of a run whose epochs are shorter."""
AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_GONE = re.compile(r"gloo|connection (closed|reset|refused)|broken pipe", re.IGNORECASE)  # torch has no type for it
_MICRO_BATCH = 0x6D62  # keeps these draws apart from the data's with the same seed


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
    place = None if out is None else Path(out)
    with left_as_found(model), locked(place):
        run = _Run(model, objective, images, config, place, label_map, progress)
        try:
            with _together(config):
                run.start(resume=resume)
                run.loop(validate)
            return run.result()
        except BaseException:
            run.state_left_empty()
            raise
        finally:
            run.close()


@dataclass
class _Run:
    """The state of one `fit`."""

    bare: Vit
    objective: Objective
    images: Images
    config: TrainConfig
    out: Path | None
    label_map: Tensor | None
    progress: Progress | None

    def __post_init__(self) -> None:
        config, count = self.config, len(self.images)
        ready(config, self.images)
        self.epoch_steps, self.total = count // config.batch_size, config.total_steps(count)
        if self.bare.config.preprocess is None:
            raise DataError(UNPREPARED)
        self.transform = training_transform(self.bare.config.preprocess, config.augment)
        self.accelerator = _accelerator(config, self.out)
        self.first = next(self.bare.parameters())
        self.wrapped: nn.Module = self.bare
        self.history: list[dict[str, Any]] = []
        self.began = False  # whether this process writes to `out`
        self.mixer = None
        if config.mixup or config.cutmix:
            alphas = {"mixup_alpha": config.mixup, "cutmix_alpha": config.cutmix, "prob": config.mix_share}
            self.mixer = Mixup(**alphas, label_smoothing=0.0, num_classes=config.micro_batch)

    @property
    def main(self) -> bool:
        return self.accelerator.is_main_process

    # ------------------------------------------------------------------------------------------------ start and end

    def start(self, *, resume: bool) -> None:
        """Put everything on its device, and take up the newest checkpoint if there is one."""
        config = self.config
        self.bare.to(self.accelerator.device)
        groups = [{"lr": config.lr, "schedule": "cosine", **g} for g in self.objective.param_groups(self.bare)]
        for group in groups:
            group["top_lr"] = group["lr"]
        kinds = {
            "adamw": lambda: torch.optim.AdamW(groups, weight_decay=config.weight_decay, fused=True),
            "sgd": lambda: torch.optim.SGD(groups, momentum=0.9, nesterov=True, weight_decay=config.weight_decay),
        }
        optimizer = kinds[config.optimizer]()
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        own = {id(p) for p in self.bare.parameters()}
        self.foreign = [p for p in self.parameters if id(p) not in own]
        self.bare.grad_checkpoint = config.grad_checkpoint
        self.wrapped = self.accelerator.prepare_model(self.bare)
        self.optimizer = self.accelerator.prepare_optimizer(optimizer)
        mean = config.ema_decay is not None
        self.state = State(
            accelerator=self.accelerator,
            model=self.bare,
            ema={k: t.detach().clone() for k, t in self.bare.state_dict().items()} if mean else None,
            optimizer=self.optimizer,
            objective=self.objective,
            identity=identity(config, self.bare, steps=self.total, data=self.images.fingerprint()["sha256"]),
        )
        if self.out is not None:
            self.history = self.state.take_up(self.out, resume=resume)
            self.began = self.main
            self.last_saved = time.monotonic()
        if config.tracker is not None:
            self.accelerator.init_trackers("vitrim", config=flat(plain(config)))

    def close(self) -> None:
        """Unwrap the model and let go of the trackers."""
        for tracker in self.accelerator.trackers:
            tracker.finish()
        for name in ("_original_forward", "forward", "_is_accelerate_prepared"):
            self.bare.__dict__.pop(name, None)

    def state_left_empty(self) -> None:
        """A run that ends before its first checkpoint leaves nothing to go on from, and no lines that stand in the way."""
        if self.out is None or not self.began or checkpoints.newest(self.out / "checkpoints") is not None:
            return
        (self.out / METRICS).unlink(missing_ok=True)
        for place in (self.out / "checkpoints", self.out):
            with suppress(OSError):  # not there, or something else is in it
                place.rmdir()

    def result(self) -> FitResult:
        if self.state.ema is not None:
            self.bare.load_state_dict(self.state.ema)
        return FitResult(model=self.bare, history=self.history, steps=self.state.done, seconds=self.state.seconds)

    # ------------------------------------------------------------------------------------------------------- stepping

    def loop(self, validate: Callable[[Vit], Mapping[str, Any]] | None) -> None:
        """Steps to the end, with logs, validations and checkpoints between them."""
        config = self.config
        began = time.monotonic()
        if self.progress is not None and self.main and self.state.done < self.total:
            self.progress("train", self.state.done, self.total)  # the first step may take a minute
        while self.state.done < self.total:
            for micros in self._steps_of_epoch():
                facts = self._step(micros)
                self.state.done += 1
                took = time.monotonic() - began
                self.state.seconds += took
                last = self.state.done == self.total
                facts["images_per_s"] = config.batch_size / took
                if self.state.done % config.log_every == 0 or last:
                    self._log({"kind": "train", **facts})
                if self.progress is not None and self.main:
                    left = self.state.seconds / self.state.done * (self.total - self.state.done)
                    self.progress("train", self.state.done, self.total, seconds_left=left, **facts)
                every = config.eval_every or self.epoch_steps * math.ceil(LEAST_BETWEEN / self.epoch_steps)
                judged = validate is not None and (last or self.state.done % every == 0)
                kept = self.out is not None and (
                    last or time.monotonic() - self.last_saved >= config.checkpoint_seconds
                )
                if judged or kept or last:
                    self._refuse_astray()
                if judged:
                    assert validate is not None
                    self._validate(validate)
                if kept:
                    assert self.out is not None
                    self.state.write(self.out)
                    self.last_saved = time.monotonic()
                if last:
                    return
                began = time.monotonic()  # the next step's images are part of its time, validations and checkpoints not

    def _steps_of_epoch(self) -> Iterator[list[tuple[Tensor, Tensor | None]]]:
        """Micro-batches of this process, for each step that is left of the epoch."""
        config, world, rank = self.config, self.accelerator.num_processes, self.accelerator.process_index
        epoch, skipped = divmod(self.state.done, self.epoch_steps)
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
            index=self.state.done,
            total=self.total,
            epoch=self.state.done // self.epoch_steps,
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
        exact = torch.float64 if accelerator.device.type != "mps" else None
        total = torch.zeros((), device=accelerator.device, dtype=exact)
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
                    if not is_out_of_memory(error):
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
        if self.state.ema is not None:
            self._update_ema()
        self.objective.after_step(base)
        facts = {"loss": mean, "lr": self.optimizer.param_groups[0]["lr"], "grad_norm": norm, "epoch": base.epoch}
        return {**facts, "phase": self.objective.phase(base), **self.objective.metrics()}

    def _attention(self) -> AbstractContextManager[None]:
        """On a CPU the fused kernel's backward takes half of a step with short sequences: plain products are faster there."""
        short = math.prod(self.bare.spec.grid) <= 256
        return sdpa_kernel(SDPBackend.MATH) if short and self.accelerator.device.type == "cpu" else nullcontext()

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
        assert self.state.ema is not None
        assert self.config.ema_decay is not None
        decay = min(self.config.ema_decay, (1 + self.state.done) / (10 + self.state.done))  # young means forget faster
        for name, tensor in self.bare.state_dict().items():
            if tensor.is_floating_point():
                self.state.ema[name].lerp_(tensor, 1 - decay)
            else:
                self.state.ema[name].copy_(tensor)

    # ---------------------------------------------------------------------------------------- logs, checkpoints, stops

    def _validate(self, validate: Callable[[Vit], Mapping[str, Any]]) -> None:
        if self.main:
            live = None
            if self.state.ema is not None:
                live = {k: t.detach().clone() for k, t in self.bare.state_dict().items()}
                self.bare.load_state_dict(self.state.ema)
            self.bare.eval()
            found = {k: v for k, v in validate(self.bare).items() if isinstance(v, (int, float, str))}
            if live is not None:
                self.bare.load_state_dict(live)
            self._log({"kind": "validate", **found})
            if self.progress is not None:
                self.progress("validate", self.state.done, self.total, **found)
        self.accelerator.wait_for_everyone()

    def _log(self, line: dict[str, Any]) -> None:
        if not self.main:
            return
        line = {"step": self.state.done, "seconds": round(self.state.seconds, 3), **line}
        line = {
            k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()
        }  # as JSON has it
        self.history.append(line)
        if self.out is not None:
            with (self.out / METRICS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        numbers = {f"{line['kind']}/{k}": v for k, v in line.items() if isinstance(v, (int, float)) and k != "step"}
        if self.config.tracker is not None:
            self.accelerator.log(numbers, step=self.state.done)

    def _refuse_astray(self) -> None:
        """End a run whose weights are no numbers any more, before they are scored or kept."""
        if (bad := not_finite(self.bare.state_dict())) is None:
            return
        before = None if self.out is None else checkpoints.newest(self.out / "checkpoints")
        kept = "no checkpoint is there from before" if before is None else f"{before.name} is whole"
        raise TrainingError(
            f"after step {self.state.done} of {self.total}, {bad} (lr {self.optimizer.param_groups[0]['lr']:.3g}, amp "
            f"{self.config.amp!r}); {kept}. Lower lr, set clip, or train with amp='no'."
        )

    def _stop(self, why: str) -> None:
        """End a run that went astray. Weights and checkpoint are those of the last good step."""
        self.optimizer.zero_grad()
        self._refuse_astray()
        kept = "the model holds the state before that step"
        if self.out is not None and self.state.done:
            self.state.write(self.out)
            kept = f"the state before it is kept in {self.out.name}/checkpoints"
        lr = self.optimizer.param_groups[0]["lr"]
        raise TrainingError(
            f"{why} at step {self.state.done + 1} of {self.total} (lr {lr:.3g}, amp {self.config.amp!r}); {kept}. "
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
                if not is_out_of_memory(error):
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
    found = processes.count()
    if found != config.world_size:
        raise TrainingError(
            f"world_size={config.world_size} was asked for, and {found} process(es) run. Start with "
            f"`torchrun --standalone --nproc-per-node {config.world_size} ...` (accelerate launch --cpu starts one, silently)."
        )
    if found > 1 and (missing := processes.not_told()):
        raise TrainingError(
            f"the environment says WORLD_SIZE={found} and not {missing[0]}, so that the processes cannot find each other. "
            f"Start with `torchrun --standalone --nproc-per-node {found} ...`, which sets both, or unset WORLD_SIZE."
        )
    gpus, here = torch.cuda.device_count(), processes.count_here()
    if found > 1 and config.device in ("auto", "cuda") and 0 < gpus < here:
        raise TrainingError(
            f"{here} processes on this machine, which has {gpus} GPU(s); expected one each. "
            f"Start with --nproc-per-node {gpus}, or train with device='cpu'."
        )
    if config.device not in ("auto", "cpu") and not getattr(torch, config.device).is_available():
        raise TrainingError(f"device={config.device!r}: torch finds none here. Use device='cpu' or 'auto'.")
    if config.amp == "fp16" and (config.device == "cpu" or not torch.cuda.is_available()):
        raise TrainingError("amp='fp16' needs a GPU. On a CPU use amp='bf16' or amp='no'.")
    if len(images) < config.batch_size:
        raise DataError(
            f"{images.name}: {len(images)} training images for batch_size={config.batch_size}; "
            f"expected at least one full batch. Lower batch_size (--batch-size {len(images)}) or give more images."
        )


def _accelerator(config: TrainConfig, out: Path | None) -> accelerate.Accelerator:
    if config.tracker is not None and out is None:
        raise TrainingError(f"tracker={config.tracker!r} needs a folder for its files; pass out= (--out).")
    plain_cpu = not (torch.cuda.is_available() or (torch.backends.mps.is_available() and processes.count() == 1))
    try:
        found = accelerate.Accelerator(
            # said, since Accelerate counts the processes on a CPU only where it is told to compute there
            cpu=config.device == "cpu" or (config.device == "auto" and plain_cpu),
            mixed_precision=config.amp,
            log_with=config.tracker,
            project_dir=out,
            kwargs_handlers=[accelerate.DistributedDataParallelKwargs(find_unused_parameters=True)],
        )
    except ValueError as error:
        raise TrainingError(f"accelerate refused the settings: {' '.join(str(error).split())}") from error
    if found.num_processes != config.world_size:
        raise TrainingError(
            f"world_size={config.world_size} was asked for, and Accelerate counts {found.num_processes} process(es) on "
            f"device={config.device!r}: expected as many, or each would train a model of its own. Start with torchrun, and "
            "train with device='cpu' or on GPUs."
        )
    return found


@contextmanager
def _together(config: TrainConfig) -> Iterator[None]:
    """Where one of several processes is gone, the others cannot go on, and say so."""
    try:
        yield
    except RuntimeError as error:
        if config.world_size == 1 or not (isinstance(error, torch.distributed.DistError) or _GONE.search(str(error))):
            raise
        raise TrainingError(
            f"another of the {config.world_size} processes ended, and this one cannot go on alone. See what that one said, "
            "and start all of them again with resume=True (--resume): the newest checkpoint is whole."
        ) from error


def mapped(labels: Tensor, label_map: Tensor | None, classes: int | None) -> Tensor:
    """Labels of the data in the model's numbering.  B int64, or B data-classes -> B model-classes."""
    if label_map is None or classes is None:
        return labels
    label_map = label_map.to(labels.device)
    if labels.dim() == 1:
        return label_map[labels]
    return labels.new_zeros(len(labels), classes).index_copy_(1, label_map, labels)
