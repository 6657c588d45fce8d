"""Timing: what it leaves as it was, what its rows say, what it refuses. No test asserts a speed."""

import pytest
import torch
from torch import nn

from vitrim import timing
from vitrim.errors import MeasureError


def small(width: int = 8) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, width, 4, 4), nn.Flatten(), nn.Linear(width * 16, 4))


def measured(**settings: object) -> list[timing.Row]:
    settings = {"batch_sizes": (1, 3), "runs": 3, "warmup": 1, "image_shape": (3, 16, 16)} | settings
    return timing.measure({"dense": small(16), "small": small(4)}, **settings)  # type: ignore[arg-type]


def test_every_model_and_batch_has_a_row_with_ordered_quartiles() -> None:
    rows = measured()
    assert [(row["batch"], row["model"]) for row in rows] == [(1, "dense"), (1, "small"), (3, "dense"), (3, "small")]
    for row in rows:
        assert 0 < row["low_ms"] <= row["median_ms"] <= row["high_ms"]
        assert len(row["samples_ms"]) == row["runs"] == 3
        assert row["images_per_s"] == pytest.approx(1e3 * row["batch"] / row["median_ms"])
        assert (row["dtype"], row["device"], row["runtime"]) == ("float32", "cpu", "eager")
        assert row["device_name"]


def test_threads_are_set_while_timing_and_restored_after() -> None:
    before = torch.get_num_threads()
    assert {row["threads"] for row in measured(threads=before + 1)} == {before + 1}
    assert torch.get_num_threads() == before


def test_threads_are_restored_when_a_model_fails() -> None:
    before = torch.get_num_threads()
    with pytest.raises(RuntimeError):
        timing.measure({"dense": small()}, image_shape=(1, 16, 16), threads=before + 1, runs=1)
    assert torch.get_num_threads() == before


def test_model_and_random_state_are_left_as_they_were() -> None:
    model = small().train()
    model[1].eval()
    state = torch.get_rng_state()
    timing.measure({"dense": model}, batch_sizes=(1,), runs=1, image_shape=(3, 16, 16), dtype="bfloat16")
    timing.measure({"dense": model}, batch_sizes=(1,), runs=1, image_shape=(3, 16, 16))
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model] == [True, False, True]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_progress_counts_every_sample() -> None:
    seen: list[tuple[int, int]] = []
    measured(progress=lambda stage, done, total, **facts: seen.append((done, total)))
    assert seen == [(i + 1, 12) for i in range(12)]


def row(model: str, samples: list[float], batch: int = 1) -> timing.Row:
    low, median, high = timing.quartiles(samples)
    setting = {"runtime": "eager", "batch": batch, "threads": 1, "dtype": "float32", "device": "cpu"}
    return {"model": model, "samples_ms": samples, "median_ms": median, "low_ms": low, "high_ms": high} | setting


def test_realised_is_measured_over_ideal() -> None:
    rows = [row("dense", [9.0, 10.0, 11.0]), row("half", [6.0, 8.0, 8.8]), row("half", [1.0], batch=2)]
    (gain,) = timing.speedups(rows, "dense", {"dense": 100, "half": 50})
    assert (gain["ideal"], gain["measured"], gain["realised"]) == (2.0, 1.25, 0.625)
    assert gain["low"] <= gain["measured"] <= gain["high"]


def test_unknown_reference_is_refused_with_the_near_miss() -> None:
    with pytest.raises(MeasureError, match="did you mean 'dense'"):
        timing.speedups([row("dense", [1.0])], "dence", {"dense": 1})


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"runtime": "eagre"}, "did you mean 'eager'"),
        ({"dtype": "float"}, "unknown dtype"),
        ({"batch_sizes": (0,)}, "at least 1"),
        ({"threads": 0}, "threads=0"),
        ({"runs": 0}, "runs=0"),
        ({"device": "cuda:99"}, "CUDA devices"),
        ({"device": "gpu"}, "unknown device"),
        ({"image_shape": None}, "image_shape"),
    ],
)
def test_what_cannot_be_timed_is_refused(setting: dict[str, object], said: str) -> None:
    with pytest.raises(MeasureError, match=said):
        measured(**setting)


def test_a_missing_compiler_is_said_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "find_compiler", lambda: None)
    runtimes, (sentence,) = timing.runtimes_here()
    assert runtimes == ("eager",)
    assert "C++ compiler" in sentence
    assert sentence.count(". ") == 0
    with pytest.raises(MeasureError, match="needs a C\\+\\+ compiler"):
        measured(runtime="compile")


def test_both_runtimes_are_named_where_a_compiler_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "find_compiler", lambda: "/usr/bin/g++")
    assert timing.runtimes_here() == (("eager", "compile"), ())


def test_a_compiler_that_fails_is_said_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise torch._dynamo.exc.TorchDynamoException("no Python.h\nand a long tail")

    monkeypatch.setattr(timing, "find_compiler", lambda: "/usr/bin/g++")
    monkeypatch.setattr(timing, "_call", lambda model, runtime: broken)
    with pytest.raises(MeasureError, match=r"torch.compile failed on this machine \(no Python.h\)"):
        measured(runtime="compile")
