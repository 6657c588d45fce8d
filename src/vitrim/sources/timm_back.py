"""Moved to `vitrim.sources.timm.write`; this name stays until 0.2."""

from vitrim.sources.timm.write import *  # noqa: F403
