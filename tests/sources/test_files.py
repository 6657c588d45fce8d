"""Local files of weights: what is read, what is unwrapped, and one sentence for what is not."""

from __future__ import annotations

import argparse
import os
import pathlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import save_file

from vitrim import __version__
from vitrim.errors import SourceError
from vitrim.sources import files

STATE = {"a.weight": torch.arange(4.0), "b": torch.ones(2, 2)}


def read(path: Path, content: Any) -> dict[str, torch.Tensor]:
    torch.save(content, path)
    return files.read(path)


def is_state(found: dict[str, torch.Tensor]) -> bool:
    return set(found) == set(STATE) and all(torch.equal(found[key], STATE[key]) for key in STATE)


def test_safetensors_and_pickled_files_give_the_same_tensors(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "x.safetensors")
    assert is_state(files.read(tmp_path / "x.safetensors"))
    assert is_state(read(tmp_path / "x.pth", STATE))


@pytest.mark.parametrize("key", files.WRAPPED)
def test_training_checkpoints_are_unwrapped(tmp_path: Path, key: str) -> None:
    arguments = argparse.Namespace(lr=0.1, name="deit")
    assert is_state(read(tmp_path / "x.pth", {key: STATE, "epoch": 3, "args": arguments}))


def test_averaged_weights_come_before_raw_ones(tmp_path: Path) -> None:
    raw = {key: torch.zeros_like(value) for key, value in STATE.items()}
    assert is_state(read(tmp_path / "x.pth", {"model": raw, "model_ema": STATE}))
    assert is_state(read(tmp_path / "y.pth", {"state_dict": raw, "state_dict_ema": STATE}))


def test_the_prefixes_of_wrappers_are_stripped(tmp_path: Path) -> None:
    assert is_state(read(tmp_path / "x.pth", {f"module._orig_mod.{key}": value for key, value in STATE.items()}))


def test_weights_that_stand_there_twice_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"holds weights twice.*: module\.b\."):
        read(tmp_path / "x.pth", {**STATE, "module.b": STATE["b"]})


def test_the_counter_of_torchs_averaged_model_is_no_weight(tmp_path: Path) -> None:
    averaged = {"n_averaged": torch.tensor(7), **{f"module.{key}": value for key, value in STATE.items()}}
    assert is_state(read(tmp_path / "x.pth", {"model": {}, "model_ema": averaged}))
    assert "n_averaged" in read(tmp_path / "y.pth", {**STATE, "n_averaged": torch.tensor(7)})


class Mine:
    """A class of the user's own, whose unpickling would run code."""

    def __reduce__(self) -> Any:
        return (os.mkdir, ("never",))


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: pathlib.PurePosixPath("here"), r"pathlib\S*"),
        (lambda: argparse.Namespace(output=pathlib.PurePosixPath("here")), r"pathlib\S*"),
        (lambda: numpy.float64(71.2), r"numpy\S+scalar"),
        (lambda: {"best": numpy.float32(71.2)}, r"numpy\S+scalar"),
        (lambda: torch.nn.Linear(2, 2), r"torch\.nn\.modules\.linear\.Linear"),
        (Mine, r"\w+\.mkdir"),
    ],
)
def test_objects_of_other_classes_are_refused_by_their_name_and_run_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[], Any], named: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        SourceError, match=rf"^x\.pth holds an object of class {named}, .*save the weights alone"
    ) as caught:
        read(tmp_path / "x.pth", {"model": STATE, "more": make()})
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["x.pth"]


EXPECTED = {
    "pos": torch.zeros(1),
    "blocks.0.attn.qkv.weight": torch.zeros(6, 2),
    "blocks.0.attn.qkv.bias": torch.zeros(6),
    "steps": torch.zeros(1, dtype=torch.int64),
}


def reconciled(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return files.reconciled(state, EXPECTED, file="x.pth")


def test_a_prefix_goes_only_where_all_names_share_it_and_the_familys_come_out() -> None:
    full = {key: torch.ones_like(value) for key, value in EXPECTED.items()}
    for prefix in ("", "model.", "net.vit."):
        assert set(reconciled({f"{prefix}{key}": value for key, value in full.items()})) == set(EXPECTED)
    for foreign in (
        {"model.a": STATE["b"]},
        {**{f"model.{key}": v for key, v in full.items()}, "loss.weight": STATE["b"]},
    ):
        assert set(reconciled(foreign)) == set(foreign)
    inner = {key: value for key, value in full.items() if key.startswith("blocks.")}
    assert set(reconciled(inner)) == set(inner)  # names that are the family's already keep what they share


def test_split_parts_are_joined_in_order_only_where_all_three_are_there() -> None:
    parts = {f"blocks.0.attn.{part}.weight": torch.full((2, 2), float(i)) for i, part in enumerate("qkv")}
    joined = reconciled(parts)
    assert set(joined) == {"blocks.0.attn.qkv.weight"}
    assert joined["blocks.0.attn.qkv.weight"][:, 0].tolist() == [0, 0, 1, 1, 2, 2]
    del parts["blocks.0.attn.k.weight"]
    assert set(reconciled(parts)) == set(parts)
    uneven = {**parts, "blocks.0.attn.k.weight": torch.ones(1, 2)}
    assert set(reconciled(uneven)) == set(uneven)


def test_whole_numbers_are_refused_where_weights_are_expected() -> None:
    assert reconciled({"steps": torch.ones(1, dtype=torch.int64)})["steps"].dtype == torch.int64
    with pytest.raises(SourceError, match=r"x\.pth holds whole numbers .*: pos \(int8\)"):
        reconciled({"pos": torch.ones(1, dtype=torch.int8)})


def test_a_folder_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    out = files.write(tmp_path / "new" / "out", STATE, {"a": (1, 2)}, metadata={"more": "text"})
    assert is_state(files.read(out / "model.safetensors"))
    assert (out / "config.json").read_text() == f'{{\n  "a": [\n    1,\n    2\n  ],\n  "vitrim": "{__version__}"\n}}\n'
    with pytest.raises(TypeError):
        files.write(tmp_path / "half", STATE, {"a": object()})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new"]


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
        files.read(path)
    assert "\n" not in str(caught.value)


def test_text_and_missing_files_and_folders_give_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "x.pth").write_text("not weights at all")
    with pytest.raises(SourceError, match=r"x\.pth"):
        files.read(tmp_path / "x.pth")
    with pytest.raises(SourceError, match="is not there"):
        files.read(tmp_path / "none.pth")
    with pytest.raises(SourceError, match="is a folder"):
        files.read(tmp_path)
