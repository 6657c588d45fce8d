"""Local files of weights: `.safetensors`, or `.pth`, `.pt`, `.bin` and the like, read without running their code.

A training checkpoint is unwrapped: the averaged weights before the raw ones (`state_dict_ema`, `model_ema`,
`state_dict`, `model`), the prefixes of wrappers stripped.
"""

from __future__ import annotations

import argparse
import pickle
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..errors import SourceError

WRAPPED = ("state_dict_ema", "model_ema", "state_dict", "model")
PREFIXES = ("module.", "_orig_mod.")
SHOWN = 10


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
            f"{path.name} holds {_kind(state)}, not weights by name. Save them by torch.save(model.state_dict(), ...)."
        )
    if strange := [key for key, value in state.items() if not isinstance(value, Tensor)]:
        raise SourceError(
            f"{path.name} holds more than tensors ({listed(strange)}). Save the weights alone by "
            "torch.save(model.state_dict(), ...)."
        )
    return {_stripped(key): value for key, value in state.items()}


def check(
    path: Path, found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], model: str
) -> None:
    """Raises SourceError listing what is missing, unexpected or misshapen, at most ten names of each."""
    missing = [key for key in expected if key not in found]
    unexpected = [key for key in found if key not in expected]
    shapes = [
        f"{key} {found[key]} (expected {expected[key]})"
        for key in expected
        if key in found and found[key] != expected[key]
    ]
    faults = [
        f"{what}: {listed(names)}"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if names
    ]
    if faults:
        raise SourceError(
            f"{path.name} does not fit {model}; {'; '.join(faults)}. Name the model that it was saved from."
        )


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
        if named := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise SourceError(
                f"{path.name} holds an object of class {named[1]}, which is not read because loading it may run code. Where you "
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


def _kind(value: Any) -> str:
    return "nothing" if value in (None, {}) else f"a {type(value).__name__}"


__all__ = ["check", "listed", "read"]
