"""Our models back in T2T-ViT: a state dict that its authors' class loads strictly."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.sources.t2t.kit import read
from tests.specs import close, images, make, vit
from tests.t2t_reference import tiny
from vitrim import sources
from vitrim.errors import SourceError
from vitrim.sources import t2t
from vitrim.spec import Merge, T2TPerformer
from vitrim.surgery import Keep, cut, drop, exact_tail

# ----------------------------------------------------------------------------------------------------------------- back


@pytest.mark.parametrize("suffix", [".pth.tar", ".safetensors"])
@pytest.mark.parametrize("kind", ["performer", "transformer"])
def test_a_compressed_network_goes_back_to_its_authors_class(kind: str, suffix: str, tmp_path: Path) -> None:
    """Fewer blocks, a uniform MLP and an exact tail."""
    model = read(tiny(kind).float().double())
    halves = [Keep(hidden=tuple(range(0, 48, 2)))] * 3
    smaller = exact_tail(drop(cut(model, halves, method="test"), attention=[1], mlp=[1], method="test"))
    file = t2t.write(smaller, tmp_path / f"small{suffix}")
    state = load_file(file) if suffix == ".safetensors" else torch.load(file, weights_only=True)
    module = tiny(kind, depth=2, mlp_ratio=1.0)
    module.load_state_dict(state, strict=True)
    x = images(model.spec, 3)
    assert close(module(x), smaller(x))
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_reading_and_writing_gives_the_same_file_back(tmp_path: Path) -> None:
    for fields in ({}, {"tokens_type": "transformer"}, {"qkv_bias": True}, {"num_classes": 0}):
        module = tiny(**fields).float()
        state = t2t.to_state(t2t.from_module(module))
        assert sorted(state) == sorted(module.state_dict())
        assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    out = sources.write(t2t.from_module(module), "t2t", tmp_path / "back.pth.tar")
    assert len(torch.load(out, weights_only=True)) == len(state)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (
            "heads",
            r"block 1 has 2 heads of 8, and T2T-ViT wants heads times head width equal to the width 24",
        ),
        ("half", "block 2 has no attention, and T2T-ViT's blocks have both halves"),
        ("hidden", r"block 1 differs from block 0 \(MLP units 7, there 48\)"),
        ("steps", "block 0 merges tokens"),
        ("splits", r"its soft splits have kernels \(7, 3, 3\) and strides \(2, 2, 1\)"),
        ("stem", "its stem is one convolution"),
        ("scale", r"block 0 scales its scores by 0\.3"),
        ("eps", r"its norms have eps 1e-06"),
    ],
)
def test_what_t2t_cannot_say_is_refused_with_the_block_in_the_way(what: str, message: str, tmp_path: Path) -> None:
    model = t2t.from_module(tiny().float())
    spec = model.spec
    if what in ("heads", "half", "hidden"):
        one = {"heads": Keep(heads=(0, 2)), "half": Keep(attention=False), "hidden": Keep(hidden=tuple(range(7)))}[what]
        keeps = [None, None, one] if what == "half" else [None, one, None]
        model = cut(model, keeps, method="test")
    elif what == "steps":
        merge = Merge(axis="h", keep=1)
        model = make(replace(spec, blocks=(replace(spec.blocks[0], steps=(merge,)), *spec.blocks[1:])))
    elif what == "splits":
        stem = T2TPerformer(token_dim=8, features=4, strides=(2, 2, 1))
        side = spec.grid[0] * 4
        model = make(replace(spec, stem=stem, patch_px=(4, 4), image_px=(side, side)))
    elif what == "stem":
        model = make(vit())
    elif what == "scale":
        attention = replace(spec.blocks[0].attention, scale=0.3)
        model = make(replace(spec, blocks=(replace(spec.blocks[0], attention=attention), *spec.blocks[1:])))
    else:
        model = make(replace(spec, norm_eps=1e-6))
    with pytest.raises(SourceError, match=message):
        t2t.write(model, tmp_path / "no.pth.tar")
    assert not list(tmp_path.iterdir())
