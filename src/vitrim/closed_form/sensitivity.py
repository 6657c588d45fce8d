"""How much the outputs mind a disturbance of the stream, at each place and kind of token: a Fisher matrix without labels.

With random signs e_c, the gradient g of sum_c sqrt(p_c) e_c log p_c (p held fixed) has E[g g^T] = J^T (diag p - p p^T) J,
the Fisher matrix of the class probabilities: half of its quadratic form is the divergence that a small disturbance causes.
An encoder without a classifier has random signs over its features, divided by their length, which gives J^T J.

Shapes: B batch, N tokens, D width, P prefix tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from vitrim.closed_form.fisher import Product, signed
from vitrim.closed_form.regression import Regression, refit
from vitrim.errors import DataError
from vitrim.model import OPEN, Vit

LEAST = 1 / 64
"""The least weight of a token beside the heaviest: a regression needs its rows."""
RIDGE = 1e-3
FAINT = 1e-6
"""The least squared length of a gradient beside the greatest of the batch, of which a logarithm is learned."""
LEAN_RIDGE = 0.1


@dataclass
class Sensitivity:
    """One place in the stream.  tokens: [P + 1] mean squared gradient of a token, by prefix token, patches last.

    matrix: [D, D] sum of g^T g over all tokens; patches: the same over patch tokens. float64 on the CPU.
    importance: [D], whose product with a patch token is the logarithm of the length of its gradient, but for a constant, as far as a
    linear map can tell; 0 where that was not asked for.
    """

    tokens: Tensor
    matrix: Tensor
    patches: Tensor
    importance: Tensor

    def weights(self, tokens: int) -> Tensor:
        """[tokens] regression weights, 1 for the heaviest: the root of the gradient's share, at least `LEAST`."""
        top = self.tokens.max().clamp_min(1e-300)
        kinds = (self.tokens / top).sqrt().clamp_min(LEAST)
        prefix = len(kinds) - 1
        return torch.cat([kinds[:prefix], kinds[prefix:].expand(max(tokens - prefix, 0))])[:tokens]

    @property
    def metric(self) -> Tensor:
        """[D, D] for errors of the stream, its mean diagonal 1, with a small ridge."""
        size = len(self.matrix)
        mean = self.matrix.diagonal().mean()
        eye = torch.eye(size, dtype=self.matrix.dtype)
        if not float(mean) > 0:
            return eye  # nothing that is read depends on this place
        return (self.matrix / mean + RIDGE * eye) / (1 + RIDGE)


def places(model: Vit) -> tuple[str, ...]:
    """`mid:i` (after the attention of block i) and `block:i` (after its MLP), by the names of `Vit.forward`."""
    return tuple(f"{kind}:{i}" for i in range(len(model.blocks)) for kind in ("mid", "block"))


def sensitivity(
    model: Vit,
    batches: Iterable[Tensor],
    *,
    product: Product | None = None,
    draws: int = 2,
    seed: int = 0,
    important: bool = False,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Sensitivity]:
    """Of all `places`.

    product: what the network is for; None: its output. draws: sign vectors an image. important: with `importance` behind the
    attentions. Memory: the activations of one batch with its graph. progress: told the images done.
    Raises DataError without images.
    """
    names, prefix, width = places(model), len(model.spec.prefix), model.spec.width
    zeros = partial(torch.zeros, dtype=torch.float64)
    sites = {
        name: Sensitivity(
            tokens=zeros(prefix + 1), matrix=zeros(width, width), patches=zeros(width, width), importance=zeros(width)
        )
        for name in names
    }
    leaning = {name: Regression.empty(width, 1) for name in names if important and name.startswith("mid")}
    counts = {name: zeros(prefix + 1) for name in names}
    generator = torch.Generator().manual_seed(seed)
    like = next(model.parameters())
    product = product or Product.of(model.config, "output")
    done = 0
    for x in batches:
        with torch.enable_grad():
            start = x.to(like).detach().requires_grad_()  # a graph from the images on, whatever parameters are frozen
            found = model(start, gates=OPEN, want=(*names, product.want))
            answer = product.outcome(found[product.want])
            scale = answer.detach().exp().sqrt() if product.classifies else torch.ones_like(answer)
        squares = {name: torch.zeros_like(found[name][:, prefix:, 0]) for name in leaning}  # B patches
        for gradients in signed(answer, scale, [found[name] for name in names], draws, generator):
            for name, g in zip(names, gradients, strict=True):
                if g is not None:
                    _count(sites[name], counts[name], g, prefix)
                    if name in squares:
                        squares[name] += g[:, prefix:].square().sum(-1)
        for name, stats in leaning.items():
            if float(top := squares[name].max()) > 0:
                lengths = (squares[name] / top).clamp_min(FAINT).log() / 2
                stats.add(found[name][:, prefix:].detach(), lengths[..., None])
        done += len(x)
        if progress is not None:
            progress(done)
    if not done:
        raise DataError("sensitivity: no images. Pass a few hundred unlabelled ones.")
    for name in names:
        sites[name].tokens /= counts[name].clamp_min(1)
    for name, stats in leaning.items():
        if stats.weight:
            sites[name].importance = refit(stats, zeros(width, 1), ridge=LEAN_RIDGE)[0][:, 0].cpu()
    return sites


def _count(site: Sensitivity, count: Tensor, g: Tensor, prefix: int) -> None:
    squares = g.square().sum(-1).sum(0).to("cpu", torch.float64)  # N
    site.tokens[:prefix] += squares[:prefix]
    site.tokens[prefix] += squares[prefix:].sum()
    count[:prefix] += len(g)
    count[prefix] += len(g) * (g.shape[1] - prefix)
    flat, patches = g.flatten(0, 1), g[:, prefix:].flatten(0, 1)
    site.matrix += (flat.mT @ flat).to("cpu", torch.float64)
    site.patches += (patches.mT @ patches).to("cpu", torch.float64)
