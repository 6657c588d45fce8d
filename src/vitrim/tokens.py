"""Token merging and its undoing: pure tensor functions with fixed shapes and no scatter.

Source   lattice merges: `papers/cait.md` section 3 (reconstructed from the paper's abstract, so "CAIT-style");
         similarity merges: bipartite matching in the manner of ToMe (arXiv 2210.09461), on the residual stream, or Ward's
         criterion (1963) among all tokens.
Shapes   B batch, P patch tokens, D width; a lattice is `rows * cols == P` in raster order. Prefix tokens never come here.

Every merge returns an owner: for each token (or column, or row) before, the index of the one that holds it after.
Restoring gathers by owner, so it is exact: merge(restore(merge(x))) == merge(x).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

LEAN = 4.0
"""The most by which the logarithm of a token's mass leaves that of its size, beside the image's mean."""


class Merged(NamedTuple):
    """One merge's result. x: B P' D. sizes: B P', source tokens in each. undo: what `restore` needs."""

    x: Tensor
    sizes: Tensor
    undo: Undo


class Undo(NamedTuple):
    """How to undo one merge. axis: "h", "v" or "tokens". grid: of the merged tokens, None off the lattice.

    owner: B n, or n when it is the same for every image.
    carry: B n D, what comes back with each token beside its owner's value; None: nothing.
    """

    axis: str
    owner: Tensor
    grid: tuple[int, int] | None
    carry: Tensor | None = None


def first_sources(starts: Tensor, keep: int) -> Tensor:
    """Positions of the `keep` true entries of each row, in order.  starts: B n -> B K."""
    n = starts.shape[-1]
    countdown = torch.arange(n, 0, -1, device=starts.device)
    return n - torch.where(starts, countdown, 0).topk(keep, dim=-1).values  # topk, since stable sorts do not export


def merge_lattice(
    x: Tensor,  # B P D
    sizes: Tensor,  # B P
    *,
    grid: tuple[int, int],
    axis: str,
    keep: int,
    weight: str = "mean",
    tau: float | None = None,
    gate: Tensor | None = None,  # D
) -> Merged:
    """Merge neighbouring columns (axis "h") or rows ("v") pairwise until `keep` remain.

    With `keep == ceil(n / 2)` every even one takes the odd one after it, the same for all images. With more, the pairs
    that are most alike (mean cosine over the other axis) merge, chosen for each image. An odd last one is copied.
    """
    b, _, d = x.shape
    rows, cols = grid
    lattice, weights = x.view(b, rows, cols, d), sizes.view(b, rows, cols, 1)
    if axis == "v":
        lattice, weights = lattice.transpose(1, 2), weights.transpose(1, 2)
    n = lattice.shape[2]  # B across n D
    removed, pairs = n - keep, n // 2
    if removed == pairs:
        odd = torch.arange(n, device=x.device) % 2 == 1
        starts = ~odd
        owner = starts.long().cumsum(-1) - 1
        first = torch.arange(0, n, 2, device=x.device).expand(b, -1)
        paired = (first + 1 < n).to(x.dtype)
    else:
        unit = F.normalize(lattice, dim=-1)
        alike = (unit[:, :, 0 : 2 * pairs : 2] * unit[:, :, 1 : 2 * pairs : 2]).sum(-1).mean(1)  # B pairs
        best = alike.topk(removed, dim=-1).indices
        taken = (best[:, :, None] == torch.arange(pairs, device=x.device)).any(1)  # B pairs
        seconds = torch.stack([torch.zeros_like(taken), taken], dim=-1).flatten(1)  # B 2*pairs
        starts = ~F.pad(seconds, (0, n - 2 * pairs))
        owner = starts.long().cumsum(-1) - 1
        first = first_sources(starts, keep)
        paired = F.pad(~starts, (0, 1))[:, 1:].gather(1, first).to(x.dtype)
    second = (first + 1).clamp_max(n - 1)

    def pick(values: Tensor, index: Tensor) -> Tensor:  # B across n E -> B across K E
        return values.gather(2, index[:, None, :, None].expand(-1, values.shape[1], -1, values.shape[3]))

    one, two = pick(lattice, first), pick(lattice, second)
    size_one, size_two = pick(weights, first), pick(weights, second) * paired[:, None, :, None]
    if weight == "mean":
        share = size_one / (size_one + size_two)
    elif weight == "learned":
        assert gate is not None
        share = 1 - (1 - torch.sigmoid(gate)) * paired[:, None, :, None]
    else:
        assert tau is not None
        share = _typical(lattice, pick, first, second, tau)
        share = 1 - (1 - share) * paired[:, None, :, None]
    merged, merged_sizes = share * one + (1 - share) * two, size_one + size_two
    new_grid = (rows, keep) if axis == "h" else (keep, cols)
    if axis == "v":
        merged, merged_sizes = merged.transpose(1, 2), merged_sizes.transpose(1, 2)
    return Merged(merged.reshape(b, -1, d), merged_sizes.reshape(b, -1), Undo(axis, owner, new_grid))


