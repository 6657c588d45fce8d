"""What the parts of every block see over many images: streamed sums, no image kept after its batch.

Calibration keeps some 2 D^2 numbers a block: no D x D product is ever decomposed (`factors.py`).

Shapes: B batch, H heads, N tokens, D width, Q query/key dims, V value dims, E of any rows, M hidden units.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vitrim.errors import DataError
from vitrim.model import Block, Stream, Vit
from vitrim.progress import Progress


@dataclass
class Moments:
    """A running sum of rows and of their outer products.  rows of [..., E]; sums in float64 on the CPU."""

    count: int = 0
    sum: Tensor = field(default_factory=lambda: torch.zeros(()))
    square: Tensor = field(default_factory=lambda: torch.zeros(()))

    def add(self, rows: Tensor) -> None:
        """rows: [..., n, E], in the model's dtype within a batch."""
        square = (rows.mT @ rows).to("cpu", torch.float64)
        total = rows.sum(-2).to("cpu", torch.float64)
        self.sum = total if self.count == 0 else self.sum + total
        self.square = square if self.count == 0 else self.square.add_(square)
        self.count += rows.shape[-2]

    @property
    def mean(self) -> Tensor:
        """[..., E]"""
        return self.sum / self.count

    @property
    def second(self) -> Tensor:
        """[..., E, E] mean of x^T x."""
        return self.square / self.count

    @property
    def covariance(self) -> Tensor:
        """[..., E, E] mean of (x - mean)^T (x - mean)."""
        return self.second - self.mean[..., :, None] * self.mean[..., None, :]


@dataclass
class BlockStatistics:
    """What one block's parts see.  queries: [H, Q], bias included; keys: [H, Q], centred within each image;
    values: [H, V] what each head hands to the output projection, b_V included; fc1, fc2: of the smaller side of each
    linear, outputs without their bias.
    """

    queries: Moments = field(default_factory=Moments)
    keys: Moments = field(default_factory=Moments)
    values: Moments = field(default_factory=Moments)
    fc1: Moments = field(default_factory=Moments)
    fc2: Moments = field(default_factory=Moments)

    def walk(self, block: Block, stream: Stream) -> Stream:
        """Count what the block's parts see of a stream in front of it; gives the stream behind it, gates open."""
        return block.end(self._transform(block, block.mid(self._attend(block, block.start(stream)))))

    def _attend(self, block: Block, entry: Stream) -> Stream:
        going = block.going(entry)
        if block.spec.attention is None:
            return going
        a = block.attention
        q, k, v = a.qkv_heads(block.norm1(entry.x), None if going is entry else entry.prefix)  # B H N Q
        if block.spec.attention.qk_norm == "none":  # else their products cannot be factorised through the norm
            centred = k - k.mean(2, keepdim=True)
            self.queries.add(q.transpose(0, 1).flatten(1, 2))
            self.keys.add(centred.transpose(0, 1).flatten(1, 2))
        mixed = a.attend(q, k, v, entry.size_bias()).transpose(1, 2).flatten(2)  # B N (H V)
        self.values.add(mixed.unflatten(-1, (block.spec.attention.heads, -1)).flatten(0, 1).transpose(0, 1))
        return going._replace(x=going.x + a.finish(mixed))

    def _transform(self, block: Block, stream: Stream) -> Stream:
        if block.spec.mlp is None:
            return stream
        mlp, x = block.mlp, block.norm2(stream.x)
        rows = mlp.first(x)
        hidden = mlp.activate(rows)
        last = mlp.last(hidden)
        for moments, linear, inputs, outputs in ((self.fc1, mlp.fc1, x, rows), (self.fc2, mlp.fc2, hidden, last)):
            if sees_inputs(inputs.shape[-1], outputs.shape[-1]):
                moments.add(inputs.flatten(0, 1))
            else:
                flat = outputs.flatten(0, 1)
                moments.add(flat if linear.bias is None else flat - linear.bias)
        return stream._replace(x=stream.x + mlp.scaled(last))


def sees_inputs(inputs: int, outputs: int) -> bool:
    """Whether a linear's statistics are of its inputs (or of its outputs): the smaller side."""
    return inputs <= outputs


@torch.no_grad()
def calibrate(
    model: Vit, batches: Iterable[Tensor], *, total: int | None = None, progress: Progress | None = None
) -> list[BlockStatistics]:
    """Statistics of every block over images, in one pass; gates are open, token steps run as they do.

    batches: [B, C, h, w] each, forgotten after use. total: images in all, for the progress.
    Memory: some 2 D^2 + 3 Q D float64 numbers a block, a third of a float32 model, and the activations of one batch.
    Raises DataError when no image comes, or a value is not finite.
    """
    found = [BlockStatistics() for _ in model.blocks]
    like = next(model.parameters())
    done = 0
    for x in batches:
        stream = model.embed(x.to(like))
        for block, seen in zip(model.blocks, found, strict=True):
            stream = seen.walk(block, stream)
        if not torch.isfinite(model.read(stream).logits).all():
            raise DataError(
                f"calibration: the model's output is not finite on images {done} to {done + len(x) - 1}. "
                "Check the weights and the images' normalisation."
            )
        done += len(x)
        if progress is not None:
            progress("calibrate", done, total or done)
    if not done:
        raise DataError("calibration: no images. Pass a few hundred unlabelled ones, as a folder or a tensor.")
    return found
