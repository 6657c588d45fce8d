"""Checkpoints that are not as they were written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from vitrim import checkpoints
from vitrim.errors import TrainingError


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    return checkpoints.write(tmp_path, 3, {"model/a": torch.arange(4.0)}, {"seconds": 1.5, "run": {"lr": 0.1}})


def test_what_is_written_is_read_back(kept: Path) -> None:
    tensors, values = checkpoints.read(kept)
    assert tensors["model/a"].tolist() == [0, 1, 2, 3]
    assert (values["step"], values["seconds"], values["run"]) == (3, 1.5, {"lr": 0.1})


def test_one_other_bit_in_a_tensor_is_refused(kept: Path) -> None:
    place = kept / "state.safetensors"
    content = bytearray(place.read_bytes())
    content[-1] ^= 1
    place.write_bytes(content)
    with pytest.raises(TrainingError, match=r"step-00000003 .*state\.safetensors is not what was written.*Remove"):
        checkpoints.read(kept)


@pytest.mark.parametrize(
    "change", [{"seconds": 2.5}, {"run": {}}, {"step": "x"}, {"more": 1}, {"sha256": None}], ids=str
)
def test_an_edited_value_is_refused(kept: Path, change: dict[str, object]) -> None:
    place = kept / "state.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | change))
    with pytest.raises(TrainingError, match=r"state\.json is not what was written"):
        checkpoints.read(kept)


def test_a_checkpoint_of_before_there_was_a_seal_is_read(kept: Path) -> None:
    place = kept / "state.json"
    values = json.loads(place.read_text())
    del values["seal"], values["sha256"]
    place.write_text(json.dumps(values))
    assert checkpoints.read(kept)[1]["step"] == 3
