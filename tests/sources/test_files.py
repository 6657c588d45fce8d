"""Local files of weights: what is read, what is unwrapped, and one sentence for what is not."""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import warnings
import zipfile
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
    assert is_state(read(tmp_path / "code.pth", STATE))  # torch.save names a folder in the file so, as TorchScript does


def test_a_file_is_read_by_how_it_begins_whatever_its_ending(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "pytorch_model.bin")
    assert is_state(files.read(tmp_path / "pytorch_model.bin"))
    for zipped in (True, False):
        torch.save(STATE, tmp_path / "x.safetensors", _use_new_zipfile_serialization=zipped)
        assert is_state(files.read(tmp_path / "x.safetensors"))


def test_an_address_in_place_of_a_file_is_said_to_be_one() -> None:
    with pytest.raises(SourceError, match="it is an address: download the file"):
        files.read(Path("https://example.com/weights.pth"))
    with pytest.raises(SourceError, match=r"is not there; expected a \.safetensors"):
        files.read(Path("weights.pth"))


@pytest.mark.parametrize(
    "key", ["state_dict_ema", "model_ema", "state_dict", "model_state_dict", "model", "net", "any_name"]
)
def test_training_checkpoints_are_unwrapped(tmp_path: Path, key: str) -> None:
    arguments = argparse.Namespace(lr=0.1, name="deit")
    assert is_state(read(tmp_path / "x.pth", {key: STATE, "epoch": 3, "args": arguments}))


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


@pytest.mark.parametrize("odd", [torch.ones(1).to_sparse(), torch.ones(1, device="meta"), torch.ones(1) * 1j])
def test_tensors_without_dense_numbers_are_refused(tmp_path: Path, odd: torch.Tensor) -> None:
    with pytest.raises(SourceError, match=r"sparse, complex, quantised or without numbers: pos\."):
        reconciled({"pos": odd})
    with pytest.raises(SourceError, match=r"weights twice"):  # which torch cannot compare
        read(tmp_path / "x.pth", {"a": torch.ones(2, device="meta"), "module.a": torch.ones(2, device="meta")})


def test_a_folder_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    out = files.write(tmp_path / "new" / "out", STATE, {"a": (1, 2)}, metadata={"more": "text"})
    assert is_state(files.read(out / "model.safetensors"))
    assert (out / "config.json").read_text() == f'{{\n  "a": [\n    1,\n    2\n  ],\n  "vitrim": "{__version__}"\n}}\n'
    with pytest.raises(TypeError):
        files.write(tmp_path / "half", STATE, {"a": object()})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new"]


@pytest.mark.parametrize(
    ("content", "words"),
    [([1, 2], "holds no tensors"), ("text", "holds a str"), ({}, "holds nothing"), ({"lr": 0.1}, "holds no tensors")],
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


def archive(path: Path, *names: str) -> None:
    with zipfile.ZipFile(path, "w") as made:
        for name in names:
            made.writestr(name, b"x")


def scripted(path: Path) -> None:
    archive(path, "m/code/__torch__.py", "m/data.pkl", "m/constants.pkl", "m/version")


def written(content: bytes) -> Callable[[Path], Any]:
    return lambda path: path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "make", "words"),
    [
        ("x.pt", scripted, r"a TorchScript archive .*whose code is not run.*save the weights alone"),
        ("x.npz", lambda path: numpy.savez(path, a=numpy.ones(2)), r"an archive of NumPy arrays"),
        ("x.pt2", lambda path: archive(path, "m/archive_format", "m/models/model.json"), r"torch\.export"),
        ("x.keras", lambda path: archive(path, "config.json", "model.weights.h5"), "Keras"),
        ("x.h5", written(b"\x89HDF\r\n\x1a\n" + bytes(20)), "HDF5"),
        ("x.bin", written(b"GGUF" + bytes(20)), "GGUF"),
        (
            "x.safetensors",
            written(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
            "Git LFS.*git lfs pull",
        ),
        ("x.pth", written(b"<!DOCTYPE html><html></html>"), "a web page.*Download it again"),
        ("x.pth", written(b'\n{"a": 1}'), "JSON, not weights"),
        (
            "x.zip",
            lambda path: archive(path, "best/model.pth", "best/log.txt"),
            r"an archive with best/model\.pth in it",
        ),
        ("x.pth", written(b"\x1f\x8b" + bytes(9)), "gzip"),
        ("x.onnx", written(b"\x08\x07\x12"), "ONNX"),
        ("x.msgpack", written(b"\x81\xa6params"), "Flax"),
    ],
)
def test_files_of_other_kinds_are_named_with_what_to_do(
    tmp_path: Path, name: str, make: Callable[[Path], Any], words: str
) -> None:
    make(tmp_path / name)
    with pytest.raises(SourceError, match=words) as caught:
        files.read(tmp_path / name)
    said = str(caught.value)
    assert said.startswith(f"{name} is ")
    assert "\n" not in said
    assert "weights_only" not in said


