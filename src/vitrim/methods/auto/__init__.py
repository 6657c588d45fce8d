"""`auto`: one plan over all axes under one budget, by closed forms. `run` says how."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vitrim import lazy
from vitrim.lazy import later
from vitrim.methods.auto.config import AXES, AutoConfig
from vitrim.methods.method import Method

if TYPE_CHECKING:
    from vitrim.methods.auto.choose import floor, plan, tolerance
    from vitrim.methods.auto.run import compress, compress_family, predict

__all__ = ["AXES", "METHOD", "AutoConfig", "compress", "compress_family", "floor", "plan", "predict", "tolerance"]

METHOD = Method(
    name="auto",
    cuts="every axis at once: ranks, MLP units, attentions, blocks, the width of the stream, tokens",
    config=AutoConfig,
    compress=later("vitrim.methods.auto.run:compress"),
    plan=later("vitrim.methods.auto.choose:plan"),
    family=later("vitrim.methods.auto.run:compress_family"),
    predict=later("vitrim.methods.auto.run:predict"),
    sections=later("vitrim.methods.auto.sections:sections"),
)

__getattr__, __dir__ = lazy.names(
    __name__,
    dict.fromkeys(("floor", "plan", "tolerance"), "choose")
    | dict.fromkeys(("compress", "compress_family", "predict"), "run"),
)
