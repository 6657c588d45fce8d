"""Moved to `vitrim.closed_form.sublayers`; this name stays until 0.2."""

from vitrim.closed_form.sublayers import *  # noqa: F403
