"""Moved to `vitrim.sources.huggingface.read`; this name stays until 0.2."""

from vitrim.sources.huggingface.read import *  # noqa: F403
