"""timm: a plain pre-norm `VisionTransformer` -> spec and weights.

Source   timm's `vision_transformer.py` and `deit.py` (1.0.23 and later).
Takes    a name, a module from memory, or a name with a local checkpoint.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Unpack

import timm
import torch
from timm.data import ImageNetInfo, infer_imagenet_subset, resolve_model_data_config
from timm.models import VisionTransformer, model_entrypoint
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, nn

from ...errors import SourceError, did_you_mean
from ...model import Vit
from ...spec import ModelSpec, Preprocess
from .. import files, parity
from ..places import Told, filled
from .read import ADVICE, family, refused, spec_of, weights_of

LOG = logging.getLogger("vitrim.sources")


def from_module(module: nn.Module, *, verify: bool = True, **told: Unpack[Told]) -> Vit:
    """Our model with a copy of a timm module's numbers; the module and the random state stay as they are.

    preprocess: None takes what the module's own `pretrained_cfg` says, if it has one.
    """
    spec = spec_of(module)
    told["preprocess"] = told.get("preprocess") or _preprocess(module, spec)
    model = filled(spec, weights_of(module, spec), **told)
    if verify:
        what = "timm's VisionTransformer"
        parity.verify(module, model, blocks=lambda theirs: theirs.blocks, what=what, advice=ADVICE)
    return model


def load(
    name: str,
    *,
    pretrained: bool = True,
    checkpoint: str | Path | None = None,
    classes: int | None = None,
    verify: bool = True,
) -> Vit:
    """A timm model by name (`deit_small_patch16_224`, with or without a tag, or `hf-hub:USER/NAME`).

    pretrained: the published weights, fetched by timm from the Hub.
    """
    _check_name(name)
    weights, labels = "random", None
    if checkpoint is not None:
        weights = Path(checkpoint).name
        module = _with_checkpoint(name, Path(checkpoint), classes)
    elif pretrained:
        weights, module = "pretrained", _create(name, pretrained=True)
        if not files.stays(classes, getattr(module, "num_classes", 0), f"the weights of {name!r} have"):
            module.reset_classifier(0)
        labels = _labels(module)
    else:
        options: dict[str, Any] = {} if classes is None else {"num_classes": classes}
        module = _create(name, **options)
    return from_module(module, labels=labels, verify=verify, provenance=_provenance(name, module, weights))


# ------------------------------------------------------------------------------------------------------ names and files


def _check_name(name: str) -> None:
    """Refuse an unknown name with its near miss, and a name of another family before it takes memory."""
    if name.startswith(("hf-hub:", "hf_hub:", "local-dir:")):
        return
    base, _, tag = name.partition(".")
    if not timm.is_model(base):
        raise SourceError(
            f"timm {timm.__version__} has no model {name!r}{did_you_mean(base, timm.list_models())}. "
            "`timm.list_models('*vit*')` lists them."
        )
    known = [full.partition(".")[2] for full in timm.list_pretrained(f"{base}.*")]
    if tag and tag not in known:
        hint = f"known: {', '.join(known)}" if known else "it has none"
        raise SourceError(f"timm's {base!r} has no weights tagged {tag!r}{did_you_mean(tag, known)}; {hint}.")
    file = model_entrypoint(base).__module__.rsplit(".", 1)[-1]
    if file not in ("vision_transformer", "deit"):
        raise refused(family(file, base))


def _create(name: str, *, pretrained: bool = False, **options: Any) -> Any:
    """timm's module. Raises SourceError where something has to come from the Hub and does not."""
    try:
        return timm.create_model(name, pretrained=pretrained, **options)
    except Exception as error:
        why = type(error).__name__
        if name.startswith("local-dir:") and isinstance(error, (OSError, RuntimeError, KeyError, ValueError)):
            raise SourceError(
                f"{_source(name)!r} is no folder that timm loads ({next(iter(str(error).splitlines()), why)}). Expected its config.json and model.safetensors, as "
                "`vitrim export --format timm` writes them."
            ) from error
        if pretrained and isinstance(error, RuntimeError) and "No pretrained weights" in str(error):
            why = "timm knows of none"
        elif not isinstance(error, OSError) and not type(error).__module__.startswith((*files.NETWORK, "safetensors")):
            raise
        if pretrained:
            raise files.unfetched(name, why) from error
        raise SourceError(
            f"the description of {name!r} is not on this machine and could not be fetched ({why}). Check the name and the "
            "network, or take a timm:NAME, whose architecture needs none."
        ) from error


