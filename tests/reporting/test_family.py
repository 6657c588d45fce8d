"""The page of a family: every figure is the summary's own, and each point is in the plots."""

from typing import Any

import pytest

from tests.reporting.reading import Page
from vitrim.reporting import family, figures


@pytest.fixture
def summary(result: dict[str, Any]) -> dict[str, Any]:
    other = {**result, "metrics": {**result["metrics"], "recovered": {"top1": 0.8}}}
    return family.summary({"keep-<a>": result, "keep-b": other}, name="all & one")


def test_every_figure_is_the_summarys_own(summary: dict[str, Any]) -> None:
    shown = Page(family.render(summary)).of("data")
    assert len(shown) > 15
    for at in shown:
        value = figures.lookup(summary, at["data-path"] or "")
        assert value is not None
        assert at["value"] == repr(value)


def test_each_member_is_a_point_and_its_name_is_escaped(summary: dict[str, Any]) -> None:
    seen = Page(family.render(summary))
    said = "".join(seen.text)
    share = figures.percent(summary["members"][0]["kept_macs"])
    assert f"keep-<a>: 88.8 % (86.8 % to 90.4 %) at {share}" in said
    assert f"keep-b: 80.0 % (77.6 % to 82.2 %) at {share}" in said
    assert "dense" in seen.text
    assert "cp -r 'all & one/keep-<a>' small" in said
    assert [at["href"] for at in seen.of("a")] == [
        "./keep-<a>/report.html",
        "./keep-b/report.html",
    ]  # no name is read as a scheme
    assert len(seen.of("circle")) == 6  # two members and the dense model, against operations and time


def test_without_a_quality_or_times_there_is_a_table_alone(summary: dict[str, Any]) -> None:
    members = [{**row, "speed": []} for row in summary["members"]]
    assert len(Page(family.render({**summary, "members": members})).of("svg")) == 1
    seen = Page(family.render({**summary, "quality": None, "members": members}))
    assert not seen.of("svg")
    assert "quality, final" in "".join(seen.text)
    assert "measured of ideal speed" not in "".join(seen.text)  # no empty column


def of(name: str, macs: int, low: float | None) -> dict[str, Any]:
    return {
        "name": name,
        "macs": macs,
        "difference": None if low is None else {"points": low + 1, "low": low, "high": 3.0},
    }


def test_the_smallest_member_that_surely_lost_little_is_offered_else_the_largest() -> None:
    rows = [of("a", 3, -0.5), of("b", 2, -1.9), of("c", 1, -2.1)]
    assert family.pick({"members": rows}) == ("b", "the smallest that has surely lost less than 2 points")
    for few in ([of("a", 3, -12.0), of("b", 2, -12.0)], [of("a", 3, None), of("b", 2, None)]):
        assert family.pick({"members": few}) == ("a", "the largest: for none is a loss below 2 points sure")


def test_the_page_offers_what_the_command_offers(summary: dict[str, Any]) -> None:
    name, why = family.pick(summary)
    said = "".join(Page(family.render(summary)).text)
    assert f"{name} is {why}" in said
    assert family.command("cp", "-r", f"all & one/{name}", "small") in said
