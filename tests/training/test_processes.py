"""Several processes: counted before anything else, ended together, and resumed as if nothing had been."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import pytest
import torch
from PIL import Image

from tests.cli.kit import run as command
from tests.training.kit import pictures, settings, tiny
from vitrim import artifact
from vitrim.errors import TrainingError
from vitrim.training import fit, ready
from vitrim.training.objectives import Supervised

RANKED = {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


def as_one_of_two(monkeypatch: pytest.MonkeyPatch, **changes: str) -> None:
    for name, text in {**RANKED, "WORLD_SIZE": "2", **changes}.items():
        monkeypatch.setenv(name, text)


def test_an_accelerate_that_counts_otherwise_stops_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Alone:
        num_processes = 1

        def __init__(self, **asked: Any) -> None:
            assert asked["cpu"] is True

    as_one_of_two(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(accelerate, "Accelerator", Alone)
    with pytest.raises(TrainingError, match=r"world_size=2.*Accelerate counts 1.*a model of its own"):
        fit(tiny(), Supervised(), pictures(), settings(world_size=2, device="auto"), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_processes_that_cannot_find_each_other_do_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    as_one_of_two(monkeypatch)
    monkeypatch.delenv("MASTER_PORT")
    with pytest.raises(TrainingError, match="WORLD_SIZE=2 and not MASTER_PORT"):
        ready(settings(world_size=2), pictures())


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    as_one_of_two(monkeypatch)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(TrainingError, match=r"2 processes on this machine, which has 1 GPU"):
        ready(settings(world_size=2, device="auto"), pictures())


@pytest.mark.parametrize("words", ["evaluate x", "compress --model x", "export x --format timm --out y", "demo"])
def test_verbs_that_share_nothing_refuse_several_processes(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    as_one_of_two(monkeypatch)
    done = command(*words.split())
    assert done.exit_code == 2
    assert "runs in one process, and torchrun started 2" in done.stderr


# One process that imports torch once and forks: the ranks of each life are processes of their own, one ended by SIGKILL.
PAIRS = """
import json, os, signal, socket, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from tests.methods.uvc.kit import WIDE, quick
from tests.training.kit import pictures, tiny, weights
from vitrim import pipeline
from vitrim.budget import Budget
from vitrim.data import Augment
from vitrim.errors import TrainingError
from vitrim.methods.uvc import compress
from vitrim.pipeline import RecoverConfig
from vitrim.training import loop

root = Path(sys.argv[1])

def recover(out):
    config = RecoverConfig(steps=8, batch_size=8, lr=1e-2, world_size=2, checkpoint_seconds=0, log_every=1, eval_every=4,
                           augment=Augment(crop="pad", pad=2))
    return pipeline.recover(tiny(seed=1), teacher=tiny(), data=pictures(), config=config, out=out, resume=True).model

def uvc(out):
    config = quick(Budget(keep_macs=0.4), steps=8, warmup=0.1, world_size=2, checkpoint_seconds=0, device="auto")
    return compress(tiny(WIDE), config, data=pictures(), folder=out, resume=True).model

def live(job, out, rank, port, killed, at):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port))
    step = loop._Run._step
    def mortal(self, micros):
        if rank == killed and self.state.done == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, micros)
    loop._Run._step = mortal
    try:
        model = {"recover": recover, "uvc": uvc}[job](root / out)
    except TrainingError as error:
        assert "another of the 2 processes ended" in str(error), error
        return 7
    torch.save(weights(model), root / f"{out}-{rank}.pt")
    return 0

ends = {}
for job, out, killed, at in json.loads(sys.argv[2]):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    for rank in (0, 1):
        child = os.fork()
        if child == 0:
            try:
                os._exit(live(job, out, rank, port, killed, at))
            except BaseException:
                import traceback
                traceback.print_exc()
                os._exit(1)
        ranks.append(child)
    ends.setdefault(out, []).append([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in ranks])
