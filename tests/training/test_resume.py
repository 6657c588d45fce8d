"""Killed at any moment and resumed equals never killed, bit for bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from vitrim import checkpoints

# One process that imports torch once and forks: each life of a run is a process of its own, ended by a real SIGKILL.
LIVES = """
import json, os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from tests.training.kit import Searching, pictures, settings, tiny
from vitrim import checkpoints
from vitrim.data import Augment
from vitrim.training import fit

def die():
    os.kill(os.getpid(), signal.SIGKILL)

class Mortal(Searching):
    def __init__(self, at):
        super().__init__()
        self.at = at
    def loss(self, model, batch, step):
        if step.index == self.at:
            die()
        return super().loss(model, batch, step)

def patch(moment, at):
    write, rename, tree = checkpoints.write, Path.rename, checkpoints.shutil.rmtree
    def mortal(folder, step, tensors, values):
        if step == at:
            if moment == "tensors written":
                save = checkpoints.save_file
                checkpoints.save_file = lambda *a: (save(*a), die())
            if moment == "before the rename":
                os.rename = lambda source, to: die()
            if moment == "before the old one goes":
                Path.rename = lambda self, to: die() if str(to.name).startswith("gone-") else rename(self, to)
            if moment == "while the old one goes":
                def half(path, **options):
                    if str(path.name).startswith("gone-") and path.exists():
                        next(path.iterdir()).unlink()
                        die()
                    tree(path, **options)
                checkpoints.shutil.rmtree = half
        return write(folder, step, tensors, values)
    checkpoints.write = mortal

def live(out, moment, at):
    config = settings(steps=9, log_every=1, ema_decay=0.9, checkpoint_seconds=0 if moment != "between" else 3600,
                      mixup=0.4, cutmix=1.0, eval_every=4, augment=Augment(crop="pad", pad=2))
    if moment not in ("step", "between"):
        patch(moment, at)
    fit(tiny(), Mortal(at if moment in ("step", "between") else None), pictures(), config, out=out, resume=True,
        validate=lambda m: {"sum": float(sum(p.sum() for p in m.parameters()))})

ends = {}
for name, lives in json.loads(sys.argv[2]).items():
    ends[name] = []
    for moment, at in lives:
        child = os.fork()
        if child == 0:
            try:
                live(Path(sys.argv[1]) / name, moment, at)
                os._exit(0)
            except BaseException:
                import traceback
                traceback.print_exc()
                os._exit(1)
        ends[name].append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(json.dumps(ends))
"""

END = ("step", None)
RUNS: dict[str, list[tuple[str, int | None]]] = {
    "undisturbed": [END],
    "in the middle of an epoch": [("step", 7), END],
    "with no checkpoint yet": [("between", 6), END],
    "tensors written": [("tensors written", 6), END],
    "before the rename": [("before the rename", 6), END],
    "before the old one goes": [("before the old one goes", 6), END],
    "while the old one goes": [("while the old one goes", 6), END],
    "twice in a row": [("step", 4), ("step", 4), ("before the rename", 5), END],
}


@pytest.fixture(scope="module")
def lives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lives")
    (folder / "lives.py").write_text(LIVES)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, str(folder / "lives.py"), str(folder), json.dumps(RUNS)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ends = json.loads(done.stdout.splitlines()[-1])
    expected = {name: [*([-9] * (len(lives) - 1)), 0] for name, lives in RUNS.items()}
    assert ends == expected, done.stderr[-3000:]
    return folder


def state(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    newest = checkpoints.newest(folder / "checkpoints")
    assert newest is not None
    tensors, values = checkpoints.read(newest)
    values.pop("seconds")
    values["run"].pop("checkpoint_seconds", None)
    return tensors, values


def lines(folder: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "images_per_s")} for line in found]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in RUNS if name != "undisturbed"])
def test_killed_and_resumed_equals_never_killed(lives: Path, name: str) -> None:
    whole, values = state(lives / "undisturbed")
    again, others = state(lives / name)
    assert values["step"] == 9
    assert others == values
    assert {part.split("/")[0] for part in whole} == {"model", "ema", "optimizer", "objective"}
    assert again.keys() == whole.keys()
    assert all(torch.equal(again[key], whole[key]) for key in whole)
    assert lines(lives / name) == lines(lives / "undisturbed")
    assert [p.name for p in (lives / name / "checkpoints").iterdir()] == ["step-00000009"]
