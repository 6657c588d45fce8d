"""The one Vision Transformer: built from a spec and nothing else.

With `spec.py`, `tokens.py` and `artifact.py` this is the whole runtime: it needs torch and safetensors only.

Shapes: B batch, N tokens with prefix, P prefix tokens, D width, H heads, Q query/key dims, V value dims, M MLP hidden.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from . import tokens as merging
from .errors import MeasureError, SpecError, VitrimError, did_you_mean
from .spec import (
    AttentionSpec,
    BlockSpec,
    BlockTokens,
    Config,
    ConvStem,
    Merge,
    MlpSpec,
    ModelSpec,
    Output,
    Prefix,
    Selection,
    Similarity,
    Step,
    kept,
    mergeable,
    token_walk,
)
from .stems import ConvPatches, TokensToTokens

Rows = Sequence[Tensor | None]
"""One tensor, or None, for each block."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Masks:
    """Multiplicative tensors of a search, differentiable; 0 and 1 give the masked twin of a cut network.

    Each field is None or has one entry for each block, None or a tensor: `block`, `attention`, `mlp` scalar or [B]
    (the last two scale a half's update; `block` gives X + g * (Block(X) - X)); `heads` [H] head outputs; `qk` [H, Q]
    queries after their bias; `v` [H, V]; `hidden` [M] after the activation or product; `fc1_rank`, `fc2_rank` [R]
    after the first factor.
    """

    block: Rows | None = None
    attention: Rows | None = None
    mlp: Rows | None = None
    heads: Rows | None = None
    qk: Rows | None = None
    v: Rows | None = None
    hidden: Rows | None = None
    fc1_rank: Rows | None = None
    fc2_rank: Rows | None = None

    def of(self, index: int) -> dict[str, Tensor]:
        """The tensors of one block, by field."""
        rows = {name: getattr(self, name) for name in self.__slots__}
        return {name: row[index] for name, row in rows.items() if row is not None and row[index] is not None}

    @staticmethod
    def by_block(blocks: Sequence[Mapping[str, Tensor]]) -> Masks:
        """The inverse of `of`: from the tensors of every block, by field."""
        names = {name for found in blocks for name in found}
        return Masks(**{name: tuple(found.get(name) for found in blocks) for name in names})


@dataclass(frozen=True, kw_only=True, slots=True)
class Gates:
    """How gate decisions arise.

    policy: `image` decides for each image, `group` for images with equal entries of `groups` [B], `batch` for all at
    once, `open` runs everything. noise: two tensors [B, 2] a block (attention, MLP) are drawn from it by the caller and
    added to the logits: a sequence over blocks. straight_through: hard decisions forward, soft ones backward.
    """

    policy: str = "image"
    groups: Tensor | None = None
    noise: Sequence[tuple[Tensor, Tensor] | None] | None = None
    temperature: float = 1.0
    straight_through: bool = False

    def __post_init__(self) -> None:
        if self.policy not in ("image", "group", "batch", "open"):
            raise SpecError(f"gates: policy={self.policy!r}; expected image, group, batch or open.")
        if (self.policy == "group") != (self.groups is not None):
            raise SpecError("gates: groups [B] belong to policy 'group', and only there.")

    def decide(self, logits: Tensor, noise: Tensor | None) -> Tensor:
        """Share of the update that passes.  logits: B 2, skip and run -> B."""
        if self.policy == "open":
            return torch.ones_like(logits[:, 0])
        if noise is not None:
            logits = logits + noise
        if self.policy == "batch":
            logits = logits.mean(0, keepdim=True).expand_as(logits)
        elif self.groups is not None:
            same = (self.groups[:, None] == self.groups[None, :]).to(logits.dtype)  # B B
            logits = same @ logits / same.sum(1, keepdim=True)
        soft = torch.softmax(logits / self.temperature, dim=-1)[:, 1]
        hard = (logits[:, 1] >= logits[:, 0]).to(soft.dtype)
        return hard + soft - soft.detach() if self.straight_through else hard


OPEN = Gates(policy="open")
"""Everything runs: how closed forms, calibrations and comparisons look at a network."""


class Stream(NamedTuple):
    """The residual stream between blocks. x: B N D, prefix tokens first. sizes: B patches, None while all are 1.

    bias: whether attention adds log sizes from here on. history: merges so far.
    """

    x: Tensor
    prefix: int
    grid: tuple[int, int] | None
    sizes: Tensor | None = None
    bias: bool = False
    history: tuple[merging.Undo, ...] = ()

    def size_bias(self) -> Tensor | None:
        """log of the token sizes, to be added to scores: B 1 1 N, prefix tokens count as 1. None: nothing is added."""
        if not self.bias or self.sizes is None:
            return None
        return F.pad(self.sizes.log(), (self.prefix, 0))[:, None, None, :].to(self.x.dtype)


ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "silu": F.silu,
}


