"""The fast path for small images: pixels in memory as uint8, augmented a batch at a time on the CPU or an accelerator.

Draws are keyed by (seed, epoch, row) through a hash, so that a picture is treated alike in whatever batch it stands.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from vitrim.data.draws import uniform
from vitrim.data.images import Images
from vitrim.data.reading import read_all
from vitrim.data.transforms import View
from vitrim.spec import Preprocess

_DOWN, _RIGHT, _FLIP, _ERASE, _AREA, _SHAPE, _TOP, _LEFT = range(8)  # which draw of a picture


def in_memory(
    images: Images, size: int | tuple[int, int], *, preprocess: Preprocess | None = None, workers: int = 0
) -> tuple[Tensor, Tensor | None]:
    """All pictures as uint8 [n,3,h,w], and their labels; broken ones are left out with on_broken="skip".

    preprocess: whose resizing to follow (its own size is replaced by `size`); None: bicubic, shorter side to `size`, centre.
    """
    size_px = (size, size) if isinstance(size, int) else size
    base = preprocess or Preprocess(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), size_px=size_px)
    pixels, readable = decoded(images, View(replace(base, size_px=size_px)), workers=workers)
    labels = images.labels
    images.broken.tell(images.name)
    if bool(readable.all()):
        return pixels, labels
    return pixels[readable], None if labels is None else labels[readable]


def decoded(
    images: Images, view: View, *, workers: int = 0, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """uint8 [n,C,h,w] on the device, 0 where a picture is broken, and bool [n] on the CPU of those that are not.

    Read once for each view and device, then kept with the images.
    """
    at = torch.device(device)
    kept = images.decoded
    readable_key = (view.key, "readable")
    if (view.key, "cpu") not in kept:
        kept[view.key, "cpu"], kept[readable_key] = read_all(images, view, workers=workers)
    if (view.key, str(at)) not in kept:
        kept[view.key, str(at)] = kept[view.key, "cpu"].to(at)
    return kept[view.key, str(at)], kept[readable_key]


def crop_flip(
    pixels: Tensor, rows: np.ndarray, *, seed: int, epoch: int, pad: int = 4, flip: float = 0.5
) -> Tensor:  # B C h w -> B C h w
    """Each picture shifted by up to `pad` px in each direction (black comes in) and flipped with probability `flip`.

    rows: int [B], what the draws are keyed by. Any dtype, any device; one gather for the whole batch.
    """
    count, channels, height, width = pixels.shape
    down = _whole(uniform(seed, epoch, rows, _DOWN), 2 * pad + 1, pixels.device)
    right = _whole(uniform(seed, epoch, rows, _RIGHT), 2 * pad + 1, pixels.device)
    mirrored = torch.from_numpy(uniform(seed, epoch, rows, _FLIP) < flip).to(pixels.device)
    padded = torch.nn.functional.pad(pixels, (pad, pad, pad, pad))
    across = torch.arange(width, device=pixels.device).expand(count, width)
    across = torch.where(mirrored[:, None], width - 1 - across, across) + right[:, None]  # B w
    along = torch.arange(height, device=pixels.device) + down[:, None]  # B h
    cells = along[:, :, None] * (width + 2 * pad) + across[:, None, :]  # B h w
    flat = padded.flatten(2)  # B C (h+2p)(w+2p)
    picked = flat.gather(2, cells.view(count, 1, -1).expand(count, channels, -1))
    return picked.view(count, channels, height, width)


def erase(x: Tensor, rows: np.ndarray, *, seed: int, epoch: int, share: float) -> Tensor:  # B C h w -> B C h w
    """In a `share` of the pictures one rectangle of 2 % to a third of the area becomes 0, the mean colour."""
    height, width = x.shape[-2:]
    area = (0.02 + uniform(seed, epoch, rows, _AREA) * (1 / 3 - 0.02)) * height * width
    shape = np.exp((uniform(seed, epoch, rows, _SHAPE) * 2 - 1) * np.log(1 / 0.3))
    tall = np.clip(np.rint(np.sqrt(area * shape)), 1, height)
    wide = np.clip(np.rint(np.sqrt(area / shape)), 1, width)
    tall = np.where(uniform(seed, epoch, rows, _ERASE) < share, tall, 0)
    top = np.floor(uniform(seed, epoch, rows, _TOP) * (height - tall + 1))
    left = np.floor(uniform(seed, epoch, rows, _LEFT) * (width - wide + 1))
    edges = torch.from_numpy(np.stack([top, top + tall, left, left + wide]).astype(np.int64)).to(x.device)[
        :, :, None
    ]  # 4 B 1
    along = torch.arange(height, device=x.device)
    across = torch.arange(width, device=x.device)
    in_rows = (along >= edges[0]) & (along < edges[1])  # B h
    in_columns = (across >= edges[2]) & (across < edges[3])  # B w
    return x.masked_fill((in_rows[:, :, None] & in_columns[:, None, :])[:, None], 0.0)


def _whole(shares: np.ndarray, below: int, device: torch.device) -> Tensor:
    return torch.from_numpy(np.floor(shares * below).astype(np.int64)).to(device)
