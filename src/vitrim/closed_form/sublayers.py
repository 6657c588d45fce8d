"""The nested parts of a block: from one set of sums, every rank of its products and every width of its MLP.

Scores: whitened factors of W_Q W_K^T, in order of importance. Values: directions of W_V W_O in the metric of what a head mixes
and of what the outputs mind; then the output projections of all heads are refitted together, since heads' errors are
correlated. MLP: an order of elimination and a refit of its last linear. A level is a slice and a small solve.

Shapes: H heads, Q and V their widths, D width, M hidden units, E inner width of a factored last linear, N tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from vitrim.closed_form.factors import Factors, factorise_qk, factorise_vo
from vitrim.closed_form.regression import Elimination, Regression, eliminate, refit, refits
from vitrim.model import Attention, Mlp

SCORE_RIDGE = 1e-5
"""Of the factors: share of the plain SVD mixed into the statistics."""


def double(tensor: Tensor) -> Tensor:
    """A detached float64 copy on the CPU."""
    return tensor.detach().to("cpu", torch.float64)


def head_weights(attention: Attention) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """W_Q, W_K [H, D, Q], W_V [H, D, V], W_O [H, V, D]; float64 on the CPU."""
    s = attention.spec
    inner = s.heads * s.qk_dim
    q, k, v = (double(w).unflatten(0, (s.heads, -1)).mT for w in attention.qkv.split([inner, inner, s.heads * s.v_dim]))
    return q, k, v, double(attention.out.weight).T.unflatten(0, (s.heads, -1))


def per_head(bias: Tensor | None, heads: int) -> Tensor | None:
    """A bias of queries or values by head, [H, Q]; float64 on the CPU."""
    return None if bias is None else double(bias).unflatten(0, (heads, -1))


def linear_weight(mlp: Mlp, part: str) -> Tensor:
    """W [in, out] of a linear, `fc1` or `fc2`, the product of its factors if it has them; float64 on the CPU."""
    last, first = getattr(mlp, part), getattr(mlp, f"{part}a")
    return double(last.weight).T if first is None else double(first.weight).T @ double(last.weight).T


# ---------------------------------------------------------------------------------------------------- queries and keys


@dataclass
class Scores:
    """Sums of q^T q over weighted queries and of k^T k over keys centred within each image.  [H, Q, Q] float64.

    Their scale does not matter. None: nothing seen, and factors are those of the plain SVD.
    """

    queries: Tensor | None = None
    keys: Tensor | None = None

    def add(self, q: Tensor, k: Tensor, weights: Tensor | None) -> None:
        """q, k: B H N Q, after their biases. weights: [N] of the queries; None: all alike."""
        k = k - k.mean(2, keepdim=True)
        heavy = q if weights is None else q * weights.to(q)[:, None]
        first = torch.einsum("bhnq,bhnr->hqr", heavy, q).to("cpu", torch.float64)
        second = torch.einsum("bhnq,bhnr->hqr", k, k).to("cpu", torch.float64)
        self.queries = first if self.queries is None else self.queries + first
        self.keys = second if self.keys is None else self.keys + second

    def factors(self, attention: Attention, ridge: float = SCORE_RIDGE) -> Factors:
        """Of the attention's scores, at full rank."""
        q, k, _, _ = head_weights(attention)
        bias = per_head(attention.q_bias, attention.spec.heads)
        return factorise_qk(q, bias, k, query_moment=self.queries, key_moment=self.keys, ridge=ridge)


# --------------------------------------------------------------------------------------------------- values and outputs


class Values(NamedTuple):
    """Directions of the values.  left: [H, D, R] new W_V. inner: [H, V, R] from the old values to the new ones.

    prior: [H, R, D] the matching W_O before any refit.
    """

    left: Tensor
    inner: Tensor
    prior: Tensor


def values(attention: Attention, stats: Regression, metric: Tensor | None, ridge: float = SCORE_RIDGE) -> Values:
    """Leading directions of each head's W_V W_O.  stats: its inputs are what all heads hand on, [H * V], biases included.

    metric: [D, D] positive definite, of errors of the half's update; None: the identity.
    """
    _, _, v, o = head_weights(attention)
    heads, size = v.shape[0], v.shape[2]
    xx = stats.moments(bias=True)[0].cpu()
    moment = torch.stack([xx[h * size : (h + 1) * size, h * size : (h + 1) * size] for h in range(heads)])
    if metric is None:
        found = factorise_vo(v, o, moment=moment, ridge=ridge)
        right = found.right
    else:
        squares, vectors = torch.linalg.eigh(metric.cpu())
        root = squares.clamp_min(1e-12 * float(squares.max())).sqrt()
        found = factorise_vo(v, o @ (vectors * root) @ vectors.mT, moment=moment, ridge=ridge)
        right = found.right @ (vectors / root) @ vectors.mT
    return Values(left=found.left, inner=torch.linalg.pinv(v) @ found.left, prior=right)


