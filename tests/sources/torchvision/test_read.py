"""torchvision's Vision Transformers: the same numbers in, and a refusal by name of what the spec cannot say."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models import VisionTransformer
from torchvision.models.vision_transformer import ConvStemConfig, EncoderBlock

import vitrim
from tests.sources.torchvision.kit import (
    SMALL,
    VARIANTS,
    assert_same,
    narrow,
    randomised,
    small,
)
from vitrim import counting
from vitrim.errors import SourceError
from vitrim.sources import torchvision as source


@pytest.mark.parametrize("case", VARIANTS)
def test_a_loaded_model_gives_torchvisions_logits_and_features(case: str) -> None:
    module = VARIANTS[case]()
    model = vitrim.from_model(module)
    assert counting.params(model.spec) == sum(parameter.numel() for parameter in module.parameters())
    assert_same(module, model)


@pytest.mark.parametrize("name", ["vit_b_16", "vit_b_32", "vit_h_14"])
def test_named_architectures_are_exact_in_few_dims(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    narrow(monkeypatch)
    module = randomised(torchvision.models.get_model(name, image_size=28 if name == "vit_h_14" else 64))
    assert_same(module, vitrim.from_model(module))


def test_from_model_leaves_module_and_random_state_as_they_were() -> None:
    module = small(dropout=0.3)
    module.train()
    module.encoder.layers[0].eval()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    flags, random = [part.training for part in module.modules()], torch.get_rng_state()
    model = vitrim.from_model(module)
    assert [part.training for part in module.modules()] == flags
    assert torch.equal(torch.get_rng_state(), random)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert not model.training


def test_half_precision_modules_come_in_as_float32_and_stay_half() -> None:
    module = small().half()
    model = vitrim.from_model(module)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float16}
    assert_same(module.float(), model)


# ------------------------------------------------------------------------------------------------------------- refusals


class Same(VisionTransformer):
    """A subclass that computes what torchvision computes."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Doubling(EncoderBlock):
    """A block that looks the same and computes something else."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Mean(VisionTransformer):
    """A subclass that pools otherwise."""

    def forward(self, x: Tensor) -> Tensor:
        x = self._process_input(x)
        x = self.encoder(torch.cat([self.class_token.expand(len(x), -1, -1), x], dim=1))
        return self.heads(x.mean(1))


def test_a_subclass_of_the_same_structure_loads() -> None:
    module = randomised(Same(**SMALL))
    assert_same(module, vitrim.from_model(module))


def test_a_changed_forward_is_refused_with_the_first_block_that_differs() -> None:
    module = small()
    module.encoder.layers[1].__class__ = Doubling
    with pytest.raises(SourceError, match="torchvision's VisionTransformer: outputs differ, first in block 1"):
        vitrim.from_model(module)
    assert vitrim.from_model(module, verify=False).spec.width == 24
    with pytest.raises(SourceError, match="what follows the blocks"):
        vitrim.from_model(randomised(Mean(**SMALL)))


def test_what_the_spec_cannot_say_is_refused_by_its_name() -> None:
    def odd(**changes: Any) -> Any:
        module = small()
        for path, part in changes.items():
            module.set_submodule(path.replace("__", "."), part)
        return module

    layer = "encoder__layers__encoder_layer_1"
    attention = partial(nn.MultiheadAttention, 24, 3, batch_first=True)
    norms = partial(nn.LayerNorm, 24)
    for module, words in (
        (small(representation_size=9), "representation_size, pre_logits"),
        (small(conv_stem_configs=[ConvStemConfig(8, 3, 2)], patch_size=2), "conv_stem_configs"),
        (odd(**{f"{layer}__self_attention": attention(add_bias_kv=True)}), "add_bias_kv.* in block 1"),
        (odd(**{f"{layer}__self_attention": attention(add_zero_attn=True)}), "add_zero_attn.* in block 1"),
        (odd(**{f"{layer}__self_attention": attention(kdim=8)}), "different widths in block 1"),
        (odd(**{f"{layer}__self_attention": nn.MultiheadAttention(24, 3)}), "batch_first=False"),
        (odd(**{f"{layer}__ln_2": nn.Identity()}), "no ln_2 .block 1"),
        (odd(**{f"{layer}__ln_2": nn.RMSNorm(24)}), r"\(RMSNorm\) in place of a layer norm at block 1, ln_2"),
        (odd(**{f"{layer}__ln_2": norms(eps=1e-3)}), "different eps"),
        (odd(**{f"{layer}__mlp": nn.Linear(24, 24)}), "an MLP of another design .block 1"),
        (odd(**{f"{layer}__mlp__1": nn.Tanh()}), "the activation Tanh .block 1"),
        (odd(**{layer: nn.Identity()}), "blocks of another design .block 1: Identity"),
        (odd(heads=nn.Sequential(nn.Linear(24, 8), nn.Tanh(), nn.Linear(8, 5))), "more than one linear"),
        (odd(conv_proj=nn.Conv2d(3, 24, 16, 8, padding=4)), "overlap or leave gaps"),
    ):
        with pytest.raises(SourceError, match=words):
            vitrim.from_model(module)
    module = small()
    module.encoder.prompt = nn.Parameter(torch.zeros(2, 24))
    with pytest.raises(SourceError, match=r"does not have: encoder\.prompt"):
        vitrim.from_model(module)
    with torch.device("meta"):
        resnet = torchvision.models.resnet18()
    with pytest.raises(SourceError, match=r"another design \(ResNet"):
        source.from_module(resnet)
