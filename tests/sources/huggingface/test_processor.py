"""Settings of image processors: taken for ours where they say the same, and the images that both make."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from vitrim.sources import huggingface as source
from vitrim.sources.huggingface.processor import share_of

PROCESSORS: dict[str, tuple[dict[str, Any], dict[str, Any] | str]] = {
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
        {"mean": (0.0,) * 3, "std": (1.0,) * 3, "crop_mode": "squash"},
    ),
    "pixels up to 255": (
        {"size": 24, "do_rescale": False, "do_normalize": False},
        {"mean": (0.0,) * 3, "std": (1 / 255,) * 3},
    ),
    "no resize": ({"size": 24, "do_resize": False}, "do_resize"),
    "shorter edge, uncropped": ({"size": {"shortest_edge": 24}}, "without do_center_crop"),
    "longest edge": ({"size": {"shortest_edge": 24, "longest_edge": 48}}, "longest_edge"),
    "crop beyond the image": ({"size": {"shortest_edge": 20}, "do_center_crop": True, "crop_size": 24}, "crop_size"),
    "oblong crop": (
        {"size": {"shortest_edge": 28}, "do_center_crop": True, "crop_size": {"height": 24, "width": 20}},
        "crop_size",
    ),
    "border": ({"size": 24, "do_pad": True, "pad_size": {"height": 32, "width": 32}}, "pad_size"),
    "four channels": ({"size": 24, "image_mean": [0.5] * 4, "image_std": [0.5] * 4}, "image_mean"),
    "two filters": ({"size": 24, "rescale_offset": True}, "rescale_offset"),
    "factor": ({"size": 24, "rescale_factor": -1.0}, "rescale_factor"),
    "words": ({"size": {"height": "many", "width": 24}}, "not valid"),
    "no number": ({"size": 24, "image_mean": [math.nan] * 3}, "not valid"),
    "sides below none": ({"size": {"height": -1, "width": 24}}, "not valid"),
}


@pytest.mark.parametrize("case", PROCESSORS)
def test_an_image_processors_settings_become_ours_or_the_key_is_named(
    case: str, caplog: pytest.LogCaptureFixture
) -> None:
    said, expected = PROCESSORS[case]
    with caplog.at_level(logging.WARNING, "vitrim.sources"):
        found = source.preprocess_of({"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2] * 3, **said})
    if isinstance(expected, str):
        assert found is None
        assert expected in caplog.text
    else:
        assert found is not None
        assert {key: getattr(found, key) for key in expected} == expected
        if "mean" not in expected:
            assert found.mean == (0.4, 0.5, 0.6)


def test_the_crop_gives_the_size_that_was_resized_to() -> None:
    for size in range(1, 400):
        for outer in range(size, 400, 7):
            assert math.floor(size / share_of(size, outer)) == outer


def test_an_image_processor_of_another_size_than_the_models_is_not_taken(caplog: pytest.LogCaptureFixture) -> None:
    said = {"size": {"height": 48, "width": 48}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    with caplog.at_level(logging.WARNING, "vitrim.sources"):
        assert source.preprocess_of(said, (24, 24)) is None
    assert "48 x 48 px, the model takes 24 x 24" in caplog.text


SAID: dict[str, dict[str, Any]] = {
    "ViT": {"image_processor_type": "ViTImageProcessor", "size": {"height": 24, "width": 24}},
    "an old file": {"feature_extractor_type": "ViTFeatureExtractor", "size": 24, "image_mean": [0.5] * 3},
    "the class's own figures": {"image_processor_type": "SiglipImageProcessor"},
    "CLIP": {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 28}, "crop_size": 24},
    "CLIP, exact": {"image_processor_type": "CLIPImageProcessor", "size": 24, "crop_size": 24, "processor_class": "X"},
    "DINOv2": {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 27}, "crop_size": 24},
    "DeiT": {"image_processor_type": "DeiTImageProcessor", "size": {"height": 29, "width": 29}, "crop_size": 24},
    "another factor": {"image_processor_type": "ViTImageProcessor", "size": 24, "rescale_factor": 1 / 127.5},
    "no factor": {"image_processor_type": "ViTImageProcessor", "size": 24, "do_rescale": False, "image_mean": [90] * 3},
    "no normalisation": {"image_processor_type": "ViTImageProcessor", "size": 24, "do_normalize": False},
    "a border that is none": {"image_processor_type": "ViTImageProcessor", "size": 24, "do_pad": True},
    "ConvNeXt": {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 24}, "crop_pct": 0.9},
    "ConvNeXt, large": {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 384}},
    "a key that it never reads": {"image_processor_type": "ViTImageProcessor", "size": 24, "crop_pct": 0.5},
    "PVT": {"image_processor_type": "PvtImageProcessorFast", "size": 24},
}
OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "CLIP without its crop": (
        {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 24}, "do_center_crop": False},
        "without do_center_crop",
    ),
    "LeViT": (
        {"image_processor_type": "LevitImageProcessor", "size": {"shortest_edge": 48}, "crop_size": 48},
        "grey levels from what its keys say",
    ),
    "EfficientNet": ({"image_processor_type": "EfficientNetImageProcessor", "size": 24}, "include_top"),
    "SigLIP 2": ({"image_processor_type": "Siglip2ImageProcessor"}, "size"),
    "no filter": ({"image_processor_type": "CLIPImageProcessor", "resample": None}, "resample"),
    "a filter that it has not": ({"image_processor_type": "ViTImageProcessor", "size": 24, "resample": 4}, "fails"),
}


def processor(said: dict[str, Any], folder: Path) -> Any:
    from transformers import AutoImageProcessor

    (folder / "preprocessor_config.json").write_text(json.dumps(said))
    return AutoImageProcessor.from_pretrained(folder)


@pytest.mark.parametrize("case", SAID)
@pytest.mark.parametrize("backend", ["torchvision", "pil"])
def test_an_image_is_prepared_as_the_image_processor_prepares_it(case: str, backend: str, tmp_path: Path) -> None:
    from PIL import Image
    from transformers import AutoImageProcessor

    from vitrim.data.transforms import evaluation

    preprocess = source.processor_preprocess(processor(SAID[case], tmp_path))
    assert preprocess is not None
    theirs_of = AutoImageProcessor.from_pretrained(tmp_path, backend=backend)
    draws = torch.Generator().manual_seed(3)
    for height, width in ((45, 63), (62, 37), (50, 50)):
        noise = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=draws)
        image = Image.fromarray(noise.numpy())
        theirs = torch.as_tensor(theirs_of(image, return_tensors="pt")["pixel_values"][0])
        ours = evaluation(preprocess)(image)
        assert ours.shape == theirs.shape
        levels = (ours - theirs).abs() * 255 * torch.tensor(preprocess.std).view(-1, 1, 1)
        if backend == "pil":
            assert float(levels.max()) < 1e-3
        else:  # torchvision clips between the two passes of a resizing in another order, which noise shows most
            assert float(levels.mean()) < 0.5
            assert float(levels.max()) < 16


@pytest.mark.parametrize("case", OTHERS)
def test_a_processor_that_ours_cannot_equal_is_not_taken_and_says_why(
    case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    said, words = OTHERS[case]
    with caplog.at_level(logging.WARNING, "vitrim.sources"):
        assert source.processor_preprocess(processor(said, tmp_path)) is None
    assert words in caplog.text
    assert "--mean, --std and --size" in caplog.text
