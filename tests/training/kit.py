"""Tiny images, models and an objective with a state of its own, for the tests of training."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.specs import vit
from vitrim import data
from vitrim.data import Augment, Images
from vitrim.model import Vit, build
from vitrim.spec import Config, ModelSpec, Preprocess
from vitrim.training import Batch, Step, TrainConfig
from vitrim.training.objectives import Supervised

SIDE, CLASSES = 8, 4
SPEC = vit(width=8, blocks=2, heads=2, head_dim=4, hidden=12, image=SIDE, patch=4, classes=CLASSES)


def pictures(count: int = 40, *, labels: bool = True, split: str = "all", several: bool = False) -> Images:
    """Pictures whose class is the quarter that is bright."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 120, (count, 3, SIDE, SIDE), generator=generator, dtype=torch.uint8)
    classes = torch.arange(count) % CLASSES
    half = SIDE // 2
    for i, c in enumerate(classes.tolist()):
        pixels[i, :, (c // 2) * half : (c // 2 + 1) * half, (c % 2) * half : (c % 2 + 1) * half] += 130
    if several:
        return data.open((pixels, nn.functional.one_hot(classes, CLASSES).float()), split=split)
    return data.open((pixels, classes) if labels else pixels, split=split)


def config_of(spec: ModelSpec = SPEC) -> Config:
    preprocess = Preprocess(mean=(0.5,) * 3, std=(0.25,) * 3, size_px=spec.image_px)
    return Config(spec=spec, preprocess=preprocess)


def tiny(spec: ModelSpec = SPEC, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Vit:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build(config_of(spec)).to(dtype)


BASE: dict[str, Any] = {
    "steps": 6,
    "batch_size": 8,
    "lr": 1e-2,
    "device": "cpu",
    "augment": Augment(crop="none", flip=0.0),
}


def settings(**changes: Any) -> TrainConfig:
    return TrainConfig(**{**BASE, **changes})


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().double().flatten() for p in model.parameters()])


def as_lists(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


class Searching(Supervised):
    """Scales the logits by a tensor that is not the model's, with drawn noise, and keeps a dual variable and a count."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.ones(CLASSES, requires_grad=True)
        self.dual, self.count = 0.1, 0

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        self.scale = self.scale.detach().to(next(model.parameters()).dtype).requires_grad_()
        group = {"params": [self.scale], "lr": 0.05, "schedule": "constant", "weight_decay": 0.0}
        return [*super().param_groups(model), group]

    def loss(self, model: nn.Module, batch: Batch, step: Step) -> Tensor:
        noise = 0.05 * torch.randn(CLASSES, dtype=self.scale.dtype) if step.world == 1 and step.micros == 1 else 0.0
        return (
            self.score(model(batch.images) * (self.scale + noise), batch.labels)
            + self.dual * self.scale.square().mean()
        )

    def after_step(self, step: Step) -> None:
        self.dual += 0.01 * float(self.scale.detach().mean()) * step.share
        self.count += 1

    def phase(self, step: Step) -> str:
        return "search" if step.share < 0.5 else "tune"

    def state_dict(self) -> dict[str, Any]:
        return {"scale": self.scale, "dual": self.dual, "nested": {"count": self.count}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            self.scale.copy_(state["scale"])
        self.dual, self.count = state["dual"], state["nested"]["count"]


def changed(config: TrainConfig, **changes: Any) -> TrainConfig:
    return dataclasses.replace(config, **changes)


def on_two_processes(script: str, folder: Path) -> None:
    """Runs a script as both ranks of a launcher, with the folder as its argument; asserts that it ended well."""
    (folder / "two.py").write_text(script)
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(folder / "two.py")]
    done = subprocess.run(
        [sys.executable, *command, str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
