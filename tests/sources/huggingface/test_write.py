"""Our models back in transformers: the class that says them, and the folder that it reads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import vitrim
from vitrim import surgery
from vitrim.errors import SourceError
from vitrim.model import Vit, build
from vitrim.spec import Preprocess

pytest.importorskip("transformers")

from transformers import AutoModel, AutoModelForImageClassification
from transformers.models.clip.modeling_clip import (
    CLIPVisionModel,
)
from transformers.models.deit.modeling_deit import (
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
)
from transformers.models.dinov2.modeling_dinov2 import Dinov2Model
from transformers.models.dinov2_with_registers.modeling_dinov2_with_registers import (
    Dinov2WithRegistersModel,
)
from transformers.models.vit.modeling_vit import (
    ViTForImageClassification,
    ViTModel,
)

from tests.sources.huggingface.kit import VARIANTS, images, randomised, small
from tests.sources.kit import same
from vitrim.sources import huggingface as source
from vitrim.sources.huggingface.read import encoder_of
from vitrim.sources.huggingface.write import quiet

# ----------------------------------------------------------------------------------------------------------------- back


@torch.no_grad()
def assert_back(model: Vit, folder: Path, *, tolerance: float = 1e-10) -> Any:
    """transformers reads the folder, by its own class, and gives our logits in float64."""
    model = model.double()
    made = source.to_module(model)
    source.write(model, folder)
    with quiet():
        module, info = type(made).from_pretrained(folder, output_loading_info=True, dtype=torch.float64)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    x = images(model.spec)
    expected = model(x)
    assert same(source.answer(made, x, model.spec), expected, tolerance)
    assert same(source.answer(module.eval(), x, model.spec), expected, tolerance)
    return module


@pytest.mark.parametrize("name", VARIANTS)
def test_what_came_from_transformers_goes_back_in_its_own_class(name: str, tmp_path: Path) -> None:
    module = small(name)
    model = vitrim.from_model(module)
    back = assert_back(model, tmp_path / "back")
    encoder, _ = encoder_of(module)
    assert type(back) is type(encoder)
    again = vitrim.load(f"hf:{tmp_path / 'back'}")
    assert again.spec == model.spec
    assert "pooler" not in again.provenance.get("left_out", [])


def test_labels_and_image_settings_go_back(tmp_path: Path) -> None:
    module = small("vit", id2label={i: f"kind {i}" for i in range(5)})
    for number, preprocess in enumerate(
        (
            Preprocess(mean=(0.4, 0.5, 0.6), std=(0.2,) * 3, size_px=(24, 24), crop_mode="squash"),
            Preprocess(
                mean=(0.4, 0.5, 0.6),
                std=(0.2,) * 3,
                size_px=(24, 24),
                crop=24 / 27,
                interpolation="bilinear",
                crop_rounding="down",
            ),
            Preprocess(
                mean=(0.4, 0.5, 0.6),
                std=(0.2,) * 3,
                size_px=(24, 24),
                crop=24 / 27,
                crop_mode="squash",
                crop_rounding="down",
            ),
        )
    ):
        model = vitrim.from_model(module, preprocess)
        again = vitrim.load(f"hf:{source.write(model, tmp_path / str(number))}")
        assert again.config == model.config


def test_the_auto_classes_of_transformers_read_what_was_written(tmp_path: Path) -> None:
    source.write(vitrim.from_model(small("vit")), tmp_path / "c")
    source.write(vitrim.from_model(small("vit_encoder")), tmp_path / "e")
    with quiet():
        assert type(AutoModelForImageClassification.from_pretrained(tmp_path / "c")) is ViTForImageClassification
        encoder = AutoModel.from_pretrained(tmp_path / "e")
    assert type(encoder) is ViTModel
    x = images(vitrim.load(f"hf:{tmp_path / 'e'}").spec).float()
    out = encoder.eval()(x)
    assert torch.equal(out.pooler_output, out.last_hidden_state[:, 0])  # the pooler that is written changes nothing


@pytest.mark.parametrize("name", ["vit", "deit_teacher", "clip_tower", "siglip_tower", "mae", "msn"])
def test_fewer_blocks_and_a_narrower_mlp_go_back(name: str, tmp_path: Path) -> None:
    model = vitrim.from_model(small(name, num_hidden_layers=3))
    if name == "siglip_tower":
        with pytest.raises(SourceError, match=r"attention pooling differs from the blocks \(MLP units 40, there 17\)"):
            source.to_module(surgery.cut(model, [surgery.Keep(hidden=tuple(range(17)))] * 3, method="test"))
    else:
        model = surgery.cut(model, [surgery.Keep(hidden=tuple(range(17)))] * 3, method="test")
    small_spec = replace(model.spec, blocks=model.spec.blocks[:2])
    state = {key: value for key, value in model.state_dict().items() if not key.startswith("blocks.2.")}
    assert_back(surgery.with_spec(model, small_spec, state), tmp_path / "back")


def test_an_exact_tail_is_left_out(tmp_path: Path) -> None:
    assert_back(surgery.exact_tail(vitrim.from_model(small("deit_teacher"))), tmp_path / "back")


@pytest.mark.parametrize("name", ["vit", "deit", "dinov2", "dinov2_registers", "mae", "msn"])
def test_one_narrower_head_width_and_fewer_heads_go_back(name: str, tmp_path: Path) -> None:
    model = vitrim.from_model(small(name)).double()
    channels = ((0, 2, 3, 5, 6),) * 2
    keep = surgery.Keep(heads=(0, 2), qk=channels, v=channels)
    back = assert_back(surgery.cut(model, [keep] * 2, method="test"), tmp_path / "back")
    assert back.config.head_dim == 5
    again = vitrim.load(f"hf:{tmp_path / 'back'}")
    assert again.spec.blocks[0].attention is not None
    assert again.spec.blocks[0].attention.qk_dim == 5


def test_a_folded_layer_scale_goes_back_as_ones(tmp_path: Path) -> None:
    folded = surgery.fold_layer_scale(vitrim.from_model(small("dinov2")))
    back = assert_back(folded, tmp_path / "back")
    assert torch.equal(back.state_dict()["dinov2.encoder.layer.1.layer_scale2.lambda1"], torch.ones(24).double())


def test_an_encoder_of_dinov2_with_an_mlp_that_it_cannot_say_goes_back_as_vit(tmp_path: Path) -> None:
    model = surgery.cut(
        vitrim.from_model(small("dinov2_encoder")), [surgery.Keep(hidden=tuple(range(17)))] * 2, method="test"
    )
    assert type(assert_back(model, tmp_path / "back")) is ViTModel
    cut = surgery.cut(vitrim.from_model(small("dinov2")), [surgery.Keep(hidden=tuple(range(17)))] * 2, method="test")
    with pytest.raises(SourceError, match=r"block 0 has 17 MLP units.*whole number of times the width 24"):
        source.to_module(cut)


def test_the_block_that_transformers_cannot_say_is_named() -> None:
    model = vitrim.from_model(small("vit", num_hidden_layers=3))
    for keep, words in (
        (surgery.Keep(attention=False), "block 1 has no attention"),
        (surgery.Keep(mlp=False), "block 1 has no MLP"),
        (surgery.Keep(heads=(0, 2)), r"block 1 differs from block 0 \(heads 2"),
        (surgery.Keep(v=((0, 1),) * 3), "block 1 has heads of 8 for queries and 2 for values"),
        (surgery.Keep(hidden=tuple(range(9))), r"block 1 differs from block 0 \(MLP units 9"),
    ):
        cut = surgery.cut(model, [None, keep, None], method="test")
        with pytest.raises(SourceError, match=words):
            source.to_module(cut)
    narrow = surgery.cut(vitrim.from_model(small("clip_tower")), [surgery.Keep(heads=(0, 2))] * 2, method="test")
    with pytest.raises(SourceError, match="block 0 has 2 heads of 8, and CLIPVisionModel wants"):
        source.to_module(narrow)


def test_models_of_timm_go_to_the_plainest_class_that_says_them(tmp_path: Path) -> None:
    import timm

    options = {"embed_dim": 24, "depth": 2, "num_heads": 3, "img_size": 32, "patch_size": 16}
    for number, (name, more, kind) in enumerate(
        (
            ("deit_tiny_patch16_224", {"num_classes": 5}, ViTForImageClassification),
            ("deit_tiny_patch16_224", {"num_classes": 0}, ViTModel),
            ("deit_tiny_distilled_patch16_224", {"num_classes": 5}, DeiTForImageClassificationWithTeacher),
            ("deit3_small_patch16_224", {"num_classes": 5}, ViTForImageClassification),
            ("vit_small_patch14_dinov2", {"num_classes": 0}, Dinov2Model),
            ("vit_small_patch14_reg4_dinov2", {"num_classes": 0}, Dinov2WithRegistersModel),
            ("vit_base_patch16_clip_224", {"num_classes": 0}, CLIPVisionModel),
        )
    ):
        module = randomised(timm.create_model(name, **{**options, **more}))
        assert type(assert_back(vitrim.from_model(module), tmp_path / str(number))) is kind


def test_rows_of_registers_in_the_table_go_back_into_the_registers(tmp_path: Path) -> None:
    spec = source.spec_of(small("dinov2_registers"))
    spec = replace(spec, position=replace(spec.position, prefix_rows=True))
    assert_back(randomised(build(spec)), tmp_path / "back")


def test_a_model_built_here_goes_to_transformers(tmp_path: Path) -> None:
    spec = source.spec_of(small("deit"))
    assert type(assert_back(randomised(build(spec)), tmp_path / "back")) is DeiTForImageClassification


def test_a_folder_that_is_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="is there already"):
        source.write(vitrim.from_model(small("vit")), tmp_path)


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("vit", {"size_px": (24, 24), "crop_mode": "border"}, "crop_mode='border'"),
        ("vit_oblong", {"crop_mode": "center"}, "crop that keeps their proportions"),
    ],
)
def test_a_preprocessing_that_no_image_processor_does_is_left_out_and_said(
    name: str, settings: dict[str, Any], said: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    module = small(name)
    size = vitrim.from_model(module).spec.image_px
    preprocess = Preprocess(mean=(0.5,) * 3, std=(0.5,) * 3, **{"size_px": size, **settings})
    folder = source.write(vitrim.from_model(module, preprocess), tmp_path / "m")
    assert said in caplog.text
    assert not (folder / "preprocessor_config.json").exists()
    squashed = replace(preprocess, crop_mode="squash")
    source.write(vitrim.from_model(module, squashed), tmp_path / "s")
    assert vitrim.load(f"hf:{tmp_path / 's'}").config.preprocess == squashed
