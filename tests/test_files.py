"""Folders: whose they are, one run at a time in each, and who may read what is written."""

from __future__ import annotations

import json
import logging
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cli.kit import run as command
from tests.test_bad_input import SPEC, contents, draw_images, save_model
from vitrim import artifact, checkpoints, files, sources
from vitrim.architectures import t2t
from vitrim.errors import ArtifactError, ConfigError, SourceError, VitrimError
from vitrim.model import Vit, build
from vitrim.sources import load
from vitrim.spec import Config


@pytest.fixture(scope="module")
def small() -> Vit:
    return load("timm:test_vit", pretrained=False, verify=False)


def tokens_to_token() -> Vit:
    return build(Config(spec=t2t.spec("t2t_vit_7", classes=3)))


# ------------------------------------------------------------------------------------------------------ what force spares


def foreign(place: Path) -> None:
    """A folder of somebody else's, under the names that vitrim writes."""
    place.mkdir(parents=True)
    for name in ("config.json", "provenance.json", "summary.json", "family.json"):
        (place / name).write_text('{"model_type": "vit"}')
    for name in ("README.md", "model.safetensors", "report.html", "thesis.tex"):
        (place / name).write_text("mine")
    for name in ("stages", "scoring"):
        (place / name).mkdir()
        (place / name / "config.json").write_text('{"a": 1}')


WRITERS = {
    **{
        f"export for {kind}": f"export model --format {kind} --out OUT --force"
        for kind in ("timm", "hf", "torchvision")
    },
    "export to a file": "export model --format t2t --out OUT --force",
    "compress": "compress --model model --keep-macs 0.9 --data photos --out OUT --force",
    "a family": "compress --model model --keep-macs 0.9,0.8 --data photos --out OUT --force",
    "demo": "demo --out OUT --force",
    "train": "train --model model --data photos --steps 1 --out OUT --resume",
    "recover": "recover model --teacher model --data photos --steps 1 --out OUT --resume",
    "report": "report run --out OUT/thesis.tex",
    "report in place": "report OUT",
}


