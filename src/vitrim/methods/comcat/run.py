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
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vitrim import closed_form as cf
from vitrim import data as opened
from vitrim import surgery
from vitrim.allocation import Allocator, Losses, Unit, parts_of
from vitrim.budget import Budget, exceeded
from vitrim.closed_form import fisher
from vitrim.closed_form.sublayers import double
from vitrim.counting import Cost, cost
from vitrim.data.calibration import CalibrationImages
from vitrim.errors import BudgetError, ConfigError, DataError, did_you_mean
from vitrim.freezing import Half, frozen
from vitrim.methods.comcat.config import ComcatConfig
from vitrim.methods.comcat.factors import Factored, Ranks, applied, factorise
from vitrim.model import OPEN, Vit
from vitrim.progress import Progress
from vitrim.result import Compressed
from vitrim.space import BlockLevels, Choice, Space, jumps, outlook
from vitrim.spec import BlockSpec, ModelSpec, spec_hash

NAMES = {"qk": "qk", "v": "vo", "fc1": "fc1", "fc2": "fc2"}
"""What parts are called in settings and reports, by their name in a `space.Choice`."""
PRICE_OF_ALIGNMENT = 1.2
"""How many times the loss of single ranks an aligned allocation may have."""
Energies = Sequence[Mapping[str, Sequence[float]]]
"""For each block and part what each component saves, largest first."""


# -------------------------------------------------------------------------------------------------------- what is possible


class Bounds(NamedTuple):
    """Ranks of a part. top: the largest that is cheaper than the part as it is. full: the largest that factors can have."""

    top: int
    full: int


def bounds(block: BlockSpec, width: int) -> dict[str, Bounds]:
    """Of every part that is there; a top below 1 where nothing is to be saved."""
    found: dict[str, Bounds] = {}
    if (a := block.attention) is not None:
        for part, size in (("qk", a.qk_dim), ("v", a.v_dim)):
            found[part] = Bounds(min(size - 1, width), min(size, width))
    if (m := block.mlp) is not None:
        rows = 2 * m.hidden if m.kind == "swiglu" else m.hidden
        for part, ins, outs, now in (("fc1", width, rows, m.fc1_rank), ("fc2", m.hidden, width, m.fc2_rank)):
            even = (ins * outs - 1) // (ins + outs)
            found[part] = Bounds(min(even, ins, outs, even if now is None else now - 1), min(ins, outs))
    return found


def space_of(spec: ModelSpec, config: ComcatConfig | None = None) -> Space:
    """Each rank on offer, LayerScale folded."""
    fixed = frozen(spec, () if config is None else config.freeze)
    base = surgery.with_folded(spec, skip=fixed)
    dense = {"classifier": "kept dense"} if spec.outputs else {}
    levels = []
    for i, block in enumerate(base.blocks):
        offered: dict[str, Any] = {}
        for part, (top, _) in bounds(block, base.width).items():
            why = _refusal(block, i, part, fixed, factorise_mlp=config is None or config.factorise_mlp)
            if why is None and top >= 1:
                offered[part] = (getattr(Choice.of(block), part), *range(top, 0, -1))
            else:
                dense[f"block {i} {NAMES[part]}"] = why or "too small for a factorisation to save anything"
        levels.append(replace(BlockLevels.whole_of(block), **offered))
    return Space(given=spec, base=base, fixed=fixed, levels=tuple(levels), form="factored", dense=dense)


def _refusal(block: BlockSpec, i: int, part: str, fixed: frozenset[Half], *, factorise_mlp: bool) -> str | None:
    """Why a part stays as it is, whatever its size."""
    half = "mlp" if part.startswith("fc") else "attention"
    if half == "mlp" and not factorise_mlp:
        return "factorise_mlp is off"
    if (i, half) in fixed:
        return "frozen"
    if part == "qk" and block.attention is not None and block.attention.qk_norm != "none":
        return f"{block.attention.qk_norm} norm between queries and keys"
    return None


def with_ranks(spec: ModelSpec, ranks: Ranks) -> ModelSpec:
    """The spec after factorising, as `surgery.factorise` leaves it; a product may be made anew at its own rank."""

    def changed(block: BlockSpec, own: Mapping[str, int]) -> BlockSpec:
        a, m = block.attention, block.mlp
        return replace(
            block,
            attention=a and a.factored(qk=own.get("qk"), v=own.get("v")),
            mlp=m and replace(m, fc1_rank=own.get("fc1", m.fc1_rank), fc2_rank=own.get("fc2", m.fc2_rank)),
        )

    return replace(spec, blocks=tuple(changed(block, own) for block, own in zip(spec.blocks, ranks, strict=True)))


