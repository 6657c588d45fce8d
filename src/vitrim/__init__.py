"""Compress Vision Transformers to a budget, recover them, and hand over ordinary networks.

Names are loaded when they are first used: `import vitrim` imports neither torch nor timm.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vitrim import lazy

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
    from vitrim.pipeline import RecoverConfig, recover, run, run_family
    from vitrim.sources import from_model, load
    from vitrim.spec import ModelSpec
    from vitrim.tasks.classification import evaluate
    from vitrim.timing import measure
    from vitrim.training.config import TrainConfig
    from vitrim.training.objectives import train

__version__ = "0.1.0"

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

__getattr__, __dir__ = lazy.names(
    __name__,
    {
        "AutoConfig": "methods.auto",
        "Budget": "budget",
        "ComcatConfig": "methods.comcat",
        "DcvitConfig": "methods.dcvit",
        "ModelSpec": "spec",
        "RecoverConfig": "pipeline",
        "TrainConfig": "training.config",
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
        "train": "training.objectives",
    },
)
