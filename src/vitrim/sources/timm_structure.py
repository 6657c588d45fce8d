"""Moved to `vitrim.sources.timm.read`; this name stays until 0.2."""

from vitrim.sources.timm.read import *  # noqa: F403
