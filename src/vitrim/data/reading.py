"""Decoding and transforming pictures, in this process or in worker processes, with errors as values.

A worker never raises: what went wrong comes back as a sentence, and this process decides to refuse or to skip.
"""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from types import TracebackType

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vitrim.data.draws import seeded
from vitrim.data.images import Images
from vitrim.data.transforms import Evaluation, View
from vitrim.errors import DataError

Transform = Callable[[Image.Image], Tensor]
Read = tuple[int, Tensor | None, str]
"""Position, the picture or None, and why it is None."""

_SMALL_WORK = 2000 * 224 * 224  # pixels that one process decodes in some ten seconds


def suggest_workers(images: Images, size_px: tuple[int, int]) -> int:
    """0 where starting processes takes longer than decoding; else the processors at hand, 8 at most."""
    return 0 if len(images) * size_px[0] * size_px[1] <= _SMALL_WORK else min(8, _processors())


@dataclass(eq=False)
class _Reader(Dataset[Read]):
    images: Images
    transform: Transform
    seed: int
    epoch: int

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, position: int) -> Read:
        source, row = self.images.source, int(self.images.rows[position])
        try:
            image = source.read(row)
        except DataError as error:
            return position, None, str(error)
        try:
            # the project's own plain views draw nothing, and seeding takes as long as decoding a small image
            plain = isinstance(self.transform, View | Evaluation)
            with nullcontext() if plain else seeded(self.seed, self.epoch, row):
                return position, self.transform(image), ""
        except DataError as error:
            return position, None, f"{source.key(row)}: {error}"
        except Exception as error:  # a caller's transform may raise anything; a worker must not
            return position, None, f"{source.key(row)}: the transform failed ({type(error).__name__}: {error})."


def read_batches(
    images: Images, transform: Transform, groups: Sequence[np.ndarray], *, seed: int, epoch: int, workers: int
) -> Iterator[list[Read]]:
    """For each group of positions, what was read there, in order. More workers than processors are not started."""
    reader = _Reader(images, transform, seed, epoch)
    processes = min(workers, _processors())
    if processes <= 0:
        for group in groups:
            yield [reader[int(position)] for position in group]
        return
    loader = DataLoader(
        reader,
        batch_sampler=[[int(position) for position in group] for group in groups],
        num_workers=processes,
        collate_fn=list,
        worker_init_fn=_quiet,
        generator=torch.Generator(),  # its own: a loader's start draws a number
        multiprocessing_context="fork" if sys.platform == "linux" else None,
    )
    with warnings.catch_warnings():
        # Python 3.12 warns of fork beside threads; the workers only decode, on one thread each
        warnings.filterwarnings("ignore", message=".*multi-threaded.*fork", category=DeprecationWarning)
        started = iter(loader)
    try:
        yield from started
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise DataError(
            f"{images.name}: a worker process ended before its work was done, most often for want of memory "
            f"(workers={processes}). Use fewer workers, or workers=0."
        ) from error


def read_all(images: Images, transform: Transform, *, workers: int) -> tuple[Tensor, Tensor]:
    """uint8 [n,C,h,w] of every picture, 0 where it is broken, and bool [n]: readable."""
    positions = np.arange(len(images))
    groups = np.array_split(positions, max(1, -(-len(images) // 256)))
    out: Tensor | None = None
    readable = torch.zeros(len(images), dtype=torch.bool)
    for group in read_batches(images, transform, groups, seed=0, epoch=0, workers=workers):
        for position, pixels in sift(images, group):
            if out is None:
                out = torch.zeros((len(images), *pixels.shape), dtype=pixels.dtype)
            out[position] = pixels
            readable[position] = True
    if out is None:
        raise none_readable(images)
    return out, readable


def sift(images: Images, group: list[Read]) -> list[tuple[int, Tensor]]:
    """What could be read. Else DataError at the first that could not, or a note in `images.broken`."""
    good: list[tuple[int, Tensor]] = []
    for position, x, reason in group:
        if x is not None:
            good.append((position, x))
        elif images.on_broken == "raise":
            raise DataError(reason)
        else:
            images.broken[images.source.key(int(images.rows[position]))] = reason
    return good


def none_readable(images: Images) -> DataError:
    first = next(iter(images.broken.values()), "no images").partition(" Replace or remove it")[0]
    return DataError(
        f"{images.name}: none of {len(images)} images could be read; the first: {first} Choose other data."
    )


def _quiet(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is the main process's to report
    sys.excepthook = _unless_left  # a thread of multiprocessing's reports there what it could not hand over


def _unless_left(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Says nothing where the main process ended first: that is its own to tell."""
    if not issubclass(kind, ConnectionError):
        sys.__excepthook__(kind, error, trace)


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
