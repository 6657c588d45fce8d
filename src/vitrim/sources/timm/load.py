"""timm: a plain pre-norm `VisionTransformer` -> spec and weights.

Source   timm's `vision_transformer.py` and `deit.py` (1.0.23 and later).
Takes    a name, a module from memory, or a name with a local checkpoint.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Unpack

import timm
import torch
from safetensors import SafetensorError, safe_open
from timm.data import ImageNetInfo, infer_imagenet_subset, resolve_model_data_config
from timm.models import VisionTransformer, model_entrypoint
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, nn

from ... import architectures
from ...errors import SourceError, did_you_mean
from ...model import Vit
from ...spec import ModelSpec, Preprocess
from .. import bounds, files, parity
from ..places import Told, filled, problem_type_in
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
    checkpoint_key: str | None = None,
    classes: int | None = None,
    verify: bool = True,
    image_px: tuple[int, int] | None = None,
) -> Vit:
    """A timm model by name (`deit_small_patch16_224`, with or without a tag, or `hf-hub:USER/NAME`).

    pretrained: the published weights, fetched by timm from the Hub.
    image_px: the size asked for: a checkpoint of another image size than the name's is then taken at its own; else it is refused.
    """
    _check_name(name)
    said: dict[str, Any] = {}
    if name.startswith("local-dir:"):
        folder = Path(name.partition(":")[2])
        if (folder / bounds.CONFIG).is_file():
            said = bounds.check_config(folder)
            if "model_type" in said:
                raise SourceError(f"{str(folder)!r} is a folder of Hugging Face's transformers: hf:{folder}.")
            bounds.check_room(lambda: _create(name), folder)
    weights, labels = "random", None
    left: tuple[str, ...] = ()
    if checkpoint is not None:
        weights = Path(checkpoint).name
        module, left = _with_checkpoint(name, Path(checkpoint), classes, image_px=image_px, key=checkpoint_key)
    elif pretrained and (file := _local_weights(name)) is not None:
        module, left = _with_checkpoint(name, file, classes, image_px=image_px, key=None)
        weights, labels = "pretrained", _labels(name, module)
    elif pretrained:
        weights, module = "pretrained", _create(name, pretrained=True)
        if not files.stays(classes, getattr(module, "num_classes", 0), f"the weights of {name!r} have"):
            module.reset_classifier(0)
        labels = _labels(name, module)
    else:
        options: dict[str, Any] = {} if classes is None else {"num_classes": classes}
        module = _create(name, **options)
    told = _provenance(name, module, weights) | ({"left_out": list(left)} if left else {})
    kind = problem_type_in(said) if checkpoint is None and classes != 0 else None
    return from_module(module, labels=labels, problem_type=kind, verify=verify, provenance=told)


# ------------------------------------------------------------------------------------------------------ names and files


def _check_name(name: str) -> None:
    """Refuse an unknown name with its near miss, and a name of another family before it takes memory."""
    if name.startswith(("hf-hub:", "hf_hub:", "local-dir:")):
        return
    base, _, tag = name.partition(".")
    if name and not timm.is_model(base) and Path(name).is_dir():
        raise SourceError(f"{name!r} is a folder: timm:local-dir:{name}.")
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


def _local_weights(name: str) -> Path | None:
    """The weights of a local folder, which timm itself would resample and drop parts of without a word."""
    file = Path(name.removeprefix("local-dir:")) / files.WEIGHTS
    if not name.startswith("local-dir:") or not file.is_file():
        return None
    try:
        with safe_open(file, "pt") as weights:
            weights.keys()
    except (SafetensorError, OSError):
        return None  # timm's own loading says what it is
    return file


def _with_checkpoint(
    name: str, path: Path, classes: int | None, *, image_px: tuple[int, int] | None, key: str | None
) -> tuple[nn.Module, tuple[str, ...]]:
    """A timm module filled from a local file, and the file's tensors that are no part of it (of a text tower, say).

    image_px: the size asked for, beside which the file's own may be another than the name's.  key: path of the weights in the file.
    Raises SourceError listing keys that are missing, too many or misshapen.
    """
    with torch.device("meta"):
        module = _create(name)
    if not isinstance(module, VisionTransformer):
        spec_of(module)  # says what it has that a plain one has not
    width, expected = module.embed_dim, module.state_dict()
    head = {"head.weight": torch.empty(1, width, device="meta"), "head.bias": torch.empty(1, device="meta")}
    state = files.weights(path, {**head, **expected}, key=key)  # of a name without classifier too
    if classes != 0 and any(key.startswith("pre_logits.") for key in state):
        raise SourceError(
            f"{path.name} has a layer between pooling and classifier (pre_logits), which vitrim cannot take in. Leave it out "
            "together with the classifier (classes=0)."
        )
    state, left = _renamed(state, module, path, heads=classes != 0)
    if made := _as_made(name, module, state, path, image_px=image_px):
        with torch.device("meta"):
            module = _create(name, **made)
    state, found = files.with_classifier(state, "head.weight", classes, file=path.name)
    if found != module.num_classes:
        if found:
            LOG.info("%s: its classifier of %d classes is kept.", path.name, found)
        with torch.device("meta"):
            module.reset_classifier(found)
    return files.fill(module, state, path, f"timm's {name!r}", lambda: _fitting(name, state)), left


def _as_made(
    name: str, module: VisionTransformer, state: Mapping[str, Tensor], path: Path, *, image_px: tuple[int, int] | None
) -> dict[str, Any]:
    """Arguments under which timm builds the network that the file was saved from, where its name alone does not.

    Raises SourceError for another patch, and for another image size where none was asked for: no number is resampled here.
    """
    patch, made = tuple(module.patch_embed.patch_size), dict[str, Any]()
    kernel = state.get("patch_embed.proj.weight")
    if kernel is not None and kernel.dim() == 4 and tuple(kernel.shape[2:]) != patch:
        raise SourceError(
            f"{path.name} was made for patches of {files.px(kernel.shape[2:])}, and {name!r} has {files.px(patch)}. Name the model "
            f"that it was saved from{_fitting(name, state)}."
        )
    size, own = _image_px(module, state, image_px), tuple(module.patch_embed.img_size)
    if size != own:
        if image_px is None:
            raise files.another_size(path, size, name, own, _fitting(name, state))
        made["img_size"] = size
    pooled = "fc_norm.weight" in state and "norm.weight" not in state  # as fine-tuned MAEs are saved
    if pooled and module.global_pool == "token" and not isinstance(module, VisionTransformerDistilled):
        LOG.info("%s: it averages its patch tokens, with a norm behind (fc_norm); that is kept.", path.name)
        made["global_pool"] = "avg"
    return made


def _image_px(module: VisionTransformer, state: Mapping[str, Tensor], asked: tuple[int, int] | None) -> tuple[int, int]:
    """The image size for which a file's position table was made; the module's own where the file does not say."""
    table, own, embed = state.get("pos_embed"), module.pos_embed, module.patch_embed
    height, width = embed.img_size
    if table is None or own is None or table.dim() != 3:
        return height, width
    front = own.shape[1] - embed.num_patches
    return files.table_px(table.shape[1] - front, (height, width), embed.patch_size, asked)


def _fitting(name: str, state: Mapping[str, Tensor]) -> str:
    """The names of timm's that a file's shapes fit, for a sentence, most like the given one first; "" where none does."""
    kernel, table = state.get("patch_embed.proj.weight"), state.get("pos_embed")
    blocks = {key.split(".")[1] for key in state if key.startswith("blocks.")}
    if kernel is None or kernel.dim() != 4 or table is None:
        return ""
    fits = []
    for known in architectures.names("timm"):
        spec = architectures.spec(known)
        assert spec is not None
        a = spec.blocks[0].attention
        assert a is not None
        shapes = (spec.width, *spec.patch_px, len(spec.blocks), spec.position_rows, spec.pre_norm, a.layer_scale)
        own = (*kernel.shape[:1], *kernel.shape[2:], len(blocks), table.shape[-2])
        if shapes == (*own, "norm_pre.weight" in state, "blocks.0.ls1.gamma" in state):
            fits.append(known)
    alike = difflib.get_close_matches(name.partition(".")[0], fits, n=2, cutoff=0.0)
    return f", such as {' or '.join(f'timm:{one}' for one in alike)}" if alike else ""


TOWERS = ("visual.", "vision_encoder.")
"""What the names of the image tower begin with in a file that holds a text tower too."""


def _renamed(
    state: Mapping[str, Tensor], module: VisionTransformer, path: Path, *, heads: bool
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """timm's own translation of published layouts (DeiT III, DINOv2, CLIP, JAX), and what it leaves out.

    It is let change names and put tensors together; what it would resample stays as it is, and what it would drop is
    told. Unchanged where it knows no translation.  heads: classifiers are wanted.
    Raises SourceError naming tensors of the image tower that it would drop.
    """
    try:
        found, unused = _filtered(state, module), _unused(state, module)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
        return dict(state), ()  # the comparison of keys that follows says what does not fit
    tower = next((one for one in TOWERS if any(key.startswith(one) for key in state)), "")
    idle = {key for key in unused if key.rpartition(".")[2] == "mask_token" or (tower and not key.startswith(tower))}
    idle |= set() if heads else {key for key in unused if key.startswith((f"{tower}head.", "pre_logits."))}
    if lost := [key for key in unused if key not in idle]:
        raise SourceError(
            f"{path.name} holds tensors that timm's {type(module).__name__} has no place for: {files.listed(lost)}. Name the model "
            "that it was saved from; where they stand behind the pooled features, classes=0 leaves them out."
        )
    if idle:
        LOG.info("%s: left out, since the image tower does not read it: %s.", path.name, files.listed(sorted(idle)))
    return found, tuple(sorted({key.partition(".")[0] for key in idle}))


def _filtered(state: Mapping[str, Tensor], module: VisionTransformer) -> dict[str, Tensor]:
    """What timm's filter makes of a file for a module that has the file's own patch, and positions of any size."""
    own = module.patch_embed.proj.weight
    kernels = (v for k, v in state.items() if k.endswith(("proj.weight", "conv1.weight")) and v.dim() == 4)
    like = next((kernel for kernel in kernels if kernel.shape[0] == own.shape[0]), own)
    asked: Any = SimpleNamespace(
        patch_embed=SimpleNamespace(proj=SimpleNamespace(weight=like)),
        pos_embed=None,  # it resamples only what the module has a table for
        head=nn.Linear(1, 1, device="meta"),  # and keeps a projection only where the module has a classifier
    )
    return dict(checkpoint_filter_fn(dict(state), asked, adapt_layer_scale=True))


def _unused(state: Mapping[str, Tensor], module: VisionTransformer) -> list[str]:
    """Names whose tensors reach none that timm's filter gives: it runs on stand-ins without memory that autograd follows."""
    twins = {key: torch.empty_like(value, device="meta") for key, value in state.items()}
    leaves = {key: twin.requires_grad_() for key, twin in twins.items() if twin.is_floating_point()}
    ends = list(_filtered(twins, module).values())
    with torch.enable_grad():
        followed = [end for end in ends if end.requires_grad]
        seeds = [torch.empty_like(end) for end in followed]
        reached = torch.autograd.grad(followed, list(leaves.values()), seeds, allow_unused=True) if followed else ()
    used = {key for key, gradient in zip(leaves, reached, strict=False) if gradient is not None}
    used |= {key for key, twin in twins.items() if any(twin is end for end in ends)}
    return [key for key in state if key not in used]


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


def _labels(name: str, module: nn.Module) -> tuple[str, ...] | None:
    """Class names of published weights: the list beside them, or ImageNet's WordNet ids for timm's own; None where nobody says."""
    cfg, classes = getattr(module, "pretrained_cfg", {}), getattr(module, "num_classes", 0)
    if (names := cfg.get("label_names")) and len(names) == classes:
        return tuple(str(name) for name in names)
    timms_own = ":" not in name or name.partition(":")[2].startswith("timm/")
    subset = infer_imagenet_subset(module) if classes and timms_own else None  # timm goes by their count alone
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
