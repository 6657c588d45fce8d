"""Tiny networks, quick settings and a search that has met its model, for the tests of UVC."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from tests.specs import vit
from tests.training.kit import tiny
from vitrim.budget import Budget
from vitrim.data import Augment
from vitrim.methods.uvc.config import UvcConfig
from vitrim.methods.uvc.decisions import Decisions, decisions_of
from vitrim.methods.uvc.objective import Search
from vitrim.model import Vit
from vitrim.spec import ModelSpec, Output, Prefix
from vitrim.training import Step
from vitrim.training.objectives import Supervised

HALF = Budget(keep_macs=0.5)


WIDE = vit(width=16, blocks=3, heads=2, head_dim=16, hidden=32, image=8, classes=4)


QUICK: dict[str, Any] = {
    "steps": 8,
    "batch_size": 8,
    "device": "cpu",
    "augment": Augment(crop="none", flip=0.0),
    "log_every": 1,
    "lr": 1e-3,
}


def quick(budget: Budget = HALF, **changes: Any) -> UvcConfig:
    return UvcConfig(budget=budget, **{**QUICK, **changes})


def searching(spec: ModelSpec = WIDE, **changes: Any) -> tuple[Search, Vit]:
    """A search that has met its model, but not the loop."""
    config = quick(**changes)
    model = tiny(spec)
    decisions = decisions_of(spec, config)
    found = Search(decisions, Supervised(), config, config.bounds.limits(decisions.space.reference))
    found.param_groups(model)
    return found, model


def at(index: int, total: int = 100) -> Step:
    return Step(index=index, total=total, epoch=0)


def losses_for(decisions: Decisions, seed: int = 0) -> dict[tuple[int, str], np.ndarray]:
    random = np.random.default_rng(seed)
    sizes = {(w.block, w.part): w.size for w in decisions.widths}
    return {key: np.concatenate([[0.0], np.cumsum(np.sort(random.random(n)))]) for key, n in sizes.items()}


def kinds() -> dict[str, ModelSpec]:
    block = WIDE.blocks[0]
    a, m = block.attention, block.mlp
    assert a is not None
    assert m is not None
    tail = replace(WIDE, blocks=(*WIDE.blocks[:-1], replace(WIDE.blocks[-1], steps=(Prefix(),))))
    uneven = (
        replace(block, attention=replace(a, heads=1, v_dim=8), mlp=replace(m, hidden=20)),
        replace(block, attention=None, mlp=replace(m, fc1_rank=6, fc2_rank=5)),
        replace(block, attention=replace(a, qk_dim=5), mlp=None),
        block,
    )
    two = (Output(classes=4), Output(name="dist", classes=4, reads=("dist",)))
    return {
        "plain": WIDE,
        "exact tail": tail,
        "already cut": replace(WIDE, blocks=uneven),
        "distilled heads": replace(WIDE, prefix=("cls", "dist"), outputs=two),
        "registers": replace(WIDE, prefix=("cls", "reg", "reg")),
        "swiglu": replace(WIDE, blocks=(replace(block, mlp=replace(m, kind="swiglu")),) * 3),
        "query norms": replace(WIDE, blocks=(replace(block, attention=replace(a, qk_norm="rms")),) * 3),
        "layer scale": replace(
            WIDE, blocks=(replace(block, attention=replace(a, layer_scale=True), mlp=replace(m, layer_scale=True)),) * 3
        ),
        "encoder": replace(WIDE, outputs=()),
    }
