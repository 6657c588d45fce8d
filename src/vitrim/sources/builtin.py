"""The trained models inside the package: artifacts under `assets/models/`."""

from __future__ import annotations

from pathlib import Path

from .. import artifact
from ..errors import SourceError, did_you_mean
from ..model import Vit

MODELS = Path(__file__).parent.parent / "assets" / "models"


def names(root: Path = MODELS) -> list[str]:
    """Names of the built-in models, sorted."""
    return sorted(path.parent.name for path in root.glob("*/config.json"))


def load(name: str, root: Path = MODELS) -> Vit:
    """A built-in model by name. Raises SourceError with the names that there are."""
    known = names(root)
    if name not in known:
        there = f"known: {', '.join(known)}" if known else "this installation has none; install vitrim again"
        raise SourceError(f"no built-in model {name!r}{did_you_mean(name, known)}; {there}.")
    model = artifact.load(root / name)
    model.provenance["source"] = f"builtin:{name}"  # the name that others load it by
    return model
