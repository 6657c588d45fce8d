"""Front to back: a student's stream and its teacher's before each block, kept in step, and what each half is refitted on.

Halves are refitted in order, each on the stream that the student has by then, towards what the teacher has behind the same half.
The teacher's tokens are merged as the student's are, so that rows match.

Shapes: B batch, N tokens, D width of the student, M inputs of what is refitted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import repeat
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

    What one pass has computed is held for the next: the teacher's stream behind each half, and both streams in front of the MLP.
    So the student's attention must not change once `mlp` has been asked, unless `changed` says so.
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
        self.attended = StreamCache(folder, "attended")  # the teacher's behind the attention
        self.before = StreamCache(folder, "before-theirs"), StreamCache(folder, "before-ours")  # in front of the MLP
        self.aims = StreamCache(folder, "aims")  # the teacher's behind the MLP
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
        self.changed()
        self.attended.begin()
        for dense, stream in self.pairs():
            dense, stream = following(student, dense, stream, "start")
            aim, mixed = teacher.attend(dense).stream, student.attend(stream).mixed
            assert mixed is not None
            self.attended.put(aim)
            yield Rows(mixed, self.target(aim.x) - student.going(stream).x, aim)
        self.attended.end()

    def mlp(self, teacher: Block, student: Block, inputs: Callable[[Stream], Tensor] | None = None) -> Iterator[Rows]:
        """What the last linear is refitted on.  inputs: of the stream in front of the MLP; None: its hidden units."""
        self.changed()
        for cache in (*self.before, self.aims):
            cache.begin()
        for dense, stream in self._before_mlp(teacher, student):
            aim = teacher.transform(dense).stream
            seen = student.units(stream) if inputs is None else inputs(stream)
            for cache, held in zip((*self.before, self.aims), (dense, stream, aim), strict=True):
                cache.put(held)
            yield Rows(seen, self.target(aim.x) - stream.x, aim)
        for cache in (*self.before, self.aims):
            cache.end()

    def changed(self) -> None:
        """The student's attention is another than it was: its stream in front of the MLP is computed anew."""
        for cache in (*self.before, self.aims):
            cache.drop()

    def advance(self, teacher: Block, student: Block, *, apart: bool = True, shift: Tensor | None = None) -> None:
        """Both streams to the next block.

        apart: whether they differ behind this one. shift: [D] what the student's stream has more than is held, since a half
        before has taken it on.
        """
        self.theirs.begin()
        self.ours.begin()
        if shift is not None:
            self.changed()
        for dense, aim, stream in self._behind(teacher, student, shift):
            theirs = teacher.transform(dense).stream if aim is None else aim
            theirs, ours = following(student, theirs, student.transform(stream).stream, "end")
            self.theirs.put(theirs)
            if apart:
                self.ours.put(ours)
        for cache in (self.theirs, self.ours):
            cache.end()
        self.attended.drop()
        self.changed()

    def _behind(
        self, teacher: Block, student: Block, shift: Tensor | None
    ) -> Iterator[tuple[Stream, Stream | None, Stream]]:
        """In front of the MLP: the teacher's stream, its stream behind the MLP where that is held, and the student's."""
        if self.aims.parts:
            held = (cache.batches(self.device) for cache in (self.before[0], self.aims, self.before[1]))
            yield from zip(*held, strict=True)
        else:
            yield from ((dense, None, stream) for dense, stream in self._before_mlp(teacher, student, shift))

    def _before_mlp(
        self, teacher: Block, student: Block, shift: Tensor | None = None
    ) -> Iterator[tuple[Stream, Stream]]:
        attended = self.attended.batches(self.device) if self.attended.parts else repeat(None)
        for (dense, stream), aim in zip(self.pairs(), attended, strict=False):
            if shift is not None:
                stream = stream._replace(x=stream.x + shift.to(stream.x))
            dense, stream = following(student, dense, stream, "start")
            theirs = teacher.attend(dense).stream if aim is None else aim
            yield following(student, theirs, student.attend(stream).stream, "mid")
