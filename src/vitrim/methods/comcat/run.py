"""COMCAT: per-head low-rank attention products and two-factor MLP linears, with ranks allocated in closed form.

Source   Xiao et al., ICML 2023, arXiv:2305.17235; head-level factorisation Sec. 3.2, Eq. 4, plain SVD of the MLP Sec. 4.2.
Takes    a ViT and a budget (or explicit ranks), and for `whitened` a few hundred unlabelled images.
Gives    a spec with smaller qk_dim and v_dim and MLP ranks, and the factored weights. No training.
Departs  Biases are exact (the authors' code drops the attention's). `whitened` truncates in the metric of the activations,
         with keys centred within each image; `svd` is the paper's plain truncation. Ranks come from a greedy allocation
         instead of the paper's search: predicted loss per saved operation, with each group's tail energy scaled by the
         divergence of the outputs when that group alone is truncated. The classifier stays dense.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vitrim import closed_form as cf
from vitrim import data as opened
from vitrim import surgery
from vitrim.budget import Budget, exceeded
from vitrim.counting import Cost, cost
from vitrim.errors import BudgetError, ConfigError, DataError, did_you_mean
from vitrim.freezing import frozen
from vitrim.methods.comcat.config import ComcatConfig
from vitrim.model import OPEN, Mlp, Vit
from vitrim.progress import Progress
from vitrim.result import Compressed
from vitrim.spec import ModelSpec, spec_hash

PARTS = ("qk", "vo", "fc1", "fc2")
PRICE_OF_ALIGNMENT = 1.2
"""How many times the loss of single ranks an aligned allocation may have."""


class Key(NamedTuple):
    """One group of components with a common rank: a part of a block."""

    block: int
    part: str


@dataclass(frozen=True, kw_only=True)
class Group:
    """What a part's rank may be. top: the largest rank that is cheaper than leaving the part as it is.

    limit: the largest rank that its factors can have.
    """

    key: Key
    top: int
    limit: int


Half = tuple[int, str]
"""A block's number, and `attention` or `mlp`."""

Ranks = dict[Key, int | None]
"""Rank of each group; None: as it is."""


def groups(
    spec: ModelSpec, *, factorise_mlp: bool = True, fixed: Collection[Half] = ()
) -> tuple[list[Group], dict[str, str]]:
    """The groups that can be cut, and for each part that cannot, why it stays as it is.  fixed: halves left alone."""
    found: list[Group] = []
    dense: dict[str, str] = {"classifier": "kept dense"} if spec.outputs else {}

    def offer(block: int, part: str, top: int, limit: int) -> None:
        if (block, "attention" if part in ("qk", "vo") else "mlp") in fixed:
            dense[f"block {block} {part}"] = "frozen"
        elif top >= 1:
            found.append(Group(key=Key(block, part), top=top, limit=limit))
        else:
            dense[f"block {block} {part}"] = "too small for a factorisation to save anything"

    for i, block in enumerate(spec.blocks):
        if (a := block.attention) is not None:
            if a.qk_norm == "none" or (i, "attention") in fixed:
                offer(i, "qk", min(a.qk_dim - 1, spec.width), min(a.qk_dim, spec.width))
            else:
                dense[f"block {i} qk"] = f"{a.qk_norm} norm between queries and keys"
            offer(i, "vo", min(a.v_dim - 1, spec.width), min(a.v_dim, spec.width))
        if (m := block.mlp) is not None:
            rows = 2 * m.hidden if m.kind == "swiglu" else m.hidden
            for part, ins, outs, now in (
                ("fc1", spec.width, rows, m.fc1_rank),
                ("fc2", m.hidden, spec.width, m.fc2_rank),
            ):
                if not factorise_mlp:
                    dense[f"block {i} {part}"] = "factorise_mlp is off"
                    continue
                break_even = (ins * outs - 1) // (ins + outs)
                top = min(break_even, min(ins, outs), break_even if now is None else now - 1)
                offer(i, part, top, min(ins, outs))
    return found, dense


