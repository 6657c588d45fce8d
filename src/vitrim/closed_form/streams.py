"""The residual stream of many images between two blocks, held outside memory, and a block run half by half.

A closed form looks at a block several times; the stream in front of it is computed once and held: in memory while small,
else in files of a temporary folder, so that memory does not grow with the number of images.

Gates are open, as in every calibration. Shapes: n images, B of a batch, N tokens, D width, M hidden, K tokens after a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from vitrim.errors import DataError
from vitrim.model import Block, Gates, Stream, TokenStep, Vit
from vitrim.spec import Prefix
from vitrim.tokens import Undo

IN_MEMORY_BYTES = 64 * 2**20
"""A held stream up to this size stays in memory."""
OPEN = Gates(policy="open")


class StreamCache:
    """The streams of all images at one place, a batch at a time. Batches keep the size in which they came."""

    def __init__(self, folder: Path | None, name: str) -> None:
        """folder: where streams too big for memory go; None: all stay in memory. name: of its files."""
        self.folder, self.name = folder, name
        self.parts: list[Stream] = []
        self.coming: list[Stream] = []
        self.bytes = 0
        self.turn = 0

    @property
    def count(self) -> int:
        """Images."""
        return sum(len(part.x) for part in self.parts)

    def fill(self, streams: Iterable[Stream]) -> None:
        """Hold these in place of what is held; they may be computed from it."""
        self.begin()
        for stream in streams:
            self.put(stream)
        self.end()

    def begin(self) -> None:
        """Start a new set of streams; what is held can still be read until `end`."""
        self.turn += 1
        self.coming = []
        self.bytes = 0

    def put(self, stream: Stream) -> None:
        """One batch of the new set."""
        x = stream.x.detach()
        sizes = None if stream.sizes is None else stream.sizes.detach().cpu()
        self.bytes += x.numel() * x.element_size()
        x = self._file(len(self.coming), x) if self.folder and self.bytes > IN_MEMORY_BYTES else x.cpu()
        self.coming.append(stream._replace(x=x, sizes=sizes, history=()))

    def end(self) -> None:
        """The new set takes the place of the old one, whose files go."""
        self.parts, self.coming = self.coming, []
        if self.folder is not None:
            for path in self.folder.glob(f"{self.name}-*.bin"):
                if not path.name.startswith(f"{self.name}-{self.turn}-"):
                    path.unlink()

    def _file(self, i: int, x: Tensor) -> Tensor:
        assert self.folder is not None
        path = self.folder / f"{self.name}-{self.turn}-{i}.bin"
        array = x.cpu().contiguous().numpy()
        array.tofile(path)
        return torch.from_numpy(np.memmap(path, dtype=array.dtype, mode="r+", shape=array.shape))

    def batches(self, device: torch.device | str = "cpu") -> Iterator[Stream]:
        """The streams, on the device."""
        for part in self.parts:
            sizes = None if part.sizes is None else part.sizes.to(device)
            yield part._replace(x=part.x.to(device, copy=True), sizes=sizes)

    def advance(self, by: Callable[[Stream], Stream], device: torch.device | str = "cpu") -> None:
        """Replace each batch by what `by` makes of it."""
        self.fill(by(stream) for stream in self.batches(device))


# ------------------------------------------------------------------------------------------------- a block by its halves


def after_steps(block: Any, stream: Stream, at: str) -> Stream:
    """The stream after the block's token steps at this place; the prefix step is `attend`'s and `narrowed`'s."""
    for module in block.steps:
        assert isinstance(module, TokenStep)
        if module.step.at == at and not isinstance(module.step, Prefix):
            stream = module(stream)
    return stream


def has_steps(block: Any, *places: str) -> bool:
    """Whether the block has a token step at one of these places; a prefix step counts as one at its start."""
    return any(module.step.at in places for module in block.steps)


def narrowed(block: Any, stream: Stream) -> Stream:
    """The stream that goes on after the prefix step, if the block has one."""
    tail = block.prefix_step()
    return stream if tail is None else tail(stream)


def attend(block: Any, stream: Stream) -> tuple[Stream, Tensor | None]:
    """The stream after the block's attention, and what its heads hand to the output projection (B N H*V, or None).

    stream: after the steps at the block's start.
    """
    assert isinstance(block, Block)
    going = narrowed(block, stream)
    if block.spec.attention is None:
        return going, None
    caught: list[Tensor] = []
    handle = block.attention.out.register_forward_pre_hook(lambda _, args: caught.append(args[0]))
    try:
        queries = None if going is stream else stream.prefix
        update = block.attention(block.norm1(stream.x), queries=queries, bias=_size_bias(stream), masks={})
    finally:
        handle.remove()
    return going._replace(x=going.x + update), caught[0]


def expand(block: Any, stream: Stream) -> Tensor:
    """Hidden units of the block's MLP.  stream: after the steps at its middle -> B N M."""
    return block.mlp.units(block.norm2(stream.x), {})


def finish(block: Any, hidden: Tensor) -> Tensor:
    """The update of the block's MLP from its hidden units.  B N M -> B N D"""
    mlp = block.mlp
    update: Tensor = mlp.scaled(mlp.fc2(hidden if mlp.fc2a is None else mlp.fc2a(hidden)))
    return update


