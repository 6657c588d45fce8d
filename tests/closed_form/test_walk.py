"""Two streams in step: what a half is refitted on, and where the next block begins."""

from dataclasses import replace

import pytest
import torch

from tests.specs import close, images, make, vit
from vitrim import closed_form as cf
from vitrim.spec import Merge, Prefix, Similarity

SPEC = vit(blocks=1, width=16, heads=2, head_dim=8, hidden=24)


@pytest.mark.parametrize("step", [None, Prefix(), Merge(axis="h", keep=3), Similarity(keep=9, at="mid")])
@torch.no_grad()
def test_a_student_that_is_its_teacher_is_refitted_on_its_own_updates_and_stays_beside_it(step):
    model = make(replace(SPEC, blocks=(replace(SPEC.blocks[0], steps=() if step is None else (step,)),)))
    x, block = images(SPEC, 6), model.blocks[0]
    walk = cf.Walk((model.embed(part) for part in x.split(3)), folder=None, device="cpu")
    for rows in walk.attention(block, block):
        assert close(rows.goal, block.attention.finish(rows.inputs))
    for rows in walk.mlp(block, block):
        assert close(rows.goal, block.mlp.finish(rows.inputs))
        assert rows.goal.shape == rows.aim.x.shape
    walk.advance(block, block, apart=False)
    assert not walk.ours.parts
    after = torch.cat([stream.x for stream, _ in walk.pairs()])
    assert close(after, block.run(model.embed(x)).x)


@torch.no_grad()
def test_a_narrower_student_has_goals_in_its_own_stream_and_what_a_half_took_on_is_added():
    teacher, student = make(SPEC), make(replace(SPEC, width=8), seed=1)
    x, shift = images(SPEC, 4), torch.arange(8.0, dtype=torch.float64)
    walk = cf.Walk(
        [teacher.embed(x)], [student.embed(x)], folder=None, device="cpu", target=lambda rows: 2 * rows[..., :8]
    )
    theirs, ours = teacher.blocks[0], student.blocks[0]
    (rows,) = walk.attention(theirs, ours)
    assert close(rows.goal, 2 * theirs.attend(teacher.embed(x)).stream.x[..., :8] - student.embed(x).x)
    (rows,) = walk.mlp(theirs, ours, inputs=lambda stream: stream.x.new_ones(*stream.x.shape[:2], 1))
    assert rows.inputs.shape == (4, 17, 1)
    assert close(rows.aim.x, theirs.run(teacher.embed(x)).x)
    walk.advance(theirs, ours, shift=shift)
    ((dense, stream),) = walk.pairs()
    entry = student.embed(x)
    assert close(dense.x, theirs.run(teacher.embed(x)).x)
    assert close(stream.x, ours.run(entry._replace(x=entry.x + shift)).x)


@torch.no_grad()
def test_what_a_pass_holds_is_what_the_next_would_compute_and_a_changed_attention_is_seen():
    spec = vit(blocks=2, width=16, heads=2, head_dim=8, hidden=24)
    teacher, student = make(spec), make(spec, seed=1)
    x = images(spec, 4)

    def ends(*, asked: bool, changed: bool) -> tuple[torch.Tensor, torch.Tensor]:
        walk = cf.Walk([teacher.embed(x)], [student.embed(x)], folder=None, device="cpu")
        if asked:
            for rows in (walk.attention, walk.mlp):
                list(rows(teacher.blocks[0], student.blocks[0]))
        if changed:
            student.blocks[0].attention.out.bias.add_(1)
            walk.changed()
        walk.advance(teacher.blocks[0], student.blocks[0])
        ((dense, stream),) = walk.pairs()
        return dense.x, stream.x

    plain, held = ends(asked=False, changed=False), ends(asked=True, changed=False)
    assert all(torch.equal(a, b) for a, b in zip(plain, held, strict=True))
    moved = ends(asked=True, changed=True)
    assert torch.equal(moved[0], plain[0])
    assert torch.equal(moved[1], student.blocks[0].run(student.embed(x)).x)
    assert not torch.equal(moved[1], plain[1])
