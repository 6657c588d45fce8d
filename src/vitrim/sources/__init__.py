"""Where models come from: a name, a folder or a module in memory, each giving the one `Vit`.

`timm:NAME`, `hf-hub:USER/NAME` (a model of timm's on the Hub), `builtin:NAME`, a folder that vitrim saved, and
`hub:USER/NAME` (such a folder on the Hub; also without `hub:` where no folder has that name).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ArtifactError, SourceError, did_you_mean

if TYPE_CHECKING:
    from torch import nn

    from ..model import Vit
    from ..spec import Preprocess

FAMILIES = ("timm", "hf-hub", "builtin", "hub")
EXPECTED = "expected timm:NAME, hf-hub:USER/NAME, builtin:NAME, hub:USER/NAME or a folder that vitrim saved"


def load(
    name: str | Path,
    *,
    pretrained: bool = True,
    checkpoint: str | Path | None = None,
    classes: int | None = None,
    verify: bool = True,
) -> Vit:
    """A model in float32 on the CPU, in eval mode. Raises SourceError, or ArtifactError for a damaged folder.

    pretrained: False gives random weights.  checkpoint: a local file of weights for a `timm:` or `hf-hub:` name.
    classes: of the classifier; None takes what the weights have.  verify: compare with timm on a random image.
    """
    text = str(name)
    family, colon, rest = text.partition(":")
    if colon and family in ("timm", "hf-hub", "hf_hub"):
        from . import timm

        inner = rest if family == "timm" else f"hf-hub:{rest}"
        return timm.load(inner, pretrained=pretrained, checkpoint=checkpoint, classes=classes, verify=verify)
    if checkpoint is not None:
        raise SourceError(
            f"checkpoint={Path(checkpoint).name!r} with {text!r}: a checkpoint needs timm:NAME to say its shape."
        )
    model = _saved(text, family if colon else "", rest)
    if classes is not None and classes != (model.spec.classes or 0):
        raise SourceError(
            f"classes={classes}: {text!r} has {model.spec.classes or 0} classes. Leave classes out, or give the model a new head "
            "(`vitrim train --new-head`)."
        )
    if pretrained:
        return model
    from ..model import build

    return build(model.config)


def from_model(
    module: nn.Module,
    preprocess: Preprocess | None = None,
    *,
    labels: tuple[str, ...] | None = None,
    verify: bool = True,
) -> Vit:
    """A copy of a timm Vision Transformer from memory, such as a fine-tuned one; the caller's module stays as it is.

    preprocess: None takes what the module's `pretrained_cfg` says; a module without one gets none.
    labels: class names in the order of the logits.
    verify: run both on one random image; False trusts the classes of the module's parts.
    """
    from . import timm

    told: dict[str, Any] = {"source": f"a {type(module).__name__} from memory", "weights": "own"}
    return timm.from_module(module, preprocess=preprocess, labels=labels, verify=verify, provenance=told)


def _saved(text: str, family: str, rest: str) -> Vit:
    """A model that vitrim saved: in the package, in a folder, on the Hub."""
    from .. import artifact, hub
    from . import builtin

    if family == "builtin":
        return builtin.load(rest)
    if family == "hub":
        return hub.load_hub(rest)
    path = Path(text)
    if text and path.is_dir():  # an empty name would be the current folder
        return artifact.load(path)
    if path.is_file():
        raise SourceError(
            f"{text!r} is a file; {EXPECTED}. To load weights from a file, name its architecture too: "
            f"timm:NAME with checkpoint={path.name!r} (--checkpoint)."
        )
    if family and re.fullmatch(r"[a-z][\w-]+", family):
        raise SourceError(f"{text!r}: no source named {family!r}{did_you_mean(family, FAMILIES)}; {EXPECTED}.")
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", text):
        try:
            return hub.load_hub(text)
        except ArtifactError as error:
            raise SourceError(f"no folder {text!r} here, nor a model of vitrim's on the Hub: {error}") from error
    raise SourceError(f"no model {text!r}{_near(text)}; {EXPECTED}.")


def _near(text: str) -> str:
    from .. import architectures

    near = did_you_mean(text.partition(".")[0], architectures.names())
    return near.replace("'", "'timm:", 1)


__all__ = ["from_model", "load"]
