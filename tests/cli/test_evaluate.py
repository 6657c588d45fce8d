"""`vitrim evaluate`: what is scored, and how sure that is."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from tests.cli.kit import run
from tests.data.pictures import class_folder
from tests.specs import make, vit
from vitrim import artifact
from vitrim.spec import Config, Preprocess

VIEW = Preprocess(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), size_px=(16, 16))


def saved(folder: Path, labels: tuple[str, ...]) -> Path:
    spec = vit(classes=len(labels))
    model = make(spec, dtype=torch.float32)
    model.config = Config(spec=spec, preprocess=VIEW, labels=labels)
    return artifact.save(model, folder)


def test_a_tenth_of_a_plain_folder_is_scored_and_that_is_said(tmp_path: Path) -> None:
    model = saved(tmp_path / "model", ("cat", "dog"))
    photos = class_folder(tmp_path / "photos", {"cat": 12, "dog": 12})
    done = run("evaluate", model, "--data", photos)
    assert done.exit_code == 0, done.output
    assert "on 2 images of photos (validation)" in done.stdout
    assert "of its 24 images a tenth, set aside by seed, was scored. --split all scores all." in done.stdout
    told = json.loads(run("evaluate", model, "--data", photos, "--split", "all", "--json").stdout)
    right = told["counts"]["top1"]
    assert (right["count"], right["right"], told["set_aside_from"]) == (24, round(24 * told["top1"]), None)
    assert right["low"] < told["top1"] < right["high"]
    words = run("evaluate", model, "--data", photos, "--split", "all").stdout
    assert f"({right['right']} of 24; 95 % interval {100 * right['low']:.2f} to {100 * right['high']:.2f})" in words
    assert "set aside" not in words


def test_tokens_are_scored_where_they_are_the_product(tmp_path: Path) -> None:
    model = saved(tmp_path / "model", ("cat", "dog"))
    photos = class_folder(tmp_path / "photos", {"cat": 2, "dog": 2})
    done = run("evaluate", model, "--against", model, "--product", "tokens", "--data", photos, "--split", "all")
    assert done.exit_code == 0, done.output
    assert "cosine of tokens with dense  1.0000" in done.stdout
    assert "cosine of tokens, worst image  1.0000" in done.stdout
    assert "cosine of the class token  1.0000" in done.stdout
    assert "top-1" in done.stdout


def test_images_of_other_classes_are_compared_with_a_model_without_their_labels(tmp_path: Path) -> None:
    model = saved(tmp_path / "model", ("cat", "dog"))
    photos = class_folder(tmp_path / "photos", {"fox": 2, "owl": 2})
    assert "'fox', 'owl'" in run("evaluate", model, "--data", photos, "--split", "all").output
    done = run("evaluate", model, "--against", model, "--data", photos, "--split", "all")
    assert done.exit_code == 0, done.output
    assert "agreement with dense  100.00 %  (4 of 4" in done.stdout
    assert "top-1" not in done.stdout
    assert "Judged without labels" in done.stderr
