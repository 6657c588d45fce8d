"""Moved to `vitrim.sources.files`; this name stays until 0.2."""

from vitrim.sources.files import *  # noqa: F403
