"""Numbers for people: each a `<data>` element that carries the exact value and where in the result it stands."""

from collections.abc import Callable, Mapping
from html import escape
from typing import Any

Result = Mapping[str, Any]
Format = Callable[[float], str]
NONE = '<span class="none">–</span>'


def lookup(result: Result, path: str) -> Any:
    """The value at "metrics/dense/top1"; None where a part of the path is absent or None."""
    value: Any = result
    for key in path.split("/"):
        if isinstance(value, Mapping):
            value = value.get(key)
        elif isinstance(value, (list, tuple)) and key.isdigit() and int(key) < len(value):
            value = value[int(key)]
        else:
            return None
    return value


def figure(result: Result, path: str, form: Format) -> str:
    """The figure at a path, formatted; a dash where there is none."""
    value = lookup(result, path)
    if value is None:
        return NONE
    return f'<data value="{escape(repr(value))}" data-path="{escape(path)}">{escape(form(value))}</data>'


def count(value: float) -> str:
    """1205898 -> "1.21 M", 83_600_000 -> "83.6 M"."""
    for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= scale:
            return f"{three(value / scale)} {unit}"
    return f"{value:g}"


def three(value: float) -> str:
    """About three digits, never an exponent."""
    if abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def percent_whole(value: float) -> str:
    return f"{100 * value:.0f} %"


def ms(value: float) -> str:
    return f"{three(value)} ms"


def times(value: float) -> str:
    return f"{value:.2f}×"


def megabytes(value: float) -> str:
    return f"{three(value / 1e6)} MB"


def seconds(value: float) -> str:
    """For people: "48 s", "3 min 20 s"."""
    if value < 90:
        return f"{value:.0f} s" if value >= 10 else f"{value:.1f} s"
    return f"{value // 60:.0f} min {value % 60:.0f} s"


def whole(value: float) -> str:
    return f"{value:,.0f}".replace(",", "\u202f")


def plain(value: float) -> str:
    return f"{value:.3g}"


def signed(value: float) -> str:
    """Points with their sign and a true minus."""
    return f"{value:+.1f}".replace("-", "\u2212")
