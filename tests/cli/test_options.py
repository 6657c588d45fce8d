"""Options that several verbs share."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import vitrim
from tests.cli.kit import run
from vitrim.spec import AttentionSpec, BlockSpec, Config, MlpSpec, ModelSpec, Output, Position, Preprocess

HOW = Preprocess(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), size_px=(8, 8))
BROKEN = "cat/3.png"


def saved(folder: Path, *, preprocess: Preprocess | None = HOW) -> Path:
    """A model of two blocks for cats and dogs."""
    block = BlockSpec(attention=AttentionSpec(heads=2, qk_dim=8, v_dim=8, scale=8**-0.5), mlp=MlpSpec(hidden=32))
    spec = ModelSpec(
        image_px=(8, 8),
        patch_px=(4, 4),
        width=16,
        position=Position(grid=(2, 2)),
        blocks=(block, block),
        outputs=(Output(classes=2),),
    )
    torch.manual_seed(0)
    model = vitrim.build(Config(spec=spec, preprocess=preprocess, labels=("cat", "dog")))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    vitrim.save(model, folder)
    return folder


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Twenty images of each of two classes, in `train` and `val`; one of each is cut short."""
    draws = np.random.default_rng(0)
    for split, count in (("train", 16), ("val", 4)):
        for name in ("cat", "dog"):
            folder = tmp_path / "photos" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                Image.fromarray(draws.integers(0, 256, (9, 9, 3), dtype=np.uint8)).save(folder / f"{number}.png")
        file = tmp_path / "photos" / split / BROKEN
        file.write_bytes(file.read_bytes()[:60])
    return tmp_path / "photos"


VERBS = {
    "plan": "plan --model {model} --keep-macs 0.8 --data {data} --images 64",
    "compress": "compress --model {model} --method comcat --keep-macs 0.7 --images 64 --recover-steps 2 --no-measure "
    "--data {data} --config {config} --out {out}",
    "train": "train --model {model} --data {data} --steps 2 --batch-size 8 --out {out}",
    "recover": "recover {model} --teacher {model} --data {data} --steps 2 --batch-size 8 --out {out}",
    "evaluate": "evaluate {model} --data {data}",
    "predict": "predict {model} {data}/val/cat/2.png {data}/val/cat/3.png",
}


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_that_reads_images_leaves_broken_ones_out_when_told_to_and_counts_them(
    verb: str, photos: Path, tmp_path: Path
) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"evaluate": {"check_dense": False}}))
    told = {"model": saved(tmp_path / "model"), "data": photos, "config": config}
    stopped = run(*VERBS[verb].format(out=tmp_path / "stopped", **told).split())
    assert stopped.exit_code == 1, stopped.output
    assert "cat/3.png: not a readable image" in stopped.stderr
    assert "--on-broken skip" in stopped.stderr
    done = run(*VERBS[verb].format(out=tmp_path / "done", **told).split(), "--on-broken", "skip")
    assert done.exit_code == 0, done.output
    assert re.search(r"left out [12] that cannot be read: \S*cat/3\.png", done.stderr), done.stderr


def test_python_takes_the_same_word_as_the_command(photos: Path, tmp_path: Path) -> None:
    model = vitrim.load(saved(tmp_path / "model"))
    with pytest.raises(vitrim.errors.DataError, match=r"cat/3\.png.*on_broken='skip'"):
        vitrim.evaluate(model, photos)
    found = vitrim.evaluate(model, photos, on_broken="skip")
    assert (found["count"], found["skipped"]) == (7, 1)
    config = vitrim.ComcatConfig(budget=vitrim.Budget(keep_macs=0.7), images=64, align=2)
    assert vitrim.compress(model, config, data=photos, on_broken="skip").spec != model.spec
    with pytest.raises(vitrim.errors.DataError, match="expected 'raise' or 'skip'"):
        vitrim.compress(model, config, data=photos, on_broken="ignore")


PREPARED = {verb: words for verb, words in VERBS.items() if verb != "train"}


