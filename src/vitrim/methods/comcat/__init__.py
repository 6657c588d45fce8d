"""`comcat`: low-rank products of attention and factorised MLPs. `run` says how."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vitrim import lazy
from vitrim.lazy import later
from vitrim.methods.comcat.config import ComcatConfig
from vitrim.methods.method import Method

if TYPE_CHECKING:
    from vitrim.methods.comcat.factors import factorise
    from vitrim.methods.comcat.run import (
        allocate,
        compress,
        floor,
        losses,
        plan,
        ranks_of,
        space_of,
        tolerance,
        with_ranks,
    )

__all__ = [
    "METHOD",
    "ComcatConfig",
    "allocate",
    "compress",
    "factorise",
    "floor",
    "losses",
    "plan",
    "ranks_of",
    "space_of",
    "tolerance",
    "with_ranks",
]

METHOD = Method(
    name="comcat",
    cuts="ranks of each head's query-key and value-output products, and of the MLP's linears",
    config=ComcatConfig,
    compress=later("vitrim.methods.comcat.run:compress"),
    plan=later("vitrim.methods.comcat.run:plan"),
    variants=("whitened", "svd"),
    sections=later("vitrim.methods.comcat.sections:sections"),
)

__getattr__, __dir__ = lazy.names(
    __name__,
    {name: "factors" if name == "factorise" else "run" for name in __all__ if name not in ("METHOD", "ComcatConfig")},
)
