"""torchvision's names, published weights and local state dicts."""

from __future__ import annotations

import logging
import urllib.error
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torchvision.models.vision_transformer import interpolate_embeddings

import vitrim
from tests.sources.torchvision.kit import (
    assert_same,
    narrow,
    randomised,
)
from vitrim import architectures
from vitrim.errors import SourceError

# ------------------------------------------------------------------------------------------------------ names and files


def test_names_that_are_none_give_the_near_miss() -> None:
    for name, words in (
        ("vit_b_15", "did you mean 'vit_b_16'.*known: vit_b_16, vit_b_32"),
        ("vit_b_16.IMAGENET1K_V3", "did you mean 'IMAGENET1K_V1'.*IMAGENET1K_SWAG_E2E_V1"),
        ("swin_t", r"convolutional or hierarchical design \(swin_t\)"),
        ("resnet50", r"convolutional or hierarchical design \(resnet50\)"),
        ("nowhere/at_all", "is no folder"),
    ):
        with pytest.raises(SourceError, match=words):
            vitrim.load(f"torchvision:{name}", pretrained=False)


def test_a_name_gives_the_random_model_that_the_table_has(monkeypatch: pytest.MonkeyPatch) -> None:
    narrow(monkeypatch)
    for name in ("vit_b_16", "vit_b_16.IMAGENET1K_SWAG_E2E_V1", "ViT_B_16_Weights.IMAGENET1K_V1", "vit_b_32.DEFAULT"):
        model = vitrim.load(f"torchvision:{name}", pretrained=False, classes=7, verify=False)
        assert model.spec.classes == 7
        table = architectures.spec(
            name.replace("ViT_B_16_Weights", "vit_b_16").removesuffix(".DEFAULT"), family="torchvision"
        )
        assert table is not None
        assert (model.spec.image_px, model.spec.patch_px) == (table.image_px, table.patch_px)
        assert model.config.preprocess is not None
        assert model.config.labels is None
        assert model.provenance["weights"] == "random"
    assert vitrim.load("torchvision:vit_b_32", pretrained=False, classes=0, verify=False).spec.outputs == ()


def published(monkeypatch: pytest.MonkeyPatch, error: Exception | None = None) -> dict[str, Any]:
    """torchvision's weights as if they had been fetched, or had failed to; gives what the fetch was asked."""
    narrow(monkeypatch)
    asked: dict[str, Any] = {}
    states = {px: randomised(torchvision.models.vit_b_16(image_size=px)).state_dict() for px in (224, 384)}

    def fetch(url: str, **options: Any) -> Any:
        asked.update(options, url=url)
        if error is not None:
            raise error
        return states[384 if "swag-9" in url else 224]

    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", fetch)
    return asked


