"""The residual stream of many images between two blocks, held outside memory, and two streams kept in step.

A closed form looks at a block several times; the stream in front of it is computed once and held: in memory while small,
else in files of a temporary folder, so that memory does not grow with the number of images.

Gates are open, as in every calibration. Shapes: n images, B of a batch, N tokens, D width, M hidden, K tokens after a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vitrim.errors import DataError
from vitrim.model import Block, Stream, Vit
from vitrim.tokens import Undo

IN_MEMORY_BYTES = 64 * 2**20
"""A held stream up to this size stays in memory."""


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
        self.coming.append(stream._replace(x=x, sizes=sizes, history=_moved(stream.history, "cpu")))

    def end(self) -> None:
        """The new set takes the place of the old one, whose files go."""
        self.parts, self.coming = self.coming, []
        if self.folder is not None:
            for path in self.folder.glob(f"{self.name}-*.bin"):
                if not path.name.startswith(f"{self.name}-{self.turn}-"):
                    path.unlink()

    def drop(self) -> None:
        """Hold nothing."""
        self.begin()
        self.end()

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
            yield part._replace(x=part.x.to(device, copy=True), sizes=sizes, history=_moved(part.history, device))

    def advance(self, by: Callable[[Stream], Stream], device: torch.device | str = "cpu") -> None:
        """Replace each batch by what `by` makes of it."""
        self.fill(by(stream) for stream in self.batches(device))


def _moved(history: tuple[Undo, ...], device: torch.device | str) -> tuple[Undo, ...]:
    """Merges as they can be held: without a graph, on a device."""
    return tuple(
        undo._replace(owner=undo.owner.to(device), carry=None if undo.carry is None else undo.carry.detach().to(device))
        for undo in history
    )


# ------------------------------------------------------------------------------------------------- two streams together


def lookahead(teacher: Vit, student: Vit, index: int, stream: Stream) -> Stream:
    """The teacher's stream in front of the next half that the student still has.

    stream: the teacher's after the MLP of block `index`. What the student has lost right behind is run with the teacher's
    weights, so that the half before it can be refitted to carry it. Token steps end the walk: behind them rows differ.
    """
    if teacher.blocks[index].has_steps("end"):
        return stream
    for j in range(index + 1, len(teacher.blocks)):
        ours, theirs = student.spec.blocks[j], teacher.blocks[j]
        if ours.attention is not None or theirs.has_steps("start", "mid"):
            break
        stream = theirs.attend(stream).stream
        if ours.mlp is not None:
            break
        stream = theirs.transform(stream).stream
        if theirs.has_steps("end"):
            break
    return stream


def following(block: Block, theirs: Stream, before: Stream, at: str) -> tuple[Stream, Stream]:
    """Both streams after the block's steps at this place, the teacher's merged as the student's tokens match.

    theirs, before: teacher's and student's streams before the steps, with the same layout. Gives (theirs, ours). Images in
    which the teacher would match alike keep the teacher's own merge; in the others its tokens are averaged, by size,
    within the groups that the student formed.
    """
    ours = before
    for module in block.token_steps(at):
        after = module(ours._replace(history=()))
        if module.metric is not None and after.history:
            # its metric is of the student's stream, which may be narrower than the teacher's
            theirs = after._replace(x=_forced(theirs, after.history[-1], ours), history=())
            ours = after._replace(history=())
            continue
        own = module(theirs._replace(history=()))
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


def answers(model: Vit, stream: Stream, start: int, want: str = "logits") -> Tensor:
    """`Vit.answer`, [B, ...]. Raises DataError where a number is not finite."""
    result = model.answer(stream, start, want)
    if not torch.isfinite(result).all():
        raise DataError("the model's output is not finite. Check the weights and the images' normalisation.")
    return result
