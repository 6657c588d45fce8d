"""The codec, on dataclasses that are no spec."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest

from vitrim.codec import Codec, flat, plain
from vitrim.errors import DataError


@dataclass(frozen=True)
class Circle:
    radius: float


@dataclass(frozen=True)
class Square:
    side: int
    tilt: float = 0.0


@dataclass(frozen=True)
class Drawing:
    shapes: tuple[Circle | Square, ...]
    title: str | None = None


CODEC = Codec(error=DataError, schema=2, kinds={Circle: "circle", Square: "square"}, later={Square: {"tilt": 0.0}})
DRAWING = Drawing((Circle(0.5), Square(2)))
WRITTEN = {"schema": 2, "shapes": [{"radius": 0.5, "kind": "circle"}, {"side": 2, "kind": "square"}], "title": None}


def test_members_carry_their_kind_and_later_fields_are_left_out_at_their_default() -> None:
    assert CODEC.write(DRAWING) == WRITTEN
    assert CODEC.read(Drawing, WRITTEN, "drawing") == DRAWING
    assert CODEC.write(Drawing((Square(1, 0.25),)))["shapes"] == [{"side": 1, "tilt": 0.25, "kind": "square"}]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"schema": 3}, "drawing: written with schema 3, this vitrim reads up to 2"),
        ({"schema": None}, "drawing: schema=None; expected 2"),
        ({"titel": "a"}, "drawing: unknown field 'titel'; did you mean 'title'?"),
        ({"title": 3}, "drawing.title: expected str, got 3"),
        ({"shapes": [{"kind": "circel", "radius": 1}]}, r"drawing.shapes\[0\]: kind='circel'; did you mean 'circle'?"),
        ({"shapes": [{"kind": ["circle"]}]}, r"drawing.shapes\[0\]: kind=\['circle'\]"),
        ({"shapes": [{"kind": "circle"}]}, r"drawing.shapes\[0\]: missing 'radius'"),
        ({"shapes": [{"kind": "square", "side": True}]}, r"drawing.shapes\[0\].side: expected int, got True"),
        ({"shapes": 3}, "drawing.shapes: expected a list, got 3"),
        ({"shapes": [{"kind": "circle", "radius": math.inf}]}, r"radius: expected a finite number, got inf"),
        ({"shapes": [{"kind": "circle", "radius": 10**400}]}, r"radius: expected a finite number, got 1"),
        ({"shapes": [{"kind": "square", "side": 2**64}]}, r"side: is a number beyond 64 bits"),
        ({"title": "a\ud800"}, "is no text that UTF-8 can say"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_codecs_error(change: dict[str, object], says: str) -> None:
    with pytest.raises(DataError, match=says):
        CODEC.read(Drawing, WRITTEN | change, "drawing")


def test_values_made_in_python_are_checked_where_they_stand() -> None:
    with pytest.raises(DataError, match=r"drawing.shapes\[1\].side: expected int, got '2'"):
        CODEC.check(Drawing((Circle(1), Square("2"))), "drawing")  # type: ignore[arg-type]


def test_plain_values_and_their_dotted_names() -> None:
    assert plain({"a": (1, Circle(2.0))}) == {"a": [1, {"radius": 2.0}]}
    assert flat({"a": {"b": 1, "c": {}}, "d": [2]}) == {"a.b": 1, "a.c": {}, "d": [2]}
