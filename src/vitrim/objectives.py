"""Moved to `vitrim.training.objectives`; this name stays until 0.2."""

from vitrim.training.objectives import *  # noqa: F403
