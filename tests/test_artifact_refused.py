"""What is no artifact, or no longer one, is refused in one sentence, before memory is taken and without running code."""

from __future__ import annotations

import json
import os
import resource
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.specs import make, vit
from vitrim import artifact
from vitrim.codec import plain
from vitrim.errors import ArtifactError
from vitrim.model import build
from vitrim.spec import Config, Preprocess

SPEC = vit()
GONE = {"attention": None, "mlp": None, "steps": []}
VIEW = plain(Preprocess(mean=(0.5,) * 3, std=(0.5,) * 3, size_px=(16, 16)))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return artifact.save(make(SPEC, dtype=torch.float32), tmp_path / "small")


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file under a folder, with its bytes."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def refusal(folder: Path) -> str:
    """The one sentence that loading ends in; it names a place, and nothing was changed by trying."""
    before = snapshot(folder) if folder.is_dir() else None
    with pytest.raises(ArtifactError) as caught:
        artifact.load(folder)
    assert before is None or snapshot(folder) == before
    text = str(caught.value)
    assert folder.name in text
    assert "\n" not in text
    return text


def test_a_missing_folder_and_a_file_are_refused(tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "nowhere")
    (tmp_path / "weights.bin").write_bytes(b"1")
    assert "is a file, not a folder" in refusal(tmp_path / "weights.bin")


@pytest.mark.parametrize("name", artifact.NEEDED)
def test_a_missing_file_is_named(saved: Path, name: str) -> None:
    (saved / name).unlink()
    assert f"{name}: is missing" in refusal(saved)


def test_a_lost_card_does_not_matter(saved: Path) -> None:
    whole = artifact.load(saved)
    (saved / "README.md").unlink()
    found = artifact.load(saved)
    assert found.config == whole.config
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), whole.parameters(), strict=True))


@pytest.mark.parametrize("left", [0, 5, 200, -1])
def test_truncated_weights_are_refused(saved: Path, left: int) -> None:
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:left])
    assert "truncated" in refusal(saved)


def test_weights_with_more_than_the_header_says_are_refused(saved: Path) -> None:
    with open(saved / "model.safetensors", "ab") as file:
        file.write(b"\0" * 8)
    assert "longer than its header says" in refusal(saved)


def test_edited_weights_are_refused(saved: Path) -> None:
    path = saved / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    text = refusal(saved)
    assert "sha256" in text
    assert "like=" in text


def rewrite_header(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


@pytest.mark.parametrize(
    "change",
    [
        lambda h: h["prefix"].update(data_offsets=[0, 10**15]),
        lambda h: h["prefix"].update(data_offsets=[-4, 60]),
        lambda h: h["prefix"].update(shape=[10**9, 10**9]),
        lambda h: h["prefix"].update(shape=["a"]),
        lambda h: h["prefix"].update(dtype="OBJECT"),
        lambda h: h.update(prefix=[1]),
    ],
    ids=["far", "negative", "huge", "text", "object", "list"],
)
def test_an_edited_header_is_refused_before_memory_is_taken(
    saved: Path, change: Callable[[dict[str, Any]], Any]
) -> None:
    rewrite_header(saved / "model.safetensors", change)
    text = refusal(saved)
    assert "does not fit" in text or "header is damaged" in text or "truncated" in text


def test_a_header_longer_than_the_file_is_refused(saved: Path) -> None:
    (saved / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 62) + b"{}")
    assert "no whole safetensors header" in refusal(saved)


def test_a_pickle_under_the_name_of_weights_is_never_opened(saved: Path, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.mkdir, (str(tmp_path / "sprung"),))

    for old_format in (False, True):
        torch.save({"x": Trap()}, saved / "model.safetensors", _use_new_zipfile_serialization=not old_format)
        assert "is a pickle under another name" in refusal(saved)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ({"model_type": "vit", "hidden_size": 8}, "transformers"),
        ({"architecture": "deit_tiny_patch16_224"}, "timm"),
        ({"weights": 1}, "no 'spec'"),
    ],
)
def test_a_foreign_folder_is_refused_by_its_kind(tmp_path: Path, config: dict[str, Any], word: str) -> None:
    folder = tmp_path / "foreign"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file({"w": torch.zeros(1)}, folder / "model.safetensors")
    text = refusal(folder)
    assert word in text
    assert "not an artifact of vitrim" in text


@pytest.mark.parametrize("name", ["config.json", "selection.json"])
def test_a_newer_schema_is_refused_naming_both(saved: Path, name: str) -> None:
    edit(saved / name, lambda value: value.update(schema=7))
    text = refusal(saved)
    assert name in text
    assert "schema 7" in text
    assert "up to 1" in text


def test_an_unknown_key_is_refused_with_the_near_miss(saved: Path) -> None:
    edit(saved / "config.json", lambda value: value.update(label=value.pop("labels")))
    text = refusal(saved)
    assert "config.json" in text
    assert "did you mean 'labels'?" in text


@pytest.mark.parametrize(
    "text", ["{", "[1]", "\xff", '{"spec": ' + "[" * 100_000], ids=["open", "list", "bytes", "deep"]
)
def test_a_config_that_is_no_json_object_is_refused(saved: Path, text: str) -> None:
    (saved / "config.json").write_bytes(text.encode("latin-1"))
    assert "config.json" in refusal(saved)


def test_a_width_of_a_billion_is_refused_before_memory_is_taken(saved: Path) -> None:
    edit(saved / "config.json", lambda value: value["spec"].update(width=10**9))
    assert "the spec says width=1000000000" in refusal(saved)