def with_ranks(spec: ModelSpec, ranks: Mapping[Key, int | None]) -> ModelSpec:
    """The spec after factorising, as `surgery.factorise` leaves it."""
    blocks = list(spec.blocks)
    for (i, part), rank in ranks.items():
        if rank is None:
            continue
        block = blocks[i]
        if part == "qk":
            assert block.attention is not None
            block = replace(block, attention=replace(block.attention, qk_dim=rank, k_bias=False))
        elif part == "vo":
            assert block.attention is not None
            block = replace(block, attention=replace(block.attention, v_dim=rank, v_bias=False, out_bias=True))
        else:
            assert block.mlp is not None
            mlp = replace(block.mlp, fc1_rank=rank) if part == "fc1" else replace(block.mlp, fc2_rank=rank)
            block = replace(block, mlp=mlp)
        blocks[i] = block
    return replace(spec, blocks=tuple(blocks))


# -------------------------------------------------------------------------------------------------------- what is possible


def floor(spec: ModelSpec, *, factorise_mlp: bool = True, fixed: Collection[Half] = ()) -> Cost:
    """The cheapest network that the method makes of this spec: rank 1 everywhere that is not fixed."""
    base = surgery.with_folded(spec, skip=fixed)
    return cost(with_ranks(base, {g.key: 1 for g in groups(base, factorise_mlp=factorise_mlp, fixed=fixed)[0]}))


def step(spec: ModelSpec, config: ComcatConfig | None = None) -> dict[str, int]:
    """The largest cost of one rank of one group, by resource: how far below a budget the result may end (law 7)."""
    fixed = frozen(spec, () if config is None else config.freeze)
    base = surgery.with_folded(spec, skip=fixed)
    found = {"macs": 0, "params": 0, "memory_bytes": 0, "file_bytes": 0}
    for group in groups(base, factorise_mlp=config is None or config.factorise_mlp, fixed=fixed)[0]:
        at = [cost(with_ranks(base, {group.key: r})) for r in (group.top, max(1, group.top - 1))] + [cost(base)]
        for name, most in found.items():
            top, below, whole = (getattr(c, name) for c in at)
            found[name] = max(most, top - below, whole - top)
    return found


def plan(spec: ModelSpec, config: ComcatConfig | None = None) -> dict[str, Any]:
    """What can be said from the spec alone: the range of each resource, the step, the needs, what stays dense.

    Raises BudgetError when the config's budget is out of reach.
    """
    mlp = config is None or config.factorise_mlp
    fixed = frozen(spec, () if config is None else config.freeze)
    reference, least = cost(spec), floor(spec, factorise_mlp=mlp, fixed=fixed)
    if config is not None and config.budget is not None:
        config.budget.refuse_unreachable(floor=least, reference=reference, method="comcat")
    plain = config is not None and config.variant == "svd"
    return {
        "method": "comcat",
        "variant": "whitened" if config is None else config.variant,
        "range": {
            name: [getattr(least, name), getattr(reference, name)]
            for name in ("macs", "params", "memory_bytes", "file_bytes")
        },
        "step": step(spec, config),
        "needs": {
            "images": 0 if plain else (256 if config is None else config.images),
            "labels": False,
            "training": False,
        },
        "dense": groups(surgery.with_folded(spec, skip=fixed), factorise_mlp=mlp, fixed=fixed)[1],
    }


# -------------------------------------------------------------------------------------------------------------- allocation


