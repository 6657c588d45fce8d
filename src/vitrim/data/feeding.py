"""Moved to `vitrim.data.calibration`; this name stays until 0.2."""

from vitrim.data.calibration import *  # noqa: F403
