"""Factorisation: exact at full rank, tail energy when truncated, in either metric."""

import pytest
import torch
from torch import Tensor

from tests.specs import close, images, make, vit
from vitrim.closed_form import Moments, calibrate, factorise_linear, factorise_qk, factorise_vo, fold_value_bias
from vitrim.errors import DataError

D, H, Q, V, N = 24, 3, 8, 6, 17
SCALE = Q**-0.5


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def weights(seed: int = 0) -> dict[str, Tensor]:
    """One attention layer in row-vector form, every bias random."""
    shapes = {
        "q": (H, D, Q),
        "k": (H, D, Q),
        "v": (H, D, V),
        "o": (H, V, D),
        "bq": (H, Q),
        "bk": (H, Q),
        "bv": (H, V),
        "bo": (D,),
    }
    return {name: draw(*shape, seed=100 * seed + 7 * i) * 0.4 for i, (name, shape) in enumerate(shapes.items())}


def attend(x: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float = SCALE) -> Tensor:
    scores = q @ k.mT * scale
    return (scores if mask is None else scores + mask).softmax(-1) @ v  # H N V


def dense(x: Tensor, w: dict[str, Tensor], mask: Tensor | None = None) -> Tensor:
    q, k, v = x @ w["q"] + w["bq"][:, None], x @ w["k"] + w["bk"][:, None], x @ w["v"] + w["bv"][:, None]
    return (attend(x, q, k, v, mask) @ w["o"]).sum(0) + w["bo"]


def low_rank(
    x: Tensor, w: dict[str, Tensor], r1: int, r2: int, mask: Tensor | None = None, biases: bool = True
) -> Tensor:
    qk = factorise_qk(w["q"], w["bq"], w["k"]).sliced(r1)
    vo = factorise_vo(w["v"], w["o"]).sliced(r2)
    assert qk.left_bias is not None
    q = x @ qk.left + (qk.left_bias[:, None] if biases else 0)
    update = (attend(x, q, x @ qk.right.mT, x @ vo.left, mask) @ vo.right).sum(0)
    bias = fold_value_bias(w["bv"], w["o"], w["bo"])
    assert bias is not None
    return update + bias if biases else update


def error(w_q: Tensor, w_k: Tensor, left: Tensor, right: Tensor) -> Tensor:
    return (w_q @ w_k.mT - left @ right).square().sum((-2, -1))


def test_full_rank_with_all_biases_is_the_dense_attention():
    x, w = draw(N, D), weights()
    assert close(low_rank(x, w, Q, V), dense(x, w))
    assert not close(low_rank(x, w, Q, V, biases=False), dense(x, w), 1e-3)


def test_an_additive_mask_changes_nothing_of_that():
    x, w = draw(N, D), weights(1)
    mask = torch.where(draw(N, N) > 0.7, -torch.inf, 0.3)
    mask.fill_diagonal_(0.0)  # every row keeps a key
    assert close(low_rank(x, w, Q, V, mask), dense(x, w, mask))


def test_the_key_bias_is_invisible():
    x, w = draw(N, D), weights()
    assert close(dense(x, {**w, "bk": 5 * w["bk"] + 1}), dense(x, w))


def test_truncation_error_is_the_tail_energy_and_falls_with_the_rank():
    w = weights()
    full = factorise_qk(w["q"], None, w["k"])
    product = torch.linalg.svdvals(w["q"] @ w["k"].mT)
    assert close(full.spectrum, product[:, :Q])
    assert float(product[:, Q:].max()) < 1e-10  # the product's rank is at most the head's width
    before = torch.full((H,), torch.inf, dtype=torch.float64)
    for rank in range(1, Q + 1):
        cut = full.sliced(rank)
        lost = error(w["q"], w["k"], cut.left, cut.right)
        assert close(lost, full.spectrum[:, rank:].square().sum(-1), 1e-8)
        assert (lost < before).all()
        before = lost


