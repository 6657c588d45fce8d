"""The one Vision Transformer inside what a caller gives; the caller's module stays as it is."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import timm
import torch
from timm.utils import ModelEmaV2, ModelEmaV3
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel

import vitrim
from vitrim.errors import SourceError
from vitrim.model import Vit
from vitrim.sources import inside


def vit(**options: Any) -> Any:
    small = {"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}
    module = timm.create_model("deit_tiny_patch16_224", **{**small, **options})
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.1)
    return module.eval()


def gives(model: Vit, module: nn.Module) -> bool:
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        return torch.allclose(model(x), module(x), atol=1e-5)


@pytest.mark.parametrize(
    "wrap", [AveragedModel, ModelEmaV2, ModelEmaV3, nn.DataParallel, lambda m: AveragedModel(nn.DataParallel(m))]
)
def test_the_module_inside_wrappers_is_taken(wrap: Any) -> None:
    module = vit()
    assert gives(vitrim.from_model(wrap(module)), module)


class Around(nn.Module):
    """A backbone with a head of its own, and whatever else."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


def test_the_only_one_inside_is_taken_and_said(caplog: pytest.LogCaptureFixture) -> None:
    backbone = vit(num_classes=0)
    module = Around(dropout=nn.Dropout(), net=nn.Sequential(AveragedModel(backbone)), head=nn.Linear(24, 7))
    with caplog.at_level(logging.WARNING, "vitrim.sources"):
        model = vitrim.from_model(module)
    assert gives(model, backbone)
    assert "Around: the VisionTransformer at 'net.0' in it is taken, without head (Linear)." in caplog.text


def test_several_inside_are_asked_for_by_their_places() -> None:
    with pytest.raises(SourceError, match=r"Around holds 2 Vision Transformers \(student, net\.teacher\).*its student"):
        vitrim.from_model(Around(student=vit(), net=Around(teacher=vit())))
    shared = vit()
    assert gives(vitrim.from_model(Around(one=shared, other=shared)), shared)


def test_wrappers_inside_are_left_out_and_the_callers_module_keeps_them() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    module = vit()
    plain = vitrim.from_model(module)
    module.blocks[1] = checkpoint_wrapper(module.blocks[1])
    module.blocks[0].mlp = nn.DataParallel(module.blocks[0].mlp)
    before = {name: type(part) for name, part in module.named_modules()}
    model = vitrim.from_model(module)
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in model.state_dict().items())
    assert {name: type(part) for name, part in module.named_modules()} == before
    bare = inside.without_wrappers(module)
    assert {id(one) for one in bare.parameters()} == {
        id(one) for one in module.parameters()
    }  # no second copy in memory


def test_a_module_without_one_is_refused_as_before() -> None:
    with pytest.raises(SourceError, match=r"design \(Linear of linear\), which vitrim cannot take in"):
        vitrim.from_model(nn.Linear(2, 2))


def test_a_sharded_module_is_refused_with_the_way_out() -> None:
    class FullyShardedDataParallel(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    with pytest.raises(SourceError, match=r"spread over processes.*full state dict"):
        vitrim.from_model(Around(net=FullyShardedDataParallel()))


def test_pruned_parts_are_refused_with_what_makes_them_plain() -> None:
    module = vit()
    prune.l1_unstructured(module.blocks[0].mlp.fc1, "weight", amount=0.5)
    with pytest.raises(SourceError, match=r"fc1\.weight_mask, .*fc1\.weight_orig \(.*prune\.remove"):
        vitrim.from_model(module)
    prune.remove(module.blocks[0].mlp.fc1, "weight")
    assert gives(vitrim.from_model(module), module)


def test_a_model_of_transformers_with_more_around_it_is_found() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=24, num_hidden_layers=1, num_attention_heads=3, intermediate_size=8, image_size=32, patch_size=16
    )
    encoder = transformers.ViTModel(config, add_pooling_layer=False).eval()
    language = transformers.pytorch_utils.Conv1D(4, 4)  # of transformers, and no Vision Transformer
    model = vitrim.from_model(Around(text=language, vision=encoder))
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(model(x), encoder(x).last_hidden_state[:, 0], atol=1e-5)


def test_a_classifier_in_a_list_with_dropout_is_the_classifier() -> None:
    module = vit()
    module.head = nn.Sequential(nn.Dropout(0.5), nn.Linear(24, 7)).eval()
    assert gives(vitrim.from_model(module), module)
    assert type(module.head) is nn.Sequential
    module.head = nn.Sequential(nn.LayerNorm(24), nn.Linear(24, 7))
    with pytest.raises(SourceError, match="more than one linear"):
        vitrim.from_model(module)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: "vit_tiny", r"not a str\. .*vitrim\.load"),
        (lambda: None, "not a NoneType"),
        (lambda: vit().state_dict(), "not a OrderedDict"),
        (lambda: type(vit()), "not VisionTransformer"),
        (lambda: vit().to("meta"), "has no numbers: it is on the device 'meta'"),
        (lambda: vitrim.from_model(vit()), "vitrim's own already"),
    ],
)
def test_what_is_no_module_with_numbers_is_refused_by_what_it_is(make: Any, said: str) -> None:
    with pytest.raises(SourceError, match=said):
        vitrim.from_model(make())
