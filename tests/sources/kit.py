"""What the tests of all families share."""

from __future__ import annotations

from torch import Tensor


def same(ours: Tensor, theirs: Tensor, tolerance: float = 1e-10) -> bool:
    """Equal in shape, and up to a share of the largest value (or of 1)."""
    return ours.shape == theirs.shape and float((ours - theirs).abs().max()) <= tolerance * max(
        1.0, float(theirs.abs().max())
    )
