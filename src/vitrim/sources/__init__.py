"""Where models come from: a name, a folder or a module in memory, each giving the one `Vit`; and back where it fits.

`timm:NAME`, `hf-hub:USER/NAME` (a model of timm's on the Hub), `hf:NAME_OR_FOLDER` (transformers), `torchvision:NAME`,
`t2t:NAME`, `builtin:NAME`, a folder that vitrim saved, and `hub:USER/NAME` (such a folder on the Hub; also without `hub:`
where no folder has that name).

A family refuses by its name whatever the spec cannot say: parts are recognised by their class, a changed forward by running
both networks on a random image, and every number of the module must have found its place.
"""

from __future__ import annotations

import logging
import os
import re
import tempfile
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ArtifactError, ConfigError, SourceError, did_you_mean
from ..files import is_marked, locked, names_in, refuse_foreign, replace_within
from ..spec import sides

if TYPE_CHECKING:
    from torch import nn

    from ..model import Vit
    from ..spec import ModelSpec, Preprocess

LOG = logging.getLogger("vitrim.sources")

FOREIGN = {
    "timm": "timm",
    "hf-hub": "timm",
    "hf_hub": "timm",
    "hf": "huggingface",
    "torchvision": "torchvision",
    "t2t": "t2t",
}
"""Module of this package by the family that a name begins with."""
FORMATS = {"timm": "timm", "hf": "huggingface", "torchvision": "torchvision", "t2t": "t2t"}
"""Module of this package that writes a family's own checkpoint."""
EXPORTED = r"config\.json|preprocessor_config\.json|model.*\.safetensors(\.index\.json)?"
"""The files of an export that is a folder."""
FAMILIES = (*FOREIGN, "builtin", "hub")
MOST_CLASSES = 1 << 20
"""Far more than any published classifier has."""
EXPECTED = (
    "expected timm:NAME, hf:NAME_OR_FOLDER, torchvision:NAME, t2t:NAME, hf-hub:USER/NAME, builtin:NAME, hub:USER/NAME or a "
    "folder that vitrim saved"
)


def load(
    name: str | Path,
    *,
    pretrained: bool = True,
    checkpoint: str | Path | None = None,
    checkpoint_key: str | None = None,
    classes: int | None = None,
    image_px: int | tuple[int, int] | None = None,
    verify: bool = True,
) -> Vit:
    """A model in float32 on the CPU, in eval mode. Raises SourceError, or ArtifactError for a damaged folder.

    pretrained: False gives random weights.  checkpoint: a local file of weights instead; its classifier is kept whatever
    its size.  checkpoint_key: path of the weights in it, such as `teacher.backbone`, where it holds several sets (None takes
    the averaged one, or asks); `.` is the outermost set.  classes: None takes what the weights have; another number is refused unless the weights are random, but 0
    drops the classifier, which changes no other number.  verify: compare with the foreign module on a random image.
    image_px: the size of the images it is to run at, height and width or one number for both; positions are resized to it
    once, in float32, from the size that they were made for. A checkpoint may then be of another size than the name's, which
    is refused without: of a square one, or of the very size.
    """
    _check_kinds(name, checkpoint, checkpoint_key, classes)
    size = None if image_px is None else sides(image_px)
    given: dict[str, Any] = {"pretrained": pretrained, "checkpoint": checkpoint, "checkpoint_key": checkpoint_key}
    model = _loaded(str(name), **given, classes=classes, verify=verify, image_px=size)
    if size is not None:
        from ..surgery import with_own_positions

        model = with_own_positions(model, size)
    if any(model.spec.unread_px):
        down, right = model.spec.unread_px
        LOG.warning(
            "%s: no patch covers the last %d px at the bottom and %d px at the right: they are not read.",
            name,
            down,
            right,
        )
    return model


def _check_kinds(name: Any, checkpoint: Any, checkpoint_key: Any, classes: Any) -> None:
    """Raises ConfigError for arguments of another type, which nothing behind here looks at."""
    path = (str, os.PathLike)
    kinds = {
        "name": (name, isinstance(name, path), "a name or a folder; a module goes to vitrim.from_model"),
        "checkpoint": (checkpoint, checkpoint is None or isinstance(checkpoint, path), "the path of a file of weights"),
        "checkpoint_key": (checkpoint_key, checkpoint_key is None or isinstance(checkpoint_key, str), "a text"),
    }
    for key, (value, fits, expected) in kinds.items():
        if not fits:
            raise ConfigError(f"{key} is a {type(value).__name__}; expected {expected}.")
    if classes is not None and (type(classes) is not int or not 0 <= classes <= MOST_CLASSES):
        raise ConfigError(f"classes={classes!r}; expected a whole number from 0 to {MOST_CLASSES}.")


