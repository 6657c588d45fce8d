"""transformers' Vision Transformers: the same numbers in and out, and a refusal by name of what the spec cannot say."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vitrim
from vitrim import counting, surgery
from vitrim.errors import SourceError, SpecError
from vitrim.model import Vit, build
from vitrim.spec import Pool, Preprocess, from_json, spec_hash, to_json

pytest.importorskip("transformers")

from transformers import AutoModel, AutoModelForImageClassification, SwinConfig
from transformers.models.clip.modeling_clip import (
    CLIPForImageClassification,
    CLIPModel,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
)
from transformers.models.deit.modeling_deit import (
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    DeiTModel,
)
from transformers.models.dinov2.modeling_dinov2 import Dinov2ForImageClassification, Dinov2Model
from transformers.models.dinov2_with_registers.modeling_dinov2_with_registers import (
    Dinov2WithRegistersForImageClassification,
    Dinov2WithRegistersModel,
)
from transformers.models.siglip.modeling_siglip import (
    SiglipForImageClassification,
    SiglipModel,
    SiglipVisionModel,
)
from transformers.models.vit.modeling_vit import (
    ViTForImageClassification,
    ViTForMaskedImageModeling,
    ViTModel,
)
from transformers.models.vit_mae.modeling_vit_mae import ViTMAEForPreTraining, ViTMAEModel
from transformers.models.vit_msn.modeling_vit_msn import ViTMSNForImageClassification, ViTMSNModel

from vitrim.sources import huggingface as source
from vitrim.sources.huggingface_back import quiet
from vitrim.sources.huggingface_structure import encoder_of, parts_of

SMALL = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "image_size": 24,
    "patch_size": 8,
}
DINO = {key: value for key, value in SMALL.items() if key != "intermediate_size"} | {"mlp_ratio": 2}
TEXT = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 99}

VARIANTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "vit": (ViTForImageClassification, {**SMALL, "num_labels": 5}),
    "vit_no_bias": (ViTForImageClassification, {**SMALL, "num_labels": 5, "qkv_bias": False}),
    "vit_head_dim": (ViTForImageClassification, {**SMALL, "num_labels": 5, "head_dim": 4}),
    "vit_oblong": (ViTForImageClassification, {**SMALL, "num_labels": 5, "image_size": [16, 24], "patch_size": [8, 4]}),
    "vit_grey_relu": (ViTForImageClassification, {**SMALL, "num_labels": 5, "num_channels": 1, "hidden_act": "relu"}),
    "vit_no_classes": (ViTForImageClassification, {**SMALL, "num_labels": 0}),
    "vit_encoder": (ViTModel, SMALL),
    "vit_masked": (ViTForMaskedImageModeling, {**SMALL, "encoder_stride": 8}),
    "deit": (DeiTForImageClassification, {**SMALL, "num_labels": 5}),
    "deit_teacher": (DeiTForImageClassificationWithTeacher, {**SMALL, "num_labels": 5}),
    "deit_encoder": (DeiTModel, SMALL),
    "dinov2": (Dinov2ForImageClassification, {**DINO, "num_labels": 5}),
    "dinov2_encoder": (Dinov2Model, DINO),
    "dinov2_giant": (Dinov2Model, {**DINO, "use_swiglu_ffn": True, "use_mask_token": False}),
    "dinov2_no_classes": (Dinov2ForImageClassification, {**DINO, "num_labels": 0}),
    "dinov2_registers": (Dinov2WithRegistersForImageClassification, {**DINO, "num_labels": 5}),
    "dinov2_registers_encoder": (Dinov2WithRegistersModel, {**DINO, "num_register_tokens": 2, "use_swiglu_ffn": True}),
    "clip_tower": (CLIPVisionModel, SMALL),
    "clip_projected": (CLIPVisionModelWithProjection, {**SMALL, "projection_dim": 7}),
    "clip_classifier": (CLIPForImageClassification, {"vision_config": SMALL, "text_config": TEXT, "num_labels": 5}),
    "clip_both": (CLIPModel, {"vision_config": {**SMALL, "hidden_act": "gelu"}, "text_config": TEXT}),
    "siglip_tower": (SiglipVisionModel, SMALL),
    "siglip_tower_gelu": (SiglipVisionModel, {**SMALL, "hidden_act": "gelu"}),
    "siglip_headless": (SiglipVisionModel, {**SMALL, "vision_use_head": False}),
    "siglip_classifier": (SiglipForImageClassification, {"vision_config": SMALL, "text_config": TEXT, "num_labels": 5}),
    "siglip_both": (SiglipModel, {"vision_config": SMALL, "text_config": TEXT}),
    "mae": (ViTMAEModel, SMALL),
    "mae_pretraining": (ViTMAEForPreTraining, {**SMALL, "decoder_num_hidden_layers": 1, "decoder_hidden_size": 16}),
    "msn": (ViTMSNForImageClassification, {**SMALL, "num_labels": 5}),
    "msn_encoder": (ViTMSNModel, SMALL),
}


def randomised(module: nn.Module, *, seed: int = 0) -> Any:
    """Every number random, in steps of 1/512 so that a sum of two is exact in float32. Norm weights stay around one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_((torch.randn(parameter.shape, generator=generator) * 150).round() / 512)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1.0)
    return module.eval()


