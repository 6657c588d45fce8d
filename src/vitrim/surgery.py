"""Exact edits: cut, drop, factorise, fold. Each gives a new model with its own spec and selection; none changes its input.

A cut by `Keep`s equals the masked network of `masked_twin` (law 3). Factors replace products of weights (law 6).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .errors import SpecError
from .freezing import Half
from .model import Attention, Masks, Vit
from .spec import (
    AttentionSpec,
    BlockSpec,
    MlpSpec,
    ModelSpec,
    Prefix,
    SelectionStep,
    at_size,
    has_own_positions,
    spec_hash,
    steps_at,
)

Indices = tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Keep:
    """What stays of one block; None: all of it.

    heads: kept heads. qk, v: for each kept head, its kept channels (all heads equally many). hidden: kept MLP units.
    """

    attention: bool = True
    mlp: bool = True
    heads: Indices | None = None
    qk: tuple[Indices, ...] | None = None
    v: tuple[Indices, ...] | None = None
    hidden: Indices | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Factors:
    """New weights for the products of one block; None: that product stays as it is.

    q, k: [H, D, R] each, q_bias [H, R] or None. v [H, D, R], o [H, R, D], out_bias [D].
    fc1: (first [D, R], second [R, rows], bias [rows] or None), fc2: the same from M to D.
    """

    q: Tensor | None = None
    k: Tensor | None = None
    q_bias: Tensor | None = None
    v: Tensor | None = None
    o: Tensor | None = None
    out_bias: Tensor | None = None
    fc1: tuple[Tensor, Tensor, Tensor | None] | None = None
    fc2: tuple[Tensor, Tensor, Tensor | None] | None = None


def with_spec(
    model: Vit,
    spec: ModelSpec,
    state: Mapping[str, Tensor],
    step: SelectionStep | None = None,
    *,
    share: bool = False,
) -> Vit:
    """A new model of `spec` with these weights (copied), and `model`'s config, provenance and selection, plus `step`.

    share: the weights themselves instead of copies: a trial that is looked at and dropped needs no second model's memory.
    """
    with torch.device("meta"):
        new = Vit(
            replace(model.config, spec=spec),
            selection=model.selection if step is None else model.selection.then(step),
            provenance=model.provenance,
        )
    own = {name: value.detach() if share else value.detach().clone() for name, value in state.items()}
    new.load_state_dict(own, strict=True, assign=True)
    new.pad_heads = model.pad_heads
    return new.train(model.training)


def copy(model: Vit) -> Vit:
    """An independent copy."""
    return with_spec(model, model.spec, model.state_dict())


def fold_layer_scale(model: Vit, *, skip: Collection[Half] = ()) -> Vit:
    """LayerScale multiplied into the last linear of its half; exact. A model without any is copied.

    skip: halves (block, "attention" or "mlp") that stay as they are.
    """
    state = dict(model.state_dict())
    spec = with_folded(model.spec, skip=skip)
    for i, (before, after) in enumerate(zip(model.spec.blocks, spec.blocks, strict=True)):
        if before.attention != after.attention:
            _scale_rows(state, f"blocks.{i}.attention.gamma", f"blocks.{i}.attention.out")
        if before.mlp != after.mlp:
            _scale_rows(state, f"blocks.{i}.mlp.gamma", f"blocks.{i}.mlp.fc2")
    return with_spec(model, spec, state)


def with_folded(spec: ModelSpec, *, skip: Collection[Half] = ()) -> ModelSpec:
    """The spec after `fold_layer_scale`."""

    def folded(i: int, block: BlockSpec) -> BlockSpec:
        a, m = block.attention, block.mlp
        return replace(
            block,
            attention=a if a is None or (i, "attention") in skip else replace(a, layer_scale=False),
            mlp=m if m is None or (i, "mlp") in skip else replace(m, layer_scale=False),
        )

    return replace(spec, blocks=tuple(folded(i, block) for i, block in enumerate(spec.blocks)))


def _scale_rows(state: dict[str, Tensor], gamma_name: str, linear: str) -> None:
    gamma = state.pop(gamma_name)
    state[f"{linear}.weight"] = state[f"{linear}.weight"] * gamma[:, None]
    if f"{linear}.bias" in state:
        state[f"{linear}.bias"] = state[f"{linear}.bias"] * gamma


def cut(
    model: Vit,
    keeps: Sequence[Keep | None],
    *,
    method: str,
    variant: str = "",
    skip: Collection[Half] = (),
) -> Vit:
    """Remove what the keeps leave out, one for each block (None: untouched). LayerScale is folded first.

    skip: halves (block, "attention" or "mlp") whose LayerScale stays.
    Raises SpecError when the keeps fit no network: wrong number, unequal counts among heads, indices out of range.
    """
    _check_keeps(model.spec, keeps)
    parent = spec_hash(model.spec)
    model = fold_layer_scale(model, skip=skip)
    state, blocks = dict(model.state_dict()), list(model.spec.blocks)
    chosen = tuple(None if keep is None else record(block, keep) for block, keep in zip(blocks, keeps, strict=True))
    for i, (block, keep) in enumerate(zip(model.spec.blocks, keeps, strict=True)):
        if keep is not None:
            attention, mlp = _cut_attention(state, i, block.attention, keep), _cut_mlp(state, i, block.mlp, keep)
            blocks[i] = replace(block, attention=attention, mlp=mlp)
    step = SelectionStep(method=method, variant=variant, parent=parent, blocks=chosen)
    return with_spec(model, replace(model.spec, blocks=tuple(blocks)), state, step)


def drop(
    model: Vit,
    *,
    attention: Sequence[int] = (),
    mlp: Sequence[int] = (),
    blocks: Sequence[int] = (),
    method: str = "drop",
) -> Vit:
    """Drop the attention, the MLP or both of the named blocks. A block keeps its place and its token steps."""
    for i in (*attention, *mlp, *blocks):
        if not 0 <= i < len(model.spec.blocks):
            raise SpecError(f"block {i!r}; the model has blocks 0 to {len(model.spec.blocks) - 1}.")
    keeps = [
        Keep(attention=i not in attention and i not in blocks, mlp=i not in mlp and i not in blocks)
        for i in range(len(model.spec.blocks))
    ]
    return cut(model, keeps, method=method)


def without_empty(model: Vit) -> Vit:
    """The same network without the blocks of which nothing is left, for families that count only what is there.

    Exact. The later blocks move up; a network with no such block is copied.
    """
    blocks = model.spec.blocks
    there = [i for i, block in enumerate(blocks) if block.attention or block.mlp or block.steps]
    moved = {f"blocks.{old}.": f"blocks.{new}." for new, old in enumerate(there)}
    state = {}
    for name, value in model.state_dict().items():
        head = ".".join(name.split(".", 2)[:2]) + "."
        state[moved.get(head, head) + name.removeprefix(head) if name.startswith("blocks.") else name] = value
    step = None
    if len(there) < len(blocks):
        step = SelectionStep(method="without_empty", parent=spec_hash(model.spec), blocks=(None,) * len(blocks))
    return with_spec(model, replace(model.spec, blocks=tuple(blocks[i] for i in there)), state, step)


@torch.no_grad()
def without_dead(model: Vit, *, skip: Collection[Half] = ()) -> Vit:
    """The same network without units that change nothing; `model` itself where there are none.

    Such are MLP units, value dims and heads whose columns in the last linear are zero, and query/key dims of which one side is zero.
    All heads of a block keep equally many dims, and every part at least one unit. skip: halves that stay as they are.
    """
    keeps: list[Keep | None] = []
    for i, (spec, block) in enumerate(zip(model.spec.blocks, model.blocks, strict=True)):
        parts: dict[str, Any] = {}
        if spec.mlp is not None and (i, "mlp") not in skip:
            (units,) = _alive(block.mlp.reader.weight.any(dim=0)[None])
            parts |= {"hidden": units} if len(units) < spec.mlp.hidden else {}
        if (a := spec.attention) is not None and (i, "attention") not in skip:
            mixed = block.attention.out.weight.any(dim=0).view(a.heads, a.v_dim)
            (heads,) = _alive(mixed.any(dim=1)[None])
            values, pairs = _alive(mixed[list(heads)]), _alive(_scored(block.attention)[list(heads)])
            parts |= {"heads": heads} if len(heads) < a.heads else {}
            parts |= {"v": values} if len(values[0]) < a.v_dim else {}
            parts |= {"qk": pairs} if len(pairs[0]) < a.qk_dim and a.qk_norm == "none" else {}
        keeps.append(Keep(**parts) if parts else None)
    if not any(keeps):
        return model
    whole = [
        (i, half)
        for i, keep in enumerate(keeps)
        for half, cuts in (("mlp", ("hidden",)), ("attention", ("heads", "v", "qk")))
        if keep is None or all(getattr(keep, name) is None for name in cuts)
    ]
    return cut(model, keeps, method="without_dead", skip=whole)


def _scored(attention: Attention) -> Tensor:
    """Whether a query/key dim adds to any score.  [H, Q]"""
    a = attention.spec
    sides = [attention.qkv[: a.heads * a.qk_dim], attention.qkv[a.heads * a.qk_dim : 2 * a.heads * a.qk_dim]]
    found = []
    for rows, bias in zip(sides, (attention.q_bias, attention.k_bias), strict=True):
        alive = rows.any(dim=1)
        found.append(alive if bias is None else alive | bias.bool())
    return (found[0] & found[1]).view(a.heads, a.qk_dim)


def _alive(alive: Tensor) -> tuple[Indices, ...]:
    """For each row the units to keep: those that are alive, and the first others up to as many as the fullest row has, at least one."""
    count = max(1, int(alive.sum(dim=1).max()))
    order = alive.int().argsort(dim=1, descending=True, stable=True)[:, :count].sort(dim=1).values
    return tuple(tuple(row) for row in order.tolist())


def masked_twin(model: Vit, keeps: Sequence[Keep | None]) -> Masks:
    """The 0/1 tensors under which `model` computes what `cut(model, keeps)` computes."""
    _check_keeps(model.spec, keeps)
    like = next(model.parameters())

    def mask(size: tuple[int, ...], kept: Iterable[Any]) -> Tensor:
        found = like.new_zeros(size)
        for index in kept:
            found[index] = 1
        return found

    def row(block: BlockSpec, keep: Keep) -> Iterator[tuple[str, Tensor]]:
        if (a := block.attention) is not None:
            heads = range(a.heads) if keep.heads is None else keep.heads
            yield "attention", like.new_full((), float(keep.attention))
            yield "heads", mask((a.heads,), heads)
            for name, channels, size in (("qk", keep.qk, a.qk_dim), ("v", keep.v, a.v_dim)):
                if channels is not None:
                    pairs = ((h, c) for h, kept in zip(heads, channels, strict=True) for c in kept)
                    yield name, mask((a.heads, size), pairs)
        if (m := block.mlp) is not None:
            yield "mlp", like.new_full((), float(keep.mlp))
            if keep.hidden is not None:
                yield "hidden", mask((m.hidden,), keep.hidden)

    return Masks.by_block([dict(row(b, k) if k else ()) for b, k in zip(model.spec.blocks, keeps, strict=True)])


def factorise(
    model: Vit,
    factors: Sequence[Factors | None],
    *,
    method: str,
    variant: str = "",
    refit: bool = False,
    share: bool = False,
) -> Vit:
    """Replace products of weights by the factors given, one entry for each block.

    The caller folds LayerScale first where a factor replaces the last linear of a half. New heads keep the old scale.
    share: as in `with_spec`.
    """
    if len(factors) != len(model.spec.blocks):
        raise SpecError(f"{len(factors)} entries for {len(model.spec.blocks)} blocks; expected one for each.")
    state, blocks = dict(model.state_dict()), list(model.spec.blocks)
    chosen: list[dict[str, Any] | None] = []
    for i, new in enumerate(factors):
        made: dict[str, Any] = {}
        if new is not None and (new.q is not None or new.v is not None):
            made["attention"] = _new_attention(state, i, blocks[i].attention, new)
        if new is not None and (new.fc1 is not None or new.fc2 is not None):
            made["mlp"] = _new_mlp(state, i, blocks[i].mlp, new)
        blocks[i] = replace(blocks[i], **made)
        chosen.append(dict.fromkeys(made, "rotated") or None)
    parent = spec_hash(model.spec)
    step = SelectionStep(method=method, variant=variant, parent=parent, refit=refit, blocks=tuple(chosen))
    return with_spec(model, replace(model.spec, blocks=tuple(blocks)), state, step, share=share)


def resized(model: Vit, image_px: tuple[int, int]) -> Vit:
    """The same network for images of another size (height, width), which gives what the model itself gives for them.

    Exact: its positions are resized once, in float32 at least, instead of in every forward pass; each merge leaves the same
    share of tokens. Its preprocessing makes images of that size. At its own size this folds positions that were made for
    another grid of patches, and a network that has none such is copied.
    Raises SpecError for a size that the network cannot take.
    """
    spec = at_size(model.spec, image_px)
    moved = {
        f"blocks.{i}.steps.{old}.": f"blocks.{i}.steps.{new}."
        for i, steps in enumerate(steps_at(model.spec, spec.grid))
        for new, old in enumerate(steps)
    }
    state = {}
    for name, value in model.state_dict().items():
        step = re.match(r"blocks\.\d+\.steps\.\d+\.", name)
        if step is None:
            state[name] = value
        elif step[0] in moved:
            state[moved[step[0]] + name.removeprefix(step[0])] = value
    if model.position is not None:
        state["position"] = model.positions(spec.grid)
    new = with_spec(model, spec, state)
    if image_px != model.spec.image_px and (preprocess := model.config.preprocess) is not None:
        new.config = replace(new.config, preprocess=replace(preprocess, size_px=image_px))
    if model.position is not None and spec.grid != model.spec.position.grid:
        made_for = [count * patch for count, patch in zip(model.spec.position.grid, spec.patch_px, strict=True)]
        new.provenance = {"positions_made_for_px": made_for, **new.provenance}
    return new


def with_own_positions(model: Vit, image_px: tuple[int, int] | None = None) -> Vit:
    """The model itself, or `resized` where it is for another size than asked or resizes positions in every forward pass.

    image_px: None is its own size.
    """
    size = image_px or model.spec.image_px
    return model if size == model.spec.image_px and has_own_positions(model.spec) else resized(model, size)


def exact_tail(model: Vit) -> Vit:
    """Let only the prefix tokens through the last block: the same outputs, fewer operations.

    Raises SpecError where the network reads more than prefix tokens, or has the step already.
    """
    spec = model.spec
    step = SelectionStep(method="exact_tail", parent=spec_hash(spec), blocks=(None,) * len(spec.blocks))
    return with_spec(model, with_exact_tail(spec), model.state_dict(), step)


def with_exact_tail(spec: ModelSpec) -> ModelSpec:
    """The spec after `exact_tail`. Raises SpecError as it does."""
    if not spec.blocks:
        raise SpecError("exact tail: the model has no blocks.")
    last = spec.blocks[-1]
    return replace(spec, blocks=(*spec.blocks[:-1], replace(last, steps=(*last.steps, Prefix()))))


def has_exact_tail(spec: ModelSpec) -> bool:
    """Whether only the prefix tokens go through the last block."""
    return bool(spec.blocks) and any(isinstance(step, Prefix) for step in spec.blocks[-1].steps)


def without_exact_tail(spec: ModelSpec) -> ModelSpec:
    """The same outputs, all tokens through the last block."""
    if not has_exact_tail(spec):
        return spec
    last = spec.blocks[-1]
    kept = tuple(step for step in last.steps if not isinstance(step, Prefix))
    return replace(spec, blocks=(*spec.blocks[:-1], replace(last, steps=kept)))


def tail_refusal(spec: ModelSpec, fixed: Collection[Half] = ()) -> str | None:
    """Why the network cannot have an exact tail; None where it can, or has it.  fixed: halves that stay as they are."""
    if has_exact_tail(spec):
        return None
    if not allows_exact_tail(spec):
        if spec.restore:
            return "every token is restored behind the last block"
        return "the network reads more than prefix tokens, or its last block has token steps"
    if any(i == len(spec.blocks) - 1 for i, _ in fixed):
        return "the last block is frozen"
    return None


def allows_exact_tail(spec: ModelSpec) -> bool:
    """Whether `exact_tail` applies: a classifier that reads prefix tokens alone, none restored, and no token step in the last block."""
    reads_prefix = spec.pool.kind == "cls" and not any("mean" in output.reads for output in spec.outputs)
    return bool(spec.outputs) and reads_prefix and not spec.restore and bool(spec.blocks) and not spec.blocks[-1].steps


# -------------------------------------------------------------------------------------------------------------- one part


def _cut_attention(state: dict[str, Tensor], i: int, a: AttentionSpec | None, keep: Keep) -> AttentionSpec | None:
    if a is None:
        return None
    here = f"blocks.{i}.attention"
    if not keep.attention:
        _forget(state, f"blocks.{i}.norm1", here)
        return None
    heads = range(a.heads) if keep.heads is None else keep.heads
    old, inner = state[f"{here}.qkv"], a.heads * a.qk_dim

    def rows(channels: tuple[Indices, ...] | None, size: int) -> Tensor:
        each = (range(size),) * len(heads) if channels is None else channels
        return torch.tensor([h * size + c for h, kept in zip(heads, each, strict=True) for c in kept]).to(old.device)

    qk_rows, v_rows = rows(keep.qk, a.qk_dim), rows(keep.v, a.v_dim)
    state[f"{here}.qkv"] = old[torch.cat([qk_rows, inner + qk_rows, 2 * inner + v_rows])]
    for name, kept in (("q_bias", qk_rows), ("k_bias", qk_rows), ("v_bias", v_rows)):
        if f"{here}.{name}" in state:
            state[f"{here}.{name}"] = state[f"{here}.{name}"][kept]
    state[f"{here}.out.weight"] = state[f"{here}.out.weight"][:, v_rows]
    return replace(a, heads=len(heads), qk_dim=len(qk_rows) // len(heads), v_dim=len(v_rows) // len(heads))


def _cut_mlp(state: dict[str, Tensor], i: int, m: MlpSpec | None, keep: Keep) -> MlpSpec | None:
    if m is None:
        return None
    here = f"blocks.{i}.mlp"
    if not keep.mlp:
        _forget(state, f"blocks.{i}.norm2", here)
        return None
    if keep.hidden is None:
        return m
    units = torch.tensor(keep.hidden, device=state[f"{here}.fc2.weight"].device)
    rows = torch.cat([units, units + m.hidden]) if m.kind == "swiglu" else units
    state[f"{here}.fc1.weight"] = state[f"{here}.fc1.weight"][rows]
    if m.fc1_bias:
        state[f"{here}.fc1.bias"] = state[f"{here}.fc1.bias"][rows]
    last = f"{here}.fc2.weight" if m.fc2_rank is None else f"{here}.fc2a.weight"
    state[last] = state[last][:, units]
    return replace(m, hidden=len(keep.hidden))


def _forget(state: dict[str, Tensor], *modules: str) -> None:
    for name in [n for n in state if n.startswith(tuple(f"{module}." for module in modules))]:
        del state[name]


def _new_attention(state: dict[str, Tensor], i: int, a: AttentionSpec | None, new: Factors) -> AttentionSpec:
    assert a is not None
    here = f"blocks.{i}.attention"
    inner_qk, inner_v = a.heads * a.qk_dim, a.heads * a.v_dim
    old = state[f"{here}.qkv"]
    q, k, v = old.split([inner_qk, inner_qk, inner_v])
    if new.q is not None:
        assert new.k is not None
        q, k = _rows(new.q).to(old), _rows(new.k).to(old)
        state.pop(f"{here}.k_bias", None)
        state.pop(f"{here}.q_bias", None)
        if new.q_bias is not None:
            state[f"{here}.q_bias"] = new.q_bias.flatten().to(old)
        a = replace(a.factored(qk=new.q.shape[2]), q_bias=new.q_bias is not None)
    if new.v is not None:
        assert new.o is not None
        assert new.out_bias is not None
        v = _rows(new.v).to(old)
        state.pop(f"{here}.v_bias", None)
        state[f"{here}.out.weight"] = new.o.flatten(0, 1).T.to(old)
        state[f"{here}.out.bias"] = new.out_bias.to(old)
        a = a.factored(v=new.v.shape[2])
    state[f"{here}.qkv"] = torch.cat([q, k, v])
    return a


def _rows(factor: Tensor) -> Tensor:  # H D R -> (H R) D
    return factor.transpose(1, 2).flatten(0, 1)


def _new_mlp(state: dict[str, Tensor], i: int, m: MlpSpec | None, new: Factors) -> MlpSpec:
    assert m is not None
    here = f"blocks.{i}.mlp"
    for name, factor in (("fc1", new.fc1), ("fc2", new.fc2)):
        if factor is None:
            continue
        first, second, bias = factor
        like = state[f"{here}.{name}.weight"]
        state[f"{here}.{name}a.weight"] = first.T.to(like)
        state[f"{here}.{name}.weight"] = second.T.to(like)
        state.pop(f"{here}.{name}.bias", None)
        if bias is not None:
            state[f"{here}.{name}.bias"] = bias.to(like)
        changes: dict[str, Any] = {f"{name}_rank": first.shape[1], f"{name}_bias": bias is not None}
        m = replace(m, **changes)
    return m


def record(block: BlockSpec, keep: Keep) -> dict[str, Any]:
    """The selection's entry of a block of which so much stays."""
    entry: dict[str, Any] = {}
    if block.attention is not None:
        entry["attention"] = {
            name: None if value is None else [list(v) if isinstance(v, tuple) else v for v in value]
            for name, value in (("heads", keep.heads), ("qk", keep.qk), ("v", keep.v))
        }
        if not keep.attention:
            entry["attention"] = "gone"
    if block.mlp is not None:
        entry["mlp"] = {"hidden": None if keep.hidden is None else list(keep.hidden)} if keep.mlp else "gone"
    return entry


