"""What a compression or a recovery gives: the smaller network with its history, and what a report shows of it.

Torch is needed where a network is saved, not to describe a table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vitrim.codec import plain
from vitrim.errors import ConfigError

if TYPE_CHECKING:
    from vitrim.model import Vit
    from vitrim.spec import ModelSpec, Selection

Format = Literal["plain", "whole", "count", "percent", "signed", "seconds", "ms", "times", "megabytes"]
"""How a number is shown: 0.0312, 1 024, 83.6 M, 12.5 % of a share, +1.5, 3 min 20 s, 1.25 ms, 1.87×, 4.8 MB of bytes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Column:
    heading: str
    format: Format = "plain"
    """Of the column's numbers; words are shown as they are."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """Figures of a method, for the report of its run."""

    title: str
    """The heading. Neighbours of one title stand under one heading."""
    caption: str = ""
    """What this one shows, where several share a title."""
    lead: str = ""
    """A sentence or two below the heading."""
    columns: tuple[Column, ...]
    rows: tuple[tuple[float | str | None, ...], ...]
    """A cell for each column, the first of which names the row; None: no figure."""

    def __post_init__(self) -> None:
        for index, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise ConfigError(
                    f"table {self.title!r}: row {index} has {len(row)} cells; expected {len(self.columns)}, one for each column."
                )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"kind": "table", **plain(self)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Axis:
    label: str = ""
    format: Format = "plain"
    bounds: tuple[float, float] | None = None
    """Where it begins and ends; None: across from 0 to the last point, up around the values."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """One line. A single point is drawn as a dot."""

    name: str
    points: tuple[tuple[float, float], ...]
    style: Literal["line", "marked", "dashed"] = "line"
    """marked: a dot at each point.  dashed: what is aimed at or compared with."""
    named: bool = False
    """Whether its name stands beside it; else it shows when pointed at, and to screen readers."""

    spread: tuple[tuple[float, float], ...] = ()
    """The interval of each point's value, drawn as a whisker; empty: none is known."""

    def __post_init__(self) -> None:
        if not self.points:
            raise ConfigError(f"series {self.name!r} has no points; expected one or more. Leave it out.")
        if self.spread and len(self.spread) != len(self.points):
            raise ConfigError(
                f"series {self.name!r} has {len(self.spread)} intervals; expected {len(self.points)}, one for each point."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """One chart of a method, for the report of its run. title, caption, lead: as a table's."""

    title: str
    caption: str = ""
    lead: str = ""
    x: Axis
    y: Axis
    series: tuple[Series, ...]

    def __post_init__(self) -> None:
        if not self.series:
            raise ConfigError(
                f"curve {self.caption or self.title!r} has no series; expected one or more. Leave it out."
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"kind": "curve", **plain(self)}


Section = Table | Curve

OWN = (
    "license",
    "method",
    "variant",
    "config",
    "data",
    "seed",
    "product",
    "metrics",
    "steps",
    "seconds",
    "recipe",
    "recovery",
    "history",
    "report",
)
"""Keys of a provenance that tell of one network's own weights, beside `sha256`, `versions` and `parent`: one cut from it has others."""


def descended(told: Mapping[str, Any], spec: ModelSpec, name: str | None = None) -> dict[str, Any]:
    """The provenance of a network that is made from another: where it comes from, and nothing that was another's own.

    told, spec: the other's. name: what it was asked for as; None: as it says itself. `original` holds the first ancestor's source,
    spec, licence and figures, handed down from cut to cut, so that shares can be of it.
    """
    inherited = {key: value for key, value in told.items() if key not in (*OWN, "sha256", "versions", "parent")}
    source = name if name is not None and ":" in name else told.get("source")  # one that others can load says more
    known = {key: told[key] for key in ("license", "metrics", "sha256") if key in told}
    first = {"source": name or told.get("source") or "a model in memory", "spec": spec.to_dict(), **known}
    return {**inherited, "source": source or first["source"], "original": told.get("original") or first}


@dataclass(frozen=True, kw_only=True)
class Compressed:
    """A compressed model. history: one dict for each step of the search. report: what the method says of its choice."""

    model: Vit
    method: str
    variant: str
    history: list[dict[str, Any]] = field(default_factory=list)
    report: dict[str, Any] = field(default_factory=dict)

    @property
    def spec(self) -> ModelSpec:
        return self.model.spec

    @property
    def selection(self) -> Selection:
        return self.model.selection

    def save(self, folder: str | Path, *, provenance: Mapping[str, Any] | None = None, force: bool = False) -> Path:
        """Write the artifact folder, which says what the model was cut from, how, and with which figures of its own.

        Raises ArtifactError when it exists and `force` is not set.
        """
        from vitrim import artifact

        return artifact.save(self, folder, provenance=provenance, force=force)