@pytest.mark.parametrize("where", ["foreign", "link", "here"])
@pytest.mark.parametrize("words", WRITERS.values(), ids=WRITERS)
def test_nothing_that_vitrim_did_not_write_is_replaced(
    words: str, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(tmp_path / "model")
    draw_images(tmp_path / "photos", ("cat", "dog", "owl"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "summary.json").write_text("{}")
    foreign(tmp_path / "foreign")
    (tmp_path / "link").symlink_to("foreign")
    out = "." if where == "here" else str(tmp_path / where)
    monkeypatch.chdir(tmp_path / "foreign" if where == "here" else tmp_path)
    for name in ("model", "photos", "run"):
        words = words.replace(f" {name} ", f" {tmp_path / name} ")
    before = contents(tmp_path)
    done = command(*words.replace("OUT", out).split())
    assert done.exit_code != 0
    assert len([line for line in done.stderr.splitlines() if line.startswith("Error: ")]) == 1
    assert contents(tmp_path) == before


def test_saving_with_force_spares_a_foreign_readme(small: Vit, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(ConfigError, match=r"README\.md.*did not write"):
        artifact.save(small, tmp_path, force=True)
    assert contents(tmp_path) == {"README.md": b"mine"}


@pytest.mark.parametrize("kind", ["timm", "hf", "torchvision"])
def test_an_export_replaces_an_export_and_keeps_other_files(kind: str, small: Vit, tmp_path: Path) -> None:
    place = tmp_path / "out"
    sources.write(small, kind, place)
    (place / "notes.txt").write_text("mine")
    (place / "model-00001-of-00002.safetensors").write_text("of an export in parts")
    with pytest.raises(VitrimError, match="--force"):
        sources.write(small, kind, place)
    sources.write(small, kind, place, force=True)
    names = {path.name for path in place.iterdir()}
    assert {"notes.txt", "config.json", "model.safetensors"} <= names
    assert "model-00001-of-00002.safetensors" not in names
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
def test_an_exported_file_replaces_its_like_and_no_other(name: str, tmp_path: Path) -> None:
    model = tokens_to_token()
    place = tmp_path / name
    torch.save(model.state_dict(), place) if name == "a.pth" else files.write_text(place, "mine")
    before = place.read_bytes()
    with pytest.raises(ConfigError, match="did not write"):
        sources.write(model, "t2t", place, force=True)
    assert place.read_bytes() == before
    place.unlink()
    sources.write(model, "t2t", place)
    sources.write(model, "t2t", place, force=True)
    (tmp_path / "link.pth").symlink_to(place)
    with pytest.raises(ConfigError, match="is a link"):
        sources.write(model, "t2t", tmp_path / "link.pth", force=True)


def test_an_export_never_replaces_the_model_that_it_came_from(small: Vit, tmp_path: Path) -> None:
    artifact.save(small, tmp_path / "small")
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match="did not write"):
        sources.write(small, "timm", tmp_path / "small", force=True)
    assert contents(tmp_path) == before


# ---------------------------------------------------------------------------------------------------- one run at a time

HOLD = """
import sys, time
from pathlib import Path
from vitrim.files import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Any:
    """Another process that writes to OUT."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "out")]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": ":".join(sys.path)}
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        yield other
        other.kill()


def test_the_second_run_is_refused_at_once_and_a_dead_one_gives_way_with_a_word(
    holder: subprocess.Popen[bytes], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    with (
        pytest.raises(ConfigError, match=rf"another run is writing there \(process {holder.pid} on "),
        files.locked(out),
    ):
        pass
    assert (out / files.LOCK).is_file()
    holder.kill()
    holder.wait()
    with caplog.at_level(logging.WARNING), files.locked(out):
        assert json.loads((out / files.LOCK).read_text())["process"] == os.getpid()
    assert f"process {holder.pid}" in caplog.text
    assert list(out.iterdir()) == []  # it was there before, and stays


@pytest.mark.parametrize("verb", ["compress", "family", "recover", "train", "export", "demo"])
def test_every_verb_that_writes_a_folder_keeps_out_of_one_in_use(
    verb: str, holder: subprocess.Popen[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(tmp_path / "model")
    draw_images(tmp_path / "photos", ("cat", "dog", "owl"))
    monkeypatch.chdir(tmp_path)
    words = {
        "compress": "compress --model model --keep-macs 0.9 --data photos --out out",
        "family": "compress --model model --keep-macs 0.9,0.8 --data photos --out out",
        "recover": "recover model --teacher model --data photos --steps 1 --out out",
        "train": "train --model model --data photos --steps 1 --out out",
        "export": "export model --format timm --out out --force",
        "demo": "demo --out out",
    }[verb]
    before = contents(tmp_path)
    done = command(*words.split())
    assert done.exit_code == 2, done.output
    assert f"another run is writing there (process {holder.pid}" in done.stderr
    assert contents(tmp_path) == before


def test_a_lock_may_be_taken_again_further_in_and_leaves_nothing(tmp_path: Path) -> None:
    out = tmp_path / "a" / "b"
    with files.locked(out), files.locked(out):
        assert files.names_in(out) == []
    assert list(tmp_path.iterdir()) == []
    with files.locked(out):
        (out / "kept").touch()
    assert [path.name for path in out.iterdir()] == ["kept"]


@pytest.mark.parametrize(
    ("text", "free"),
    [
        ("", True),
        ("{", True),
        ("[]", True),
        ('{"process": 9223372036854775807, "host": "HERE"}', True),
        ('{"process": ' + "9" * 400 + "}", True),
        ('{"process": 999999999, "host": "elsewhere"}', False),
        ('{"process": 1, "host": "HERE", "began": "another time"}', True),
    ],
)
def test_whether_a_lock_is_stale(text: str, free: bool, tmp_path: Path) -> None:
    import platform

    (tmp_path / files.LOCK).write_text(text.replace("HERE", platform.node()))
    if free:
        with files.locked(tmp_path):
            pass
        assert list(tmp_path.iterdir()) == []
    else:
        with pytest.raises(ConfigError, match=r"remove \.vitrim\.lock"), files.locked(tmp_path):
            pass


# ------------------------------------------------------------------------------------------------------ who may read it


@pytest.mark.parametrize("umask", [0o027])
def test_what_is_written_has_the_permissions_of_any_new_file(umask: int, small: Vit, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        artifact.save(small, tmp_path / "saved")
        artifact.save(small, tmp_path / "saved", force=True)
        checkpoints.write(tmp_path / "checkpoints", 1, {"a": torch.zeros(1)}, {})
        for kind in ("timm", "hf", "torchvision"):
            sources.write(small, kind, tmp_path / kind)
            sources.write(small, kind, tmp_path / kind, force=True)
        model = tokens_to_token()
        for name in ("a.pth", "a.safetensors"):
            sources.write(model, "t2t", tmp_path / name)
        with files.locked(tmp_path / "run"):
            found = list(tmp_path.rglob("*"))
            assert len(found) > 20
            for path in found:
                assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~umask, path
    finally:
        os.umask(before)


def test_a_place_that_cannot_be_read_is_told(small: Vit, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ArtifactError, match="is a file"):
        artifact.save(small, tmp_path / "file", force=True)


assert SPEC.classes == 3  # as the photos above have


def test_a_folder_whose_name_is_no_utf8_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with (
        pytest.raises(ConfigError, match=r"the name is no UTF-8.*choose another place"),
        files.locked(Path("caf\udce9/x")),
    ):
        raise AssertionError("was let in")
    assert list(tmp_path.iterdir()) == []
    Path("caf\udce9").mkdir()
    with pytest.raises(ArtifactError, match=r"the name is no UTF-8.*rename it"):
        load("caf\udce9")
    Path("caf\udce9.safetensors").write_bytes(b"x")
    with pytest.raises(SourceError, match="the name is no UTF-8"):
        load("timm:test_vit", checkpoint="caf\udce9.safetensors")


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """As on a disk that is full: longer files cannot be written."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [0, 4096])
@pytest.mark.parametrize("name", ["new/a.pth", "new/a.safetensors", "folder"])
def test_an_export_to_a_full_disk_is_one_sentence_and_leaves_nothing(
    name: str, size: int, small: Vit, tmp_path: Path
) -> None:
    model, kind = (small, "timm") if name == "folder" else (tokens_to_token(), "t2t")
    with (
        files_of_at_most(size),
        pytest.raises(VitrimError, match=rf"'({name}|[^']*{Path(name).name})' could not|File too large"),
    ):
        sources.write(model, kind, tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_cannot_be_written_does_not_stay(tmp_path: Path) -> None:
    with files_of_at_most(0), pytest.raises(ArtifactError, match="cannot be written"), files.locked(tmp_path):
        raise AssertionError("was let in")
    assert list(tmp_path.iterdir()) == []


def test_the_command_replaces_an_exported_file_with_force(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact.save(tokens_to_token(), tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    words = ["export", "model", "--format", "t2t", "--out", "a.pth"]
    assert command(*words).exit_code == 0
    assert command(*words).exit_code == 2
    done = command(*words, "--force")
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize("name", ["link", "link/x"])
def test_a_link_to_nothing_is_no_place(name: str, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(ConfigError, match=r"link' is a link to nothing\. Remove it"), files.locked(tmp_path / name):
        raise AssertionError("was let in")
    assert [path.name for path in tmp_path.iterdir()] == ["link"]
