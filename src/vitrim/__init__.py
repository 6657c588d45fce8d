"""Compress Vision Transformers to a budget, recover them, and hand over ordinary networks.

Names are loaded when they are first used: `import vitrim` imports neither torch nor timm.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vitrim.artifact import save
    from vitrim.budget import Budget
    from vitrim.counting import cost
    from vitrim.hub import push
    from vitrim.methods import compress
    from vitrim.methods.auto import AutoConfig
    from vitrim.methods.comcat import ComcatConfig
    from vitrim.methods.dcvit import DcvitConfig
    from vitrim.methods.uvc import UvcConfig
    from vitrim.model import build
    from vitrim.objectives import train
    from vitrim.pipeline import RecoverConfig, recover, run, run_family
    from vitrim.sources import from_model, load
    from vitrim.spec import ModelSpec
    from vitrim.tasks.classification import evaluate
    from vitrim.timing import measure
    from vitrim.training import TrainConfig

__version__ = "0.1.0"

_HOMES = {
    "AutoConfig": "methods.auto",
    "Budget": "budget",
    "ComcatConfig": "methods.comcat",
    "DcvitConfig": "methods.dcvit",
    "ModelSpec": "spec",
    "RecoverConfig": "pipeline",
    "TrainConfig": "training",
    "UvcConfig": "methods.uvc",
    "build": "model",
    "compress": "methods",
    "cost": "counting",
    "evaluate": "tasks.classification",
    "from_model": "sources",
    "load": "sources",
    "measure": "timing",
    "push": "hub",
    "recover": "pipeline",
    "run": "pipeline",
    "run_family": "pipeline",
    "save": "artifact",
    "train": "objectives",
}

__all__ = [
    "AutoConfig",
    "Budget",
    "ComcatConfig",
    "DcvitConfig",
    "ModelSpec",
    "RecoverConfig",
    "TrainConfig",
    "UvcConfig",
    "__version__",
    "build",
    "compress",
    "cost",
    "evaluate",
    "from_model",
    "load",
    "measure",
    "push",
    "recover",
    "run",
    "run_family",
    "save",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        from vitrim.errors import did_you_mean

        raise AttributeError(f"module 'vitrim' has no attribute {name!r}{did_you_mean(name, _HOMES)}")
    return getattr(import_module(f"vitrim.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
