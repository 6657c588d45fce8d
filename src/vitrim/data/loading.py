"""Batches in a keyed order with keyed augmentation: the same whatever the workers, and after any restart."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from vitrim.data.draws import mix
from vitrim.data.images import Images
from vitrim.data.pixels import crop_flip, decoded, erase
from vitrim.data.reading import Transform, none_readable, read_batches, sift, suggest_workers
from vitrim.data.transforms import Evaluation, Training, evaluation, normalise
from vitrim.errors import DataError
from vitrim.spec import Preprocess

IN_MEMORY_BYTES = 1024**3
"""Decoded pixels up to this size are kept, where one batch can be augmented at once."""
_SMALL_PX = 96 * 96
_ORDER, _BLOCKS = 0x4F52_4452, 0x424C_4B53
_POOL = 4

Batch = tuple[Tensor, Tensor | None]
Groups = list[np.ndarray]
Made = tuple[np.ndarray, Callable[[np.ndarray], Tensor]]
"""Positions of a group that can be read, and what makes x of some of them."""


def batch_count(count: int, batch_size: int, *, drop_last: bool = False) -> int:
    """Batches in one pass over `count` images."""
    return count // batch_size if drop_last else -(-count // batch_size)


def batches(
    images: Images,
    transform: Transform,
    batch_size: int,
    *,
    seed: int = 0,
    epoch: int = 0,
    shuffle: bool = False,
    workers: int | None = 0,
    start: int = 0,
    drop_last: bool = False,
    shard: tuple[int, int] = (0, 1),
    device: torch.device | str = "cpu",
) -> Iterator[Batch]:
    """(x [B,C,h,w], y [B] int64 or [B,classes] float32 or None) on the device, for one pass over the images.

    Order and augmentation are functions of (seed, epoch, sample). workers: None chooses. start: batches to pass over, which
    are not decoded. shard: (rank, ranks), each rank gets its part of every batch of `batch_size`. With on_broken="skip" a
    batch lacks its broken images; with drop_last their places are filled from the batch's others, so that all are full.
    """
    rank, ranks = shard
    if batch_size < 1 or batch_size % ranks:
        wanted = "at least 1" if ranks == 1 else f"a positive multiple of {ranks}, one for each process"
        raise DataError(f"batch_size={batch_size}; expected {wanted}.")
    if len(images) == 0:
        raise DataError(f"{images.name}: no images in this selection.")
    total = batch_count(len(images), batch_size, drop_last=drop_last)
    if total == 0:
        raise DataError(
            f"{images.name}: {len(images)} images do not fill one batch of {batch_size}. Use a batch size of "
            f"{len(images)} or less."
        )
    order = _shuffled(images, seed, epoch) if shuffle else np.arange(len(images))
    groups = [
        np.array_split(order[i * batch_size : (i + 1) * batch_size], ranks)[rank]
        for i in range(min(start, total), total)
    ]
    read = _in_memory if _fits(images, transform) else _streamed
    size = getattr(getattr(transform, "preprocess", None), "size_px", (224, 224))
    processes = suggest_workers(images, size) if workers is None else workers
    made = read(images, transform, groups, seed, epoch, processes, torch.device(device))
    return _collated(images, groups, made, drop_last, torch.device(device), whole=start == 0 and ranks == 1)


def calibration(images: Images, preprocess: Preprocess, count: int, seed: int = 0, *, workers: int = 0) -> Tensor:
    """float32 [n,C,h,w]: up to `count` images drawn by seed, without a look at their labels."""
    chosen = images.take(count, seed, balanced=False)
    parts = [x for x, _ in batches(chosen, evaluation(preprocess), min(64, len(chosen)), workers=workers)]
    if not parts:
        raise none_readable(chosen)
    return torch.cat(parts)


def _shuffled(images: Images, seed: int, epoch: int) -> np.ndarray:
    """Positions in keyed order; of a set too big to hold, blocks in keyed order, mixed a few at a time."""
    keys = mix(seed, epoch, _ORDER, images.rows)
    blocks = images.source.blocks
    if blocks is None:
        return np.argsort(keys, kind="stable")
    own = blocks[images.rows]
    names = np.unique(own)
    turn = np.empty(len(names), dtype=np.int64)
    turn[np.argsort(mix(seed, epoch, _BLOCKS, names), kind="stable")] = np.arange(len(names)) // _POOL
    return np.lexsort((keys, turn[np.searchsorted(names, own)]))


def _fits(images: Images, transform: Transform) -> bool:
    """Whether the batches can be made from pixels in memory. Never depends on workers or on the device."""
    if not isinstance(transform, Evaluation) and not (isinstance(transform, Training) and transform.batched):
        return False
    height, width = transform.preprocess.size_px
    if isinstance(transform, Evaluation) and height * width > _SMALL_PX:
        return False  # used once as a rule: streaming starts sooner
    return len(images) * len(transform.preprocess.mean) * height * width <= IN_MEMORY_BYTES


def _collated(
    images: Images, groups: Groups, made: Iterator[Made], full: bool, device: torch.device, *, whole: bool
) -> Iterator[Batch]:
    labels, empty = images.labels, whole
    try:
        for group, (readable, batch) in zip(groups, made, strict=True):
            positions = _filled(readable, len(group), full, images)
            if len(positions):
                empty = False
                yield batch(positions), None if labels is None else labels[torch.from_numpy(positions)].to(device)
    finally:  # a pass that is left early has skipped some, too
        images.broken.tell(images.name)
    if empty:
        raise none_readable(images)


def _in_memory(
    images: Images, transform: Transform, groups: Groups, seed: int, epoch: int, workers: int, device: torch.device
) -> Iterator[Made]:
    assert isinstance(transform, Evaluation | Training)
    pixels, readable = decoded(images, transform.view, workers=workers, device=device)
    usable = readable.numpy()

    def batch(positions: np.ndarray) -> Tensor:
        x = pixels[torch.from_numpy(positions).to(device)]  # B C h w
        if isinstance(transform, Evaluation):
            return normalise(x, transform.preprocess)
        rows, augment = images.rows[positions], transform.augment
        pad = augment.pad if transform.crop == "pad" else 0
        if pad or augment.flip:
            x = crop_flip(x, rows, seed=seed, epoch=epoch, pad=pad, flip=augment.flip)
        x = normalise(x, transform.preprocess)
        return erase(x, rows, seed=seed, epoch=epoch, share=augment.erase) if augment.erase else x

    for group in groups:
        yield group[usable[group]], batch


def _streamed(
    images: Images, transform: Transform, groups: Groups, seed: int, epoch: int, workers: int, device: torch.device
) -> Iterator[Made]:
    reads = read_batches(images, transform, groups, seed=seed, epoch=epoch, workers=workers)
    for group, read in zip(groups, reads, strict=True):
        good = dict(sift(images, read))

        def batch(positions: np.ndarray, good: dict[int, Tensor] = good) -> Tensor:
            return torch.stack([good[int(position)] for position in positions]).to(device)

        yield np.array([position for position in group if int(position) in good], dtype=np.int64), batch


def _filled(positions: np.ndarray, size: int, full: bool, images: Images) -> np.ndarray:
    if not full or len(positions) == size:
        return positions
    if not len(positions):
        raise none_readable(images)
    return np.resize(positions, size)  # repeats from the front
