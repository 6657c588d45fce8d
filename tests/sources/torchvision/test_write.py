"""Our models back in torchvision: arguments and state dict, and the folder that is read again."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from torchvision.models import VisionTransformer

import vitrim
from tests.sources.kit import same
from tests.sources.torchvision.kit import (
    VARIANTS,
    headless,
    images,
    randomised,
    small,
    with_act,
)
from vitrim import surgery
from vitrim.errors import SourceError
from vitrim.model import Vit, build
from vitrim.sources import torchvision as source
from vitrim.spec import AttentionSpec, BlockSpec, MlpSpec, ModelSpec, Output, Pool, Position, Preprocess

# ----------------------------------------------------------------------------------------------------------------- back


@torch.no_grad()
def assert_back(model: Vit) -> Any:
    """torchvision loads the state strictly, and its logits are ours in float64."""
    module, x = source.to_module(model.double()), images(model.spec.image_px[0]).double()
    assert not module.training
    assert same(module(x), model(x))
    return module


@pytest.mark.parametrize("case", [c for c in VARIANTS if c not in ("an_encoder", "tanh_gelu", "relu")])
def test_what_came_from_torchvision_goes_back(case: str) -> None:
    module = VARIANTS[case]()
    back = assert_back(vitrim.from_model(module))
    if case == "plain":
        assert all(torch.equal(value, back.state_dict()[key].float()) for key, value in module.state_dict().items())


def test_fewer_blocks_and_a_narrower_mlp_are_written_and_loaded_without_vitrim(tmp_path: Path) -> None:
    model = vitrim.from_model(small(num_layers=2))
    model = surgery.cut(model, [surgery.Keep(hidden=tuple(range(17)))] * 2, method="test")
    model = surgery.exact_tail(model)
    out = vitrim.sources.write(model, "torchvision", tmp_path / "out")
    kwargs = json.loads((out / "config.json").read_text())["kwargs"]
    assert (kwargs["num_layers"], kwargs["mlp_dim"]) == (2, 17)
    module = VisionTransformer(**kwargs).eval()
    module.load_state_dict(load_file(out / "model.safetensors"), strict=True)
    with safe_open(out / "model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["torchvision"]) == kwargs
    x = images().double()
    with torch.no_grad():
        assert same(module.double()(x), model.double()(x))


def test_a_written_folder_is_read_again_with_its_labels_and_preprocessing(tmp_path: Path) -> None:
    model = vitrim.from_model(
        small(),
        preprocess=Preprocess(mean=(0.1, 0.2, 0.3), std=(0.5,) * 3, size_px=(32, 32), crop=0.9),
        labels=tuple("abcde"),
    )
    source.write(model, tmp_path / "out")
    again = vitrim.load(f"torchvision:{tmp_path / 'out'}")
    assert again.config == model.config
    assert str(tmp_path) not in json.dumps(again.provenance)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())
    assert vitrim.load(f"torchvision:{tmp_path / 'out'}", pretrained=False, classes=3).spec.classes == 3
    with pytest.raises(SourceError, match="is there already"):
        source.write(model, tmp_path / "out")


def test_what_is_the_same_network_in_other_words_goes_back() -> None:
    attention = AttentionSpec(heads=3, qk_dim=8, v_dim=8, scale=8**-0.5, k_bias=False, out_bias=False, layer_scale=True)
    spec = ModelSpec(
        image_px=(16, 16),
        patch_px=(8, 8),
        width=24,
        position=Position(grid=(2, 2), prefix_rows=False),
        final_norm=False,
        pool_norm=True,
        blocks=(BlockSpec(attention=attention, mlp=MlpSpec(hidden=9, fc1_bias=False, layer_scale=True)),) * 2,
        outputs=(Output(name="answer", classes=4, bias=False),),
    )
    assert_back(randomised(build(spec)))


def test_the_block_or_part_that_torchvision_cannot_say_is_named(tmp_path: Path) -> None:
    model = vitrim.from_model(small())
    for keep, words in (
        (surgery.Keep(attention=False), "block 1 has no attention"),
        (surgery.Keep(mlp=False), "block 1 has no MLP"),
        (surgery.Keep(heads=(0, 2)), "block 1 has 2 heads of 8"),
        (surgery.Keep(hidden=tuple(range(9))), r"block 1 differs from block 0 \(MLP units 9, there 40\)"),
    ):
        with pytest.raises(SourceError, match=f"torchvision cannot say this model: {words}"):
            source.write(surgery.cut(model, [None, keep, None], method="test"), tmp_path / "out")
    for module, words in (
        (headless(), "no classifier"),
        (with_act(nn.ReLU()), "block 0 has the activation 'relu'"),
        (small(norm_layer=partial(nn.LayerNorm, eps=1e-3)), "eps 0.001"),
    ):
        with pytest.raises(SourceError, match=words):
            source.write(vitrim.from_model(module), tmp_path / "out")
    pooled = build(replace(model.spec, pool=Pool(kind="mean")))
    with pytest.raises(SourceError, match="its pooling is 'mean'"):
        source.write(pooled, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_size_that_torchvision_does_not_run_is_refused() -> None:
    model = surgery.resized(vitrim.from_model(small()), (33, 33))
    with pytest.raises(
        SourceError, match=r"torchvision cannot say this model: its images of \(33, 33\) px are no whole number"
    ):
        source.to_torchvision(model)