def _typical(lattice: Tensor, pick: object, first: Tensor, second: Tensor, tau: float) -> Tensor:
    """Share of the first of each pair: softmax of both cosines with the mean of the cells around the pair; half where there are none."""
    padded = F.pad(lattice, (0, 0, 1, 1, 1, 1))
    ones = F.pad(torch.ones_like(lattice[..., :1]), (0, 0, 1, 1, 1, 1))

    def around(values: Tensor) -> Tensor:
        return values[:, :-2, 1:-1] + values[:, 2:, 1:-1] + values[:, 1:-1, :-2] + values[:, 1:-1, 2:]

    assert callable(pick)
    one, two = pick(lattice, first), pick(lattice, second)
    total = pick(around(padded), first) + pick(around(padded), second) - one - two  # each is the other's neighbour
    count = pick(around(ones), first) + pick(around(ones), second) - 2
    centre = torch.where(
        count > 0, total / count.clamp_min(1), 0
    )  # of a pair that stands alone, else a rounding's direction
    alike_one = F.cosine_similarity(one, centre, dim=-1)
    alike_two = F.cosine_similarity(two, centre, dim=-1)
    return torch.sigmoid((alike_one - alike_two) / tau)[..., None]


def merge_similar(
    x: Tensor,
    sizes: Tensor,
    *,
    keep: int,
    match: str = "cosine",
    metric: Tensor | None = None,  # D R
    importance: Tensor | None = None,  # D
    carry: tuple[Tensor, Tensor] | None = None,  # D R, R D
) -> Merged:
    """Merge the `P - keep` tokens that have the most like partners into these.  x: B P D; sizes: B P.

    match: `cosine` and `ward`: those of even index into ones of odd index; what remains: the unmerged even ones in order, then the odd
    ones in order. `heavier`: any into heavier ones; what remains: in the order it had. By the cosine, or else the least
    s t / (s + t) |x - y|^2 of two tokens of masses s and t, which is what merging them adds to the scatter within groups; `metric` maps
    tokens to where |x - y| is taken. A token's mass is its size, and for `heavier` with `importance` that times exp(x . importance),
    up to a factor for each image. MACs: `counting.similarity_macs`.
    carry: the difference of each merged token from its group comes back, and what two factors make of it; the group's target gets
    what makes them cancel, by size.
    """
    removed, x = x.shape[1] - keep, x.contiguous()  # it comes without the prefix tokens, and is read many times
    gone, chosen, kept, owner, plain = (
        _heavier(x, sizes, removed, metric, importance)
        if match == "heavier"
        else _bipartite(_likeness(x, sizes, match, metric), removed)
    )
    to, d = owner.gather(1, chosen), x.shape[2]
    onehot = (torch.arange(plain, keep, device=x.device)[:, None] == to[:, None]).to(x.dtype)  # B T R
    weighted = torch.cat([x * sizes[:, :, None], sizes[:, :, None]], dim=-1)  # B P D+1
    leaving, own = take(weighted, chosen), take(weighted, kept[:, plain:])
    total = own + onehot @ leaving  # of the targets, B T D+1
    merged = torch.cat([take(x, kept[:, :plain]), total[..., :d] / total[..., d:]], dim=1)
    merged_sizes = torch.cat([sizes.gather(1, kept[:, :plain]), total[..., d]], dim=1)
    if carry is None:
        return Merged(merged, merged_sizes, Undo("tokens", owner, None))
    apart = take(x, chosen) - take(merged, to)  # B R D
    apart = apart + (apart @ carry[0]) @ carry[1]
    against = (onehot @ (apart * leaving[..., d:])) / -own[..., d:]  # B T D
    order = chosen.topk(removed, dim=-1, largest=False).indices  # of those that go, in order, their places in `chosen`
    place = torch.where(gone, order.gather(1, (gone.long().cumsum(-1) - 1).clamp_min(0)), owner + removed)
    both = take(torch.cat([apart, F.pad(against, (0, 0, plain, 0))], dim=1), place)
    return Merged(merged, merged_sizes, Undo("tokens", owner, None, both))


def take(values: Tensor, index: Tensor) -> Tensor:
    """Rows of each image by number.  B n D, B K -> B K D"""
    b, n, d = values.shape
    rows = index + torch.arange(b, device=index.device)[:, None] * n  # whole rows: faster than a `gather` of numbers
    return values.reshape(-1, d).index_select(0, rows.flatten()).view(b, -1, d)


