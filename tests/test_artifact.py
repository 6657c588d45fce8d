"""The artifact: what is saved comes back, whole or not at all, and nothing else is taken for one."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import platform
import resource
import socket
import struct
import subprocess
import sys
import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from safetensors.torch import load_file, save_file
from torch import nn

from tests.specs import images, make, randomise, specs, vit
from vitrim import artifact, files
from vitrim.errors import ArtifactError
from vitrim.model import Vit
from vitrim.spec import Config, ModelSpec, Position, Preprocess, Selection, SelectionStep, spec_hash

SPEC = vit()
STEP = SelectionStep(method="comcat", variant="whitened", parent=spec_hash(SPEC), blocks=(None, {"attention": "kept"}))


def model(seed: int = 0, spec: ModelSpec = SPEC, **provenance: Any) -> Vit:
    config = Config(
        spec=spec,
        labels=tuple("abcde"),
        preprocess=Preprocess(
            mean=(0.5, 0.4, 0.3),
            std=(0.2, 0.2, 0.2),
            size_px=(16, 16),
            crop=0.9,
            crop_mode="center",
            interpolation="bicubic",
        ),
    )
    made = Vit(config, selection=Selection(steps=(STEP,)), provenance=provenance)
    return randomise(made, seed, torch.float32).eval()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return artifact.save(model(source="builtin:tiny"), tmp_path / "small")


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file under a folder, with its bytes."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# ----------------------------------------------------------------------------------------------------------- there, back


def test_a_saved_model_comes_back_the_same(tmp_path: Path) -> None:
    first = model(source="timm:vit_tiny")
    folder = artifact.save(first, tmp_path / "a" / "b")
    second = artifact.load(folder)
    x = images(SPEC, dtype=torch.float32)
    assert torch.equal(second(x), first(x))
    assert (second.config, second.selection) == (first.config, first.selection)
    assert second.provenance["source"] == "timm:vit_tiny"
    assert not second.training
    assert {p.dtype for p in second.parameters()} == {torch.float32}
    assert sorted(p.name for p in folder.iterdir()) == sorted(artifact.FILES)
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["b"]


def test_several_labels_an_image_are_said_in_the_config_and_one_is_not(tmp_path: Path) -> None:
    one, several = model(), model()
    several.config = dataclasses.replace(several.config, problem_type="multi_label_classification")
    said = [
        json.loads((artifact.save(m, tmp_path / str(i)) / "config.json").read_text())
        for i, m in enumerate((one, several))
    ]
    assert "problem_type" not in said[0]  # as older folders have it
    assert said[1]["problem_type"] == "multi_label_classification"
    assert [artifact.load(tmp_path / name).config.multi_label for name in "01"] == [False, True]


@settings(max_examples=15)
@given(spec=specs())
def test_any_spec_comes_back_with_its_weights(spec: ModelSpec, tmp_path_factory: pytest.TempPathFactory) -> None:
    first = make(spec, dtype=torch.float32)
    second = artifact.load(artifact.save(first, tmp_path_factory.mktemp("any") / "m"))
    assert second.spec == spec
    there = second.state_dict()
    assert all(torch.equal(value, there[name]) for name, value in first.state_dict().items())
    fixed = {name: p.requires_grad for name, p in first.named_parameters()}
    assert {name: p.requires_grad for name, p in second.named_parameters()} == fixed


def test_a_result_saves_its_model_with_its_method_and_history(tmp_path: Path) -> None:
    result = SimpleNamespace(model=model(), method="comcat", variant="svd", history=[{"rank": 4}], report={"kept": 0.5})
    kept = artifact.load(artifact.save(result, tmp_path / "r")).provenance
    assert (kept["method"], kept["variant"], kept["history"]) == ("comcat", "svd", [{"rank": 4}])


def test_half_precision_is_stored_and_read_back_as_float32(tmp_path: Path) -> None:
    first = model()
    folder = artifact.save(first, tmp_path / "half", half=True)
    assert {t.dtype for t in load_file(folder / "model.safetensors").values()} == {torch.float16}
    for name, value in artifact.load(folder).state_dict().items():
        assert torch.equal(value, first.state_dict()[name].half().float())


def test_numbers_beyond_half_precision_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    big = model()
    with torch.no_grad():
        big.norm.weight.fill_(1e6)  # type: ignore[operator,union-attr]
    with pytest.raises(ArtifactError, match=r"norm.weight.*half=False"):
        artifact.save(big, tmp_path / "half", half=True)
    assert not list(tmp_path.iterdir())


def test_the_model_keeps_its_dtype_in_the_file_and_stays_as_it_was(tmp_path: Path) -> None:
    double = make(SPEC)
    before = {name: value.clone() for name, value in double.state_dict().items()}
    folder = artifact.save(double, tmp_path / "d")
    assert {t.dtype for t in load_file(folder / "model.safetensors").values()} == {torch.float64}
    assert all(torch.equal(before[name], value) for name, value in double.state_dict().items())


def test_the_weights_name_their_framework(saved: Path) -> None:
    raw = (saved / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    assert json.loads(raw[8 : 8 + length])["__metadata__"] == {"format": "pt"}


def test_loading_leaves_the_random_state_alone(saved: Path) -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    artifact.load(saved)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_loaded_model_does_not_hang_on_its_file(saved: Path) -> None:
    second = artifact.load(saved)
    x = images(SPEC, dtype=torch.float32)
    before = second(x)
    (saved / "model.safetensors").write_bytes(b"")
    assert torch.equal(second(x), before)


def test_wrapped_models_are_saved_under_their_own_names(tmp_path: Path) -> None:
    compiled = torch.compile(model(), backend="eager")
    averaged = torch.optim.swa_utils.AveragedModel(model())
    for name, thing in (("compiled", compiled), ("averaged", averaged)):
        assert artifact.load(artifact.save(thing, tmp_path / name)).spec == SPEC  # type: ignore[arg-type]


def test_a_model_of_another_library_is_refused_with_the_way_in(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"Linear.*from_model"):
        artifact.save(nn.Linear(2, 2), tmp_path / "m")
    with pytest.raises(ArtifactError, match=r"str.*from_model"):
        artifact.save("model", tmp_path / "m")  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------------ provenance


def test_unknown_provenance_survives_another_save(tmp_path: Path) -> None:
    first = artifact.save(model(), tmp_path / "a", provenance={"ticket": {"id": 7}, "seed": 3})
    second = artifact.save(artifact.load(first), tmp_path / "b", provenance={"seed": 4})
    kept = json.loads((second / "provenance.json").read_text())
    assert (kept["ticket"], kept["seed"]) == ({"id": 7}, 4)
    assert set(kept["versions"]) == {"vitrim", "torch", "python"}


def test_the_same_weights_keep_their_figures_and_others_do_not(tmp_path: Path) -> None:
    metrics = {"before": {"top1": 0.7}, "after": {"top1": 0.6}}
    first = artifact.save(model(0), tmp_path / "a", provenance={"metrics": metrics})
    same = artifact.load(first)
    assert artifact.load(artifact.save(same, tmp_path / "b")).provenance["metrics"] == metrics
    trained = artifact.load(artifact.save(model(1), tmp_path / "c", like=first)).provenance
    assert trained["metrics"] == {"before": {"top1": 0.7}}
    assert trained["parent"] == {"sha256": same.provenance["sha256"], "metrics": metrics}
    told = artifact.load(artifact.save(model(1), tmp_path / "d", like=first, provenance={"metrics": {"after": {}}}))
    assert told.provenance["metrics"] == {"after": {}}


def test_a_saved_folder_names_no_place_no_user_and_no_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/lovelace")
    monkeypatch.setenv("USER", "lovelace")
    monkeypatch.setattr(socket, "gethostname", lambda: "analytical-engine")
    monkeypatch.setattr(platform, "node", lambda: "analytical-engine")

    @dataclass
    class Settings:
        data: Path = tmp_path / "photos of mine"
        note: str = f"read from {tmp_path}/x/y.csv, and (/home/lovelace/z/w) or ~/mine/v, file:///srv/u/t"
        drive: str = r"C:\Users\lovelace\teacher"
        values: tuple[float, ...] = (1.5, float("nan"))
        nested: dict[str, Any] = field(default_factory=lambda: {"/var/lib/k": torch.tensor(2)})

    made = model(source=str(tmp_path / "teacher"), note="https://example.org/a/b is 3/4 of image/jpeg")
    folder = artifact.save(made, tmp_path / "s", provenance={"config": Settings()})
    kept = json.loads((folder / "provenance.json").read_text())
    assert (kept["source"], kept["note"]) == ("teacher", "https://example.org/a/b is 3/4 of image/jpeg")
    assert kept["config"] == {
        "data": "photos of mine",
        "note": "read from y.csv, and (w) or v, t",
        "drive": "teacher",
        "values": [1.5, None],
        "nested": {"k": 2},
    }
    text = b"".join(snapshot(folder).values()).decode("latin-1")
    private = (str(tmp_path), "/home/", "lovelace", "analytical-engine")
    assert not [word for word in private if word in text]


def test_what_json_cannot_say_is_refused_by_its_place(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"provenance\['run'\]\['loss'\] is a Tensor"):
        artifact.save(model(), tmp_path / "m", provenance={"run": {"loss": torch.zeros(2)}})
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------ trained by the user


def train(network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    network.train()
    for _ in range(2):
        optimizer.zero_grad()
        network(images(SPEC, 4, dtype=torch.float32)).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("library", ["torch", "timm"])
def test_a_model_trained_in_a_loop_of_ones_own_is_saved_like_its_folder(
    saved: Path, tmp_path: Path, library: str
) -> None:
    mine = artifact.load(saved)
    if library == "torch":
        optimizer = torch.optim.AdamW(mine.parameters(), lr=1e-2)
    else:
        timm_optim = pytest.importorskip("timm.optim")
        optimizer = timm_optim.create_optimizer_v2(mine, opt="adamw", lr=1e-2, weight_decay=0.05)
    train(mine, optimizer)
    again = artifact.load(artifact.save(mine, tmp_path / "mine", like=saved))
    x = images(SPEC, dtype=torch.float32)
    assert torch.equal(again(x), mine.eval()(x))
    assert not torch.equal(again(x), artifact.load(saved)(x))
    assert again.selection.steps == (STEP,)
    assert again.provenance["source"] == "builtin:tiny"


def test_like_a_folder_of_another_network_is_refused_with_the_difference(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"2 blocks there, 3 in the model"):
        artifact.save(make(vit(blocks=3)), tmp_path / "m", like=saved)
    with pytest.raises(ArtifactError, match=r"width: 16 there, 32 in the model"):
        artifact.save(make(vit(width=32)), tmp_path / "m", like=saved)
    assert not (tmp_path / "m").exists()


# ---------------------------------------------------------------------------------------------------- whole or not there


def test_nothing_is_overwritten_unasked(saved: Path) -> None:
    before = snapshot(saved)
    with pytest.raises(ArtifactError, match=r"exists and holds 'README.md'.*force"):
        artifact.save(model(1), saved)
    assert snapshot(saved) == before


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "m").write_text("mine")
    with pytest.raises(ArtifactError, match="is a file"):
        artifact.save(model(), tmp_path / "m", force=True)
    assert (tmp_path / "m").read_text() == "mine"


def test_an_empty_folder_is_filled_without_force(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    assert artifact.load(artifact.save(model(), tmp_path / "m")).spec == SPEC


def test_force_replaces_the_artifact_and_keeps_other_files(saved: Path) -> None:
    (saved / "stages").mkdir()
    (saved / "stages" / "plan.json").write_text("{}")
    (saved / "report.html").write_text("<p>")
    artifact.save(model(1), saved, force=True)
    assert torch.equal(artifact.load(saved).stem.proj.weight, model(1).stem.proj.weight)
    assert set(snapshot(saved)) == {*artifact.FILES, "stages/plan.json", "report.html"}
    assert sorted(p.name for p in saved.parent.iterdir()) == ["small"]


class Disk:
    """Refuses the n-th call of one kind with an OSError, and lets all others through."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
        self.calls, self.at = 0, -1
        owner, name = {
            "mkdir": (Path, "mkdir"),
            "open": (files, "open"),
            "tensors": (artifact, "save_file"),
            "fsync": (os, "fsync"),
            "rename": (os, "rename"),
        }[step]
        real = open if step == "open" else getattr(owner, name)

        def gate(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            if self.calls == self.at:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, gate, raising=False)