def small(name: str, **changes: Any) -> Any:
    """A variant with few numbers, randomised."""
    kind, options = VARIANTS[name]
    return randomised(kind(kind.config_class(**{**options, **changes})))


def same(ours: Tensor, theirs: Tensor, tolerance: float = 1e-10) -> bool:
    return ours.shape == theirs.shape and float((ours - theirs).abs().max()) <= tolerance * max(
        1.0, float(theirs.abs().max())
    )


def images(spec: Any, count: int = 2, size: tuple[int, int] | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, spec.channels, *(size or spec.image_px), generator=generator, dtype=torch.float64)


@torch.no_grad()
def assert_same(module: Any, model: Vit, tolerance: float = 1e-10) -> None:
    """Law 5 in float64: logits or features, and the stream after every block."""
    module, model = module.double(), model.double()
    encoder, _ = encoder_of(module)
    x = images(model.spec)
    depth = len(model.blocks)
    found = model(x, want=("logits", *(f"block:{i}" for i in range(depth))))
    streams: list[Tensor] = []
    parts = parts_of(encoder).block_modules
    hooks = [part.register_forward_hook(lambda _m, _i, out: streams.append(out)) for part in parts]
    answer = source.answer(encoder, x, model.spec)
    for hook in hooks:
        hook.remove()
    assert float(answer.abs().max()) > 0.01
    assert same(found["logits"], answer, tolerance)
    assert len(streams) == depth
    for i, stream in enumerate(streams):
        assert same(found[f"block:{i}"], stream, tolerance)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# --------------------------------------------------------------------------------------------------------------- law 5


@pytest.mark.parametrize("name", VARIANTS)
def test_a_loaded_model_gives_the_modules_logits_and_features(name: str) -> None:
    module = small(name)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    random = torch.get_rng_state()
    model = vitrim.from_model(module)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    assert counting.params(model.spec) == sum(parameter.numel() for parameter in model.parameters())
    assert_same(module, model)


KEEP = surgery.Keep(heads=(0, 2), qk=((0, 2, 3), (1, 4, 7)), v=((0, 1, 2, 5), (2, 3, 4, 6)), hidden=tuple(range(3, 17)))


@torch.no_grad()
@pytest.mark.parametrize("name", VARIANTS)
def test_a_cut_model_equals_the_masked_one(name: str) -> None:
    model = vitrim.from_model(small(name)).double()
    keep = replace(KEEP, qk=None, v=None) if name == "vit_head_dim" else KEEP
    keeps = [keep, surgery.Keep(attention=False)]
    x = images(model.spec)
    assert same(surgery.cut(model, keeps, method="test")(x), model(x, masks=surgery.masked_twin(model, keeps)))


RESIZED = [
    "vit",
    "deit",
    "deit_teacher",
    "dinov2",
    "dinov2_registers",
    "clip_tower",
    "clip_projected",
    "siglip_tower",
    "siglip_classifier",
    "mae",
    "msn",
]