def _with_checkpoint(name: str, path: Path, classes: int | None) -> nn.Module:
    """A timm module filled from a local file. Raises SourceError listing keys that are missing, too many or misshapen."""
    state = files.read(path)
    with torch.device("meta"):
        module = _create(name)
    if not isinstance(module, VisionTransformer):
        spec_of(module)  # says what it has that a plain one has not
    state = files.reconciled(state, module.state_dict(), file=path.name)
    _check_tables(module, state, path)
    if classes != 0 and any(key.startswith("pre_logits.") for key in state):
        raise SourceError(
            f"{path.name} has a layer between pooling and classifier (pre_logits), which vitrim cannot take in. Leave it out "
            "together with the classifier (classes=0)."
        )
    if set(state) != set(module.state_dict()):
        state = _renamed(state, module)
    state, found = files.with_classifier(state, "head.weight", classes, file=path.name)
    if found != module.num_classes:
        if found:
            LOG.info("%s: its classifier of %d classes is kept.", path.name, found)
        with torch.device("meta"):
            module.reset_classifier(found)
    return files.fill(module, state, path, f"timm's {name!r}")


def _check_tables(module: VisionTransformer, state: Mapping[str, Tensor], path: Path) -> None:
    """Refuse a checkpoint of another image or patch size, which timm would resample without a word."""
    for key in ("pos_embed", "patch_embed.proj.weight"):
        if key not in state or getattr(module, key.partition(".")[0]) is None:
            continue
        expected, found = tuple(module.state_dict()[key].shape), tuple(state[key].shape)
        if len(found) == len(expected) and found != expected:
            raise SourceError(
                f"{path.name}: {key} has shape {found}, but this model expects {expected}. Name the timm model of the "
                "checkpoint's own width, image and patch size."
            )


def _renamed(state: Mapping[str, Tensor], module: VisionTransformer) -> dict[str, Tensor]:
    """timm's own translation of published layouts (DeiT III, DINOv2, CLIP, JAX); unchanged where it knows none."""
    try:
        return dict(checkpoint_filter_fn(dict(state), module, adapt_layer_scale=True))
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
        return dict(state)  # the comparison of keys that follows says what does not fit


def _preprocess(module: nn.Module, spec: ModelSpec) -> Preprocess | None:
    """What timm's `pretrained_cfg` says; None for a module that carries none or is for other channels."""
    if not getattr(module, "pretrained_cfg", None):
        return None
    cfg = resolve_model_data_config(module)
    if len(cfg["mean"]) != spec.channels:
        return None
    return Preprocess(
        mean=tuple(float(value) for value in cfg["mean"]),
        std=tuple(float(value) for value in cfg["std"]),
        size_px=spec.image_px,
        crop=float(cfg["crop_pct"]),
        crop_mode=cfg["crop_mode"],
        interpolation=cfg["interpolation"],
    )


def _labels(module: nn.Module) -> tuple[str, ...] | None:
    """Class names of published weights: the Hub's own list, or ImageNet's WordNet ids; None where timm does not know."""
    cfg, classes = getattr(module, "pretrained_cfg", {}), getattr(module, "num_classes", 0)
    if (names := cfg.get("label_names")) and len(names) == classes:
        return tuple(str(name) for name in names)
    subset = infer_imagenet_subset(module) if classes else None
    if subset is None or len(known := ImageNetInfo(subset).label_names()) != classes:
        return None
    return tuple(known)


def _source(name: str) -> str:
    """The name as vitrim's users write it, without the place of a local folder."""
    if name.startswith("local-dir:"):
        return f"timm:local-dir:{Path(name.removeprefix('local-dir:')).name}"
    return name if ":" in name else f"timm:{name}"


def _provenance(name: str, module: nn.Module, weights: str) -> dict[str, Any]:
    told = {"source": _source(name), "weights": weights, "timm": timm.__version__}
    cfg = getattr(module, "pretrained_cfg", {}) if weights == "pretrained" else {}
    known = {"base_model": cfg.get("hf_hub_id"), "license": cfg.get("license")}
    return {**told, **{key: value for key, value in known.items() if value}}
