"""transformers' Vision Transformers: the same numbers in, and a refusal by name of what the spec cannot say."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import vitrim
from vitrim import counting, surgery
from vitrim.errors import SourceError, SpecError
from vitrim.spec import Pool, Preprocess, from_json, spec_hash, to_json

pytest.importorskip("transformers")

from transformers import SwinConfig
from transformers.models.vit.modeling_vit import (
    ViTForImageClassification,
    ViTModel,
)

from tests.sources.huggingface.kit import SMALL, VARIANTS, assert_same, images, randomised, small
from tests.sources.kit import same
from vitrim.sources import huggingface as source

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
    with pytest.raises(SourceError, match="a Sequential as q in block 1"):
        vitrim.from_model(module)
    module = small("vit")
    module.prompt = nn.Parameter(torch.zeros(2, 24))
    with pytest.raises(SourceError, match="does not have: prompt"):
        vitrim.from_model(module)
    module = small("vit")
    module.classifier = nn.Sequential(nn.Dropout(), nn.Linear(24, 5)).eval()
    model, x = vitrim.from_model(module), torch.randn(2, 3, 24, 24)
    assert torch.allclose(model(x), module(x).logits, atol=1e-5)
    module.classifier = nn.Sequential(nn.LayerNorm(24), nn.Linear(24, 5))
    with pytest.raises(SourceError, match="more than one linear"):
        vitrim.from_model(module)
    module = small("vit")
    module.vit.layernorm = nn.RMSNorm(24)
    with pytest.raises(SourceError, match=r"\(RMSNorm\) in place of a layer norm"):
        vitrim.from_model(module)


def test_pixels_that_no_patch_covers_are_read_by_neither() -> None:
    module = small("siglip_tower", image_size=27)
    model = vitrim.from_model(module)
    assert (model.spec.image_px, model.spec.grid, model.spec.unread_px) == ((27, 27), (3, 3), (3, 3))
    assert_same(module, model)
    back = source.to_module(model.float())
    assert back.config.image_size == 27
    assert_same(back, model)


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
