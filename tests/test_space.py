"""Search spaces: what a choice costs is what the network of its spec costs."""

from dataclasses import replace
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.specs import specs, vit
from vitrim.budget import Budget
from vitrim.counting import ADDITIVE, RESOURCES, cost
from vitrim.errors import BudgetError
from vitrim.space import BlockLevels, Choice, Form, Space, frozen_parts, jumps, outlook, sizes
from vitrim.spec import BlockSpec, ModelSpec, Pool


@st.composite
def spaces(draw: st.DrawFn, forms: tuple[Form, ...] = get_args(Form)) -> Space:
    """A space of any network: some smaller sizes of every part, ranks that are cheaper than what they replace."""
    spec = draw(specs())
    form = draw(st.sampled_from(forms))
    levels = tuple(_levels(draw, block, spec.width, form) for block in spec.blocks)
    return Space(given=spec, base=spec, fixed=frozenset(), levels=levels, form=form, dense={})


def _levels(draw: st.DrawFn, block: BlockSpec, width: int, form: Form) -> BlockLevels:
    def smaller(most: int) -> tuple[int, ...]:
        found = draw(st.sets(st.integers(1, most), max_size=2)) if most >= 1 else set()
        return tuple(sorted(found, reverse=True))

    found: dict[str, Any] = {}
    if (a := block.attention) is not None:
        free = a.qk_norm == "none" or form == "kept"
        heads = () if form == "factored" else smaller(a.heads - 1)
        found.update(heads=(a.heads, *heads), qk=(a.qk_dim, *(smaller(a.qk_dim - 1) if free else ())))
        found["v"] = (a.v_dim, *smaller(a.v_dim - 1))
    if (m := block.mlp) is not None:
        found["hidden"] = (m.hidden, *(() if form == "factored" else smaller(m.hidden - 1)))
        rows = 2 * m.hidden if m.kind == "swiglu" else m.hidden
        for part, ins, outs, now in (("fc1", width, rows, m.fc1_rank), ("fc2", m.hidden, width, m.fc2_rank)):
            even = (ins * outs - 1) // (ins + outs)
            ranks = smaller(even if now is None else now - 1) if form == "factored" else ()
            found[part] = (now, *ranks)
    both = block.attention is not None and block.mlp is not None
    gone = {name: draw(st.booleans()) for name in (("off", "bare", "empty") if both and form != "factored" else ())}
    refit = draw(st.tuples(st.booleans(), st.booleans())) if form == "refitted" else (False, False)
    if form == "refitted" and not all(refit):  # what is not fitted anew is not cut
        whole = BlockLevels.whole_of(block)
        names = ([] if refit[0] else ["heads", "qk", "v"]) + ([] if refit[1] else ["hidden", "fc1", "fc2"])
        found.update({name: getattr(whole, name) for name in names})
        gone = {}
    return replace(BlockLevels.whole_of(block), **found, **gone, refit=refit)


def some(data: st.DataObject, space: Space) -> tuple[Choice, ...]:
    return tuple(data.draw(st.sampled_from(levels.choices())) for levels in space.levels)


@settings(max_examples=150)
@given(space=spaces(), data=st.data())
def test_costs_of_choices_are_those_of_their_network(space: Space, data: st.DataObject) -> None:
    choices = some(data, space)
    found = cost(space.spec(choices))
    assert space.total(choices) == {name: getattr(found, name) for name in ADDITIVE}
    assert space.used(choices) == {name: getattr(found, name) for name in RESOURCES}


@given(space=spaces(), data=st.data())
def test_the_widest_block_is_the_widest_moment(space: Space, data: st.DataObject) -> None:
    choices = some(data, space)
    peaks = [space.peak(i, choice) for i, choice in enumerate(choices)]
    assert max(peaks, default=space.stem) == cost(space.spec(choices)).activation_bytes


@given(space=spaces())
def test_a_price_is_what_the_halves_of_the_block_cost(space: Space) -> None:
    for i, levels in enumerate(space.levels):
        for choice in levels.choices():
            block = cost(space.spec(space.with_choice(i, choice))).blocks[i]
            macs, params = block.attention_macs + block.mlp_macs, block.attention_params + block.mlp_params
            assert space.price(i, choice) == (macs, params)


@given(space=spaces())
def test_the_lowest_network_is_below_every_choice_and_whole_ones_come_first(space: Space) -> None:
    above = 0
    for i, levels in enumerate(space.levels):
        least = space.price(i, space.lowest[i])[0]
        above += any(least > space.price(i, choice)[0] for choice in levels.choices())
        assert levels.choices()[0] == space.whole[i]
    assert space.floor == cost(space.spec(space.lowest))
    assert space.sees(space.lowest)
    # at most one block is not at its cheapest: the one that keeps an attention where all could go
    assert above <= (space.needs_attention and sum(choice.attention for choice in space.lowest) == 1)