@pytest.mark.parametrize("step", ["mkdir", "open", "tensors", "fsync", "rename"])
@pytest.mark.parametrize("stands", [False, True], ids=["new", "forced"])
def test_a_disk_that_refuses_any_step_leaves_what_stood_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, stands: bool
) -> None:
    folder = tmp_path / "out" / "small"
    if stands:
        artifact.save(model(0), folder)
        (folder / "mine.txt").write_text("kept")
    before = snapshot(tmp_path)
    disk = Disk(monkeypatch, step)
    artifact.save(model(1), tmp_path / "probe" / "small") if not stands else artifact.save(model(0), folder, force=True)
    total = disk.calls
    assert total > 0
    for path in sorted((tmp_path / "probe").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    if not stands:
        (tmp_path / "probe").rmdir()
    assert snapshot(tmp_path) == before
    for at in range(1, total + 1):
        disk.calls, disk.at = 0, at
        with pytest.raises(ArtifactError, match=r"small: could not be saved \(No space left.*unchanged\. Free space"):
            artifact.save(model(1), folder, force=stands)
        assert snapshot(tmp_path) == before, f"{step} {at}"
        assert sorted(p.name for p in tmp_path.iterdir()) == (["out"] if stands else [])
        assert not list(tmp_path.rglob("*.partial"))


def test_an_interruption_between_the_files_puts_the_old_ones_back(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, real, calls = snapshot(saved), os.rename, 0

    def rename(source: Path, target: Path) -> None:
        nonlocal calls
        calls += 1
        if calls == 7:
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(KeyboardInterrupt):
        artifact.save(model(1), saved, force=True)
    assert snapshot(saved) == before


def test_old_files_that_cannot_be_put_back_are_said_to_be_where_they_are(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, real, calls = snapshot(saved), os.rename, 0

    def rename(source: Path, target: Path) -> None:
        nonlocal calls
        calls += 1
        if calls > 6:
            raise OSError(errno.EIO, "Input/output error")
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(ArtifactError, match=r"nor put back.*\.partial/old.*by hand"):
        artifact.save(model(1), saved, force=True)
    assert "config.json" not in snapshot(saved)  # so that nobody takes the mixture for an artifact
    (old,) = saved.glob("*.partial/old")
    assert snapshot(old) == before


def test_a_really_full_disk_ends_in_one_sentence(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # files beyond 4 KiB: "File too large"
    try:
        with pytest.raises(ArtifactError, match="could not be saved"):
            artifact.save(model(), tmp_path / "m")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a place where nobody can write")
def test_a_read_only_place_ends_in_one_sentence() -> None:
    with pytest.raises(ArtifactError, match="could not be saved"):
        artifact.save(model(), "/proc/self/vitrim/small")


# -------------------------------------------------------------------------------------------------------------- runtime


def test_loading_needs_torch_safetensors_and_no_code_of_a_method(saved: Path) -> None:
    """In a process where nothing else can be imported once torch and safetensors are in."""
    code = """
        import sys
        import torch, safetensors.torch

        mine = {"lazy", "foreign", "codec", "spec", "tokens", "stems", "model", "errors", "processes", "files", "artifact"}
        class Gate:
            def find_spec(self, name, path=None, target=None):
                top, _, rest = name.partition(".")
                if top in sys.stdlib_module_names or top in ("torch", "safetensors"):
                    return None
                if top == "vitrim" and (not rest or rest in mine):
                    return None
                raise ImportError(f"{name} is not part of the runtime")

        sys.meta_path.insert(0, Gate())
        from vitrim import artifact
        model = artifact.load(sys.argv[1])
        assert model(torch.zeros(1, 3, 16, 16)).shape == (1, 5)
        print("timm" in sys.modules, "huggingface_hub" in sys.modules, "pydantic" in sys.modules)
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(saved)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (run.returncode, run.stdout.split()) == (0, ["False"] * 3), run.stderr


def test_positions_of_another_grid_are_resized_once_when_saved(tmp_path: Path) -> None:
    network = model(spec=vit(position=Position(grid=(5, 5))))
    expected = network(images(network.spec, dtype=torch.float32))
    loaded = artifact.load(artifact.save(network, tmp_path / "m"))
    assert loaded.spec == vit()
    assert torch.equal(loaded(images(loaded.spec, dtype=torch.float32)), expected)
    assert network.spec.position.grid == (5, 5)
    network.position.data.mul_(2)  # trained further, by hand, from a folder of before
    again = artifact.load(artifact.save(network, tmp_path / "again", like=tmp_path / "m", force=True))
    assert again.spec == vit()


def test_weights_that_are_no_numbers_are_not_saved_and_not_loaded(saved: Path, tmp_path: Path) -> None:
    astray = artifact.load(saved)
    with torch.no_grad():
        astray.blocks[1].mlp.fc1.weight[0, :2] = torch.tensor([float("nan"), float("inf")])
    with pytest.raises(ArtifactError, match=r"not saved: 'blocks\.1\.mlp\.fc1\.weight' holds 2 of \d+ numbers"):
        artifact.save(astray, tmp_path / "astray")
    assert not (tmp_path / "astray").exists()
    tensors = {name: tensor.clone() for name, tensor in astray.state_dict().items()}
    files.replace_file(saved / artifact.WEIGHTS, lambda partial: save_file(tensors, partial))
    told = json.loads((saved / artifact.PROVENANCE).read_text())
    files.replace_file(
        saved / artifact.PROVENANCE,
        lambda partial: files.write_json(partial, {**told, "sha256": files.sha256(saved / artifact.WEIGHTS)}),
    )
    with pytest.raises(ArtifactError, match=r"model\.safetensors: 'blocks\.1\.mlp\.fc1\.weight' holds 2 of"):
        artifact.load(saved)
