"""Peers that prune once from unlabelled images, rebuilt from their formulas; not their code. For comparison only.

CORP     Zhang & Yang, arXiv 2602.05243: MLP units and query/key dims go by their energy, and what they gave is foretold from what
         stays by ridge regressions, which fold into the MLP's last linear and into the queries. All from the dense stream.
SnapViT  Simoncini et al., arXiv 2510.17700: MLP units and heads go by the diagonal curvature of a loss without labels, ranked over
         all blocks. Here the loss is the tokens' distance from the dense model's own (their squared gradients by random
         signs), and the mean of what goes moves into the biases. Left out: the evolutionary search of weights for whole blocks.

Shapes: B batch, N tokens, D width, H heads, Q query/key dims, V value dims, M hidden units; S stays, G goes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from vitrim import surgery
from vitrim.closed_form.fisher import Product, random_signs
from vitrim.closed_form.statistics import Moments
from vitrim.counting import cost
from vitrim.errors import BudgetError
from vitrim.model import Vit
from vitrim.surgery import Keep

RIDGE = 1e-3
"""Of CORP's regressions, as a share of the mean diagonal of what is solved."""
LEAST = 0.2
"""Share of each block's heads and units that SnapViT keeps at least, as its code has it."""


def largest(keeps_of: Callable[[float], Sequence[Keep]], dense: Vit, limit: int, *, rounds: int = 20) -> Sequence[Keep]:
    """What stays at the largest share of units whose network is within the limit, by bisection. Raises BudgetError."""
    low, high, best = 0.0, 1.0, None
    for _ in range(rounds):
        middle = (low + high) / 2
        keeps = keeps_of(middle)
        if _macs(dense, keeps) <= limit:
            low, best = middle, keeps
        else:
            high = middle
    if best is None:
        least = _macs(dense, keeps_of(0.0)) / cost(dense).macs
        raise BudgetError(f"the least that these cuts reach is {least:.1%} of the MACs; expected a larger budget.")
    return best


def _macs(dense: Vit, keeps: Sequence[Keep]) -> int:
    blocks = []
    for block, keep in zip(dense.spec.blocks, keeps, strict=True):
        a, m = block.attention, block.mlp
        assert a is not None
        assert m is not None
        heads = a.heads if keep.heads is None else len(keep.heads)
        qk = a.qk_dim if keep.qk is None else len(keep.qk[0])
        hidden = m.hidden if keep.hidden is None else len(keep.hidden)
        blocks.append(replace(block, attention=replace(a, heads=heads, qk_dim=qk), mlp=replace(m, hidden=hidden)))
    return cost(replace(dense.spec, blocks=tuple(blocks))).macs


def _best(scores: Tensor, count: int) -> tuple[int, ...]:
    return tuple(sorted(scores.topk(count).indices.tolist()))


def _others(kept: Sequence[int], size: int) -> list[int]:
    return sorted({*range(size)} - {*kept})


@dataclass
class Sums:
    """What one block's parts see of the dense stream.  queries, keys [H, Q] (keys centred in each image), mixed [H V], hidden [M]."""

    queries: Moments = field(default_factory=Moments)
    keys: Moments = field(default_factory=Moments)
    mixed: Moments = field(default_factory=Moments)
    hidden: Moments = field(default_factory=Moments)


@torch.no_grad()
def dense_sums(dense: Vit, batches: Iterable[Tensor]) -> list[Sums]:
    """One pass over the images."""
    found = [Sums() for _ in dense.blocks]
    for x in batches:
        stream = dense.embed(x)
        for block, sums in zip(dense.blocks, found, strict=True):
            q, k, v = block.attention.qkv_heads(block.norm1(stream.x))  # B H N Q
            mixed = block.attention.attend(q, k, v, None).transpose(1, 2).flatten(2)  # B N (H V)
            sums.queries.add(q.transpose(0, 1).flatten(1, 2))
            sums.keys.add((k - k.mean(2, keepdim=True)).transpose(0, 1).flatten(1, 2))  # softmax sees no common part
            sums.mixed.add(mixed.flatten(0, 1))
            stream = stream._replace(x=stream.x + block.attention.finish(mixed))
            hidden = block.units(stream)
            sums.hidden.add(hidden.flatten(0, 1))
            stream = stream._replace(x=stream.x + block.mlp.finish(hidden))
    return found