@pytest.mark.parametrize("begin", [b" <", b" {"])
def test_a_safetensors_file_whose_length_looks_like_text_is_read(tmp_path: Path, begin: bytes) -> None:
    save_file(STATE, tmp_path / "x.safetensors")
    raw = (tmp_path / "x.safetensors").read_bytes()
    length, longer = int.from_bytes(raw[:8], "little"), int.from_bytes(begin, "little")
    padded = longer.to_bytes(8, "little") + raw[8 : 8 + length].ljust(longer) + raw[8 + length :]
    (tmp_path / "x.safetensors").write_bytes(padded)
    assert is_state(files.read(tmp_path / "x.safetensors"))


def test_an_archive_of_torchscript_is_known_by_what_torch_writes(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates it
        torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), tmp_path / "x.pth")  # type: ignore[no-untyped-call]
    with pytest.raises(SourceError, match="a TorchScript archive"):
        files.read(tmp_path / "x.pth")


@pytest.mark.parametrize(
    ("inside", "words"),
    [
        ("adapter_config.json", r"a folder of PEFT adapters.*merge_and_unload"),
        ("__0_0.distcp", r"torch\.distributed\.checkpoint.*dcp_to_torch"),
        ("zero_to_fp32.py", r"of DeepSpeed.*zero_to_fp32\.py"),
        ("model.safetensors", r"expected a .* file in it; there is model\.safetensors"),
    ],
)
def test_folders_are_named_by_what_is_in_them(tmp_path: Path, inside: str, words: str) -> None:
    (tmp_path / inside).write_bytes(b"x")
    with pytest.raises(SourceError, match=words):
        files.read(tmp_path)


def test_an_index_gives_the_tensors_of_its_files(tmp_path: Path) -> None:
    save_file({"a.weight": STATE["a.weight"]}, tmp_path / "model-1.safetensors")
    save_file({"b": STATE["b"]}, tmp_path / "model-2.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a.weight": "model-1.safetensors", "b": "model-2.safetensors"}}))
    assert is_state(files.read(index))
    for broken in ("{", "[]", '{"weight_map": {"a": "../x.safetensors"}}', '{"weight_map": {"a": 1}}'):
        index.write_text(broken)
        with pytest.raises(SourceError, match="no index of weights"):
            files.read(index)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("layers.0.ffn.layers.0.0.weight", "names of MMPretrain"),
        ("vit.embeddings.patch_embeddings.projection.weight", r"Hugging Face's transformers: hf:FOLDER"),
        ("conv_proj.weight", "names of torchvision"),
        ("blocks.0.attention.qkv", "names of vitrim"),
        ("layers.0.blocks.0.attn.relative_position_bias_table", "windows or relative positions"),
        ("blocks.0.attn.qkv.parametrizations.weight.original0", "remove_parametrizations"),
        ("blocks.0.attn.qkv.weight_orig", r"prune\.remove"),
    ],
)
def test_names_of_another_library_are_named_with_what_to_do(tmp_path: Path, name: str, words: str) -> None:
    with pytest.raises(SourceError, match=rf"x\.pth does not fit 'it'.*{words}"):
        files.check(Path("x.pth"), {name: STATE["b"]}, {"a": (2,)}, "'it'")
    assert not files.advice(["a.weight", "blocks.0.attn.qkv.weight"])


def test_empty_tensors_of_a_sharded_run_are_explained() -> None:
    with pytest.raises(SourceError, match=r"ZeRO-3.*zero_to_fp32\.py"):
        files.check(Path("x.pth"), {"a": torch.empty(0)}, {"a": (2,)}, "'it'")


@pytest.mark.parametrize(
    ("head", "keys"),
    [
        ("heads.head", ["heads.weight", "heads.bias"]),
        ("heads.head", ["heads.0.weight", "heads.0.bias"]),
        ("heads.head", ["heads.head.1.weight", "heads.head.1.bias"]),
        ("head", ["head.1.weight"]),
        ("head", ["head.weight", "head.bias"]),
    ],
)
def test_a_replaced_classifier_of_one_linear_is_found(head: str, keys: list[str]) -> None:
    shapes = {"weight": (3, 2), "bias": (3,)}
    state = {key: torch.ones(shapes[key.rpartition(".")[2]]) for key in keys}
    found, classes = files.with_classifier({**state, "other": STATE["b"]}, f"{head}.weight", None, file="x.pth")
    assert classes == 3
    assert set(found) == {f"{head}.{key.rpartition('.')[2]}" for key in keys} | {"other"}


@pytest.mark.parametrize(
    "keys", [["heads.0.weight", "heads.2.weight"], ["heads.pre_logits.weight"], ["heads.0.weight", "heads.1.bias"]]
)
def test_a_classifier_of_more_than_one_linear_stays_as_it_is(keys: list[str]) -> None:
    state = {key: torch.ones(3, 2) for key in keys}
    assert set(files.with_plain_head(state, "heads.head", file="x.pth")) == set(keys)
