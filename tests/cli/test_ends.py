"""How a command ends that does not come to its end: by a signal, for want of memory, or by what it was told."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cli.kit import run
from tests.test_bad_input import contents, draw_images, save_model
from vitrim import processes
from vitrim.errors import CapacityError, ConfigError
from vitrim.tasks import classification

CUT = "compress --model model --method comcat --keep-macs 0.9 --data photos --images 8 --recover-steps 2 --no-measure --config judge.json --out out"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with a model and photos."""
    save_model(tmp_path / "model")
    draw_images(tmp_path / "photos", ("cat", "dog", "owl"), 12)
    (tmp_path / "judge.json").write_text('{"evaluate": {"check_dense": false}}')  # the model is a random one
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_sigterm_leaves_no_scratch_folder_no_lock_and_no_worker(place: Path) -> None:
    (place / "scratch").mkdir()
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
        "TMPDIR": str(place / "scratch"),
    }
    words = [
        "train",
        "--model",
        "model",
        "--data",
        "photos",
        "--batch-size",
        "4",
        "--steps",
        "1000000",
        "--workers",
        "2",
        "--out",
        "out",
        "--quiet",
    ]
    augmented = place / "slow.json"
    augmented.write_text(
        '{"augment": {"randaugment": "rand-m9-mstd0.5-inc1"}, "log_every": 1}'
    )  # decoded by the workers
    with subprocess.Popen(
        [sys.executable, "-m", "vitrim", *words, "--config", str(augmented)],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        metrics = place / "out" / "metrics.jsonl"
        while not metrics.is_file() or not metrics.stat().st_size:
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        assert (place / "out" / ".vitrim.lock").is_file()
        process.terminate()
        _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, said
    assert "Traceback" not in said
    assert not (place / "out").exists()  # no checkpoint was there to go on from
    left = [path.name for path in (place / "scratch").iterdir()]
    assert [name for name in left if not name.startswith("torchinductor")] == []  # torch's own cache
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


@pytest.mark.slow
def test_an_end_that_python_discards_comes_again(tmp_path: Path) -> None:
    """As in the destructor of a loader of images, where every exception is lost."""
    code = """
import os, signal, sys, time
from vitrim import cli

class Loses:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)

def work(*_, **__):
    Loses()
    print("goes on", flush=True)
    time.sleep(60)

cli.VERBS = (*cli.VERBS, "work")
cli.Verbs.get_command = lambda self, ctx, name: cli.click.Command("work", callback=work)
cli.main(["work"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50, check=False)
    assert "goes on" in done.stdout
    assert done.returncode == 128 + signal.SIGTERM
    assert "Traceback" not in done.stderr


def test_ctrl_c_says_how_to_go_on_and_the_run_does(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vitrim.pipeline import stages

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setitem(stages.STAGES, "evaluate", interrupted)
        done = run(*CUT.split())
    assert done.exit_code == 1  # as click has it
    assert "the same command with --resume (and without --force) goes on from out" in done.stderr
    assert "Aborted!" in done.stderr
    assert not (place / "out" / ".vitrim.lock").exists()
    again = run(*CUT.split(), "--resume")
    assert again.exit_code == 0, again.output


@pytest.mark.parametrize("words", ["train --model model --steps 3 --data photos --batch-size 4 --out out", CUT])
def test_ctrl_c_before_there_is_anything_leaves_nothing(
    words: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("vitrim.data.open", interrupted)
    before = contents(place)
    done = run(*words.split())
    assert done.exit_code == 1
    assert "--resume" not in done.stderr
    assert contents(place) == before


@pytest.mark.parametrize(
    "words",
    [
        "compress --model model --method comcat --keep-macs 0.9 --images 8 --no-measure --config judge.json --out out --recover-steps 0",
        "compress --model model --method comcat --keep-macs 0.9,0.8 --images 8 --no-measure --config judge.json --out out --recover-steps 0",
        "train --model model --steps 3 --batch-size 30 --out out",
        "recover model --teacher model --steps 3 --batch-size 30 --out out",
    ],
    ids=["compress", "family", "train", "recover"],
)
def test_a_data_failure_leaves_nothing_in_the_way_of_the_same_command(words: str, place: Path) -> None:
    broken = place / "photos" / "cat" / "0.png"
    whole = broken.read_bytes()
    for photo in (place / "photos" / "dog").iterdir():
        photo.write_bytes(photo.read_bytes()[:60])
    held = {path: path.read_bytes() for path in (place / "photos" / "dog").iterdir()}
    broken.write_bytes(b"no picture")
    before = contents(place)
    failed = run(*words.split(), "--data", "photos")
    assert failed.exit_code == 1, failed.output
    assert contents(place) == before
    broken.write_bytes(whole)
    for path in held:
        path.write_bytes(whole)
    done = run(*words.split(), "--data", "photos")
    assert done.exit_code == 0, done.output


def full(*_: Any, **__: Any) -> None:
    raise RuntimeError(
        "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
    )


@pytest.mark.parametrize(
    ("words", "patched", "mend"),
    [
        ("evaluate model --data photos", "vitrim.model.Vit.forward", "--batch"),
        ("measure model --runs 1 --batch 1", "vitrim.model.Vit.forward", "Measure a smaller batch"),
        (CUT + " --recover-steps 0", "vitrim.closed_form.calibrate", "images (--set images=N)"),
        ("predict model photos/cat/0.png", "vitrim.model.Vit.forward", "--device cpu"),
    ],
    ids=["evaluate", "measure", "compress", "predict"],
)
def test_out_of_memory_is_one_sentence_that_says_what_to_lower(
    words: str, patched: str, mend: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patched, full)
    done = run(*words.split())
    assert done.exit_code == 1, done.output
    assert "memory" in done.stderr.splitlines()[-1]
    assert mend in done.stderr
    assert not (place / "out").exists()


def test_out_of_memory_has_a_type_of_its_own_in_python(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vitrim.sources import load

    model = load(place / "model")
    monkeypatch.setattr(type(model), "forward", full)
    with pytest.raises(CapacityError, match="scoring 64 images at a time on cpu"):
        classification.evaluate(model, place / "photos")


@pytest.mark.parametrize(
    "verb", ["measure model", "evaluate model --data photos", "predict model photos/cat/0.png", "demo"]
)
def test_more_threads_than_a_machine_starts_are_refused(verb: str, place: Path) -> None:
    before = torch.get_num_threads()
    done = run(*verb.split(), "--threads", "100000")
    assert done.exit_code == 2
    assert "threads=100000: expected 1 to" in done.stderr
    assert torch.get_num_threads() == before
    with pytest.raises(ConfigError):
        processes.refuse_threads(0)
    processes.refuse_threads(64)


@pytest.mark.parametrize("name", ["", "cpu:99", "cpu:", "auto:1", ":0", "cuda:x"])
@pytest.mark.parametrize(
    "verb", ["evaluate model --data photos", "measure model", "train --model model --data photos --steps 1 --out out"]
)
def test_a_device_that_is_not_there_is_refused(verb: str, name: str, place: Path) -> None:
    done = run(*verb.split(), "--device", name)
    assert done.exit_code in (1, 2)
    assert f"device {name!r}" in done.stderr
    assert not (place / "out").exists()


def test_going_on_with_other_threads_is_said(place: Path) -> None:
    first = run(*CUT.split(), "--threads", "1")
    assert first.exit_code == 0, first.output
    (place / "out" / "stages" / "report.json").unlink()
    again: Callable[..., Any] = lambda count: run(*CUT.split(), "--threads", count, "--resume")  # noqa: E731
    other, same = again("2"), again("1")
    assert (other.exit_code, same.exit_code) == (0, 0), other.output
    assert "begun with 1 threads and goes on with 2" in other.stderr
    assert "threads" not in same.stderr
    torch.set_num_threads(1)