class _Partners(NamedTuple):
    """Who merges with whom.  gone: B P. chosen: B R, positions of what goes; kept: B K, of what remains, in its new order.

    owner: B P, of `Undo`. plain: so many of the first that remain have nobody merge into them, in any image.
    """

    gone: Tensor
    chosen: Tensor
    kept: Tensor
    owner: Tensor
    plain: int


def _likeness(x: Tensor, sizes: Tensor, match: str, metric: Tensor | None) -> Tensor:
    """How alike tokens of even and of odd index are.  B P D -> B sources targets"""
    if match == "cosine":
        unit = F.normalize(x, dim=-1)
        return unit[:, 0::2] @ unit[:, 1::2].transpose(1, 2)
    seen = x if metric is None else x @ metric
    one, two = seen[:, 0::2], seen[:, 1::2]
    squared = one.square().sum(-1)[:, :, None] + two.square().sum(-1)[:, None] - 2 * (one @ two.transpose(1, 2))
    s, t = sizes[:, 0::2, None], sizes[:, None, 1::2]
    return -squared * (s * t / (s + t))


def _bipartite(likeness: Tensor, removed: int) -> _Partners:  # B sources targets
    b, sources, targets = likeness.shape
    p, plain = sources + targets, sources - removed
    alike, best = likeness.max(-1)  # B sources
    chosen = alike.topk(removed, dim=-1).indices
    away = _among(chosen, sources)
    even = torch.where(away, best + plain, (~away).long().cumsum(-1) - 1)
    odd = (torch.arange(targets, device=best.device) + plain).expand(b, -1)

    def woven(first: Tensor, second: Tensor) -> Tensor:  # B sources, B targets -> B P
        return torch.stack([first, F.pad(second, (0, sources - targets))], dim=-1).flatten(1)[:, :p]

    kept = torch.cat([2 * first_sources(~away, plain), 2 * (odd - plain) + 1], dim=1)
    gone = woven(away, torch.zeros_like(odd, dtype=torch.bool))
    return _Partners(gone, 2 * chosen, kept, woven(even, odd), plain)


def _heavier(x: Tensor, sizes: Tensor, removed: int, metric: Tensor | None, importance: Tensor | None) -> _Partners:
    p = x.shape[1]
    seen, mass = x if metric is None else x @ metric, sizes
    if importance is not None:
        lean = (x @ importance[:, None])[..., 0]
        mass = sizes * (lean - lean.mean(1, keepdim=True)).clamp(-LEAN, LEAN).exp()
    here = torch.arange(p, device=x.device)
    added = squared_distances(seen) / (1 / mass[:, :, None] + 1 / mass[:, None])  # B P P
    single = torch.promote_types(mass.dtype, torch.float32)
    order = mass.to(single) * (1 + here / (2 * p * p))  # of equal ones the later is the heavier
    least = torch.where(order[:, None] > order[:, :, None], added, torch.inf).amin(-1)
    gone = _among(least.topk(removed, dim=-1, largest=False).indices, p)
    chosen = first_sources(gone, removed)
    best = torch.where(gone[:, None], torch.inf, take(added, chosen)).argmin(-1)  # of those that stay
    rank = (~gone).long().cumsum(-1) - 1
    to = best.gather(1, (gone.long().cumsum(-1) - 1).clamp_min(0))
    owner = rank.gather(1, torch.where(gone, to, here))
    return _Partners(gone, chosen, first_sources(~gone, p - removed), owner, 0)


def _among(chosen: Tensor, count: int) -> Tensor:  # B R -> B count
    return (chosen[:, None] == torch.arange(count, device=chosen.device)[:, None]).any(-1)


def squared_distances(x: Tensor) -> Tensor:
    """Of all tokens from all.  B P D -> B P P"""
    squares = x.square().sum(-1, keepdim=True)
    one = torch.ones_like(squares)
    return torch.cat([x, squares, one], -1) @ torch.cat([-2 * x, one, squares], -1).transpose(1, 2)


def restore(x: Tensor, history: tuple[Undo, ...], *, carried: bool = False) -> Tensor:
    """Undo merges, latest first: each token's value appears at all its source cells.  B P' D -> B P D.

    carried: with what each step has carried along, which is for the end of the stream alone.
    """
    for undo in reversed(history):
        b, _, d = x.shape
        owner = undo.owner.expand(b, -1)
        if undo.axis == "tokens":
            x = take(x, owner)
            if carried and undo.carry is not None:
                x = x + undo.carry
            continue
        assert undo.grid is not None
        rows, cols = undo.grid
        lattice = x.view(b, rows, cols, d)
        if undo.axis == "h":
            lattice = lattice.gather(2, owner[:, None, :, None].expand(-1, rows, -1, d))
        else:
            lattice = lattice.gather(1, owner[:, :, None, None].expand(-1, -1, cols, d))
        x = lattice.reshape(b, -1, d)
    return x