@torch.no_grad()
@pytest.mark.parametrize("name", RESIZED)
@pytest.mark.parametrize("size", [(32, 48), (16, 16)])
def test_another_resolution_gives_the_modules_own_interpolated_positions(name: str, size: tuple[int, int]) -> None:
    module = small(name).double()
    model = vitrim.from_model(module.float()).double()
    module = module.double()
    x = images(model.spec, size=size)
    asked: dict[str, Any] = {} if name.startswith("dinov2") else {"interpolate_pos_encoding": True}
    if name == "mae":
        module.config.mask_ratio = 0.0
        asked["noise"] = torch.arange(size[0] * size[1] // 64, dtype=torch.float64).expand(2, -1)
    out = module(x, **asked)
    theirs = out.logits if "logits" in out else out.get("image_embeds", out.get("pooler_output"))
    theirs = out.last_hidden_state[:, 0] if theirs is None else theirs
    assert same(model(x), theirs, 1e-6 if name.startswith("dinov2") else 1e-10)  # DINOv2 resizes in float32


def test_dinov2_takes_the_image_size_of_its_processor_and_keeps_its_table() -> None:
    module = small("dinov2", image_size=40)
    preprocess = Preprocess(mean=(0.5,) * 3, std=(0.5,) * 3, size_px=(24, 24))
    model = vitrim.from_model(module, preprocess)
    assert model.spec.image_px == (24, 24)
    assert model.spec.position.grid == (5, 5)
    assert_same(module, model, 1e-6)
    back = source.to_module(model.float())
    assert back.config.image_size == 40
    assert_same(back, model, 1e-6)


def test_mae_is_compared_unmasked_and_unmoved_and_its_setting_is_put_back() -> None:
    module = small("mae", mask_ratio=0.75)
    model = vitrim.from_model(module)
    assert module.config.mask_ratio == 0.75
    assert model.spec.position.kind == "fixed"
    assert model.position is not None
    assert not model.position.requires_grad


def test_a_module_in_half_precision_is_read_and_left_as_it_is() -> None:
    module = small("vit").half()
    model = vitrim.from_model(module)
    assert all(value.dtype == torch.float16 for value in module.parameters())
    assert all(value.dtype == torch.float32 for value in model.parameters())


# ----------------------------------------------------------------------------------------- the encoder, and what it leaves


def test_a_pooler_is_left_out_and_said(caplog: pytest.LogCaptureFixture) -> None:
    module = small("vit_encoder")
    with caplog.at_level(logging.WARNING, "vitrim.sources"):
        model = vitrim.from_model(module)
    assert "its pooler" in caplog.text
    assert model.provenance["left_out"] == ["pooler"]
    assert model.config.task == "features"


def test_what_a_larger_model_has_beside_its_encoder_is_said() -> None:
    assert vitrim.from_model(small("mae_pretraining")).provenance["left_out"] == ["decoder"]
    assert vitrim.from_model(small("clip_both")).provenance["left_out"] == ["text tower and both projections"]
    model = vitrim.from_model(small("siglip_both"))
    assert model.provenance["architecture"] == "SiglipVisionModel"
    assert model.spec.pool == Pool(kind="map", heads=3, hidden=40, act="gelu_tanh")


def test_a_projection_is_an_output_and_no_classifier() -> None:
    model = vitrim.from_model(small("clip_projected"))
    assert [(output.name, output.classes, output.bias) for output in model.spec.outputs] == [("projection", 7, False)]
    assert model.config.task == "features"
    assert model.config.labels is None


def test_dinov2s_classifier_reads_class_token_and_mean() -> None:
    assert [output.reads for output in vitrim.from_model(small("dinov2")).spec.outputs] == [("pool", "mean")]


def test_the_poolings_activation_is_part_of_the_spec_and_leaves_earlier_hashes_as_they_were() -> None:
    spec = vitrim.from_model(small("siglip_tower")).spec
    assert from_json(to_json(spec)) == spec
    plain = replace(spec, pool=replace(spec.pool, act="gelu"))
    assert "act" not in plain.to_dict()["pool"]
    assert from_json(to_json(plain)) == plain
    assert spec_hash(plain) != spec_hash(spec)
    with pytest.raises(SpecError, match="act belongs to kind 'map'"):
        replace(spec, pool=Pool(kind="mean", act="gelu_tanh"))


def test_labels_come_along_unless_they_only_count() -> None:
    names = {0: "cat", 1: "dog", 2: "owl", 3: "fox", 4: "hen"}
    assert vitrim.from_model(small("vit", id2label=names)).config.labels == ("cat", "dog", "owl", "fox", "hen")
    assert vitrim.from_model(small("vit")).config.labels is None


PROCESSORS: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "squash": (
        {"size": {"height": 24, "width": 24}, "resample": 2},
        {"size_px": (24, 24), "crop": 1.0, "crop_mode": "squash", "interpolation": "bilinear"},
    ),
    "shorter edge, then the middle": (
        {
            "size": {"shortest_edge": 256},
            "do_center_crop": True,
            "crop_size": {"height": 224, "width": 224},
            "resample": 3,
        },
        {"size_px": (224, 224), "crop": 224 / 256, "crop_mode": "center", "interpolation": "bicubic"},
    ),
    "both sides, then the middle": (
        {"size": {"height": 256, "width": 256}, "do_center_crop": True, "crop_size": 224, "resample": 3},
        {"size_px": (224, 224), "crop": 224 / 256, "crop_mode": "squash", "interpolation": "bicubic"},
    ),
    "plain pixels": (
        {"size": 24, "do_normalize": False},
        {"mean": (0.0,) * 3, "std": (1.0,) * 3, "crop_mode": "center"},
    ),
    "no resize": ({"size": 24, "do_resize": False}, None),
    "no rescale": ({"size": 24, "do_rescale": False}, None),
    "longest edge": ({"size": {"shortest_edge": 24, "longest_edge": 48}}, None),
    "crop beyond the image": ({"size": {"shortest_edge": 20}, "do_center_crop": True, "crop_size": 24}, None),
    "four channels": ({"size": 24, "image_mean": [0.5] * 4, "image_std": [0.5] * 4}, None),
}


