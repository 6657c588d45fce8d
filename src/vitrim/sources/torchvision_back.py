"""Moved to `vitrim.sources.torchvision.write`; this name stays until 0.2."""

from vitrim.sources.torchvision.write import *  # noqa: F403