def allocate(
    spec: ModelSpec,
    energies: Mapping[Key, list[float]],
    budget: Budget,
    *,
    reference: Cost | None = None,
    align: int = 8,
    factorise_mlp: bool = True,
    fixed: Collection[Half] = (),
) -> Ranks:
    """Ranks that lose the least energy within the budget.

    spec: LayerScale folded. energies: for each group, what each component saves, in a common unit, largest first; the sum
    beyond a group's `top` is what leaving it as it is adds. reference: what the budget's shares refer to; None: `spec`.

    Greedy on the upper hull of each group's (cost, energy) points, so that a part whose dense form is as cheap as a high
    rank is bought whole; then single steps while one fits, and single ranks fill what is over 1 % of dense. Steps are `align`
    ranks (less for narrow heads), or half as many, and half again: where the lowest aligned ranks exceed the budget, and where
    coarse steps lose a fifth more than single ranks would, as close to the floor of a budget they do.
    Raises BudgetError when rank 1 everywhere is above the budget.
    """
    offered = groups(spec, factorise_mlp=factorise_mlp, fixed=fixed)[0]
    reference = reference or cost(spec)
    lowest = cost(with_ranks(spec, {g.key: 1 for g in offered}))
    budget.refuse_unreachable(floor=lowest, reference=reference, method="comcat")
    limits = budget.limits(reference)
    if not exceeded(cost(spec), limits):
        return {g.key: None for g in offered}
    while align > 1 and exceeded(cost(with_ranks(spec, {g.key: _unit(g, align) for g in offered})), limits):
        align //= 2
    currencies = sorted({"macs" if name == "macs" else "params" for name in limits})
    whole = sum(sum(energy) for energy in energies.values())
    found: list[tuple[float, Ranks]] = []
    while align >= 1:
        plans = [_greedy(spec, offered, energies, limits, reference, align, currency) for currency in currencies]
        found.append(min(((whole - _total(energies, ranks), ranks) for ranks in plans), key=lambda plan: plan[0]))
        align //= 2
    finest = found[-1][0]
    return next(ranks for lost, ranks in found if lost <= max(finest, PRICE_OF_ALIGNMENT * finest))


def _total(energies: Mapping[Key, list[float]], ranks: Ranks) -> float:
    return sum(_kept(energies[key], rank) for key, rank in ranks.items())


