"""What a spec costs: parameters, multiply-accumulates, activation and file bytes, per block and in total. No torch.

`macs` counts linears, convolutions and both attention products at batch 1, and the batched products of token steps and
gates; no norms, softmax, biases, and no zeros (`padding_macs`). `flops == 2 * macs`. For a network with gates it is the worst case, all open.
The formulas of one part take plain numbers, or tensors in a search.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from .errors import SpecError
from .spec import (
    AttentionSpec,
    BlockSpec,
    BlockTokens,
    ConvStem,
    Merge,
    MlpSpec,
    ModelSpec,
    Similarity,
    T2TPerformer,
    token_walk,
)

FLOAT_BYTES = 4
ADDITIVE = ("macs", "params")
"""Resources that add up over the parts of a network; what a part takes of each is its price, in this order."""
RESOURCES = (*ADDITIVE, "memory_bytes", "file_bytes")
"""What a budget can bound exactly: attributes of `Cost`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockCost:
    """Cost of one block. tokens: at its entry and at its exit, prefix tokens included."""

    index: int
    tokens_in: int
    tokens_out: int
    attention_macs: int
    mlp_macs: int
    step_macs: int
    macs: int
    attention_params: int
    mlp_params: int
    params: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """Cost of a network at batch 1, float32. activation_bytes: the estimated peak of the largest moment.

    memory_bytes: weights plus peak activations. padding_macs: beside `macs`, what is multiplied by the zeros that fill the narrower
    of query/key and value heads up to the wider: torch's counter shows 2 * (macs + padding_macs). 0 where they are equal.
    """

    params: int
    macs: int
    padding_macs: int
    activation_bytes: int
    file_bytes: int
    stem_macs: int
    stem_params: int
    head_macs: int
    head_params: int
    blocks: tuple[BlockCost, ...]

    @property
    def flops(self) -> int:
        """Two operations for each multiply-accumulate."""
        return 2 * self.macs

    @property
    def memory_bytes(self) -> int:
        return self.file_bytes + self.activation_bytes

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, with the derived ones."""
        return {**asdict(self), "flops": self.flops, "memory_bytes": self.memory_bytes}


def linear_macs(tokens: Any, inputs: Any, outputs: Any, rank: Any = None) -> Any:
    """MACs of a linear on `tokens` tokens; rank: of its two factors, None for dense."""
    return tokens * inputs * outputs if rank is None else tokens * rank * (inputs + outputs)


def attention_macs(heads: Any, qk_dim: Any, v_dim: Any, *, tokens: Any, width: int, queries: Any = None) -> Any:
    """MACs of one attention half: projections and both products.

    tokens: keys and values, prefix included.  queries: tokens that ask and go on; None: all.
    """
    queries = tokens if queries is None else queries
    project = tokens * width * heads * (qk_dim + v_dim) + queries * width * heads * (qk_dim + v_dim)
    attend = queries * tokens * heads * (qk_dim + v_dim)
    return project + attend


def padding_macs(a: AttentionSpec, at: BlockTokens) -> int:
    """MACs of both attention products with zeros, which the model runs where query/key and value dims differ: that is faster."""
    return at.queries.count * at.keys.count * a.heads * abs(a.qk_dim - a.v_dim)


def mlp_macs(
    hidden: Any, *, tokens: Any, width: int, kind: str = "gelu", fc1_rank: Any = None, fc2_rank: Any = None
) -> Any:
    """MACs of one MLP half; a gated kind (`swiglu`) has two first linears."""
    first = 2 * hidden if kind == "swiglu" else hidden
    return linear_macs(tokens, width, first, fc1_rank) + linear_macs(tokens, hidden, width, fc2_rank)


def similarity_macs(step: Similarity, patches: int, width: int) -> int:
    """MACs of one similarity merge of so many patch tokens: distances or cosines, and a one-hot product for the merged ones.

    A metric maps all tokens, to its directions and, for `heavier`, to their importance. What is carried, the merged ones' differences, goes through
    two factors, and to their targets through the one-hot product.
    """
    gone, half, seen = patches - step.keep, patches // 2, step.metric or width
    if step.match == "heavier":
        targets, found = step.keep, patches * patches * (seen + 2)
    else:
        targets, found = half, (patches - half) * half * seen
    found += gone * targets * (width + 1) + patches * width * _compared(step)
    return found + (gone * width * 2 * step.carry + gone * targets * width if step.carry else 0)


def similarity_params(step: Similarity, width: int) -> int:
    """Parameters of a similarity step: what maps tokens to the metric and their importance, and differences to what comes back."""
    return width * (_compared(step) + 2 * (step.carry or 0))


def _compared(step: Similarity) -> int:
    """Learned directions to which all tokens are mapped."""
    return step.metric + (step.match == "heavier") if step.metric else 0


def attention_params(a: AttentionSpec, width: int) -> Any:
    """Parameters of one attention half with its norm, LayerScale and gate."""
    inner_qk, inner_v = a.heads * a.qk_dim, a.heads * a.v_dim
    weights = width * (2 * inner_qk + 2 * inner_v)
    biases = inner_qk * (a.q_bias + a.k_bias) + inner_v * a.v_bias + width * a.out_bias
    norms = {"none": 0, "rms": 2, "layer": 4}[a.qk_norm] * a.qk_dim
    return weights + biases + norms + _half_extras(a, width)


def mlp_params(m: MlpSpec, width: int) -> Any:
    """Parameters of one MLP half with its norm, LayerScale and gate."""
    first = 2 * m.hidden if m.kind == "swiglu" else m.hidden
    weights = linear_macs(1, width, first, m.fc1_rank) + linear_macs(1, m.hidden, width, m.fc2_rank)
    return weights + first * m.fc1_bias + width * m.fc2_bias + _half_extras(m, width)


def attention_price(a: AttentionSpec | None, at: BlockTokens) -> tuple[Any, Any]:
    """MACs and parameters of an attention half with its norm and gate; nothing where it is gone. Sizes may be tensors."""
    if a is None:
        return 0, 0
    macs_ = attention_macs(a.heads, a.qk_dim, a.v_dim, tokens=at.keys.count, width=at.width, queries=at.queries.count)
    return macs_ + 2 * at.width * a.gate, attention_params(a, at.width)


def mlp_price(m: MlpSpec | None, at: BlockTokens) -> tuple[Any, Any]:
    """The same of an MLP half."""
    if m is None:
        return 0, 0
    macs_ = mlp_macs(
        m.hidden, tokens=at.mlp.count, width=at.width, kind=m.kind, fc1_rank=m.fc1_rank, fc2_rank=m.fc2_rank
    )
    return macs_ + 2 * at.width * m.gate, mlp_params(m, at.width)


def block_peak(block: BlockSpec, at: BlockTokens) -> int:
    """Numbers alive in the widest moment of a block: `N*D` of the stream kept, what merges carry along, and the widest of its halves."""
    found = 0
    if (a := block.attention) is not None:
        n = at.keys.count
        found = 2 * n * at.width + n * a.heads * (2 * a.qk_dim + 2 * a.v_dim)
    if (m := block.mlp) is not None:
        n = at.mlp.count
        found = max(found, 2 * n * at.width + 2 * n * m.hidden)
    return found + at.carried * at.width


def _half_extras(half: AttentionSpec | MlpSpec, width: int) -> int:
    return 2 * width + width * half.layer_scale + (2 * width + 2) * half.gate


def params(spec: ModelSpec) -> int:
    """Parameters of the built network, fixed tables included."""
    return cost(spec).params


def macs(spec: ModelSpec) -> int:
    """Multiply-accumulates at batch 1 and the spec's image size."""
    return cost(spec).macs


