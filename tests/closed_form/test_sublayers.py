"""The parts of a block: joint refits that only help, and return to plain truncation as the ridge grows."""

from dataclasses import replace

import pytest
import torch

from tests.specs import close, images, make, vit
from vitrim import closed_form as cf
from vitrim.closed_form import sublayers as parts
from vitrim.model import Vit
from vitrim.spec import MlpSpec

SPEC = vit(blocks=1, width=16, heads=2, head_dim=8, hidden=24)


def attention_rows(model: Vit, count: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    """What the heads hand on, and the attention's update.  rows H*V, rows D"""
    block = model.blocks[0]
    with torch.no_grad():
        stream = model.embed(images(model.spec, count))
        mid, mixed, _ = block.attend(stream)
        assert mixed is not None
        return mixed.flatten(0, 1), (mid.x - stream.x).flatten(0, 1)


def sums(x: torch.Tensor, y: torch.Tensor) -> cf.Regression:
    stats = cf.Regression.empty(x.shape[1], y.shape[1])
    stats.add(x, y)
    return stats


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_refitting_all_heads_together_is_never_worse_than_truncation(rank):
    model = make(SPEC)
    x, y = attention_rows(model)
    attention, stats = model.blocks[0].attention.requires_grad_(False), sums(x, y)
    found = parts.values(attention, stats, None)
    new = (x - attention.v_bias) @ torch.block_diag(*found.inner[..., :rank])
    plain = found.prior[:, :rank].flatten(0, 1)
    errors = []
    for ridge in (0.0, 1e-2):
        w, b = parts.output(stats, found, rank, attention.v_bias, ridge=ridge)
        errors.append(float((y - new @ w - b).square().mean()))
    best_bias = (y - new @ plain).mean(0)
    truncated = float((y - new @ plain - best_bias).square().mean())
    assert errors[0] <= errors[1] + 1e-15
    assert errors[1] <= truncated + 1e-15
    w, b = parts.output(stats, found, rank, attention.v_bias, ridge=1e12)
    assert close(w, plain, 1e-8)
    assert close(b, best_bias, 1e-8)
    if rank == 8:
        assert errors[0] < 1e-18


def test_new_values_are_the_old_ones_turned():
    model = make(SPEC)
    x, y = attention_rows(model)
    attention = model.blocks[0].attention
    found = parts.values(attention, sums(x, y), torch.diag(torch.arange(1.0, 17.0, dtype=torch.float64)))
    _, _, v, o = parts.head_weights(attention)
    assert close(v @ found.inner, found.left)
    assert close(found.left @ found.prior, v @ o, 1e-8)


@pytest.mark.parametrize("rank", [None, 5])
def test_a_last_linear_that_is_refitted_on_its_own_target_stays_as_it_is(rank):
    model = make(replace(SPEC, blocks=(replace(SPEC.blocks[0], mlp=MlpSpec(hidden=24, fc2_rank=rank)),)))
    block = model.blocks[0]
    with torch.no_grad():
        hidden = block.units(model.embed(images(SPEC, 12)))
        update = block.mlp.fc2(hidden if rank is None else block.mlp.fc2a(hidden))
    stats = sums(hidden.flatten(0, 1), update.flatten(0, 1))
    last = parts.last_linear(block.mlp)
    w, b = parts.refitted(stats, last, None, ridge=3e-3, keep=None)
    assert close(w, last.prior, 1e-9)
    assert close(b, block.mlp.fc2.bias, 1e-9)
    kept = parts.elimination(stats, last, None, ridge=3e-3).kept(10)
    w, b = parts.refitted(stats, last, None, ridge=3e-3, keep=kept)
    new = stats.x[kept] / stats.weight @ w
    mean = new if last.outputs is None else new @ last.outputs.mT
    assert w.shape == (10, rank or 16)
    assert close(mean + b, parts.mean_target(stats), 1e-9)
    w, b = parts.refitted(stats, parts.last_linear(block.mlp, bias=False), None, ridge=1e12, keep=kept)
    assert b is None
    assert close(w, last.prior[kept], 1e-9)


def test_sums_of_turned_inputs_are_the_turned_sums():
    x, y = torch.randn(30, 6, dtype=torch.float64), torch.randn(30, 4, dtype=torch.float64)
    turn = torch.randn(6, 3, dtype=torch.float64)
    one, two = sums(x, y).through(turn), sums(x @ turn, y)
    assert all(close(getattr(one, name), getattr(two, name), 1e-9) for name in ("x", "xx", "xy", "yy"))


def test_weighted_queries_leave_unweighted_ones_alone():
    model = make(SPEC)
    q, k, _ = model.blocks[0].attention.qkv_heads(model.embed(images(SPEC, 3)).x)
    plain, even, first = parts.Scores(), parts.Scores(), parts.Scores()
    plain.add(q, k, None)
    even.add(q, k, torch.ones(17))
    first.add(q, k, torch.tensor([1.0] + [0.0] * 16))
    assert plain.queries is not None
    assert even.queries is not None
    assert first.queries is not None
    assert close(plain.queries, even.queries)
    assert close(first.queries, torch.einsum("bhq,bhr->hqr", q[:, :, 0], q[:, :, 0]))