@pytest.mark.parametrize("case", PROCESSORS)
def test_an_image_processors_settings_become_ours(case: str) -> None:
    said, expected = PROCESSORS[case]
    found = source.preprocess_of({"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2] * 3, **said})
    if expected is None:
        assert found is None
    else:
        assert found is not None
        assert {key: getattr(found, key) for key in expected} == expected
        if "mean" not in expected:
            assert found.mean == (0.4, 0.5, 0.6)


def test_the_crop_gives_the_size_that_was_resized_to() -> None:
    for size in range(1, 400):
        for outer in range(size, 400, 7):
            assert math.floor(size / source._share(size, outer)) == outer


def test_an_image_processor_of_another_size_than_the_models_is_not_taken(caplog: pytest.LogCaptureFixture) -> None:
    said = {"size": {"height": 48, "width": 48}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    with caplog.at_level(logging.WARNING, "vitrim.sources"):
        assert source.preprocess_of(said, (24, 24)) is None
    assert "48 x 48 px, the model takes 24 x 24" in caplog.text


# -------------------------------------------------------------------------------------------------- refusals of modules


def test_models_of_other_designs_are_refused_by_what_they_have() -> None:
    from transformers import ResNetConfig
    from transformers.models.resnet.modeling_resnet import ResNetModel
    from transformers.models.swin.modeling_swin import SwinModel

    with torch.device("meta"):
        swin = SwinModel(SwinConfig(embed_dim=8, depths=[1], num_heads=[1]))
        resnet = ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1]))
    with pytest.raises(SourceError, match="hierarchy of windows"):
        vitrim.from_model(swin)
    with pytest.raises(SourceError, match="convolutional"):
        vitrim.from_model(resnet)


@pytest.mark.parametrize("act", ["gelu_fast", "mish", "tanh", "relu2"])
def test_an_activation_that_the_spec_cannot_say_is_refused_by_name(act: str) -> None:
    with pytest.raises(SourceError, match=r"the activation \w+ \(block 0\)"):
        vitrim.from_model(small("vit", hidden_act=act))


@pytest.mark.parametrize(("act", "kind"), [("gelu_new", "gelu_tanh"), ("quick_gelu", "quick_gelu"), ("silu", "silu")])
def test_other_spellings_of_an_activation_are_read(act: str, kind: str) -> None:
    module = small("vit", hidden_act=act)
    model = vitrim.from_model(module)
    assert model.spec.blocks[0].mlp is not None
    assert model.spec.blocks[0].mlp.kind == kind
    assert_same(module, model)


def test_adapters_added_numbers_and_other_classifiers_are_refused() -> None:
    module = small("vit")
    module.vit.layers[1].attention.q_proj = nn.Sequential(module.vit.layers[1].attention.q_proj)
    with pytest.raises(SourceError, match=r"Sequential in place of a linear|no out_features|heads"):
        vitrim.from_model(module)
    module = small("vit")
    module.prompt = nn.Parameter(torch.zeros(2, 24))
    with pytest.raises(SourceError, match="does not have: prompt"):
        vitrim.from_model(module)
    module = small("vit")
    module.classifier = nn.Sequential(nn.Dropout(), nn.Linear(24, 5))
    with pytest.raises(SourceError, match="more than one linear"):
        vitrim.from_model(module)
    module = small("vit")
    module.vit.layernorm = nn.RMSNorm(24)
    with pytest.raises(SourceError, match="RMSNorm in place of a layer norm"):
        vitrim.from_model(module)