def ranks_of(space: Space, choices: Sequence[Choice]) -> Ranks:
    """The parts that choices make smaller."""
    return [
        {part: size for part in parts_of(space, i) if (size := getattr(choice, part)) != getattr(whole, part)}
        for i, (choice, whole) in enumerate(zip(choices, space.whole, strict=True))
    ]


def floor(spec: ModelSpec, config: ComcatConfig | None = None) -> Cost:
    """The cheapest network that the method makes of this spec: rank 1 everywhere that is not fixed."""
    return space_of(spec, config).floor


def tolerance(spec: ModelSpec, config: ComcatConfig | None = None) -> dict[str, int]:
    """The largest cost of one rank of one part, by resource: how far below a budget the result may end (law 7)."""
    return _tolerance(space_of(spec, config))


def _tolerance(space: Space) -> dict[str, int]:
    def at(i: int, part: str, size: int) -> Cost:
        return cost(space.spec(space.with_choice(i, space.whole[i].sized(part, size))))

    whole = cost(space.base)
    pairs = []
    for i, levels in enumerate(space.levels):
        for part in parts_of(space, i):
            top = getattr(levels, part)[1]
            highest = at(i, part, top)
            pairs += [(whole, highest), (highest, at(i, part, max(1, top - 1)))]
    return jumps(pairs)


def plan(spec: ModelSpec, config: ComcatConfig | None = None) -> dict[str, Any]:
    """What can be said from the spec alone: `space.outlook`."""
    space = space_of(spec, config)
    variant = "whitened" if config is None else config.variant
    count = 256 if config is None else config.images
    return outlook(
        "comcat",
        variant,
        None if config is None else config.budget,
        floor=space.floor,
        reference=space.reference,
        tolerance=_tolerance(space),
        needs={"images": 0 if variant == "svd" else count, "labels": False, "training": False},
        dense=space.dense,
    )


# -------------------------------------------------------------------------------------------------------------- allocation


def losses(space: Space, energies: Energies) -> Losses:
    """What choices lose: the energy beyond their ranks, of the parts that are not whole; energies in a common unit."""
    tails = [{part: list(accumulate(reversed(e), initial=0.0))[::-1] for part, e in own.items()} for own in energies]

    def lost(i: int, choice: Choice) -> float:
        whole = space.whole[i]
        smaller = {part: getattr(choice, part) for part in tails[i] if getattr(choice, part) != getattr(whole, part)}
        return sum(tails[i][part][rank] for part, rank in smaller.items())

    return lost


def allocate(allocator: Allocator, budget: Budget, *, align: int = 8) -> tuple[Choice, ...]:
    """Ranks that lose the least energy within the budget.

    Greedy on the upper hull of each part's (cost, energy) points, so that a part whose dense form is as cheap as a high
    rank is bought whole; then single steps while one fits, and single ranks fill what is over 1 % of dense. Steps are `align`
    ranks (less for narrow heads), or half as many, and half again: where the lowest aligned ranks exceed the budget, and where
    coarse steps lose a fifth more than single ranks would, as close to the floor of a budget they do.
    Raises BudgetError when rank 1 everywhere is above the budget.
    """
    space = allocator.space
    budget.refuse_unreachable(floor=space.floor, reference=space.reference, method="comcat")
    limits = budget.limits(space.reference)
    if allocator.fits(space.whole, limits):
        return space.whole
    currencies = sorted({"macs" if name == "macs" else "params" for name in limits})
    found: list[tuple[Choice, ...]] = []
    while align >= 1:
        if allocator.fits(allocator.lowest(_unit(space, align)), limits):
            trials = [_spent(allocator, limits, currency, align) for currency in currencies]
            found.append(min(trials, key=allocator.total))
        align //= 2
    most = PRICE_OF_ALIGNMENT * allocator.total(found[-1])
    return next(choices for choices in found if allocator.total(choices) <= most)