def cost(model: Any) -> Cost:
    """Cost of a spec, a config, or anything with a `.spec`. Raises SpecError for what has none, such as a name."""
    spec = model if isinstance(model, ModelSpec) else getattr(model, "spec", None)
    if not isinstance(spec, ModelSpec):
        raise SpecError(
            f"cost: {type(model).__name__} has no spec; expected a model, such as vitrim.load or vitrim.from_model gives, or its spec."
        )
    walk = token_walk(spec)
    blocks = tuple(_block(spec, i, tokens) for i, tokens in enumerate(walk))
    peaks = (block_peak(block, at) for block, at in zip(spec.blocks, walk, strict=True))
    stem_macs, stem_params = _stem(spec)
    every = len(spec.prefix) + math.prod(spec.grid)
    head_macs, head_params = _head(spec, every if spec.restore or not walk else walk[-1].leave.count)
    total_params = stem_params + head_params + sum(block.params for block in blocks)
    return Cost(
        params=total_params,
        macs=stem_macs + head_macs + sum(block.macs for block in blocks),
        padding_macs=sum(
            padding_macs(block.attention, at) for block, at in zip(spec.blocks, walk, strict=True) if block.attention
        ),
        activation_bytes=FLOAT_BYTES * max((stem_peak(spec), *peaks)),
        file_bytes=FLOAT_BYTES * total_params,
        stem_macs=stem_macs,
        stem_params=stem_params,
        head_macs=head_macs,
        head_params=head_params,
        blocks=blocks,
    )


