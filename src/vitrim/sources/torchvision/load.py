"""torchvision: its `VisionTransformer` -> spec and weights.

Source   torchvision's `models/vision_transformer.py` (0.20 and later).
Takes    a name (`vit_b_16`, with or without the name of published weights), a module from memory, a name with a local
         state dict, or a folder that `write` made.

torchvision's own forward takes one image size. At another one ours resizes the position table bicubically with pixel
centres aligned; torchvision's `interpolate_embeddings` aligns corners, which the spec cannot say: a state dict that it
made is read at its own size, with its own table.
"""

from __future__ import annotations

import contextlib
import logging
import math
import pickle
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Unpack

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models import VisionTransformer

from ...errors import SourceError, did_you_mean
from ...model import Vit
from ...spec import ModelSpec, Preprocess
from .. import bounds, files, parity
from ..places import Told, filled, problem_type_in
from .read import ADVICE, refused, spec_of, weights_of

LOG = logging.getLogger("vitrim.sources")


def names() -> list[str]:
    """torchvision's plain Vision Transformers, sorted."""
    builders = ((name, torchvision.models.get_model_builder(name)) for name in torchvision.models.list_models())
    return sorted(name for name, builder in builders if builder.__module__ == VisionTransformer.__module__)


def weights_named(name: str) -> list[Any]:
    """torchvision's weights enum members of an architecture, the default one first."""
    enum = torchvision.models.get_model_weights(name)
    return sorted(enum, key=lambda member: member is not enum["DEFAULT"])


def module_named(name: str, **options: Any) -> Any:
    """torchvision's module with random weights, of the image size and the classes of the named weights (the default ones
    where the name says none: `vit_h_14`'s are for 518 px).  options: further arguments of `VisionTransformer`.
    """
    base, weights = _resolved(name)
    own = {"image_size": weights.meta["min_size"][0], "num_classes": len(weights.meta["categories"])}
    return torchvision.models.get_model(base, **{**own, **options})


def load(
    name: str,
    *,
    pretrained: bool = True,
    checkpoint: str | Path | None = None,
    checkpoint_key: str | None = None,
    classes: int | None = None,
    verify: bool = True,
    image_px: tuple[int, int] | None = None,
) -> Vit:
    """A torchvision model by name (`vit_b_16`, `vit_b_16.IMAGENET1K_V1`), or the folder that `write` made.

    pretrained: the published weights, fetched by torchvision; the default ones where the name says none.
    checkpoint: its image size is kept too, whatever it is, so `image_px` changes nothing.
    """
    if "/" in name or (name and Path(name).is_dir() and name not in names()):
        return _from_folder(
            Path(name),
            pretrained=pretrained,
            checkpoint=checkpoint,
            checkpoint_key=checkpoint_key,
            classes=classes,
            verify=verify,
        )
    base, weights = _resolved(name)
    told = {"source": f"torchvision:{name}", "torchvision": torchvision.__version__}
    labels: tuple[str, ...] | None = None
    if checkpoint is None and pretrained:
        module, labels = _published(name, weights), tuple(str(label) for label in weights.meta["categories"])
        if not files.stays(classes, len(labels), f"the weights of {name!r} have"):
            module.heads, labels = nn.Identity(), None
        told.update(weights="pretrained", weights_name=str(weights))
        if "license" in weights.meta:
            told["license"] = weights.meta["license"]
    elif checkpoint is None:
        module, told["weights"] = _random(partial(module_named, name), classes), "random"
    else:
        path, builder = Path(checkpoint), partial(torchvision.models.get_model, base)
        module, told["weights"] = _filled(builder, path, f"torchvision's {name!r}", classes, checkpoint_key), path.name
    preprocess = _preprocess(weights, spec_of(module))
    return from_module(module, preprocess=preprocess, labels=labels, verify=verify, provenance=told)


def from_module(module: nn.Module, *, verify: bool = True, **told: Unpack[Told]) -> Vit:
    """Our model with a copy of a torchvision module's numbers; the module and the random state stay as they are.

    preprocess: a module of torchvision's carries none, so None means none.
    """
    spec = spec_of(module)
    model = filled(spec, weights_of(module, spec), **told)
    if verify:
        what = "torchvision's VisionTransformer"
        parity.verify(module, model, blocks=lambda theirs: list(theirs.encoder.layers), what=what, advice=ADVICE)
    return model


# ------------------------------------------------------------------------------------------------------ names and files