def _unit(space: Space, align: int) -> Unit:
    """Ranks in one step: `align`, or a quarter of a part too narrow for two of them."""
    found = [bounds(block, space.base.width) for block in space.base.blocks]

    def unit(i: int, part: str) -> int:
        top, full = found[i][part]
        return min(top, align if full >= 2 * align else max(1, min(align, full // 4)))

    return unit


def _spent(allocator: Allocator, limits: Mapping[str, int], currency: str, align: int) -> tuple[Choice, ...]:
    """The limits spent in steps of `align`, and in single ranks where these leave much."""
    space, unit = allocator.space, _unit(allocator.space, align)
    found = allocator.filled(allocator.greedy(limits, currency, unit), limits, currency, unit)
    used = space.used(found)
    if all(limit - used[name] > getattr(space.reference, name) / 100 for name, limit in limits.items()):
        found = allocator.filled(found, limits, currency, _unit(space, 1))
    return found


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
    space = space_of(model.spec, config)
    if config.budget is not None:
        config.budget.refuse_unreachable(floor=space.floor, reference=space.reference, method="comcat")
    if data is None and config.variant == "whitened":
        raise DataError(
            "comcat: variant 'whitened' needs a few hundred unlabelled images; none were given. Pass data=, or variant='svd'."
        )
    given = None if config.ranks is None else explicit(space, config)
    base = model if space.base == model.spec else surgery.fold_layer_scale(model, skip=space.fixed)
    home = next(model.parameters()).device
    if config.device is not None and torch.device(config.device) != home:
        base = copy.deepcopy(base).to(config.device)
    feed = None
    if data is not None:
        shown = model.config.preprocess
        feed = opened.calibration_images(data, shown, count=config.images, seed=config.seed, method="comcat")
        if not len(feed):
            raise DataError("comcat: no images. Pass a few hundred unlabelled ones.")
    factors = _factors(base, _tops(space) if given is None else given, config, feed, progress)
    energies = [{part: _energy(value) for part, value in own.items()} for own in factors]
    weights: list[dict[str, float]] = [{} for _ in factors]
    history: list[dict[str, Any]] = []
    if given is None:
        assert config.budget is not None
        if feed is not None and config.probe_images:
            few = list(feed.few(config.probe_images, config.seed).batches(config.batch_size))
            weights = _probe(base, factors, energies, few, fisher.Product.of(base.config, config.product), progress)
        common = [
            {part: _scaled(energy, weights[i].get(part)) for part, energy in own.items()}
            for i, own in enumerate(energies)
        ]
        allocator = Allocator(space, losses(space, common))
        chosen = allocate(allocator, config.budget, align=config.align)
        history.append({"stage": "allocate", "lost": allocator.total(chosen)})
    ranks = ranks_of(space, chosen) if given is None else given
    if not any(ranks):
        base = model  # nothing to do, LayerScale included
    small = applied(base, factors, ranks, variant=config.variant).to(home)
    small.selection = model.selection.then(replace(small.selection.steps[-1], parent=spec_hash(model.spec)))
    report = _report(space, ranks, energies, weights, config)
    return Compressed(model=small, method="comcat", variant=config.variant, history=history, report=report)


def explicit(space: Space, config: ComcatConfig) -> Ranks:
    """The config's ranks. Raises ConfigError where they do not fit the network, BudgetError where they exceed the budget."""
    assert config.ranks is not None
    if len(config.ranks) != len(space.levels):
        raise ConfigError(
            f"comcat: ranks for {len(config.ranks)} blocks; the model has {len(space.levels)}: one entry each."
        )
    fields = {name: part for part, name in NAMES.items()}
    ranks: list[dict[str, int]] = []
    for i, entry in enumerate(config.ranks):
        most = bounds(space.base.blocks[i], space.base.width)
        ranks.append({})
        for name, rank in (entry or {}).items():
            if name not in fields:
                raise ConfigError(
                    f"comcat: ranks of block {i}: unknown part {name!r}{did_you_mean(name, fields)}; known: {', '.join(fields)}."
                )
            if (part := fields[name]) not in parts_of(space, i):
                raise ConfigError(f"comcat: block {i} {name} cannot be factorised; leave it out of ranks.")
            highest = most[part].full if part in ("qk", "v") else most[part].top
            if not 1 <= rank <= highest:
                raise ConfigError(
                    f"comcat: block {i} {name} rank {rank!r}; expected 1 to {highest} (above, its factors save nothing). "
                    "To keep it as it is, leave it out."
                )
            ranks[i][part] = rank
    if config.budget is not None:
        found, limits = cost(with_ranks(space.base, ranks)), config.budget.limits(space.reference)
        if over := exceeded(found, limits):
            said = "; ".join(f"{name} {getattr(found, name):,} of at most {limits[name]:,}" for name in over)
            raise BudgetError(
                f"comcat: the given ranks exceed the budget: {said}. Lower them, or pass the budget alone."
            )
    return ranks


def _tops(space: Space) -> Ranks:
    """The most components that a choice may ask for."""
    return [{part: getattr(levels, part)[1] for part in parts_of(space, i)} for i, levels in enumerate(space.levels)]


def _factors(
    base: Vit, ranks: Ranks, config: ComcatConfig, feed: CalibrationImages | None, progress: Progress | None
) -> list[dict[str, cf.Factors]]:
    """Of every part with a rank, at that rank."""
    statistics: list[cf.BlockStatistics | None] = [None] * len(base.blocks)
    if config.variant == "whitened":
        assert feed is not None
        statistics[:] = cf.calibrate(base, feed.batches(config.batch_size), total=len(feed), progress=progress)
    found = []
    for i, (block, wanted) in enumerate(zip(base.blocks, ranks, strict=True)):
        found.append(factorise(block, wanted, statistics[i], ridge=config.ridge))
        statistics[i] = None  # no longer needed: frees a block's moments
        if progress is not None:
            progress("factorise", i + 1, len(base.blocks))
    return found


def _energy(factors: cf.Factors) -> list[float]:
    """Squared spectrum, summed over heads.  [R]"""
    squares = factors.spectrum.double() ** 2
    return [float(e) for e in (squares.sum(0) if squares.dim() > 1 else squares)]


def _scaled(energy: Sequence[float], weight: float | None) -> list[float]:
    """Energies in the unit that parts share: measured divergence, or else shares of the part's own energy."""
    scale = 1 / max(sum(energy), 1e-300) if weight is None else weight
    return [e * scale for e in energy]


@torch.no_grad()
def _probe(
    model: Vit,
    factors: Factored,
    energies: Energies,
    batches: list[Tensor],
    product: fisher.Product,
    progress: Progress | None,
) -> list[dict[str, float]]:
    """Divergence of the product per unit of tail energy, each part truncated alone to half of its ranks."""
    before = _answers(model, batches, product.want)
    found: list[dict[str, float]] = [{} for _ in factors]
    places = [(i, part) for i, own in enumerate(factors) for part in own]
    for done, (i, part) in enumerate(places, start=1):
        energy = energies[i][part]
        rank = max(1, factors[i][part].left.shape[-1] // 2)
        alone: Ranks = [{part: rank} if j == i else {} for j in range(len(factors))]
        after = _answers(applied(model, factors, alone, variant="", share=True), batches, product.want)
        tail = max(sum(energy[rank:]), cf.TINY * sum(energy), 1e-300)
        found[i][part] = product.apart(before, after) / tail
        if progress is not None:
            progress("probe", done, len(places))
    # a truncation whose effect drowns in rounding still counts for something, or its ranks would be given away
    least = min((weight for own in found for weight in own.values() if weight > 0), default=1.0)
    return [{part: weight if weight > 0 else least for part, weight in own.items()} for own in found]


def _answers(model: Vit, batches: list[Tensor], want: str) -> Tensor:
    """Of all images.  [n, ...] float64 on the CPU."""
    like = next(model.parameters())
    return torch.cat([double(model(x.to(like), gates=OPEN, want=(want,))[want]) for x in batches])


def _report(
    space: Space, ranks: Ranks, energies: Energies, weights: Sequence[Mapping[str, float]], config: ComcatConfig
) -> dict[str, Any]:
    """What was kept of each part, and what stayed dense and why; plain JSON values."""
    rows, stays = [], {}
    for i, block in enumerate(space.base.blocks):
        for part in parts_of(space, i):
            rank, energy = ranks[i].get(part), energies[i].get(part, ())
            rows.append(
                {
                    "block": i,
                    "part": NAMES[part],
                    "rank": rank,
                    "of": getattr(space.whole[i], part) or bounds(block, space.base.width)[part].full,
                    "energy_kept": 1.0 if rank is None else sum(energy[:rank]) / max(sum(energy), 1e-300),
                    "weight": weights[i].get(part),
                }
            )
            if rank is None:
                stays[f"block {i} {NAMES[part]}"] = "left as it is"
    return {
        "variant": config.variant,
        "metric": "output divergence" if any(weights) else "share of each group's energy",
        "groups": rows,
        "dense": {**space.dense, **stays},
    }
