"""Moved to `vitrim.closed_form.factors`; this name stays until 0.2."""

from vitrim.closed_form.factors import *  # noqa: F403
