"""Low-rank factors of attention and linears. Pure algebra: knows no network.

Row-vector convention: a token is a row x, a weight maps it as `x @ W`, so W is the transpose of a `torch.nn.Linear`'s.
Factors are always made at full rank, in order of importance: slicing the leading components truncates them. The squared
singular values in `spectrum` are the error that each component saves; all arithmetic is in float64.

No D x D product is ever decomposed. With A = C_q^(1/2) [W_Q; b_Q] and B = C_k^(1/2) W_K, the spectrum of A B^T needs only
the Q x Q moments A^T A = E[q^T q] and B^T B = E[k^T k] of the queries and keys themselves; likewise the attention output
needs E[a^T a] of what a head mixes, and a linear the smaller of the moments of its inputs and of its outputs. Calibration
therefore keeps some 2 D^2 numbers a block, and no image after its batch.

Shapes: H heads, N tokens, D width, Q query/key dims, V value dims, R rank; `...` any leading dims, usually H.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

TINY = torch.finfo(torch.float64).eps


@dataclass(frozen=True, kw_only=True)
class Factors:
    """`x @ W` as `x @ left @ right`, components in order of importance and balanced (equal norms on both sides).

    left: [..., in, R]; right: [..., R, out].  spectrum: [..., R] singular values, in the metric of the statistics.
    left_bias: [..., R] added between the two (the query bias), or None.
    mean: [..., out] the mean of `x @ W`, whose part lost by truncation `lost_mean` gives back, or None.
    mean_between: [..., R] the mean of `x @ left`.
    """

    left: Tensor
    right: Tensor
    spectrum: Tensor
    left_bias: Tensor | None = None
    mean: Tensor | None = None
    mean_between: Tensor | None = None

    def lost_mean(self, rank: int) -> Tensor | None:
        """[..., out]: what the first `rank` components miss of the mean output; belongs into the output bias."""
        if self.mean is None or self.mean_between is None:
            return None
        right = self.right[..., :rank, :].to(self.mean.dtype)
        return self.mean - (self.mean_between[..., None, :rank] @ right).squeeze(-2)

    def sliced(self, rank: int) -> Factors:
        """The leading components, as views. The mean still belongs to full rank."""
        return replace(
            self,
            left=self.left[..., :rank],
            right=self.right[..., :rank, :],
            spectrum=self.spectrum[..., :rank],
            left_bias=None if self.left_bias is None else self.left_bias[..., :rank],
            mean_between=None if self.mean_between is None else self.mean_between[..., :rank],
        )


def factorise_qk(
    w_q: Tensor,
    b_q: Tensor | None,
    w_k: Tensor,
    *,
    query_moment: Tensor | None = None,
    key_moment: Tensor | None = None,
    ridge: float = 1e-6,
) -> Factors:
    """The scores' product [W_Q; b_Q] W_K^T in factors; b_K is invisible to the softmax and has no place here.

    w_q: [..., D_q, Q]; b_q: [..., Q]; w_k: [..., D_k, Q]. Gives left [..., D_q, R], right [..., R, D_k] (keys project by
    its transpose), left_bias [..., R] if b_q is given.
    query_moment: [..., Q, Q] E[q^T q], bias included; key_moment: [..., Q, Q] E[k^T k], keys centred within each image
    (the softmax ignores what all keys share). Both None: the plain SVD.
    ridge: lambda of `_root`. The squared spectrum's tail is the expected squared error of the centred scores.
    """
    w_q, w_k = w_q.double(), w_k.double()
    extended = w_q if b_q is None else torch.cat([w_q, b_q.double()[..., None, :]], dim=-2)
    root_q, inverse_q = _root(extended, query_moment, ridge)
    root_k, _ = _root(w_k, key_moment, ridge)
    left, spectrum, _ = torch.linalg.svd(root_q @ root_k.mT, full_matrices=False)
    # biorthogonal pair: (inverse_q left) (root_q^T left)^T is the identity at full rank, so no key root is inverted
    queries, keys = extended @ (inverse_q @ left), w_k @ (root_q.mT @ left)
    queries, right = _balanced(queries, keys.mT)
    if b_q is None:
        return Factors(left=queries, right=right, spectrum=spectrum)
    return Factors(left=queries[..., :-1, :], right=right, spectrum=spectrum, left_bias=queries[..., -1, :])


def factorise_vo(
    w_v: Tensor, w_o: Tensor, *, moment: Tensor | None = None, mean: Tensor | None = None, ridge: float = 1e-6
) -> Factors:
    """The product W_V W_O of each head in factors; fold b_V into the output bias first (`fold_value_bias`).

    w_v: [..., D, V]; w_o: [..., V, D]. Gives left [..., D, R], right [..., R, D].
    moment: [..., V, V] E[a^T a] of a = softmax(.) x W_V without b_V; None: the plain SVD. For a moment C_z of the heads'
    inputs pass W_V^T C_z W_V. mean: [..., V] E[a], if the moment is centred and the output bias can take the rest.
    The squared spectrum's tail is the squared output error of a head on the calibration images.
    """
    w_v, w_o = w_v.double(), w_o.double()
    root, _ = _root(w_v, moment, ridge)
    _, spectrum, right = torch.linalg.svd(root @ w_o, full_matrices=False)
    inner = w_o @ right.mT  # V R: to the leading directions of the output
    if mean is None:
        return _factors(w_v @ inner, right, spectrum)
    row = mean.double()[..., None, :]
    return _factors(w_v @ inner, right, spectrum, (row @ w_o).squeeze(-2), (row @ inner).squeeze(-2))


def fold_value_bias(b_v: Tensor | None, w_o: Tensor, b_o: Tensor | None) -> Tensor | None:
    """The output bias that carries the value biases too, exact because attention rows sum to 1.

    b_v: [H, V]; w_o: [H, V, D]; b_o: [D]. None if neither bias is there.
    """
    folded = None if b_v is None else torch.einsum("hv,hvd->d", b_v.double(), w_o.double())
    if b_o is None:
        return folded
    return b_o.double() if folded is None else b_o.double() + folded


def factorise_linear(
    w: Tensor,
    *,
    inputs: Tensor | None = None,
    outputs: Tensor | None = None,
    mean: Tensor | None = None,
    ridge: float = 1e-6,
) -> Factors:
    """A linear W [in, out] in factors left [in, R], right [R, out], R = min(in, out).

    inputs: [in, in] second moment of x, or outputs: [out, out] of x W; at most one. Both None: the plain SVD.
    mean: E[x W] [out], if the moment is centred and the bias can take the rest. The squared spectrum's tail is the squared
    output error.
    """
    assert inputs is None or outputs is None
    w = w.double()
    rank = min(w.shape)
    if outputs is not None:
        outputs = outputs.double()
        metric = outputs + ridge * _trace(outputs) / _trace(w.mT @ w).clamp_min(TINY) * (w.mT @ w)
        values, vectors = torch.linalg.eigh(metric)
        spectrum = values.flip(-1)[:rank].clamp_min(0).sqrt()
        right = vectors.flip(-1)[:, :rank].mT
    else:
        weighed = w
        if inputs is not None:
            moment = inputs.double()
            size = moment.shape[-1]
            moment = moment + ridge * _trace(moment) / size * torch.eye(size, dtype=w.dtype, device=w.device)
            values, vectors = torch.linalg.eigh(moment)
            weighed = values.clamp_min(0).sqrt()[:, None] * (vectors.mT @ w)
        _, spectrum, right = torch.linalg.svd(weighed, full_matrices=False)
    if mean is None:
        return _factors(w @ right.mT, right, spectrum)
    return _factors(w @ right.mT, right, spectrum, mean.double(), mean.double() @ right.mT)


def _factors(
    left: Tensor, right: Tensor, spectrum: Tensor, mean: Tensor | None = None, between: Tensor | None = None
) -> Factors:
    """Balanced.  between: the mean of `x @ left` before that."""
    columns, rows = _balanced(left, right)
    if between is not None:
        between = between * ((right * right).sum(-1) / (rows * right).sum(-1))
    return Factors(left=columns, right=rows, spectrum=spectrum, mean=mean, mean_between=between)


def _root(w: Tensor, moment: Tensor | None, ridge: float) -> tuple[Tensor, Tensor]:
    """L with L^T L = the moment (+ ridge), and its pseudo-inverse.  w: [..., D, E] -> [..., m, E], [..., E, m].

    None: of W^T W, from W itself, which keeps the accuracy that squaring would lose. The ridge adds
    `ridge * tr(moment) / tr(W^T W)` times W^T W: it bounds the inverse, and as it grows the plain SVD returns.
    """
    if moment is None:
        _, values, rows = torch.linalg.svd(w, full_matrices=False)
    else:
        gram, moment = w.mT @ w, moment.double()
        share = ridge * _trace(moment) / _trace(gram).clamp_min(TINY)
        squares, vectors = torch.linalg.eigh(moment + share[..., None, None] * gram)
        values, rows = squares.clamp_min(0).sqrt(), vectors.mT
    top = values.amax(-1, keepdim=True)
    live = values > top * TINY * w.shape[-1]
    inverse = torch.where(live, 1 / values.where(live, torch.ones_like(values)), torch.zeros_like(values))
    return values[..., :, None] * rows, rows.mT * inverse[..., None, :]


def _trace(matrix: Tensor) -> Tensor:
    return matrix.diagonal(dim1=-2, dim2=-1).sum(-1)


def _balanced(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Equal norms of each component's column and row: weight decay and half precision treat both sides alike."""
    columns, rows = left.norm(dim=-2), right.norm(dim=-1)
    both = (columns > 0) & (rows > 0)
    ratio = torch.where(both, rows / columns.where(both, torch.ones_like(columns)), torch.ones_like(rows)).sqrt()
    return left * ratio[..., None, :], right / ratio[..., :, None]
