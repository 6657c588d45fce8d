"""Peers of the few-image methods, in their own forms on the one model. For comparison only; nothing of vitrim uses them.

Dropping whole blocks is what depth pruning of Transformers does; the refitted form follows ReplaceMe (arXiv 2505.02819: a
contiguous range is replaced by a linear map, merged into the MLP before it), the tuned form follows PRACTISE (2202.07861:
blocks ranked by how well the network recovers from the loss of each, then features matched on the few images).
"""

from __future__ import annotations

import torch
from torch import Tensor

import vitrim
from vitrim import surgery
from vitrim.counting import cost
from vitrim.model import Vit
from vitrim.pipeline import RecoverConfig


class OutOfReach(Exception):
    """A budget that dropping whole blocks does not meet."""


@torch.no_grad()
def streams(model: Vit, x: Tensor, names: tuple[str, ...], batch: int = 50) -> dict[str, Tensor]:
    """Named streams of all images, [n, N, D]."""
    parts = [model(part, want=names) for part in x.split(batch)]
    return {name: torch.cat([part[name] for part in parts]) for name in names}


def dropped(model: Vit, order: list[int], limit: int) -> tuple[Vit, list[int]]:
    """The model without the first blocks of `order`, as few as bring its MACs to the limit."""
    for count in range(len(order) + 1):
        small = surgery.drop(model, blocks=order[:count])
        if cost(small).macs <= limit:
            return small, order[:count]
    raise OutOfReach(f"even without its blocks the model has more than {limit:,} MACs.")


def by_similarity(model: Vit, x: Tensor) -> list[int]:
    """Blocks by how little they change the stream, the least first: mean cosine of input and output tokens."""
    depth = len(model.blocks)
    found = streams(model, x, tuple(f"block:{i}" for i in range(depth)))
    with torch.no_grad():
        before = torch.cat([model.embed(part).x for part in x.split(50)])
    likeness = []
    for i in range(depth):
        after = found[f"block:{i}"]
        likeness.append(float(torch.cosine_similarity(before, after, dim=-1).mean()))
        before = after
    return sorted(range(depth), key=lambda i: -likeness[i])


def refitted_range(model: Vit, x: Tensor, limit: int) -> Vit:
    """A contiguous range of blocks replaced by a linear map of the MLP's output before it, in least squares."""
    depth = len(model.blocks)
    count = len(dropped(model, list(range(depth)), limit)[1])
    names = (*(f"block:{i}" for i in range(depth)), *(f"mid:{i}" for i in range(depth)))
    found = streams(model, x, names)

    def likeness(start: int) -> float:
        return float(torch.cosine_similarity(found[f"block:{start}"], found[f"block:{start + count}"], dim=-1).mean())

    start = max(range(depth - count), key=likeness)
    mid = found[f"mid:{start}"].flatten(0, 1).double()
    update = found[f"block:{start}"].flatten(0, 1).double() - mid
    target = found[f"block:{start + count}"].flatten(0, 1).double() - mid
    gram = update.T @ update
    gram += 1e-6 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    linear = torch.linalg.solve(gram, update.T @ target)  # D D: update @ linear ~ target
    small = surgery.drop(model, blocks=range(start + 1, start + 1 + count))
    mlp = small.blocks[start].mlp
    with torch.no_grad():
        mlp.fc2.weight.copy_((linear.T @ mlp.fc2.weight.double()).float())
        if mlp.fc2.bias is not None:
            mlp.fc2.bias.copy_((linear.T @ mlp.fc2.bias.double()).float())
    return small


def taught(small: Vit, teacher: Vit, data: object, *, steps: int, batch: int, seed: int) -> tuple[Vit, float]:
    """Features and answers matched on the images for some steps; the mean of the last losses."""
    config = RecoverConfig(
        steps=steps,
        batch_size=batch,
        lr=5e-4,
        objective="label_free",
        seed=seed,
        amp="bf16",
        device="cpu",
        eval_every=steps,
    )
    found = vitrim.recover(small, teacher=teacher, data=data, config=config)
    losses = [line["loss"] for line in found.history if line["kind"] == "train"]
    return found.model, sum(losses[-5:]) / len(losses[-5:])


def by_recoverability(model: Vit, data: object, *, steps: int, batch: int, seed: int) -> list[int]:
    """Blocks by how well the network recovers without each, the best first."""
    losses = [
        taught(surgery.drop(model, blocks=[i]), model, data, steps=steps, batch=batch, seed=seed)[1]
        for i in range(len(model.blocks))
    ]
    return sorted(range(len(losses)), key=lambda i: losses[i])


def dropped_and_tuned(
    model: Vit, data: object, order: list[int], limit: int, *, trial_steps: int, steps: int, batch: int, seed: int
) -> Vit:
    """The model without the blocks that are first in order, then taught. trial_steps: what made the order."""
    return taught(dropped(model, order, limit)[0], model, data, steps=steps, batch=batch, seed=seed)[0]
