"""Configs: checked when they are made, read from plain values with one voice for what is wrong, and documented. No torch."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypeVar, dataclass_transform

import pydantic
from pydantic import ConfigDict, Field

from .errors import ConfigError, VitrimError, did_you_mean
from .foreign import MOST, is_finite

C = TypeVar("C")

_SAID = {
    "greater_than": "expected a number above {gt:g}",
    "greater_than_equal": "expected {ge:g} or more",
    "less_than": "expected a number below {lt:g}",
    "less_than_equal": "expected {le:g} or less",
    "finite_number": "expected a finite number",
    "literal_error": "expected {expected}",
    "dataclass_type": "expected a {class_name}",
    "tuple_type": "expected a list",
    "string_type": "expected text",
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float"), "expected a whole number"),
    **dict.fromkeys(("float_type", "float_parsing"), "expected a number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "expected true or false"),
}
"""Pydantic's findings in our words; the others of its own begin with "Input should be"."""


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(Field,))
def checked(kind: type[C]) -> type[C]:
    """A frozen dataclass whose values are checked: a wrong one is told as `read` tells it. The strings below fields are their docs."""
    rules = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)
    made = pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=rules)(kind)
    check = made.__init__

    def init(self: Any, **values: Any) -> None:
        _check_size(values, type(self).__name__)
        try:
            check(self, **values)
        except pydantic.ValidationError as error:
            raise _told(error, made, type(self).__name__) from None

    made.__init__ = init  # type: ignore[method-assign]
    made.__doc__ = "\n".join([str(kind.__doc__), "", *(f"{name}: {text}" for name, text in docs(made).items())])
    return typing.cast("type[C]", made)


def read(kind: type[C], values: Mapping[str, Any], *, where: str = "config") -> C:
    """A config from plain values.  where: what messages begin with.

    Raises ConfigError that names the key with the near miss, or the value and what was expected.
    """
    _check_keys(kind, values, where)
    _check_size(values, where)
    try:
        return pydantic.TypeAdapter(kind).validate_python(dict(values))
    except pydantic.ValidationError as error:
        raise _told(error, kind, where) from None


def _check_keys(kind: type, values: Mapping[str, Any], where: str, within: str = "") -> None:
    for key, value in values.items():
        if key not in (known := keys(kind)):
            raise ConfigError(_unknown(str(key), known, where, within))
        inner = nested(kind, key)
        if inner is not None and isinstance(value, Mapping):
            _check_keys(inner, value, where, f"{within}{key}.")


def _check_size(values: Mapping[str, Any], where: str, within: str = "") -> None:
    """Refuses whole numbers beyond 64 bits, which neither torch nor a counter of steps takes."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            _check_size(value, where, f"{within}{key}.")
        elif type(value) is int and not is_finite(value):
            raise ConfigError(f"{where}: {within}{key} is a number beyond 64 bits; expected at most {MOST}.")


def keys(kind: type) -> list[str]:
    """The names of a config's fields."""
    return [f.name for f in dataclasses.fields(kind)]


def default(kind: type, key: str) -> Any:
    """The default of a field."""
    found = next(f.default for f in dataclasses.fields(kind) if f.name == key)
    return found.default if isinstance(found, pydantic.fields.FieldInfo) else found


def nested(kind: type, key: str) -> type | None:
    """The dataclass that a field holds; None where it holds something else."""
    return next((k for k in members(kind, key) if isinstance(k, type) and dataclasses.is_dataclass(k)), None)


def members(kind: type, key: str) -> tuple[Any, ...]:
    """The types that a field may have: those of a union, or its only one."""
    hint = typing.get_type_hints(kind)[key]
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def docs(kind: type) -> dict[str, str]:
    """What stands below each field, in one line; "" where nothing does. A subclass may leave its parent's words."""
    found = {f.name: "" for f in dataclasses.fields(kind)}
    for base in reversed(kind.__mro__):
        for name, about in vars(base).get("__pydantic_fields__", {}).items():
            if about.description:
                found[name] = " ".join(about.description.split())
    return found


def _unknown(key: str, known: list[str], where: str, within: str = "") -> str:
    return f"{where}: unknown key {within + key!r}{did_you_mean(key, known) or '.'} Known: {', '.join(known)}."


def _told(error: pydantic.ValidationError, kind: type, where: str) -> ConfigError:
    return ConfigError(" ".join(_sentences(error, kind, where)))


def _sentences(error: pydantic.ValidationError, kind: type, where: str) -> Iterator[str]:
    """One for each finding: our own where `__post_init__` raised it."""
    for found in error.errors(include_url=False):
        context = found.get("ctx") or {}
        ours, (*outer, last) = context.get("error"), found["loc"] or ("",)
        if isinstance(ours, VitrimError):
            yield f"{where}: {ours}"
        elif found["type"] == "unexpected_keyword_argument":
            holder = nested(kind, str(outer[0])) if outer else kind
            yield _unknown(str(last), keys(holder or kind), where, "".join(f"{part}." for part in outer))
        else:
            place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in found["loc"])[1:]
            said = _SAID.get(found["type"], "").format(**context)
            said = said or found["msg"].replace("Input should be", "expected", 1)
            yield f"{where}: {place}={found['input']!r}; {said}{'.' if outer else _hint(kind, str(last), found)}"


def _hint(kind: type, key: str, found: Mapping[str, Any]) -> str:
    """The end of a sentence: the near miss of a name, or the usual number."""
    if found["type"] == "literal_error":
        return did_you_mean(str(found["input"]), _choices(kind, key)) or "."
    usual = default(kind, key)
    return f", such as {usual!r}." if isinstance(usual, int | float) and not isinstance(usual, bool) else "."


def _choices(kind: type, key: object) -> list[str]:
    hints = [hint for hint in members(kind, str(key)) if typing.get_origin(hint) is Literal]
    return [str(choice) for hint in hints for choice in typing.get_args(hint)]


@checked
class Augment:
    """What is drawn anew for each image and epoch. The defaults are a crop and a flip, which run fastest."""

    crop: Literal["auto", "pad", "resized", "none"] = "auto"
    """auto: pad up to 64 px, resized above. pad: shift by up to `pad` px. resized: a random part, scaled to size."""
    pad: int = Field(default=4, ge=0, le=1024)
    """Pixels of black on each side before a shifted crop."""
    min_area: float = Field(default=0.08, gt=0, le=1)
    """Least share of the image's area that a resized crop keeps."""
    flip: float = Field(default=0.5, ge=0, le=1)
    """Probability of a horizontal flip."""
    randaugment: str | None = None
    """timm's description of RandAugment, such as "rand-m9-mstd0.5-inc1"; None: off."""
    jitter: float = Field(default=0.0, ge=0)
    """Strength of brightness, contrast and saturation jitter."""
    erase: float = Field(default=0.0, ge=0, le=1)
    """Probability that one rectangle is set to the mean colour."""
