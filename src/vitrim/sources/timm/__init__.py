"""timm: a plain pre-norm `VisionTransformer` -> spec and weights (`read`, `load`), and back where timm can say it (`write`)."""

from .load import from_module, load
from .read import spec_of, weights_of
from .write import check, to_module, to_timm, write

__all__ = ["check", "from_module", "load", "spec_of", "to_module", "to_timm", "weights_of", "write"]
