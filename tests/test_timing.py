"""Timing: what it leaves as it was, what its rows say, what it refuses. No test asserts a speed."""

import logging

import pytest
import torch
from torch import nn

from tests.specs import vit
from vitrim import timing
from vitrim.errors import MeasureError
from vitrim.model import build


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


def test_each_model_is_timed_at_its_own_image_size() -> None:
    seen: dict[str, set[tuple[int, ...]]] = {"dense": set(), "small": set()}
    models = {"dense": build(vit(image=16)), "small": build(vit(image=8))}
    for name, model in models.items():
        model.register_forward_pre_hook(lambda _, given, name=name: seen[name].add(tuple(given[0].shape)))  # type: ignore[misc]
    rows = timing.measure(models, batch_sizes=(2,), runs=2, warmup=1)
    assert seen == {"dense": {(2, 3, 16, 16)}, "small": {(2, 3, 8, 8)}}
    assert [row["image_px"] for row in rows] == [[16, 16], [8, 8]]


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
    assert seen == [(0, 12), *((i, 12) for i in range(1, 7)), (6, 12), *((i, 12) for i in range(7, 13))]


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
        ({"device": "meta"}, "holds no numbers to compute with"),
        ({"image_shape": None}, "image_shape"),
    ],
)
def test_what_cannot_be_timed_is_refused(setting: dict[str, object], said: str) -> None:
    with pytest.raises(MeasureError, match=said):
        measured(**setting)


def test_a_model_without_its_name_is_refused() -> None:
    with pytest.raises(MeasureError, match="expected models by name"):
        timing.measure(torch.nn.Identity())  # type: ignore[arg-type]


def test_a_missing_compiler_is_said_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "find_compiler", lambda: None)
    with pytest.raises(MeasureError, match="needs a C\\+\\+ compiler"):
        measured(runtime="compile")


def crowd(other_load: float | None, threads: int = 1, device: str = "cpu") -> str | None:
    return timing.busy([{"other_load": other_load, "threads": threads, "cores": 2, "device": device}])


def test_timings_of_a_busy_machine_come_with_a_verdict() -> None:
    assert {row["cores"] for row in measured(batch_sizes=(1,))} == {timing.load_here()["cores"]}
    assert crowd(1.0) is None  # a core for each
    assert crowd(0.4, threads=2) is None
    assert crowd(None) is None
    assert crowd(9.0, device="cuda") is None
    assert "a load of 1.7 on 2 cores beside 1 thread here." in str(crowd(1.7))
    assert "beside 2 thread" in str(crowd(1.0, threads=2))


def test_the_load_of_others_leaves_out_our_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing.os, "getloadavg", lambda: (3.0, 0.0, 0.0))
    monkeypatch.setattr(timing.torch, "get_num_threads", lambda: 2)
    for spent, others in ((0.0, 3.0), (60.0, 2.0), (6000.0, 1.0)):
        monkeypatch.setattr(timing.time, "process_time", lambda spent=spent: spent)
        assert timing.load_here()["other_load"] == others


def test_torch_says_nothing_on_its_own_while_timing() -> None:
    seen: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: seen.append(record.getMessage())  # type: ignore[method-assign]
    logger, level = logging.getLogger("torch.utils.cpp_extension"), logging.getLogger("torch").level

    class Talks(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            logger.warning("No CUDA runtime is found")
            return x

    logger.addHandler(handler)
    try:
        timing.measure({"a": Talks()}, batch_sizes=(1,), runs=1, image_shape=(1, 2, 2))
    finally:
        logger.removeHandler(handler)
    assert not seen
    assert logging.getLogger("torch").level == level


def test_a_compiler_that_fails_is_said_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise torch._dynamo.exc.TorchDynamoException("no Python.h\nand a long tail")

    monkeypatch.setattr(timing, "find_compiler", lambda: "/usr/bin/g++")
    monkeypatch.setattr(timing, "_call", lambda model, runtime: broken)
    with pytest.raises(MeasureError, match=r"torch.compile failed on this machine \(no Python.h\)"):
        measured(runtime="compile")
