"""timm's names, published weights and local checkpoints."""

from __future__ import annotations

import argparse
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

import vitrim
from tests.sources.timm.kit import assert_same, images, randomised
from vitrim import architectures
from vitrim.errors import SourceError

# ------------------------------------------------------------------------------------------------------ names and files


def test_unknown_names_and_tags_give_the_near_miss() -> None:
    with pytest.raises(SourceError, match="did you mean 'deit_small_patch16_224'"):
        vitrim.load("timm:deit_smal_patch16_224", pretrained=False)
    with pytest.raises(SourceError, match="did you mean 'fb_in1k'"):
        vitrim.load("timm:deit_small_patch16_224.fb_in1", pretrained=False)


def test_a_name_gives_timms_random_model_with_the_classes_asked_for() -> None:
    model = vitrim.load("timm:deit_tiny_patch16_224", pretrained=False, classes=7)
    assert model.spec.classes == 7
    assert model.provenance["source"] == "timm:deit_tiny_patch16_224"
    assert model.provenance["weights"] == "random"
    assert not model.training


def test_a_missing_network_names_the_two_ways_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import LocalEntryNotFoundError

    def offline(*_: Any, **__: Any) -> None:
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(SourceError, match=r"--checkpoint PATH.*--no-pretrained"):
        vitrim.load("timm:deit_tiny_patch16_224")
    with pytest.raises(SourceError, match="description of 'hf-hub:someone/thing'"):
        vitrim.load("hf-hub:someone/thing", pretrained=False)


def test_an_error_of_ours_is_not_taken_for_a_missing_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(timm, "create_model", broken)
    with pytest.raises(KeyError):
        vitrim.load("timm:deit_tiny_patch16_224")


def published(monkeypatch: pytest.MonkeyPatch, **options: Any) -> Any:
    """timm's `create_model` as if the weights had been fetched."""
    real = timm.create_model
    module = randomised(real("deit_tiny_patch16_224", depth=1, **options))
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: module)
    return module


def test_published_weights_bring_labels_and_their_origin(monkeypatch: pytest.MonkeyPatch) -> None:
    published(monkeypatch)
    model = vitrim.load("timm:deit_tiny_patch16_224")
    assert model.config.labels is not None
    assert model.config.labels[0] == "n01440764"
    assert model.provenance["base_model"].startswith("timm/deit_tiny")
    assert model.provenance["license"] == "apache-2.0"


