"""What a foreign folder may ask for: its config is read and compared with its weights before anything is built."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import SourceError, VitrimError
from ..foreign import read_json
from ..spec import MOST_BLOCKS

CONFIG = "config.json"
MOST_NUMBER = 1 << 20
"""Above every width, side and vocabulary of a published Vision Transformer or language model."""
_DEPTHS = ("num_hidden_layers", "num_layers", "depth", "depths", "n_layers")
_WEIGHTS = ("*.safetensors", "*.bin", "*.pth", "*.pt")
_FREE = 1 << 24  # numbers that need no file: a new classifier, a pooler that is left out
_MEND = "Copy or download the folder again."


def check_config(folder: Path) -> dict[str, Any]:
    """What a folder's config.json says. Raises SourceError for numbers in it that no Vision Transformer has."""
    where = folder / CONFIG
    said: dict[str, Any] = read_json(where, error=SourceError, mend=_MEND)
    _check(said, "", where)
    return said


def outline(build: Callable[[], nn.Module], folder: Path) -> nn.Module:
    """The network of a folder on the meta device, where it takes no memory. Raises SourceError where its config says none."""
    try:
        with torch.device("meta"):
            return build()
    except VitrimError:
        raise
    except (RuntimeError, TypeError, ValueError, ArithmeticError, AttributeError, LookupError, AssertionError) as error:
        raise SourceError(
            f"{folder / CONFIG}: describes no network ({type(error).__name__}: {error}). {_MEND}"
        ) from error


def check_room(build: Callable[[], nn.Module], folder: Path) -> None:
    """Refuse a network for which the folder's weight files hold too few bytes, before it takes memory.

    A folder without weights is not compared: random ones are all that it can give. Raises SourceError.
    """
    module = outline(build, folder)
    held = sum(path.stat().st_size for pattern in _WEIGHTS for path in folder.glob(pattern) if path.is_file())
    asked = sum(tensor.numel() for tensor in module.state_dict().values())
    if held and asked > _FREE + held:  # a number takes a byte at least
        raise SourceError(
            f"{folder / CONFIG}: asks for {asked:,} numbers, but the weights beside it hold {held:,} bytes. They do not belong "
            f"together. {_MEND}"
        )


def _check(value: Any, key: str, where: Path) -> None:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            _check(inner, str(name), where)
    elif isinstance(value, list):
        for inner in value:
            _check(inner, key, where)
    elif isinstance(value, int) and not isinstance(value, bool):
        most = MOST_BLOCKS if key in _DEPTHS else MOST_NUMBER
        if value > most:
            raise SourceError(f"{where}: {key}={value}; expected at most {most}. {_MEND}")
