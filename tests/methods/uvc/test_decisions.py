"""UVC's decisions: one cost for the search and for the network that is made, and whole numbers within every budget."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.methods.uvc.kit import WIDE, losses_for, quick
from tests.specs import specs, vit
from vitrim.architectures import spec as architecture
from vitrim.budget import Budget
from vitrim.counting import cost
from vitrim.methods.uvc.decisions import decisions_of, finalise
from vitrim.methods.uvc.run import floor, tolerance
from vitrim.space import Choice
from vitrim.spec import ModelSpec


@settings(max_examples=40, deadline=None)
@given(spec=specs(), data=st.data())
def test_expected_cost_is_the_count_of_the_network_that_whole_decisions_make(
    spec: ModelSpec, data: st.DataObject
) -> None:
    """The sheet's 1: one function for the search and for the materialised network, in MACs and in parameters."""
    tie, halves = data.draw(st.booleans()), data.draw(st.sampled_from(["block", "halves", "none"]))
    decisions = decisions_of(spec, quick(tie_qk=tie, gates=halves))
    shapes, removed = list(decisions.space.whole), np.zeros(len(decisions.widths))
    for w, width in enumerate(decisions.widths):
        count = data.draw(st.integers(1, width.size))
        shapes[width.block] = decisions.at(shapes[width.block], (width.block, width.part), count)
        removed[w] = 1 - count / width.size
        a = decisions.space.base.blocks[width.block].attention
        if width.part == "v" and a is not None and width.block in decisions.tied and a.qk_dim != a.v_dim:
            return  # widths that differ are rounded when they are cut
    is_open = [data.draw(st.booleans()) for _ in decisions.gates]
    shapes = decisions.gated(shapes, is_open)
    found = cost(decisions.space.spec(shapes))
    values, _, _ = decisions.shares(removed, np.where(is_open, 60.0, -60.0))
    assert values == pytest.approx([found.macs / cost(spec).macs, found.params / cost(spec).params], rel=1e-9)
    assert decisions.space.total(shapes) == {"macs": found.macs, "params": found.params}


@settings(max_examples=25, deadline=None)
@given(spec=specs(), data=st.data())
def test_late_in_the_search_the_cost_is_that_of_levels_that_the_finaliser_may_choose(
    spec: ModelSpec, data: st.DataObject
) -> None:
    decisions = decisions_of(spec, quick(align=data.draw(st.sampled_from([1, 2, 8]))))
    removed = np.array([data.draw(st.floats(0, 1)) * w.top for w in decisions.widths])
    shapes = list(decisions.space.whole)
    for w, width in enumerate(decisions.widths):
        levels = decisions.levels((width.block, width.part), decisions.align)
        count = min(levels, key=lambda level: (abs(level - width.size * (1 - removed[w])), level))
        shapes[width.block] = decisions.at(shapes[width.block], (width.block, width.part), count)
    values, slopes, _ = decisions.shares(removed, np.full(len(decisions.gates), 60.0), counts="levels")
    assert values[0] == pytest.approx(cost(decisions.space.spec(shapes)).macs / cost(spec).macs, rel=1e-9)
    assert (slopes <= 1e-12).all()


def test_nothing_removed_and_all_gates_open_costs_one() -> None:
    decisions = decisions_of(WIDE, quick())
    values, _, _ = decisions.shares(np.zeros(len(decisions.widths)), np.full(len(decisions.gates), 60.0))
    assert values == pytest.approx([1, 1], abs=1e-12)


@pytest.mark.parametrize(
    ("name", "total", "block", "stem"),
    [
        ("deit_tiny_patch16_224", 1_253_683_200, 8.1412, 2.3057),
        ("deit_small_patch16_224", 4_598_882_304, 8.2286, 1.2570),
        ("deit_base_patch16_224", 17_563_828_224, 8.2785, 0.6582),
    ],
)
def test_reference_totals_and_block_shares(name: str, total: int, block: float, stem: float) -> None:
    """The sheet's 2; its shares leave the classifier out."""
    found = cost(architecture(name))
    without_head = found.macs - found.head_macs
    assert found.macs == total
    assert 100 * found.blocks[0].macs / without_head == pytest.approx(block, abs=6e-5)
    assert 100 * found.stem_macs / without_head == pytest.approx(stem, abs=6e-5)


@settings(max_examples=25, deadline=None)
@given(spec=specs(), data=st.data())
def test_cost_falls_with_every_count_and_rises_with_every_gate(spec: ModelSpec, data: st.DataObject) -> None:
    decisions = decisions_of(
        spec, quick(gates=data.draw(st.sampled_from(["block", "halves"])), tie_qk=data.draw(st.booleans()))
    )
    share = st.floats(0, 1)
    removed = np.array([data.draw(share) * w.top for w in decisions.widths])
    logits = np.array([data.draw(st.floats(-4, 4)) for _ in decisions.gates])
    _, widths, gates = decisions.shares(removed, logits)
    assert (widths <= 1e-12).all()
    assert (gates >= -1e-12).all()


def test_one_of_several_counts_of_heads_saves_nothing_until_the_widest_head_is_narrower() -> None:
    """Counts by head are padded to the largest, and the cost says so."""
    decisions = decisions_of(WIDE, quick(count_per_head=True, gates="none"))
    one, both = np.zeros(len(decisions.widths)), np.zeros(len(decisions.widths))
    dims = decisions.index[(0, "v")]
    assert len(dims) == 2
    one[dims[0]] = both[dims] = 0.5
    nothing = np.zeros(0)
    assert decisions.shares(one, nothing)[0][0] == pytest.approx(1)
    assert decisions.shares(both, nothing)[0][0] < 1


