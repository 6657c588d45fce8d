"""The real model on photographs: DINOv2-small with its decoder, its own preparation of images, and how true a cut network stays.

MODEL is a folder with `backbone/` (transformers' DINOv2) and `decoder.safetensors` (its README.md says how both fit together).
Photographs are scaled to 224 px on the longest side and stand in the middle of a black square; the reference is what the dense
model says of them, so no label is read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

import vitrim
from vitrim import data as opened
from vitrim import surgery
from vitrim.data import Images
from vitrim.model import Vit

STREAMS = (3, 6, 9)
"""Numbers of blocks behind which the stream is compared."""
IMPORTANT = 0.5
"""Where the saliency map is cut for the overlap of areas."""


def dense_model(folder: Path) -> Vit:
    """The backbone, its positions resized once to its own image size."""
    return surgery.with_own_positions(vitrim.load(f"hf:{folder / 'backbone'}"))


class Decoder(nn.Module):
    """The map of the final-norm patch tokens [B, D, 16, 16] to importance [B, 128, 128] in [0, 1]."""

    def __init__(self, widths: Sequence[int] = (384, 256, 128, 64)) -> None:
        super().__init__()
        self.steps = len(widths) - 1
        for i, (before, after) in enumerate(pairwise(widths), 1):
            setattr(self, f"upconv{i}", nn.ConvTranspose2d(before, after, 4, stride=2, padding=1))
            setattr(self, f"bn{i}", nn.BatchNorm2d(after, eps=1e-5))
        self.final_conv = nn.Conv2d(widths[-1], 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        for i in range(1, self.steps + 1):
            x = F.relu(getattr(self, f"bn{i}")(getattr(self, f"upconv{i}")(x)))
        return torch.sigmoid(self.final_conv(x)[:, 0])

    def of_tokens(self, tokens: Tensor, prefix: int = 1) -> Tensor:
        """tokens: B N D after the final norm, a square of patches behind the prefix."""
        patches = tokens[:, prefix:].transpose(1, 2)  # B D P
        side = round(patches.shape[-1] ** 0.5)
        found: Tensor = self(patches.unflatten(-1, (side, side)))
        return found


def decoder(folder: Path) -> Decoder:
    """The head that the model was fine-tuned with, in eval mode, never trained."""
    found = Decoder()
    state = {name: tensor.float() for name, tensor in load_file(folder / "decoder.safetensors").items()}
    missing, unknown = found.load_state_dict(state, strict=False)
    odd = [*unknown, *(name for name in missing if not name.endswith("num_batches_tracked"))]
    assert not odd, f"decoder.safetensors lacks or has beside what is expected: {odd}"
    return found.eval().requires_grad_(False)


def squared(image: Image.Image, side: int) -> Image.Image:
    """Longest side to `side` pixels, in the middle of a black square."""
    scale = side / max(image.size)
    width, height = (max(1, round(length * scale)) for length in image.size)
    canvas = Image.new("RGB", (side, side))
    canvas.paste(image.resize((width, height), Image.Resampling.BICUBIC), ((side - width) // 2, (side - height) // 2))
    return canvas


def prepared(images: Images, side: int = 224) -> Images:
    """The same pictures as squares, which the model's own preprocessing leaves as they are."""
    return opened.open(([squared(image, side) for image, _ in images], None), split="all", labelled=False)


def photographs(source: Any, split: str, count: int | None = None, seed: int = 0) -> Images:
    """That many of a split, drawn by seed (None: all), as the source has them."""
    found = opened.open(source, split=split, labelled=False)
    return found if count is None else found.take(count, seed, balanced=False)


@dataclass
class Fidelity:
    """Scores networks against the dense one on the same photographs; the dense model's answers are computed once.

    images: as `prepared` gives them. held: a file where the dense model's answers are kept for other processes; None: nowhere.
    """

    dense: Vit
    decoder: Decoder
    images: Images
    batch_size: int = 8
    held: Path | None = None

    def batches(self) -> Iterator[Tensor]:
        """[B, 3, h, w] as the model takes them, the same in every pass."""
        how = self.dense.config.preprocess
        assert how is not None
        for x, _ in opened.batches(self.images, opened.evaluation(how), self.batch_size):
            yield x

    def seen(self, model: Vit, x: Tensor) -> dict[str, Tensor]:
        """tokens [B, N, D], map [B, h, w], and by `after N` the patch tokens of streams that have as many as the dense model's."""
        depths = STREAMS if alike(model, self.dense) else ()
        with torch.no_grad():
            found = model(x, want=("tokens", *(f"map:{depth - 1}" for depth in depths)))
            tokens = found["tokens"]
            streams = {f"after {depth}": found[f"map:{depth - 1}"] for depth in depths}
            return {"tokens": tokens, "map": self.decoder.of_tokens(tokens, len(model.spec.prefix)), **streams}

    @cached_property
    def reference(self) -> list[dict[str, Tensor]]:
        if self.held is not None and self.held.is_file():
            kept: list[dict[str, Tensor]] = torch.load(self.held, mmap=True)
            return kept
        found = [self.seen(self.dense, x) for x in self.batches()]
        if self.held is not None:
            unfinished = self.held.with_suffix(f".{os.getpid()}")
            torch.save(found, unfinished)
            unfinished.replace(self.held)
        return found

    def score(self, model: Vit) -> dict[str, float]:
        """Means over photographs: `cosine` of all tokens, `worst` image's, `cls`; the map's `map_mae` and `map_iou`; `after N`: the
        error of the stream's patch tokens over their length, where the stream has the dense one's width and depth.
        """
        rows: list[dict[str, Tensor]] = []
        for x, goal in zip(self.batches(), self.reference, strict=True):
            found = self.seen(model, x)
            cosine = F.cosine_similarity(found["tokens"], goal["tokens"], dim=-1)  # B N
            ours, theirs = found["map"] > IMPORTANT, goal["map"] > IMPORTANT
            both, either = (ours & theirs).sum((1, 2)), (ours | theirs).sum((1, 2))
            row = {
                "cosine": cosine.mean(1),
                "cls": cosine[:, 0],
                "map_mae": (found["map"] - goal["map"]).abs().mean((1, 2)),
                "map_iou": torch.where(either > 0, both / either.clamp_min(1), 1.0),
            }
            for name in found.keys() - {"tokens", "map"}:
                apart = (found[name] - goal[name]).square().flatten(1).sum(1)
                row[name] = (apart / goal[name].square().flatten(1).sum(1)).sqrt()
            rows.append(row)
        whole = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
        means = {name: float(values.mean()) for name, values in whole.items()}
        return means | {"worst": float(whole["cosine"].min())}


def alike(model: Vit, dense: Vit) -> bool:
    """Whether the streams of both are the same space, block by block."""
    return model.spec.width == dense.spec.width and len(model.blocks) == len(dense.blocks)
