"""Our models back in timm: arguments and state dict, and the folder that timm loads."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import vitrim
from tests.sources.kit import same
from tests.sources.timm.kit import OPTIONS, VARIANTS, images, randomised, small
from vitrim import surgery
from vitrim.errors import SourceError
from vitrim.model import Vit, build
from vitrim.sources import timm as source
from vitrim.spec import Preprocess, Similarity

# ----------------------------------------------------------------------------------------------------------------- back


@torch.no_grad()
def assert_back(model: Vit, **options: Any) -> nn.Module:
    """timm loads the state strictly, and its logits are ours."""
    kwargs, state = source.to_timm(model, **options)
    name = "deit_tiny_distilled_patch16_224" if "dist" in model.spec.prefix else "vit_base_patch16_224"
    module = timm.create_model(name, **kwargs).eval()
    module.load_state_dict(state, strict=True)
    x = images(module).double()
    assert same(model.double()(x), module.double()(x))
    return module


@pytest.mark.parametrize("name", VARIANTS)
def test_what_came_from_timm_goes_back(name: str) -> None:
    assert_back(vitrim.from_model(small(name), verify=False))


@pytest.mark.parametrize("case", [case for case in OPTIONS if case != "all_tokens_behind_fc_norm"])
def test_every_option_goes_back(case: str) -> None:
    assert_back(vitrim.from_model(small("vit_tiny_patch16_224", **OPTIONS[case]), verify=False))


def test_a_folded_layer_scale_goes_back_as_ones() -> None:
    folded = surgery.fold_layer_scale(vitrim.from_model(small("deit3_small_patch16_224")))
    assert "blocks.0.ls1.gamma" not in source.to_timm(folded)[1]
    module = assert_back(folded, layer_scale=True)
    assert torch.equal(module.state_dict()["blocks.1.ls2.gamma"], torch.ones(24, dtype=torch.float64))
    small("deit3_small_patch16_224").load_state_dict(module.state_dict(), strict=True)


def test_a_network_that_restores_goes_back_where_it_merges_nothing_and_is_refused_where_it_does() -> None:
    model = vitrim.from_model(small("vit_tiny_patch16_224"), verify=False)
    whole = surgery.with_spec(model, replace(model.spec, restore=True), model.state_dict())
    assert_back(whole)
    blocks = (*model.spec.blocks[:-1], replace(model.spec.blocks[-1], steps=(Similarity(keep=5),)))
    merged = surgery.with_spec(whole, replace(whole.spec, blocks=blocks), whole.state_dict())
    with pytest.raises(SourceError, match=r"block \d+ merges tokens. Save it as a folder of vitrim"):
        source.to_module(merged)


def test_fewer_blocks_and_a_narrower_mlp_go_back() -> None:
    model = vitrim.from_model(small("deit_tiny_patch16_224", depth=3))
    model = surgery.cut(model, [surgery.Keep(hidden=tuple(range(17)))] * 3, method="test")
    assert_back(surgery.exact_tail(model))


def test_the_block_that_timm_cannot_say_is_named() -> None:
    model = vitrim.from_model(small("deit_tiny_patch16_224", depth=3))
    for keep, words in (
        (surgery.Keep(attention=False), "block 1 has no attention"),
        (surgery.Keep(mlp=False), "block 1 has no MLP"),
        (surgery.Keep(heads=(0, 2)), "block 1 has 2 heads of 8"),
        (surgery.Keep(hidden=tuple(range(9))), r"block 1 differs from block 0 \(MLP units 9"),
    ):
        cut = surgery.cut(model, [None, keep, None], method="test")
        with pytest.raises(SourceError, match=words):
            source.to_timm(cut)


def test_a_module_made_back_has_the_same_spec() -> None:
    model = vitrim.from_model(small("vit_giant_patch14_reg4_dinov2"))
    module = source.to_module(model)
    assert source.spec_of(module) == model.spec
    assert not module.training


def test_a_model_built_here_goes_to_timm() -> None:
    spec = source.spec_of(small("deit_small_distilled_patch16_224"))
    assert_back(randomised(build(spec)))


# ---------------------------------------------------------------------------------------------------- a folder for timm


@torch.no_grad()
def assert_written(model: Vit, out: Path) -> Any:
    """timm makes and fills the module from the folder alone, and its logits are ours in float64."""
    assert source.write(model, out) == out
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.safetensors"]
    module = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    x = images(module).double()
    assert same(model.double()(x), module.double()(x))
    return module


WRITTEN = [
    "vit_tiny_patch16_224",
    "vit_base_patch16_siglip_224",
    "vit_giantopt_patch16_siglip_256",
    "vit_base_patch32_clip_224",
    "vit_base_patch16_clip_quickgelu_224",
    "vit_giant_patch14_reg4_dinov2",
    "vit_small_patch14_dinov2",
    "vit_little_patch16_reg4_gap_256",
    "deit_tiny_distilled_patch16_224",
    "deit3_small_patch16_224",
]


@pytest.mark.parametrize("name", WRITTEN)
def test_a_written_folder_is_loaded_by_timm_with_the_same_logits(name: str, tmp_path: Path) -> None:
    model = vitrim.from_model(small(name), verify=False)
    module = assert_written(model, tmp_path / "out")
    assert replace(source.spec_of(module), blocks=model.spec.blocks) == model.spec


@pytest.mark.parametrize(
    "case", ["an_encoder", "all_tokens", "an_oblong_image", "oblong_patches", "grey_images", "uneven_mlp", "no_biases",
             "no_positions", "fc_norm", "pre_norm", "registers_without_rows", "map_pooling_over_prefix_tokens_too"]
)  # fmt: skip
def test_options_are_written_too(case: str, tmp_path: Path) -> None:
    assert_written(vitrim.from_model(small("vit_tiny_patch16_224", **OPTIONS[case]), verify=False), tmp_path / "out")


def test_a_compressed_model_is_written_with_its_labels_and_preprocessing_and_read_again(tmp_path: Path) -> None:
    preprocess = Preprocess(
        mean=(0.1, 0.2, 0.3),
        std=(0.4, 0.5, 0.6),
        size_px=(48, 48),
        crop=0.8,
        crop_mode="squash",
        interpolation="bilinear",
    )
    model = vitrim.from_model(small("deit_tiny_patch16_224", depth=3), preprocess=preprocess, labels=tuple("abcde"))
    model = surgery.cut(model, [surgery.Keep(hidden=tuple(range(17)))] * 3, method="test")
    module = assert_written(surgery.exact_tail(model), tmp_path / "out")
    data = timm.data.resolve_model_data_config(module)
    assert (tuple(data["mean"]), tuple(data["std"]), data["input_size"]) == (
        preprocess.mean,
        preprocess.std,
        (3, 48, 48),
    )
    assert (data["crop_pct"], data["crop_mode"], data["interpolation"]) == (0.8, "squash", "bilinear")
    again = vitrim.load(f"timm:local-dir:{tmp_path / 'out'}")
    assert (again.config.labels, again.config.preprocess) == (tuple("abcde"), preprocess)
    assert again.spec == model.spec
    assert again.provenance["source"] == "timm:local-dir:out"
    file = tmp_path / "out" / "model.safetensors"
    state = {key.replace("blocks.1.", "blocks.1._checkpoint_wrapped_module."): v for key, v in load_file(file).items()}
    save_file(state, file)  # names inside wrappers, which timm does not know
    wrapped = vitrim.load(f"timm:local-dir:{tmp_path / 'out'}")
    assert (wrapped.config, wrapped.provenance) == (again.config, again.provenance)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in wrapped.state_dict().items())
    (tmp_path / "out" / "model.safetensors").unlink()
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "config.json").write_text("{}")
    for name in ("out", "nowhere", "ours"):
        with pytest.raises(SourceError, match=f"'timm:local-dir:{name}' is no folder that timm loads"):
            vitrim.load(f"timm:local-dir:{tmp_path / name}")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["label_names"] == list("abcde")


def test_swiglu_without_layer_scale_is_written_with_one_of_ones(tmp_path: Path) -> None:
    model = surgery.fold_layer_scale(vitrim.from_model(small("vit_giant_patch14_dinov2")))
    module = assert_written(model.double(), tmp_path / "out")
    assert torch.equal(module.blocks[1].ls2.gamma, torch.ones(24, dtype=torch.float64))


def test_what_timm_has_no_architecture_for_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    odd = vitrim.from_model(small("vit_tiny_patch16_224", norm_layer=partial(nn.LayerNorm, eps=1e-12)))
    with pytest.raises(SourceError, match="none of its architectures with plain MLPs has norms of eps 1e-12"):
        source.write(odd, tmp_path / "out")
    cut = surgery.cut(vitrim.from_model(small("deit_tiny_patch16_224")), [None, surgery.Keep(mlp=False)], method="test")
    with pytest.raises(SourceError, match="block 1 has no MLP"):
        source.write(cut, tmp_path / "out")
    model = vitrim.from_model(small("deit_tiny_patch16_224"))
    (tmp_path / "file").write_text("x")
    with pytest.raises(SourceError, match="'file' is there already"):
        source.write(model, tmp_path / "file")
    with pytest.raises(SourceError, match="could not be written"):
        source.write(model, tmp_path / "file" / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
