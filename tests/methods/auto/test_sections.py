"""What auto's report shows of its plans."""

from typing import Any

from vitrim.methods.auto.sections import sections
from vitrim.result import Table


def test_a_plan_shows_what_it_expected_beside_what_it_reached() -> None:
    best = {"width": [24, 32], "steps": [], "macs": 5000, "params": 400, "predicted_kl": 0.001, "reached_kl": 0.0012}
    other = best | {"width": [32, 32], "steps": [{"kind": "merge"}], "predicted_kl": 0.002, "reached_kl": 0.002}
    block = {"block": 0, "qk": [4, 8], "v": [8, 8], "hidden": [0, 0], "predicted_kl": 0.001, "reached_kl": 0.0012}
    told = {"blocks": [block], "rank_correlation": None}
    report = {**best, **told, "metric": "KL, nats", "candidates": [best, other]}
    table, by_block = sections({"report": report})
    assert isinstance(table, Table)
    assert isinstance(by_block, Table)
    assert by_block.rows == (("0", "4 of 8", "8 of 8", "", 0.001, 0.0012),)
    assert by_block.lead.endswith("In all 1.20 times the predicted divergence was reached.")
    assert table.lead.endswith("Both figures: KL, nats.")
    assert table.rows == (
        ("stream of 24 of 32 channels", 5000, 400, 0.001, 0.0012, "taken"),
        ("stream of 32 of 32 channels, 1 token step", 5000, 400, 0.002, 0.002, ""),
    )


def test_what_merges_is_shown_where_it_does_and_the_order_of_the_blocks_is_compared() -> None:
    blocks = [
        {"block": i, "qk": [4, 8], "v": [8, 8], "hidden": [2, 9], "predicted_kl": p, "reached_kl": 2 * p}
        for i, p in enumerate((0.1, 0.2, 0.3))
    ]
    steps = [{"kind": "merge", "block": 0, "axis": "h", "keep": 3}, {"kind": "similarity", "block": 2, "keep": 5}]
    one = {"width": [8, 8], "steps": steps, "macs": 5, "params": 4, "predicted_kl": 0.6, "reached_kl": 1.2}
    told = {**one, "blocks": blocks, "rank_correlation": 1.0, "metric": "KL, nats", "candidates": [one]}
    table = sections({"report": told})[1]
    assert isinstance(table, Table)
    assert [row[4] for row in table.rows] == ["3 columns", "", "5"]
    assert table.lead.endswith("Rank correlation of predicted and reached over the blocks: 1.00.")


def test_a_network_that_met_its_budget_has_no_plan_to_show() -> None:
    untouched: dict[str, Any] = {"predicted_kl": 0.0, "reached_kl": 0.0, "blocks": []}
    assert sections({"report": untouched}) == ()
