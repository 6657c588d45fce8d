"""The state of a training: what a checkpoint holds and how it is taken up, and what the process had before."""

from __future__ import annotations

import json
import logging
import os
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import Tensor
from torch.optim import Optimizer

from vitrim import checkpoints
from vitrim.codec import flat, plain
from vitrim.errors import TrainingError
from vitrim.files import sync_file
from vitrim.foreign import is_finite, parse_json
from vitrim.model import Vit
from vitrim.spec import spec_hash
from vitrim.tasks.task import METRICS as FIGURES
from vitrim.training.config import TrainConfig
from vitrim.training.objective import Objective

METRICS = "metrics.jsonl"
log = logging.getLogger("vitrim.training")
FREE = ("workers", "device", "eval_every", "log_every", "checkpoint_seconds", "tracker", "grad_checkpoint")
"""Settings that change no number, and may differ when a run is resumed."""


@dataclass(kw_only=True)
class State:
    """What a checkpoint holds, and how far the run is.  identity: what must agree for a checkpoint to be this run's."""

    accelerator: Accelerator
    model: Vit
    ema: dict[str, Tensor] | None
    optimizer: Optimizer
    objective: Objective
    identity: Mapping[str, Any]
    done: int = 0
    seconds: float = 0.0

    def write(self, out: Path) -> None:
        """A checkpoint under `out`, by the main process; the others wait."""
        if self.accelerator.is_main_process:
            metrics = out / METRICS
            if metrics.exists():
                sync_file(metrics)  # a checkpoint never knows of lines that the disk does not
            optimizer, scaler = self.optimizer.state_dict(), self.accelerator.scaler
            parts = {
                "model": self.model.state_dict(),
                "ema": self.ema or {},
                "optimizer": {str(k): v for k, v in optimizer["state"].items()},
                "objective": self.objective.state_dict(),
                "scaler": scaler.state_dict() if scaler is not None else {},
            }
            tensors: dict[str, Tensor] = {}
            values: dict[str, Any] = {
                "seconds": self.seconds,
                "threads": torch.get_num_threads(),
                "run": self.identity,
            }
            for name, part in parts.items():
                held, values[name] = checkpoints.pack(name, part)
                tensors.update(held)
            checkpoints.write(out / "checkpoints", self.done, tensors, values)
        self.accelerator.wait_for_everyone()

    def take_up(self, out: Path, *, resume: bool) -> list[dict[str, Any]]:
        """Go on from the newest checkpoint under `out`, if there is one; gives the lines of metrics.jsonl up to it."""
        folder, main = out / "checkpoints", self.accelerator.is_main_process
        if main:
            checkpoints.sweep(folder)
        self.accelerator.wait_for_everyone()
        found = checkpoints.newest(folder)
        if found is not None and not resume:
            raise TrainingError(checkpoints.taken(out, found.name))
        if main and not resume and (out / METRICS).is_file() and (out / METRICS).stat().st_size:
            raise TrainingError(checkpoints.taken(out, METRICS))
        if found is not None:
            tensors, values = checkpoints.read(found)
            checkpoints.same_run(out, values["run"], self.identity)
            if main:
                say_other_threads(values.get("threads"), torch.get_num_threads())
            self._load(tensors, values)
        self.accelerator.wait_for_everyone()
        if not main:
            return []
        try:
            out.mkdir(parents=True, exist_ok=True)
            (out / METRICS).touch()  # says from the first moment that a training lives here
        except OSError as error:
            raise TrainingError(
                f"{out.name}/ cannot be written ({error.strerror}); expected a folder of your own. Choose another."
            ) from error
        return _cut_back(out / METRICS, self.done)

    def _load(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        names = ("model", "ema", "optimizer", "objective", "scaler")
        parts = {name: checkpoints.unpack(name, tensors, values[name]) for name in names}
        self.model.load_state_dict(parts["model"])
        if self.ema is not None:
            for key, tensor in parts["ema"].items():
                self.ema[key].copy_(tensor)
        moments = {int(k): v for k, v in parts["optimizer"].items()}
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(parts["scaler"])
        self.objective.load_state_dict(parts["objective"])
        self.done, self.seconds = values["step"], values["seconds"]


def say_other_threads(before: int | None, now: int) -> None:
    """Sums on a CPU are split by thread, so that their last bits depend on how many there are."""
    if before not in (None, now):
        log.warning(
            "The run was begun with %d threads and goes on with %d: it is the undisturbed one up to rounding. For the same "
            "bits pass --threads %d.",
            before,
            now,
            before,
        )


def identity(config: TrainConfig, model: Vit, *, steps: int, data: str) -> dict[str, Any]:
    """Everything that changes the numbers of a run.  data: hash of the images."""
    settings = {key: value for key, value in flat(plain(config)).items() if key not in FREE}
    return {**settings, "total steps": steps, "spec": spec_hash(model.spec), "data": data}


def _cut_back(path: Path, step: int) -> list[dict[str, Any]]:
    """Lines up to the step. What a killed run wrote after its checkpoint leaves the file: it will come again."""
    lines: list[dict[str, Any]] = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            line = parse_json(text, named=str(path), error=TrainingError, mend="", finite=False)
        except TrainingError:  # the line that was being written when the run was killed
            break
        if not _is_logged(line):
            raise TrainingError(
                f"{path.parent.name}/{METRICS}: line {len(lines) + 1} is none that a training writes. Remove the file to go on "
                "without the figures of before."
            )
        if line["step"] > step:
            break
        lines.append(line)
    checkpoints.replace_text(path, "".join(json.dumps(line) + "\n" for line in lines))
    return lines


def _is_logged(line: Any) -> bool:
    """Whether a training may have written such a line: what is read of it later are numbers."""
    if not isinstance(line, dict) or not is_finite(line.get("step")) or not {"kind", "seconds"} <= line.keys():
        return False
    figures = [line.get(name) for name in ("seconds", "count", "images_per_s", *FIGURES)]
    return all(value is None or is_finite(value) for value in figures)


@contextmanager
def left_as_found(model: Vit) -> Iterator[None]:
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
