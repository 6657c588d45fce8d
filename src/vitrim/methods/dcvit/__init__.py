"""`dcvit`: whole attentions, MLP units and whole blocks, from a few unlabelled images. `run` says how."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vitrim import lazy
from vitrim.lazy import later
from vitrim.methods.dcvit.config import DcvitConfig
from vitrim.methods.method import Method

if TYPE_CHECKING:
    from vitrim.methods.dcvit.closed import allocate
    from vitrim.methods.dcvit.run import compress, compress_family
    from vitrim.methods.dcvit.structure import floor, narrowed, plan, solve, space_of, tolerance

__all__ = [
    "METHOD",
    "DcvitConfig",
    "allocate",
    "compress",
    "compress_family",
    "floor",
    "narrowed",
    "plan",
    "solve",
    "space_of",
    "tolerance",
]

METHOD = Method(
    name="dcvit",
    cuts="whole attentions, MLP units, whole blocks",
    config=DcvitConfig,
    compress=later("vitrim.methods.dcvit.run:compress"),
    plan=later("vitrim.methods.dcvit.structure:plan"),
    variants=("closed", "finetune"),
    family=later("vitrim.methods.dcvit.run:compress_family"),
    sections=later("vitrim.methods.dcvit.sections:sections"),
)

HOMES = {"allocate": "closed", "compress": "run", "compress_family": "run"}
__getattr__, __dir__ = lazy.names(
    __name__, {name: HOMES.get(name, "structure") for name in __all__ if name not in ("METHOD", "DcvitConfig")}
)
