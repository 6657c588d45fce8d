"""The one Vision Transformer inside what a caller gives: out of wrappers, out of a module with more around it.

The caller's module stays as it is: where wrappers stand inside it, a copy without them shares its parameters.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator

from torch import nn

from ..errors import SourceError
from ..model import Vit
from .states import listed

WRAPPERS = {
    "OptimizedModule": "_orig_mod",
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "AveragedModel": "module",
    "ModelEma": "ema",
    "ModelEmaV2": "module",
    "ModelEmaV3": "module",
    "CheckpointWrapper": "_checkpoint_wrapped_module",
    "DeepSpeedEngine": "module",
    "_FabricModule": "_original_module",
}
"""Attribute with the module inside, by the class of a wrapper: of torch, timm, Lightning and DeepSpeed."""
SHARDED = ("FullyShardedDataParallel",)
LOG = logging.getLogger("vitrim.sources")


def family_of(module: nn.Module) -> str | None:
    """The module of this package that reads a foreign Vision Transformer, by the classes that it descends from; None for others."""
    homes = {kind.__name__: kind.__module__ for kind in type(module).__mro__}
    if any(home.startswith("transformers.") for home in homes.values()):
        from .huggingface import read  # the module is of transformers, so that is installed

        return "huggingface" if read.is_known(module) else None
    if homes.get("VisionTransformer") == "torchvision.models.vision_transformer":
        return "torchvision"
    if hasattr(module, "tokens_to_token"):
        return "t2t"
    return "timm" if homes.get("VisionTransformer") == "timm.models.vision_transformer" else None


def found(module: nn.Module) -> tuple[nn.Module, str]:
    """The Vision Transformer in a module, and its family; of one that holds none, the module itself, for a family to refuse.

    Raises SourceError where there are several, where the parameters of one are spread over processes or without numbers, and
    for anything but a foreign module.
    """
    if not isinstance(module, nn.Module):
        what = module.__name__ if isinstance(module, type) else f"a {type(module).__name__}"
        raise SourceError(
            f"from_model takes a module of PyTorch, not {what}. A name, a folder or a file of weights goes to vitrim.load."
        )
    module = unwrapped(module)
    if isinstance(module, Vit):
        raise SourceError("this model is vitrim's own already: use it as it is.")
    inside = [("", module)] if family_of(module) else list(_inside(module))
    if len(inside) > 1:
        names = ", ".join(name for name, _ in inside)
        raise SourceError(
            f"this {type(module).__name__} holds {len(inside)} Vision Transformers ({names}). Pass the one that is meant, such as "
            f"its {inside[0][0]}."
        )
    if not inside:
        ours = type(module).__module__.startswith("transformers.")
        return module, "huggingface" if ours else "timm"
    name, inner = inside[0]
    if any(value.is_meta for value in inner.state_dict().values()):
        raise SourceError(
            f"this {type(inner).__name__} has no numbers: it is on the device 'meta'. Load its weights before."
        )
    if name:
        mine = {id(one) for one in inner.modules()}
        beside = [
            f"{place} ({type(part).__name__})"
            for place, part in module.named_modules()
            if id(part) not in mine and next(part.parameters(recurse=False), None) is not None
        ]
        left = f", without {listed(beside)}" if beside else ""
        LOG.warning("%s: the %s at %r in it is taken%s.", type(module).__name__, type(inner).__name__, name, left)
    return with_plain_classifiers(without_wrappers(inner)), family_of(inner) or "timm"


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside the wrappers around it. Raises SourceError for one that is spread over processes."""
    while True:
        kind = type(module).__name__
        if kind in SHARDED:
            raise SourceError(
                f"this model is a {kind}, whose parameters are spread over processes. Pass the module that it was made from, filled with "
                "its full state dict."
            )
        if kind not in WRAPPERS or not isinstance(inner := getattr(module, WRAPPERS[kind], None), nn.Module):
            return module
        module = inner


def without_wrappers(module: nn.Module) -> nn.Module:
    """The module itself, or a copy with the same parameters where wrappers stand inside it."""
    if not any(type(part).__name__ in (*WRAPPERS, *SHARDED) for part in module.modules()):
        return module
    module = _sharing(module)
    for part in list(module.modules()):
        for name, child in part.named_children():
            if (inner := unwrapped(child)) is not child:
                setattr(part, name, inner)
    return module


def with_plain_classifiers(module: nn.Module) -> nn.Module:
    """The module itself, or a copy with the same parameters where one linear stands in a list with dropout, which is left out."""
    plain = {}
    for name, child in module.named_children():
        if type(child) is nn.Sequential:
            layers = [layer for layer in child if type(layer) not in (nn.Dropout, nn.Identity)]
            if len(layers) == 1 and type(layers[0]) is nn.Linear:
                plain[name] = layers[0]
    if not plain or family_of(module) == "torchvision":  # whose heads are such a list
        return module
    module = _sharing(module)
    for name in plain:
        layers = getattr(module, name)
        setattr(module, name, next(layer for layer in layers if type(layer) is nn.Linear))
    return module


def _sharing(module: nn.Module) -> nn.Module:
    """A copy of a module with the same parameters."""
    return copy.deepcopy(module, {id(one): one for one in (*module.parameters(), *module.buffers())})


def _inside(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The outermost Vision Transformers below a module, each once, with their places."""
    seen: set[int] = set()

    def walk(part: nn.Module, place: str) -> Iterator[tuple[str, nn.Module]]:
        for name, child in part.named_children():
            here, inner = f"{place}.{name}".lstrip("."), unwrapped(child)
            if id(inner) in seen:
                continue
            seen.add(id(inner))
            if family_of(inner):
                yield here, inner
            else:
                yield from walk(inner, here)

    return walk(module, "")
