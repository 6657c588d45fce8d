"""Moved to `vitrim.architectures.t2t`; this name stays until 0.2."""

from vitrim.architectures.t2t import *  # noqa: F403