@settings(max_examples=60, deadline=None)
@given(spec=specs(), data=st.data())
def test_the_finaliser_meets_every_reachable_budget_from_wherever_the_search_ended(
    spec: ModelSpec, data: st.DataObject
) -> None:
    """Law 7, and the sheet's 7 and 11, for any network, any limits in reach and any state of the search."""
    gates = data.draw(st.sampled_from(["block", "halves", "none"]))
    widths = gates == "none" or data.draw(st.booleans())
    names = data.draw(st.sampled_from([("macs",), ("params",), ("macs", "params"), ("file_bytes",), ("memory_bytes",)]))
    config = quick(
        gates=gates, widths=widths, tie_qk=data.draw(st.booleans()), align=data.draw(st.sampled_from([1, 2, 8]))
    )
    reference = cost(spec)
    probe = {"macs": Budget(max_macs=10**9), "params": Budget(max_params=10**9)}
    config = replace(config, budget=probe["macs" if "macs" in names else "params"])
    lowest = floor(spec, config)
    share = data.draw(st.floats(0, 1))
    limits = {n: math.floor(getattr(lowest, n) + share * (getattr(reference, n) - getattr(lowest, n))) for n in names}
    decisions = decisions_of(spec, config)
    removed = np.array([data.draw(st.floats(0, 1)) * w.top for w in decisions.widths])
    logits = np.array([data.draw(st.floats(-4, 4)) for _ in decisions.gates])
    layout = finalise(decisions, limits, removed, logits, losses_for(decisions))
    found = cost(decisions.space.spec(layout.choices))
    assert all(getattr(found, name) <= limit for name, limit in limits.items())
    near = tolerance(spec, config)
    slack = [
        limit - getattr(found, n) <= max(getattr(reference, n) / 100, near[n])
        or getattr(found, n) >= getattr(cost(decisions.space.base), n)
        for n, limit in limits.items()
    ]
    assert any(slack)
    for size, block in zip(layout.sizes, spec.blocks, strict=True):
        assert block.mlp is None or size.hidden >= 1
        assert block.attention is None or min(size.heads, size.qk, size.v) >= 1
        assert block.attention is None or size.heads <= block.attention.heads


def test_dims_and_units_are_multiples_of_eight_where_the_budget_can_be_met_so() -> None:
    spec = vit(width=32, blocks=4, heads=4, head_dim=32, hidden=128)
    decisions = decisions_of(spec, quick())
    layout = finalise(
        decisions,
        {"macs": cost(spec).macs // 2},
        np.full(len(decisions.widths), 0.37),
        np.full(len(decisions.gates), 3.0),
        losses_for(decisions),
    )
    assert all(shape.v % 8 == 0 and shape.hidden % 8 == 0 for shape in layout.choices)
    decisions = decisions_of(spec, quick(align=1))
    free = finalise(
        decisions,
        {"macs": cost(spec).macs // 2},
        np.full(len(decisions.widths), 0.37),
        np.full(len(decisions.gates), 3.0),
        losses_for(decisions),
    )
    assert any(shape.v % 8 or shape.hidden % 8 for shape in free.choices)


def test_what_the_search_decided_stands_where_it_meets_the_budget() -> None:
    """The finaliser moves nothing that needs no moving."""
    spec = vit(width=32, blocks=4, heads=4, head_dim=32, hidden=128)
    decisions = decisions_of(spec, quick())
    shapes = [Choice(heads=3, qk=32, v=24, hidden=64 + 8 * i) for i in range(4)]
    wanted = decisions.gated(shapes, [True, False, True, True])
    removed = np.zeros(len(decisions.widths))
    for w, width in enumerate(decisions.widths):
        removed[w] = 1 - getattr(shapes[width.block], width.part) / width.size
    limits = {"macs": cost(decisions.space.spec(wanted)).macs}
    layout = finalise(decisions, limits, removed, np.array([2.0, -2.0, 2.0, 2.0]), losses_for(decisions))
    assert list(layout.choices) == list(layout.before) == wanted


def test_dims_of_heads_that_go_do_not_count() -> None:
    """Two heads: the weaker goes and had lost nothing, the other lost three quarters: the block keeps a quarter."""
    config = quick(count_per_head=True, gates="none", align=1)
    decisions = decisions_of(WIDE, config)
    removed = np.zeros(len(decisions.widths))
    for w, width in enumerate(decisions.widths):
        if width.part == "heads":
            removed[w] = 0.5
        elif width.part == "v" and width.head == 1:
            removed[w] = 0.75
    ranks = {i: np.array([0, 1]) for i in range(3)}
    limits = {"macs": cost(WIDE).macs}
    layout = finalise(decisions, limits, removed, np.zeros(0), losses_for(decisions), ranks)
    assert [(shape.heads, shape.v) for shape in layout.before] == [(1, 4)] * 3
    other = finalise(
        decisions, limits, removed, np.zeros(0), losses_for(decisions), {i: np.array([1, 0]) for i in range(3)}
    )
    assert [(shape.heads, shape.v) for shape in other.before] == [(1, 16)] * 3
    gates = np.zeros(0)
    fewer, more = (decisions.shares(removed, gates, ranks=r)[0][0] for r in (ranks, None))
    assert fewer < more