def test_other_classes_of_published_weights_are_refused_and_none_drops_the_classifier(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    published(monkeypatch)
    with pytest.raises(SourceError, match=r"1000 classes.*--new-head"):
        vitrim.load("timm:deit_tiny_patch16_224", classes=10)
    model = vitrim.load("timm:deit_tiny_patch16_224", classes=0)
    assert model.spec.outputs == ()
    assert model.config.task == "features"


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A small deit_tiny under its full name, so that checkpoints in tests stay small."""
    real = timm.create_model

    def create(name: str, **options: Any) -> Any:
        return real(name, **{"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 3, **options})

    monkeypatch.setattr(timm, "create_model", create)
    return lambda **options: randomised(create("deit_tiny_patch16_224", **options))


def test_a_local_checkpoint_gives_its_weights_and_its_own_classes(tiny: Any, tmp_path: Path) -> None:
    module = tiny(num_classes=3)
    torch.save({"model": module.state_dict(), "epoch": 3}, tmp_path / "mine.pth")
    random = torch.get_rng_state()
    model = vitrim.load("timm:deit_tiny_patch16_224", checkpoint=tmp_path / "mine.pth")
    assert torch.equal(torch.get_rng_state(), random)
    assert model.spec.classes == 3
    assert model.provenance["weights"] == "mine.pth"
    assert_same(module, model)


def test_published_layouts_are_translated_by_timms_own_filter(tiny: Any, tmp_path: Path) -> None:
    module = tiny(init_values=1e-5)
    old = {
        key.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): v for key, v in module.state_dict().items()
    }
    torch.save(old, tmp_path / "deit3.pth")
    real = timm.create_model
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timm, "create_model", lambda name, **options: real(name, **{"init_values": 1e-5, **options}))
        model = vitrim.load("timm:deit_tiny_patch16_224", checkpoint=tmp_path / "deit3.pth")
    assert_same(module, model)


def test_a_checkpoint_with_other_classes_than_asked_for_is_refused(tiny: Any, tmp_path: Path) -> None:
    torch.save(tiny(num_classes=3).state_dict(), tmp_path / "mine.pth")
    with pytest.raises(SourceError, match=r"classes=10: the classifier in mine\.pth has 3"):
        vitrim.load("timm:deit_tiny_patch16_224", checkpoint=tmp_path / "mine.pth", classes=10)
    assert vitrim.load("timm:deit_tiny_patch16_224", checkpoint=tmp_path / "mine.pth", classes=0).spec.outputs == ()


def test_a_classifier_around_the_backbone_of_a_name_without_one_is_used(tiny: Any, tmp_path: Path) -> None:
    module = tiny(num_classes=3)
    state = {key if key.startswith("head.") else f"backbone.{key}": value for key, value in module.state_dict().items()}
    torch.save(state, tmp_path / "mine.pth")
    real = timm.create_model
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timm, "create_model", lambda name, **options: real(name, **{"num_classes": 0, **options}))
        assert_same(module, vitrim.load("timm:deit_tiny_patch16_224", checkpoint=tmp_path / "mine.pth"))
        model = vitrim.load("timm:deit_tiny_patch16_224", checkpoint=tmp_path / "mine.pth", checkpoint_key="backbone")
    assert model.spec.outputs == ()
    assert model.provenance["checkpoint_key"] == "backbone"


def test_a_key_without_a_file_is_refused() -> None:
    with pytest.raises(SourceError, match=r"checkpoint_key='ema' without a checkpoint"):
        vitrim.load("timm:deit_tiny_patch16_224", pretrained=False, checkpoint_key="ema")


def test_a_checkpoint_without_classifier_gives_an_encoder(tiny: Any, tmp_path: Path) -> None:
    module = tiny(num_classes=0)
    torch.save(module.state_dict(), tmp_path / "encoder.pth")
    model = vitrim.load("timm:deit_tiny_patch16_224", checkpoint=tmp_path / "encoder.pth")
    assert model.config.task == "features"
    assert_same(module, model)


def test_missing_and_unexpected_keys_are_listed_ten_at_most(tiny: Any, tmp_path: Path) -> None:
    state = {f"encoder.{key}" if "blocks.1" in key else key: value for key, value in tiny().state_dict().items()}
    torch.save(state, tmp_path / "foreign.pth")
    with pytest.raises(
        SourceError, match=r"missing: blocks\.1.* and 2 more; unexpected: encoder.* and 2 more"
    ) as caught:
        vitrim.load("timm:deit_tiny_patch16_224", checkpoint=tmp_path / "foreign.pth")
    assert str(caught.value).count("encoder.blocks") == 10


def test_a_checkpoint_of_another_image_size_is_refused_by_its_size(tiny: Any, tmp_path: Path) -> None:
    torch.save(tiny(img_size=64).state_dict(), tmp_path / "large.pth")
    with pytest.raises(SourceError, match=r"made for images of 64 x 64 px.*is for 32 x 32 px.*--image-px 64 "):
        vitrim.load("timm:deit_tiny_patch16_224", checkpoint=tmp_path / "large.pth")


def in_open_clip(module: Any) -> dict[str, torch.Tensor]:
    """The tensors of a timm tower as open_clip's files name them, with a text tower beside it."""
    text = {"logit_scale": torch.ones(()), "transformer.resblocks.0.ln_1.weight": torch.ones(8)}
    return {**{f"visual.trunk.{key}": value for key, value in module.state_dict().items()}, **text}


def test_a_tower_of_open_clip_is_not_resampled_in_silence(tiny: Any, tmp_path: Path) -> None:
    torch.save(in_open_clip(tiny(img_size=64, num_classes=0)), tmp_path / "clip.pth")
    with pytest.raises(SourceError, match=r"clip\.pth was made for images of 64 x 64 px"):
        vitrim.load("timm:deit_tiny_patch16_224", checkpoint=tmp_path / "clip.pth")


def test_a_tower_of_open_clip_comes_in_exactly_and_what_stands_beside_it_is_named(
    tiny: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    module = tiny(num_classes=0)
    torch.save(in_open_clip(module), tmp_path / "clip.pth")
    with caplog.at_level(logging.INFO, "vitrim.sources"):
        model = vitrim.load("timm:deit_tiny_patch16_224", checkpoint=tmp_path / "clip.pth")
    assert "logit_scale, transformer.resblocks.0.ln_1.weight" in caplog.text
    assert model.provenance["left_out"] == ["logit_scale", "transformer"]
    assert_same(module, model)


def test_the_projection_of_open_clip_is_kept_and_other_parts_of_its_head_are_refused(tiny: Any, tmp_path: Path) -> None:
    module = tiny(num_classes=0)
    head = torch.randn(7, 24)
    torch.save({**in_open_clip(module), "visual.head.proj.weight": head}, tmp_path / "clip.pth")
    model = vitrim.load("timm:deit_tiny_patch16_224", checkpoint=tmp_path / "clip.pth")
    x = images(module)
    assert torch.allclose(model(x), module(x) @ head.T, atol=1e-5)
    torch.save({**in_open_clip(module), "visual.head.mlp.fc1.weight": head}, tmp_path / "mlp.pth")
    with pytest.raises(SourceError, match=r"no place for: visual\.head\.mlp\.fc1\.weight.*classes=0"):
        vitrim.load("timm:deit_tiny_patch16_224", checkpoint=tmp_path / "mlp.pth")
    without = vitrim.load("timm:deit_tiny_patch16_224", checkpoint=tmp_path / "mlp.pth", classes=0)
    assert_same(module, without)


def in_openai_clip(module: Any) -> dict[str, torch.Tensor]:
    """The tensors of a timm tower as OpenAI's CLIP names them."""
    names = {
        "patch_embed.proj": "conv1",
        "pos_embed": "positional_embedding",
        "blocks.": "transformer.resblocks.",
        "norm_pre": "ln_pre",
        "attn.qkv.": "attn.in_proj_",
        "attn.proj": "attn.out_proj",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
        "norm1": "ln_1",
        "norm2": "ln_2",
        "cls_token": "class_embedding",
    }
    state = {}
    for key, value in module.state_dict().items():
        name = key.replace("norm.", "ln_post.") if key.startswith("norm.") else key
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        if name == "head.weight":
            name, value = "proj", value.T
        if name != "head.bias":
            state[f"visual.{name}"] = value[0, 0] if key == "cls_token" else value[0] if key == "pos_embed" else value
    return state


def test_a_clip_file_of_another_patch_is_refused_with_the_name_that_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = timm.create_model
    module = real("vit_base_patch16_clip_224", depth=1, num_classes=5)
    with torch.no_grad():
        module.head.bias.zero_()  # CLIP's projection has none
    torch.save(in_openai_clip(module), tmp_path / "b16.pth")
    monkeypatch.setattr(timm, "create_model", lambda name, **options: real(name, **{"depth": 1, **options}))
    spec = architectures.spec("vit_base_patch16_clip_224")
    assert spec is not None
    known = {"vit_base_patch16_clip_224": replace(spec, blocks=spec.blocks[:1])}
    monkeypatch.setattr(architectures, "names", lambda _: list(known))
    monkeypatch.setattr(architectures, "spec", known.get)
    with pytest.raises(SourceError, match=r"patches of 16 x 16 px.*has 32 x 32 px.*timm:vit_base_patch16_clip_224\."):
        vitrim.load("timm:vit_base_patch32_clip_224", checkpoint=tmp_path / "b16.pth")
    model = vitrim.load("timm:vit_base_patch16_clip_224", checkpoint=tmp_path / "b16.pth")
    assert_same(module.eval(), model)


def test_registers_of_a_dinov2_file_take_the_class_tokens_position_with_them(tmp_path: Path) -> None:
    """timm adds a row of the table to the class token: that counts as used, and the mask token as not needed."""
    options = {"img_size": 28, "embed_dim": 24, "depth": 1, "num_heads": 3}
    real = timm.create_model
    module = randomised(real("vit_small_patch14_reg4_dinov2", **options))
    state = dict(module.state_dict())
    state["register_tokens"] = state.pop("reg_token")
    row = torch.randn(1, 1, 24)
    state["pos_embed"] = torch.cat([row, state["pos_embed"]], dim=1)
    state["cls_token"] = state["cls_token"] - row
    torch.save({**state, "mask_token": torch.zeros(1, 24)}, tmp_path / "dinov2.pth")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timm, "create_model", lambda name, **more: real(name, **{**options, **more}))
        model = vitrim.load("timm:vit_small_patch14_reg4_dinov2", checkpoint=tmp_path / "dinov2.pth")
    assert_same(module, model, 1e-6)


def test_a_fine_tuned_mae_is_loaded_as_what_it_is(tiny: Any, tmp_path: Path) -> None:
    """Its tokens are averaged, with fc_norm behind; the name says class token, with a norm in front."""
    module = tiny(global_pool="avg", num_classes=3)
    assert {"fc_norm.weight", "cls_token"} <= set(module.state_dict())
    assert "norm.weight" not in module.state_dict()
    torch.save({"model": module.state_dict()}, tmp_path / "mae.pth")
    model = vitrim.load("timm:deit_tiny_patch16_224", checkpoint=tmp_path / "mae.pth")
    assert (model.spec.pool.kind, model.spec.pool_norm, model.spec.prefix) == ("mean", True, ("cls",))
    assert_same(module, model)


def test_a_checkpoint_of_another_width_is_refused(tiny: Any, tmp_path: Path) -> None:
    state = tiny().state_dict()
    state["blocks.0.mlp.fc1.weight"] = torch.zeros(5, 24)
    torch.save(state, tmp_path / "odd.pth")
    with pytest.raises(
        SourceError, match=r"of another shape: blocks\.0\.mlp\.fc1\.weight \(5, 24\) \(expected \(96, 24\)\)"
    ):
        vitrim.load("timm:deit_tiny_patch16_224", checkpoint=tmp_path / "odd.pth")


@pytest.mark.parametrize("style", ["q k v", "q_proj k_proj v_proj", "to_q to_k to_v", "query key value"])
def test_split_queries_keys_and_values_are_joined(tiny: Any, tmp_path: Path, style: str) -> None:
    module, split = tiny(num_classes=3), {}
    for key, value in module.state_dict().items():
        if ".qkv." in key:
            split.update({key.replace("qkv", part): v for part, v in zip(style.split(), value.chunk(3), strict=True)})
        else:
            split[key] = value
    save_file({key: value.contiguous() for key, value in split.items()}, tmp_path / "split.safetensors")
    assert_same(module, vitrim.load("timm:deit_tiny_patch16_224", checkpoint=tmp_path / "split.safetensors"))


@pytest.mark.parametrize("prefix", ["model.", "net.vit.", "module.backbone."])
def test_a_prefix_that_every_name_shares_is_left_out_and_said(
    tiny: Any, tmp_path: Path, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    module = tiny(num_classes=3)
    state = {f"{prefix}{key}": value for key, value in module.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 1, "hyper_parameters": {"lr": 0.1}}, tmp_path / "last.ckpt")
    with caplog.at_level(logging.INFO, "vitrim.sources"):
        model = vitrim.load("timm:deit_tiny_patch16_224", checkpoint=tmp_path / "last.ckpt")
    assert f"every name begins with {prefix.removeprefix('module.')!r}" in caplog.text
    assert "its classifier of 3 classes is kept" in caplog.text
    assert_same(module, model)
    torch.save({**state, "criterion.weight": torch.ones(3)}, tmp_path / "more.ckpt")
    with caplog.at_level(logging.INFO, "vitrim.sources"):
        assert_same(module, vitrim.load("timm:deit_tiny_patch16_224", checkpoint=tmp_path / "more.ckpt"))
    assert "not read: criterion.weight." in caplog.text


def test_a_training_checkpoint_of_timm_gives_its_averaged_weights(tiny: Any, tmp_path: Path) -> None:
    module, raw = tiny(num_classes=3), tiny(num_classes=3, init_values=None).state_dict()
    optimizer = torch.optim.AdamW(module.parameters())
    module.requires_grad_(True)
    module(images(module)).sum().backward()
    optimizer.step()
    torch.save(
        {
            "epoch": 3,
            "arch": "deit_tiny_patch16_224",
            "state_dict": raw,
            "state_dict_ema": module.state_dict(),
            "optimizer": optimizer.state_dict(),
            "version": 2,
            "args": argparse.Namespace(lr=0.1, mean=(0.5, 0.5, 0.5), model="deit_tiny_patch16_224"),
            "amp_scaler": {"scale": 65536.0, "growth_factor": 2.0},
            "metric": 71.2,
        },
        tmp_path / "model_best.pth.tar",
    )
    assert_same(module, vitrim.load("timm:deit_tiny_patch16_224", checkpoint=tmp_path / "model_best.pth.tar"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_come_in_as_float32(tiny: Any, tmp_path: Path, dtype: torch.dtype) -> None:
    module = tiny(num_classes=3).to(dtype)
    save_file(module.state_dict(), tmp_path / "half.safetensors")
    model = vitrim.load("timm:deit_tiny_patch16_224", checkpoint=tmp_path / "half.safetensors")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert_same(module.float(), model)


def test_extra_classifiers_are_refused_by_name_or_left_out_with_the_classifier(
    tiny: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    module = tiny()
    extra = {
        "head_dist.weight": torch.ones(1000, 24),
        "head_dist.bias": torch.ones(1000),
        "aux_head.fc.bias": torch.ones(2),
    }
    save_file({**module.state_dict(), **extra}, tmp_path / "extra.safetensors")
    with pytest.raises(
        SourceError, match=r"unexpected: aux_head\.fc\.bias, head_dist\.bias, head_dist\.weight.*classes=0"
    ):
        vitrim.load("timm:deit_tiny_patch16_224", checkpoint=tmp_path / "extra.safetensors")
    with caplog.at_level(logging.INFO, "vitrim.sources"):
        model = vitrim.load("timm:deit_tiny_patch16_224", checkpoint=tmp_path / "extra.safetensors", classes=0)
    assert "without its classifier: aux_head.fc.bias, head.bias, head.weight, head_dist.bias" in caplog.text
    module.reset_classifier(0)
    assert_same(module, model)


def test_a_layer_in_front_of_the_classifier_is_not_left_out_in_silence(tiny: Any, tmp_path: Path) -> None:
    module = tiny()
    torch.save({**module.state_dict(), "pre_logits.fc.weight": torch.ones(24, 24)}, tmp_path / "old.pth")
    with pytest.raises(SourceError, match=r"pre_logits.*classes=0"):
        vitrim.load("timm:deit_tiny_patch16_224", checkpoint=tmp_path / "old.pth")
    assert vitrim.load("timm:deit_tiny_patch16_224", checkpoint=tmp_path / "old.pth", classes=0).spec.outputs == ()


def test_a_quantised_file_is_refused(tiny: Any, tmp_path: Path) -> None:
    state = tiny().state_dict()
    state["blocks.0.attn.qkv.weight"] = torch.ones(72, 24, dtype=torch.int8)
    save_file(state, tmp_path / "q.safetensors")
    with pytest.raises(SourceError, match=r"blocks\.0\.attn\.qkv\.weight \(int8\).*quantised"):
        vitrim.load("timm:deit_tiny_patch16_224", checkpoint=tmp_path / "q.safetensors")


def test_a_checkpoint_of_another_size_is_exact_at_its_own_and_resized_once_when_asked(
    tiny: Any, tmp_path: Path
) -> None:
    module = tiny(img_size=64)
    torch.save(module.state_dict(), tmp_path / "large.pth")
    name: dict[str, Any] = {"name": "timm:deit_tiny_patch16_224", "checkpoint": tmp_path / "large.pth"}
    own = vitrim.load(**name, image_px=64)
    assert "positions_made_for_px" not in own.provenance
    assert_same(module, own)
    model = vitrim.load(**name, image_px=(32, 48))
    assert (model.spec.image_px, model.spec.position.grid) == ((32, 48), (2, 3))
    assert model.config.preprocess is not None
    assert model.config.preprocess.size_px == (32, 48)
    assert model.provenance["positions_made_for_px"] == [64, 64]
    x = torch.randn(2, 3, 32, 48)
    module.set_input_size(img_size=(32, 48))
    assert torch.allclose(model(x), module.float()(x), atol=1e-5)


def test_a_local_folder_of_another_size_than_its_config_says_is_refused_and_not_resampled(
    tiny: Any, tmp_path: Path
) -> None:
    from vitrim.sources import write

    write(vitrim.from_model(tiny()), "timm", tmp_path / "own")
    save_file(tiny(img_size=64).state_dict(), tmp_path / "own" / "model.safetensors")
    with pytest.raises(SourceError, match=r"made for images of 64 x 64 px.*--image-px 64 "):
        vitrim.load(f"timm:local-dir:{tmp_path / 'own'}")


def test_a_checkpoint_made_for_images_that_are_no_squares_is_taken_at_the_very_size(tiny: Any, tmp_path: Path) -> None:
    module = tiny(img_size=(64, 32))  # 4 by 2 patches
    torch.save(module.state_dict(), tmp_path / "oblong.pth")
    name: dict[str, Any] = {"name": "timm:deit_tiny_patch16_224", "checkpoint": tmp_path / "oblong.pth"}
    assert_same(module, vitrim.load(**name, image_px=(64, 32)))
    for asked in (None, (96, 32)):
        with pytest.raises(SourceError, match=r"pos_embed .*images that are no squares.*--image-px H,W"):
            vitrim.load(**name, image_px=asked)


def test_class_names_are_not_guessed_from_their_number(tmp_path: Path) -> None:
    small: dict[str, Any] = {"img_size": 32, "embed_dim": 24, "depth": 1, "num_heads": 3}
    module = randomised(timm.create_model("vit_tiny_patch16_224", num_classes=1000, **small))
    folder = vitrim.sources.write(vitrim.from_model(module), "timm", tmp_path / "out")
    assert vitrim.load(f"timm:local-dir:{folder}").config.labels is None


def test_a_file_of_another_model_is_refused_with_the_name_that_fits(tmp_path: Path) -> None:
    module = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=2)
    torch.save(module.state_dict(), tmp_path / "distilled.pth")
    with pytest.raises(SourceError, match=r"dist_token.* such as timm:deit_tiny_distilled_patch16_224\."):
        vitrim.load("timm:deit_tiny_patch16_224", checkpoint=tmp_path / "distilled.pth")
