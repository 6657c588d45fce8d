"""What auto's report shows: its best plans, what it expected of each, and what they reached once built."""

from collections.abc import Mapping
from typing import Any

from vitrim.result import Column, Section, Table

PARTS = ("qk", "v", "hidden")


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
    plans = Table(title="Predicted and reached", lead=lead, columns=columns, rows=rows)
    return (plans, _by_block(told))


def _by_block(told: Mapping[str, Any]) -> Table:
    """The taken plan, block by block: what was cut, and how well it was foretold what that loses."""
    merged = {step["block"]: _kept(step) for step in told["steps"]}
    ratio = told["reached_kl"] / told["predicted_kl"] if told["predicted_kl"] else None
    order = told["rank_correlation"]
    lead = (
        "What each block became, as now of before, and what that adds to the divergence: predicted from it alone, and reached, with the "
        "blocks in front as they were built and those behind dense."
        + (f" In all {ratio:.2f} times the predicted divergence was reached." if ratio is not None else "")
        + (f" Rank correlation of predicted and reached over the blocks: {order:.2f}." if order is not None else "")
    )
    columns = (
        Column(heading="block"),
        *(Column(heading=name) for name in ("query-key dims", "value dims", "MLP units")),
        *((Column(heading="tokens kept"),) if merged else ()),
        Column(heading="predicted"),
        Column(heading="reached"),
    )
    rows = []
    for row in told["blocks"]:
        cells = [str(row["block"]), *(f"{now} of {was}" if was else "" for now, was in (row[part] for part in PARTS))]
        if merged:
            cells.append(merged.get(row["block"], ""))
        rows.append((*cells, row["predicted_kl"], row["reached_kl"]))
    return Table(title="Predicted and reached", caption="Block by block", lead=lead, columns=columns, rows=tuple(rows))


def _kept(step: Mapping[str, Any]) -> str:
    return f"{step['keep']}" + {"h": " columns", "v": " rows"}.get(step.get("axis", ""), "")


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
