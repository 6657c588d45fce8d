"""What COMCAT's report shows: how much of each group's energy its rank lost, by block."""

from collections.abc import Mapping
from typing import Any

from vitrim.result import Column, Section, Table

PARTS = {"qk": "queries and keys", "vo": "values and out", "fc1": "fc1", "fc2": "fc2"}


def sections(facts: Mapping[str, Any]) -> tuple[Section, ...]:
    """facts: {report, history, start, dense}, of which the report is read. Gives none where no rank was cut."""
    groups = facts["report"].get("groups") or ()
    cut = {group["part"] for group in groups if group["rank"] is not None}
    if not cut:
        return ()
    parts = [part for part in PARTS if part in cut]
    lost = {(group["block"], group["part"]): 1 - group["energy_kept"] for group in groups if group["rank"] is not None}
    blocks = sorted({group["block"] for group in groups})
    return (
        Table(
            title="Energy lost",
            lead="The share of each product's squared spectrum, weighted by its inputs where images were given, that its rank left out; "
            "a dash was left whole.",
            columns=(Column(heading="block"), *(Column(heading=PARTS[part]) for part in parts)),
            rows=tuple((str(block), *(lost.get((block, part)) for part in parts)) for block in blocks),
        ),
    )
