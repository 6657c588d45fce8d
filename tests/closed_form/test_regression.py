"""Regressions from sums, the order of elimination, held streams and sensitivity."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.specs import close, images, make, specs, vit
from vitrim import closed_form as cf
from vitrim.closed_form.regression import reduced_rank, refits
from vitrim.errors import DataError
from vitrim.model import Gates
from vitrim.spec import Merge, Similarity

OPEN = Gates(policy="open")


def rows(n: int = 200, m: int = 8, d: int = 5, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Correlated inputs, targets that are nearly linear in them, and the weights that they inherit."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, m, generator=g, dtype=torch.float64) @ torch.randn(m, m, generator=g, dtype=torch.float64)
    prior = torch.randn(m, d, generator=g, dtype=torch.float64)
    return x, x @ prior + 0.5 * torch.randn(n, d, generator=g, dtype=torch.float64) + 1, prior


def sums(x: torch.Tensor, y: torch.Tensor, weights: torch.Tensor | None = None) -> cf.Regression:
    stats = cf.Regression.empty(x.shape[-1], y.shape[-1])
    stats.add(x, y, weights)
    return stats


def metric_of(d: int, seed: int = 3) -> torch.Tensor:
    root = torch.randn(d, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return root @ root.T


def test_streamed_sums_equal_one_shot_sums_in_any_order():
    x, y, _ = rows()
    whole = sums(x, y)
    for order in ((0, 1, 2), (2, 0, 1)):
        parts = cf.Regression.empty(8, 5)
        for i in order:
            parts.add(x[i * 70 : (i + 1) * 70], y[i * 70 : (i + 1) * 70])
        for name in ("x", "y", "xx", "xy", "yy"):
            assert torch.allclose(getattr(parts, name), getattr(whole, name), rtol=1e-12, atol=1e-9)


def test_equal_weights_change_no_solution_and_zero_weights_leave_rows_out():
    x, y, prior = rows()
    some = torch.zeros(200, dtype=torch.float64)
    some[:90] = 1
    plain, _ = cf.refit(sums(x[:90], y[:90]), prior, ridge=1e-3)
    assert torch.allclose(cf.refit(sums(x, y, some), prior, ridge=1e-3)[0], plain, atol=1e-10)
    alike = torch.full((200,), 0.25, dtype=torch.float64)
    assert torch.allclose(
        cf.refit(sums(x, y, alike), prior, ridge=1e-3)[0], cf.refit(sums(x, y), prior, ridge=1e-3)[0], atol=1e-10
    )


def test_an_affine_target_is_recovered_exactly():
    x, _, prior = rows()
    w, b = cf.refit(sums(x, x @ prior * 2 - 3), prior, ridge=1e-12)
    assert b is not None
    assert torch.allclose(w, 2 * prior, atol=1e-6)
    assert torch.allclose(b, torch.full((5,), -3.0, dtype=torch.float64), atol=1e-6)


def test_one_of_two_equal_inputs_can_go_without_loss():
    x, _, prior = rows()
    x = torch.cat([x, x[:, :1]], dim=1)
    prior = torch.cat([prior, prior[:1] + 1])
    stats = sums(x, x @ prior)
    found = cf.eliminate(stats, prior, ridge=1e-10)
    assert int(found.order[0]) in (0, 8)
    keep = found.kept(8)
    w, b = cf.refit(stats, prior, ridge=1e-10, keep=keep)
    assert b is not None
    assert torch.allclose(x[:, keep] @ w + b, x @ prior, atol=1e-5)


@pytest.mark.parametrize(("seed", "weighed", "bias"), list(product((0, 1), (False, True), (False, True))))
def test_each_removal_costs_what_a_refit_without_it_loses(seed, weighed, bias):
    """Brute force: at each step the input that goes is the best one, and the error is that of the best refit."""
    x, y, prior = rows(seed=seed)
    metric = metric_of(5) if weighed else None
    stats = sums(x, y)
    found = cf.eliminate(stats, prior, ridge=1e-9, bias=bias, metric=metric)
    keep = list(range(8))
    for gone in range(7):
        errors = {}
        for j in keep:
            rest = torch.tensor([k for k in keep if k != j])
            w, b = cf.refit(stats, prior, ridge=1e-9, keep=rest, bias=bias)
            errors[j] = cf.loss(stats, w, b, keep=rest, metric=metric)
        best = min(errors, key=errors.__getitem__)
        assert int(found.order[gone]) == best
        assert float(found.errors[7 - gone]) == pytest.approx(errors[best], rel=1e-5)
        keep.remove(best)


@settings(max_examples=15)
@given(m=st.integers(1, 150), seed=st.integers(0, 5))
def test_errors_never_rise_with_width_and_kept_sets_are_nested(m, seed):
    x, y, prior = rows(m=m, n=300, seed=seed)
    found = cf.eliminate(sums(x, y), prior, ridge=1e-2)
    assert sorted(found.order.tolist()) == list(range(m))
    assert bool((found.errors[1:] <= found.errors[:-1] + 1e-12).all())
    for k in range(m):
        assert set(found.kept(k).tolist()) < set(found.kept(k + 1).tolist())


def test_waiting_updates_give_what_single_ones_give(monkeypatch):
    from vitrim.closed_form import regression

    x, y, prior = rows(m=40, n=400)
    lazy = cf.eliminate(sums(x, y), prior, ridge=1e-3, metric=metric_of(5))
    monkeypatch.setattr(regression, "PANEL", 1)
    single = cf.eliminate(sums(x, y), prior, ridge=1e-3, metric=metric_of(5))
    assert torch.equal(lazy.order, single.order)
    assert torch.allclose(lazy.errors, single.errors, rtol=1e-9)


def test_in_sample_the_refit_beats_the_best_bias_which_beats_the_plain_cut():
    x, y, prior = rows()
    stats, keep = sums(x, y), torch.tensor([0, 2, 3, 6])
    w, b = cf.refit(stats, prior, ridge=1e-12, keep=keep)
    kept = prior[keep]
    best_bias = (stats.y - stats.x[keep] @ kept) / stats.weight
    refitted, shifted = cf.loss(stats, w, b, keep=keep), cf.loss(stats, kept, best_bias, keep=keep)
    assert refitted < shifted < cf.loss(stats, kept, torch.zeros(5), keep=keep)
    far, far_b = cf.refit(stats, prior, ridge=1e12, keep=keep)
    assert far_b is not None
    assert torch.allclose(far, kept, atol=1e-9)
    assert torch.allclose(far_b, best_bias, atol=1e-9)


def test_a_metric_of_outputs_changes_no_refit_without_a_ridge():
    """Only selection and scores depend on it: the solution of each output is its own."""
    x, y, prior = rows()
    turn = metric_of(5)
    w, _ = cf.refit(sums(x, y), prior, ridge=1e-13)
    turned, _ = cf.refit(sums(x, y @ turn), prior @ turn, ridge=1e-13)
    assert torch.allclose(turned, w @ turn, atol=1e-7)


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_a_regression_of_lower_rank_is_the_best_of_its_rank_and_the_ridge_regression_at_full_rank(rank):
    x, y = (torch.randn(40, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64) for n in (6, 8))
    a, b = reduced_rank(x.mT @ x, x.mT @ y, rank, ridge=1e-9)
    whole = torch.linalg.lstsq(x, y).solution
    energy = torch.linalg.svdvals(x @ whole).square()
    lost = (y - x @ a @ b).square().sum() - (y - x @ whole).square().sum()
    assert (a.shape, b.shape) == ((6, rank), (rank, 8))
    assert lost == pytest.approx(float(energy[rank:].sum()), rel=1e-5, abs=1e-5)


def test_the_ridge_is_chosen_by_images_left_out():
    g = torch.Generator().manual_seed(0)
    prior = torch.randn(30, 4, generator=g, dtype=torch.float64)

    def folds(rows_: int, noise: float, truth: torch.Tensor) -> list[cf.Regression]:
        found = []
        for _ in range(4):
            x = torch.randn(rows_, 30, generator=g, dtype=torch.float64)
            found.append(sums(x, x @ truth + noise * torch.randn(rows_, 4, generator=g, dtype=torch.float64)))
        return found

    few = cf.choose_ridge(folds(8, 3.0, prior), prior)
    many = cf.choose_ridge(folds(400, 0.01, torch.randn(30, 4, generator=g, dtype=torch.float64)), prior)
    assert few == max(cf.RIDGES)
    assert many == min(cf.RIDGES)
    assert cf.choose_ridge(folds(8, 1.0, prior)[:1], prior) == max(cf.RIDGES)


@pytest.mark.parametrize("noise", [0.02, 1.0, 8.0])
@pytest.mark.parametrize("weighed", [False, True])
def test_many_outputs_are_compared_on_random_sums_that_choose_as_all_of_them_do(noise, weighed, monkeypatch):
    g = torch.Generator().manual_seed(1)
    prior = torch.randn(24, 300, generator=g, dtype=torch.float64)
    truth = prior + 0.5 * torch.randn(24, 300, generator=g, dtype=torch.float64)
    folds = []
    for _ in range(4):
        x = torch.randn(20, 24, generator=g, dtype=torch.float64)
        folds.append(sums(x, x @ truth + noise * torch.randn(20, 300, generator=g, dtype=torch.float64)))
    metric = metric_of(300) if weighed else None
    sketched = cf.choose_ridge(folds, prior, metric=metric)
    monkeypatch.setattr(cf.regression, "SKETCH", 300)
    exact = cf.choose_ridge(folds, prior, metric=metric)
    assert abs(cf.RIDGES.index(sketched) - cf.RIDGES.index(exact)) <= 1


def test_rows_that_are_not_there_or_not_finite_are_said_so():
    with pytest.raises(DataError, match="without rows"):
        cf.refit(cf.Regression.empty(3, 2), torch.zeros(3, 2), ridge=1e-2)
    x, y, prior = rows()
    with pytest.raises(DataError, match="not finite"):
        cf.refit(sums(x * float("nan"), y), prior, ridge=1e-2)


def test_dead_inputs_are_the_first_to_go():
    x, y, prior = rows()
    x[:, 4] = 0
    assert int(cf.eliminate(sums(x, y), prior, ridge=1e-3).order[0]) == 4


# ---------------------------------------------------------------------------------------------------- streams, sensitivity


@settings(max_examples=30)
@given(spec=specs())
def test_a_block_by_halves_is_the_block(spec):
    model = make(spec)
    stream = model.embed(images(spec))
    for block in model.blocks:
        after, _ = block(stream, gates=OPEN)
        mid, heads, _ = block.attend(block.start(stream))
        assert (heads is None) == (block.spec.attention is None)
        out, hidden, _ = block.transform(block.mid(mid))
        assert (hidden is None) == (block.spec.mlp is None)
        same = block.end(out)
        assert torch.equal(same.x, after.x) or (same.x - after.x).abs().max() < 1e-10 * after.x.abs().max()
        stream = after
    x = images(spec)
    assert torch.allclose(cf.answers(model, model.embed(x), 0), model(x, gates=OPEN), atol=1e-9)


def test_streams_on_disk_equal_streams_in_memory(tmp_path, monkeypatch):
    from vitrim.closed_form import streams

    spec = vit(blocks=3)
    model, x = make(spec), images(spec, 6)
    ends = []
    for limit in (1 << 20, 0):
        monkeypatch.setattr(streams, "IN_MEMORY_BYTES", limit)
        held = cf.StreamCache(tmp_path, "a")
        held.fill(model.embed(part) for part in x.split(2))
        for block in model.blocks:
            held.advance(block.run)
        assert len(list(tmp_path.glob("a-*.bin"))) == (0 if limit else 3)
        assert held.count == 6
        ends.append(torch.cat([s.x for s in held.batches()]).clone())
    assert torch.equal(*ends)


@pytest.mark.parametrize(
    "step",
    [Similarity(keep=11, at="mid"), Merge(axis="h", keep=3), Merge(axis="v", keep=2, weight="similarity", tau=0.5)],
)
def test_a_teacher_follows_the_students_matching(step):
    from dataclasses import replace

    spec = vit(blocks=2)
    spec = replace(spec, blocks=(replace(spec.blocks[0], steps=(step,)), spec.blocks[1]))
    model = make(spec)
    stream, other = model.embed(images(spec, 3)), model.embed(images(spec, 3, seed=9))
    block = model.blocks[0]
    own = getattr(block, step.at)(stream)
    theirs, ours = cf.following(block, stream, stream, step.at)
    assert torch.equal(theirs.x, own.x)
    assert torch.equal(ours.x, own.x)
    theirs, ours = cf.following(block, stream, other, step.at)
    assert theirs.x.shape == ours.x.shape == own.x.shape
    assert torch.equal(ours.x, getattr(block, step.at)(other).x)
    assert torch.allclose(theirs.x[:, :1], stream.x[:, :1])
    constant = stream._replace(x=torch.ones_like(stream.x))
    forced, _ = cf.following(block, constant, other, step.at)
    assert torch.allclose(forced.x, torch.ones_like(forced.x))  # averages, whoever belongs together


def test_sign_draws_average_to_the_fisher_matrix():
    spec = vit(width=8, blocks=1, heads=1, head_dim=4, hidden=6, classes=3)
    model, x = make(spec), images(spec, 1)
    jacobian = []
    found = model(x.requires_grad_(), want=("block:0", "logits"))
    logs = found["logits"].log_softmax(-1)[0]
    for c in range(3):
        (g,) = torch.autograd.grad(logs[c], found["block:0"], retain_graph=True)
        jacobian.append(g[0])
    p = logs.detach().exp()
    exact = sum(p[c] * jacobian[c].T @ jacobian[c] for c in range(3))
    site = cf.sensitivity(model, [images(spec, 1)], draws=4000)["block:0"]
    assert torch.allclose(site.matrix / 4000, exact, atol=0.08 * float(exact.abs().max()))
    assert float(site.tokens[1]) == 0  # behind the last attention patches no longer matter
    assert site.weights(17).tolist() == [1.0] + [1 / 64] * 16


def test_importance_tells_the_length_of_a_tokens_gradient() -> None:
    spec = vit(blocks=2)
    model, x = make(spec), images(spec, 24)
    sites = cf.sensitivity(model, [x], draws=16, important=True)
    found = model(x.requires_grad_(), want=("mid:0", "logits"))
    logs, squares = found["logits"].log_softmax(-1), torch.zeros(24, 16, dtype=torch.float64)
    for c in range(5):
        scaled = logs[:, c] * (logs[:, c].detach() / 2).exp()
        (g,) = torch.autograd.grad(scaled.sum(), found["mid:0"], retain_graph=True)
        squares += g[:, 1:].square().sum(-1)
    told = found["mid:0"][:, 1:].detach() @ sites["mid:0"].importance
    assert torch.corrcoef(torch.stack([told.flatten(), squares.log().flatten()]))[0, 1] > 0.5
    assert float(sites["mid:1"].importance.abs().sum()) == 0  # behind the last attention patches no longer matter
    assert float(cf.sensitivity(model, [x])["mid:0"].importance.abs().sum()) == 0


def test_sensitivity_of_an_encoder_and_without_images():
    spec = vit(blocks=1, outputs=())
    sites = cf.sensitivity(make(spec), [images(spec, 2)])
    assert set(sites) == {"mid:0", "block:0"}
    assert float(sites["mid:0"].metric.diagonal().mean()) == pytest.approx(1)
    with pytest.raises(DataError, match="no images"):
        cf.sensitivity(make(spec), [])


@given(data=st.data())
def test_refits_of_nested_sets_equal_a_refit_of_each(data: st.DataObject) -> None:
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    x, y = (torch.randn(40, n, generator=generator, dtype=torch.float64) for n in (7, 3))
    prior = torch.randn(7, 3, generator=generator, dtype=torch.float64)
    stats, bias = cf.Regression.empty(7, 3), data.draw(st.booleans())
    stats.add(x, y)
    order = cf.eliminate(stats, prior, ridge=1e-2, bias=bias)
    sizes = (1, 4, 7)
    for size, (keep, w, b) in zip(sizes, refits(stats, prior, order, sizes, ridge=1e-2, bias=bias), strict=True):
        assert torch.equal(keep, order.kept(size))
        alone, shift = cf.refit(stats, prior, ridge=1e-2, keep=keep, bias=bias)
        assert close(w, alone)
        assert (b is None) == (shift is None)
        if b is not None:
            assert close(b, shift)
