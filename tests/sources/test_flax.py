"""Vision Transformers of JAX: timm's own loader of their files gives the same network."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy
import pytest
import timm
import torch

import vitrim
from vitrim.errors import SourceError
from vitrim.sources import files

D, H, V, M, DEPTH, CLASSES = 12, 3, 4, 20, 2, 5
TIMM = {"img_size": 32, "embed_dim": D, "depth": DEPTH, "num_heads": H, "mlp_ratio": M / D, "num_classes": CLASSES}


def arrays(prefix: str = "", *, big: bool = False, stacked: bool = False) -> dict[str, Any]:
    """A small network as JAX has it, with random numbers. big: the names of big_vision; stacked: its blocks along one axis."""
    draw = numpy.random.default_rng(0)

    def of(*shape: int) -> Any:
        return draw.normal(size=shape).astype(numpy.float32)

    a, m, n = (0, 0, 1) if big else (1, 3, 2)
    attention = f"MultiHeadDotProductAttention_{a}"
    block = {
        **{f"LayerNorm_{i}/{leaf}": (D,) for i in (0, n) for leaf in ("scale", "bias")},
        **{f"{attention}/{part}/kernel": (D, H, V) for part in ("query", "key", "value")},
        **{f"{attention}/{part}/bias": (H, V) for part in ("query", "key", "value")},
        f"{attention}/out/kernel": (H, V, D),
        f"{attention}/out/bias": (D,),
        f"MlpBlock_{m}/Dense_0/kernel": (D, M),
        f"MlpBlock_{m}/Dense_0/bias": (M,),
        f"MlpBlock_{m}/Dense_1/kernel": (M, D),
        f"MlpBlock_{m}/Dense_1/bias": (D,),
    }
    found = {
        "cls": of(1, 1, D),
        "pos_embedding" if big else "Transformer/posembed_input/pos_embedding": of(1, 5, D),
        "embedding/kernel": of(16, 16, 3, D),
        "embedding/bias": of(D),
        "Transformer/encoder_norm/scale": of(D),
        "Transformer/encoder_norm/bias": of(D),
        "head/kernel": of(D, CLASSES),
        "head/bias": of(CLASSES),
    }
    for name, shape in block.items():
        if stacked:
            found[f"Transformer/encoderblock/{name}"] = of(DEPTH, *shape)
        else:
            found.update({f"Transformer/encoderblock_{i}/{name}": of(*shape) for i in range(DEPTH)})
    return {f"{prefix}{name}": value for name, value in found.items()}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A name of timm's made small."""
    real = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **options: real(name, **{**TIMM, **options}))
    return lambda: timm.create_model("vit_tiny_patch16_224").eval()


@pytest.mark.parametrize(
    ("prefix", "options"),
    [("", {}), ("opt/target/", {}), ("params/", {"big": True}), ("params/", {"big": True, "stacked": True})],
)
def test_a_file_of_jax_gives_the_network_that_timms_loader_gives(
    small: Any, tmp_path: Path, prefix: str, options: dict[str, bool]
) -> None:
    path = tmp_path / "mine.npz"
    numpy.savez(path, **arrays(prefix, **options))
    module = small()
    module.load_pretrained(str(path))
    model = vitrim.load("timm:vit_tiny_patch16_224", checkpoint=path)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(model(x), module(x), atol=1e-5)


def test_what_has_no_place_is_refused_or_named(small: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "mine.npz"
    numpy.savez(path, **{**arrays("opt/target/"), "opt/state/step": numpy.ones(1)})
    with caplog.at_level(logging.INFO, "vitrim.sources"):
        vitrim.load("timm:vit_tiny_patch16_224", checkpoint=path)
    assert "not read: beside.opt.state.step" in caplog.text
    numpy.savez(path, **arrays(), **{"MAPHead_0/probe": numpy.ones((1, 1, D), numpy.float32)})
    with pytest.raises(SourceError, match=r"unexpected: MAPHead_0\.probe"):
        vitrim.load("timm:vit_tiny_patch16_224", checkpoint=path)
    small_px = {**arrays(), "Transformer/posembed_input/pos_embedding": numpy.ones((1, 10, D), numpy.float32)}
    numpy.savez(path, **small_px)
    assert files.read(path)["pos_embed"].shape == (1, 10, D)  # never resampled unasked


def test_half_precision_of_jax_is_read_exactly(tmp_path: Path) -> None:
    exact = torch.randn(4, D, 6).bfloat16()
    held = {**arrays(), "head/kernel": exact[0].view(torch.int16).numpy().view("V2")}
    numpy.savez(tmp_path / "x.npz", **held)
    assert torch.equal(files.read(tmp_path / "x.npz")["head.weight"], exact[0].float().T)


def test_a_broken_archive_and_pickled_arrays_give_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    numpy.savez(path, **arrays())
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(SourceError, match=r"^x\.npz "):
        files.read(path)
    numpy.savez(path, **{**arrays(), "cls": numpy.array([{}], dtype=object)})
    with pytest.raises(SourceError, match=r"x\.npz is no whole \.npz file"):
        files.read(path)
