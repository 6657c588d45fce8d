"""Frozen dataclasses to JSON values and back, each value checked where it stands. Standard library only; it knows no spec.

A codec is told what it cannot see: the names of a union's members, the number of the layout, and fields younger than it.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from .errors import VitrimError, did_you_mean
from .foreign import is_finite

T = TypeVar("T")
Names = Mapping[type, str]
Defaults = Mapping[type, Mapping[str, object]]


def plain(
    value: Any, *, kinds: Names = types.MappingProxyType({}), later: Defaults = types.MappingProxyType({})
) -> Any:
    """As JSON has it: dataclasses become objects, tuples lists.  kinds, later: as a `Codec` has them."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        young = later.get(type(value), {})
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        data = {k: plain(v, kinds=kinds, later=later) for k, v in fields.items() if k not in young or v != young[k]}
        return data | ({"kind": kinds[type(value)]} if type(value) in kinds else {})
    if isinstance(value, (tuple, list)):
        return [plain(item, kinds=kinds, later=later) for item in value]
    if isinstance(value, Mapping):
        return {str(key): plain(item, kinds=kinds, later=later) for key, item in value.items()}
    return value


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested JSON objects by dotted name."""
    if isinstance(value, Mapping) and value:
        return {
            k: v for key, inner in value.items() for k, v in flat(inner, f"{prefix}.{key}" if prefix else key).items()
        }
    return {prefix: value}


@dataclass(frozen=True, kw_only=True)
class Codec:
    """How one family of dataclasses is written and read. Whatever does not fit is refused with `error`.

    schema: version of the layout; files of a newer one are refused.  kinds: members of a union carry their name as `kind`.
    later: fields younger than the schema with their defaults, at which they are left out: earlier values keep their hash.
    most: items that a list may hold, asked before any of them is looked at.
    """

    error: type[VitrimError]
    schema: int
    kinds: Names = field(default_factory=dict)
    later: Defaults = field(default_factory=dict)
    most: Mapping[type, Mapping[str, int]] = field(default_factory=dict)

    def write(self, value: Any) -> dict[str, Any]:
        """Plain JSON values, the schema number among them; `read` is the inverse."""
        return {"schema": self.schema, **plain(value, kinds=self.kinds, later=self.later)}

    def read(self, kind: type[T], data: Any, where: str) -> T:
        """A value from what `write` gave. Refuses an unknown key, a missing one and a newer schema."""
        if not isinstance(data, Mapping):
            raise self.error(f"{where}: expected a JSON object, got {type(data).__name__}.")
        schema = data.get("schema")
        if type(schema) is not int or schema < 1:
            raise self.error(f"{where}: schema={schema!r}; expected {self.schema}. Is this a vitrim file?")
        if schema > self.schema:
            raise self.error(
                f"{where}: written with schema {schema}, this vitrim reads up to {self.schema}. Install a newer vitrim."
            )
        if "schema" not in typing.get_type_hints(kind):
            data = {key: value for key, value in data.items() if key != "schema"}
        found: T = self._dataclass(kind, data, where)
        return found

    def check(self, value: Any, where: str) -> None:
        """Types of a whole tree of dataclasses made in Python, so that a wrong one is named where it stands."""
        hints = typing.get_type_hints(type(value))
        self._refuse_long(type(value), {name: getattr(value, name) for name in self.most.get(type(value), {})}, where)
        for f in dataclasses.fields(value):
            self._check(hints[f.name], getattr(value, f.name), f"{where}.{f.name}")

    def _decode(self, kind: Any, value: Any, where: str) -> Any:
        """Build a value of type `kind` from JSON values."""
        origin, arguments = typing.get_origin(kind), typing.get_args(kind)
        if kind is Any:
            return value
        if origin in (typing.Union, types.UnionType):
            if value is None and type(None) in arguments:
                return None
            members = [a for a in arguments if a is not type(None)]
            return self._decode(members[0], value, where) if len(members) == 1 else self._union(members, value, where)
        if origin is tuple:
            return self._tuple(arguments, value, where)
        if dataclasses.is_dataclass(kind):
            return self._dataclass(kind, value, where)
        if origin is dict:
            return dict(self._object(value, where))
        self._check(kind, value, where)
        if kind is float:
            value = float(value)
        return value

    def _object(self, value: Any, where: str) -> Mapping[str, Any]:
        if not isinstance(value, Mapping):
            raise self.error(f"{where}: expected a JSON object, got {value!r}.")
        return value

    def _tuple(self, arguments: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
        if not isinstance(value, (list, tuple)):
            raise self.error(f"{where}: expected a list, got {value!r}.")
        kinds = self._of_items(arguments, value, where)
        return tuple(
            self._decode(k, item, f"{where}[{i}]") for i, (k, item) in enumerate(zip(kinds, value, strict=True))
        )

    def _of_items(self, arguments: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
        """The type of each item of a tuple."""
        if arguments[-1] is Ellipsis:
            return arguments[:1] * len(value)
        if len(value) != len(arguments):
            raise self.error(f"{where}: expected {len(arguments)} values, got {value!r}.")
        return arguments

    def _union(self, members: list[Any], value: Any, where: str) -> Any:
        names = {self.kinds[member]: member for member in members}
        name = self._object(value, where).get("kind")
        if not isinstance(name, str) or name not in names:
            raise self.error(f"{where}: kind={name!r}{did_you_mean(str(name), names)}; known: {', '.join(names)}.")
        return self._dataclass(names[name], {k: v for k, v in value.items() if k != "kind"}, where)

    def _refuse_long(self, kind: type, value: Mapping[str, Any], where: str) -> None:
        for name, limit in self.most.get(kind, {}).items():
            held = value.get(name)
            if isinstance(held, (list, tuple)) and len(held) > limit:
                raise self.error(f"{where}: {len(held)} {name}; expected at most {limit}.")

    def _dataclass(self, kind: Any, value: Any, where: str) -> Any:
        hints, fields = typing.get_type_hints(kind), dataclasses.fields(kind)
        known = [f.name for f in fields]
        for key in self._object(value, where):
            if key not in known and not (kind in self.kinds and key == "kind"):
                raise self.error(f"{where}: unknown field {key!r}{did_you_mean(str(key), known)}.")
        self._refuse_long(kind, value, where)
        none = dataclasses.MISSING
        required = [f.name for f in fields if f.default is none and f.default_factory is none]
        if missing := [name for name in required if name not in value]:
            raise self.error(f"{where}: missing {', '.join(repr(name) for name in missing)}.")
        given = {name: self._decode(hints[name], value[name], f"{where}.{name}") for name in known if name in value}
        return kind(**given)

    def _check(self, kind: Any, value: Any, where: str) -> None:
        origin, arguments = typing.get_origin(kind), typing.get_args(kind)
        if kind is Any or (value is None and type(None) in arguments):
            return
        if origin in (typing.Union, types.UnionType):
            members = [a for a in arguments if a is not type(None)]
            if len(members) == 1:
                self._check(members[0], value, where)
            elif isinstance(value, tuple(members)):
                self.check(value, where)
            else:
                raise self.error(f"{where}: expected {' | '.join(m.__name__ for m in members)}, got {value!r}.")
        elif origin is Literal:
            if value not in arguments:
                known = [str(a) for a in arguments]
                raise self.error(f"{where}: {value!r}{did_you_mean(str(value), known)}; known: {', '.join(known)}.")
        elif origin is tuple:
            if not isinstance(value, tuple):
                raise self.error(f"{where}: expected a tuple, got {value!r}.")
            for i, (item_kind, item) in enumerate(zip(self._of_items(arguments, value, where), value, strict=True)):
                self._check(item_kind, item, f"{where}[{i}]")
        elif isinstance(kind, type) and dataclasses.is_dataclass(kind):
            if not isinstance(value, kind):
                raise self.error(f"{where}: expected {kind.__name__}, got {value!r}.")
            if not hasattr(type(value), "__post_init__"):
                self.check(value, where)
        elif kind is float:
            if type(value) not in (float, int) or not is_finite(value):
                raise self.error(f"{where}: expected a finite number, got {value!r}.")
        elif origin is None and type(value) is not kind:  # `type`, not isinstance: True is no number here
            raise self.error(f"{where}: expected {kind.__name__}, got {value!r}.")
        elif kind is int and not is_finite(value):
            raise self.error(f"{where}: is a number beyond 64 bits.")
        elif kind is str and not value.isascii() and any("\ud800" <= char <= "\udfff" for char in value):
            raise self.error(f"{where}: {value!r} is no text that UTF-8 can say. Write the name anew.")
