"""Names that are imported at their first use: a package that gathers them imports neither torch nor timm itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from .errors import did_you_mean


def names(package: str, homes: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package, which lists `__all__`.  homes: the module of each name, as seen from there."""

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}{did_you_mean(name, homes)}")
        return getattr(import_module(f".{homes[name]}", package), name)

    return get, lambda: sorted(import_module(package).__all__)


def later(place: str) -> Callable[..., Any]:
    """The function at "module:name", imported at the first call."""

    def call(*args: Any, **named: Any) -> Any:
        module, _, name = place.partition(":")
        return getattr(import_module(module), name)(*args, **named)

    return call
