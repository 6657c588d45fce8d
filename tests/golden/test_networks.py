"""Nothing that rearranges the package may change what a method makes: see `cases.py`."""

import json
from typing import Any

import pytest

from tests.golden.cases import FILE, TOLERANCE, Case, cases, described, machine

GOLDEN: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def same_kernels() -> bool:
    """Whether the last bits can be those of the file."""
    return machine() == GOLDEN["machine"]


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_a_method_makes_the_network_that_it_made_before(case: Case, same_kernels: bool) -> None:
    before, now = GOLDEN["networks"][case.name], described(case)
    for name in ("spec", "macs", "params", "plan", "report", "history"):
        assert now[name] == before[name], name
    assert set(now["norms"]) == set(before["norms"])
    for name, norm in before["norms"].items():
        assert now["norms"][name] == pytest.approx(norm, rel=TOLERANCE, abs=1e-4), name
    assert now["selection"] == before["selection"]
    if same_kernels:
        assert now["weights"] == before["weights"]


def test_the_file_holds_these_cases_and_no_others() -> None:
    assert set(GOLDEN["networks"]) == {case.name for case in cases()}
