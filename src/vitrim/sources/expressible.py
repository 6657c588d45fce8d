"""What a foreign block can say: one table of the spec's features, and the sentence for each that a family has no word for.

A family declares what its class has arguments for (`Family`); `unsayable` holds a spec against it. What only one family
asks, such as MLPs of a whole number of times the width, its own `write` says.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import get_args

from ..errors import SourceError
from ..spec import AttentionSpec, BlockSpec, ConvStem, MlpKind, MlpSpec, ModelSpec, Prefix, Stem

Norms = tuple[bool, bool]
"""Whether there is a norm behind the blocks, and one behind the pooling."""
Reads = tuple[tuple[str, ...], ...]
"""What each classifier reads."""
ENCODER, ON_POOL = (), (("pool",),)
KINDS: tuple[str, ...] = get_args(MlpKind)


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """What a foreign class can say. The defaults are its least, and the same for all blocks.

    name: of the class or family, for sentences.
    fills_width: heads times head width must be the width of the stream.  any_scale: of the scores, else `qk_dim ** -0.5`.
    every_bias: linears behind the queries, keys and values have a bias each, and these have one in all blocks or none.
    whole_patches: images of sizes that leave a rest beside the patches do not run.
    prefix: a regular expression over the kinds of the prefix tokens, such as `cls( reg)*`.
    prefix_rows: the position table must have rows for them.  any_grid: the table may be for another size than the image.
    channels, eps: None where any will do.
    """

    name: str
    stems: tuple[type[Stem], ...] = (ConvStem,)
    channels: int | None = None
    square: bool = False
    whole_patches: bool = False
    prefix: str = "cls"
    positions: Collection[str] = ("none", "learned", "fixed")
    prefix_rows: bool = False
    any_grid: bool = False
    fills_width: bool = True
    any_scale: bool = False
    qk_norms: Collection[str] = ("none",)
    kinds: Collection[str] = KINDS
    every_bias: bool = False
    layer_scale: bool = True
    pre_norm: Collection[bool] = (False,)
    last_norms: Collection[Norms] = ((True, False),)
    eps: float | None = None
    pools: Collection[str] = ("cls",)
    reads: Collection[Reads] = (ENCODER, ON_POOL)


def unsayable(spec: ModelSpec, family: Family) -> Iterator[str]:
    """What of a spec the family cannot say: the stem, the first block in the way, what stands around; nothing if it can."""
    if not isinstance(spec.stem, family.stems):
        yield f"its stem is {'one convolution' if isinstance(spec.stem, ConvStem) else 'that of T2T-ViT'}"
    if not spec.blocks:
        yield "it has no blocks"
    for i, block in enumerate(spec.blocks):
        yield from (f"block {i} {fault}" for fault in _of_block(block, spec, family))
        yield from (f"block {i} differs from block 0 ({fault})" for fault in _uneven(block, spec.blocks[0], family))
    yield from _around(spec, family)


def require(spec: ModelSpec, family: Family) -> tuple[AttentionSpec, MlpSpec]:
    """The halves of block 0, which stand for all. Raises SourceError with the first thing that the family cannot say."""
    for fault in unsayable(spec, family):
        raise refusal(family.name, fault)
    return halves(spec.blocks[0])


def halves(block: BlockSpec) -> tuple[AttentionSpec, MlpSpec]:
    """Both halves of a block that is known to have them."""
    assert block.attention is not None
    assert block.mlp is not None
    return block.attention, block.mlp


def any_half(spec: ModelSpec, *names: str) -> bool:
    """Whether a half of any block has one of these."""
    halves = (half for block in spec.blocks for half in (block.attention, block.mlp))
    return any(getattr(half, name, False) for half in halves for name in names)


def refusal(name: str, fault: str) -> SourceError:
    """The error that says what a family cannot say, and which cut it could."""
    inside = " Blocks cut whole (`vitrim compress ... --set axes=block`) leave what it can say." * fault.startswith(
        "block "
    )
    return SourceError(
        f"{name} cannot say this model: {fault}. Save it as a folder of vitrim (vitrim.save), which keeps every shape.{inside}"
    )


def _of_block(block: BlockSpec, spec: ModelSpec, family: Family) -> Iterator[str]:
    """What of one block has no word."""
    a, m = block.attention, block.mlp
    if a is None or m is None:
        yield f"has no {'attention' if a is None else 'MLP'}, and {family.name}'s blocks have both halves"
        return
    table = {
        "merges tokens": any(not isinstance(step, Prefix) for step in block.steps),
        "has a gate": a.gate or m.gate,
        "has an MLP in two factors": m.fc1_rank is not None or m.fc2_rank is not None,
        f"has heads of {a.qk_dim} for queries and {a.v_dim} for values": a.qk_dim != a.v_dim,
        f"has {a.heads} heads of {a.v_dim}, and {family.name} wants heads times head width equal to the width "
        f"{spec.width}": family.fills_width and a.heads * a.v_dim != spec.width,
        f"scales its scores by {a.scale!r}, not by {a.qk_dim**-0.5!r}": not family.any_scale
        and not math.isclose(a.scale, a.qk_dim**-0.5, rel_tol=1e-12),
        f"has {a.qk_norm} norms of queries and keys": a.qk_norm not in family.qk_norms,
        f"has the activation {m.kind!r}, and {family.name} takes {_either(family.kinds)}": m.kind not in family.kinds,
        "has a LayerScale": not family.layer_scale and (a.layer_scale or m.layer_scale),
        "has a linear without bias behind its attention or in its MLP": family.every_bias
        and not (a.out_bias and m.fc1_bias and m.fc2_bias),
    }
    yield from (fault for fault, there in table.items() if there)


def _uneven(block: BlockSpec, first: BlockSpec, family: Family) -> Iterator[str]:
    """In what a block differs from the first, where a family has one argument for all."""
    (a, m), (b, n) = (block.attention, block.mlp), (first.attention, first.mlp)
    if a is None or m is None or b is None or n is None:
        return
    yield from _differences(
        ("heads", "head width", "norms of queries and keys", "MLP units", "activation"),
        (a.heads, a.v_dim, a.qk_norm, m.hidden, m.kind),
        (b.heads, b.v_dim, b.qk_norm, n.hidden, n.kind),
    )
    if family.every_bias:
        biased = [half.q_bias or half.k_bias or half.v_bias for half in (a, b)]
        yield from _differences(("qkv bias",), biased[:1], biased[1:])


def _other_pooling(spec: ModelSpec) -> Iterator[str]:
    """In what attention pooling differs from the blocks, whose arguments families give it."""
    a, m = (spec.blocks[0].attention, spec.blocks[0].mlp) if spec.blocks else (None, None)
    if spec.pool.kind == "map" and a is not None and m is not None:
        pool = (spec.pool.heads, spec.pool.hidden, spec.pool.act)
        yield from _differences(("heads", "MLP units", "activation"), pool, (a.heads, m.hidden, m.kind))


def _differences(names: Sequence[str], these: Sequence[object], those: Sequence[object]) -> Iterator[str]:
    for name, this, that in zip(names, these, those, strict=True):
        if this != that:
            yield f"{name} {this!r}, there {that!r}"


def _around(spec: ModelSpec, family: Family) -> Iterator[str]:
    """What outside the blocks has no word."""
    norms = {"before them": spec.pre_norm, "behind them": spec.final_norm, "behind the pooling": spec.pool_norm}
    stand = " and ".join(place for place, norm in norms.items() if norm)
    reads, position = tuple(output.reads for output in spec.outputs), spec.position
    table = {
        "a norm before its blocks beside a bias in its stem": spec.pre_norm and getattr(spec.stem, "bias", False),
        f"its images have {spec.channels} channels, not {family.channels}": family.channels
        not in (None, spec.channels),
        f"its images of {spec.image_px} px in patches of {spec.patch_px} are not square": family.square
        and not len(set(spec.image_px)) == len(set(spec.patch_px)) == 1,
        f"its images of {spec.image_px} px are no whole number of patches of {spec.patch_px}": family.whole_patches
        and any(spec.unread_px),
        f"its prefix tokens are {spec.prefix!r}": re.fullmatch(family.prefix, " ".join(spec.prefix)) is None,
        f"its position table is {position.kind!r}, not {_either(family.positions)}": position.kind
        not in family.positions,
        f"its position table is for {position.grid}, not {spec.grid} patches": position.kind != "none"
        and position.grid != spec.grid
        and not family.any_grid,
        "its position table has no rows for the prefix tokens": family.prefix_rows and not position.prefix_rows,
        f"its pooling is {spec.pool.kind!r}": spec.pool.kind not in family.pools,
        f"its norms outside the blocks stand {stand}" if stand else "it has no norm outside its blocks": spec.pre_norm
        not in family.pre_norm
        or (spec.final_norm, spec.pool_norm) not in family.last_norms,
        "a norm behind no pooling": spec.pool.kind == "none" and spec.pool_norm,
        f"its norms have eps {spec.norm_eps!r}, not {family.eps!r}": family.eps not in (None, spec.norm_eps),
        f"its classifiers read {list(reads)!r}" if reads else "it has no classifier": reads not in family.reads,
        "a classifier in two factors": any(output.rank is not None for output in spec.outputs),
        "a classifier without bias": family.every_bias and not all(output.bias for output in spec.outputs),
    }
    yield from (fault for fault, there in table.items() if there)
    yield from (f"its attention pooling differs from the blocks ({fault})" for fault in _other_pooling(spec))


def _either(words: Collection[str]) -> str:
    *some, last = (repr(word) for word in words)
    return f"{', '.join(some)} or {last}" if some else last
