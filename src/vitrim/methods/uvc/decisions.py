"""What UVC decides on a spec: shares of counts and gates, what they cost, and the whole numbers in the end. No networks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch

from vitrim import search, surgery
from vitrim.allocation import Ints
from vitrim.counting import ADDITIVE, attention_price, mlp_price
from vitrim.freezing import HALVES, Half, frozen
from vitrim.methods.uvc.config import UvcConfig
from vitrim.methods.uvc.controller import Array, Width
from vitrim.search import Axes, Place, Settled
from vitrim.space import BlockLevels, Space, frozen_parts
from vitrim.spec import ModelSpec


@dataclass(frozen=True, kw_only=True)
class Decisions(Axes):
    """What the search decides on a spec (LayerScale folded), and what it costs while counts are shares of their range.

    per_head: whether dims are counted by head. align: of the whole numbers in the end.
    """

    per_head: bool
    align: int

    @cached_property
    def widths(self) -> tuple[Width, ...]:
        """The counts."""
        found: list[Width] = []
        for i, part in self.parts:
            whole = self.space.whole[i]
            heads: Sequence[int | None] = range(whole.heads) if self.per_head and part == "v" else (None,)
            found += [Width(i, part, getattr(whole, part), head) for head in heads]
        return tuple(found)

    @cached_property
    def index(self) -> dict[Place, list[int]]:
        """The widths of each part."""
        found: dict[Place, list[int]] = {}
        for w, width in enumerate(self.widths):
            found.setdefault((width.block, width.part), []).append(w)
        return found

    def alive(self, place: Place, removed: Array, ranks: Mapping[int, Ints] | None) -> list[int]:
        """The widths that say how many units of a part stay: of dims counted by head, those of the heads that stay.

        ranks: by block, places of its heads in the order in which they go.
        """
        where, heads = self.index[place], self.index.get((place[0], "heads"))
        if len(where) == 1 or not ranks or heads is None:
            return where
        gone = math.floor(float(removed[heads[0]]) * len(where) + 1e-9)
        return [w for w, rank in zip(where, ranks[place[0]], strict=True) if rank >= gone]

    def shares(
        self,
        removed: Array,
        logits: Array,
        *,
        counts: Literal["continuous", "ceil", "levels"] = "continuous",
        ranks: Mapping[int, Ints] | None = None,
    ) -> tuple[Array, Array, Array]:
        """MACs and parameters as shares of the reference, with their slopes.

        removed: share of each width, [W]; logits: of the gates, [G], kept with probability sigmoid(logit).
        -> [2], [2, W], [2, G].  counts: `ceil` rounds what is removed up, `levels` takes the nearest that the finaliser
        may choose; slopes are as if neither did.
        """
        x = torch.tensor(removed, dtype=torch.float64, requires_grad=True)
        d = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
        gone, keep = x.unbind(), torch.sigmoid(d).unbind()
        totals: list[Any] = [self.space.outside[name] for name in ADDITIVE]

        def kept(i: int, part: str, size: int) -> Any:
            """Units left of `size`; dims counted by head are padded to the head that keeps most."""
            if (i, part) not in self.index:
                return size
            alive = self.alive((i, part), removed, ranks)
            share = gone[alive[0]] if len(alive) == 1 else torch.stack([gone[w] for w in alive]).amin()
            count = size * (1 - share)
            if counts == "continuous":
                return count
            now, levels = float(count.detach()), self.levels((i, part), self.align)
            return (
                count + ((math.floor(now + 1e-9) if counts == "ceil" else search.nearest(levels, now)) - count).detach()
            )

        def add(half: Half, price: tuple[Any, Any]) -> None:
            gate = self.gate_of.get(half)
            for k in range(2):
                totals[k] = totals[k] + (price[k] if gate is None else keep[gate] * price[k])

        base = self.space.base
        for i, (block, at) in enumerate(zip(base.blocks, self.space.walk, strict=True)):
            if (a := block.attention) is not None:
                v = kept(i, "v", a.v_dim)
                qk = v * a.qk_dim / a.v_dim if i in self.tied else a.qk_dim
                attention = replace(a, heads=kept(i, "heads", a.heads), qk_dim=qk, v_dim=v)
                add((i, "attention"), attention_price(attention, at))
            if (m := block.mlp) is not None:
                add((i, "mlp"), mlp_price(replace(m, hidden=kept(i, "hidden", m.hidden)), at))
        values, slopes_w, slopes_g = np.zeros(2), np.zeros((2, len(removed))), np.zeros((2, len(logits)))
        for k, name in enumerate(ADDITIVE):
            share = torch.as_tensor(totals[k], dtype=torch.float64) / getattr(self.space.reference, name)
            values[k] = float(share.detach())
            if share.requires_grad:
                first, second = torch.autograd.grad(share, (x, d), retain_graph=k == 0, allow_unused=True)
                slopes_w[k] = 0 if first is None else first.numpy()
                slopes_g[k] = 0 if second is None else second.numpy()
        return values, slopes_w, slopes_g


def decisions_of(spec: ModelSpec, config: UvcConfig) -> Decisions:
    """The decisions on a spec as it was passed in; budgets' shares refer to it."""
    fixed = frozen(spec, config.freeze)
    base = surgery.with_folded(spec, skip=fixed)
    gates: list[tuple[Half, ...]] = []
    tied: set[int] = set()
    levels: list[BlockLevels] = []
    dense = {"classifier": "kept dense"} if spec.outputs else {}
    dense |= frozen_parts(fixed)
    for i, block in enumerate(base.blocks):
        halves = [(i, half) for half in HALVES if getattr(block, half) is not None]
        loose = [half for half in halves if half not in fixed]
        if config.gates == "halves":
            gates += [(half,) for half in loose]
        elif config.gates == "block" and halves and loose == halves:
            gates.append(tuple(halves))
        a = block.attention
        if a is not None and config.tie_qk and a.qk_norm == "none" and a.qk_dim > 1:
            tied.add(i)
        elif a is not None and config.widths and (i, "attention") in loose:
            why = f"{a.qk_norm} norm between queries and keys" if a.qk_norm != "none" else "tie_qk is off"
            dense[f"block {i} qk"] = why
        counted = [half for _, half in loose] if config.widths else []
        levels.append(search.every_size(block, counted, tied=i in tied))
    return Decisions(
        space=Space(given=spec, base=base, fixed=fixed, levels=tuple(levels), dense=dense),
        gates=tuple(gates),
        tied=frozenset(tied),
        per_head=config.per_head,
        align=config.align,
    )


def finalise(
    decisions: Decisions,
    limits: Mapping[str, int],
    removed: Array,
    logits: Array,
    losses: Mapping[Place, Array],
    ranks: Mapping[int, Ints] | None = None,
) -> Settled:
    """Whole numbers within the limits, nearest to what the search decided: `search.settle`.

    ranks: by block, places of the heads in the order in which they go, where each counts its own dims.
    """
    counts = {}
    for place, where in decisions.index.items():
        gone = float(removed[decisions.alive(place, removed, ranks)].min())
        counts[place] = decisions.widths[where[0]].size * (1 - gone)
    return search.settle(decisions, limits, counts=counts, logits=logits, losses=losses, align=decisions.align)
