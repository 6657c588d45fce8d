"""What a disturbance of the stream does to the outputs, in their own unit, without running the rest of the network.

A classifier's outputs are its class probabilities p, and the unit is the divergence KL(dense || changed) in nats. With random
signs e, the gradients g of sum_c sqrt(p_c) e_c log p_c (p held fixed) have E[g g^T] = J^T (diag p - p p^T) J, so that
1/2 E[(sum over tokens of g . d)^2] is, to second order, the divergence that a change d of the stream causes. It takes the
direction of d into account, and the tokens together: errors that cancel on the way to the class token cost nothing.
Where an image has several labels, each has two outcomes of its own, and the sums run over the outcomes of all.
An encoder's output is its feature divided by its length, the unit the squared error of that, and E[(g . d)^2] estimates it.

Shapes: B batch, N tokens, D width, K draws of signs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from vitrim.model import OPEN, Vit


def outcome(result: Tensor, *, classifies: bool, several: bool = False) -> Tensor:
    """What divergences are measured on: log-probabilities, or features divided by their length.  [B, ...] -> [B, C]

    several: an image has several labels, each of which applies or not: [B, C] -> [B, 2 C].
    """
    if several:
        return torch.cat([F.logsigmoid(result), F.logsigmoid(-result)], dim=-1)
    return result.log_softmax(-1) if classifies else F.normalize(result.flatten(1), dim=-1)


def divergence(before: Tensor, after: Tensor, *, classifies: bool) -> Tensor:
    """Of each image, [B] float64: KL(before || after) of log-probabilities, or the squared error of unit features."""
    before, after = before.double(), after.double()
    if classifies:
        return (before.exp() * (before - after)).sum(-1).clamp_min(0)
    return (before - after).square().sum(-1)


def apart(before: Tensor, after: Tensor, *, classifies: bool, several: bool = False) -> float:
    """The mean divergence over images, from what two networks answered, [B, ...]."""
    ours, theirs = (outcome(answer.double(), classifies=classifies, several=several) for answer in (before, after))
    return float(divergence(ours, theirs, classifies=classifies).mean())


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
    classifies: bool

    def cost(self, name: str, change: Tensor) -> Tensor:
        """[K, B] float64 summands whose mean estimates the divergence that a change [B, N, D] of this stream causes."""
        return self.squared(torch.einsum("kbnd,bnd->kb", self.of[name], change))

    def squared(self, along: Tensor) -> Tensor:
        """The same from the sums over tokens of g . d.  [K, B]"""
        return along.double().square() * (0.5 if self.classifies else 1.0)


def gradients(model: Vit, x: Tensor, names: Sequence[str], *, draws: int, generator: torch.Generator) -> Gradients:
    """Gradients at these places for `draws` sign vectors an image; a place that the outputs do not see has zeros.

    x: B C h w. The signs come from the generator, on the CPU. Memory: the graph of one batch, and K streams a place.
    """
    like = next(model.parameters())
    classifies = bool(model.spec.outputs)
    with torch.enable_grad():
        found = model(x.to(like).requires_grad_(), gates=OPEN, want=(*names, "logits"))
        streams = [found[name] for name in names]
        answer = outcome(found["logits"], classifies=classifies, several=model.config.multi_label)
        scale = (answer.detach() / 2).exp() if classifies else torch.ones_like(answer)
    drawn = list(signed(answer, scale, streams, draws, generator))
    of = {
        name: torch.stack([torch.zeros_like(streams[j]) if g[j] is None else g[j] for g in drawn]).detach()  # type: ignore[misc]
        for j, name in enumerate(names)
    }
    return Gradients(of=of, outcome=answer.detach(), classifies=classifies)