def _spread(scale: Tensor) -> Tensor:
    """A scalar or one number an image, ready to multiply B N D."""
    return scale.reshape(-1, 1, 1)


NO_MASKS: Mapping[str, Tensor] = {}


class Sublayer(nn.Module):
    """What both halves of a block share: LayerScale and the gate."""

    gamma: nn.Parameter | None

    def __init__(self, width: int, spec: AttentionSpec | MlpSpec) -> None:
        super().__init__()
        if spec.layer_scale:
            self.gamma = nn.Parameter(torch.empty(width))
        else:
            self.register_parameter("gamma", None)
        self.gate = nn.Linear(width, 2) if spec.gate else None

    def scaled(self, update: Tensor) -> Tensor:
        """The update with LayerScale.  B N D."""
        return update if self.gamma is None else update * self.gamma

    def decision(self, x: Tensor, gates: Gates, noise: Tensor | None) -> Tensor | None:
        """Decisions from the mean token of the half's normalised input.  x: B N D -> B, or None without a gate."""
        return None if self.gate is None else gates.decide(self.gate(x.mean(1)), noise)


class Attention(Sublayer):
    """Multi-head attention with free query/key and value widths and an explicit scale."""

    q_bias: nn.Parameter | None
    k_bias: nn.Parameter | None
    v_bias: nn.Parameter | None

    def __init__(self, width: int, spec: AttentionSpec, eps: float) -> None:
        super().__init__(width, spec)
        self.spec = spec
        inner_qk, inner_v = spec.heads * spec.qk_dim, spec.heads * spec.v_dim
        self.qkv = nn.Parameter(torch.empty(2 * inner_qk + inner_v, width))  # rows: all q heads, all k, all v
        for name, size in (("q_bias", inner_qk), ("k_bias", inner_qk), ("v_bias", inner_v)):
            self.register_parameter(name, nn.Parameter(torch.empty(size)) if getattr(spec, name) else None)
        self.out = nn.Linear(inner_v, width, bias=spec.out_bias)
        self.q_norm = _head_norm(spec, eps)
        self.k_norm = _head_norm(spec, eps)
        self.pad: bool | None = None

    def _bias(self) -> Tensor | None:
        if self.q_bias is None and self.k_bias is None and self.v_bias is None:
            return None
        inner_qk = self.spec.heads * self.spec.qk_dim
        sizes = (inner_qk, inner_qk, self.spec.heads * self.spec.v_dim)
        found = (self.q_bias, self.k_bias, self.v_bias)
        return torch.cat(
            [self.qkv.new_zeros(n) if bias is None else bias for bias, n in zip(found, sizes, strict=True)]
        )

    def qkv_heads(self, x: Tensor, queries: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys after their norms, and values.  B N D -> B H N Q, B H N Q, B H N V.

        queries: only the first so many tokens ask; None: all.
        """
        s = self.spec
        inner_qk = s.heads * s.qk_dim
        bias = self._bias()
        if queries is None:
            q, k, v = F.linear(x, self.qkv, bias).split([inner_qk, inner_qk, s.heads * s.v_dim], dim=-1)
        else:
            q = F.linear(x[:, :queries], self.qkv[:inner_qk], None if bias is None else bias[:inner_qk])
            rest = F.linear(x, self.qkv[inner_qk:], None if bias is None else bias[inner_qk:])
            k, v = rest.split([inner_qk, s.heads * s.v_dim], dim=-1)
        q = self.q_norm(_split_heads(q, s.heads))
        k = self.k_norm(_split_heads(k, s.heads))
        return q, k, _split_heads(v, s.heads)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        """What each head makes of the values.  B H N Q, B H N Q, B H N V, bias B 1 1 N -> B H N V.

        Q and V need not be the spec's: a closed form tries narrower ones.
        """
        qk_dim, v_dim = q.shape[-1], v.shape[-1]
        if qk_dim != v_dim and self.pad is not False:  # fused kernels want equal widths; zeros change nothing
            wide = max(qk_dim, v_dim)
            q, k, v = (F.pad(t, (0, wide - t.shape[-1])) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=self.spec.scale)
        return y[..., :v_dim]

    def mix(
        self,
        x: Tensor,
        *,
        queries: int | None = None,
        bias: Tensor | None = None,
        masks: Mapping[str, Tensor] = NO_MASKS,
    ) -> Tensor:
        """What all heads hand to the output projection.  x: B N D normalised -> B N (H V)."""
        q, k, v = self.qkv_heads(x, queries)
        if "qk" in masks:
            q = q * masks["qk"][:, None, :]
        if "v" in masks:
            v = v * masks["v"][:, None, :]
        y = self.attend(q, k, v, bias)  # B H N V
        if "heads" in masks:
            y = y * masks["heads"][:, None, None]
        return y.transpose(1, 2).flatten(2)

    def finish(self, mixed: Tensor) -> Tensor:
        """The half's update from what the heads hand on.  B N (H V) -> B N D."""
        return self.scaled(self.out(mixed))


class Mlp(Sublayer):
    """Two linears, each dense or in two factors, and an activation or a gated product."""

    def __init__(self, width: int, spec: MlpSpec) -> None:
        super().__init__(width, spec)
        self.spec = spec
        rows = 2 * spec.hidden if spec.kind == "swiglu" else spec.hidden
        self.fc1a = None if spec.fc1_rank is None else nn.Linear(width, spec.fc1_rank, bias=False)
        self.fc1 = nn.Linear(spec.fc1_rank or width, rows, bias=spec.fc1_bias)
        self.fc2a = None if spec.fc2_rank is None else nn.Linear(spec.hidden, spec.fc2_rank, bias=False)
        self.fc2 = nn.Linear(spec.fc2_rank or spec.hidden, width, bias=spec.fc2_bias)

    @property
    def reader(self) -> nn.Linear:
        """The linear that reads the hidden units: fc2, or its first factor."""
        return self.fc2 if self.fc2a is None else self.fc2a

    def first(self, x: Tensor, masks: Mapping[str, Tensor] = NO_MASKS) -> Tensor:
        """What the activation is given.  x: B N D normalised -> B N rows."""
        if self.fc1a is not None:
            x = self.fc1a(x)
            if "fc1_rank" in masks:
                x = x * masks["fc1_rank"]
        return self.fc1(x)

    def activate(self, x: Tensor, masks: Mapping[str, Tensor] = NO_MASKS) -> Tensor:
        """Hidden units after the activation or product.  B N rows -> B N M."""
        if self.spec.kind == "swiglu":
            gate, value = x.chunk(2, dim=-1)
            x = F.silu(gate) * value
        else:
            x = ACTIVATIONS[self.spec.kind](x)
        return x * masks["hidden"] if "hidden" in masks else x

    def units(self, x: Tensor, masks: Mapping[str, Tensor] = NO_MASKS) -> Tensor:
        """Hidden units.  x: B N D normalised -> B N M."""
        return self.activate(self.first(x, masks), masks)

    def last(self, hidden: Tensor, masks: Mapping[str, Tensor] = NO_MASKS) -> Tensor:
        """The update before LayerScale.  B N M -> B N D."""
        if self.fc2a is not None:
            hidden = self.fc2a(hidden)
            if "fc2_rank" in masks:
                hidden = hidden * masks["fc2_rank"]
        return self.fc2(hidden)

    def finish(self, hidden: Tensor, masks: Mapping[str, Tensor] = NO_MASKS) -> Tensor:
        """The half's update from its hidden units.  B N M -> B N D."""
        return self.scaled(self.last(hidden, masks))


class TokenStep(nn.Module):
    """One token step of a block.

    gate: [D] of a learned merge. metric: [D, R], importance: [D], carry_a: [D, R] and carry_b: [R, D], of a similarity step that has
    them.
    """

    gate: nn.Parameter | None
    metric: nn.Parameter | None
    importance: nn.Parameter | None
    carry_a: nn.Parameter | None
    carry_b: nn.Parameter | None

    def __init__(self, step: Step, width: int, *, length: int) -> None:
        super().__init__()
        self.step = step
        self.length = length  # columns, rows or patch tokens that it finds at the spec's own image size
        learned = isinstance(step, Merge) and step.weight == "learned"
        self.register_parameter("gate", nn.Parameter(torch.empty(width)) if learned else None)
        rank, carry = (step.metric, step.carry) if isinstance(step, Similarity) else (None, None)
        weighs = isinstance(step, Similarity) and step.match == "heavier" and step.metric
        self.register_parameter("metric", nn.Parameter(torch.empty(width, rank)) if rank else None)
        self.register_parameter("importance", nn.Parameter(torch.empty(width)) if weighs else None)
        self.register_parameter("carry_a", nn.Parameter(torch.empty(width, carry)) if carry else None)
        self.register_parameter("carry_b", nn.Parameter(torch.empty(carry, width)) if carry else None)

    def keep(self, n: int) -> int:
        """How many of `n` remain; at another image size the same share goes."""
        assert not isinstance(self.step, Prefix)
        return kept(self.step.keep, self.length, n)

    def forward(self, stream: Stream) -> Stream:
        step = self.step
        if isinstance(step, Prefix):
            return stream._replace(x=stream.x[:, : stream.prefix], grid=None, sizes=None, bias=False)
        head, patches = stream.x[:, : stream.prefix], stream.x[:, stream.prefix :]
        sizes = patches.new_ones(patches.shape[:2]) if stream.sizes is None else stream.sizes
        n = mergeable(step, patches.shape[1], stream.grid)
        keep = self.keep(n)
        if keep == n:
            return stream
        if isinstance(step, Similarity):
            carry = None if self.carry_a is None or self.carry_b is None else (self.carry_a, self.carry_b)
            merged = merging.merge_similar(
                patches,
                sizes,
                keep=keep,
                match=step.match,
                metric=self.metric,
                importance=self.importance,
                carry=carry,
            )
        else:
            assert stream.grid is not None
            merged = merging.merge_lattice(
                patches,
                sizes,
                grid=stream.grid,
                axis=step.axis,
                keep=keep,
                weight=step.weight,
                tau=step.tau,
                gate=self.gate,
            )
        return stream._replace(
            x=torch.cat([head, merged.x], dim=1),
            grid=merged.undo.grid,
            sizes=merged.sizes,
            bias=stream.bias or step.proportional,
            history=(*stream.history, merged.undo),
        )


class Attended(NamedTuple):
    """stream: after the attention. mixed: what the heads handed on, B N (H V). decision: of the gate, B. None: not there."""

    stream: Stream
    mixed: Tensor | None
    decision: Tensor | None


class Transformed(NamedTuple):
    """stream: after the MLP. hidden: its units, B N M. decision: of the gate, B. None: not there."""

    stream: Stream
    hidden: Tensor | None
    decision: Tensor | None


class Seen(NamedTuple):
    """What taps may want of a block: the streams after its attention and after its MLP, and both gates' decisions."""

    mid: Stream
    block: Stream
    decisions: tuple[Tensor | None, Tensor | None]


class Block(nn.Module):
    """Attention and MLP, either possibly gone, with the token steps between them.

    `forward` is start, attend, mid, transform, end; closed forms call these themselves. norm1 and attention, norm2 and mlp
    are there where the spec has that half.
    """

    norm1: nn.LayerNorm
    attention: Attention
    norm2: nn.LayerNorm
    mlp: Mlp

    def __init__(self, spec: BlockSpec, width: int, eps: float, at: BlockTokens) -> None:
        super().__init__()
        self.spec = spec
        if spec.attention is not None:
            self.norm1 = nn.LayerNorm(width, eps=eps)
            self.attention = Attention(width, spec.attention, eps)
        if spec.mlp is not None:
            self.norm2 = nn.LayerNorm(width, eps=eps)
            self.mlp = Mlp(width, spec.mlp)
        self.steps = nn.ModuleList()
        for step, before in zip(spec.steps, at.before, strict=True):
            self.steps.append(TokenStep(step, width, length=mergeable(step, before.patches, before.grid)))

    def token_steps(self, at: str) -> list[TokenStep]:
        """The steps at a place, in order; the prefix step apart."""
        found = [module for module in self.steps if isinstance(module, TokenStep)]
        return [module for module in found if module.step.at == at and not isinstance(module.step, Prefix)]

    def has_steps(self, *places: str) -> bool:
        """Whether there is a token step at one of these places; a prefix step counts as one at the start."""
        return any(step.at in places for step in self.spec.steps)

    def _after(self, stream: Stream, at: str) -> Stream:
        for module in self.token_steps(at):
            stream = module(stream)
        return stream

    def start(self, stream: Stream) -> Stream:
        """After the token steps in front of the attention; the prefix step is `attend`'s."""
        return self._after(stream, "start")

    def mid(self, stream: Stream) -> Stream:
        """After the token steps between attention and MLP."""
        return self._after(stream, "mid")

    def end(self, stream: Stream) -> Stream:
        """After the token steps behind the MLP."""
        return self._after(stream, "end")

    def going(self, stream: Stream) -> Stream:
        """The tokens that ask and go on: only the prefix, where the block has a prefix step.  stream: after `start`."""
        tail = next((m for m in self.steps if isinstance(m, TokenStep) and isinstance(m.step, Prefix)), None)
        return stream if tail is None else tail(stream)

    def attend(
        self,
        stream: Stream,
        masks: Mapping[str, Tensor] = NO_MASKS,
        gates: Gates = OPEN,
        noise: Tensor | None = None,
    ) -> Attended:
        """The attention, if there is one, and the prefix step.  stream: after `start`; masks: of `Masks.of`."""
        going = self.going(stream)
        if self.spec.attention is None:
            return Attended(going, None, None)
        normed = self.norm1(stream.x)
        queries = None if going is stream else stream.prefix
        mixed = self.attention.mix(normed, queries=queries, bias=stream.size_bias(), masks=masks)
        decision = self.attention.decision(normed, gates, noise)
        update = _weighed(self.attention.finish(mixed), masks.get("attention"), decision)
        return Attended(going._replace(x=going.x + update), mixed, decision)

    def units(self, stream: Stream, masks: Mapping[str, Tensor] = NO_MASKS) -> Tensor:
        """Hidden units of the MLP.  stream: after `mid` -> B N M."""
        return self.mlp.units(self.norm2(stream.x), masks)

    def transform(
        self,
        stream: Stream,
        masks: Mapping[str, Tensor] = NO_MASKS,
        gates: Gates = OPEN,
        noise: Tensor | None = None,
    ) -> Transformed:
        """The MLP, if there is one.  stream: after `mid`."""
        if self.spec.mlp is None:
            return Transformed(stream, None, None)
        normed = self.norm2(stream.x)
        decision = self.mlp.decision(normed, gates, noise)
        hidden = self.mlp.units(normed, masks)
        update = _weighed(self.mlp.finish(hidden, masks), masks.get("mlp"), decision)
        return Transformed(stream._replace(x=stream.x + update), hidden, decision)

    def forward(
        self,
        stream: Stream,
        masks: Mapping[str, Tensor] = NO_MASKS,
        gates: Gates = OPEN,
        noise: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Stream, Seen]:
        """One block: the stream after it, and what taps may want."""
        if "block" in masks and any(step.at != "end" for step in self.spec.steps):
            raise SpecError("masks.block on a block with token steps at its start or middle; scale its halves instead.")
        first, second = (None, None) if noise is None else noise
        entry = self.start(stream)
        mid, _, asked = self.attend(entry, masks, gates, first)
        after, _, answered = self.transform(self.mid(mid), masks, gates, second)
        if "block" in masks:
            after = after._replace(x=entry.x + _spread(masks["block"]) * (after.x - entry.x))
        return self.end(after), Seen(mid, after, (asked, answered))

    def run(self, stream: Stream) -> Stream:
        """The stream after the block, gates open."""
        after, _ = self(stream)
        return after


class Blocks(nn.ModuleList):
    """The blocks, typed."""

    def __iter__(self) -> Iterator[Block]:
        return super().__iter__()  # type: ignore[return-value]

    def __getitem__(self, index: int) -> Block:  # type: ignore[override]
        return super().__getitem__(index)  # type: ignore[return-value]


def _weighed(update: Tensor, scale: Tensor | None, decision: Tensor | None) -> Tensor:
    if scale is not None:
        update = update * _spread(scale)
    return update if decision is None else update * _spread(decision).to(update.dtype)


def _split_heads(x: Tensor, heads: int) -> Tensor:  # B N (H E) -> B H N E
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _head_norm(spec: AttentionSpec, eps: float) -> nn.Module:
    if spec.qk_norm == "none":
        return nn.Identity()
    return nn.LayerNorm(spec.qk_dim, eps=eps) if spec.qk_norm == "layer" else nn.RMSNorm(spec.qk_dim, eps=eps)


class MapPool(nn.Module):
    """Attention pooling with one learned query, as SigLIP has it. Costed, never cut."""

    def __init__(self, width: int, heads: int, hidden: int, eps: float, act: str = "gelu") -> None:
        super().__init__()
        self.heads = heads
        self.act = act
        self.latent = nn.Parameter(torch.empty(width))
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=eps)
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:  # B N D, B 1 1 N -> B D
        q = self.q(self.latent).expand(x.shape[0], 1, -1)
        k, v = self.kv(x).chunk(2, dim=-1)
        q, k, v = (_split_heads(t, self.heads) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=q.shape[-1] ** -0.5)
        y = self.out(y.transpose(1, 2).flatten(2))
        return (y + self.fc2(ACTIVATIONS[self.act](self.fc1(self.norm(y)))))[:, 0]


