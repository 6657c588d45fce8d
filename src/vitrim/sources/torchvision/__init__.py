"""torchvision: its `VisionTransformer` -> spec and weights (`read`, `load`), and back where torchvision can say it (`write`)."""

from .load import from_module, load, module_named, names, weights_named
from .read import spec_of, weights_of
from .write import to_module, to_torchvision, write

__all__ = [
    "from_module",
    "load",
    "module_named",
    "names",
    "spec_of",
    "to_module",
    "to_torchvision",
    "weights_named",
    "weights_of",
    "write",
]
