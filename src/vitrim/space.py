"""Search spaces: what may become of each block, what it costs, how low a network goes, and what stays. No torch.

A method says for each block which sizes are on offer (`BlockLevels`); what a choice makes of the network, what it costs, the
cheapest one and the largest jump between neighbours follow from the spec.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import product
from typing import Any, Literal, NamedTuple

from .budget import Budget
from .counting import ADDITIVE, FLOAT_BYTES, RESOURCES, Cost, attention_price, block_peak, cost, mlp_price, stem_peak
from .freezing import Half
from .spec import AttentionSpec, BlockSpec, BlockTokens, MlpSpec, ModelSpec, blind, reads_prefix_alone, token_walk

Sizes = tuple[int, ...]
Ranks = tuple[int | None, ...]
Price = tuple[int, int]
"""Of each additive resource."""


class Choice(NamedTuple):
    """What becomes of one block. heads, qk, v: of its attention, 0 without one. hidden: units of its MLP, 0 without one.

    fc1, fc2: ranks of the MLP's linears; None: not in factors.
    """

    heads: int = 0
    qk: int = 0
    v: int = 0
    hidden: int = 0
    fc1: int | None = None
    fc2: int | None = None

    @staticmethod
    def of(block: BlockSpec) -> Choice:
        """A block as it is."""
        a, m = block.attention, block.mlp
        attention = (0, 0, 0) if a is None else (a.heads, a.qk_dim, a.v_dim)
        return Choice(*attention, *((0,) if m is None else (m.hidden, m.fc1_rank, m.fc2_rank)))

    @property
    def attention(self) -> bool:
        """Whether there is one."""
        return self.heads > 0

    @property
    def mlp(self) -> bool:
        """Whether there is one."""
        return self.hidden > 0

    def sized(self, part: str, size: int | None) -> Choice:
        """The same with another size of a part."""
        return Choice(*(size if name == part else now for name, now in zip(self._fields, self, strict=True)))  # type: ignore[arg-type]

    def without(self, half: str) -> Choice:
        """The same with that half gone."""
        if half == "attention":
            return self._replace(heads=0, qk=0, v=0)
        return self._replace(hidden=0, fc1=None, fc2=None)


@dataclass(frozen=True, kw_only=True)
class BlockLevels:
    """What may become of one block: sizes of each part on offer, falling, the whole first; (0,) where the half is not there.

    off: the attention may go and the MLP stay. bare: the MLP may go and the attention stay. empty: both may go.
    refit: which halves (attention, MLP) are fitted anew, cut or not.
    """

    heads: Sizes
    qk: Sizes
    v: Sizes
    hidden: Sizes
    fc1: Ranks = (None,)
    fc2: Ranks = (None,)
    off: bool = False
    bare: bool = False
    empty: bool = False
    refit: tuple[bool, bool] = (False, False)

    @staticmethod
    def whole_of(block: BlockSpec) -> BlockLevels:
        """Nothing on offer."""
        now = Choice.of(block)
        return BlockLevels(
            heads=(now.heads,), qk=(now.qk,), v=(now.v,), hidden=(now.hidden,), fc1=(now.fc1,), fc2=(now.fc2,)
        )

    @property
    def whole(self) -> Choice:
        """The block as it is."""
        return Choice(*(getattr(self, name)[0] for name in Choice._fields))

    @property
    def least(self) -> Choice:
        """Each part at its smallest, no half gone."""
        return Choice(*(getattr(self, name)[-1] for name in Choice._fields))

    def within(self, width: int) -> BlockLevels:
        """The same in a stream of this width, whose products have no rank of it or above."""
        qk, v = (tuple(n for n in sizes if n < width) or sizes[:1] for sizes in (self.qk, self.v))
        return replace(self, qk=qk, v=v)

    def choices(self) -> list[Choice]:
        """All that the block may become, the whole first."""
        attention = list(product(self.heads, self.qk, self.v))
        mlp = list(product(self.hidden, self.fc1, self.fc2))
        found = [Choice(*a, *m) for a, m in product(attention, mlp)]
        if self.bare:
            found += [Choice(*a) for a in attention]
        if self.off:
            found += [Choice(0, 0, 0, *m) for m in mlp]
        return [*found, Choice()] if self.empty else found


Form = Literal["kept", "factored", "refitted"]
"""How smaller parts are made. kept: units stay or go, and every bias with them. factored: products of weights are replaced, so
that key biases go and value biases move into the output's. refitted: factored, and the last linears of what is fitted have biases; the
ranks of an MLP stay what the base has."""


@dataclass(frozen=True, kw_only=True)
class Space:
    """What may become of one network. given: as it was passed in. base: what is cut, LayerScale folded where it goes.

    fixed: halves that stay as they are. dense: what stays, and why.
    """

    given: ModelSpec
    base: ModelSpec
    fixed: frozenset[Half]
    levels: tuple[BlockLevels, ...]
    form: Form = "kept"
    dense: Mapping[str, str]

    @cached_property
    def whole(self) -> tuple[Choice, ...]:
        """The choices that change nothing."""
        return tuple(levels.whole for levels in self.levels)

    @cached_property
    def reference(self) -> Cost:
        """What shares of a budget refer to."""
        return cost(self.given)

    def block(self, i: int, choice: Choice) -> BlockSpec:
        """Block `i` after a choice."""
        block = self.base.blocks[i]
        attention, mlp = self.levels[i].refit if self.form == "refitted" else (True, True)
        return replace(
            block,
            attention=self._attention(block.attention, choice) if attention else block.attention,
            mlp=self._mlp(block.mlp, choice) if mlp else block.mlp,
        )

    def _attention(self, a: AttentionSpec | None, choice: Choice) -> AttentionSpec | None:
        if a is None or not choice.heads:
            return None
        if self.form == "kept":
            return replace(a, heads=choice.heads, qk_dim=choice.qk, v_dim=choice.v)
        fewer_qk, fewer_v = choice.qk < a.qk_dim, choice.v < a.v_dim
        new = replace(a, heads=choice.heads, out_bias=a.out_bias or self.form == "refitted")
        return new.factored(qk=choice.qk if fewer_qk else None, v=choice.v if fewer_v else None)

    def _mlp(self, m: MlpSpec | None, choice: Choice) -> MlpSpec | None:
        if m is None or not choice.hidden:
            return None
        if self.form == "refitted":
            return replace(m, hidden=choice.hidden, fc2_bias=True)
        return replace(m, hidden=choice.hidden, fc1_rank=choice.fc1, fc2_rank=choice.fc2)

    def spec(self, choices: Sequence[Choice]) -> ModelSpec:
        """The network of these choices."""
        return replace(self.base, blocks=tuple(self.block(i, choice) for i, choice in enumerate(choices)))

    def with_choice(self, i: int, choice: Choice) -> tuple[Choice, ...]:
        """The whole network but for one block."""
        return (*self.whole[:i], choice, *self.whole[i + 1 :])

    # ---------------------------------------------------------------------------------------------------------------- costs

    @cached_property
    def walk(self) -> tuple[BlockTokens, ...]:
        """Tokens along the blocks."""
        return token_walk(self.base)

    @cached_property
    def outside(self) -> dict[str, int]:
        """What no choice changes: all but the halves of the blocks."""
        found = cost(self.base)
        halves = [price for i, block in enumerate(self.base.blocks) for price in self._halves(i, block)]
        return {name: getattr(found, name) - sum(price[r] for price in halves) for r, name in enumerate(ADDITIVE)}

    def _halves(self, i: int, block: BlockSpec) -> tuple[Price, Price]:
        return attention_price(block.attention, self.walk[i]), mlp_price(block.mlp, self.walk[i])

    @cached_property
    def _half(self) -> Callable[[int, int, Choice], Price]:
        """Price of the first or second half of a block; each is looked at once, since a block has many choices of few halves."""
        return cache(lambda i, half, choice: self._halves(i, self.block(i, choice))[half])

    def price(self, i: int, choice: Choice) -> Price:
        """MACs and parameters of the halves of block `i` after a choice, in the order of `counting.ADDITIVE`."""
        first, second = self._half(i, 0, choice.without("mlp")), self._half(i, 1, choice.without("attention"))
        return first[0] + second[0], first[1] + second[1]

    def total(self, choices: Sequence[Choice]) -> dict[str, int]:
        """Exact MACs and parameters of the network of these choices."""
        prices = [self.price(i, choice) for i, choice in enumerate(choices)]
        return {name: self.outside[name] + sum(p[r] for p in prices) for r, name in enumerate(ADDITIVE)}

    def used(self, choices: Sequence[Choice]) -> dict[str, int]:
        """All that `counting.RESOURCES` names, exactly; far quicker than `cost` of the spec, which is checked when made."""
        found = self.total(choices)
        file_bytes = FLOAT_BYTES * found["params"]
        peaks = (self.peak(i, choice) for i, choice in enumerate(choices))
        return {**found, "memory_bytes": file_bytes + max(peaks, default=self.stem), "file_bytes": file_bytes}

    def over(self, choices: Sequence[Choice], limits: Mapping[str, int]) -> list[str]:
        """Limited resources of which the network of these choices takes too much.  limits: of `Budget.limits`."""
        used = self.used(choices)
        return [name for name, limit in limits.items() if used[name] > limit]

    @cached_property
    def stem(self) -> int:
        """Bytes of activations in the widest moment of the stem."""
        return FLOAT_BYTES * stem_peak(self.base)

    @cached_property
    def peak(self) -> Callable[[int, Choice], int]:
        """Bytes of activations of a network in which block `i` after a choice is the only one."""
        return cache(lambda i, choice: max(self.stem, FLOAT_BYTES * block_peak(self.block(i, choice), self.walk[i])))

    # ----------------------------------------------------------------------------------------------------- range, tolerance

    @cached_property
    def needs_attention(self) -> bool:
        """Whether one attention has to stay: without any, what is read would be the same for every image."""
        return reads_prefix_alone(self.base) and not blind(self.base)

    def sees(self, choices: Sequence[Choice]) -> bool:
        """Whether what the network of these choices gives can depend on the image."""
        return not self.needs_attention or any(choice.attention for choice in choices)

    @cached_property
    def lowest(self) -> tuple[Choice, ...]:
        """The cheapest network that sees: each part at its smallest, or halves gone where they may go."""
        found = []
        for i, levels in enumerate(self.levels):
            least = levels.least
            trials = [least, *([least.without("mlp")] if levels.bare else [])]
            trials += [least.without("attention")] if levels.off else []
            found.append(Choice() if levels.empty else min(trials, key=lambda c, i=i: self.price(i, c)))  # type: ignore[misc]
        if self.sees(found):
            return tuple(found)
        sighted = []
        for i, levels in enumerate(self.levels):
            if (least := levels.least).attention:
                one = least.without("mlp") if levels.bare or not least.mlp else least
                extra = [a - b for a, b in zip(self.price(i, one), self.price(i, found[i]), strict=True)]
                sighted.append((extra, i, one))
        _, i, one = min(sighted)
        return (*found[:i], one, *found[i + 1 :])

    @property
    def floor(self) -> Cost:
        """Of the cheapest network."""
        return cost(self.spec(self.lowest))


def sizes(size: int, shares: Iterable[float], unit: int) -> Sizes:
    """Sizes on offer, falling, the whole first: shares of it in multiples of a unit."""
    found = {min(size, max(unit, round(share * size / unit) * unit)) for share in shares} | {size}
    return tuple(sorted(found, reverse=True))


def jumps(pairs: Iterable[tuple[Cost, Cost]]) -> dict[str, int]:
    """The largest difference of each resource between neighbours (above, below); at least 0."""
    found = dict.fromkeys(RESOURCES, 0)
    for above, below in pairs:
        for name, most in found.items():
            found[name] = max(most, getattr(above, name) - getattr(below, name))
    return found


def frozen_parts(fixed: Collection[Half]) -> dict[str, str]:
    """Entries of `Space.dense` for frozen halves."""
    return {f"block {i} {half}": "frozen" for i, half in sorted(fixed)}


def outlook(
    method: str,
    variant: str,
    budget: Budget | None,
    *,
    floor: Cost,
    reference: Cost,
    tolerance: Mapping[str, int],
    needs: Mapping[str, Any],
    dense: Mapping[str, str],
) -> dict[str, Any]:
    """What a method can say from the spec alone: the range of each resource, the tolerance, the needs, what stays dense.

    tolerance: how far below a budget the result may end, by resource (law 7). Raises BudgetError out of reach.
    """
    if budget is not None:
        budget.refuse_unreachable(floor=floor, reference=reference, method=method)
    return {
        "method": method,
        "variant": variant,
        "range": {name: [getattr(floor, name), getattr(reference, name)] for name in RESOURCES},
        "step": dict(tolerance),
        "needs": dict(needs),
        "dense": dict(dense),
    }
