"""transformers' modules made small and random, and what must hold between them and ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vitrim.model import Vit

pytest.importorskip("transformers")

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

from tests.sources.kit import same
from vitrim.sources import huggingface as source
from vitrim.sources.huggingface.read import encoder_of, parts_of
from vitrim.sources.huggingface.write import quiet

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
