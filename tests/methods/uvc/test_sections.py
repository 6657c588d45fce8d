"""What UVC's report shows of a search."""

from typing import Any

import pytest

from vitrim.methods.uvc.sections import PLOTTED, sections
from vitrim.result import Curve, Section, Table


def row(step: int) -> dict[str, Any]:
    return {
        "step": step,
        "cost": {"macs": 1 - step / 80},
        "budget": {"macs": 0.5},
        "z": {"macs": step / 40},
        "removed": {
            "heads": {"block 1": 0.1, "block 3": 0.2},
            "v": {"block 1 head 0": 0.0, "block 1 head 1": step / 50},
            "hidden": {"block 0": 0.5, "block 1": 0.5},
        },
        "y": {"heads": {"block 1": 1.0, "block 3": 3.0}, "v": {}, "hidden": {"block 0": 0.5}},
        "gates": {"block 1": 0.9, "block 3 mlp": 0.98},
    }


def shown(steps: range, *, start: int = 100, **report: Any) -> tuple[Section, ...]:
    told: dict[str, Any] = {
        "saving": {"macs": {"share": 0.5, "widths": 0.75, "skipping": 0.25}},
        "finaliser": {"macs": {"cut": 0.0125}},
        "search": {"ended": "converged", "judged": "2 changes of side"},
    }
    costs = {"start": {"macs": start, "params": 50}, "dense": {"macs": 100, "params": 50}}
    return sections({"report": told | report, "history": [row(step) for step in steps], **costs})


def curves(found: tuple[Section, ...]) -> dict[str, dict[str, tuple[tuple[float, float], ...]]]:
    return {
        curve.caption: {line.name: line.points for line in curve.series} for curve in found if isinstance(curve, Curve)
    }


def saving(found: tuple[Section, ...]) -> list[Any]:
    (table,) = (section for section in found if isinstance(section, Table))
    assert [column.heading for column in table.columns] == ["", "MACs"]
    return [value for _, value in table.rows]


def test_a_search_is_plotted_with_its_budget_and_its_decisions() -> None:
    found = shown(range(20, 60, 20))
    assert {section.title for section in found} == {"How the search went"}
    assert found[0].lead == "How it ended: converged (2 changes of side)."
    assert not any(section.lead for section in found[1:])
    drawn = curves(found)
    assert drawn["MACs against the budget"] == {
        "MACs of the search": ((20, 0.75), (40, 0.5)),
        "budget": ((20, 0.5), (40, 0.5)),
    }
    assert drawn["Price of the budget (dual variable)"] == {"for macs": ((20, 0.5), (40, 1.0))}
    assert set(drawn["Share of heads removed"]) == {"block 1", "block 3"}
    assert drawn["Share of value dims removed"]["block 1 head 1"] == ((20, 0.4), (40, 0.8))
    assert drawn["Probability that it stays"]["block 3 mlp"][-1] == (40, 0.98)
    weights = drawn["Weight of what is removed (dual variables), mean over blocks"]
    assert weights == {"heads": ((20, 2.0), (40, 2.0)), "MLP units": ((20, 0.5), (40, 0.5))}


def test_where_the_saving_came_from_is_said_of_the_dense_network() -> None:
    assert saving(shown(range(20, 60, 20))) == [0.5, 0.0, 0.75, 0.25, 0.0125]
    behind = shown(range(20, 60, 20), start=80)  # another method had cut a fifth before
    assert saving(behind) == pytest.approx([0.6, 1 / 3, 0.5, 1 / 6, 0.01])
    assert curves(behind)["MACs against the budget"]["budget"][0] == (20, 0.4)


def test_a_search_too_short_to_draw_is_said_and_none_is_not() -> None:
    (table,) = shown(range(20, 40, 20))
    assert isinstance(table, Table)
    assert "converged" in table.lead
    assert sections({"report": {"within_budget": True}, "history": [], "start": {}, "dense": {}}) == ()


def test_a_long_search_is_thinned_and_keeps_its_last_step() -> None:
    points = curves(shown(range(0, 2000)))["MACs against the budget"]["budget"]
    assert len(points) <= PLOTTED + 1
    assert points[-1][0] == 1999