def test_an_image_size_that_is_no_multiple_of_the_patch_is_refused() -> None:
    with pytest.raises(SourceError, match="not a multiple of patch_px"):
        vitrim.from_model(small("siglip_tower", image_size=27))


class Same(ViTForImageClassification):
    """A user's subclass of the same structure."""


class Doubled(ViTModel):
    """A look-alike whose second block sees twice its input."""

    def __init__(self, config: Any) -> None:
        super().__init__(config, add_pooling_layer=False)
        self.layers[1].register_forward_pre_hook(lambda _m, args: (2 * args[0], *args[1:]))


class Scaled(ViTForImageClassification):
    """A look-alike that does something else after its blocks."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.logits = 2 * out.logits
        return out


class PostNorm(ViTForImageClassification):
    """A look-alike whose first block is another one."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        layer = self.vit.layers[0]
        layer.forward = lambda x, *_args, **_kwargs: layer.layernorm_after(x + layer.mlp(x))


def test_a_subclass_of_the_same_structure_is_read() -> None:
    module = randomised(Same(Same.config_class(**SMALL, num_labels=5)))
    assert_same(module, vitrim.from_model(module))


def test_a_changed_forward_is_found_and_the_first_differing_place_named() -> None:
    config = ViTModel.config_class(**{**SMALL, "num_hidden_layers": 3}, num_labels=5)
    with pytest.raises(SourceError, match="first in block 1"):
        vitrim.from_model(randomised(Doubled(config)))
    with pytest.raises(SourceError, match="first in block 0"):
        vitrim.from_model(randomised(PostNorm(config)))
    with pytest.raises(SourceError, match="what follows the blocks"):
        vitrim.from_model(randomised(Scaled(config)))
    assert vitrim.from_model(randomised(Scaled(config)), verify=False).spec.width == 24


# ------------------------------------------------------------------------------------------------- folders, names, files


def saved(module: Any, folder: Path, **processor: Any) -> Path:
    """A folder as transformers writes it."""
    with quiet():
        module.save_pretrained(folder)
    if processor:
        said = {
            "image_processor_type": "ViTImageProcessor",
            "size": {"height": 24, "width": 24},
            "image_mean": [0.4, 0.5, 0.6],
            "image_std": [0.2, 0.2, 0.3],
            **processor,
        }
        (folder / "preprocessor_config.json").write_text(json.dumps(said))
    return folder


@pytest.mark.parametrize("name", VARIANTS)
def test_a_folder_of_from_pretrained_gives_its_weights(name: str, tmp_path: Path) -> None:
    module = small(name)
    model = vitrim.load(f"hf:{saved(module, tmp_path / name)}")
    assert model.provenance["weights"] == "pretrained"
    assert_same(module, model)
    assert source.describe(str(tmp_path / name)) == model.spec


def test_labels_and_image_settings_of_a_folder_come_along(tmp_path: Path) -> None:
    module = small("vit", id2label={i: f"kind {i}" for i in range(5)})
    model = vitrim.load(f"hf:{saved(module, tmp_path / 'm', resample=3)}")
    assert model.config.labels == tuple(f"kind {i}" for i in range(5))
    assert model.config.preprocess == Preprocess(
        mean=(0.4, 0.5, 0.6), std=(0.2, 0.2, 0.3), size_px=(24, 24), crop_mode="squash", interpolation="bicubic"
    )


def test_half_precision_files_are_read(tmp_path: Path) -> None:
    module = small("vit").half()
    model = vitrim.load(f"hf:{saved(module, tmp_path / 'm')}")
    assert all(value.dtype == torch.float32 for value in model.parameters())
    assert_same(module, model)


def test_random_weights_take_the_classes_asked_for(tmp_path: Path) -> None:
    folder = saved(small("vit"), tmp_path / "m")
    model = vitrim.load(f"hf:{folder}", pretrained=False, classes=9)
    assert model.spec.classes == 9
    assert model.provenance["weights"] == "random"
    assert vitrim.load(f"hf:{folder}", pretrained=False, classes=0).spec.outputs == ()
    encoder = saved(small("dinov2_encoder"), tmp_path / "e")
    with pytest.raises(SourceError, match="encoder without classifier"):
        vitrim.load(f"hf:{encoder}", pretrained=False, classes=9)


