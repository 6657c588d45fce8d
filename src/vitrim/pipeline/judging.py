"""Moved to `vitrim.pipeline.comparison`; this name stays until 0.2."""

from vitrim.pipeline.comparison import *  # noqa: F403
