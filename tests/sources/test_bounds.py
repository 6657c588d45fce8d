"""What a foreign folder may ask for."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import vitrim
from vitrim.errors import SourceError

VIT = {
    "model_type": "vit", "architectures": ["ViTModel"], "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1,
    "num_attention_heads": 2, "image_size": 32, "patch_size": 16, "num_channels": 3,
}  # fmt: skip
TIMM = {
    "architecture": "vit_tiny_patch16_224",
    "pretrained_cfg": {},
    "num_classes": 2,
    "model_args": {"img_size": 32, "depth": 1},
}
PLAIN = {"image_size": 32, "patch_size": 16, "num_layers": 1, "num_heads": 2, "hidden_dim": 8, "mlp_dim": 16}


def refusal(folder: Path, name: str, config: dict[str, Any]) -> str:
    """Of a folder with a kilobyte of weights; no memory is taken for it."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file({"w": torch.zeros(250)}, folder / "model.safetensors")
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(SourceError) as refused:
        vitrim.load(f"{name}:{folder}")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - used < 400_000  # kilobytes
    return str(refused.value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_hidden_layers": 120_000}, "num_hidden_layers=120000; expected at most 1000"),
        ({"image_size": 10**9}, "image_size=1000000000; expected at most"),
        ({"hidden_size": 2**20, "intermediate_size": 2**20}, "numbers, but the weights beside it hold"),
        ({"image_size": 2**20}, "numbers, but the weights beside it hold"),
        ({"hidden_size": 10**400}, "is beyond 64 bits"),
        ({"patch_size": 0}, "describes no network"),
    ],
    ids=str,
)
def test_a_folder_of_transformers_asks_no_more_than_its_weights(
    change: dict[str, Any], says: str, tmp_path: Path
) -> None:
    assert says in refusal(tmp_path / "a", "hf", VIT | change)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"depth": 120_000}, "depth=120000; expected at most 1000"),
        ({"img_size": 2**20}, "numbers, but the weights beside it hold"),
        ({"embed_dim": 3 * 2**18}, "numbers, but the weights beside it hold"),
        ({"embed_dim": 2**40}, "embed_dim=1099511627776; expected at most"),
    ],
    ids=str,
)
def test_a_folder_of_timm_asks_no_more_than_its_weights(change: dict[str, Any], says: str, tmp_path: Path) -> None:
    config = TIMM | {"model_args": {"img_size": 32, "depth": 1} | change}
    assert says in refusal(tmp_path / "a", "timm:local-dir", config)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_layers": 120_000}, "num_layers=120000; expected at most 1000"),
        ({"hidden_dim": 2**20}, "numbers, but the weights beside it hold"),
        ({"patch_size": 0}, "describes no network"),
        ({"image_size": "x"}, "describes no network"),
    ],
    ids=str,
)
def test_a_folder_of_torchvision_asks_no_more_than_its_weights(
    change: dict[str, Any], says: str, tmp_path: Path
) -> None:
    config = {"kwargs": PLAIN | change, "labels": None, "preprocess": None}
    assert says in refusal(tmp_path / "a", "torchvision", config)
