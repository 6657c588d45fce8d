"""T2T-ViT: its authors' structure -> spec and weights (`read`, `load`), and back where their class can say it (`write`)."""

from .load import from_module, load
from .read import spec_of, weights_of
from .write import is_ours, to_state, write

__all__ = ["from_module", "is_ours", "load", "spec_of", "to_state", "weights_of", "write"]
