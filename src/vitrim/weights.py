"""Moved to `vitrim.surgery`; this name stays until 0.2."""

from vitrim.surgery import *  # noqa: F403
