"""Local files of weights: `.safetensors`, or `.pth`, `.pt`, `.bin` and the like, read without running their code.

A training checkpoint is unwrapped: the averaged weights before the raw ones (`state_dict_ema`, `model_ema`,
`state_dict`, `model` ...), the prefixes of wrappers stripped. `reconciled` takes what is left to the names of a family:
a prefix that every name shares goes (Lightning's `model.`), split queries, keys and values are joined. Nothing is left
out but classifiers, and those only where the caller asks for none (`without_heads`).
"""

from __future__ import annotations

import argparse
import logging
import pickle
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .. import __version__
from ..errors import SourceError
from ..files import make_whole, sync_file, write_json

WRAPPED = ("state_dict_ema", "model_ema", "state_dict", "model_state_dict", "model", "net")
PREFIXES = ("module.", "_orig_mod.")
SHOWN = 10
WEIGHTS, CONFIG = "model.safetensors", "config.json"
"""Files of a folder that `write` makes, as timm, transformers and the Hub name them."""
MARK = {"vitrim": __version__}
"""What an export says in its config, or in the header of its one file: `force` replaces nothing else."""
NETWORK = ("huggingface_hub", "httpx", "httpcore", "requests", "urllib3")
"""Packages whose errors mean that a download failed or broke off."""
SPLIT = tuple(
    tuple(style.format(part) for part in parts)
    for style in ("{}", "{}_proj", "to_{}", "w{}", "{}_proj_weight")
    for parts in (("q", "k", "v"), ("query", "key", "value"))
)
"""Names under which files hold queries, keys and values apart, beside where a family joins them."""
LOG = logging.getLogger("vitrim.sources")


def read(path: Path) -> dict[str, Tensor]:
    """Tensors by name, on the CPU, as the file has them. Raises SourceError."""
    if path.is_dir():
        raise SourceError(f"checkpoint {path.name!r} is a folder; expected a .safetensors, .pth or .pt file in it.")
    if not path.is_file():
        raise SourceError(f"checkpoint {str(path)!r} is not there; expected a .safetensors, .pth or .pt file.")
    if path.suffix == ".safetensors":
        try:
            found: Any = load_file(path)
        except (SafetensorError, OSError) as error:
            raise SourceError(
                f"{path.name} is no whole safetensors file ({error}). Copy or download it again."
            ) from None
    else:
        found = _unpickled(path)
    state = _unwrapped(found)
    if not isinstance(state, Mapping) or not state or not all(isinstance(key, str) for key in state):
        raise SourceError(
            f"{path.name} holds {'nothing' if state in (None, {}) else f'a {type(state).__name__}'}, not weights by name. Save them by torch.save(model.state_dict(), ...)."
        )
    if strange := [key for key, value in state.items() if not isinstance(value, Tensor)]:
        raise SourceError(
            f"{path.name} holds more than tensors ({listed(strange)}). Save the weights alone by "
            "torch.save(model.state_dict(), ...)."
        )
    if all(key.startswith("module.") for key in state if key != "n_averaged"):  # the counter of torch's averaged model
        state = {key: value for key, value in state.items() if key != "n_averaged"}
    stripped = {_stripped(key): value for key, value in state.items()}
    if len(stripped) != len(state):
        twice = [key for key in state if key != _stripped(key) and _stripped(key) in state]
        raise SourceError(
            f"{path.name} holds weights twice, with the prefix of a wrapper and without: {listed(twice)}. Save one of them alone "
            "by torch.save(model.state_dict(), ...)."
        )
    return stripped


def reconciled(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, file: str) -> dict[str, Tensor]:
    """A file's tensors under a family's names, as far as that changes no number: what still does not fit, `check` says.

    expected: the family's own tensors by name.  Raises SourceError where a weight is stored as whole numbers (quantised).
    """
    state = dict(state)
    shared = _shared_prefix(state, expected)
    if shared:
        LOG.info("%s: every name begins with %r, which is left out.", file, shared)
        state = {key.removeprefix(shared): value for key, value in state.items()}
    for name in expected:
        if name not in state:
            _join(state, name)
    whole = [
        f"{key} ({str(value.dtype).removeprefix('torch.')})"
        for key, value in state.items()
        if key in expected and expected[key].is_floating_point() and not value.is_floating_point()
    ]
    if whole:
        raise SourceError(
            f"{file} holds whole numbers instead of weights in floating point: {listed(whole)}. A quantised model is not read; "
            "save the weights that it was made from."
        )
    return state