def _block(spec: ModelSpec, index: int, tokens: BlockTokens) -> BlockCost:
    block, width = spec.blocks[index], tokens.width
    attention, attention_par = attention_price(block.attention, tokens)
    mlp, mlp_par = mlp_price(block.mlp, tokens)
    steps = sum(
        similarity_macs(step, before.patches, width)
        for step, before in zip(block.steps, tokens.before, strict=True)
        if isinstance(step, Similarity)
    )
    step_par = sum(width for step in block.steps if isinstance(step, Merge) and step.weight == "learned")
    step_par += sum(similarity_params(step, width) for step in block.steps if isinstance(step, Similarity))
    return BlockCost(
        index=index,
        tokens_in=tokens.enter.count,
        tokens_out=tokens.leave.count,
        attention_macs=attention,
        mlp_macs=mlp,
        step_macs=steps,
        macs=attention + mlp + steps,
        attention_params=attention_par,
        mlp_params=mlp_par,
        params=attention_par + mlp_par + step_par,
    )


def _t2t_stages(spec: ModelSpec) -> list[tuple[int, int]]:
    """Tokens and their width in the two transformer stages of a tokens-to-token stem."""
    assert not isinstance(spec.stem, ConvStem)
    (h, w), (first, second, _), (one, two, _) = spec.image_px, spec.stem.strides, spec.stem.kernels
    return [
        ((h // first) * (w // first), spec.channels * one**2),
        ((h // (first * second)) * (w // (first * second)), spec.stem.token_dim * two**2),
    ]


def _stem(spec: ModelSpec) -> tuple[int, int]:
    """MACs and parameters in front of the blocks: stem, prefix tokens, position table, first norm."""
    rows, cols = spec.grid
    rest = spec.width * (len(spec.prefix) + spec.position_rows + 2 * spec.pre_norm)
    if isinstance(spec.stem, ConvStem):
        weights = spec.channels * math.prod(spec.patch_px) * spec.width
        return rows * cols * weights, weights + spec.width * spec.stem.bias + rest
    e, last = spec.stem.token_dim, spec.stem.token_dim * spec.stem.kernels[2] ** 2
    macs_, params_ = rows * cols * last * spec.width, last * spec.width + spec.width + rest
    for tokens, d in _t2t_stages(spec):
        macs_ += tokens * (3 * d * e + 3 * e * e)
        params_ += 3 * d * e + 3 * e * e + 3 * e + 2 * d + 2 * e
        if isinstance(spec.stem, T2TPerformer):
            m = spec.stem.features
            macs_ += tokens * (4 * e * m + m)
            params_ += 3 * e + m * e
        else:
            macs_ += 2 * tokens * tokens * e
    return macs_, params_


def _head(spec: ModelSpec, tokens: int) -> tuple[int, int]:
    """MACs and parameters behind the blocks, which so many tokens leave: norms, pooling, classifiers."""
    d = spec.width
    total, number = 0, 2 * d * (spec.final_norm + spec.pool_norm)
    if spec.pool.kind == "map":
        assert spec.pool.hidden is not None
        hidden = spec.pool.hidden
        total += d * d + tokens * 2 * d * d + 2 * tokens * d + d * d + 2 * d * hidden
        number += d + 4 * d * d + 4 * d + 2 * d + 2 * d * hidden + hidden + d
    for output in spec.outputs:
        weights = linear_macs(1, d * len(output.reads), output.classes, output.rank)
        total += weights
        number += weights + output.classes * output.bias
    return total, number


def stem_peak(spec: ModelSpec) -> int:
    """Numbers alive in the widest moment of the stem."""
    if isinstance(spec.stem, ConvStem):
        rows, cols = spec.grid
        return spec.channels * math.prod(spec.image_px) + (rows * cols + len(spec.prefix)) * spec.width
    return max(tokens * (width + 3 * spec.stem.token_dim) for tokens, width in _t2t_stages(spec))
