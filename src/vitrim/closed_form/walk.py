"""Front to back: a student's stream and its teacher's before each block, kept in step, and what each half is refitted on.

Halves are refitted in order, each on the stream that the student has by then, towards what the teacher has behind the same half.
The teacher's tokens are merged as the student's are, so that rows match.

Shapes: B batch, N tokens, D width of the student, M inputs of what is refitted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from vitrim.closed_form.streams import StreamCache, following
from vitrim.model import Block, Stream


class Rows(NamedTuple):
    """What a half is refitted on, of one batch.

    inputs: [B, N, M] of the linear that is refitted. goal: [B, N, D] what the half is to add. aim: the teacher's stream behind it.
    """

    inputs: Tensor
    goal: Tensor
    aim: Stream


class Walk:
    """Both streams in front of one block, a batch at a time.

    theirs, ours: what enters the first block; ours None: the same, until `advance` holds them apart.
    target: the teacher's stream [B, N, D'] as the student would have it, where their widths differ.
    folder: where streams too big for memory go.
    """

    def __init__(
        self,
        theirs: Iterable[Stream],
        ours: Iterable[Stream] | None = None,
        *,
        folder: Path | None,
        device: torch.device | str,
        target: Callable[[Tensor], Tensor] = lambda x: x,
    ) -> None:
        self.theirs, self.ours = StreamCache(folder, "teacher"), StreamCache(folder, "student")
        self.device, self.target = device, target
        self.theirs.fill(theirs)
        if ours is not None:
            self.ours.fill(ours)

    def pairs(self) -> Iterator[tuple[Stream, Stream]]:
        """The teacher's stream and the student's, as they enter the block."""
        if self.ours.parts:
            yield from zip(self.theirs.batches(self.device), self.ours.batches(self.device), strict=True)
        else:
            yield from ((stream, stream) for stream in self.theirs.batches(self.device))

    def attention(self, teacher: Block, student: Block) -> Iterator[Rows]:
        """What the output projection is refitted on."""
        for dense, stream in self.pairs():
            dense, stream = following(student, dense, stream, "start")
            aim, mixed = teacher.attend(dense).stream, student.attend(stream).mixed
            assert mixed is not None
            yield Rows(mixed, self.target(aim.x) - student.going(stream).x, aim)

    def mlp(self, teacher: Block, student: Block, inputs: Callable[[Stream], Tensor] | None = None) -> Iterator[Rows]:
        """What the last linear is refitted on.  inputs: of the stream in front of the MLP; None: its hidden units."""
        for dense, stream in self.pairs():
            dense, stream = _before_mlp(teacher, student, dense, stream)
            aim = teacher.transform(dense).stream
            seen = student.units(stream) if inputs is None else inputs(stream)
            yield Rows(seen, self.target(aim.x) - stream.x, aim)

    def advance(self, teacher: Block, student: Block, *, apart: bool = True, shift: Tensor | None = None) -> None:
        """Both streams to the next block.

        apart: whether they differ behind this one. shift: [D] what the student's stream has more than is held, since a half
        before has taken it on.
        """
        self.theirs.begin()
        self.ours.begin()
        for dense, stream in self.pairs():
            if shift is not None:
                stream = stream._replace(x=stream.x + shift.to(stream.x))
            dense, stream = _before_mlp(teacher, student, dense, stream)
            dense, stream = teacher.transform(dense).stream, student.transform(stream).stream
            dense, stream = following(student, dense, stream, "end")
            self.theirs.put(dense)
            if apart:
                self.ours.put(stream)
        self.theirs.end()
        self.ours.end()


def _before_mlp(teacher: Block, student: Block, dense: Stream, stream: Stream) -> tuple[Stream, Stream]:
    dense, stream = following(student, dense, stream, "start")
    return following(student, teacher.attend(dense).stream, student.attend(stream).stream, "mid")
