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
    assert f"keep-<a>: 88.8 % at {share}" in said
    assert f"keep-b: 80.0 % at {share}" in said
    assert "dense" in seen.text
    assert "cp -r 'all & one/keep-b' small" in said
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
