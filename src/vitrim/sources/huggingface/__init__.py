"""Hugging Face: transformers' plain Vision Transformers -> spec and weights (`read`, `load`), and back where it fits (`write`)."""

from .load import answer, describe, from_module, load
from .processor import preprocess_of, processor_preprocess
from .read import spec_of, weights_of
from .write import to_module, write

__all__ = [
    "answer",
    "describe",
    "from_module",
    "load",
    "preprocess_of",
    "processor_preprocess",
    "spec_of",
    "to_module",
    "weights_of",
    "write",
]
