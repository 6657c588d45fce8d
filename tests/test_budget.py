"""Budgets: ranges, combinations, and the refusal with the reachable range."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.specs import vit
from vitrim.budget import Budget, exceeded, least_share
from vitrim.counting import cost
from vitrim.errors import BudgetError


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "no limit given"),
        ({"keep_mac": 0.5}, "unknown key 'keep_mac'; did you mean 'keep_macs'[?] Known: keep_macs, keep_params, "),
        ({"keep_macs": 0}, r"keep_macs=0; expected a share in \(0, 1\]"),
        ({"keep_macs": 50}, "To keep half, pass 0.5"),
        ({"keep_params": float("nan")}, "keep_params=nan"),
        ({"keep_params": True}, "keep_params=True"),
        ({"max_macs": -1}, "expected a number above 0"),
        ({"max_latency_ms": 5.0}, "no method here meets this kind"),
        ({"keep_expected_macs": 0.5}, "no method here meets this kind"),
    ],
)
def test_a_budget_out_of_range_is_refused(fields: dict[str, float], message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        Budget(**fields)


def test_limits_combine_and_the_tighter_one_counts() -> None:
    reference = cost(vit())
    budget = Budget(keep_macs=0.5, max_macs=10, keep_params=0.25, max_memory_mb=1.5, max_file_mb=0.5)
    assert budget.limits(reference) == {
        "macs": 10,
        "params": int(0.25 * reference.params),
        "memory_bytes": 1_500_000,
        "file_bytes": 500_000,
    }
    assert Budget(keep_macs=0.5, max_macs=10**12).limits(reference)["macs"] == int(0.5 * reference.macs)


def test_an_unreachable_budget_is_refused_with_the_range() -> None:
    reference = cost(vit())
    floor = cost(replace(vit(), blocks=(replace(vit().blocks[0], attention=None),) * 2))
    with pytest.raises(BudgetError) as refusal:
        Budget(keep_macs=0.01).refuse_unreachable(floor=floor, reference=reference, method="test")
    assert f"reaches {floor.macs:,} to {reference.macs:,}" in str(refusal.value)
    Budget(keep_macs=1.0).refuse_unreachable(floor=floor, reference=reference, method="test")


def test_a_refusal_names_a_limit_in_megabytes_as_it_is_given_and_that_limit_is_met() -> None:
    whole, floor = (cost(replace(vit(), blocks=vit().blocks[:count])) for count in (2, 1))
    for name in ("file", "memory"):
        with pytest.raises(BudgetError) as refusal:
            Budget(**{f"max_{name}_mb": 0.0001}).refuse_unreachable(floor=floor, reference=whole, method="test")
        said = f"max_{name}_mb 0.0001 asked, test reaches "
        least = str(refusal.value).partition(said)[2].partition(" to ")[0]
        assert float(least) * 1e6 == pytest.approx(getattr(floor, f"{name}_bytes"))
        Budget(**{f"max_{name}_mb": float(least)}).refuse_unreachable(floor=floor, reference=whole, method="test")


@given(count=st.integers(1, 10**11))
def test_megabytes_of_six_decimals_are_whole_bytes(count: int) -> None:
    assert Budget(max_file_mb=float(f"{count / 1e6:.6f}")).limits(cost(vit()))["file_bytes"] == count


def test_shares_are_of_the_named_network_whatever_a_method_is_given() -> None:
    """As where an exact tail makes what a method is given cheaper than the model that was passed in."""
    whole, given = cost(vit()), cost(replace(vit(), blocks=vit().blocks[:1]))
    budget = Budget(keep_macs=0.5, max_file_mb=0.01).of(whole)
    assert budget.limits(given) == {"macs": int(0.5 * whole.macs), "file_bytes": 10_000}
    assert budget.to_dict() == {"keep_macs": 0.5, "max_file_mb": 0.01}
    assert replace(budget, keep_macs=0.25).limits(given)["macs"] == int(0.25 * whole.macs)


@given(part=st.integers(1, 10**9), whole=st.integers(10**9, 10**12))
def test_the_share_that_a_refusal_names_is_met_and_is_near_the_least(part: int, whole: int) -> None:
    share = least_share(part, whole)
    assert math.floor(share * whole) >= part
    assert share <= 1.011 * part / whole
    assert float(f"{share:g}") == share


def test_met_by_compares_every_limited_resource() -> None:
    reference = cost(vit())
    assert Budget(keep_macs=1.0, keep_params=1.0).met_by(reference, reference)
    assert not Budget(keep_macs=1.0, keep_params=0.9).met_by(reference, reference)
    assert exceeded(reference, {"params": 1, "macs": reference.macs}) == ["params"]