def without_heads(state: Mapping[str, Tensor], *, file: str) -> dict[str, Tensor]:
    """The tensors without classifiers of any name, auxiliary ones included; what goes is told in the log."""
    gone = [key for key in state if _is_head(key)]
    if gone:
        LOG.info("%s: without its classifier: %s.", file, listed(gone))
    return {key: value for key, value in state.items() if key not in gone}


def with_classifier(
    state: Mapping[str, Tensor], weight: str, classes: int | None, *, file: str
) -> tuple[dict[str, Tensor], int]:
    """A file's tensors and the classes of its classifier, 0 without one. Raises SourceError for other classes than asked for.

    weight: name of the classifier's matrix.  classes: None takes what the file has, 0 leaves every classifier out.
    """
    found = state[weight].shape[0] if weight in state else 0
    if stays(classes, found, f"the classifier in {file} has"):
        return dict(state), found
    return without_heads(state, file=file), 0


def stays(classes: int | None, found: int, where: str) -> bool:
    """Whether a classifier stays as it is; else, with classes=0, it goes. Raises SourceError for other classes than there are.

    where: what has so many, for the sentence.
    """
    if classes not in (None, 0, found):
        raise SourceError(
            f"classes={classes}: {where} {found} classes. Leave classes out to keep them, or give the model a new head "
            "(`vitrim train --new-head`)."
        )
    return classes != 0


def another_size(path: Path, own: Sequence[int], name: str, asked: Sequence[int], fits: str = "") -> SourceError:
    """The error for a file of another image size than the name's; both as (height, width).  fits: names of its own size."""
    return SourceError(
        f"{path.name} was made for images of {px(own)}, and {name!r} is for {px(asked)}. Pass the size to run it at: --image-px "
        f"{','.join(map(str, dict.fromkeys(own)))} (image_px=) is its own, and for another one its positions are resized, once; or "
        f"name the model that it was saved from{fits}."
    )


def px(sides: Sequence[int]) -> str:
    """Height and width, for a sentence."""
    return f"{sides[0]} x {sides[1]} px"


def unfetched(name: str, why: str) -> SourceError:
    """The error for weights that cannot be had."""
    return SourceError(
        f"the weights of {name!r} are not on this machine and could not be fetched ({why}). Pass a local file "
        "(--checkpoint PATH, checkpoint=), or take random weights (--no-pretrained, pretrained=False)."
    )


def fill(module: nn.Module, state: Mapping[str, Tensor], path: Path, model: str) -> nn.Module:
    """A module with a file's numbers in float32, in eval mode. Raises SourceError listing what does not fit."""
    check(path, state, {key: tuple(value.shape) for key, value in module.state_dict().items()}, model)
    module.load_state_dict({key: value.float() for key, value in state.items()}, strict=True, assign=True)
    return module.eval()


def write(
    out: Path, state: Mapping[str, Tensor], config: Mapping[str, Any], *, metadata: Mapping[str, str] | None = None
) -> Path:
    """A folder with `model.safetensors` and `config.json`, whole or not at all; gives the folder. Raises SourceError.

    metadata: further texts for the header of the weights.
    """

    def put(staging: Path) -> None:
        save_file(dict(state), staging / WEIGHTS, metadata={"format": "pt", **(metadata or {})})
        sync_file(staging / WEIGHTS)
        write_json(staging / CONFIG, {**config, **MARK})

    return write_folder(out, put)


def write_folder(out: Path, put: Callable[[Path], None]) -> Path:
    """A folder that `put` fills, whole or not at all; gives the folder. Raises SourceError where it cannot be."""
    if out.exists():
        raise SourceError(f"{out.name!r} is there already; choose another name, or remove it.")
    try:
        make_whole(out, put)
    except (OSError, SafetensorError) as error:
        raise SourceError(
            f"{out.name!r} could not be written ({getattr(error, 'strerror', None) or error}); nothing is left of it. Give a "
            "folder in which files can be written."
        ) from error
    return out