def _check_keeps(spec: ModelSpec, keeps: Sequence[Keep | None]) -> None:
    if len(keeps) != len(spec.blocks):
        raise SpecError(f"{len(keeps)} keeps for {len(spec.blocks)} blocks; expected one for each, None to leave it.")
    for i, (block, keep) in enumerate(zip(spec.blocks, keeps, strict=True)):
        if keep is None:
            continue
        if (a := block.attention) is not None and keep.attention:
            where = f"block {i}"
            heads = _indices(f"{where}: heads", keep.heads, a.heads, "attention")
            for name, channels, size in (("qk", keep.qk, a.qk_dim), ("v", keep.v, a.v_dim)):
                if channels is None:
                    continue
                if len(channels) != heads:
                    raise SpecError(
                        f"{where}: {name} for {len(channels)} heads, {heads} are kept; expected one for each."
                    )
                counts = {_indices(f"{where}: {name}", kept, size, "attention") for kept in channels}
                if len(counts) != 1:
                    raise SpecError(
                        f"{where}: heads keep {sorted(counts)} {name} channels; expected equally many in all."
                    )
                if name == "qk" and a.qk_norm != "none" and counts != {a.qk_dim}:
                    raise SpecError(f"{where}: qk channels cannot be cut under a query/key norm; keep all {a.qk_dim}.")
        if (m := block.mlp) is not None and keep.mlp:
            _indices(f"block {i}: hidden", keep.hidden, m.hidden, "mlp")


def _indices(where: str, kept: Indices | None, size: int, half: str) -> int:
    """Number of kept indices; raises SpecError unless they are different, in range and at least one."""
    if kept is None:
        return size
    if not kept:
        raise SpecError(f"{where}: none kept. To drop the half, keep {half}=False.")
    if len(set(kept)) != len(kept) or min(kept) < 0 or max(kept) >= size:
        raise SpecError(f"{where}: {kept!r}; expected different indices from 0 to {size - 1}.")
    return len(kept)


def fingerprint(model: Vit) -> str:
    """Of spec and weights, 16 hex digits: what tells one model from another."""
    digest = hashlib.sha256(spec_hash(model.spec).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        flat = tensor.detach().to("cpu").contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def hold(model: Vit, fixed: Collection[Half]) -> None:
    """Let these halves, with the norms in front of them, learn no more.  fixed: (block, "attention" | "mlp")."""
    for i, half in fixed:
        block = model.blocks[i]
        for name in (half, {"attention": "norm1", "mlp": "norm2"}[half]):
            if (module := getattr(block, name)) is not None:
                module.requires_grad_(False)
