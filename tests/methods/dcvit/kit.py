"""Networks, settings and pictures that the tests of dcvit share."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tests.specs import make, vit
from vitrim.budget import Budget
from vitrim.data import Augment
from vitrim.methods.dcvit import DcvitConfig, space_of
from vitrim.methods.dcvit.job import Inputs, Job
from vitrim.model import Vit
from vitrim.space import Choice, Space
from vitrim.spec import (
    AttentionSpec,
    BlockSpec,
    MlpSpec,
    ModelSpec,
    Output,
    Position,
    Preprocess,
)
from vitrim.surgery import Keep

WIDE = vit(width=32, blocks=4, heads=2, head_dim=16, hidden=64)
PREPROCESS = Preprocess(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), size_px=(16, 16))


def config(budget: Budget | None = None, **fields: object) -> DcvitConfig:
    return DcvitConfig(budget=budget, **{"images": 16, "batch_size": 8, "probe_images": 8, **fields})  # type: ignore[arg-type]


def tuning(budget: Budget | None = None, **fields: object) -> DcvitConfig:
    few = {"steps": 3, "metric_steps": 3, "metric_images": 4, "augment": Augment(), "images": 16, "batch_size": 8}
    return DcvitConfig(budget=budget, variant="finetune", **{**few, **fields})  # type: ignore[arg-type]


def deit(width: int, depth: int = 12, patch: int = 16) -> ModelSpec:
    block = BlockSpec(
        attention=AttentionSpec(heads=width // 64, qk_dim=64, v_dim=64, scale=0.125), mlp=MlpSpec(hidden=4 * width)
    )
    return ModelSpec(
        image_px=(224, 224),
        patch_px=(patch, patch),
        width=width,
        position=Position(grid=(224 // patch, 224 // patch)),
        blocks=(block,) * depth,
        outputs=(Output(classes=1000),),
    )


SPACE = space_of(WIDE, DcvitConfig())


def option(index: int, attention: bool, hidden: int, space: Space = SPACE) -> Choice:
    """A block with or without its attention, and with so many hidden units."""
    whole = space.whole[index]
    kept = whole if attention else whole.without("attention")
    return kept._replace(hidden=hidden) if hidden else kept.without("mlp")


def keeps_of(parent: ModelSpec, child: Vit) -> list[Keep | None]:
    """What the last selection step says was kept."""
    found: list[Keep | None] = []
    for block, entry in zip(parent.blocks, child.selection.steps[-1].blocks, strict=True):
        if entry is None:
            found.append(None)
            continue
        mlp = entry.get("mlp")
        hidden = tuple(mlp["hidden"]) if isinstance(mlp, dict) and mlp["hidden"] is not None else None
        found.append(
            Keep(
                attention=block.attention is not None and entry.get("attention") != "gone",
                mlp=block.mlp is not None and mlp != "gone",
                hidden=hidden,
            )
        )
    return found


def normalised(spec: ModelSpec = WIDE, dtype: torch.dtype = torch.float32) -> Vit:
    model = make(spec, dtype=dtype)
    model.config = replace(model.config, preprocess=replace(PREPROCESS, size_px=spec.image_px))
    return model


def photos(count: int = 16, side: int = 16, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, side, side), generator=g, dtype=torch.uint8)


def job(model: Vit, config: DcvitConfig, data: Any, **fields: Any) -> Job:
    """A run on a model without LayerScale."""
    inputs = Inputs(model, data, config)
    return Job(
        model=model,
        base=model,
        space=space_of(model.spec, config),
        inputs=inputs,
        config=config,
        **{"scratch": Path(), **fields},
    )