@pytest.mark.parametrize("size", [10**9, 2**63 - 1])
def test_a_hidden_width_beyond_the_file_is_refused(saved: Path, size: int) -> None:
    edit(saved / "config.json", lambda value: value["spec"]["blocks"][1]["mlp"].update(hidden=size))
    assert f"blocks[1].mlp.hidden={size}" in refusal(saved)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda value: value.update(preprocess=VIEW | {"size_px": [10**6, 10**6]}), "size_px=(1000000, 1000000)"),
        (lambda value: value.update(preprocess=VIEW | {"crop": 1e-9}), "crop=1e-09"),
        (lambda value: value.update(preprocess=VIEW | {"size_px": [0, 16]}), "size_px=(0, 16)"),
        (lambda value: value.update(preprocess=VIEW | {"size_px": [16_000] * 2}), "images of 16000 x 16000 px"),
        (lambda value: value["spec"].update(image_px=[16_000, 16_000]), "images of 16000 x 16000 px"),
        (lambda value: value["spec"].update(image_px=[10**9, 16]), "image_px=(1000000000, 16)"),
        (lambda value: value["spec"].update(image_px=[2048, 2048]), "tokens in an image of 2048 x 2048 px"),
        (lambda value: value["spec"]["blocks"].extend([GONE] * 120_000), "120002 blocks; expected at most 1000"),
        (
            lambda value: value["spec"]["outputs"].extend(value["spec"]["outputs"] * 200),
            "outputs; expected at most 100",
        ),
    ],
    ids=range(9),
)
def test_what_a_spec_asks_is_in_proportion_to_its_weights(
    saved: Path, change: Callable[[dict[str, Any]], object], says: str
) -> None:
    edit(saved / "config.json", change)
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert says in refusal(saved)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - used < 400_000  # kilobytes


def test_a_spec_that_no_memory_can_hold_is_refused() -> None:
    with pytest.raises(ArtifactError, match="no memory can hold"):
        artifact.expected_tensors(Config(spec=vit(width=2**62)))


def test_expected_tensors_are_those_of_the_built_model() -> None:
    built = build(SPEC).state_dict()
    assert artifact.expected_tensors(Config(spec=SPEC)) == {n: ("F32", tuple(t.shape)) for n, t in built.items()}


def test_weights_of_another_shape_are_refused_by_name_and_both_shapes(saved: Path) -> None:
    edit(saved / "config.json", lambda value: value["spec"]["blocks"][0]["mlp"].update(hidden=20))
    text = refusal(saved)
    assert "'blocks.0.mlp.fc1.weight' is F32, shape [24, 16]" in text or "shape [24, 16]" in text
    assert "[20, 16]" in text


def test_a_tensor_too_few_and_one_too_many_are_named(saved: Path, tmp_path: Path) -> None:
    tensors = load_file(saved / "model.safetensors")
    save_file({**tensors, "extra": torch.zeros(2)}, saved / "model.safetensors")
    assert "holds 'extra'" in refusal(saved)
    tensors.pop("norm.bias")
    save_file(tensors, saved / "model.safetensors")
    assert "has no tensor 'norm.bias'" in refusal(saved)


def test_whole_numbers_are_no_weights(saved: Path) -> None:
    tensors = load_file(saved / "model.safetensors")
    tensors["norm.bias"] = torch.zeros(16, dtype=torch.int32)
    save_file(tensors, saved / "model.safetensors")
    assert "'norm.bias' is I32" in refusal(saved)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_link_that_leaves_the_folder_is_refused(saved: Path, tmp_path: Path, name: str) -> None:
    (saved / name).rename(tmp_path / name)
    (saved / name).symlink_to(tmp_path / name)
    assert "link that leaves the folder" in refusal(saved)


def test_a_link_in_the_folder_and_a_link_to_the_folder_are_fine(saved: Path, tmp_path: Path) -> None:
    whole = artifact.load(saved)
    (saved / "model.safetensors").rename(saved / "w")
    (saved / "model.safetensors").symlink_to("w")
    (tmp_path / "latest").symlink_to(saved)
    found = artifact.load(tmp_path / "latest")
    assert found.config == whole.config
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), whole.parameters(), strict=True))


def test_a_pipe_is_refused_and_not_waited_for(saved: Path) -> None:
    (saved / "selection.json").unlink()
    os.mkfifo(saved / "selection.json")
    with pytest.raises(ArtifactError, match="not a regular file"):
        artifact.load(saved)


@pytest.mark.parametrize("shared", [False, True], ids=["own store", "shared store"])
def test_the_hub_caches_own_links_are_followed_and_no_others(saved: Path, tmp_path: Path, shared: bool) -> None:
    repo = tmp_path / "hub" / "models--ada--small"
    store = (repo.parent if shared else repo) / "blobs"
    snapshot_folder = repo / "snapshots" / "0" / ""
    for folder in (store, snapshot_folder):
        folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(artifact.FILES):
        (saved / name).rename(store / str(i))
        (snapshot_folder / name).symlink_to(store / str(i))
    artifact.load(snapshot_folder)
    (store / "1").rename(tmp_path / "elsewhere")
    (snapshot_folder / "model.safetensors").unlink()
    (snapshot_folder / "model.safetensors").symlink_to(tmp_path / "elsewhere")
    assert "link that leaves the folder" in refusal(snapshot_folder)


def test_a_family_and_an_unfinished_run_are_told_from_a_damaged_folder(saved: Path) -> None:
    (saved.parent / "family.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"is a family.* such as \S*small\.$"):
        artifact.load(saved.parent)
    run = saved.parent / "run"
    (run / "stages").mkdir(parents=True)
    with pytest.raises(ArtifactError, match=r"has not finished.*--resume"):
        artifact.load(run)


def test_a_model_without_numbers_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="has no numbers: it is on the device 'meta'"):
        artifact.save(build(SPEC).to("meta"), tmp_path / "small")
    assert not (tmp_path / "small").exists()
