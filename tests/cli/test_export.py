"""`vitrim export`."""

import json
from pathlib import Path

import pytest

from tests.cli.kit import run


def test_no_verify_skips_the_comparison_with_the_source(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from vitrim.sources import parity

    asked = []
    monkeypatch.setattr(parity, "verify", lambda *args, **rest: asked.append(rest["what"]))
    words = ["export", "timm:test_vit", "--no-pretrained", "--format", "timm"]
    assert run(*words, "--out", tmp_path / "a", "--no-verify").exit_code == 0
    assert asked == []
    assert run(*words, "--out", tmp_path / "b").exit_code == 0
    assert len(asked) == 1


def test_export_writes_a_folder_that_timm_loads_and_refuses_one_that_is_there(tmp_path: Path) -> None:
    words = ["export", "timm:test_vit", "--no-pretrained", "--format", "timm", "--out", tmp_path / "a", "--json"]
    done = run(*words)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == {"format": "timm", "out": str(tmp_path / "a")}
    assert (tmp_path / "a" / "config.json").is_file()
    again = run(*words)
    assert again.exit_code == 2
    assert "--force" in again.stderr
    assert run(*words, "--force").exit_code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_export_at_another_image_size_writes_a_network_of_that_size(tmp_path: Path) -> None:
    import vitrim

    words = ["export", "builtin:cifar10-vit-micro", "--format", "timm", "--image-px", "64,48"]
    assert run(*words, "--out", tmp_path / "a").exit_code == 0
    assert vitrim.load(f"timm:local-dir:{tmp_path / 'a'}").spec.image_px == (64, 48)