# ------------------------------------------------------------------------------------------------------------------ CORP


def corp(dense: Vit, batches: Iterable[Tensor]) -> Callable[[int], Vit]:
    """How to make the network of so many MACs: the same share of units and of query/key dims stays everywhere."""
    base = surgery.fold_layer_scale(dense)
    sums = dense_sums(base, batches)

    def keeps_of(share: float) -> list[Keep]:
        keeps = []
        for block, module, seen in zip(base.spec.blocks, base.blocks, sums, strict=True):
            a, m = block.attention, block.mlp
            assert a is not None
            assert m is not None
            pairs = seen.queries.second.diagonal(dim1=-2, dim2=-1) * seen.keys.second.diagonal(dim1=-2, dim2=-1)
            units = seen.hidden.second.diagonal() * module.mlp.fc2.weight.double().square().sum(0)
            count = max(1, round(share * a.qk_dim))
            qk = tuple(_best(head, count) for head in pairs)
            keeps.append(Keep(qk=qk, hidden=_best(units, max(1, round(share * m.hidden)))))
        return keeps

    def make(limit: int) -> Vit:
        keeps = largest(keeps_of, base, limit)
        small = surgery.cut(base, keeps, method="corp")
        for i, keep in enumerate(keeps):
            _fold_units(base, small, i, keep, sums[i].hidden)
            _fold_pairs(base, small, i, keep, sums[i])
        return small

    return make


@torch.no_grad()
def _fold_units(base: Vit, small: Vit, i: int, keep: Keep, seen: Moments) -> None:
    """h_G is foretold as B h_S + c, in least squares with a ridge; both fold into the last linear."""
    stay = list(keep.hidden or ())
    gone = _others(stay, len(seen.mean))
    covariance, mean = seen.covariance, seen.mean
    own = covariance[stay][:, stay]
    own = own + RIDGE * own.diagonal().mean() * torch.eye(len(stay), dtype=own.dtype)
    slope = torch.linalg.solve(own, covariance[stay][:, gone]).T  # G S
    lost = base.blocks[i].mlp.fc2.weight[:, gone].double()  # D G
    linear = small.blocks[i].mlp.fc2
    linear.weight += (lost @ slope).float()
    linear.bias += (lost @ (mean[gone] - slope @ mean[stay])).float()


@torch.no_grad()
def _fold_pairs(base: Vit, small: Vit, i: int, keep: Keep, seen: Sums) -> None:
    """What the lost dims added to the scores, q_G k_G, is foretold as q_S M k_S: A M C + ridge M = R, by the axes of A and C."""
    a, b = base.blocks[i].attention.spec, small.blocks[i].attention
    width, count = base.spec.width, b.spec.qk_dim
    rows = b.qkv[: b.spec.heads * count].view(b.spec.heads, count, width)
    assert b.q_bias is not None
    biases = b.q_bias.view(b.spec.heads, count)
    for h, stay in enumerate(keep.qk or ()):
        gone = _others(stay, a.qk_dim)
        q, k = seen.queries.second[h], seen.keys.second[h]
        (along_q, axes_q), (along_k, axes_k) = (torch.linalg.eigh(own[list(stay)][:, list(stay)]) for own in (q, k))
        right = q[list(stay)][:, gone] @ k[gone][:, list(stay)]
        ridge = RIDGE * along_q.mean() * along_k.mean()
        inner = (axes_q.T @ right @ axes_k) / (along_q[:, None] * along_k[None] + ridge)
        mix = torch.eye(count, dtype=torch.float64) + axes_q @ inner @ axes_k.T  # q' = q mix
        rows[h] = (mix.T @ rows[h].double()).float()
        biases[h] = (mix.T @ biases[h].double()).float()


