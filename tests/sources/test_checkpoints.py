"""Local files of weights: what is read, what is unwrapped, and one sentence for what is not."""

from __future__ import annotations

import argparse
import pathlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from vitrim.errors import SourceError
from vitrim.sources import checkpoints

STATE = {"a.weight": torch.arange(4.0), "b": torch.ones(2, 2)}


def read(path: Path, content: Any) -> dict[str, torch.Tensor]:
    torch.save(content, path)
    return checkpoints.read(path)


def is_state(found: dict[str, torch.Tensor]) -> bool:
    return set(found) == set(STATE) and all(torch.equal(found[key], STATE[key]) for key in STATE)


def test_safetensors_and_pickled_files_give_the_same_tensors(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "x.safetensors")
    assert is_state(checkpoints.read(tmp_path / "x.safetensors"))
    assert is_state(read(tmp_path / "x.pth", STATE))


@pytest.mark.parametrize("key", checkpoints.WRAPPED)
def test_training_checkpoints_are_unwrapped(tmp_path: Path, key: str) -> None:
    arguments = argparse.Namespace(lr=0.1, name="deit")
    assert is_state(read(tmp_path / "x.pth", {key: STATE, "epoch": 3, "args": arguments}))


def test_averaged_weights_come_before_raw_ones(tmp_path: Path) -> None:
    raw = {key: torch.zeros_like(value) for key, value in STATE.items()}
    assert is_state(read(tmp_path / "x.pth", {"model": raw, "model_ema": STATE}))
    assert is_state(read(tmp_path / "y.pth", {"state_dict": raw, "state_dict_ema": STATE}))


def test_the_prefixes_of_wrappers_are_stripped(tmp_path: Path) -> None:
    assert is_state(read(tmp_path / "x.pth", {f"module._orig_mod.{key}": value for key, value in STATE.items()}))


def test_other_classes_are_refused_by_their_name(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"class pathlib.*save the weights alone"):
        read(tmp_path / "x.pth", {"model": STATE, "where": pathlib.PurePosixPath("here")})


@pytest.mark.parametrize(
    ("content", "words"),
    [([1, 2], "holds a list"), ({}, "holds nothing"), ({"a": STATE["b"], "lr": 0.1}, r"more than tensors \(lr\)")],
)
def test_files_without_weights_are_refused(tmp_path: Path, content: Any, words: str) -> None:
    with pytest.raises(SourceError, match=words):
        read(tmp_path / "x.pth", content)


@pytest.mark.parametrize("name", ["x.safetensors", "x.pth"])
@pytest.mark.parametrize("keep", [0, 9, 200])
def test_truncated_files_give_one_sentence(tmp_path: Path, name: str, keep: int) -> None:
    path = tmp_path / name
    save_file(STATE, path) if path.suffix == ".safetensors" else torch.save(STATE, path)
    path.write_bytes(path.read_bytes()[:keep] if keep < 200 else path.read_bytes()[:-20])
    with pytest.raises(SourceError, match=f"^{name} ") as caught:
        checkpoints.read(path)
    assert "\n" not in str(caught.value)


def test_text_and_missing_files_and_folders_give_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "x.pth").write_text("not weights at all")
    with pytest.raises(SourceError, match=r"x\.pth"):
        checkpoints.read(tmp_path / "x.pth")
    with pytest.raises(SourceError, match="is not there"):
        checkpoints.read(tmp_path / "none.pth")
    with pytest.raises(SourceError, match="is a folder"):
        checkpoints.read(tmp_path)
