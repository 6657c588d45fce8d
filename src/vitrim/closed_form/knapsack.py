"""Moved to `vitrim.allocation`; this name stays until 0.2."""

from vitrim.allocation import *  # noqa: F403