def test_published_weights_bring_labels_preprocessing_and_their_origin(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = published(monkeypatch)
    random = torch.get_rng_state()
    model = vitrim.load("torchvision:vit_b_16")
    assert torch.equal(torch.get_rng_state(), random)
    assert asked["weights_only"] is True
    assert model.config.labels is not None
    assert model.config.labels[:2] == ("tench", "goldfish")
    told = model.config.preprocess
    assert told is not None
    assert (told.size_px, told.crop, told.interpolation) == ((224, 224), 224 / 256, "bilinear")
    assert told.mean == (0.485, 0.456, 0.406)
    assert model.provenance["weights_name"] == "ViT_B_16_Weights.IMAGENET1K_V1"
    larger = vitrim.load("torchvision:vit_b_16.IMAGENET1K_SWAG_E2E_V1", verify=False)
    assert larger.spec.image_px == (384, 384)
    assert larger.config.preprocess is not None
    assert (larger.config.preprocess.crop, larger.config.preprocess.interpolation) == (1.0, "bicubic")
    assert "SWAG" in larger.provenance["license"]


def test_other_classes_of_published_weights_are_refused_and_none_drops_the_classifier(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    published(monkeypatch)
    with pytest.raises(SourceError, match=r"'vit_b_16' have 1000 classes.*--new-head"):
        vitrim.load("torchvision:vit_b_16", classes=10)
    model = vitrim.load("torchvision:vit_b_16", classes=0)
    assert (model.spec.outputs, model.config.task, model.config.labels) == ((), "features", None)


@pytest.mark.parametrize("error", [urllib.error.URLError("no network"), RuntimeError("invalid hash value")])
def test_a_fetch_that_fails_is_one_sentence_with_the_two_ways_out(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    published(monkeypatch, error)
    with pytest.raises(SourceError, match=rf"{type(error).__name__}.*--checkpoint PATH.*--no-pretrained") as caught:
        vitrim.load("torchvision:vit_b_16")
    assert "\n" not in str(caught.value)


def test_a_local_state_dict_keeps_its_own_classes_and_image_size(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    narrow(monkeypatch)
    module = randomised(torchvision.models.vit_b_16(image_size=48, num_classes=3))
    old = {
        key.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."): value
        for key, value in module.state_dict().items()
    }
    old["encoder.layers.encoder_layer_0.self_attention.q_proj_weight"], *rest = old.pop(
        "encoder.layers.encoder_layer_0.self_attention.in_proj_weight"
    ).chunk(3)
    old["encoder.layers.encoder_layer_0.self_attention.k_proj_weight"] = rest[0]
    old["encoder.layers.encoder_layer_0.self_attention.v_proj_weight"] = rest[1]
    torch.save({"model": {f"module.{key}": value for key, value in old.items()}, "epoch": 1}, tmp_path / "mine.pth")
    with caplog.at_level(logging.INFO, "vitrim.sources"):
        model = vitrim.load("torchvision:vit_b_16", checkpoint=tmp_path / "mine.pth")
    assert "classifier of 3 classes is kept" in caplog.text
    assert "image size of 48 px is kept" in caplog.text
    assert (model.spec.classes, model.spec.image_px) == (3, (48, 48))
    assert model.provenance["weights"] == "mine.pth"
    assert_same(module, model)
    with pytest.raises(SourceError, match=r"classes=9: the classifier in mine\.pth has 3 classes.*--new-head"):
        vitrim.load("torchvision:vit_b_16", checkpoint=tmp_path / "mine.pth", classes=9)
    encoder = vitrim.load("torchvision:vit_b_16", checkpoint=tmp_path / "mine.pth", classes=0)
    assert encoder.spec.outputs == ()
    with pytest.raises(SourceError, match=r"of another shape: conv_proj\.weight"):
        vitrim.load("torchvision:vit_b_32", checkpoint=tmp_path / "mine.pth")


def test_a_state_dict_of_interpolated_embeddings_is_read_at_its_own_size(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    narrow(monkeypatch)
    state = randomised(torchvision.models.vit_b_16(image_size=64, num_classes=3)).state_dict()
    larger = torchvision.models.vit_b_16(image_size=96, num_classes=3)
    larger.load_state_dict(interpolate_embeddings(96, 16, state))
    torch.save(larger.state_dict(), tmp_path / "larger.pth")
    model = vitrim.load("torchvision:vit_b_16", checkpoint=tmp_path / "larger.pth")
    assert_same(larger.eval(), model)


def test_a_state_dict_that_does_not_fit_is_listed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    narrow(monkeypatch)
    state = torchvision.models.vit_b_16(image_size=48).state_dict()
    torch.save({**state, "aux_head.weight": torch.ones(2, 24)}, tmp_path / "aux.pth")
    with pytest.raises(SourceError, match=r"unexpected: aux_head\.weight.*classes=0"):
        vitrim.load("torchvision:vit_b_16", checkpoint=tmp_path / "aux.pth")
    assert vitrim.load("torchvision:vit_b_16", checkpoint=tmp_path / "aux.pth", classes=0).spec.outputs == ()
    del state["encoder.ln.bias"]
    torch.save(state, tmp_path / "less.pth")
    with pytest.raises(SourceError, match=r"missing: encoder\.ln\.bias"):
        vitrim.load("torchvision:vit_b_16", checkpoint=tmp_path / "less.pth")
    state["encoder.pos_embedding"] = torch.zeros(1, 8, 24)
    torch.save(state, tmp_path / "odd.pth")
    with pytest.raises(SourceError, match="8 rows; expected one for the class token and a square"):
        vitrim.load("torchvision:vit_b_16", checkpoint=tmp_path / "odd.pth")
