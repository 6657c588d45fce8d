"""What DC-ViT's report shows: what each cut was expected to lose, or how well each block's trial recovered."""

from collections.abc import Mapping
from typing import Any

from vitrim.result import Column, Section, Table


def sections(facts: Mapping[str, Any]) -> tuple[Section, ...]:
    """facts: {report, history, start, dense}, of which report and history are read. Gives none where nothing was cut."""
    report = facts["report"]
    trials = [row for row in facts["history"] if row.get("stage") == "trial"]
    if trials:
        return (_trials(trials, report["order"], report["metric"]),)
    losses = tuple((str(row["block"]), row["predicted"]) for row in report["blocks"] if row.get("predicted"))
    if not losses:
        return ()
    lead = f"What the plan expected each cut alone to cost ({report['metric']}). A block that is not listed was left whole."
    columns = (Column(heading="block"), Column(heading="predicted"))
    return (Table(title="Predicted loss by block", lead=lead, columns=columns, rows=losses),)


def _trials(trials: list[dict[str, Any]], order: list[int], metric: str) -> Table:
    return Table(
        title="Trials",
        lead=f"How far the network was from the given one after its block was cut and tuned alone, on {metric}; less is better.",
        columns=(Column(heading="block"), Column(heading="mismatch"), Column(heading="cut as number")),
        rows=tuple(
            (str(i), row["mismatch"], order.index(i) + 1 if i in order else None)
            for row in trials
            for i in (row["block"],)
        ),
    )
