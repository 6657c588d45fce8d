"""Random small specs, and models whose every number is random, for the property tests."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from hypothesis import strategies as st

from vitrim.model import Vit, build
from vitrim.spec import (
    AttentionSpec,
    BlockSpec,
    ConvStem,
    Merge,
    MlpSpec,
    ModelSpec,
    Output,
    Pool,
    Position,
    Prefix,
    Similarity,
    Stem,
    T2TPerformer,
    T2TTransformer,
    Tokens,
)
from vitrim.surgery import Keep


def randomise(model: Vit, seed: int = 0, dtype: torch.dtype = torch.float64) -> Vit:
    """Every parameter random, norms and LayerScale too: a zero hides mistakes."""
    generator = torch.Generator().manual_seed(seed)
    model = model.to(dtype)
    with torch.no_grad():
        for name, p in model.named_parameters():
            values = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(dtype)
            near_one = "norm" in name and name.endswith("weight")
            p.copy_(1 + 0.3 * values if near_one else values * (0.5 if p.dim() == 1 else p.shape[-1] ** -0.5))
    return model


def make(spec: ModelSpec, seed: int = 0, dtype: torch.dtype = torch.float64) -> Vit:
    return randomise(build(spec), seed, dtype)


def images(spec: ModelSpec, count: int = 2, seed: int = 1, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, spec.channels, *spec.image_px, generator=generator, dtype=torch.float64).to(dtype)


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-10) -> bool:
    a, b = a.detach(), b.detach()
    assert a.shape == b.shape
    assert a.isfinite().all()
    return bool((a - b).abs().max() <= tolerance * max(1.0, float(a.abs().max())))


def vit(
    *,
    width: int = 16,
    blocks: int = 2,
    heads: int = 2,
    head_dim: int = 8,
    hidden: int = 24,
    image: int = 16,
    patch: int = 4,
    classes: int = 5,
    **fields: object,
) -> ModelSpec:
    """A small ordinary classifier."""
    block = BlockSpec(
        attention=AttentionSpec(heads=heads, qk_dim=head_dim, v_dim=head_dim, scale=head_dim**-0.5),
        mlp=MlpSpec(hidden=hidden),
    )
    spec = ModelSpec(
        image_px=(image, image),
        patch_px=(patch, patch),
        width=width,
        position=Position(grid=(image // patch, image // patch)),
        blocks=(block,) * blocks,
        outputs=(Output(classes=classes),),
    )
    return replace(spec, **fields)  # type: ignore[arg-type]


@st.composite
def attentions(draw: st.DrawFn) -> AttentionSpec:
    flag = st.booleans()
    return AttentionSpec(
        heads=draw(st.integers(1, 3)),
        qk_dim=draw(st.integers(1, 6)),
        v_dim=draw(st.integers(1, 6)),
        scale=draw(st.sampled_from([0.25, 0.35, 0.5])),
        q_bias=draw(flag),
        k_bias=draw(flag),
        v_bias=draw(flag),
        out_bias=draw(flag),
        qk_norm=draw(st.sampled_from(["none", "none", "layer", "rms"])),
        layer_scale=draw(flag),
        gate=draw(st.sampled_from([False, False, True])),
    )


@st.composite
def mlps(draw: st.DrawFn) -> MlpSpec:
    flag, rank = st.booleans(), st.one_of(st.none(), st.integers(1, 6))
    return MlpSpec(
        kind=draw(st.sampled_from(["gelu", "gelu_tanh", "quick_gelu", "relu", "silu", "swiglu"])),
        hidden=draw(st.integers(1, 12)),
        fc1_rank=draw(rank),
        fc2_rank=draw(rank),
        fc1_bias=draw(flag),
        fc2_bias=draw(flag),
        layer_scale=draw(flag),
        gate=draw(st.sampled_from([False, False, True])),
    )


def _steps(draw: st.DrawFn, tokens: Tokens, restore: bool) -> tuple[tuple[object, ...], Tokens]:
    """At most one random step, and what it leaves."""
    kind = draw(st.sampled_from(["none", "none", "merge", "merge", "similarity"]))
    at = draw(st.sampled_from(["start", "mid", "end"]))
    proportional = draw(st.booleans())
    if kind == "merge" and tokens.grid is not None:
        axis = draw(st.sampled_from(["h", "v"]))
        length = tokens.grid[1] if axis == "h" else tokens.grid[0]
        if length > 1:
            keep = draw(st.integers(length - length // 2, length - 1))
            weight = draw(st.sampled_from(["mean", "learned", "similarity"]))
            tau = 0.5 if weight == "similarity" else None
            grid = (tokens.grid[0], keep) if axis == "h" else (keep, tokens.grid[1])
            left = Tokens(prefix=tokens.prefix, patches=grid[0] * grid[1], grid=grid)
            return (Merge(at=at, axis=axis, weight=weight, tau=tau, keep=keep, proportional=proportional),), left
    if kind == "similarity" and tokens.patches > 1:
        keep = draw(st.integers(tokens.patches - tokens.patches // 2, tokens.patches - 1))
        left = Tokens(prefix=tokens.prefix, patches=keep, grid=None)
        how: dict[str, Any] = (
            {"match": match, "metric": draw(st.sampled_from([None, 1, 5]))}
            if (match := draw(st.sampled_from(["cosine", "ward", "heavier"]))) != "cosine"
            else {}
        )
        carry = draw(st.sampled_from([None, 1, 3])) if restore else None
        return (Similarity(at=at, keep=keep, proportional=proportional, carry=carry, **how),), left
    return (), tokens


@st.composite
def stems(draw: st.DrawFn) -> tuple[Stem, tuple[int, int]]:
    """A stem and its patch, mostly one convolution."""
    kind = draw(st.sampled_from(["conv", "conv", "conv", "performer", "transformer"]))
    if kind == "conv":
        return ConvStem(bias=draw(st.booleans())), (draw(st.integers(2, 4)), draw(st.integers(2, 4)))
    kernels, strides = draw(st.sampled_from([((7, 3, 3), (4, 1, 1)), ((3, 3, 1), (2, 1, 1)), ((3, 5, 3), (1, 3, 1))]))
    patch = (math.prod(strides),) * 2
    if kind == "performer":
        return T2TPerformer(token_dim=4, features=draw(st.integers(1, 5)), kernels=kernels, strides=strides), patch
    return T2TTransformer(token_dim=draw(st.integers(1, 5)), kernels=kernels, strides=strides), patch


@st.composite
def specs(draw: st.DrawFn, *, steps: bool = True, gates: bool = True, restores: bool = False) -> ModelSpec:
    """Any network that the spec can say and the model can build, small. restores: only those that give every token back."""
    flag = st.booleans()
    stem, patch = draw(stems())
    grid = (draw(st.integers(2, 5)), draw(st.integers(2, 5)))
    width = draw(st.sampled_from([8, 12]))
    prefix = draw(st.sampled_from([("cls",), ("cls", "dist"), ("cls", "reg", "reg"), (), ("reg",), ("reg", "cls")]))
    kinds = ["mean", "none", "map"] + (["cls"] * 3 if "cls" in prefix else [])
    kind = draw(st.sampled_from(kinds))
    pool = Pool(kind="map", heads=2, hidden=10) if kind == "map" else Pool(kind=kind)
    tokens = Tokens(prefix=len(prefix), patches=grid[0] * grid[1], grid=grid)
    blocks = []
    restore = steps and (restores or draw(st.sampled_from([False, False, True])))
    for _ in range(draw(st.integers(0, 3))):
        attention = draw(st.one_of(attentions(), attentions(), st.none()))
        mlp = draw(st.one_of(mlps(), mlps(), st.none()))
        if not gates:
            attention = None if attention is None else replace(attention, gate=False)
            mlp = None if mlp is None else replace(mlp, gate=False)
        chosen, tokens = _steps(draw, tokens, restore) if steps else ((), tokens)
        blocks.append(BlockSpec(attention=attention, mlp=mlp, steps=chosen))
    if steps and kind == "cls" and blocks and not restore and not blocks[-1].steps and draw(flag):
        blocks[-1] = replace(blocks[-1], steps=(Prefix(),))
    tail = bool(blocks) and any(isinstance(step, Prefix) for step in blocks[-1].steps)
    outputs: tuple[Output, ...] = ()
    if kind != "none":
        reads = [("pool",)] + ([("pool", "mean")] if kind != "mean" and not tail else [])
        outputs = draw(
            st.sampled_from(
                [
                    (),
                    (Output(classes=5, reads=draw(st.sampled_from(reads)), rank=draw(st.sampled_from([None, 2]))),),
                    (
                        Output(classes=5),
                        Output(
                            name="second", classes=5, reads=(prefix[-1] if "dist" in prefix else "pool",), bias=False
                        ),
                    ),
                ]
            )
        )
    position = Position(
        kind=draw(st.sampled_from(["learned", "learned", "fixed", "none"])),
        grid=grid,
        prefix_rows=draw(flag),
        resize=draw(st.sampled_from(["bicubic", "bicubic_antialias", "rebuild_1d"])),
    )
    rest = [draw(st.sampled_from([0, 0, side - 1])) if isinstance(stem, ConvStem) else 0 for side in patch]
    return ModelSpec(
        image_px=(patch[0] * grid[0] + rest[0], patch[1] * grid[1] + rest[1]),
        patch_px=patch,
        channels=draw(st.sampled_from([1, 3])),
        stem=stem,
        width=width,
        prefix=prefix,
        position=position,
        pre_norm=draw(flag),
        final_norm=draw(flag),
        pool_norm=draw(flag),
        norm_eps=draw(st.sampled_from([1e-6, 1e-5])),
        blocks=tuple(blocks),
        pool=pool,
        outputs=outputs,
        restore=restore,
    )


@st.composite
def keeps(draw: st.DrawFn, spec: ModelSpec) -> list[Keep | None]:
    """What to keep of each block: any heads, channels and units, equally many channels in each head."""

    def some(size: int) -> tuple[int, ...]:
        return tuple(sorted(draw(st.sets(st.integers(0, size - 1), min_size=1, max_size=size))))

    def channels(heads: int, size: int) -> tuple[tuple[int, ...], ...]:
        count = draw(st.integers(1, size))
        order = st.permutations(range(size))
        return tuple(tuple(sorted(draw(order)[:count])) for _ in range(heads))

    chosen: list[Keep | None] = []
    for block in spec.blocks:
        if draw(st.sampled_from([False, False, True])):
            chosen.append(None)
            continue
        keep = Keep(
            attention=draw(st.sampled_from([True, True, False])), mlp=draw(st.sampled_from([True, True, False]))
        )
        if (a := block.attention) is not None:
            heads = some(a.heads)
            qk = None if a.qk_norm != "none" else channels(len(heads), a.qk_dim)
            keep = replace(keep, heads=heads, qk=qk, v=channels(len(heads), a.v_dim))
        if block.mlp is not None:
            keep = replace(keep, hidden=some(block.mlp.hidden))
        chosen.append(keep)
    return chosen