def _resolved(name: str) -> tuple[str, Any]:
    """Architecture and weights enum member of a name. Raises SourceError with the near miss."""
    base, _, tag = name.partition(".")
    base = base.lower().removesuffix("_weights")  # str(ViT_B_16_Weights.IMAGENET1K_V1) is a name too
    if base not in names():
        if base in torchvision.models.list_models():
            raise refused(f"another, convolutional or hierarchical design ({base})")
        raise SourceError(
            f"torchvision {torchvision.__version__} has no Vision Transformer {name!r}{did_you_mean(base, names())}; "
            f"known: {', '.join(names())}."
        )
    members = {member.name: member for member in weights_named(base)}
    if not tag:
        return base, next(iter(members.values()))
    if tag not in (*members, "DEFAULT"):
        raise SourceError(
            f"torchvision's {base!r} has no weights {tag!r}{did_you_mean(tag, members)}; known: {', '.join(members)}."
        )
    return base, members.get(tag, next(iter(members.values())))


def _published(name: str, weights: Any) -> Any:
    """torchvision's module with its published weights. Raises SourceError where they cannot be had."""
    try:
        with contextlib.redirect_stdout(sys.stderr):  # where torch says what it downloads
            state = weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise files.unfetched(name, type(error).__name__) from error
    with torch.device("meta"):
        module = module_named(name)
    module.load_state_dict(state, strict=True, assign=True)
    return module


def _random(builder: Any, classes: int | None) -> Any:
    module = builder(**({"num_classes": classes} if classes else {}))
    if classes == 0:
        module.heads = nn.Identity()
    return module


def _filled(builder: Any, path: Path, model: str, classes: int | None, key: str | None) -> Any:
    """A module with a checkpoint's numbers, of its own image size and classes. Raises SourceError listing what does not fit."""
    with torch.device("meta"):
        plain = builder()
    older = {".mlp.linear_1.": ".mlp.0.", ".mlp.linear_2.": ".mlp.3."}  # first names, which published files carry
    state = files.weights(path, plain.state_dict(), key=key, older=older)
    state, found = files.with_classifier(state, "heads.head.weight", classes, file=path.name)
    if found not in (0, plain.num_classes):
        LOG.info("%s: its classifier of %d classes is kept.", path.name, found)
    with torch.device("meta"):
        module = builder(num_classes=found or 1, image_size=_image_px(plain, state, path))
    if not found:
        module.heads = nn.Identity()
    return files.fill(module, state, path, model)


def _image_px(module: Any, state: Mapping[str, Tensor], path: Path) -> int:
    """The image size for which a state dict's position table was made: torchvision's images are square."""
    table = state.get("encoder.pos_embedding")
    if table is None or table.dim() != 3:
        return int(module.image_size)
    rows = table.shape[1] - 1
    side = math.isqrt(rows)
    if side * side != rows or not rows:
        raise SourceError(
            f"{path.name}: encoder.pos_embedding has {rows + 1} rows; expected one for the class token and a square of patches."
        )
    if side * module.patch_size != module.image_size:
        LOG.info("%s: its image size of %d px is kept.", path.name, side * module.patch_size)
    return side * int(module.patch_size)


def _preprocess(weights: Any, spec: ModelSpec) -> Preprocess | None:
    """What the transforms of published weights do; None for a model of another size or other channels."""
    transforms = weights.transforms()
    if (transforms.crop_size[0],) * 2 != spec.image_px or len(transforms.mean) != spec.channels:
        return None
    return Preprocess(
        mean=tuple(transforms.mean),
        std=tuple(transforms.std),
        size_px=spec.image_px,
        crop=transforms.crop_size[0] / transforms.resize_size[0],
        interpolation=transforms.interpolation.value,
    )


def _from_folder(
    folder: Path,
    *,
    pretrained: bool,
    checkpoint: str | Path | None,
    checkpoint_key: str | None,
    classes: int | None,
    verify: bool,
) -> Vit:
    """The model that `write` left in a folder."""
    try:
        values = bounds.check_config(folder)
        builder = partial(VisionTransformer, **values["kwargs"])
        labels = None if values["labels"] is None else tuple(values["labels"])
        told: dict[str, Any] = values["preprocess"] or {}
        told = {key: tuple(value) if isinstance(value, list) else value for key, value in told.items()}
        preprocess = Preprocess(**told) if told else None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SourceError(
            f"{folder.name!r} is no folder that `vitrim export --format torchvision` wrote ({error}). Name one of "
            f"{', '.join(names())}, with --checkpoint PATH for your own weights."
        ) from error
    bounds.check_room(builder, folder)
    path = folder / files.WEIGHTS if checkpoint is None else Path(checkpoint)
    if pretrained or checkpoint is not None:
        module = _filled(builder, path, f"torchvision's VisionTransformer of {folder.name!r}", classes, checkpoint_key)
        weights = path.name
    else:
        module, weights = _random(builder, classes), "random"
    spec = spec_of(module)
    return from_module(
        module,
        preprocess=preprocess if preprocess and preprocess.size_px == spec.image_px else None,
        labels=labels if labels and checkpoint is None and spec.classes == len(labels) else None,
        problem_type=problem_type_in(values) if checkpoint is None and classes != 0 else None,
        verify=verify,
        provenance={"source": f"torchvision:{folder.name}", "weights": weights},
    )
