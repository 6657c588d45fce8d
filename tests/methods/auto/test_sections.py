"""What auto's report shows of its plans."""

from typing import Any

from vitrim.methods.auto.sections import sections
from vitrim.result import Table


def test_a_plan_shows_what_it_expected_beside_what_it_reached() -> None:
    best = {"width": [24, 32], "steps": [], "macs": 5000, "params": 400, "predicted_kl": 0.001, "reached_kl": 0.0012}
    other = best | {"width": [32, 32], "steps": [{"kind": "merge"}], "predicted_kl": 0.002, "reached_kl": 0.002}
    report = {**best, "metric": "KL, nats", "candidates": [best, other]}
    (table,) = sections({"report": report})
    assert isinstance(table, Table)
    assert table.lead.endswith("Both figures: KL, nats.")
    assert table.rows == (
        ("stream of 24 of 32 channels", 5000, 400, 0.001, 0.0012, "taken"),
        ("stream of 32 of 32 channels, 1 token step", 5000, 400, 0.002, 0.002, ""),
    )


def test_a_network_that_met_its_budget_has_no_plan_to_show() -> None:
    untouched: dict[str, Any] = {"predicted_kl": 0.0, "reached_kl": 0.0, "blocks": []}
    assert sections({"report": untouched}) == ()
