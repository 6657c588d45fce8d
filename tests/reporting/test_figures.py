"""Numbers as people read them."""

from typing import get_args

import pytest

from vitrim import result
from vitrim.reporting import figures


@pytest.mark.parametrize(
    ("value", "said"), [(1_205_898, "1.21 M"), (83_600_000, "83.6 M"), (4_598_882_304, "4.60 G"), (12, "12")]
)
def test_counts_are_short(value: int, said: str) -> None:
    assert figures.count(value) == said


def test_every_format_of_a_section_can_be_shown() -> None:
    for name in get_args(result.Format):
        assert figures.FORMS[name](0.25)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.9998, "0.9998"), (0.99996, "0.99996"), (0.9999999, "1"), (1.0, "1"), (0.9949, "0.995"), (0.9953, "0.9953")],
)
def test_a_likeness_short_of_one_is_not_shown_as_a_whole_one(value: float, text: str) -> None:
    assert figures.FORMS["plain"](value) == text