def test_joint_truncation_beats_truncating_queries_and_keys_apart():
    w = weights(2)
    joint, r = factorise_qk(w["q"], None, w["k"]).sliced(3), 3
    u, s, t = torch.linalg.svd(w["q"], full_matrices=False)
    q = u[..., :r] * s[..., None, :r] @ t[..., :r, :]
    u, s, t = torch.linalg.svd(w["k"], full_matrices=False)
    k = u[..., :r] * s[..., None, :r] @ t[..., :r, :]
    ours = error(w["q"], w["k"], joint.left, joint.right)
    assert (ours <= error(w["q"], w["k"], q, k.mT)).all()
    assert (ours <= error(w["q"], w["k"], q, w["k"].mT)).all()


@pytest.mark.parametrize("whitened", [False, True])
def test_both_sides_are_balanced(whitened):
    w = weights()
    moment = (lambda e: torch.eye(e, dtype=torch.float64) + 0.1) if whitened else (lambda e: None)
    for full in (
        factorise_qk(w["q"], w["bq"], w["k"], query_moment=moment(Q), key_moment=moment(Q)),
        factorise_vo(w["v"], w["o"], moment=moment(V)),
    ):
        left = full.left if full.left_bias is None else torch.cat([full.left, full.left_bias[:, None]], 1)
        assert close(left.norm(dim=-2), full.right.norm(dim=-1))


def test_padded_heads_need_the_explicit_scale():
    x, w = draw(N, D), weights()
    cut = factorise_qk(w["q"], None, w["k"]).sliced(3)
    q, k, v = x @ cut.left, x @ cut.right.mT, x @ w["v"]
    wide_q, wide_k = (torch.nn.functional.pad(t, (0, Q - 3)) for t in (q, k))
    fused = torch.nn.functional.scaled_dot_product_attention
    assert close(fused(wide_q, wide_k, v, scale=SCALE), fused(q, k, v, scale=SCALE))
    assert close(fused(q, k, v, scale=SCALE), attend(x, q, k, v))
    assert not close(fused(q, k, v), attend(x, q, k, v), 1e-3)  # the kernel's own scale follows the new width


def test_whitened_score_error_is_the_tail_over_all_pairs():
    x, w, n = draw(40, D) @ draw(D, D), weights(), 40
    extended = torch.cat([x, torch.ones(n, 1, dtype=torch.float64)], 1)
    w_q = torch.cat([w["q"], w["bq"][:, None]], 1)
    q, k = extended @ w_q, (x - x.mean(0)) @ w["k"]
    full = factorise_qk(w["q"], w["bq"], w["k"], query_moment=q.mT @ q / n, key_moment=k.mT @ k / n, ridge=1e-14)
    cut = full.sliced(4)
    assert cut.left_bias is not None
    wrong = q @ k.mT - (x @ cut.left + cut.left_bias[:, None]) @ ((x - x.mean(0)) @ cut.right.mT).mT
    assert close(wrong.square().mean((-2, -1)), full.spectrum[:, 4:].square().sum(-1), 1e-6)


def test_whitened_output_error_is_the_tail_and_the_mean_is_restored():
    w, mixed = weights(), draw(H, 50, V) @ draw(H, V, V) + 2
    mean = mixed.mean(1)
    centred = mixed - mean[:, None]
    full = factorise_vo(w["v"], w["o"], moment=centred.mT @ centred / 50, mean=mean, ridge=1e-14)
    z = mixed @ torch.linalg.pinv(w["v"])  # inputs that the heads mix into exactly this
    lost = full.lost_mean(3)
    assert lost is not None
    wrong = mixed @ w["o"] - (z @ full.left[..., :3] @ full.right[:, :3] + lost[:, None])
    assert close(wrong.square().sum(-1).mean(1), full.spectrum[:, 3:].square().sum(-1), 1e-8)
    plain = factorise_vo(w["v"], w["o"]).sliced(3)
    assert (wrong.square().sum((1, 2)) < (mixed @ w["o"] - z @ plain.left @ plain.right).square().sum((1, 2))).all()
    assert close(full.lost_mean(V), torch.zeros(H, D, dtype=torch.float64))