def through_mlp(block: Any, stream: Stream) -> Stream:
    """The stream after the block's MLP, if it has one.  stream: after the steps at its middle."""
    return (
        stream if block.spec.mlp is None else stream._replace(x=stream.x + block.mlp(block.norm2(stream.x), masks={}))
    )


def _size_bias(stream: Stream) -> Tensor | None:
    if not stream.bias or stream.sizes is None:
        return None
    return F.pad(stream.sizes.log(), (stream.prefix, 0))[:, None, None, :].to(stream.x.dtype)


def lookahead(teacher: Vit, student: Vit, index: int, stream: Stream) -> Stream:
    """The teacher's stream in front of the next half that the student still has.

    stream: the teacher's after the MLP of block `index`. What the student has lost right behind is run with the teacher's
    weights, so that the half before it can be refitted to carry it. Token steps end the walk: behind them rows differ.
    """
    if has_steps(teacher.blocks[index], "end"):
        return stream
    for j in range(index + 1, len(teacher.blocks)):
        ours, theirs = student.spec.blocks[j], teacher.blocks[j]
        if ours.attention is not None or has_steps(theirs, "start", "mid"):
            break
        stream, _ = attend(theirs, stream)
        if ours.mlp is not None:
            break
        stream = through_mlp(theirs, stream)
        if has_steps(theirs, "end"):
            break
    return stream


def following(block: Any, theirs: Stream, before: Stream, at: str) -> tuple[Stream, Stream]:
    """Both streams after the block's steps at this place, the teacher's merged as the student's tokens match.

    theirs, before: teacher's and student's streams before the steps, with the same layout. Gives (theirs, ours). Images in
    which the teacher would match alike keep the teacher's own merge; in the others its tokens are averaged, by size,
    within the groups that the student formed.
    """
    ours = before
    for module in block.steps:
        if module.step.at != at or isinstance(module.step, Prefix):
            continue
        own, after = module(theirs._replace(history=())), module(ours._replace(history=()))
        if after.history:
            undo, free = after.history[-1], own.history[-1]
            count = len(after.x)
            alike = (undo.owner.expand(count, -1) == free.owner.expand(count, -1)).all(-1)  # B
            if not bool(alike.all()):
                forced = _forced(theirs, undo, ours)
                own = own._replace(x=torch.where(alike[:, None, None], own.x, forced))
        theirs, ours = own._replace(sizes=after.sizes, history=()), after._replace(history=())
    return theirs, ours


def _forced(theirs: Stream, undo: Undo, before: Stream) -> Tensor:
    """The teacher's tokens averaged by size within the student's groups.  -> B K D, prefix tokens in front."""
    head, patches = theirs.x[:, : theirs.prefix], theirs.x[:, theirs.prefix :]
    count, n = patches.shape[:2]
    owner = undo.owner.expand(count, -1)
    if undo.axis != "tokens":
        assert before.grid is not None
        assert undo.grid is not None
        rows, cols = before.grid
        row, col = torch.arange(rows, device=patches.device), torch.arange(cols, device=patches.device)
        if undo.axis == "h":
            owner = (row[None, :, None] * undo.grid[1] + owner[:, None, :]).flatten(1)
        else:
            owner = (owner[:, :, None] * undo.grid[1] + col[None, None, :]).flatten(1)
    sizes = patches.new_ones(count, n) if before.sizes is None else before.sizes
    groups = int(owner.max()) + 1
    member = (owner[:, None, :] == torch.arange(groups, device=owner.device)[None, :, None]).to(patches.dtype)
    member = member * sizes[:, None, :].to(patches.dtype)  # B K n
    merged = (member @ patches) / member.sum(-1, keepdim=True)
    return torch.cat([head, merged], dim=1)


# ---------------------------------------------------------------------------------------------------------------- answers


def divergence(before: Tensor, after: Tensor, *, classifies: bool) -> float:
    """KL(before || after) of the class probabilities, a mean over images; of features the relative squared error."""
    before, after = before.double().cpu(), after.double().cpu()
    if not classifies:
        return float((before - after).square().sum() / before.square().sum().clamp_min(1e-300))
    p, q = before.log_softmax(-1), after.log_softmax(-1)
    return max(float((p.exp() * (p - q)).sum(-1).mean()), 0.0)


def answers(model: Vit, stream: Stream, start: int) -> Tensor:
    """What the model answers on from the stream in front of block `start`: logits or features, [B, ...].

    Raises DataError where a number is not finite.
    """
    for block in model.blocks[start:]:
        stream, _ = block(stream, None, OPEN)
    tokens = model.norm(stream.x)
    pooled = model._pooled(stream, tokens)
    outputs = [model._classify(output, stream, tokens, pooled) for output in model.spec.outputs]
    result = torch.stack(outputs).mean(0) if outputs else pooled
    if not torch.isfinite(result).all():
        raise DataError("the model's output is not finite. Check the weights and the images' normalisation.")
    return result


__all__ = [
    "StreamCache",
    "after_steps",
    "answers",
    "attend",
    "expand",
    "finish",
    "following",
    "has_steps",
    "lookahead",
    "narrowed",
    "through_mlp",
]
