"""The model card: what the Hub asks for, and no claim that nobody made."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.specs import vit
from vitrim.card import base_model, card
from vitrim.spec import Config, Selection, SelectionStep, spec_hash

SPEC = vit()
STEP = SelectionStep(method="comcat", variant="whitened", parent=spec_hash(SPEC))


def test_the_card_says_what_the_hub_asks_and_what_was_measured() -> None:
    metrics = {"before": {"top1": 0.722, "macs": 2_000_000}, "after": {"top1": 0.7, "latency_ms": 4.25}}
    provenance = {
        "source": "timm:deit_tiny_patch16_224.fb_in1k",
        "license": "Apache-2.0",
        "method": "comcat",
        "variant": "whitened",
        "metrics": metrics,
    }
    text = card(Config(spec=SPEC), Selection(steps=(STEP,)), provenance)
    front, body = text.split("---\n")[1:]
    assert front.splitlines() == [
        "library_name: vitrim",
        'base_model: "timm/deit_tiny_patch16_224.fb_in1k"',
        'license: "apache-2.0"',
        "pipeline_tag: image-classification",
        "tags:",
        '- "vitrim"',
        '- "vision-transformer"',
        '- "model-compression"',
        '- "comcat"',
    ]
    assert "| top1 | 72.20 % | 70.00 % |" in body
    assert "| latency_ms |  | 4.25 |" in body
    assert "`comcat` (variant `whitened`)" in body
    assert 'vitrim.load("' in body


def test_a_card_without_figures_has_no_table_and_claims_no_licence() -> None:
    text = card(Config(spec=SPEC), Selection(), {})
    assert "| before |" not in text
    assert "license: other\nlicense_name: that-of-the-base-model\n" in text
    assert "base_model" not in text.split("---\n")[1]


@pytest.mark.parametrize(
    ("provenance", "name"),
    [
        ({"source": "timm:deit", "base_model": "timm/deit.fb_in1k"}, "timm/deit.fb_in1k"),
        ({"source": "timm:deit", "weights": "pretrained"}, "timm/deit"),
        ({"source": "timm:deit", "weights": "random"}, None),
        ({"source": "hf-hub:ada/vit"}, "ada/vit"),
        ({"source": "hub:ada/vit"}, "ada/vit"),
        ({"source": "builtin:tiny"}, None),
        ({"source": "runs"}, None),
        ({}, None),
    ],
)
def test_the_base_model_is_the_published_one_or_none(provenance: dict[str, Any], name: str | None) -> None:
    assert base_model(provenance) == name


def test_an_encoder_is_filed_as_one() -> None:
    encoder = Config(spec=replace(SPEC, outputs=()), task="features")
    assert "pipeline_tag: image-feature-extraction" in card(encoder, Selection(), {})


def test_what_only_trained_is_not_said_to_have_cut() -> None:
    trained = card(Config(spec=SPEC), Selection(), {"method": "train"})
    assert "Trained by vitrim." in trained
    assert "Compressed by" not in trained
    again = card(Config(spec=SPEC), Selection(steps=(STEP,)), {"method": "recover", "variant": "distilled"})
    assert "Compressed by `comcat`, then recovered (variant `distilled`)." in again
