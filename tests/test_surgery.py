"""What the edits of `vitrim.surgery` change beside the numbers; the laws hold them to the same outputs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.specs import make, vit
from vitrim.errors import SpecError
from vitrim.model import Vit
from vitrim.spec import Config, Position, Preprocess, T2TTransformer
from vitrim.surgery import resized


def test_a_resized_network_is_given_images_of_its_size_and_says_where_it_comes_from() -> None:
    preprocess = Preprocess(mean=(0.5,) * 3, std=(0.5,) * 3, size_px=(16, 16), crop=0.9)
    model = Vit(Config(spec=vit(), preprocess=preprocess))
    assert model.position is not None
    torch.nn.init.ones_(model.position)
    sized = resized(model, (8, 24))
    assert sized.config.preprocess == replace(preprocess, size_px=(8, 24))
    assert sized.provenance["positions_made_for_px"] == [16, 16]
    assert sized.spec.position.grid == (2, 6)
    assert (model.spec, model.provenance) == (vit(), {})


def test_at_its_own_size_only_positions_of_another_grid_are_folded() -> None:
    model = make(vit(position=Position(grid=(5, 5))))
    folded = resized(model, model.spec.image_px)
    assert folded.spec == vit()
    assert folded.provenance["positions_made_for_px"] == [20, 20]
    assert resized(folded, (16, 16)).provenance == folded.provenance
    assert torch.equal(folded.position, model.positions((4, 4)))


def test_a_size_that_the_stem_cannot_take_is_refused_with_the_nearest() -> None:
    stem = T2TTransformer(token_dim=4, kernels=(3, 3, 1), strides=(2, 2, 1))
    with pytest.raises(SpecError, match=r"no multiple of patch_px=\(4, 4\).*nearest is \(16, 20\)"):
        resized(make(vit(stem=stem)), (17, 19))
    with pytest.raises(SpecError, match="smaller than a patch"):
        resized(make(vit()), (3, 16))


class Operators(TorchDispatchMode):
    """Names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_no_forward_pass_of_a_network_with_its_own_positions_resizes_any() -> None:
    """The ONNX exporter has no operator for the bicubic resizing with antialiasing."""
    model = make(vit(position=Position(grid=(5, 5))))
    for network, there in ((model, True), (resized(model, (16, 16)), False)):
        with torch.no_grad(), Operators() as seen:
            network(torch.zeros(1, 3, 16, 16, dtype=torch.float64))
        assert any("upsample_bicubic2d" in name for name in seen.names) is there