@pytest.mark.parametrize("name", ["vit", "deit_teacher", "dinov2", "clip_classifier", "siglip_classifier"])
def test_no_classes_drop_the_classifier_and_change_no_other_number(name: str, tmp_path: Path) -> None:
    folder = saved(small(name), tmp_path / "m")
    whole, without = vitrim.load(f"hf:{folder}"), vitrim.load(f"hf:{folder}", classes=0)
    assert without.spec == replace(whole.spec, outputs=())
    state = without.state_dict()
    assert all(torch.equal(value, whole.state_dict()[key]) for key, value in state.items())
    with pytest.raises(SourceError, match=r"have 5 classes.*--new-head"):
        vitrim.load(f"hf:{folder}", classes=7)


def wrapped(state: dict[str, Tensor], how: str) -> Any:
    """A training checkpoint's ways to hold weights."""
    if how == "module":
        return {f"module.{key}": value for key, value in state.items()}
    if how == "lightning":
        return {"state_dict": {f"model.net.{key}": value for key, value in state.items()}, "epoch": 3}
    if how == "ema":
        return {"state_dict_ema": state, "state_dict": {key: value * 0 for key, value in state.items()}, "epoch": 3}
    if how == "half":
        return {key: value.half() for key, value in state.items()}
    return state


@pytest.mark.parametrize("how", ["plain", "module", "lightning", "ema", "half"])
def test_a_local_checkpoint_gives_its_weights_and_its_own_classes(
    how: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = saved(small("vit"), tmp_path / "m")
    module = small("vit", num_labels=3)
    module = randomised(module, seed=7)
    torch.save(wrapped(module.state_dict(), how), tmp_path / "mine.pth")
    random = torch.get_rng_state()
    with caplog.at_level(logging.INFO, "vitrim.sources"):
        model = vitrim.load(f"hf:{folder}", checkpoint=tmp_path / "mine.pth")
    assert torch.equal(torch.get_rng_state(), random)
    assert model.spec.classes == 3
    assert "3 classes of mine.pth; the configuration says 5" in caplog.text
    assert model.provenance["weights"] == "mine.pth"
    assert "configuration says 5" in model.provenance["classifier"]
    if how == "half":
        module = module.half().float()
    assert_same(module, model)


def test_a_checkpoint_in_the_older_spelling_of_names_is_read(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    module = small("vit")
    folder = saved(module, tmp_path / "m")
    state = load_file(folder / "model.safetensors")
    assert "vit.encoder.layer.0.attention.attention.key.bias" in state  # files keep the names of before 5.9
    save_file(state, tmp_path / "old.safetensors")
    assert_same(module, vitrim.load(f"hf:{folder}", checkpoint=tmp_path / "old.safetensors"))


def test_a_checkpoint_without_classifier_gives_an_encoder(tmp_path: Path) -> None:
    folder, module = saved(small("vit"), tmp_path / "m"), small("vit")
    state = {key: value for key, value in module.state_dict().items() if "classifier" not in key}
    torch.save(state, tmp_path / "encoder.pth")
    model = vitrim.load(f"hf:{folder}", checkpoint=tmp_path / "encoder.pth")
    assert model.spec.outputs == ()
    assert_same(module.vit, model)


def test_a_pooler_that_the_file_lacks_is_neither_drawn_nor_said(tmp_path: Path) -> None:
    module = small("vit_masked")
    folder = saved(module, tmp_path / "m")
    torch.save(module.vit.state_dict(), tmp_path / "encoder.pth")
    random = torch.get_rng_state()
    assert vitrim.load(f"hf:{folder}").provenance["left_out"] == ["decoder"]
    assert vitrim.load(f"hf:{folder}", checkpoint=tmp_path / "encoder.pth").provenance["left_out"] == ["decoder"]
    assert torch.equal(torch.get_rng_state(), random)


def test_extra_missing_and_misshapen_numbers_of_a_checkpoint_are_listed(tmp_path: Path) -> None:
    folder, module = saved(small("vit"), tmp_path / "m"), small("vit")
    state = module.state_dict()
    torch.save({**state, **{f"head_{i}.weight": torch.zeros(2) for i in range(12)}}, tmp_path / "extra.pth")
    with pytest.raises(SourceError, match=r"extra\.pth.*unexpected: head_0\.weight.*and 2 more"):
        vitrim.load(f"hf:{folder}", checkpoint=tmp_path / "extra.pth")
    torch.save({key: value for key, value in state.items() if "layers.1" not in key}, tmp_path / "short.pth")
    with pytest.raises(SourceError, match=r"missing: vit\.layers\.1.*and 6 more"):
        vitrim.load(f"hf:{folder}", checkpoint=tmp_path / "short.pth")
    torch.save({**state, "vit.layernorm.weight": torch.zeros(3)}, tmp_path / "odd.pth")
    with pytest.raises(SourceError, match=r"another shape: vit\.layernorm\.weight \(3,\) \(expected \(24,\)\)"):
        vitrim.load(f"hf:{folder}", checkpoint=tmp_path / "odd.pth")
    with pytest.raises(SourceError, match=r"classes=9: the classifier in odd\.pth has 5"):
        vitrim.load(f"hf:{folder}", checkpoint=tmp_path / "odd.pth", classes=9)


def test_whole_numbers_in_place_of_weights_are_refused(tmp_path: Path) -> None:
    folder, state = saved(small("vit"), tmp_path / "m"), small("vit").state_dict()
    state["vit.layers.0.mlp.fc1.weight"] = state["vit.layers.0.mlp.fc1.weight"].to(torch.int8)
    torch.save(state, tmp_path / "int8.pth")
    with pytest.raises(SourceError, match=r"whole numbers.*fc1\.weight \(int8\)"):
        vitrim.load(f"hf:{folder}", checkpoint=tmp_path / "int8.pth")


def test_only_a_larger_model_may_bring_more_than_its_encoder(tmp_path: Path) -> None:
    model = vitrim.load(f"hf:{saved(small('clip_both'), tmp_path / 'clip')}")
    assert model.provenance["left_out"] == ["text tower and both projections"]
    folder = saved(small("vit"), tmp_path / "vit")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["ViTModel"]}))
    with pytest.raises(SourceError, match=r"do not fit .*unexpected: classifier\.bias, classifier\.weight"):
        vitrim.load(f"hf:{folder}")


