"""What auto's report shows: its best plans, what it expected of each, and what they reached once built."""

from collections.abc import Mapping
from typing import Any

from vitrim.result import Column, Section, Table


def sections(facts: Mapping[str, Any]) -> tuple[Section, ...]:
    """facts: {report, history, start, dense}, of which the report is read."""
    told = facts["report"]
    if not told.get("candidates"):
        return ()
    columns = (
        Column(heading="plan"),
        Column(heading="MACs", format="count"),
        Column(heading="parameters", format="count"),
        Column(heading="predicted"),
        Column(heading="reached"),
        Column(heading=""),
    )
    lead = (
        "The best plans, built and compared on images held out from their fit; the best was then fitted anew on all of "
        f"them. Both figures: {told['metric']}."
    )
    rows = tuple(_row(one, told) for one in told["candidates"])
    return (Table(title="Predicted and reached", lead=lead, columns=columns, rows=rows),)


def _row(one: Mapping[str, Any], told: Mapping[str, Any]) -> tuple[float | str | None, ...]:
    now, was = one["width"]
    merged = len(one["steps"])
    steps = f", {merged} token step{'s' if merged > 1 else ''}" if merged else ""
    taken = all(one[key] == told[key] for key in ("predicted_kl", "reached_kl"))
    return (
        f"stream of {now} of {was} channels{steps}",
        one["macs"],
        one["params"],
        one["predicted_kl"],
        one["reached_kl"],
        "taken" if taken else "",
    )
