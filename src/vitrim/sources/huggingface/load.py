"""Hugging Face: transformers' plain Vision Transformers -> spec and weights.

Source   transformers 5.9 and later: ViT, DeiT, DINOv2 (with and without registers), CLIP and SigLIP vision towers,
         ViT-MAE and MSN.
Takes    a folder that `save_pretrained` wrote, a name on the Hub, either with a local checkpoint, or a module from memory.
Gives    labels and image settings too. Code that comes with weights is never run (`trust_remote_code`).

What an encoder gives is its pooled vector: the class token after the last norm (DINOv2's and CLIP's `pooler_output`;
`last_hidden_state[:, 0]` elsewhere), SigLIP's attention pooling, or all normed tokens where SigLIP has no head. ViT's and
DeiT's pooler (a further linear and tanh behind the class token) cannot be said: it is left out, which the log and the
provenance tell. ViT-MAE is taken with no patch masked and none moved. Of a pretraining or two-tower model the encoder is taken.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal, Unpack, get_args

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers.configuration_utils import PreTrainedConfig

from ...errors import SourceError
from ...model import Vit
from ...spec import ModelSpec, Preprocess, ProblemType
from .. import bounds, files, parity
from ..places import Told, filled
from ..states import MERGE, WRAPPERS
from . import read
from .processor import processor_preprocess
from .write import TOWERS, quiet

LOG = logging.getLogger("vitrim.sources")
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
MEND = (
    "Pass a folder that save_pretrained wrote (hf:FOLDER), or a Hub name with a local file of weights (--checkpoint PATH, "
    "checkpoint=)."
)


def from_module(module: nn.Module, *, verify: bool = True, **told: Unpack[Told]) -> Vit:
    """Our model with a copy of a transformers module's numbers; the module and the random state stay as they are.

    preprocess: a module carries none; where its family resizes positions unasked (DINOv2), its size is the spec's.
    labels: None takes the configuration's `id2label`, unless that only counts (`LABEL_0`).  problem_type: None takes its own.
    """
    encoder, left = read.encoder_of(module)
    kind, known = read.class_name(encoder), told.get("provenance") or {}
    left = (*known.get("left_out", ()), *left, *read.left_out(encoder))
    preprocess = told.get("preprocess")
    image_px = preprocess.size_px if preprocess is not None and read.DESIGNS[kind].any_size else None
    spec = read.spec_of(encoder, image_px)
    if "pooler" in left:
        LOG.warning(
            "%s: its pooler (a linear and %s behind the class token) is left out; features are last_hidden_state[:, 0].",
            read.class_name(module),
            getattr(encoder.config, "pooler_act", "an activation"),
        )
    classifies = any(output.name != "projection" for output in spec.outputs)
    told["labels"] = told.get("labels") or (_labels(encoder, spec) if classifies else None)
    told["provenance"] = {**known, "architecture": kind, **({"left_out": list(left)} if left else {})}
    told["problem_type"] = told.get("problem_type") or (_problem_type(encoder) if classifies else None)
    task: Literal["classification", "features"] = "classification" if classifies else "features"
    model = filled(spec, read.weights_of(encoder, spec), task=task, **told)
    if verify:
        parity.verify(
            encoder,
            model,
            blocks=lambda theirs: read.parts_of(theirs).block_modules,
            what=f"transformers' {kind}",
            advice=read.ADVICE,
            answer=lambda theirs, x: answer(theirs, x, spec),
        )
    return model


def answer(module: Any, x: Tensor, spec: ModelSpec) -> Any:
    """What a module says of images x [B, C, h, w]: its logits, its projection, or an encoder's pooled vector or tokens."""
    design = read.DESIGNS[read.class_name(module)]
    if design.package == "vit_mae":
        patches = (x.shape[-2] // spec.patch_px[0]) * (x.shape[-1] // spec.patch_px[1])
        with _unmasked(module.config):
            out = module(x, noise=torch.arange(patches, dtype=x.dtype, device=x.device).expand(x.shape[0], -1))
    else:
        out = module(x)
    if isinstance(out, Tensor):
        return out
    if (logits := getattr(out, "logits", None)) is not None:  # a classifier of no classes gives what it would read
        return logits
    if spec.outputs:
        return out.image_embeds
    if design.pool == "map":
        return out.last_hidden_state if out.pooler_output is None else out.pooler_output
    return out.pooler_output if design.norm == "pooled" else out.last_hidden_state[:, 0]


@contextmanager
def _unmasked(config: Any) -> Iterator[None]:
    """ViT-MAE without masking: its share is a setting that the module reads in each forward pass. It is put back."""
    share, config.mask_ratio = config.mask_ratio, 0.0
    try:
        yield
    finally:
        config.mask_ratio = share


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
    """A model by its folder or its name on the Hub (`google/vit-base-patch16-224`).

    pretrained: its own weights, through `from_pretrained`.
    image_px: the size asked for: a checkpoint of another image size than the configuration's is then taken at its own; else it
    is refused.
    """
    kind, config, left = _described(name)
    told: dict[str, Any] = {"source": f"hf:{name}", "transformers": transformers.__version__}
    if left:
        told["left_out"] = list(left)
    design = read.DESIGNS[kind.__name__]
    if checkpoint is None and Path(name).is_dir():
        with quiet():
            bounds.check_room(lambda: kind(config), Path(name))
    if checkpoint is not None:
        path = Path(checkpoint)
        how: dict[str, Any] = {"extra": bool(left), "image_px": image_px, "key": checkpoint_key}
        module = _with_checkpoint(kind, config, path, classes, told, **how)
        told["weights"] = path.name
    elif pretrained:
        stays = files.stays(classes, _classes(kind, config), f"the weights of {name!r} have")
        with fetching(name, "weights"):
            module, info = _from_pretrained(kind, config, name)
        if (file := _in_wrappers(Path(name), info["unexpected_keys"])) is not None:
            state = files.weights(file, _names(kind, config))
            module, info = _from_pretrained(kind, config, None, {key: value.float() for key, value in state.items()})
        _check_loaded(module, info, f"the weights of {name!r}", name, extra=bool(left))
        for head in () if stays else design.classifiers:
            setattr(module, head, nn.Identity())
        told["weights"] = "pretrained"
        if not Path(name).is_dir():
            told["base_model"] = name
    else:
        _set_classes(kind, config, classes)
        module = kind(config)
        if getattr(module, "pooler", None) is not None:
            module.pooler = None
        told["weights"] = "random"
    spec = read.spec_of(module)
    preprocess = _preprocess(name, None if design.any_size or image_px else spec.image_px, spec.channels)
    if (
        preprocess is not None and image_px and not design.any_size
    ):  # the processor is for the name's size, not the file's
        preprocess = replace(preprocess, size_px=spec.image_px)
    return from_module(module.eval(), preprocess=preprocess, verify=verify, provenance=told)


def describe(name: str, classes: int | None = None) -> ModelSpec:
    """The spec of a folder or Hub name from its configuration alone, without weights: for costs and plans."""
    kind, config, _ = _described(name)
    _set_classes(kind, config, classes)
    module = bounds.outline(lambda: kind(config), Path(name))
    spec = read.spec_of(module)
    preprocess = _preprocess(name, None, spec.channels) if read.DESIGNS[kind.__name__].any_size else None
    return spec if preprocess is None else replace(spec, image_px=preprocess.size_px)


# ------------------------------------------------------------------------------------------------------ names and files


def _described(name: str) -> tuple[Any, Any, tuple[str, ...]]:
    """The class to build, its configuration, and what of a larger model that leaves out.

    Raises SourceError for another family, or a model with code of its own.
    """
    if not name:
        raise SourceError(
            "hf: names no model; expected hf:FOLDER or a name on the Hub, such as hf:facebook/dinov2-small."
        )
    path = Path(name)
    if path.is_dir() and (path / "adapter_config.json").is_file():
        raise SourceError(f"the folder {name!r} holds adapters of PEFT, not a whole model. {MERGE}")
    if path.is_dir() and not (path / "config.json").is_file():
        raise SourceError(f"the folder {name!r} has no config.json; expected a folder that save_pretrained wrote.")
    if not path.is_dir() and (name.startswith((".", "/", "~")) or name.count("/") > 1 or path.is_file()):
        raise SourceError(f"there is no folder {name!r}; expected a folder that save_pretrained wrote, or a Hub name.")
    if path.is_dir():
        bounds.check_config(path)
    with quiet(), fetching(name, "configuration"):
        data, _ = PreTrainedConfig.get_config_dict(name)
    model_type, named = str(data.get("model_type", "")), list(data.get("architectures") or ())
    if any(key.startswith(("AutoModel", "AutoConfig")) for key in data.get("auto_map") or {}):
        raise SourceError(
            f"{name!r} brings code of its own (trust_remote_code), which vitrim never runs: weights should not be able to. {read.ADVICE}"
        )
    if data.get("quantization_config"):
        method = data["quantization_config"].get("quant_method", "an unnamed method")
        raise read.refused(f"quantised weights ({method}; name the model that it was made from)")
    if model_type in read.OTHERS or (model_type not in read.BASE_MODELS and not named):
        raise read.other(model_type, named[0] if named else name)
    first = named[0] if named else read.BASE_MODELS[model_type]
    left = (read.ENCODERS[first][2],) if first in read.ENCODERS else ()
    first = read.ENCODERS[first][0] if first in read.ENCODERS else first
    if first not in read.DESIGNS:
        raise read.other(model_type, first)
    kind = read.class_named(first)
    with quiet():
        try:
            return kind, kind.config_class.from_pretrained(name), left
        except (StrictDataclassError, TypeError, ValueError) as error:
            raise SourceError(
                f"the configuration of {name!r} is not valid: {str(error).splitlines()[-1].strip()}."
            ) from error


def _classes(kind: Any, config: Any) -> int:
    """Classes of the configuration; 0 for an encoder."""
    return int(config.num_labels) if read.DESIGNS[kind.__name__].classifiers else 0


def _set_classes(kind: Any, config: Any, classes: int | None) -> None:
    if classes is None or classes == _classes(kind, config):
        return
    if not read.DESIGNS[kind.__name__].classifiers:
        raise SourceError(f"classes={classes}: {kind.__name__} is an encoder without classifier. Leave classes out.")
    config.num_labels = classes


def _with_checkpoint(
    kind: Any,
    config: Any,
    path: Path,
    classes: int | None,
    told: dict[str, Any],
    *,
    extra: bool,
    image_px: tuple[int, int] | None,
    key: str | None,
) -> Any:
    """A module filled from a local file. Raises SourceError listing keys that are missing, too many or misshapen.

    told: is given the classes, where the file's differ from the configuration's.  extra: as in `_check_loaded`.
    key: path of the weights in the file.
    """
    state = files.weights(path, _names(kind, config), key=key)
    heads = read.DESIGNS[kind.__name__].classifiers
    for head in heads:
        state = files.with_plain_head(state, head, file=path.name)
        matrix = next((name for name in state if f".{name}".endswith(f".{head}.weight")), None)
        found = 0 if matrix is None else state[matrix].shape[0]
        if not files.stays(classes, found, f"the classifier in {path.name} has"):
            gone = [key for key in state if f".{head}." in f".{key}"]
            LOG.info("%s: without its classifier: %s.", path.name, files.listed(gone))
            state = {key: value for key, value in state.items() if key not in gone}
            found = 0
        if found != config.num_labels and classes != 0:
            said = f"{found} classes of {path.name}; the configuration says {config.num_labels}"
            LOG.info("%s: kept the classifier as the file has it: %s.", path.name, said)
            told["classifier"] = said
        config.num_labels = found
    if not heads:
        _set_classes(kind, config, classes)
    with torch.device("meta"):
        made = kind(config)
    own = read.spec_of(made).image_px
    if (size := _image_px(made, state, image_px)) != own:
        if image_px is None:
            raise files.another_size(path, size, kind.__name__, own)
        vision = getattr(config, "vision_config", config)
        vision.image_size = size[0] if size[0] == size[1] else list(size)
    module, info = _from_pretrained(kind, config, None, {key: value.float() for key, value in state.items()})
    if not info["missing_keys"] and not info["unexpected_keys"] and (hint := files.oblong(info["mismatched_keys"])):
        faults = files.misfits((), (), sorted(info["mismatched_keys"]))
        raise SourceError(f"the weights in {path.name} do not fit {kind.__name__}; {faults}.{hint}")
    _check_loaded(module, info, f"the weights in {path.name}", kind.__name__, extra=extra)
    return module


def _in_wrappers(folder: Path, unexpected: Iterable[str]) -> Path | None:
    """The file of a local folder's weights, where names carry the parts that wrappers add, which transformers does not know."""
    if not any(part in WRAPPERS for key in unexpected for part in key.split(".")):
        return None
    names = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _names(kind: Any, config: Any) -> dict[str, Tensor]:
    """The tensors of a class by name, without memory; those of its encoder also as the encoder alone names them."""
    with torch.device("meta"):
        expected = kind(config).state_dict()
    begin = f"{kind.base_model_prefix}."
    return {**{key.removeprefix(begin): value for key, value in expected.items()}, **expected}


def _image_px(module: Any, state: Mapping[str, Tensor], asked: tuple[int, int] | None) -> tuple[int, int]:
    """The image size for which a file's position table was made; the module's own where the file does not say."""
    encoder, _ = read.encoder_of(module)
    name = read.parts_of(encoder).position
    rows, spec = encoder.get_parameter(name).shape[-2], read.spec_of(module)
    tables = [v for k, v in state.items() if v.dim() in (2, 3) and k.endswith(".".join(name.split(".")[-2:]))]
    if len(tables) != 1:
        return spec.image_px
    front = rows - math.prod(spec.position.grid)
    asked = None if read.DESIGNS[read.class_name(encoder)].package in TOWERS else asked  # whose images are squares
    return files.table_px(tables[0].shape[-2] - front, spec.image_px, spec.patch_px, asked)


def _from_pretrained(
    kind: Any, config: Any, name: str | None, state: dict[str, Tensor] | None = None
) -> tuple[Any, Any]:
    """The module, and what transformers says did not fit."""
    told = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    with quiet(), torch.random.fork_rng(devices=[]):
        return tuple(kind.from_pretrained(name, config=config, state_dict=state, dtype=torch.float32, **told))


def _check_loaded(module: Any, info: Mapping[str, Any], what: str, name: str, *, extra: bool = False) -> None:
    """Refuse what was not found or not wanted; a pooler that the file lacks goes, since its numbers are random.

    extra: the file is of a larger model, whose other parts are left.
    """
    missing = set(info["missing_keys"])
    if getattr(module, "pooler", None) is not None and any(key.startswith("pooler.") for key in missing):
        module.pooler = None
    missing = {key for key in missing if "mask_token" not in key and not key.startswith("pooler.")}
    unexpected = [key for key in info["unexpected_keys"] if not (extra and read.OTHER_PARTS.match(key))]
    faults = files.misfits(sorted(missing), sorted(unexpected), sorted(info["mismatched_keys"]))
    if faults:
        raise SourceError(
            f"{what} do not fit {name}; {faults}. Name the model that they were saved from.{files.advice(unexpected)}"
        )


@contextmanager
def fetching(name: str, what: str) -> Iterator[None]:
    """Turn what transformers and the Hub raise into one sentence."""
    one = "is" if what == "configuration" else "are"
    try:
        yield
    except SafetensorError as error:
        raise SourceError(
            f"the {what} of {name!r} {one} no whole safetensors file ({error}). Copy or download the folder again."
        ) from error
    except Exception as error:
        home = type(error).__module__.partition(".")[0]
        if not isinstance(error, (OSError, ValueError, EOFError, UnpicklingError)) and home not in files.NETWORK:
            raise
        reasons, cause = set(), error.__cause__ or error.__context__
        while cause is not None:
            reasons.add(type(cause).__name__)
            cause = cause.__cause__ or cause.__context__
        if Path(name).is_dir():
            why = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise SourceError(f"the {what} in {name!r} cannot be read ({why}). {MEND}") from error
        if "GatedRepoError" in reasons:
            said = f"{one} behind a gate: accept the licence on the Hub and log in (`hf auth login`)"
        elif reasons & {"RepositoryNotFoundError", "HFValidationError"}:
            said = f"{one} not on the Hub: there is no such model, or it is private (`hf auth login`)"
        elif reasons & {"EntryNotFoundError", "RemoteEntryNotFoundError"}:
            said = f"{one} not in its repository, which is none of transformers"
        else:
            said = f"{one} not on this machine and could not be fetched"
        raise SourceError(f"the {what} of {name!r} {said}. {MEND}") from error


# ------------------------------------------------------------------------------------------------------- what comes along


def _labels(module: Any, spec: ModelSpec) -> tuple[str, ...] | None:
    """Class names of the configuration; None where it only counts."""
    named = {int(key): str(value) for key, value in (getattr(module.config, "id2label", None) or {}).items()}
    count = spec.classes or 0
    if sorted(named) != list(range(count)) or all(named[i] == f"LABEL_{i}" for i in range(count)):
        return None
    return tuple(named[i] for i in range(count))


def _problem_type(module: Any) -> ProblemType | None:
    """What the configuration says that the classifier answers; None where it says nothing. Raises SourceError for a regression."""
    said = getattr(module.config, "problem_type", None)
    if said is None or said in get_args(ProblemType):
        return said
    raise read.refused(
        f"a head of problem_type {said!r}, whose outputs are no classes (load it with classes=0 for its encoder alone)"
    )


def _preprocess(name: str, image_px: tuple[int, int] | None, channels: int) -> Preprocess | None:
    """The image processor's settings; None without one, or where they make no image of the model's size.

    image_px: the size that the model takes; None: any.
    """
    from transformers import AutoImageProcessor

    if Path(name).is_dir() and not any((Path(name) / file).is_file() for file in PROCESSOR_FILES):
        return None
    with quiet():
        try:
            processor = AutoImageProcessor.from_pretrained(name, trust_remote_code=False)
        except (
            OSError,
            ValueError,
            TypeError,
            KeyError,
            AttributeError,
        ) as error:  # of settings that are not valid, too
            LOG.warning("%s: no settings of an image processor (%s).", name, next(iter(str(error).splitlines()), error))
            return None
        return processor_preprocess(processor, image_px, channels)