def test_a_folder_with_a_part_missing_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = saved(small("vit"), tmp_path / "m")
    state = load_file(folder / "model.safetensors")
    kept = {key: value for key, value in state.items() if "layer.1" not in key}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SourceError, match=r"missing: vit\.layers\.1"):
        vitrim.load(f"hf:{folder}")
    (folder / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(SourceError, match=r"weights .* no whole safetensors file|weights in .* cannot be read"):
        vitrim.load(f"hf:{folder}")
    (folder / "model.safetensors").unlink()
    with pytest.raises(SourceError, match=r"weights in .* cannot be read"):
        vitrim.load(f"hf:{folder}")


def described(folder: Path, **changes: Any) -> str:
    """A folder with nothing but a configuration."""
    folder.mkdir(exist_ok=True)
    config = {"model_type": "vit", "architectures": ["ViTForImageClassification"], **changes}
    (folder / "config.json").write_text(json.dumps(config))
    return f"hf:{folder}"


FOREIGN: dict[str, tuple[dict[str, Any], str]] = {
    "code of its own": ({"model_type": "mine", "auto_map": {"AutoModel": "m.Mine"}}, "trust_remote_code"),
    "quantised": ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantised weights \\(bitsandbytes"),
    "hierarchy": ({"model_type": "swin", "architectures": ["SwinModel"]}, "hierarchy of windows"),
    "convolutions": ({"model_type": "convnext", "architectures": ["ConvNextModel"]}, "convolutional"),
    "rotary": ({"model_type": "dinov3_vit", "architectures": ["DINOv3ViTModel"]}, "rotary positions"),
    "text": ({"model_type": "bert", "architectures": ["BertModel"]}, "another design \\(BertModel"),
    "segmentation": ({"architectures": ["ViTForSegmentation"]}, "another design \\(ViTForSegmentation"),
    "nothing": ({"model_type": "", "architectures": None}, "another design"),
    "bad values": ({"hidden_size": "wide"}, "is not valid: .*hidden_size|is not valid: .*int"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_configurations_of_other_models_are_refused_by_what_they_have(case: str, tmp_path: Path) -> None:
    changes, words = FOREIGN[case]
    with pytest.raises(SourceError, match=words):
        vitrim.load(described(tmp_path / "m", **changes))


def test_names_that_lead_nowhere_are_refused_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name, words in (
        ("", "names no model"),
        (str(tmp_path / "none"), "there is no folder"),
        (str(tmp_path / "empty"), "has no config.json"),
        ("someone/no-such-model", r"configuration of 'someone/no-such-model' is not .*hf:FOLDER"),
    ):
        with pytest.raises(SourceError, match=words) as caught:
            vitrim.load(f"hf:{name}")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("GatedRepoError", "behind a gate"),
        ("RepositoryNotFoundError", "no such model, or it is private"),
        ("LocalEntryNotFoundError", "could not be fetched"),
    ],
)
def test_the_hubs_refusals_are_told_apart(kind: str, words: str) -> None:
    reason = type(kind, (OSError,), {})
    with pytest.raises(SourceError, match=words), source._fetching("someone/thing", "weights"):
        raise OSError("first line\nsecond") from reason("no")


def test_the_settings_of_transformers_are_put_back(tmp_path: Path) -> None:
    from transformers.utils import logging as theirs

    level, bars = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    vitrim.load(f"hf:{saved(small('vit'), tmp_path / 'm')}")
    assert (theirs.get_verbosity(), theirs.is_progress_bar_enabled()) == (level, bars)


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
            Preprocess(mean=(0.4, 0.5, 0.6), std=(0.2,) * 3, size_px=(24, 24), crop=24 / 27, interpolation="bilinear"),
            Preprocess(mean=(0.4, 0.5, 0.6), std=(0.2,) * 3, size_px=(24, 24), crop=24 / 27, crop_mode="squash"),
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
        with pytest.raises(SourceError, match="attention pooling has 3 heads, 40 MLP units"):
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


def test_a_folder_that_is_there_and_a_border_are_refused(tmp_path: Path) -> None:
    model = vitrim.from_model(small("vit"))
    with pytest.raises(SourceError, match="is there already"):
        source.write(model, tmp_path)
    border = Preprocess(mean=(0.5,) * 3, std=(0.5,) * 3, size_px=(24, 24), crop_mode="border")
    with pytest.raises(SourceError, match="crop_mode='border'"):
        source.write(vitrim.from_model(small("vit"), border), tmp_path / "m")
    assert not (tmp_path / "m").exists()


# ------------------------------------------------------------------------------------------------- compressed by a method


@pytest.mark.parametrize(
    "name",
    [
        "vit",
        "deit_teacher",
        "dinov2",
        "dinov2_registers_encoder",
        "clip_projected",
        "siglip_tower",
        "siglip_classifier",
        "mae",
        "msn",
    ],
)
def test_a_method_compresses_every_family_within_the_budget(name: str) -> None:
    from vitrim.budget import Budget
    from vitrim.methods import comcat, compress

    model = vitrim.from_model(small(name))
    generator = torch.Generator().manual_seed(2)
    pixels = torch.randn(8, model.spec.channels, *model.spec.image_px, generator=generator)
    dense = counting.cost(model).macs
    made = compress(model, comcat.ComcatConfig(budget=Budget(keep_macs=0.8), align=1, images=8), data=pixels)
    assert counting.cost(made.model).macs <= 0.8 * dense
    assert made.model.spec.pool == model.spec.pool
    assert made.model(pixels).shape == model(pixels).shape
    whole = compress(model, comcat.ComcatConfig(budget=Budget(keep_macs=1.0), align=1, images=8), data=pixels)
    with torch.no_grad():
        assert same(whole.model(pixels), model(pixels), 1e-4)


@pytest.mark.parametrize(
    "said",
    [
        {"image_processor_type": "ViTImageProcessor", "size": {"height": 24, "width": 24}},
        {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 28}, "crop_size": 24},
        {"image_processor_type": "DeiTImageProcessor", "size": {"height": 28, "width": 28}, "crop_size": 24},
    ],
)
@pytest.mark.parametrize("resample", [2, 3])
def test_an_image_is_prepared_as_the_image_processor_prepares_it(
    said: dict[str, Any], resample: int, tmp_path: Path
) -> None:
    from PIL import Image
    from transformers import AutoImageProcessor

    from vitrim.data.transforms import evaluation

    settings = {
        **said,
        "do_center_crop": "crop_size" in said,
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "resample": resample,
        "image_mean": [0.4, 0.5, 0.6],
        "image_std": [0.2, 0.2, 0.3],
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    preprocess = source.preprocess_of(processor.to_dict())
    assert preprocess is not None
    coarse = torch.randint(0, 256, (6, 9, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    image = Image.fromarray(coarse.numpy()).resize((90, 60), Image.Resampling.BICUBIC)
    theirs = processor(image, return_tensors="pt").pixel_values[0]
    ours = evaluation(preprocess)(image)
    assert ours.shape == theirs.shape
    assert float((ours - theirs).abs().max()) < 3 / 255 / 0.2  # whole grey levels, rounded by two libraries
