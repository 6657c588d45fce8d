"""How long the stages of a job will take, about: from a few images of the dense network, so that a user knows when to come back."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping

import torch

from vitrim import data
from vitrim.pipeline.folder import STAGES
from vitrim.pipeline.job import Job

FEW = 4
"""Images that are timed; less than a second's work on most machines."""
BACKWARD = 3
"""A training step in forward passes of the network that learns."""
WARM = 5
"""Calls of each network before its time is taken."""


def forecast(job: Job) -> dict[str, float]:
    """Seconds of each stage that can be foretold; what a method takes is not known before.

    Empty where the images do not say how they are prepared, and where no image can be read. Counts reading the images, forward passes, three of the student and one of the teacher in a training step, and the ratio of
    MACs; within a factor of two.
    """
    times = _of_one_image(job)
    if times is None:
        return {}
    read_s, pass_s = times
    limits = {} if job.config.budget is None else job.config.budget.limits(job.reference)
    kept = min(1.0, limits.get("macs", job.reference.macs) / job.reference.macs)
    judging, target = job.asked.judging, job.asked.target
    judged = min(len(job.held), judging.limit or len(job.held))
    networks = 2 if job.recovery is None else 3
    found = {"evaluate": judged * (networks * read_s + pass_s * (1 + (networks - 1) * kept))}
    if job.recovery is not None:
        steps = job.recovery.total_steps(len(job.train))
        learned = steps * job.recovery.batch_size * (read_s + pass_s * (1 + BACKWARD * kept))
        found["recover"] = learned + len(job.held) * (2 * read_s + pass_s * (1 + kept))
    if target is not None:
        calls = len(target.kinds) * (WARM + target.runs) * sum(target.batch_sizes)
        found["measure"] = calls * pass_s * (1 + kept)
    return found


def later(found: Mapping[str, float], stage: str) -> dict[str, float | None]:
    """What a progress is told at the beginning of a stage: seconds of it, None if nobody can say, and of all behind it."""
    if not found:
        return {"this_s": None, "later_s": None}
    behind = STAGES[STAGES.index(stage) + 1 :]
    known = found.get(stage, 0.0 if stage in ("save", "report") else None)
    return {"this_s": known, "later_s": sum(found.get(name, 0.0) for name in behind)}


def _of_one_image(job: Job) -> tuple[float, float] | None:
    """Seconds to read one image, and of one forward pass of the dense network where it will be judged."""
    how, device = job.dense.config.preprocess, job.asked.judging.device
    if how is None:
        return None
    began = time.monotonic()
    few = job.held.take(min(FEW, len(job.held)), 0)
    batch = next(iter(data.batches(few, data.evaluation(how), len(few))), None)
    if batch is None:
        return None
    x, read_s = batch[0], (time.monotonic() - began) / len(batch[0])
    dense = job.dense if device == "cpu" else copy.deepcopy(job.dense).to(device)
    x = x.to(next(dense.parameters()))
    seconds = []
    with torch.inference_mode():
        for _ in range(2):  # the first is colder
            began = time.monotonic()
            dense(x).cpu()  # waits for an accelerator
            seconds.append((time.monotonic() - began) / len(x))
    return read_s, min(seconds)
