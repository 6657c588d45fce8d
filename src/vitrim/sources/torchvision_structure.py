"""Moved to `vitrim.sources.torchvision.read`; this name stays until 0.2."""

from vitrim.sources.torchvision.read import *  # noqa: F403
