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
            assert math.floor(size / share_of(size, outer)) == outer


def test_an_image_processor_of_another_size_than_the_models_is_not_taken(caplog: pytest.LogCaptureFixture) -> None:
    said = {"size": {"height": 48, "width": 48}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    with caplog.at_level(logging.WARNING, "vitrim.sources"):
        assert source.preprocess_of(said, (24, 24)) is None
    assert "48 x 48 px, the model takes 24 x 24" in caplog.text


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