class Read(NamedTuple):
    """logits: B classes, the mean of several classifiers, or the pooled features of an encoder. outputs: logits by classifier.

    reads: what the last linear of each classifier is given. pooled: B D. tokens: B N D after the final norm.
    """

    logits: Tensor
    outputs: dict[str, Tensor]
    reads: dict[str, Tensor]
    pooled: Tensor
    tokens: Tensor


class Vit(nn.Module):
    """A Vision Transformer as its spec says it.

    selection: how its weights were cut. provenance: where it comes from, as plain JSON values.
    pad_heads: zero-pad the narrower of query/key and value heads inside attention (None: yes), exact either way.
    grad_checkpoint: recompute blocks in the backward pass.
    """

    def __init__(
        self, config: Config, *, selection: Selection | None = None, provenance: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__()
        spec = config.spec
        self.position: nn.Parameter | None
        self.prefix: nn.Parameter | None
        self.config = config
        self.selection = selection or Selection()
        self.provenance: dict[str, Any] = dict(provenance or {})
        self.grad_checkpoint = False
        self.stem = ConvPatches(spec) if isinstance(spec.stem, ConvStem) else TokensToTokens(spec)
        self.register_parameter(
            "prefix", nn.Parameter(torch.empty(len(spec.prefix), spec.width)) if spec.prefix else None
        )
        table = torch.empty(spec.position_rows, spec.width)
        position = nn.Parameter(table, requires_grad=spec.position.kind == "learned")
        self.register_parameter("position", position if spec.position.kind != "none" else None)
        self.pre_norm = _norm(spec, spec.pre_norm)
        self.blocks = Blocks(
            Block(block, spec.width, spec.norm_eps, at) for block, at in zip(spec.blocks, token_walk(spec), strict=True)
        )
        self.norm = _norm(spec, spec.final_norm)
        if spec.pool.kind == "map":
            assert spec.pool.heads is not None
            assert spec.pool.hidden is not None
            self.pool = MapPool(spec.width, spec.pool.heads, spec.pool.hidden, spec.norm_eps, spec.pool.act)
        self.pool_norm = _norm(spec, spec.pool_norm)
        self.heads = nn.ModuleDict()
        for output in spec.outputs:
            inputs = spec.width * len(output.reads)
            if output.rank is not None:
                self.heads[f"{output.name}_a"] = nn.Linear(inputs, output.rank, bias=False)
            self.heads[output.name] = nn.Linear(output.rank or inputs, output.classes, bias=output.bias)

    @property
    def spec(self) -> ModelSpec:
        return self.config.spec

    @property
    def pad_heads(self) -> bool | None:
        """Whether heads of unequal widths are padded; settable."""
        return next((attention.pad for attention in self._attentions()), None)

    @pad_heads.setter
    def pad_heads(self, value: bool | None) -> None:
        for attention in self._attentions():
            attention.pad = value

    def _attentions(self) -> list[Attention]:
        return [module for module in self.modules() if isinstance(module, Attention)]

    def embed(self, x: Tensor) -> Stream:
        """Images to the stream that enters the first block.  x: B C h w."""
        spec = self.spec
        if x.dim() != 4 or x.shape[1] != spec.channels:
            raise SpecError(f"input of shape {tuple(x.shape)}; expected [batch, {spec.channels}, height, width].")
        (h, w), (ph, pw) = x.shape[-2:], spec.patch_px
        if ((h % ph or w % pw) and (h, w) != spec.image_px) or not h or not w:
            raise SpecError(
                f"image of {h} x {w} px; expected the model's own size, {spec.image_px[0]} x {spec.image_px[1]}, or multiples of "
                f"the patch, {ph} x {pw} px. Resize or pad the images."
            )
        grid = (h // ph, w // pw)
        x = self.stem(x)
        table = None if self.position is None else self.positions(grid)
        inside = len(spec.prefix) if spec.position.prefix_rows else 0
        if table is not None and not inside:
            x = x + table
        if self.prefix is not None:
            x = torch.cat([self.prefix.to(x.dtype).expand(x.shape[0], -1, -1), x], dim=1)
        if table is not None and inside:
            x = x + table
        return Stream(self.pre_norm(x), len(spec.prefix), grid)

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """The position table for a grid of patches, resized where it was made for another.  rows D, in float32 inside."""
        position = self.spec.position
        assert self.position is not None
        if grid == position.grid:
            return self.position
        rows = len(self.spec.prefix) if position.prefix_rows else 0
        if position.resize == "rebuild_1d":
            return sinusoids(rows + grid[0] * grid[1], self.spec.width).to(self.position)
        head, table = self.position[:rows], self.position[rows:]
        lattice = table.to(torch.promote_types(table.dtype, torch.float32)).T.reshape(1, -1, *position.grid)
        resized = F.interpolate(
            lattice, size=grid, mode="bicubic", antialias=position.resize == "bicubic_antialias", align_corners=False
        )
        return torch.cat([head, resized.flatten(2)[0].T.to(table.dtype)])

    def forward(
        self, x: Tensor, masks: Masks | None = None, gates: Gates | None = None, want: Sequence[str] | None = None
    ) -> Any:
        """Logits [B, classes] (the mean of several classifiers), or pooled features [B, D] of an encoder.

        want: names of what to return instead, as a dict: `logits`, `outputs` (dict by classifier), `reads` (what their last
        linears are given), `pooled` [B, D], `tokens` [B, N, D] after the final norm, `decisions` (per block, attention's and MLP's, [B] or None), and with
        a block's number `block:i` [B, N, D] after its MLP, `mid:i` after its attention, `restored:i` as `block:i` with each merged
        token's value at all that it stands for, `map:i` [B, D, h, w] its patches on the lattice.
        """
        taps = _taps(want, len(self.blocks))
        gates = gates or Gates(policy="image" if self.config.gate_policy == "group" else self.config.gate_policy)
        stream = self.embed(x)
        lattice = stream.grid
        found: dict[str, Any] = {}
        decisions = []
        for i, block in enumerate(self.blocks):
            noise = None if gates.noise is None else gates.noise[i]
            arguments = (stream, NO_MASKS if masks is None else masks.of(i), gates, noise)
            if self.grad_checkpoint and torch.is_grad_enabled():
                stream, seen = checkpoint(block, *arguments, use_reentrant=False)
            else:
                stream, seen = block(*arguments)
            decisions.append(seen.decisions)
            for name in taps.get(i, ()):
                found[f"{name}:{i}"] = _tapped(name, i, seen, lattice)
        ended = self.read(stream)
        if want is None:
            return ended.logits
        found.update(ended._asdict(), decisions=tuple(decisions))
        return {name: found[name] for name in want}

    def read(self, stream: Stream) -> Read:
        """What is read of the stream behind the last block."""
        if self.spec.restore:
            head, patches = stream.x[:, : stream.prefix], stream.x[:, stream.prefix :]
            patches = merging.restore(patches, stream.history, carried=True)
            stream = stream._replace(x=torch.cat([head, patches], dim=1), sizes=None, bias=False, history=())
        tokens = self.norm(stream.x)
        pooled = self.pool_norm(self.pool_of(stream, tokens))
        reads, outputs = {}, {}
        for output in self.spec.outputs:
            x = self._seen_by(output, stream, tokens, pooled)
            if output.rank is not None:
                x = self.heads[f"{output.name}_a"](x)
            reads[output.name], outputs[output.name] = x, self.heads[output.name](x)
        several = len(outputs) > 1
        logits = torch.stack(list(outputs.values())).mean(0) if several else next(iter(outputs.values()), pooled)
        return Read(logits=logits, outputs=outputs, reads=reads, pooled=pooled, tokens=tokens)

    def answer(self, stream: Stream, start: int = 0, want: str = "logits") -> Tensor:
        """Logits, or an encoder's features, from the stream in front of block `start` on; gates open.  want: or another of `Read`."""
        for i in range(start, len(self.blocks)):
            stream = self.blocks[i].run(stream)
        found: Tensor = getattr(self.read(stream), want)
        return found

    def pool_of(self, stream: Stream, tokens: Tensor) -> Tensor:
        """The pool before its norm.  tokens: B N D after the final norm -> B D, or all of them without a pool."""
        kind = self.spec.pool.kind
        if kind == "none":
            return tokens
        if kind == "cls":
            return tokens[:, self.spec.prefix.index("cls")]
        return self.pool(tokens, stream.size_bias()) if kind == "map" else self._mean(stream, tokens)

    def _mean(self, stream: Stream, tokens: Tensor) -> Tensor:
        patches = tokens[:, stream.prefix :]
        if stream.bias and stream.sizes is not None:
            return (patches * stream.sizes[:, :, None]).sum(1) / stream.sizes.sum(1, keepdim=True)
        return patches.mean(1)

    def _seen_by(self, output: Output, stream: Stream, tokens: Tensor, pooled: Tensor) -> Tensor:
        parts = []
        for read in output.reads:
            if read == "pool":
                parts.append(pooled)
            elif read == "mean":
                parts.append(self._mean(stream, tokens))
            else:
                parts.append(tokens[:, self.spec.prefix.index(read)])
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def outputs(self, x: Tensor) -> dict[str, Tensor]:
        """Logits of each classifier by name."""
        return self(x, want=("outputs",))["outputs"]

    def features(self, x: Tensor, taps: Sequence[int], restore: bool = True) -> list[Tensor]:
        """Streams after the given blocks: maps [B, D, rows, cols] on the input's lattice, merged tokens restored, or tokens [B, N, D].

        Raises SpecError for a map of a block that leaves no patch tokens (an exact tail).
        """
        name = "map" if restore else "block"
        found = self(x, want=tuple(f"{name}:{i}" for i in taps))
        return [found[f"{name}:{i}"] for i in taps]


WANTS = (*Read._fields, "decisions")
TAPS = ("block", "mid", "restored", "map")


def _taps(want: Sequence[str] | None, blocks: int) -> dict[int, list[str]]:
    found: dict[int, list[str]] = {}
    for name in want or ():
        if name in WANTS:
            continue
        kind, _, number = name.partition(":")
        if kind not in TAPS or not number.isdigit():
            raise SpecError(
                f"want={name!r}{did_you_mean(name, WANTS)}; expected {', '.join(WANTS)}, or {', '.join(f'{tap}:i' for tap in TAPS)}."
            )
        if int(number) >= blocks:
            raise SpecError(f"want={name!r}; the model has blocks 0 to {blocks - 1}.")
        found.setdefault(int(number), []).append(kind)
    return found


def _tapped(kind: str, i: int, seen: Seen, lattice: tuple[int, int] | None) -> Tensor:
    """What a tap of block `i` gives."""
    if kind in ("block", "mid"):
        found: Tensor = getattr(seen, kind).x
        return found
    stream = seen.block
    head, patches = stream.x[:, : stream.prefix], stream.x[:, stream.prefix :]
    if not patches.shape[1]:
        raise SpecError(
            f"{kind}:{i} was asked for behind a prefix step, which leaves no patch tokens; take a block before {i}."
        )
    patches = merging.restore(patches, stream.history)
    if kind == "restored":
        return torch.cat([head, patches], dim=1)
    assert lattice is not None
    return patches.transpose(1, 2).unflatten(-1, lattice)


def _norm(spec: ModelSpec, wanted: bool) -> nn.Module:
    return nn.LayerNorm(spec.width, eps=spec.norm_eps) if wanted else nn.Identity()


def sinusoids(rows: int, width: int) -> Tensor:
    """The fixed 1-D table of T2T-ViT: sine at even, cosine at odd columns.  rows x D, float64 inside."""
    columns = torch.arange(width)
    rates = torch.pow(10000.0, -2.0 * torch.div(columns, 2, rounding_mode="floor").double() / width)
    angles = torch.arange(rows).double()[:, None] * rates
    return torch.where(columns % 2 == 0, angles.sin(), angles.cos()).float()


def initialise(model: Vit) -> None:
    """Random weights as DeiT starts: truncated normal 0.02, zero biases, unit norms. Draws from the global generator."""
    for name, parameter in model.named_parameters():
        last = name.rsplit(".", 1)[-1]
        with torch.no_grad():
            if name == "position" and model.spec.position.kind == "fixed":
                parameter.copy_(sinusoids(*parameter.shape))
            elif last == "gamma":
                parameter.fill_(1e-4)
            elif name.endswith("stem.proj.weight"):
                nn.init.trunc_normal_(parameter, std=math.sqrt(1.0 / parameter[0].numel()))
            elif last == "features":  # as T2T-ViT draws them: rows at right angles, of length sqrt(their number)
                nn.init.orthogonal_(parameter).mul_(math.sqrt(parameter.shape[0]))
            elif parameter.dim() > 1 or last == "latent":
                nn.init.trunc_normal_(parameter, std=0.02)
            else:
                parameter.zero_()
    for module in model.modules():
        if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
            nn.init.ones_(module.weight)


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The first tensor with a number that is NaN or infinite, and how many it has, in words; None where all are finite."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.is_meta and not bool(torch.isfinite(tensor).all()):
            wrong = int((~torch.isfinite(tensor)).sum())
            return f"{name!r} holds {wrong} of {tensor.numel()} numbers that are NaN or infinite"
    return None


def require_model(model: object, what: str) -> None:
    """Raises VitrimError for what is no model of ours, such as a name.  what: it in words, "compress: the model"."""
    if not isinstance(model, Vit):
        raise VitrimError(
            f"{what} is a {type(model).__name__}; expected one that vitrim.load or vitrim.from_model gives."
        )


def device_named(name: str) -> torch.device:
    """The device of a name, "cpu" or "cuda:0". Raises MeasureError where torch knows or finds none."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise MeasureError(f"unknown device {name!r}; expected a name such as 'cpu' or 'cuda:0'.") from error
    if device.type == "meta":
        raise MeasureError(f"device {name!r} holds no numbers to compute with. Compute on 'cpu'.")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise MeasureError(f"device {name!r}: torch finds none here. Compute on 'cpu'.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise MeasureError(f"device {name!r}: torch sees {torch.cuda.device_count()} CUDA devices. Compute on 'cpu'.")
    return device


def build(spec: ModelSpec | Config) -> Vit:
    """A randomly initialised model in eval mode, float32 on the CPU. The global generator gives the weights."""
    config = spec if isinstance(spec, Config) else Config(spec=spec)
    model = Vit(config)
    initialise(model)
    return model.eval()


Soft = Masks  # its name until 0.2
