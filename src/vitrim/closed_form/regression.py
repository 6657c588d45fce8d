"""Linear regressions from streamed sums: refits with a ridge towards inherited weights, and the order of elimination.

A regression is y ~ x W (+ b) over weighted rows (tokens). Its sums are all that is kept of the rows: any subset of the
inputs, any ridge and any output metric follow without touching data again. Sums and solves are in float64; the products
within a chunk of rows are in the dtype of the rows.

Source   the removal cost ||W_j||^2 / P_jj and the update of what stays are Optimal Brain Surgeon's, as used for columns by
         Optimal Brain Compression (arXiv 2208.11580), SparseGPT (2301.00774) and ZipLM (2302.04089); the ridge towards the
         inherited weights, the output metric and the lazy form in W F W^T are ours.
Shapes   n rows, M inputs (hidden units, head channels), D outputs, K kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial, reduce
from operator import add

import torch
from torch import Tensor

from vitrim.errors import DataError

CHUNK = 4096
"""Rows whose products are formed at once, before they are added in float64."""
RIDGES = (1e-4, 1e-3, 1e-2, 3e-2, 1e-1, 1.0)
"""What `choose_ridge` chooses from: shares of the mean diagonal of the inputs' covariance."""
PANEL = 64
"""Removals between two updates of the full matrices."""
SKETCH = 128
"""Random sums of the outputs on which `choose_ridge` compares where there are more: each solves the same system as the outputs."""