def output(
    stats: Regression, found: Values, rank: int, value_bias: Tensor | None, *, ridge: float
) -> tuple[Tensor, Tensor]:
    """W_O [H * rank, D] and b_O [D] of all heads, refitted together on their leading directions.

    value_bias: [H * V] that the regression's inputs include; the new values carry none, and b_O takes what it did.
    """
    inner = torch.block_diag(*found.inner[..., :rank])
    w, b = refit(stats.through(inner), found.prior[:, :rank].flatten(0, 1), ridge=ridge)
    assert b is not None
    w, b = w.cpu(), b.cpu()
    return w, b if value_bias is None else b + double(value_bias) @ inner @ w


# ------------------------------------------------------------------------------------------------------------------- MLP


class Last(NamedTuple):
    """A linear that is refitted.  prior: [M, E] its weights. outputs: [D, E] the factor behind it, or None.

    bias: whether the refit has one.
    """

    prior: Tensor
    outputs: Tensor | None = None
    bias: bool = True


def last_linear(mlp: Mlp, *, bias: bool = True) -> Last:
    """fc2; of a factored one its first factor: the rank stays, and the second factor is not refitted."""
    if mlp.fc2a is None:
        return Last(double(mlp.fc2.weight).T, None, bias)
    return Last(double(mlp.fc2a.weight).T, double(mlp.fc2.weight), bias)


def seen(stats: Regression, last: Last, metric: Tensor | None) -> tuple[Regression, Tensor | None]:
    """The regression and its metric as the refitted linear sees them; exact for a fixed factor behind it.

    With F the metric and B the factor, the best target in B's image is y F B (B^T F B)^-1, and errors there weigh B^T F B.
    """
    if last.outputs is None:
        return stats, metric
    b = last.outputs.to(stats.x)
    fb = b if metric is None else metric.to(b) @ b
    inner = b.mT @ fb
    return stats.on(fb @ torch.linalg.pinv(inner, hermitian=True)), inner


def elimination(stats: Regression, last: Last, metric: Tensor | None, *, ridge: float) -> Elimination:
    """The order in which hidden units go."""
    inner, inner_metric = seen(stats, last, metric)
    return eliminate(inner, last.prior, ridge=ridge, bias=last.bias, metric=inner_metric)


def refitted(
    stats: Regression, last: Last, metric: Tensor | None, *, ridge: float, keep: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """New weights [K, E] of the linear and the bias [D] behind it all, or None.  keep: indices of the inputs that stay."""
    inner, _ = seen(stats, last, metric)
    w, b = refit(inner, last.prior, ridge=ridge, keep=keep, bias=last.bias)
    return w.cpu(), _behind(stats, last, w, b, keep)


def refitted_at(
    stats: Regression, last: Last, metric: Tensor | None, order: Elimination, sizes: Iterable[int], *, ridge: float
) -> Iterator[tuple[int, Tensor, Tensor, Tensor | None]]:
    """For each size K the indices that stay, and what `refitted` gives for them."""
    inner, _ = seen(stats, last, metric)
    sizes = tuple(sizes)
    for size, (keep, w, b) in zip(
        sizes, refits(inner, last.prior, order, sizes, ridge=ridge, bias=last.bias), strict=True
    ):
        yield size, keep.cpu(), w.cpu(), _behind(stats, last, w, b, keep)


def _behind(stats: Regression, last: Last, w: Tensor, b: Tensor | None, keep: Tensor | None) -> Tensor | None:
    """The bias behind the linear and the factor behind it, if there is one: what all outputs need, not its image alone."""
    if b is not None and last.outputs is not None:
        mean = (stats.x if keep is None else stats.x[keep.to(stats.x.device)]) / stats.weight
        b = stats.y / stats.weight - mean @ w @ last.outputs.to(w).mT
    return None if b is None else b.cpu()


def mean_target(stats: Regression) -> Tensor:
    """[D] what an MLP without units leaves as a bias."""
    return (stats.y / stats.weight).cpu()
