"""Peers of the learned widths: equal ratios by magnitude, Torch-Pruning's own recipe, units drawn at random, from scratch."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import vitrim
from vitrim import surgery
from vitrim.counting import cost
from vitrim.errors import DataError
from vitrim.model import Vit, build
from vitrim.sources.timm import to_module
from vitrim.surgery import Keep


def nearest(make: Callable[[float], Vit], limit: int, *, rounds: int = 12) -> Vit:
    """The largest network within the limit that `make(share kept)` gives, by bisection."""
    low, high, best = 0.02, 1.0, None
    for _ in range(rounds):
        middle = (low + high) / 2
        small = make(middle)
        if cost(small).macs <= limit:
            low, best = middle, small
        else:
            high = middle
    if best is None:
        raise DataError(f"no share above 0.02 brings the network to {limit:,} MACs.")
    return best


@torch.no_grad()
def by_magnitude(dense: Vit, share: float) -> Vit:
    """Equal shares of the q/k dims, v dims and MLP units of every block, the largest products of norms kept."""
    keeps = []
    for block, module in zip(dense.spec.blocks, dense.blocks, strict=True):
        a, m = block.attention, block.mlp
        assert a is not None
        assert m is not None
        inner = a.heads * a.qk_dim
        q, k, v = module.attention.qkv.split([inner, inner, a.heads * a.v_dim])
        out = module.attention.out.weight.T  # (H V) D
        qk = (q.norm(dim=1) * k.norm(dim=1)).view(a.heads, a.qk_dim)
        vo = (v.norm(dim=1) * out.norm(dim=1)).view(a.heads, a.v_dim)
        units = module.mlp.fc1.weight.norm(dim=1) * module.mlp.fc2.weight.norm(dim=0)
        keeps.append(Keep(qk=_top_rows(qk, share), v=_top_rows(vo, share), hidden=_top(units, share)))
    return surgery.cut(dense, keeps, method="magnitude")


def _top(scores: Tensor, share: float) -> tuple[int, ...]:
    count = max(1, round(share * len(scores)))
    return tuple(sorted(scores.topk(count).indices.tolist()))


def _top_rows(scores: Tensor, share: float) -> tuple[tuple[int, ...], ...]:
    return tuple(_top(row, share) for row in scores)


def random_like(dense: Vit, small: Vit, seed: int) -> Vit:
    """The widths of `small`, with units of `dense` drawn at random: is it the units or the shape that matters?"""
    generator = torch.Generator().manual_seed(seed)

    def draw(size: int, count: int) -> tuple[int, ...]:
        return tuple(sorted(torch.randperm(size, generator=generator)[:count].tolist()))

    keeps = []
    for before, after in zip(dense.spec.blocks, small.spec.blocks, strict=True):
        a, b, m, n = before.attention, after.attention, before.mlp, after.mlp
        assert a is not None
        assert m is not None
        heads = () if b is None else draw(a.heads, b.heads)
        keeps.append(
            Keep(
                attention=b is not None,
                mlp=n is not None,
                heads=None if b is None else heads,
                qk=None if b is None else tuple(draw(a.qk_dim, b.qk_dim) for _ in heads),
                v=None if b is None else tuple(draw(a.v_dim, b.v_dim) for _ in heads),
                hidden=None if n is None else draw(m.hidden, n.hidden),
            )
        )
    return surgery.cut(dense, keeps, method="random")


def from_scratch(small: Vit, seed: int) -> Vit:
    """A network of the same shape with random weights."""
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    found = build(small.config)
    torch.set_rng_state(state)
    return found


def torch_pruning(
    dense: Vit,
    x: Tensor,
    y: Tensor | None,
    limit: int,
    *,
    whole_heads: bool = False,
    gradients: dict[str, Tensor] | None = None,
) -> Vit:
    """Torch-Pruning 1.6 by its own recipe for timm's ViTs: group Taylor, dims in every head and MLP units, the stream whole.

    x, y: images as the network takes them, and labels, for the gradients. whole_heads: its other choice, heads instead of dims in
    heads. gradients: of another loss, by timm's names; labels are not needed then. Raises DataError where it cut nothing of an
    attention or no MLP units, which its isomorphic mode does without a word.
    """
    import torch_pruning as tp

    def learn(module: Any) -> None:
        if gradients is None:
            nn.functional.cross_entropy(module(x), y).backward()
            return
        for name, parameter in module.named_parameters():
            parameter.grad = gradients[name].clone() if name in gradients else None

    def pruned(share: float) -> Vit:
        module: Any = to_module(dense)
        for block in module.blocks:
            block.attn.fused_attn = False  # its recipe replaces the forward; plain products are the same numbers
        heads = {block.attn.qkv: block.attn.num_heads for block in module.blocks}
        fewest = 1 / min(heads.values())  # it would take the last head too, and fail
        inner = [
            module.head,
            module.patch_embed.proj,
            *(b.attn.proj for b in module.blocks),
            *(b.mlp.fc2 for b in module.blocks),
        ]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pruner = tp.pruner.MetaPruner(
                module,
                x[:1],
                importance=tp.importance.GroupTaylorImportance(),
                global_pruning=False,
                pruning_ratio=1 - share,
                ignored_layers=inner,
                num_heads=heads,
                prune_num_heads=whole_heads,
                prune_head_dims=not whole_heads,
                head_pruning_ratio=1 - max(share, fewest) if whole_heads else 0.0,
            )
            module.zero_grad()
            learn(module)
            for group in pruner.step(interactive=True):
                group.prune()
        for block in module.blocks:
            attn = block.attn
            attn.num_heads = pruner.num_heads[attn.qkv]
            attn.head_dim = attn.qkv.out_features // (3 * attn.num_heads)
            attn.attn_dim = attn.head_dim * attn.num_heads
            attn.fused_attn = True
            # the scores keep the dense scale
            factor = (attn.head_dim**-0.5) / (dense.spec.blocks[0].attention.scale)  # type: ignore[union-attr]
            with torch.no_grad():
                attn.qkv.weight[: attn.attn_dim] /= factor
                if attn.qkv.bias is not None:
                    attn.qkv.bias[: attn.attn_dim] /= factor
        module.zero_grad(set_to_none=True)
        return vitrim.from_model(module.eval(), dense.config.preprocess, labels=dense.config.labels, verify=False)

    small = nearest(pruned, limit)
    for i, (before, after) in enumerate(zip(dense.spec.blocks, small.spec.blocks, strict=True)):
        a, b, m, n = before.attention, after.attention, before.mlp, after.mlp
        if (
            a is None
            or b is None
            or m is None
            or n is None
            or b.heads * b.v_dim >= a.heads * a.v_dim
            or n.hidden >= m.hidden
        ):
            raise DataError(f"Torch-Pruning left block {i} as it was in part: check its recipe.")
    return small
