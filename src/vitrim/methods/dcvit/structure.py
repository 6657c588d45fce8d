"""What DC-ViT can do with a network: its search space, what is in reach, and the structure of the paper's form. No torch runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

from vitrim import surgery
from vitrim.budget import Budget, exceeded
from vitrim.counting import Cost, cost
from vitrim.errors import BudgetError, ConfigError
from vitrim.freezing import Half, frozen
from vitrim.methods.dcvit.config import DcvitConfig
from vitrim.space import BlockLevels, Choice, Space, frozen_parts, jumps, outlook
from vitrim.spec import BlockSpec, ModelSpec


def space_of(spec: ModelSpec, config: DcvitConfig) -> Space:
    """What may become of each block. Raises ConfigError when a frozen part is not there."""
    fixed = frozen(spec, config.freeze)
    dense = frozen_parts(fixed) | ({"classifier": "kept dense"} if spec.outputs else {})
    if config.variant == "closed":
        levels = [_closed_levels(block, i, fixed, align=config.align) for i, block in enumerate(spec.blocks)]
    else:
        levels = [_paper_levels(spec, i, fixed) for i in range(len(spec.blocks))]
        for i, one in enumerate(levels):
            if not one.off and f"block {i} attention" not in dense:
                ends = i in (0, len(levels) - 1)
                why = "first and last block are never compressed" if ends else "a half of it is gone or frozen"
                dense[f"block {i}"] = why
    base = surgery.with_folded(spec, skip=fixed)
    return Space(given=spec, base=base, fixed=fixed, levels=tuple(levels), dense=dense)


def unit(hidden: int, align: int) -> int:
    """Hidden units in one step: `align`, or an eighth of an MLP too narrow for eight of them."""
    return max(1, min(align, hidden // 8))


def _closed_levels(block: BlockSpec, i: int, fixed: frozenset[Half], *, align: int) -> BlockLevels:
    """Of `closed`: widths a unit apart, with or without the attention; or nothing."""
    whole = BlockLevels.whole_of(block)
    (m,) = whole.hidden
    may_lose = block.attention is not None and (i, "attention") not in fixed
    may_cut = m > 0 and (i, "mlp") not in fixed
    step_ = unit(m, align)
    return replace(
        whole,
        hidden=(m, *reversed(range(step_, m, step_))) if may_cut else (m,),
        off=may_lose and m > 0,
        empty=(may_lose or block.attention is None) and (may_cut or not m) and whole.whole != Choice(),
    )


def _paper_levels(spec: ModelSpec, i: int, fixed: frozenset[Half]) -> BlockLevels:
    """Of `finetune`: no attention and any width, for a block that is neither first nor last and has both halves, free."""
    whole = BlockLevels.whole_of(spec.blocks[i])
    here = whole.whole
    if not (0 < i < len(spec.blocks) - 1 and here.attention and here.mlp) or fixed & {(i, "attention"), (i, "mlp")}:
        return whole
    return replace(whole, hidden=tuple(range(here.hidden, 0, -1)), off=True)


def candidates(space: Space) -> list[int]:
    """Blocks that may lose their attention."""
    return [i for i, levels in enumerate(space.levels) if levels.off]


def most(space: Space) -> int:
    """How many of the candidates may lose their attention together: all but one where the network would see nothing then."""
    found = candidates(space)
    others = any(choice.attention and i not in found for i, choice in enumerate(space.whole))
    return len(found) - bool(found and space.needs_attention and not others)


def narrowed(space: Space, hidden: Mapping[int, int]) -> tuple[Choice, ...]:
    """All blocks whole but these, which lose their attention and keep so many units."""
    return tuple(
        choice.without("attention")._replace(hidden=hidden[i]) if i in hidden else choice
        for i, choice in enumerate(space.whole)
    )


def _narrowed_cost(space: Space, hidden: Mapping[int, int]) -> Cost:
    return cost(space.spec(narrowed(space, hidden)))


def floor(spec: ModelSpec, config: DcvitConfig | None = None) -> Cost:
    """The cheapest network that the method makes of this spec; frozen parts stay."""
    config = config or DcvitConfig()
    return _floor(space_of(spec, config), config)


def _floor(space: Space, config: DcvitConfig) -> Cost:
    if config.variant == "closed":
        return space.floor
    found = candidates(space)[: most(space)][: config.k]
    return _narrowed_cost(space, dict.fromkeys(found, 1)) if found else space.reference


def tolerance(spec: ModelSpec, config: DcvitConfig | None = None) -> dict[str, int]:
    """The largest jump in cost between neighbouring results, by resource (law 7): one attention, or one step of width."""
    config = config or DcvitConfig()
    space = space_of(spec, config)
    whole = cost(space.base)
    pairs = [(space.reference, whole)]
    for i, choice in enumerate(space.whole):
        after = [choice.without("attention")] if choice.attention else []
        if choice.hidden > 1:
            less = 1 if config.variant == "finetune" else unit(choice.hidden, config.align)
            after.append(choice._replace(hidden=choice.hidden - less))
        if choice.mlp and (choice.hidden == 1 or not choice.attention):
            after.append(choice.without("mlp"))
        pairs += [(whole, cost(space.spec(space.with_choice(i, one)))) for one in after]
    return jumps(pairs)


def plan(spec: ModelSpec, config: DcvitConfig | None = None) -> dict[str, Any]:
    """What can be said from the spec alone: range, step, needs, what stays dense.

    Raises BudgetError when the config's budget is out of reach, ConfigError when a frozen part is not there.
    """
    config = config or DcvitConfig()
    space = space_of(spec, config)
    if config.budget is not None:
        check_budget(space, config, config.budget)
    trains = config.variant == "finetune" or config.finetune_steps > 0
    return outlook(
        "dcvit",
        config.variant,
        config.budget,
        floor=_floor(space, config),
        reference=space.reference,
        tolerance=tolerance(spec, config),
        needs={"images": config.images, "labels": False, "training": trains},
        dense=space.dense,
    )


def check_budget(space: Space, config: DcvitConfig, budget: Budget) -> None:
    """Raise BudgetError, with the range or the reason, where the variant cannot meet the budget."""
    if config.variant == "finetune":
        structure(space, config, budget)
    budget.refuse_unreachable(floor=_floor(space, config), reference=space.reference, method="dcvit")


def solve(total: float, attention: float, mlp: float, width: int, keep: float) -> tuple[int, float, int]:
    """k, r and m = floor(width r) of the released code, from a kept share of `total` (section 4 of the code's solver).

    attention, mlp: what one block's attention (with its norm) and its dense MLP of ratio 4 cost, in the unit of `total`.
    Raises BudgetError where less than one attention has to go.
    """
    gone = (1 - keep) * total
    if gone < attention:
        raise BudgetError(
            f"keep {keep!r}: {gone / total:.2%} would have to go, and one attention is {attention / total:.2%}, the least "
            f"that this form removes. Keep {1 - attention / total:.4f} or less, or choose variant='closed'."
        )
    k = math.ceil(gone / (attention + mlp) - 1e-12)
    ratio = 4 * (1 - (gone / k - attention) / mlp)
    return k, ratio, math.floor(width * ratio + 1e-6)


def paper_counts(spec: ModelSpec) -> tuple[int, int, int]:
    """Total, attention and MLP of a block in the authors' counting: linears and norms, no attention products.

    Of an untouched ViT with blocks alike; raises ConfigError for another.
    """
    alike = len({(b.attention, b.mlp, b.steps) for b in spec.blocks}) == 1
    block = spec.blocks[0] if spec.blocks else BlockSpec(attention=None, mlp=None)
    if not alike or block.attention is None or block.mlp is None or block.steps or block.mlp.kind == "swiglu":
        raise ConfigError("dcvit: preset 'paper' counts blocks that are all alike and whole; choose preset='clean'.")
    if block.mlp.hidden != 4 * spec.width:
        raise ConfigError("dcvit: preset 'paper' knows MLPs four times as wide as the stream; choose preset='clean'.")
    n, d = len(spec.prefix) + math.prod(spec.grid), spec.width
    attention, mlp, norm = 4 * n * d * d + 4 * n * d, 8 * n * d * d, 4 * n * d
    whole = cost(spec)
    total = whole.stem_macs + whole.head_macs + len(spec.blocks) * (attention + mlp + norm) + norm
    return total, attention, mlp


@dataclass(frozen=True, kw_only=True)
class Structure:
    """How many blocks are compressed, and how many units each would keep if it were chosen first.

    counted: whose MACs it was solved in. The authors' leave out the attention products; where their structure ends above
    the budget in this project's, preset `paper` takes this project's too, and the report says so.
    """

    k: int
    hidden: dict[int, int]
    counted: str = "all products"


def structure(space: Space, config: DcvitConfig, budget: Budget) -> Structure:
    """k and the common share of hidden units, before any block is chosen: k is the least that the budget allows.

    Blocks that cost differently: for the k cheapest, so that whichever are chosen, the budget can be met.
    Raises BudgetError where no k fits.
    """
    reference, limits, found = space.reference, budget.limits(space.reference), candidates(space)
    if not exceeded(reference, limits):
        return Structure(k=0, hidden={})
    if not found:
        raise BudgetError(
            f"dcvit: variant 'finetune' compresses blocks between the first and the last, and none of {len(space.levels)} is "
            "left whole and free. Choose variant='closed'."
        )
    if config.preset == "paper":
        if set(limits) != {"macs"}:
            raise ConfigError("dcvit: preset 'paper' meets MACs alone; choose preset='clean' for other limits.")
        total, attention, mlp = paper_counts(space.base)
        k, _, m = solve(total, attention, mlp, space.base.width, limits["macs"] / reference.macs)
        if k <= len(found) and m >= 1 and not exceeded(_narrowed_cost(space, dict.fromkeys(found[:k], m)), limits):
            return Structure(k=k, hidden=dict.fromkeys(found, m), counted="as the authors count")
    main = next(iter(limits))
    cheapest = sorted(found, key=lambda i: getattr(reference, main) - getattr(_narrowed_cost(space, {i: 1}), main))
    for k in range(1, most(space) + 1) if config.k is None else (config.k,):
        if k > most(space):
            raise BudgetError(f"dcvit: k={k} blocks; only {most(space)} can be compressed. Lower k.")
        hidden = widest(space, cheapest[:k], limits)
        if hidden is None:
            continue
        if all(hidden[i] == space.whole[i].hidden for i in hidden):
            _refuse_gentle(space, hidden, limits)
        share = min(hidden[i] / space.whole[i].hidden for i in hidden)
        every = {i: max(1, math.floor(share * space.whole[i].hidden + 1e-6)) for i in found}
        return Structure(k=k, hidden=every | hidden)
    least = _narrowed_cost(space, dict.fromkeys(found[: most(space)], 1))
    budget.refuse_unreachable(floor=least, reference=reference, method="dcvit")
    raise BudgetError(f"dcvit: k={config.k} blocks cannot meet the budget; raise k, or leave it out.")


def _refuse_gentle(space: Space, hidden: Mapping[int, int], limits: Mapping[str, int]) -> None:
    """Raise BudgetError where the attentions of these blocks are much more than the limits ask for."""
    reference, after = space.reference, _narrowed_cost(space, hidden)
    if all(limits[name] - getattr(after, name) > 0.01 * getattr(reference, name) for name in limits):
        gone = ", ".join(f"{getattr(reference, n) - getattr(after, n):,} {n}" for n in limits)
        raise BudgetError(
            f"dcvit: variant 'finetune' removes at least one attention for each block it compresses, {gone} here, which is more "
            "than the budget asks for. Lower the budget or k, or choose variant='closed'."
        )


def widest(
    space: Space, blocks: Sequence[int], limits: Mapping[str, int], beside: Mapping[int, int] | None = None
) -> dict[int, int] | None:
    """The widest MLPs of an equal share that meet the limits when these blocks lose their attention; None if none do.

    beside: units of blocks that have lost theirs already. What is left over goes to the first blocks, a unit each, so that
    the miss is below one unit.
    """
    dense = {i: space.whole[i].hidden for i in blocks}
    top = max(dense.values(), default=0)

    def at(tick: int) -> dict[int, int]:
        return {i: max(1, m * tick // top) for i, m in dense.items()}

    def fits(hidden: Mapping[int, int]) -> bool:
        return not exceeded(_narrowed_cost(space, {**(beside or {}), **hidden}), limits)

    if not fits(at(0)):
        return None
    low, high = 0, top
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(at(middle)) else (low, middle - 1)
    hidden = at(low)
    for i in blocks:
        if hidden[i] < dense[i] and fits(more := {**hidden, i: hidden[i] + 1}):
            hidden = more
    return hidden


def chosen_blocks(
    space: Space,
    ranked_: Sequence[int],
    shape: Structure,
    limits: Mapping[str, int],
    scores: Mapping[int, float],
) -> tuple[list[int], dict[int, int]]:
    """The blocks to compress, the most recoverable first, and the units that each keeps: the first as its trial had it.

    The best k by their trials if they can meet the limits; else the set of the least sum that does, of more blocks if need be.
    Raises BudgetError where none does.
    """
    for k in range(shape.k, min(most(space), len(ranked_)) + 1):
        sets = sorted(combinations(ranked_, k), key=lambda blocks: sum(scores[i] for i in blocks))
        for order in sets:
            first, *rest = order
            begun = {first: shape.hidden[first]}
            hidden = widest(space, rest, limits, begun)
            if hidden is not None:
                return list(order), begun | hidden
    raise BudgetError(
        "dcvit: no set of blocks meets the budget with the width that was tried. Raise the budget a little, pass a larger k, or "
        "choose variant='closed'."
    )
