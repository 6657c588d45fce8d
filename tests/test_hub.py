"""To and from the Hub, against a fake of huggingface_hub's own calls: no network."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError

from tests.specs import make, vit
from vitrim import artifact, hub
from vitrim.errors import ArtifactError

SPEC = vit()
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """Repositories as folders, and the cache as huggingface_hub lays it out: snapshots that link to blobs."""

    def __init__(self, root: Path) -> None:
        self.root, self.cache = root / "remote", root / "cache"
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.breaks_at: str | None = None

    def create_repo(self, repo_id: str, **options: Any) -> str:
        self.calls.append(("create_repo", {"repo_id": repo_id, **options}))
        (self.root / repo_id).mkdir(parents=True, exist_ok=options["exist_ok"])
        return f"https://huggingface.co/{repo_id}"

    def upload_folder(self, *, repo_id: str, folder_path: str, allow_patterns: list[str], **options: Any) -> None:
        self.calls.append(("upload_folder", {"repo_id": repo_id, **options}))
        if self.breaks_at == "upload":
            raise ConnectionError("Connection reset by peer\nand a trace")
        for name in allow_patterns:
            shutil.copy(Path(folder_path) / name, self.root / repo_id / name)

    def snapshot_download(self, repo_id: str, *, allow_patterns: list[str], **options: Any) -> str:
        self.calls.append(("snapshot_download", {"repo_id": repo_id, "allow_patterns": allow_patterns, **options}))
        if not (self.root / repo_id).is_dir():
            raise LocalEntryNotFoundError("Cannot find the repository.\nSecond line.")
        repo = self.cache / f"models--{repo_id.replace('/', '--')}"
        snapshot, blobs = repo / "snapshots" / COMMIT, repo / "blobs"
        snapshot.mkdir(parents=True, exist_ok=True)
        blobs.mkdir(exist_ok=True)
        for name in allow_patterns:
            if not (self.root / repo_id / name).is_file():
                continue
            if name == self.breaks_at:
                (blobs / f"{name}.incomplete").write_bytes(b"half")
                raise ConnectionError("Connection broken: 4 bytes read, 96 more expected")
            shutil.copy(self.root / repo_id / name, blobs / name)
            if not (snapshot / name).exists():
                (snapshot / name).symlink_to(Path("..") / ".." / "blobs" / name)
        return str(snapshot)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    made = FakeHub(tmp_path)

    def api(token: str | None = None) -> FakeHub:
        made.calls.append(("HfApi", {"token": token}))
        return made

    monkeypatch.setattr(huggingface_hub, "HfApi", api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", made.snapshot_download)
    return made


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    folder = artifact.save(make(SPEC, dtype=torch.float32), tmp_path / "small")
    (folder / "report.html").write_text("<p>")
    (folder / "stages").mkdir()
    (folder / "stages" / "plan.json").write_text("{}")
    return folder


def test_what_is_pushed_loads_back_the_same(fake: FakeHub, saved: Path) -> None:
    assert hub.push(saved, "ada/small") == "https://huggingface.co/ada/small"
    there = hub.load_hub("hub:ada/small").state_dict()
    here = artifact.load(saved).state_dict()
    assert all(torch.equal(there[name], value) for name, value in here.items())


def test_a_push_sends_the_artifact_and_the_report_only_if_asked(fake: FakeHub, saved: Path) -> None:
    hub.push(saved, "ada/small")
    assert sorted(p.name for p in (fake.root / "ada/small").iterdir()) == sorted(artifact.FILES)
    hub.push(saved, "ada/small", include_report=True)
    assert (fake.root / "ada/small/report.html").is_file()
    assert not (fake.root / "ada/small/stages").exists()


def test_privacy_and_token_reach_the_hub(fake: FakeHub, saved: Path) -> None:
    hub.push(saved, "ada/small", private=True, token="secret")
    assert ("HfApi", {"token": "secret"}) in fake.calls
    assert next(told for name, told in fake.calls if name == "create_repo")["private"] is True


def test_a_report_that_is_not_there_is_asked_for_before_anything_is_sent(fake: FakeHub, saved: Path) -> None:
    (saved / "report.html").unlink()
    with pytest.raises(ArtifactError, match=r"report.html: is missing; make it by `vitrim report`"):
        hub.push(saved, "ada/small", include_report=True)
    assert not fake.calls


def test_a_damaged_folder_is_not_pushed(fake: FakeHub, saved: Path) -> None:
    (saved / "model.safetensors").write_bytes(b"")
    with pytest.raises(ArtifactError, match="truncated"):
        hub.push(saved, "ada/small")
    assert not fake.calls


@pytest.mark.parametrize("name", ["small", "../x", "ada/../x", "a/b/c", "/tmp/x", "ada/sm all", ""])
def test_a_name_that_is_none_is_refused(fake: FakeHub, saved: Path, name: str) -> None:
    for call in (lambda: hub.push(saved, name), lambda: hub.load_hub(name)):
        with pytest.raises(ArtifactError, match="expected USER/NAME"):
            call()
    assert not fake.calls


def test_a_push_that_breaks_off_ends_in_one_sentence(fake: FakeHub, saved: Path) -> None:
    fake.breaks_at = "upload"
    with pytest.raises(ArtifactError, match=r"^ada/small: could not be pushed \(Connection reset by peer\)[^\n]*$"):
        hub.push(saved, "ada/small")


@pytest.mark.parametrize("name", artifact.NEEDED)
def test_an_interrupted_download_ends_in_one_sentence_and_leaves_no_model(
    fake: FakeHub, saved: Path, name: str
) -> None:
    hub.push(saved, "ada/small")
    fake.breaks_at = name
    with pytest.raises(ArtifactError, match=r"^ada/small at [^\n]*could not be fetched[^\n]*Connection broken[^\n]*$"):
        hub.load_hub("ada/small")
    assert not list(fake.cache.glob(f"models--*/snapshots/*/{name}"))
    fake.breaks_at = None
    assert hub.load_hub("ada/small").spec == SPEC


def test_a_repository_that_is_not_there_ends_in_one_sentence(fake: FakeHub) -> None:
    with pytest.raises(
        ArtifactError, match=r"^ada/none at v2: could not be fetched[^\n]*Cannot find the repository\)[^\n]*$"
    ):
        hub.load_hub("ada/none", "v2")


def test_the_library_itself_offline_ends_in_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ArtifactError, match=r"^ada/none at [^\n]*could not be fetched[^\n]*$"):
        hub.load_hub("ada/none")
    assert not (tmp_path / "cache").exists()


def test_the_library_itself_offline_pushes_nothing(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ArtifactError, match=r"^ada/none: could not be pushed[^\n]*$"):
        hub.push(saved, "ada/none")


def test_a_foreign_repository_is_refused_before_its_weights_are_fetched(fake: FakeHub) -> None:
    repo = fake.root / "ada" / "bert"
    repo.mkdir(parents=True)
    (repo / "config.json").write_text(json.dumps({"model_type": "bert"}))
    (repo / "model.safetensors").write_bytes(b"big")
    with pytest.raises(ArtifactError, match=r"selection.json, provenance.json did not come|transformers"):
        hub.load_hub("ada/bert")
    assert all("model.safetensors" not in told["allow_patterns"] for _, told in fake.calls)


def test_an_incomplete_copy_in_the_cache_is_not_taken_for_a_model(
    fake: FakeHub, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Offline, huggingface_hub gives the snapshot that it has, whole or not."""
    hub.push(saved, "ada/small")
    (fake.root / "ada/small/model.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"model.safetensors did not come.*interrupted"):
        hub.load_hub("ada/small")


def test_all_files_come_from_one_commit(fake: FakeHub, saved: Path) -> None:
    hub.push(saved, "ada/small")
    hub.load_hub("ada/small", "main")
    asked = [told["revision"] for name, told in fake.calls if name == "snapshot_download"]
    assert asked == ["main", COMMIT]