def _loaded(
    text: str,
    *,
    pretrained: bool,
    checkpoint: str | Path | None,
    checkpoint_key: str | None,
    classes: int | None,
    verify: bool,
    image_px: tuple[int, int] | None,
) -> Vit:
    """The model at the size that its weights were made for.  image_px: the size asked for; None: that of the name."""
    family, colon, rest = text.partition(":")
    if checkpoint_key is not None and checkpoint is None:
        raise SourceError(
            f"checkpoint_key={checkpoint_key!r} without a checkpoint: it says which weights of a file are meant. Pass the file too "
            "(checkpoint=, --checkpoint PATH)."
        )
    if colon and family in FOREIGN:
        inner = f"hf-hub:{rest}" if family in ("hf-hub", "hf_hub") else rest
        model: Vit = _source(FOREIGN[family]).load(
            inner,
            pretrained=pretrained,
            checkpoint=checkpoint,
            checkpoint_key=checkpoint_key,
            classes=classes,
            verify=verify,
            image_px=image_px,
        )
        if checkpoint_key is not None:
            model.provenance = {**model.provenance, "checkpoint_key": checkpoint_key}
        return _finite(model, text if checkpoint is None else Path(checkpoint).name)
    if checkpoint is not None:
        raise SourceError(
            f"checkpoint={Path(checkpoint).name!r} with {text!r}: a checkpoint needs a name such as timm:NAME to say its shape."
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
    """A copy of a Vision Transformer from memory, such as a fine-tuned one; the caller's module stays as it is.

    module: of timm, transformers, torchvision or T2T-ViT, or a subclass that computes the same; in wrappers (compiled, data
    parallel, averaged) or with more around it, where it is the only Vision Transformer inside: what is left is told in the log.
    preprocess: None takes what the module itself says; a module that says nothing gets none.
    labels: class names in the order of the logits; None takes the module's own, if it has any.
    verify: run both on one random image; False trusts the classes of the module's parts.
    """
    from . import inside

    module, family = inside.found(module)
    told: dict[str, Any] = {"source": f"a {type(module).__name__} from memory", "weights": "own"}
    model = _source(family).from_module(module, preprocess=preprocess, labels=labels, verify=verify, provenance=told)
    return _finite(model, type(module).__name__)


def _finite(model: Vit, name: str) -> Vit:
    """The same. Raises SourceError that names a tensor with numbers that are none."""
    from ..model import not_finite

    if (bad := not_finite(model.state_dict())) is not None:
        raise SourceError(
            f"{name}: {bad}; expected finite weights. Take a checkpoint from before, or download it again."
        )
    return model


def describe(name: str) -> ModelSpec:
    """The spec of a model of transformers from its configuration alone, a folder's or the Hub's. Raises SourceError."""
    spec: ModelSpec = _source("huggingface").describe(name)
    return spec


def write(model: Vit, format: str, out: str | Path, *, force: bool = False) -> Path:
    """The model as another family's own checkpoint at `out`; gives the place. Written whole or not at all.

    format: `timm` (a folder for `local-dir:`), `hf` (a folder for `from_pretrained`), `torchvision` or `t2t` (a state dict
    that loads strictly).  force: replace an export that is there.
    Of what is there `force` replaces an export of ours, file by file, and nothing else: ConfigError otherwise.
    Blocks of which nothing is left are left out, and positions made for another grid are resized once; no output changes.
    Raises SourceError naming the block (counted without those) that the family cannot say, or a tensor that is not finite.
    """
    from ..model import Vit
    from ..surgery import with_own_positions, without_empty

    if format not in FORMATS:
        raise SourceError(f"format={format!r}{did_you_mean(format, FORMATS)}; expected one of {', '.join(FORMATS)}.")
    if not isinstance(model, Vit):
        raise SourceError(
            f"cannot export a {type(model).__name__}; expected a model of vitrim, as load and from_model give it."
        )
    _finite(model, "the model is not exported")
    model = with_own_positions(model)
    place = Path(out)
    if os.path.lexists(place) and not force:
        raise SourceError(f"{place.name!r} is there already; pass force (--force) to replace it, or another place.")
    family, small = _source(FORMATS[format]), without_empty(model)
    if format == "t2t":
        if place.is_dir():
            raise SourceError(f"{place.name!r} is a folder; expected a file, such as model.pth. Give another name.")
        refuse_foreign(place, ours=place.is_file() and family.is_ours(place))
        with locked(place.parent):
            return Path(family.write(small, place))
    if os.path.lexists(place) and not place.is_dir():
        raise SourceError(f"{place.name!r} is a file; expected a folder. Give another name.")
    with locked(place), tempfile.TemporaryDirectory(dir=place, prefix=".", suffix=".partial") as staging:
        found = [name for name in names_in(place) if name != Path(staging).name]
        refuse_foreign(place, ours=is_marked(place / "config.json"), taken=found)
        made = Path(family.write(small, Path(staging) / place.resolve().name))  # as a message names it
        new = {path.name for path in made.iterdir()}
        old = {name for name in found if re.fullmatch(EXPORTED, name)}
        names = sorted(new | old, key=lambda name: name != "config.json")  # without it nobody takes the rest for whole

        def fill(inner: Path) -> None:
            for name in new:
                os.rename(made / name, inner / name)

        replace_within(place, fill, names=names)
    return place


def _source(name: str) -> Any:
    try:
        return import_module(f".{name}", __package__)
    except ImportError as error:
        if name == "huggingface" and (error.name or "").partition(".")[0] == "transformers":
            raise SourceError(
                "models of Hugging Face's transformers need the extra 'hf': pip install 'vitrim[hf]'."
            ) from error
        raise


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
            f"timm:NAME (or hf:, torchvision:, t2t:) with checkpoint={path.name!r} (--checkpoint)."
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

    base = text.partition(".")[0]
    for family in architectures.FAMILIES:
        if near := did_you_mean(base, architectures.names(family)):
            return near.replace("'", f"'{family}:", 1)
    return ""


__all__ = ["FORMATS", "describe", "from_model", "load", "write"]
