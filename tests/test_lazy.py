"""Names at their first use."""

import pytest

import vitrim
from vitrim import lazy
from vitrim.methods import auto


def test_a_package_lists_its_names_and_hints_at_a_near_miss() -> None:
    assert {"METHOD", "compress", "AutoConfig"} <= set(dir(auto))
    with pytest.raises(
        AttributeError, match=r"module 'vitrim\.methods\.auto' has no attribute 'compres'; did you mean"
    ):
        _ = auto.compres  # type: ignore[attr-defined]
    with pytest.raises(AttributeError, match="module 'vitrim' has no attribute 'loda'; did you mean 'load'"):
        _ = vitrim.loda  # type: ignore[attr-defined]


def test_a_later_function_is_the_one_that_is_named() -> None:
    assert lazy.later("math:prod")([2, 3], start=4) == 24
