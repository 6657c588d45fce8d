"""What the edits of `vitrim.surgery` change beside the numbers; the laws hold them to the same outputs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.specs import close, images, make, vit
from vitrim.errors import SpecError
from vitrim.model import Vit
from vitrim.spec import Config, Position, Preprocess, T2TTransformer
from vitrim.surgery import resized, without_dead


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


def test_no_forward_pass_of_a_network_with_its_own_positions_resizes_any(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ONNX exporter has no operator for the bicubic resizing with antialiasing."""
    model = make(vit(position=Position(grid=(5, 5))))
    folded = resized(model, (16, 16))
    asked: list[Any] = []
    monkeypatch.setattr(
        torch.nn.functional, "interpolate", lambda *args, **_: asked.append(args) or torch.zeros(1, 16, 4, 4)
    )
    x = torch.zeros(1, 3, 16, 16, dtype=torch.float64)
    folded(x)
    assert not asked
    model(x)
    assert len(asked) == 1


def test_units_that_change_nothing_are_left_out_exactly() -> None:
    """Two MLP units, a value dim of each head, a query/key dim of each by another side; then a whole head."""
    spec = vit(hidden=24, heads=2, head_dim=8)
    model, x = make(spec), images(spec)
    first, second = model.blocks
    with torch.no_grad():
        first.mlp.fc2.weight[:, [3, 5]] = 0
        first.attention.out.weight[:, [1, 8 + 4, 8 + 5]] = 0
        for row in (2, 16 + 8 + 6):  # a query of head 0, a key of head 1
            first.attention.qkv[row] = 0
        first.attention.q_bias[2] = first.attention.k_bias[8 + 6] = 0
        second.attention.qkv[2] = 0  # its bias stays, and head 1 has no such dim
        second.attention.out.weight[:, 8:] = 0
    small = without_dead(model)
    a, m = small.spec.blocks[0].attention, small.spec.blocks[0].mlp
    assert a is not None
    assert m is not None
    assert (a.heads, a.qk_dim, a.v_dim, m.hidden) == (2, 7, 7, 22)
    a = small.spec.blocks[1].attention
    assert a is not None
    assert (a.heads, a.qk_dim, a.v_dim) == (1, 8, 8)
    assert small.spec.blocks[1].mlp == spec.blocks[1].mlp
    assert close(small(x), model(x))
    assert without_dead(small) is small
    assert without_dead(model, skip=[(0, "attention"), (0, "mlp"), (1, "attention")]) is model


def test_a_part_that_changes_nothing_keeps_a_unit() -> None:
    model = make(vit())
    for block in model.blocks:
        torch.nn.init.zeros_(block.mlp.fc2.weight)
        torch.nn.init.zeros_(block.attention.out.weight)
    small, x = without_dead(model), images(vit())
    assert close(small(x), model(x))
    assert all(
        (b.attention.heads, b.attention.v_dim, b.mlp.hidden) == (1, 1, 1)
        for b in small.spec.blocks
        if b.attention and b.mlp
    )
