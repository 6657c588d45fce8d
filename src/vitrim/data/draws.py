"""Random numbers by key: every draw is a function of (seed, epoch, sample, ...), never of what was drawn before.

The hash is splitmix64's finaliser, folded over the parts of the key. It is written out here because the splits that it
makes are part of the data's meaning: they may not change with the version of numpy or Python.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)

Ints = int | np.ndarray


def mix(*parts: Ints) -> np.ndarray:
    """uint64 [n] hash of a key whose parts are ints (any sign) or int arrays that broadcast to [n]."""
    state = np.zeros(1, dtype=np.uint64)
    for part in parts:
        bits = np.atleast_1d(np.asarray(part)).astype(np.int64).view(np.uint64)
        state = state * _FIRST + bits + _GOLDEN
        state = (state ^ (state >> np.uint64(30))) * _FIRST
        state = (state ^ (state >> np.uint64(27))) * _SECOND
        state = state ^ (state >> np.uint64(31))
    return state


def uniform(*parts: Ints) -> np.ndarray:
    """float64 [n] in [0, 1), one for each key."""
    return (mix(*parts) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def ranked(*parts: Ints) -> np.ndarray:
    """int64 [n]: the positions of the keys in the order of their hashes; a keyed permutation."""
    return np.argsort(mix(*parts), kind="stable").astype(np.int64)


@contextmanager
def seeded(*parts: int) -> Iterator[None]:
    """Seed the global CPU generators of Python, numpy and torch by the key, and put them back afterwards.

    timm's and torchvision's augmentations draw from these. The accelerator's generators are left alone.
    """
    seed = int(mix(*parts)[0])
    before = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.default_generator.manual_seed(seed & 0x7FFFFFFFFFFFFFFF)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.default_generator.set_state(before[2])
