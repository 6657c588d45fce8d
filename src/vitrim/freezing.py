"""Named parts that a compression leaves as they are: `blocks.0-2,blocks.11.attention`. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterable

from .errors import ConfigError
from .spec import ModelSpec

HALVES = ("attention", "mlp")
Half = tuple[int, str]
"""A block's number, and "attention" or "mlp"."""


def frozen(spec: ModelSpec, names: Iterable[str]) -> frozenset[Half]:
    """The halves that the names mean, as (block, "attention" | "mlp").

    names: `blocks.I`, `blocks.I-J`, each with `.attention` or `.mlp` behind it for one half only.
    Raises ConfigError for a name of another form, a block that is not there, or a half that is gone already.
    """
    found: set[Half] = set()
    for name in names:
        match = re.fullmatch(r"blocks\.(\d+)(?:-(\d+))?(?:\.(attention|mlp))?", name.strip())
        if match is None:
            raise ConfigError(
                f"freeze={name!r}; expected blocks.I, blocks.I-J, blocks.I.attention or blocks.I.mlp, such as blocks.0-2."
            )
        first, last = int(match[1]), int(match[2] or match[1])
        if first > last or last >= len(spec.blocks):
            raise ConfigError(f"freeze={name!r}: the model has blocks 0 to {len(spec.blocks) - 1}, first before last.")
        halves = (match[3],) if match[3] else HALVES
        there = {
            (i, half) for i in range(first, last + 1) for half in halves if getattr(spec.blocks[i], half) is not None
        }
        if not there:
            raise ConfigError(f"freeze={name!r}: that part is gone from the model already; leave it out.")
        found |= there
    return frozenset(found)
