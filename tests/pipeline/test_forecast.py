"""What a run says of the time that it will take."""

from pathlib import Path
from typing import Any

from tests.pipeline.test_running import RECOVER, job
from vitrim.pipeline import RecoverConfig
from vitrim.pipeline.folder import STAGES
from vitrim.pipeline.forecast import later


def told(out: Path, recover: RecoverConfig | None) -> dict[str, dict[str, Any]]:
    """The facts with which each stage began."""
    seen: dict[str, dict[str, Any]] = {}

    def progress(stage: str, done: int, total: int, **facts: Any) -> None:
        if stage == "stages" and done < total:
            seen[facts["now"]] = facts

    job(out, recover=recover, progress=progress)
    return seen


def test_each_stage_begins_with_what_it_and_the_later_ones_may_take(tmp_path: Path) -> None:
    seen = told(tmp_path / "a", RECOVER)
    assert tuple(seen) == STAGES
    assert seen["compress"]["this_s"] is None  # what a method takes is not known
    assert all(seen[name]["this_s"] > 0 for name in ("recover", "evaluate", "measure"))
    assert seen["recover"]["later_s"] == seen["evaluate"]["this_s"] + seen["evaluate"]["later_s"]
    assert seen["report"]["later_s"] == 0
    assert told(tmp_path / "b", None)["recover"]["this_s"] is None


def test_without_a_forecast_nothing_is_foretold() -> None:
    assert later({}, "recover") == {"this_s": None, "later_s": None}
