"""Factors of one block's parts, cut to any rank, and what they put into the model in place of the products.

Parts are named as in `space.Choice`: qk and v of each head, fc1 and fc2. Statistics None: the plain SVD.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vitrim import closed_form as cf
from vitrim import surgery
from vitrim.closed_form.sublayers import Scores, double, head_weights, linear_weight, per_head
from vitrim.model import Attention, Block, Mlp, Vit

Ranks = Sequence[Mapping[str, int]]
"""For each block the parts that are put into factors, and their ranks."""
Factored = Sequence[Mapping[str, cf.Factors]]
"""For each block the factors of its parts."""


def factorise(
    block: Block, wanted: Mapping[str, int], statistics: cf.BlockStatistics | None, *, ridge: float
) -> dict[str, cf.Factors]:
    """The wanted numbers of leading components.  block: LayerScale folded."""
    found: dict[str, cf.Factors] = {}
    for part, rank in wanted.items():
        if part == "qk":
            full = _scores(block.attention, statistics, ridge)
        elif part == "v":
            full = _values(block.attention, statistics, ridge)
        else:
            full = _linear(block.mlp, part, statistics, ridge)
        found[part] = _stored(full, rank, next(block.parameters()).dtype)
    return found


def _scores(attention: Attention, statistics: cf.BlockStatistics | None, ridge: float) -> cf.Factors:
    seen = Scores() if statistics is None else Scores(statistics.queries.second, statistics.keys.second)
    return seen.factors(attention, ridge)


def _values(attention: Attention, statistics: cf.BlockStatistics | None, ridge: float) -> cf.Factors:
    _, _, v, o = head_weights(attention)
    if statistics is None:
        return cf.factorise_vo(v, o, ridge=ridge)
    mean = statistics.values.mean
    if (bias := per_head(attention.v_bias, len(v))) is not None:  # the statistics saw it; it moves into the output bias
        mean = mean - bias
    return cf.factorise_vo(v, o, moment=statistics.values.covariance, mean=mean, ridge=ridge)


def _linear(mlp: Mlp, part: str, statistics: cf.BlockStatistics | None, ridge: float) -> cf.Factors:
    w = linear_weight(mlp, part)
    if statistics is None:
        return cf.factorise_linear(w, ridge=ridge)
    seen: cf.Moments = getattr(statistics, part)
    inputs, mean, moment = cf.sees_inputs(*w.shape), None, seen.second
    if getattr(mlp, part).bias is not None:  # it takes the mean of what is lost
        mean, moment = seen.mean @ w if inputs else seen.mean, seen.covariance
    return cf.factorise_linear(w, **{"inputs" if inputs else "outputs": moment}, mean=mean, ridge=ridge)


def _stored(factors: cf.Factors, rank: int, dtype: torch.dtype) -> cf.Factors:
    """Copies in the model's dtype of the leading components; the spectrum stays whole, small vectors in float64."""
    cut = factors.sliced(rank)
    return replace(cut, left=cut.left.to(dtype).clone(), right=cut.right.to(dtype).clone(), spectrum=factors.spectrum)


def _replacement(block: Block, factors: Mapping[str, cf.Factors], ranks: Mapping[str, int]) -> surgery.Factors:
    """What `surgery.factorise` puts into one block, with every bias rule."""
    new: dict[str, Any] = {}
    for part, rank in ranks.items():
        cut, lost = factors[part].sliced(rank), factors[part].lost_mean(rank)
        if part == "qk":
            new.update(q=cut.left, k=cut.right.mT, q_bias=cut.left_bias)
        elif part == "v":
            bias = _output_bias(block.attention)
            new.update(v=cut.left, o=cut.right, out_bias=bias if lost is None else bias + lost.sum(0))
        else:
            old = None if (known := getattr(block.mlp, part).bias) is None else double(known)
            new[part] = (cut.left, cut.right, old if old is None or lost is None else old + lost)
    return surgery.Factors(**new)


def _output_bias(attention: Attention) -> Tensor:
    """The output's bias once the values have none."""
    o = head_weights(attention)[3]
    old = attention.out.bias
    bias = cf.fold_value_bias(per_head(attention.v_bias, len(o)), o, None if old is None else double(old))
    return torch.zeros(o.shape[-1], dtype=torch.float64) if bias is None else bias


def applied(model: Vit, factors: Factored, ranks: Ranks, *, variant: str, share: bool = False) -> Vit:
    """The model with the leading components of these parts in place of them.  share: as in `surgery.with_spec`."""
    entries = [
        _replacement(block, own, here) if here else None
        for block, own, here in zip(model.blocks, factors, ranks, strict=True)
    ]
    return surgery.factorise(model, entries, method="comcat", variant=variant, share=share)