def check(path: Path, state: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], model: str) -> None:
    """Raises SourceError listing what is missing, unexpected or misshapen, at most ten names of each."""
    found = {key: tuple(value.shape) for key, value in state.items()}
    missing = [key for key in expected if key not in found]
    unexpected = [key for key in found if key not in expected]
    shapes = [(key, found[key], expected[key]) for key in expected if key in found and found[key] != expected[key]]
    if faults := misfits(missing, unexpected, shapes):
        only_heads = not missing and not shapes and all(_is_head(key) for key in unexpected)
        advice = " Or leave every classifier out (classes=0)." if only_heads else ""
        raise SourceError(f"{path.name} does not fit {model}; {faults}. Name the model that it was saved from.{advice}")


def misfits(
    missing: Iterable[str], unexpected: Iterable[str], shapes: Iterable[tuple[str, Iterable[int], Iterable[int]]]
) -> str:
    """What does not fit, for a sentence, at most ten names of each; "" where all fits.

    shapes: names with the shape that was found and the one that was expected.
    """
    odd = [f"{key} {tuple(found)} (expected {tuple(expected)})" for key, found, expected in shapes]
    kinds = {"missing": list(missing), "unexpected": list(unexpected), "of another shape": odd}
    return "; ".join(f"{what}: {listed(names)}" for what, names in kinds.items() if names)


def listed(names: Iterable[str]) -> str:
    """At most ten names, then how many more."""
    every = list(names)
    more = f" and {len(every) - SHOWN} more" if len(every) > SHOWN else ""
    return ", ".join(every[:SHOWN]) + more


def _unpickled(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # DeiT's files carry their training arguments
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if named := re.search(r"GLOBAL ([\w.]+)|class '?([\w.]+)", str(error)):
            raise SourceError(
                f"{path.name} holds an object of class {named[1] or named[2]}, which is not read because loading it may run code. Where you "
                "trust the file, load it yourself and save the weights alone by torch.save(model.state_dict(), ...)."
            ) from None
        raise SourceError(f"{path.name} is no file of torch.save. Expected a .safetensors, .pth or .pt file.") from None
    except (EOFError, OSError, RuntimeError, ValueError, KeyError) as error:
        raise SourceError(
            f"{path.name} cannot be read as a file of torch.save ({str(error).splitlines()[0] if str(error) else 'it ends early'})."
            " Copy or download it again."
        ) from None


def _unwrapped(found: Any) -> Any:
    while isinstance(found, Mapping):
        inner = next((found[key] for key in WRAPPED if isinstance(found.get(key), Mapping)), None)
        if inner is None:
            break
        found = inner
    return found


def _stripped(key: str) -> str:
    while key.startswith(PREFIXES):
        key = key.split(".", 1)[1]
    return key


def _is_head(key: str) -> bool:
    """Whether a tensor stands behind the pooled features."""
    return bool(re.search(r"head|classif|aux|pre_logits", key.partition(".")[0]))


def _shared_prefix(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """The first parts that all names have in common and no expected name has; "" where there are none.

    Taken only where names of the family come out.
    """
    firsts = {key.partition(".")[0] for key in state}
    shared, rest = "", list(state)
    while len(firsts) == 1 and all("." in key for key in rest) and not any(key in expected for key in rest):
        shared += f"{firsts.pop()}."
        rest = [key.partition(".")[2] for key in rest]
        firsts = {key.partition(".")[0] for key in rest}
    return shared if any(key in expected for key in rest) else ""


def _join(state: dict[str, Tensor], name: str) -> None:
    """Make the joined `name` of queries, keys and values, if the file holds the three apart in its place."""
    named = re.fullmatch(r"(.*\.)(?:qkv\.|in_proj_)(weight|bias)", name)
    if named is None:
        return
    place, kind = named[1], f".{named[2]}"
    for style in SPLIT:
        ending = "" if style[0].endswith("_weight") else kind
        keys = [f"{place}{part}{ending}" for part in style]
        if (ending or kind == ".weight") and all(key in state for key in keys):
            thirds = [state[key] for key in keys]
            if len({third.shape for third in thirds}) == 1:
                state[name] = torch.cat(thirds)
                for key in keys:
                    del state[key]
            return
