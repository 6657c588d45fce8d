"""Moved to `vitrim.closed_form.stream_width`; this name stays until 0.2."""

from vitrim.closed_form.stream_width import *  # noqa: F403