# --------------------------------------------------------------------------------------------------------------- SnapViT


def snapvit(dense: Vit, batches: Callable[[int], Iterable[Tensor]], *, seed: int = 0) -> Callable[[int], Vit]:
    """How to make the network of so many MACs: the best share of all units and of all heads stays.

    batches: of so many images. Gradients are squared image by image.
    """
    base = surgery.fold_layer_scale(dense)
    heads, units = curvature(base, batches(1), seed=seed)
    sums = dense_sums(base, batches(8))

    def keeps_of(share: float) -> list[Keep]:
        chosen = zip(_over_blocks(heads, share), _over_blocks(units, share), strict=True)
        return [Keep(heads=kept, hidden=hidden) for kept, hidden in chosen]

    def make(limit: int) -> Vit:
        keeps = largest(keeps_of, base, limit)
        small = surgery.cut(base, keeps, method="snapvit")
        for module, new, keep, seen in zip(base.blocks, small.blocks, keeps, sums, strict=True):
            v_dim = module.attention.spec.v_dim
            lost = [h * v_dim + e for h in _others(keep.heads or (), module.attention.spec.heads) for e in range(v_dim)]
            _move_mean(module.attention.out, new.attention.out, lost, seen.mixed)
            _move_mean(module.mlp.fc2, new.mlp.fc2, _others(keep.hidden or (), len(seen.hidden.mean)), seen.hidden)
        return small

    return make


@torch.no_grad()
def _move_mean(linear: torch.nn.Linear, new: torch.nn.Linear, gone: list[int], seen: Moments) -> None:
    """The bias takes the mean of what goes."""
    new.bias += (linear.weight[:, gone].double() @ seen.mean[gone]).float()


def _over_blocks(scores: Tensor, share: float) -> list[tuple[int, ...]]:
    """The best of all blocks together, each block's best LEAST of them first.  scores: L n."""
    blocks, size = scores.shape
    least = max(1, int(LEAST * size))
    held = scores.clone()
    held.scatter_(1, scores.topk(least, dim=1).indices, torch.inf)
    count = max(least * blocks, round(share * scores.numel()))
    kept = torch.zeros(scores.numel(), dtype=torch.bool)
    kept[held.flatten().topk(count).indices] = True
    return [tuple(row.nonzero()[:, 0].tolist()) for row in kept.view(blocks, size)]


def curvature(dense: Vit, images: Iterable[Tensor], *, seed: int) -> tuple[Tensor, Tensor]:
    """Mean squared gradient of the weights of each head (its queries, keys and values) and of each unit (its first linear).

    images: [1, C, h, w] each -> L H, L M
    """
    generator = torch.Generator().manual_seed(seed)
    weights = [w for block in dense.blocks for w in (block.attention.qkv, block.mlp.fc1.weight)]
    summed = [torch.zeros(len(w)) for w in weights]
    for x in images:
        with torch.enable_grad():
            loss = signed_tokens(dense(x, want=("tokens",))["tokens"], generator)
            found = torch.autograd.grad(loss, weights)
        for total, gradient in zip(summed, found, strict=True):
            total += gradient.square().mean(1)
    heads, units = [], []
    for block, rows, hidden in zip(dense.blocks, summed[0::2], summed[1::2], strict=True):
        a = block.attention.spec
        ends = [0, *accumulate((a.heads * a.qk_dim, a.heads * a.qk_dim, a.heads * a.v_dim))]
        parts = [rows[start:end].view(a.heads, -1) for start, end in pairwise(ends)]
        heads.append(torch.cat(parts, dim=1).mean(1))
        units.append(hidden)
    return torch.stack(heads), torch.stack(units)


def signed_tokens(tokens: Tensor, generator: torch.Generator) -> Tensor:
    """The tokens' directions summed with random signs: its squared gradient is, in expectation, the curvature of their distance.

    tokens: B N D
    """
    answer = Product("tokens").outcome(tokens)
    return (random_signs(answer, 1, generator)[0] * answer).sum()