@pytest.mark.parametrize("verb", PREPARED)
def test_a_model_without_preprocessing_is_told_it_on_the_command_line_and_never_guessed(
    verb: str, photos: Path, tmp_path: Path
) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"evaluate": {"check_dense": False}}))
    told = {"model": saved(tmp_path / "model", preprocess=None), "data": photos, "config": config}
    words = [*PREPARED[verb].format(out=tmp_path / "out", **told).split(), "--on-broken", "skip"]
    stopped = run(*words)
    assert stopped.exit_code == 1, stopped.output
    assert "--mean, --std and --size" in stopped.stderr
    words = [*PREPARED[verb].format(out=tmp_path / "done", **told).split(), "--on-broken", "skip"]
    done = run(*words, "--mean", "0.5", "--std", "0.25,0.25,0.25", "--size", "9")
    assert done.exit_code == 0, done.output
    assert "preprocessing as given: mean (0.5, 0.5, 0.5), std (0.25, 0.25, 0.25), 8 x 8 px" in done.stderr
    if verb in ("compress", "recover"):
        kept = vitrim.load(tmp_path / "done").config.preprocess
        assert kept is not None
        assert (kept.mean, kept.std, int(8 / kept.crop)) == ((0.5,) * 3, (0.25,) * 3, 9)


def test_the_same_preprocessing_gives_the_same_scores_whether_it_is_told_or_kept(photos: Path, tmp_path: Path) -> None:
    words = ("--data", photos, "--on-broken", "skip", "--json", "--split", "all")
    kept = run("evaluate", saved(tmp_path / "kept"), *words)
    bare = saved(tmp_path / "bare", preprocess=None)
    told = run("evaluate", bare, *words, "--mean", "0.5,0.5,0.5", "--std", "0.25")
    other = run("evaluate", bare, *words, "--mean", "0.1", "--std", "0.5")
    scores = [{key: json.loads(done.stdout)[key] for key in ("loss", "top1")} for done in (kept, told, other)]
    assert scores[0] == scores[1] != scores[2]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--mean 0.5", "without the other"),
        ("--size 9", "does not say how its images are prepared"),
        ("--mean 0.5,0.5 --std 0.5", "3 channels"),
        ("--mean 0.5 --std 0.5 --size 7", "below the 8 px"),
        ("--mean 0.5 --std 0.5 --size 1000000000", "before the crop"),
        ("--mean 123 --std 58", "--mean"),
        ("--mean nan --std 0.5", "--mean"),
        ("--mean 0.5 --std 0", "--std"),
    ],
)
def test_preprocessing_that_does_not_fit_is_one_sentence(flags: str, says: str, photos: Path, tmp_path: Path) -> None:
    done = run("evaluate", saved(tmp_path / "bare", preprocess=None), "--data", photos, *flags.split())
    assert done.exit_code in (1, 2)
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_training_without_preprocessing_says_what_it_takes(photos: Path, tmp_path: Path) -> None:
    words = ["--data", photos, "--steps", "1", "--batch-size", "4", "--on-broken", "skip"]
    done = run("train", "--model", saved(tmp_path / "bare", preprocess=None), *words, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert "mean 0.5 and deviation 0.5" in done.stderr


@pytest.mark.parametrize(
    ("words", "flag"),
    [("train --model model --data photos --out", "--out"), ("predict model", "IMAGE"), ("report", "FOLDER")],
)
def test_a_place_without_a_name_is_a_misuse(
    words: str, flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # an empty folder, which no verb may take for what was meant
    done = run(*words.split(), "")
    assert done.exit_code == 2
    assert flag in done.stderr
    assert "it is empty; expected the name of a file or folder" in done.stderr


def test_only_flags_that_the_verb_has_are_offered_for_a_folder_in_use(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    for verb, offered in (("train", {"resume"}), ("demo", {"force"}), ("compress", {"force", "resume"})):
        rest = ("--model", "timm:x", "--data", "d") if verb != "demo" else ()
        rest += ("--keep-macs", "0.5") if verb == "compress" else ()
        done = run(verb, *rest, "--out", tmp_path)
        assert done.exit_code == 2, done.output
        assert {flag for flag in ("force", "resume") if f"--{flag} to" in done.stderr} == offered
