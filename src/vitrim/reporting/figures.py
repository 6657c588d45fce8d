"""Numbers for people: each a `<data>` element that carries the exact value and where in the result it stands."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

Result = Mapping[str, Any]
NONE = Markup('<span class="none">–</span>')


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


def least_gain(gains: Sequence[Mapping[str, Any]]) -> int | None:
    """The place of the least flattering of the measured speed-ups, which is the one to name in a headline; None without any."""
    return min(range(len(gains)), key=lambda index: float(gains[index]["measured"]), default=None)


def figure(result: Result, path: str | None, form: str) -> Markup:
    """The figure at a path, in a form of FORMS; a dash where there is none."""
    value = None if path is None else lookup(result, path)
    if value is None:
        return NONE
    return Markup('<data value="{}" data-path="{}">{}</data>').format(repr(value), path, FORMS[form](value))


def counted(result: Result, path: str | None, count: str | None) -> Markup:
    """How many of the images a share is, below it; nothing where it is not known."""
    share, of = (None if at is None else lookup(result, at) for at in (path, count))
    if share is None or not of:
        return Markup("")
    return Markup('<span class="small">{} of {}</span>').format(
        whole(round(share * of)), figure(result, count, "whole")
    )


def count(value: float) -> str:
    """1205898 -> "1.21 M", 83_600_000 -> "83.6 M"."""
    for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= scale:
            return f"{three(value / scale)} {unit}"
    return f"{value:g}"


def short_of_one(value: float) -> str:
    """A likeness that three digits would round to a whole 1, with as many as tell it from that, to six; empty for any other."""
    if not 0.995 <= value < 1:
        return ""
    return next((text for digits in (4, 5, 6) if float(text := f"{value:.{digits}f}") < 1), "1")


def three(value: float) -> str:
    """About three digits, never an exponent."""
    if abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def seconds(value: float) -> str:
    """For people: "48 s", "3 min 20 s"."""
    if value < 90:
        return f"{value:.0f} s" if value >= 10 else f"{value:.1f} s"
    return f"{value // 60:.0f} min {value % 60:.0f} s"


def whole(value: float) -> str:
    return f"{value:,.0f}".replace(",", "\u202f")


def signed(value: float) -> str:
    """Points with their sign and a true minus."""
    return f"{value:+.1f}".replace("-", "\u2212")


FORMS: dict[str, Callable[[float], str]] = {
    "count": count,
    "giga": lambda value: f"{value / 1e9:.4g}",
    "megabytes": lambda value: f"{three(value / 1e6)} MB",
    "ms": lambda value: f"{three(value)} ms",
    "percent": percent,
    "percent_whole": lambda value: f"{100 * value:.0f} %",
    "plain": lambda value: short_of_one(value) or f"{value:.3g}",
    "seconds": seconds,
    "signed": signed,
    "times": lambda value: f"{value:.2f}×",
    "whole": whole,
}
"""Ways to show a number, by name: those of `vitrim.result.Format`, and the page's own."""
