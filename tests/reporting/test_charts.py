"""Charts: ticks that enclose their range and are told apart, and curves that say in words what they draw."""

from typing import Any, get_args

import pytest

from tests.reporting.reading import Page
from vitrim import result
from vitrim.reporting import charts
from vitrim.result import Axis, Curve, Series


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.6512, 0.6533), (3, 3), (0, 0), (-5, 17)])
def test_ticks_enclose_their_range(low: float, high: float) -> None:
    ticks = charts.nice_ticks(low, high)
    assert ticks[0] <= low <= high <= ticks[-1]
    assert 2 <= len(ticks) <= 8
    assert ticks == sorted(set(ticks))


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.0, 0.0149), (0.6512, 0.6533), (0, 3e-5), (1200, 4700)])
@pytest.mark.parametrize("form", ["plain", "percent"])
def test_ticks_are_told_apart(low: float, high: float, form: str) -> None:
    ticks = charts.nice_ticks(low, high)
    words = [charts.tick_words(ticks, form)(tick) for tick in ticks]
    assert len(set(words)) == len(ticks)
    values = [float(word.removesuffix(" %").replace(",", "")) for word in words]
    assert values == pytest.approx([tick * (100 if words[0].endswith("%") else 1) for tick in ticks])


def test_smoothing_keeps_the_last_step_and_the_range() -> None:
    points = [(float(step), float(step % 7)) for step in range(1, 1000)]
    means = charts.smooth(points)
    assert len(means) <= 160
    assert means[-1][0] == 999
    assert all(0 <= value <= 6 for _, value in means)


def drawn(*series: Series, **axes: Any) -> Page:
    found = Curve(title="Of <it>", x=axes.get("x", Axis()), y=axes.get("y", Axis()), series=series)
    return Page(charts.curve(found.to_dict(), name="one"))


def test_a_curve_says_in_words_where_its_lines_begin_and_end() -> None:
    line = Series(name="<cost>", points=((10, 0.75), (40, 0.5)))
    aim = Series(name="aim", points=((0, 0.5), (40, 0.5)), style="dashed", named=True)
    seen = drawn(line, aim, x=Axis(label="<step>", format="whole"), y=Axis(label="share", format="percent"))
    said = "".join(seen.text)
    assert "<cost> from 75.0 % to 50.0 %; aim from 50.0 % to 50.0 %." in said
    assert {"Of <it>", "<step>", "share", "aim", "<cost>"} <= set(seen.text)
    assert [line["class"] for line in seen.of("polyline")] == ["line", "reference"]


def test_a_single_point_is_a_dot_and_a_marked_line_has_one_at_each() -> None:
    alone = drawn(Series(name="a", points=((0.5, 0.25),)), x=Axis(format="percent"))
    assert (len(alone.of("circle")), len(alone.of("polyline"))) == (1, 0)
    assert "a: 0.25 at 50.0 %" in alone.text
    marked = drawn(Series(name="a", points=((1, 2), (2, 3), (3, 1)), style="marked"))
    assert (len(marked.of("circle")), len(marked.of("polyline"))) == (3, 1)


@pytest.mark.parametrize("points", [((0, 0),), ((0, 3), (1, 3)), ((-2, -5), (3, 17)), ((1e-5, 1e9), (2e-5, 2e9))])
@pytest.mark.parametrize("form", get_args(result.Format))
def test_every_format_gives_a_whole_chart(points: tuple[tuple[float, float], ...], form: result.Format) -> None:
    seen = drawn(Series(name="a", points=points), x=Axis(format=form), y=Axis(format=form))
    places = [float(line[key] or "") for line in seen.of("line") for key in ("y1", "y2")]
    assert all(0 <= place <= 210 for place in places)


def test_bounds_hold_the_scale() -> None:
    line = Series(name="a", points=((2, 0.9), (3, 0.95)))
    said = drawn(line, x=Axis(bounds=(1, 5)), y=Axis(format="percent", bounds=(0, 1))).text
    assert {"0 %", "100 %", "1", "5"} <= set(said)
    assert "0" not in said