def test_the_lowest_network_keeps_the_attention_that_costs_least_where_prefix_tokens_alone_are_read() -> None:
    """Two blocks, the second with fewer heads: its attention stays. A network that averages its patches needs none."""
    spec = vit()
    first, second = spec.blocks
    assert second.attention is not None
    spec = replace(spec, blocks=(first, replace(second, attention=replace(second.attention, heads=1))))
    levels = tuple(replace(BlockLevels.whole_of(block), off=True, bare=True, empty=True) for block in spec.blocks)
    space = Space(given=spec, base=spec, fixed=frozenset(), levels=levels, dense={})
    assert space.lowest == (Choice(), Choice(heads=1, qk=8, v=8))
    averaging = replace(spec, pool=Pool(kind="mean"))
    assert replace(space, given=averaging, base=averaging).lowest == (Choice(), Choice())


@given(space=spaces(forms=("kept", "factored")))
def test_whole_choices_give_the_network_back(space: Space) -> None:
    assert space.spec(space.whole) == space.base
    assert all(space.block(i, Choice.of(block)) == block for i, block in enumerate(space.base.blocks))


@given(space=spaces(), data=st.data())
def test_one_choice_changes_one_block(space: Space, data: st.DataObject) -> None:
    whole = space.spec(space.whole)
    for i, choice in enumerate(some(data, space)):
        blocks = space.spec(space.with_choice(i, choice)).blocks
        assert blocks[i] == space.block(i, choice)
        assert (*blocks[:i], *blocks[i + 1 :]) == (*whole.blocks[:i], *whole.blocks[i + 1 :])


def of(spec: ModelSpec, **offered: Any) -> Space:
    levels = tuple(replace(BlockLevels.whole_of(block), **offered) for block in spec.blocks)
    return Space(given=spec, base=spec, fixed=frozenset(), levels=levels, form="factored", dense={})


def test_a_rank_below_the_whole_drops_key_biases_and_moves_value_biases() -> None:
    space = of(vit(), qk=(8, 4), v=(8, 4))
    a = space.block(0, space.whole[0].sized("qk", 4)).attention
    assert a is not None
    assert (a.qk_dim, a.k_bias, a.v_bias, a.q_bias) == (4, False, True, True)
    a = space.block(0, space.whole[0].sized("v", 4)).attention
    assert a is not None
    assert (a.v_dim, a.k_bias, a.v_bias, a.out_bias) == (4, True, False, True)


def test_a_block_has_its_whole_its_least_and_halves_that_may_go() -> None:
    block = vit().blocks[0]
    levels = replace(BlockLevels.whole_of(block), qk=(8, 4), hidden=(24, 12), off=True, bare=True, empty=True)
    assert levels.whole == Choice.of(block) == Choice(2, 8, 8, 24)
    assert levels.least == Choice(2, 4, 8, 12)
    found = levels.choices()
    assert len(found) == len(set(found)) == 4 + 2 + 2 + 1
    assert {(choice.attention, choice.mlp) for choice in found} == {
        (a, m) for a in (True, False) for m in (True, False)
    }
    assert levels.within(8).qk == (4,)


def test_sizes_are_multiples_of_a_unit_and_the_whole_itself() -> None:
    assert sizes(20, (0.9, 0.5, 0.1), 8) == (20, 16, 8)
    assert sizes(3, (0.5,), 8) == (3,)


def test_jumps_are_the_largest_differences_and_never_negative() -> None:
    small, large = cost(vit()), cost(vit(hidden=48))
    found = jumps([(small, large), (large, small)])
    assert found == {name: getattr(large, name) - getattr(small, name) for name in RESOURCES}
    assert jumps([(small, large)]) == dict.fromkeys(RESOURCES, 0)


def test_an_outlook_says_the_range_and_refuses_what_is_below_it() -> None:
    space = of(vit(), fc1=(None, 1))

    def said(budget: Budget | None) -> dict[str, Any]:
        return outlook(
            "any",
            "",
            budget,
            floor=space.floor,
            reference=space.reference,
            tolerance={},
            needs={},
            dense=frozen_parts({(1, "mlp"), (0, "attention")}),
        )

    assert said(None)["range"] == {n: [getattr(space.floor, n), getattr(space.reference, n)] for n in RESOURCES}
    assert list(said(None)["dense"]) == ["block 0 attention", "block 1 mlp"]
    with pytest.raises(BudgetError, match="any reaches"):
        said(Budget(keep_macs=0.01))
