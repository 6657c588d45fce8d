"""Moved to `vitrim.sources.huggingface.write`; this name stays until 0.2."""

from vitrim.sources.huggingface.write import *  # noqa: F403