def test_white_statistics_give_the_plain_decomposition():
    w = weights()
    gram_q, gram_k = w["q"].mT @ w["q"], w["k"].mT @ w["k"]
    pairs = (
        (
            factorise_qk(w["q"], None, w["k"], query_moment=gram_q, key_moment=gram_k),
            factorise_qk(w["q"], None, w["k"]),
        ),
        (factorise_vo(w["v"], w["o"], moment=w["v"].mT @ w["v"]), factorise_vo(w["v"], w["o"])),
    )
    for white, plain in pairs:
        a, b = white.sliced(3), plain.sliced(3)
        assert close(a.left @ a.right, b.left @ b.right, 1e-7)


@pytest.mark.parametrize("shape", [(10, 30), (30, 10)])
@pytest.mark.parametrize("side", ["inputs", "outputs"])
def test_a_linears_output_error_is_the_tail(shape, side):
    w, x = draw(*shape), draw(60, shape[0]) @ draw(shape[0], shape[0]) + 1
    y = x @ w
    rows = {"inputs": x, "outputs": y}[side]
    centred = rows - rows.mean(0)
    full = factorise_linear(w, mean=y.mean(0), ridge=1e-14, **{side: centred.T @ centred / 60})
    lost = full.lost_mean(4)
    assert lost is not None
    wrong = y - (x @ full.left[:, :4] @ full.right[:4] + lost)
    assert close(wrong.square().sum(1).mean(), full.spectrum[4:].square().sum(), 1e-8)
    assert close(full.left @ full.right, w, 1e-8)
    plain = factorise_linear(w)
    assert close(plain.left @ plain.right, w)
    assert close(plain.spectrum, torch.linalg.svdvals(w))


def test_singular_statistics_stay_finite_and_exact_at_full_rank():
    w, one = weights(), draw(H, 1, Q)
    moment = one.mT @ one
    full = factorise_qk(w["q"], w["bq"], w["k"], query_moment=moment, key_moment=0 * moment, ridge=1e-6)
    assert torch.isfinite(full.left).all()
    assert torch.isfinite(full.right).all()
    low = factorise_qk(w["q"], w["bq"], w["k"], query_moment=moment, key_moment=moment, ridge=1e-4)
    assert close(low.left @ low.right, w["q"] @ w["k"].mT)


def test_queries_and_keys_may_come_from_streams_of_unequal_width():
    q, k = draw(D, Q), draw(D + 5, Q)
    full = factorise_qk(q, None, k)
    assert close(full.left @ full.right, q @ k.T)
    assert full.sliced(1).left.shape == (D, 1)


def test_a_head_wider_than_the_stream_has_the_streams_rank():
    full = factorise_qk(draw(4, 9), draw(9), draw(4, 9, seed=3))
    assert full.spectrum.shape == (4,)
    assert close(full.left @ full.right, draw(4, 9) @ draw(4, 9, seed=3).T)


def test_moments_of_batches_are_those_of_all_rows():
    rows, moments = draw(H, 30, 5) + 1, Moments()
    for part in rows.split(7, dim=1):
        moments.add(part)
    centred = rows - rows.mean(1, keepdim=True)
    assert close(moments.covariance, centred.mT @ centred / 30)


def test_statistics_do_not_depend_on_the_batches_and_leave_no_hook():
    model, x = make(vit()), images(vit(), 6)
    whole, parts = calibrate(model, [x]), calibrate(model, x.split(2))
    for a, b in zip(whole, parts, strict=True):
        for name in ("queries", "keys", "values", "fc1", "fc2"):
            assert close(getattr(a, name).covariance, getattr(b, name).covariance)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_no_images_and_broken_numbers_are_refused():
    model, x = make(vit()), images(vit())
    with pytest.raises(DataError, match="no images"):
        calibrate(model, [])
    with pytest.raises(DataError, match="not finite"):
        calibrate(model, [x * torch.nan])