def _unit(group: Group, align: int) -> int:
    """Ranks in one step: `align`, or a quarter of a part too narrow for two of them."""
    return min(group.top, align if group.limit >= 2 * align else max(1, min(align, group.limit // 4)))


def _kept(energy: list[float], rank: int | None) -> float:
    return sum(energy if rank is None else energy[:rank])


def _greedy(
    spec: ModelSpec,
    offered: list[Group],
    energies: Mapping[Key, list[float]],
    limits: Mapping[str, int],
    reference: Cost,
    align: int,
    currency: str,
) -> Ranks:
    ranks: Ranks = {g.key: _unit(g, align) for g in offered}
    prices = {g.key: _prices(spec, g, currency) for g in offered}

    def fits(trial: Ranks) -> bool:
        return not exceeded(cost(with_ranks(spec, trial)), limits)

    buys = [buy for g in offered for buy in _hull(g, prices[g.key], energies[g.key], _unit(g, align))]
    buys.sort(key=lambda buy: -buy[0])  # stable, and each group's own are in order of rising rank
    low, high = 0, len(buys)  # the longest affordable run of purchases
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits({**ranks, **{k: r for _, k, r in buys[:middle]}}) else (low, middle - 1)
    ranks.update({key: rank for _, key, rank in buys[:low]})

    def fill(unit: Callable[[Group], int]) -> None:
        open_ = {g.key: g for g in offered}
        while open_:
            best: tuple[float, Key, int | None] | None = None
            for key, group in list(open_.items()):
                now = ranks[key]
                if now is None:
                    del open_[key]
                    continue
                after = (now // unit(group) + 1) * unit(group)
                rank = after if after <= group.top else None
                gain = _kept(energies[key], rank) - _kept(energies[key], now)
                price = prices[key](rank) - prices[key](now)
                if best is None or gain / max(price, 1) > best[0]:
                    best = (gain / max(price, 1), key, rank)
            if best is None:
                return
            _, key, rank = best
            if fits({**ranks, key: rank}):
                ranks[key] = rank
            else:
                del open_[key]  # budgets only fill up: what does not fit now never will

    fill(lambda group: _unit(group, align))
    used = cost(with_ranks(spec, ranks))
    if all(limit - getattr(used, name) > getattr(reference, name) / 100 for name, limit in limits.items()):
        fill(lambda group: 1)
    return ranks


def _prices(spec: ModelSpec, group: Group, currency: str) -> Callable[[int | None], int]:
    """Cost of a group at a rank, up to a constant: linear in the rank, and its own for None."""
    one = getattr(cost(with_ranks(spec, {group.key: 1})), currency)
    slope = (getattr(cost(with_ranks(spec, {group.key: group.top})), currency) - one) // max(1, group.top - 1)
    whole = getattr(cost(spec), currency)
    return lambda rank: whole if rank is None else one + slope * (rank - 1)


def _hull(
    group: Group, price: Callable[[int | None], int], energy: list[float], unit: int
) -> list[tuple[float, Key, int | None]]:
    """Purchases (energy per cost, group, rank reached) of falling worth: the upper concave hull of the ladder."""
    ladder: list[int | None] = [*range(unit, group.top + 1, unit), None]
    points = [(price(rank), _kept(energy, rank), rank) for rank in ladder]
    hull = points[:1]
    for point in points[1:]:
        while len(hull) > 1 and _worth(hull[-1], point) >= _worth(hull[-2], hull[-1]):
            hull.pop()
        hull.append(point)
    return [(_worth(a, b), group.key, b[2]) for a, b in pairwise(hull)]


def _worth(before: tuple[int, float, Any], after: tuple[int, float, Any]) -> float:
    return (after[1] - before[1]) / max(after[0] - before[0], 1)


# ------------------------------------------------------------------------------------------------------------- factorising


def factorise(
    model: Vit, index: int, wanted: Mapping[str, int], statistics: cf.BlockStatistics | None, *, ridge: float
) -> dict[str, cf.Factors]:
    """Factors of the parts of one block, of at most the wanted number of components.

    model: LayerScale folded. statistics: None: plain SVD.
    """
    block = model.blocks[index]
    found: dict[str, cf.Factors] = {}
    if "qk" in wanted or "vo" in wanted:
        q, k, v, o = _heads(model, index)
        a = block.attention
        heads = model.spec.blocks[index].attention.heads  # type: ignore[union-attr]
    if "qk" in wanted:
        b_q = None if a.q_bias is None else a.q_bias.unflatten(0, (heads, -1))
        moments = {}
        if statistics is not None:
            moments = {"query_moment": statistics.queries.second, "key_moment": statistics.keys.second}
        found["qk"] = cf.factorise_qk(_cpu(q), None if b_q is None else _cpu(b_q), _cpu(k), ridge=ridge, **moments)
    if "vo" in wanted:
        moments = {}
        if statistics is not None:
            mean = statistics.values.mean
            if a.v_bias is not None:  # the statistics saw it, and it is folded into the output bias
                mean = mean - _cpu(a.v_bias).unflatten(0, (heads, -1))
            moments = {"moment": statistics.values.covariance, "mean": mean}
        found["vo"] = cf.factorise_vo(_cpu(v), _cpu(o), ridge=ridge, **moments)
    for part in ("fc1", "fc2"):
        if part in wanted:
            w = _linear(block.mlp, part)
            moments = {}
            if statistics is not None:
                seen: cf.Moments = getattr(statistics, part)
                biased = getattr(block.mlp, part).bias is not None
                matrix = seen.covariance if biased else seen.second
                inputs = cf.sees_inputs(*w.shape)
                moments = {"inputs" if inputs else "outputs": matrix}
                if biased:
                    moments["mean"] = seen.mean @ w if inputs else seen.mean
            found[part] = cf.factorise_linear(w, ridge=ridge, **moments)
    dtype = next(model.parameters()).dtype
    return {part: _stored(full, wanted[part], dtype) for part, full in found.items()}


def _cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float64)


def _heads(model: Vit, index: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """W_Q, W_K [H, D, Q], W_V [H, D, V], W_O [H, V, D] of a block."""
    a = model.spec.blocks[index].attention
    assert a is not None
    module = model.blocks[index].attention
    inner_qk, inner_v = a.heads * a.qk_dim, a.heads * a.v_dim
    q, k, v = (w.unflatten(0, (a.heads, -1)).mT for w in module.qkv.detach().split([inner_qk, inner_qk, inner_v]))
    return q, k, v, module.out.weight.detach().T.unflatten(0, (a.heads, -1))


def _linear(mlp: Mlp, part: str) -> Tensor:
    """W [in, out] of a linear, the product of its factors if it has them; float64."""
    last, first = getattr(mlp, part), getattr(mlp, f"{part}a")
    return _cpu(last.weight).T if first is None else _cpu(first.weight).T @ _cpu(last.weight).T


def _stored(factors: cf.Factors, rank: int, dtype: torch.dtype) -> cf.Factors:
    """Copies in the model's dtype of the leading components; the spectrum stays whole, small vectors in float64."""
    cut = factors.sliced(rank)
    return replace(cut, left=cut.left.to(dtype).clone(), right=cut.right.to(dtype).clone(), spectrum=factors.spectrum)


def _replacement(
    model: Vit, index: int, factors: Mapping[str, cf.Factors], ranks: Mapping[str, int]
) -> surgery.Factors:
    """What `surgery.factorise` puts into one block, with every bias rule."""
    new: dict[str, Any] = {}
    block = model.blocks[index]
    if "qk" in ranks:
        cut = factors["qk"].sliced(ranks["qk"])
        new.update(q=cut.left, k=cut.right.mT, q_bias=cut.left_bias)
    if "vo" in ranks:
        a = block.attention
        full, cut = factors["vo"], factors["vo"].sliced(ranks["vo"])
        heads = full.left.shape[0]
        b_v = None if a.v_bias is None else _cpu(a.v_bias).unflatten(0, (heads, -1))
        b_o = None if a.out.bias is None else _cpu(a.out.bias)
        bias = cf.fold_value_bias(b_v, _cpu(_heads(model, index)[3]), b_o)
        lost = full.lost_mean(ranks["vo"])
        bias = torch.zeros(model.spec.width, dtype=torch.float64) if bias is None else bias
        new.update(v=cut.left, o=cut.right, out_bias=bias if lost is None else bias + lost.sum(0))
    for part in ("fc1", "fc2"):
        if part in ranks:
            full, cut = factors[part], factors[part].sliced(ranks[part])
            old = getattr(block.mlp, part).bias
            lost = full.lost_mean(ranks[part])
            bias = None if old is None else (_cpu(old) if lost is None else _cpu(old) + lost)
            new[part] = (cut.left, cut.right, bias)
    return surgery.Factors(**new)


def _apply(
    model: Vit,
    factors: Mapping[Key, cf.Factors],
    ranks: Mapping[Key, int | None],
    *,
    variant: str,
    share: bool = False,
) -> Vit:
    entries: list[surgery.Factors | None] = []
    for i in range(len(model.blocks)):
        here = {key.part: rank for key, rank in ranks.items() if key.block == i and rank is not None}
        own = {key.part: value for key, value in factors.items() if key.block == i}
        entries.append(_replacement(model, i, own, here) if here else None)
    return surgery.factorise(model, entries, method="comcat", variant=variant, share=share)


# ------------------------------------------------------------------------------------------------------------- the method


def compress(
    model: Vit,
    config: ComcatConfig,
    *,
    data: Any = None,
    progress: Progress | None = None,
    folder: Path | None = None,
    resume: bool = False,
) -> Compressed:
    """Factorise `model` to the budget or the ranks of the config; no training, and `model` is left as it was.

    data: images for the statistics, whatever `vitrim.data.open` takes (its training split, labels unused); a float tensor
    [n, C, h, w] is taken as the network's own input if the model says no preprocessing. `svd` can do without.
    folder, resume: nothing is left there: a run takes seconds to minutes and begins anew.
    Raises BudgetError, before anything is read, when the budget is out of reach; DataError when `whitened` has no images.
    """
    fixed = frozen(model.spec, config.freeze)
    offered, dense = groups(
        surgery.with_folded(model.spec, skip=fixed), factorise_mlp=config.factorise_mlp, fixed=fixed
    )
    reference = cost(model)
    if config.budget is not None:
        lowest = floor(model.spec, factorise_mlp=config.factorise_mlp, fixed=fixed)
        config.budget.refuse_unreachable(floor=lowest, reference=reference, method="comcat")
    if data is None and config.variant == "whitened":
        raise DataError(
            "comcat: variant 'whitened' needs a few hundred unlabelled images; none were given. Pass data=, or variant='svd'."
        )
    chosen = None if config.ranks is None else _explicit(model.spec, offered, config)
    base = model
    if surgery.with_folded(model.spec, skip=fixed) != model.spec:
        base = surgery.fold_layer_scale(model, skip=fixed)
    home = next(model.parameters()).device
    if config.device is not None and torch.device(config.device) != home:
        base = copy.deepcopy(base).to(config.device)
    if chosen is not None and config.budget is not None:
        _check_explicit(base.spec, chosen, config.budget, reference)

    feed = None
    if data is not None:
        how = model.config.preprocess
        feed = opened.calibration_images(data, how, count=config.images, seed=config.seed, method="comcat")
        if not len(feed):
            raise DataError("comcat: no images. Pass a few hundred unlabelled ones.")
    statistics = None
    if config.variant == "whitened":
        assert feed is not None
        statistics = cf.calibrate(base, feed.batches(config.batch_size), total=len(feed), progress=progress)
    limits = {g.key: (g.top if chosen is None else chosen[g.key]) for g in offered}
    factors: dict[Key, cf.Factors] = {}
    energies: dict[Key, list[float]] = {}
    for i in range(len(model.blocks)):
        wanted = {g.key.part: rank for g in offered if g.key.block == i and (rank := limits[g.key]) is not None}
        found = factorise(base, i, wanted, None if statistics is None else statistics[i], ridge=config.ridge)
        for part, value in found.items():
            factors[Key(i, part)] = value
        if statistics is not None:
            statistics[i] = cf.BlockStatistics()  # no longer needed: frees a block's moments
        if progress is not None:
            progress("factorise", i + 1, len(model.blocks))
    for key, value in factors.items():
        energies[key] = _energy(value)
    measured: dict[Key, float] = {}
    history: list[dict[str, Any]] = []
    if chosen is None:
        assert config.budget is not None
        if feed is not None and config.probe_images:
            measured = _probe(
                base,
                factors,
                energies,
                list(feed.few(config.probe_images, config.seed).batches(config.batch_size)),
                progress,
            )
        common = {key: _scaled(energy, measured.get(key)) for key, energy in energies.items()}
        chosen = allocate(
            base.spec,
            common,
            config.budget,
            reference=reference,
            align=config.align,
            factorise_mlp=config.factorise_mlp,
            fixed=fixed,
        )
        history.append(
            {"stage": "allocate", "lost": sum(sum(common[k][r:]) for k, r in chosen.items() if r is not None)}
        )
    if all(rank is None for rank in chosen.values()):
        base = model  # nothing to do, LayerScale included
    small = _apply(base, factors, chosen, variant=config.variant).to(home)
    small.selection = model.selection.then(replace(small.selection.steps[-1], parent=spec_hash(model.spec)))
    report = _report(model.spec, chosen, energies, measured, dense, config)
    return Compressed(model=small, method="comcat", variant=config.variant, history=history, report=report)


def _explicit(spec: ModelSpec, offered: list[Group], config: ComcatConfig) -> Ranks:
    """The config's ranks, checked against the spec."""
    assert config.ranks is not None
    if len(config.ranks) != len(spec.blocks):
        raise ConfigError(
            f"comcat: ranks for {len(config.ranks)} blocks; the model has {len(spec.blocks)}: one entry each."
        )
    known = {g.key: g for g in offered}
    ranks: Ranks = dict.fromkeys(known)
    for i, entry in enumerate(config.ranks):
        for part, rank in (entry or {}).items():
            if part not in PARTS:
                raise ConfigError(
                    f"comcat: ranks of block {i}: unknown part {part!r}{did_you_mean(part, PARTS)}; known: {', '.join(PARTS)}."
                )
            if (group := known.get(Key(i, part))) is None:
                raise ConfigError(f"comcat: block {i} {part} cannot be factorised; leave it out of ranks.")
            most = group.limit if part in ("qk", "vo") else group.top
            if not 1 <= rank <= most:
                raise ConfigError(
                    f"comcat: block {i} {part} rank {rank!r}; expected 1 to {most} (above, its factors save nothing). "
                    "To keep it as it is, leave it out."
                )
            ranks[group.key] = rank
    return ranks


def _check_explicit(spec: ModelSpec, ranks: Ranks, budget: Budget, reference: Cost) -> None:
    found, limits = cost(with_ranks(spec, ranks)), budget.limits(reference)
    if over := exceeded(found, limits):
        said = "; ".join(f"{name} {getattr(found, name):,} of at most {limits[name]:,}" for name in over)
        raise BudgetError(f"comcat: the given ranks exceed the budget: {said}. Lower them, or pass the budget alone.")


def _energy(factors: cf.Factors) -> list[float]:
    """Squared spectrum, summed over heads.  [R]"""
    squares = factors.spectrum.double() ** 2
    return [float(e) for e in (squares.sum(0) if squares.dim() > 1 else squares)]


def _scaled(energy: list[float], weight: float | None) -> list[float]:
    """Energies in the unit that groups share: measured divergence, or else shares of the group's own energy."""
    scale = 1 / max(sum(energy), 1e-300) if weight is None else weight
    return [e * scale for e in energy]


@torch.no_grad()
def _probe(
    model: Vit,
    factors: Mapping[Key, cf.Factors],
    energies: Mapping[Key, list[float]],
    batches: list[Tensor],
    progress: Progress | None,
) -> dict[Key, float]:
    """Divergence of the outputs per unit of tail energy, each group truncated alone to half of its ranks."""
    before = _outputs(model, batches)
    found: dict[Key, float] = {}
    for done, (key, energy) in enumerate(energies.items(), start=1):
        rank = max(1, factors[key].left.shape[-1] // 2)
        after = _outputs(_apply(model, factors, {key: rank}, variant="", share=True), batches)
        tail = sum(energy[rank:])
        found[key] = cf.divergence(before, after, classifies=bool(model.spec.outputs)) / max(
            tail, cf.TINY * sum(energy), 1e-300
        )
        if progress is not None:
            progress("probe", done, len(energies))
    # a truncation whose effect drowns in rounding still counts for something, or its ranks would be given away
    least = min((weight for weight in found.values() if weight > 0), default=1.0)
    return {key: weight if weight > 0 else least for key, weight in found.items()}


def _outputs(model: Vit, batches: list[Tensor]) -> Tensor:
    """Logits, or features, of all images.  [n, ...] float64 on the CPU."""
    like = next(model.parameters())
    return torch.cat([_cpu(model(x.to(like), gates=OPEN)) for x in batches])


def _report(
    spec: ModelSpec,
    ranks: Ranks,
    energies: Mapping[Key, list[float]],
    weights_: Mapping[Key, float],
    dense: Mapping[str, str],
    config: ComcatConfig,
) -> dict[str, Any]:
    """What was kept of each group, and what stayed dense and why; plain JSON values."""
    rows = []
    for key, rank in ranks.items():
        energy = energies.get(key)
        rows.append(
            {
                "block": key.block,
                "part": key.part,
                "rank": rank,
                "of": _full_rank(spec, key),
                "energy_kept": 1.0
                if rank is None or energy is None
                else _kept(energy, rank) / max(sum(energy), 1e-300),
                "weight": weights_.get(key),
            }
        )
    stays = {f"block {key.block} {key.part}": "left as it is" for key, rank in ranks.items() if rank is None}
    return {
        "variant": config.variant,
        "metric": "output divergence" if weights_ else "share of each group's energy",
        "groups": rows,
        "dense": {**dense, **stays},
    }


def _full_rank(spec: ModelSpec, key: Key) -> int:
    block = spec.blocks[key.block]
    if key.part in ("qk", "vo"):
        assert block.attention is not None
        return block.attention.qk_dim if key.part == "qk" else block.attention.v_dim
    assert block.mlp is not None
    rank = block.mlp.fc1_rank if key.part == "fc1" else block.mlp.fc2_rank
    rows = block.mlp.hidden * (2 if key.part == "fc1" and block.mlp.kind == "swiglu" else 1)
    return rank or min(spec.width, rows)
