"""`uvc`: widths and skipping searched under one budget while the weights learn. `run` says how."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vitrim import lazy
from vitrim.lazy import later
from vitrim.methods.method import Method
from vitrim.methods.uvc.config import PRESETS, Rules, UvcConfig

if TYPE_CHECKING:
    from vitrim.methods.uvc.run import check, compress, floor, plan, tolerance

__all__ = ["METHOD", "PRESETS", "Rules", "UvcConfig", "check", "compress", "floor", "plan", "tolerance"]

METHOD = Method(
    name="uvc",
    cuts="heads, dims in a head, MLP units and whole blocks, searched together while the weights learn",
    config=UvcConfig,
    compress=later("vitrim.methods.uvc.run:compress"),
    plan=later("vitrim.methods.uvc.run:plan"),
    check=later("vitrim.methods.uvc.run:check"),
    takes_teacher=True,
    sections=later("vitrim.methods.uvc.sections:sections"),
)

HOMES = {"Controller": "controller", "Width": "controller", "Decisions": "decisions", "Search": "objective"}
__getattr__, __dir__ = lazy.names(__name__, dict.fromkeys(__all__, "run") | HOMES)
