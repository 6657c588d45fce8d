"""What a disturbance of the stream does to the outputs, in their own unit, without running the rest of the network.

A classifier's outputs are its class probabilities p, and the unit is the divergence KL(dense || changed) in nats. With random
signs e, the gradients g of sum_c sqrt(p_c) e_c log p_c (p held fixed) have E[g g^T] = J^T (diag p - p p^T) J, so that
1/2 E[(sum over tokens of g . d)^2] is, to second order, the divergence that a change d of the stream causes. It takes the
direction of d into account, and the tokens together: errors that cancel on the way to the class token cost nothing.
Where an image has several labels, each has two outcomes of its own, and the sums run over the outcomes of all.
An encoder's output is its feature divided by its length, the unit the squared error of that, and E[(g . d)^2] estimates it.
Where the tokens are the product, each is divided by its length, and the unit is the mean of their squared errors.

Shapes: B batch, N tokens, D width, K draws of signs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from vitrim.model import OPEN, Vit
from vitrim.spec import Config, ProductName, product_of


@dataclass(frozen=True)
class Product:
    """What a network is for, and how far two are apart in it.

    kind: the probabilities of its `classes`, those of its `labels` where an image has several, its `features`, or all its `tokens`.
    """

    kind: Literal["classes", "labels", "features", "tokens"]

    @staticmethod
    def of(config: Config, named: ProductName | None = None) -> Product:
        """named: as `spec.product_of` has it, which raises ConfigError for tokens that are not there."""
        if product_of(config.spec, named) == "tokens":
            return Product("tokens")
        if not config.spec.outputs:
            return Product("features")
        return Product("labels" if config.multi_label else "classes")

    @property
    def classifies(self) -> bool:
        """Whether probabilities are compared."""
        return self.kind in ("classes", "labels")

    @property
    def want(self) -> Literal["tokens", "logits"]:
        """Its name in `Vit.forward`."""
        return "tokens" if self.kind == "tokens" else "logits"

    @property
    def metric(self) -> str:
        """The unit, in words."""
        return {
            "classes": "KL(dense || compressed), nats",
            "labels": "KL(dense || compressed), nats, summed over the labels",
            "features": "squared error of the features divided by their length",
            "tokens": "mean squared error of the tokens divided by their length",
        }[self.kind]

    def outcome(self, result: Tensor) -> Tensor:
        """What divergences are measured on: log-probabilities, or features or tokens divided by their length.  [B, ...] -> [B, C]"""
        if self.kind == "labels":  # each has two outcomes: [B, 2 C]
            return torch.cat([F.logsigmoid(result), F.logsigmoid(-result)], dim=-1)
        if self.kind == "classes":
            return result.log_softmax(-1)
        if self.kind == "features":
            return F.normalize(result.flatten(1), dim=-1)
        return F.normalize(result, dim=-1).flatten(1) / result.shape[1] ** 0.5

    def divergence(self, before: Tensor, after: Tensor) -> Tensor:
        """Of each image, [B] float64, in the unit; from what `outcome` gave."""
        before, after = before.double(), after.double()
        if self.classifies:
            return (before.exp() * (before - after)).sum(-1).clamp_min(0)
        return (before - after).square().sum(-1)

    def apart(self, before: Tensor, after: Tensor) -> float:
        """The mean divergence over images, from what two networks answered, [B, ...]."""
        return float(self.divergence(self.outcome(before.double()), self.outcome(after.double())).mean())

    def scale(self, answer: Tensor) -> Tensor:
        """What the signs are multiplied by: the roots of the probabilities, or 1.  answer: of `outcome`."""
        return (answer.detach() / 2).exp() if self.classifies else torch.ones_like(answer)


def random_signs(answer: Tensor, draws: int, generator: torch.Generator) -> Tensor:
    """[K, B, C] of -1 and 1 like the answers [B, C]; drawn image by image, so that batches do not change them."""
    count = answer.shape[1]
    signs = torch.stack([torch.randint(0, 2, (draws, count), generator=generator) for _ in answer], dim=1)
    return (signs * 2 - 1).to(answer)


def signed(
    answer: Tensor, scale: Tensor, streams: Sequence[Tensor], draws: int, generator: torch.Generator
) -> Iterator[tuple[Tensor | None, ...]]:
    """Gradients of the sum of scale * signs * answer at each stream, draw by draw; None where the answer sees nothing of it."""
    signs = random_signs(answer, draws, generator)
    for draw in range(draws if streams else 0):
        with torch.enable_grad():
            total = (scale * signs[draw] * answer).sum()
        yield torch.autograd.grad(total, streams, retain_graph=draw + 1 < draws, allow_unused=True)


@dataclass(frozen=True)
class Gradients:
    """of: by the names of `Vit.forward`, [K, B, N, D].  outcome: [B, C] of the undisturbed network."""

    of: dict[str, Tensor]
    outcome: Tensor
    product: Product

    def cost(self, name: str, change: Tensor) -> Tensor:
        """[K, B] float64 summands whose mean estimates the divergence that a change [B, N, D] of this stream causes."""
        return self.squared(torch.einsum("kbnd,bnd->kb", self.of[name], change))

    def squared(self, along: Tensor) -> Tensor:
        """The same from the sums over tokens of g . d.  [K, B]"""
        return along.double().square() * (0.5 if self.product.classifies else 1.0)


def gradients(
    model: Vit,
    x: Tensor,
    names: Sequence[str],
    *,
    draws: int,
    generator: torch.Generator,
    product: Product | None = None,
) -> Gradients:
    """Gradients at these places for `draws` sign vectors an image; a place that the product does not see has zeros.

    x: B C h w. product: None: the output. The signs come from the generator, on the CPU. Memory: the graph of one batch, and K streams a place.
    """
    like = next(model.parameters())
    product = product or Product.of(model.config, "output")
    with torch.enable_grad():
        found = model(x.to(like).requires_grad_(), gates=OPEN, want=(*names, product.want))
        streams = [found[name] for name in names]
        answer = product.outcome(found[product.want])
    drawn = list(signed(answer, product.scale(answer), streams, draws, generator))
    of = {
        name: torch.stack([torch.zeros_like(streams[j]) if g[j] is None else g[j] for g in drawn]).detach()  # type: ignore[misc]
        for j, name in enumerate(names)
    }
    return Gradients(of=of, outcome=answer.detach(), product=product)