@dataclass
class Regression:
    """Sums over weighted rows.  weight: of all rows.  x [M], y [D], xx [M, M], xy [M, D], yy [D, D]; float64."""

    weight: float
    x: Tensor
    y: Tensor
    xx: Tensor
    xy: Tensor
    yy: Tensor

    @classmethod
    def empty(cls, inputs: int, outputs: int, *, device: torch.device | str = "cpu") -> Regression:
        """No rows yet. A device without float64 (mps) keeps its sums on the CPU."""
        at = torch.device("cpu" if torch.device(device).type == "mps" else device)
        zeros = partial(torch.zeros, dtype=torch.float64, device=at)
        products = zeros(inputs, inputs), zeros(inputs, outputs), zeros(outputs, outputs)
        return cls(0.0, zeros(inputs), zeros(outputs), *products)

    def add(self, x: Tensor, y: Tensor, weights: Tensor | None = None) -> None:
        """Rows x [..., M] and y [..., D]; weights: of the rows, in a shape that broadcasts to [...]; None: 1 each."""
        flat = None if weights is None else weights.expand(x.shape[:-1]).reshape(-1).to(x.dtype)
        x, y = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
        for at in range(0, len(x), CHUNK):
            xs, ys = x[at : at + CHUNK], y[at : at + CHUNK]
            heavy_x, heavy_y = xs, ys
            if flat is not None:
                share = flat[at : at + CHUNK, None]
                heavy_x, heavy_y = xs * share, ys * share
                self.weight += float(share.sum(dtype=torch.float64) if share.device.type != "mps" else share.sum())
            else:
                self.weight += len(xs)
            self.x += heavy_x.sum(0).to(self.x)
            self.y += heavy_y.sum(0).to(self.x)
            self.xx += (heavy_x.mT @ xs).to(self.x)
            self.xy += (heavy_x.mT @ ys).to(self.x)
            self.yy += (heavy_y.mT @ ys).to(self.x)

    def __add__(self, other: Regression) -> Regression:
        return Regression(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})

    def __sub__(self, other: Regression) -> Regression:
        return Regression(**{f.name: getattr(self, f.name) - getattr(other, f.name) for f in fields(self)})

    def of(self, keep: Tensor) -> Regression:
        """The same rows with the inputs `keep` [K] alone."""
        keep = keep.to(self.x.device)
        return replace(self, x=self.x[keep], xx=self.xx[keep][:, keep], xy=self.xy[keep])

    def through(self, inputs: Tensor) -> Regression:
        """The same rows with inputs x @ inputs.  inputs: [M, K]."""
        t = inputs.to(self.x)
        return replace(self, x=self.x @ t, xx=t.mT @ self.xx @ t, xy=t.mT @ self.xy)

    def on(self, outputs: Tensor) -> Regression:
        """The same rows with targets y @ outputs.  outputs: [D, E]."""
        t = outputs.to(self.x)
        return replace(self, y=self.y @ t, xy=self.xy @ t, yy=t.mT @ self.yy @ t)

    def moments(self, *, bias: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Means of x^T x, x^T y and y^T y, of centred rows if the regression has a bias. Raises DataError without rows."""
        if self.weight <= 0:
            raise DataError("a regression without rows: no images came, or all tokens weigh nothing.")
        n = self.weight
        xx, xy, yy = self.xx / n, self.xy / n, self.yy / n
        if bias:
            mean_x, mean_y = self.x / n, self.y / n
            xx = xx - mean_x[:, None] * mean_x[None, :]
            xy = xy - mean_x[:, None] * mean_y[None, :]
            yy = yy - mean_y[:, None] * mean_y[None, :]
        return (xx + xx.mT) / 2, xy, (yy + yy.mT) / 2


def total(folds: Iterable[Regression]) -> Regression:
    """Of the rows of all folds."""
    return reduce(add, folds)


def _strength(xx: Tensor, ridge: float) -> float:
    """The ridge in the unit of the moments; never 0, so that dead inputs leave the problem solvable."""
    mean = float(xx.diagonal().mean())
    return max(ridge * mean, 1e-12 * mean, 1e-300)


def _cholesky(matrix: Tensor, strength: float) -> tuple[Tensor, float]:
    """The factor of `matrix + strength I`; a strength that rounding defeats is raised tenfold until it holds."""
    eye = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    while True:
        factor, failed = torch.linalg.cholesky_ex(matrix + strength * eye)
        if not int(failed):
            return factor, strength
        strength = max(10 * strength, 1e-14 * float(matrix.diagonal().abs().max()), 1e-300)
        if not strength < float("inf"):
            raise DataError(
                "the statistics of the images are not finite. Check the weights and the images' normalisation."
            )


def refit(
    stats: Regression, prior: Tensor, *, ridge: float, keep: Tensor | None = None, bias: bool = True
) -> tuple[Tensor, Tensor | None]:
    """W [K, D] and b [D] (None without a bias) that minimise the squared error plus the ridge's |W - prior|^2.

    prior: [M, D] inherited weights. keep: indices [K] of the inputs that stay; None: all. As the ridge grows, W tends to
    prior[keep] and b to the bias that is best for it.
    """
    xx, xy, _ = stats.moments(bias=bias)
    strength = _strength(xx, ridge)
    prior = prior.to(xx)
    if keep is not None:
        keep = keep.to(xx.device)
        xx, xy, prior = xx[keep][:, keep], xy[keep], prior[keep]
    factor, strength = _cholesky(xx, strength)
    # solved for the change, so that a target which the prior meets exactly gives the prior back exactly
    change = torch.cholesky_solve(xy - xx @ prior, factor)
    w = prior + change
    if not bias:
        return w, None
    mean_x = stats.x if keep is None else stats.x[keep]
    return w, (stats.y - mean_x @ w) / stats.weight


def reduced_rank(xx: Tensor, xy: Tensor, rank: int, *, ridge: float) -> tuple[Tensor, Tensor]:
    """Two factors [M, R], [R, D] whose product is the ridge regression of that rank on sums xx [M, M], xy [M, D]; float64.

    ridge: pull towards 0, as a share of the mean of the inputs' squares.
    """
    values, vectors = torch.linalg.eigh(xx)
    pull = ridge * xx.diagonal().mean().clamp_min(1e-300)
    root = (vectors / (values.clamp_min(0) + pull).sqrt()) @ vectors.mT
    left, strength, right = torch.linalg.svd(root @ xy)
    return root @ (left[:, :rank] * strength[:rank]), right[:rank]


def refits(
    stats: Regression, prior: Tensor, order: Elimination, sizes: Iterable[int], *, ridge: float, bias: bool = True
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """For each size m the indices `order.kept(m)`, and W [m, D] and b [D] of `refit` on them.

    The kept sets are nested, so that one factor of the whole serves them all: in the order of importance, the factor of the first
    m inputs is its leading part.
    """
    xx, xy, _ = stats.moments(bias=bias)
    first = order.order.flip(0).to(xx.device)
    xx, xy, prior = xx[first][:, first], xy[first], prior.to(xx)[first]
    factor, _ = _cholesky(xx, _strength(xx, ridge))
    for m in sizes:
        w = prior[:m] + torch.cholesky_solve(xy[:m] - xx[:m, :m] @ prior[:m], factor[:m, :m])
        keep, place = first[:m].sort()
        w = w[place]
        yield keep, w, (stats.y - stats.x[keep] @ w) / stats.weight if bias else None


def loss(
    stats: Regression,
    w: Tensor,
    b: Tensor | None,
    *,
    keep: Tensor | None = None,
    metric: Tensor | None = None,
) -> float:
    """Mean squared error of x[keep] @ w + b on these rows, in the output metric [D, D]; None: the identity."""
    stats, w = stats if keep is None else stats.of(keep), w.to(stats.x)
    cross = w.mT @ stats.xy
    rest = stats.yy - cross - cross.mT + w.mT @ stats.xx @ w
    if b is not None:
        b = b.to(w)
        drift = stats.y - stats.x @ w
        rest = rest - b[:, None] * drift[None, :] - drift[:, None] * b[None, :] + stats.weight * b[:, None] * b[None, :]
    return max(_weighed(rest, metric) / stats.weight, 0.0)


def _weighed(errors: Tensor, metric: Tensor | None) -> float:
    """Sums of e^T e, [D, D], as one number in the metric."""
    return float(errors.diagonal().sum() if metric is None else (errors * metric.to(errors)).sum())


def choose_ridge(
    folds: Sequence[Regression],
    prior: Tensor,
    *,
    keep: Tensor | None = None,
    bias: bool = True,
    metric: Tensor | None = None,
    ridges: Sequence[float] = RIDGES,
) -> float:
    """The ridge whose refit on all folds but one has the least error on that one, summed over the folds.

    folds: of different images, never of different tokens of the same images. With fewer than two that have rows, the
    largest ridge. Above `SKETCH` outputs the errors are estimated, without bias and for all ridges from the same signs.
    """
    full = [fold for fold in folds if fold.weight > 0]
    if len(full) < 2:
        return max(ridges)
    outputs = prior.shape[1]
    if outputs > SKETCH:
        sums = _sketch(outputs, metric).to(full[0].x)
        full, prior, metric = [fold.on(sums) for fold in full], prior.to(sums) @ sums, None
    if keep is not None:
        full, prior = [fold.of(keep) for fold in full], prior[keep]
    whole = total(full)
    errors = [0.0] * len(ridges)
    for fold in full:
        rest = whole - fold
        for n, ridge in enumerate(ridges):
            w, b = refit(rest, prior, ridge=ridge, bias=bias)
            errors[n] += loss(fold, w, b, metric=metric) * fold.weight
    return ridges[min(range(len(ridges)), key=errors.__getitem__)]


def _sketch(outputs: int, metric: Tensor | None) -> Tensor:
    """[D, `SKETCH`] R with E[R R^T] = metric (None: the identity): the squared error of e @ R estimates that of e in it."""
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (outputs, SKETCH), generator=generator).double() * 2 - 1
    if metric is not None:
        squares, turn = torch.linalg.eigh(metric.double().cpu())
        signs = turn @ (squares.clamp_min(0).sqrt()[:, None] * signs)
    return signs / SKETCH**0.5


@dataclass(frozen=True, kw_only=True)
class Elimination:
    """order: [M] inputs, the first to go first.  errors: [M + 1], errors[m] with the last m of the order kept.

    The kept sets are nested, and the errors (of the ridge objective, a mean over rows) never rise with m.
    """

    order: Tensor
    errors: Tensor

    def kept(self, m: int) -> Tensor:
        """[m] the inputs that stay, ascending."""
        return self.order[len(self.order) - m :].sort().values


def eliminate(
    stats: Regression, prior: Tensor, *, ridge: float, bias: bool = True, metric: Tensor | None = None
) -> Elimination:
    """Remove inputs one after another, each time the one whose loss, all others refitted, costs least.

    With P = (xx + ridge)^-1 and W the refit of all inputs, removing j costs W_j F W_j^T / P_jj, and then
    W <- W - P_:j W_j / P_jj, P <- P - P_:j P_j: / P_jj. Kept in the form P and A = W F W^T, of which a removal needs one
    column each: the updates of `PANEL` removals wait as low-rank terms, and the matrices are touched once a panel. So a
    removal costs M * PANEL operations instead of M * (M + D), and a curve of 3072 units seconds.
    prior, ridge, bias: as in `refit`. metric: F [D, D], positive semi-definite; None: the identity.
    """
    xx, xy, yy = stats.moments(bias=bias)
    prior = prior.to(xx)
    factor, _ = _cholesky(xx, _strength(xx, ridge))
    p = torch.cholesky_inverse(factor)
    w = prior + torch.cholesky_solve(xy - xx @ prior, factor)
    weighed = w if metric is None else w @ metric.to(w)
    a = weighed @ w.mT
    rest = yy - w.mT @ xy - xy.mT @ w + w.mT @ xx @ w
    start = _weighed(rest, metric)

    size = len(p)
    live = torch.arange(size, device=p.device)
    order: list[Tensor] = []
    costs: list[Tensor] = []
    while len(live):
        count = min(PANEL, len(live))
        u, v = p.new_zeros(len(live), count), p.new_zeros(len(live), count)
        alpha = p.new_zeros(count)
        spread, worth = p.diagonal().clone(), a.diagonal().clone()
        gone = torch.zeros(len(live), dtype=torch.bool, device=p.device)
        for t in range(count):
            score = (worth.clamp_min(0) / spread.clamp_min(1e-300)).masked_fill(gone, float("inf"))
            j = score.argmin()
            row_u, row_v = u[j, :t], v[j, :t]
            column = p[j] - u[:, :t] @ row_u
            column_a = a[j] - u[:, :t] @ (row_v - alpha[:t] * row_u) - v[:, :t] @ row_u
            root = column[j].clamp_min(1e-300).sqrt()
            u[:, t], v[:, t] = column / root, column_a / root
            alpha[t] = column_a[j] / root**2
            spread = spread - u[:, t] ** 2
            worth = worth - 2 * u[:, t] * v[:, t] + alpha[t] * u[:, t] ** 2
            gone[j] = True
            order.append(live[j])
            costs.append(score[j])
        stay = (~gone).nonzero()[:, 0]
        u, v = u[stay], v[stay]
        half = v - u * (alpha / 2)  # u v^T + v u^T - u alpha u^T = u half^T + half u^T
        p = p[stay][:, stay].addmm_(u, u.mT, alpha=-1)
        a = a[stay][:, stay].addmm_(u, half.mT, alpha=-1).addmm_(half, u.mT, alpha=-1)
        live = live[stay]
    rising = torch.stack(costs).cumsum(0) if costs else p.new_zeros(0)
    errors = torch.cat([rising.flip(0), rising.new_zeros(1)]) + max(start, 0.0)  # by inputs kept: 0, 1, ..., M
    return Elimination(order=torch.stack(order).cpu(), errors=errors.cpu())
