"""Folders, names on the Hub and local checkpoints of transformers."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import vitrim
from vitrim.errors import SourceError
from vitrim.spec import Preprocess

pytest.importorskip("transformers")


from tests.sources.huggingface.kit import VARIANTS, assert_same, randomised, saved, small
from vitrim.sources import huggingface as source
from vitrim.sources.huggingface.load import fetching

# ------------------------------------------------------------------------------------------------- folders, names, files


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


def test_what_a_classifier_answers_is_read_saved_and_given_back(tmp_path: Path) -> None:
    model = vitrim.load(f"hf:{saved(small('vit', problem_type='multi_label_classification'), tmp_path / 'm')}")
    assert model.config.multi_label
    assert vitrim.load(vitrim.save(model, tmp_path / "ours")).config.multi_label
    assert vitrim.load(f"hf:{source.write(model, tmp_path / 'back')}").config.multi_label
    for name, said in {"none": None, "one": "single_label_classification"}.items():
        one = vitrim.load(f"hf:{saved(small('vit', problem_type=said), tmp_path / name)}")
        assert not one.config.multi_label
    values = f"hf:{saved(small('vit', problem_type='regression'), tmp_path / 'values')}"
    with pytest.raises(SourceError, match="a head of problem_type 'regression'"):
        vitrim.load(values)
    assert vitrim.load(values, classes=0).config.task == "features"


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


@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])
def test_wrappers_in_the_names_of_a_folder_go(tmp_path: Path, kind: str) -> None:
    from safetensors.torch import load_file, save_file

    module = small("vit")
    folder = saved(module, tmp_path / "m")
    state = load_file(folder / "model.safetensors")
    inner = {key.replace("layer.1.", "layer.1._checkpoint_wrapped_module."): value for key, value in state.items()}
    (folder / "model.safetensors").unlink()
    whole = {f"_orig_mod.{key}": value for key, value in inner.items()}
    if kind.endswith(".bin"):
        torch.save(whole, folder / kind)
    else:
        save_file(whole, folder / kind, metadata={"format": "pt"})
    assert_same(module, vitrim.load(f"hf:{folder}"))


@pytest.mark.parametrize("prefix", ["model.", "model.vit."])
def test_a_prefix_before_an_encoders_names_goes(tmp_path: Path, prefix: str) -> None:
    folder, module = saved(small("vit"), tmp_path / "m"), small("vit")
    state = {f"{prefix}{key}": value for key, value in module.vit.state_dict().items()}
    torch.save({"state_dict": {**state, "criterion.weight": torch.ones(2)}}, tmp_path / "encoder.ckpt")
    model = vitrim.load(f"hf:{folder}", checkpoint=tmp_path / "encoder.ckpt")
    assert_same(module.vit, model)


def test_a_folder_of_adapters_is_refused_with_the_way_to_merge_them(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(SourceError, match=r"adapters of PEFT.*merge_and_unload"):
        vitrim.load(f"hf:{tmp_path}")


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
    with pytest.raises(SourceError, match=words), fetching("someone/thing", "weights"):
        raise OSError("first line\nsecond") from reason("no")


def test_the_settings_of_transformers_are_put_back(tmp_path: Path) -> None:
    from transformers.utils import logging as theirs

    level, bars = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    vitrim.load(f"hf:{saved(small('vit'), tmp_path / 'm')}")
    assert (theirs.get_verbosity(), theirs.is_progress_bar_enabled()) == (level, bars)


@pytest.mark.parametrize("name", ["vit", "clip_classifier", "dinov2"])
def test_a_checkpoint_of_another_size_asks_for_a_size_and_is_then_exact_at_its_own(name: str, tmp_path: Path) -> None:
    other = (
        {"vision_config": {**VARIANTS[name][1]["vision_config"], "image_size": 40}}
        if "clip" in name
        else {"image_size": 40}
    )
    module, folder = small(name, **other), saved(small(name), tmp_path / "m")
    torch.save(module.state_dict(), tmp_path / "large.pth")
    with pytest.raises(SourceError, match=r"made for images of 40 x 40 px.*for 24 x 24 px.*--image-px 40 "):
        vitrim.load(f"hf:{folder}", checkpoint=tmp_path / "large.pth")
    model = vitrim.load(f"hf:{folder}", checkpoint=tmp_path / "large.pth", image_px=40)
    assert model.spec.position.grid == (5, 5)
    assert_same(module, model, 1e-6)


def test_a_folder_is_resized_from_its_table_once_with_the_settings_of_its_processor(tmp_path: Path) -> None:
    module = small("dinov2", image_size=40)
    model = vitrim.load(f"hf:{saved(module, tmp_path / 'm', resample=3)}", image_px=16)
    assert model.spec.position.grid == model.spec.grid == (2, 2)
    assert model.config.preprocess is not None
    assert model.config.preprocess.size_px == (16, 16)
    x = torch.randn(2, 3, 16, 16)
    assert torch.allclose(model(x), module(x).logits, atol=1e-5)


def test_what_a_larger_model_brings_beside_its_known_parts_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = saved(small("clip_both"), tmp_path / "clip")
    state = load_file(folder / "model.safetensors")
    extra = {**state, "vision_model.adapter.weight": torch.ones(2)}
    save_file(extra, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SourceError, match=r"unexpected: (vision_model\.)?adapter\.weight"):
        vitrim.load(f"hf:{folder}")