print(json.dumps(ends))
"""
LIVES = [
    ("recover", "recover-whole", None, 0),
    ("recover", "recover-again", 0, 5),
    ("recover", "recover-again", None, 0),
    ("uvc", "uvc-whole", None, 0),
    ("uvc", "uvc-again", 1, 3),
    ("uvc", "uvc-again", None, 0),
]
"""Job, folder, which process is killed, and before which step."""


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    (folder / "pairs.py").write_text(PAIRS)
    done = subprocess.run(
        [sys.executable, str(folder / "pairs.py"), str(folder), json.dumps(LIVES)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=280,  # far below the half hour that a lost process would be waited for
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ends = json.loads(done.stdout.splitlines()[-1])
    assert ends == {
        "recover-whole": [[0, 0]],
        "recover-again": [[-9, 7], [0, 0]],
        "uvc-whole": [[0, 0]],
        "uvc-again": [[7, -9], [0, 0]],
    }, done.stderr
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("job", ["recover", "uvc"])
def test_a_killed_process_ends_the_others_and_the_resumed_run_is_the_undisturbed_one(job: str, pairs: Path) -> None:
    whole = torch.load(pairs / f"{job}-whole-0.pt", weights_only=True)
    for rank in (0, 1):
        again = torch.load(pairs / f"{job}-again-{rank}.pt", weights_only=True)
        assert torch.equal(again, whole)

    def lines(name: str) -> list[dict[str, Any]]:
        found = [json.loads(line) for line in (pairs / f"{job}-{name}" / "metrics.jsonl").read_text().splitlines()]
        return [{k: v for k, v in line.items() if k not in ("seconds", "images_per_s")} for line in found]

    assert lines("again") == lines("whole")


@pytest.fixture
def drawn(tmp_path: Path) -> Path:
    """A model and pictures of its classes."""
    artifact.save(tiny(), tmp_path / "model")
    generator = np.random.default_rng(0)
    for name in range(4):
        (tmp_path / "photos" / str(name)).mkdir(parents=True)
        for index in range(10):
            pixels = generator.integers(0, 255, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / str(name) / f"{index}.png")
    return tmp_path


def launched(folder: Path, *words: str) -> subprocess.Popen[str]:
    """`torchrun -m vitrim WORDS` on two processes, in the folder."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "vitrim"]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    return subprocess.Popen(
        [sys.executable, *launch, *words],
        env=environment,
        cwd=folder,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


TRAIN = ["train", "--model", "model", "--data", "photos", "--batch-size", "8", "--quiet", "--json", "--out", "out"]


@pytest.mark.slow
def test_the_command_on_two_processes_of_a_cpu_trains_one_model_and_writes_once(drawn: Path) -> None:
    with launched(drawn, *TRAIN, "--steps", "4") as both:
        told, said = both.communicate(timeout=200)
    assert both.returncode == 0, said[-3000:]
    assert json.loads(told)["steps"] == 4  # one of them prints
    found = artifact.load(drawn / "out")
    assert found.provenance["config"]["world_size"] == 2
    alone = command("train", "--model", drawn / "model", "--data", drawn / "photos", "--batch-size", "8", "--steps", "4",
                    "--out", drawn / "alone")  # fmt: skip
    assert alone.exit_code == 0, alone.output
    for a, b in zip(found.parameters(), artifact.load(drawn / "alone").parameters(), strict=True):
        assert (a - b).abs().max() < 1e-5


@pytest.mark.slow
def test_killing_one_process_of_the_command_ends_all_of_them(drawn: Path) -> None:
    with launched(drawn, *TRAIN, "--steps", "100000", "--config", "often.json") as both:
        (drawn / "often.json").write_text('{"log_every": 1}')
        while not (drawn / "out" / "metrics.jsonl").is_file() or not (drawn / "out" / "metrics.jsonl").stat().st_size:
            assert both.poll() is None, both.communicate()
            time.sleep(0.1)
        holder = json.loads((drawn / "out" / ".vitrim.lock").read_text())
        os.kill(holder["process"], signal.SIGKILL)
        _, said = both.communicate(timeout=100)
    assert both.returncode != 0
    assert "Traceback" not in said.split("torch/distributed")[0]
