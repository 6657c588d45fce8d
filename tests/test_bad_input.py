"""Bad input: one sentence that says what is wrong, what was expected and how to mend it; a code that is not 0; nothing written.

Each case runs the command in this process, in a folder of its own, and compares that folder before and after.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.specs import make, vit
from vitrim import artifact
from vitrim.cli import main, options
from vitrim.files import sha256
from vitrim.spec import Config, ModelSpec, Prefix, Preprocess

CLASSES = ("cat", "dog", "owl")
SPEC = vit(classes=3)
VIEW = Preprocess(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), size_px=(16, 16))


@dataclass(frozen=True)
class Bad:
    """A command that must fail. says: words of its sentence. code: 1 failed, 2 misuse.  before: what is broken first.

    leaves: what a run that had begun has written by then.
    """

    name: str
    words: str
    says: tuple[str, ...]
    code: int = 1
    before: Callable[[Path], None] | None = None
    leaves: tuple[str, ...] = ()


def save_model(folder: Path, spec: ModelSpec = SPEC, labels: tuple[str, ...] | None = CLASSES) -> None:
    model = make(spec, dtype=torch.float32)
    model.config = Config(spec=spec, preprocess=VIEW, labels=labels)
    artifact.save(model, folder)


def draw_images(folder: Path, classes: tuple[str, ...], count: int = 4) -> None:
    """Pictures of noise, `count` in a subfolder for each class."""
    generator = np.random.default_rng(0)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for index in range(count):
            pixels = generator.integers(0, 255, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index}.png")


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the cases start from: a model, images of its classes, images of others, and images without classes."""
    root = tmp_path_factory.mktemp("bad")
    save_model(root / "model")
    save_model(root / "tailed", replace(SPEC, blocks=(SPEC.blocks[0], replace(SPEC.blocks[1], steps=(Prefix(),)))))
    draw_images(root / "photos", CLASSES)
    draw_images(root / "others", ("rose", "tulip"))
    draw_images(root, ("loose",))
    (root / "empty").mkdir()
    (root / "notes").mkdir()
    (root / "notes" / "a.txt").write_text("no image")
    (root / "full").mkdir()
    (root / "full" / "mine.txt").write_text("keep me")
    (root / "one.txt").write_text("text")
    return root


def change_config(root: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = root / "model" / "config.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def newer_schema(root: Path) -> None:
    change_config(root, lambda values: values.update(schema=99))


def misspelt_field(root: Path) -> None:
    def change(values: dict[str, Any]) -> None:
        attention = values["spec"]["blocks"][0]["attention"]
        attention["qk_dims"] = attention.pop("qk_dim")

    change_config(root, change)


def billion_wide(root: Path) -> None:
    change_config(root, lambda values: values["spec"].update(width=1_000_000_000))


def not_json(root: Path) -> None:
    (root / "model" / "config.json").write_text("{")


def truncated(root: Path) -> None:
    path = root / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def edited(root: Path) -> None:
    path = root / "model" / "model.safetensors"
    tensors = load_file(path)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, path)


def pickled(root: Path) -> None:
    torch.save({"a": torch.zeros(1)}, root / "model" / "model.safetensors")


def linked_away(root: Path) -> None:
    path = root / "model" / "model.safetensors"
    path.rename(root / "elsewhere.safetensors")
    path.symlink_to(root / "elsewhere.safetensors")


def no_weights(root: Path) -> None:
    (root / "model" / "model.safetensors").unlink()


def of_transformers(root: Path) -> None:
    (root / "model" / "config.json").write_text(json.dumps({"model_type": "vit", "hidden_size": 16}))


def of_timm(root: Path) -> None:
    (root / "model" / "config.json").write_text(json.dumps({"architecture": "vit_tiny_patch16_224", "num_classes": 3}))


def read_only(root: Path) -> None:
    (root / "locked").mkdir(mode=0o500)


def not_finite(root: Path) -> None:
    path, told = root / "model" / "model.safetensors", root / "model" / "provenance.json"
    tensors = load_file(path)
    tensors["heads.head.bias"].fill_(float("nan"))
    save_file(tensors, path)
    told.write_text(json.dumps({**json.loads(told.read_text()), "sha256": sha256(path)}))


def broken_image(root: Path) -> None:
    (root / "photos" / "cat" / "0.png").write_bytes(b"no picture")


def misspelt_key(root: Path) -> None:
    (root / "run.json").write_text(json.dumps({"recover": {"epoch": 1}}))


def misspelt_part(root: Path) -> None:
    (root / "run.json").write_text(json.dumps({"recovery": {"epochs": 1}}))


def misspelt_setting(root: Path) -> None:
    (root / "run.json").write_text(json.dumps({"settings": {"imagse": 8}}))


def misspelt_limit(root: Path) -> None:
    (root / "run.json").write_text(json.dumps({"settings": {"budget": {"keep_mac": 0.5}}}))


def wrong_value(root: Path) -> None:
    (root / "run.json").write_text(json.dumps({"lr": "fast"}))


def config_of_words(root: Path) -> None:
    (root / "run.json").write_text("epochs: 3")


def foreign_checkpoint(root: Path) -> None:
    save_file({"weight": torch.zeros(2, 2)}, root / "mine.safetensors")


def text_checkpoint(root: Path) -> None:
    (root / "mine.pth").write_text("not weights")


CUT = "compress --model model --data photos --out new --method comcat"
CASES = [
    # the command itself
    Bad("unknown verb", "compres", ("no such verb 'compres'", "did you mean 'compress'?"), 2),
    Bad("unknown flag", f"{CUT} --keep-mac 0.5", ("--keep-mac", "--keep-macs"), 2),
    Bad("unknown method", f"{CUT} --method comkat --keep-macs 0.5", ("'comkat' is not known", "did you mean 'comcat'?"), 2),
    Bad("planned method", f"{CUT} --method cait --keep-macs 0.5", ("'cait' is planned", "expected one of auto"), 2),
    Bad("unknown variant", f"{CUT} --variant whitend --keep-macs 0.5", ("did you mean 'whitened'?",), 2),
    Bad("unknown setting", f"{CUT} --keep-macs 0.5 --set imagse=3", ("comcat has no setting 'imagse'", "did you mean 'images'?", "Known: "), 2),
    Bad("setting of another method", f"{CUT} --keep-macs 0.5 --axes qk", ("comcat has no setting 'axes'", "auto has it"), 2),
    Bad("setting out of range", f"{CUT} --keep-macs 0.5 --set images=0", ("images=0", "expected 1 or more"), 2),
    Bad("settings that contradict", f"{CUT} --keep-macs 0.5 --images 8 --set images=9", ("contradict each other",), 2),
    Bad("missing model", "compress --keep-macs 0.5 --data photos --out new", ("--model is missing",), 2),
    Bad("missing data", "compress --model model --keep-macs 0.5 --out new", ("--data is missing", "image folder"), 2),
    Bad("missing out", "compress --model model --keep-macs 0.5 --data photos", ("--out",), 2),
    Bad("contradictory flags", f"{CUT} --keep-macs 0.5 --recover-epochs 1 --recover-steps 9", ("contradict",), 2),
    Bad("resume and force", f"{CUT} --keep-macs 0.5 --resume --force", ("--resume and --force contradict",), 2),
    Bad("bad batch list", "measure model --batch 1,x", ("'x' is not a whole number", "1,8"), 2),
    Bad("batch of zero", "measure model --batch 0", ("out of range", "1 or more"), 2),
    Bad("negative threads", "measure model --threads -2", ("--threads", "-2", "1 or more"), 2),
    Bad("negative seed", "evaluate model --data photos --seed -1", ("--seed", "0 or more"), 2),
    Bad("unknown device", "measure model --device gpu", ("device 'gpu' is not known", "expected one of auto, cpu, cuda"), 2),
    Bad("model against itself", "measure model --against model", ("names the model itself",), 2),
    Bad("unknown runtime", "measure model --runtime eagre", ("did you mean 'eager'?",), 2),
    # budgets
    Bad("no budget", CUT, ("no budget", "--keep-macs 0.5"), 2),
    Bad("budget above one", f"{CUT} --keep-macs 1.5", ("out of range", "at most 1"), 2),
    Bad("budget of zero", f"{CUT} --keep-params 0", ("out of range", "above 0"), 2),
    Bad("images for two methods", "plan --model model --keep-macs 0.9 --method auto,comcat --data photos", ("--data goes with one method",), 2),
    Bad("two lists", "plan --model model --keep-macs 0.5,0.4 --keep-params 0.5,0.4", ("both lists",), 2),
    Bad("the same budget twice", f"{CUT} --keep-macs 0.5,0.5", ("two or more different ones",), 2),
    Bad("a family out of reach", f"{CUT} --keep-macs 0.5,0.01", ("out of reach", "comcat reaches", "to 1)")),
    Bad("a frozen part that is not there", f"{CUT} --keep-macs 0.5 --freeze blocks.77", ("freeze='blocks.77'", "blocks 0 to"), 2),
    Bad("unreachable budget", f"{CUT} --keep-macs 0.01", ("out of reach", "comcat reaches", "to 1)")),
    # what it is for
    Bad("unknown product", f"{CUT} --keep-macs 0.9 --product token", ("did you mean 'tokens'?",), 2),
    Bad("product of a method that has none", f"{CUT} --keep-macs 0.9 --method uvc --product tokens", ("uvc has no setting 'product'", "auto, comcat, dcvit have it"), 2),
    Bad("tokens compared with nothing", "evaluate model --data photos --product tokens", ("pass --against DENSE",), 2),
    Bad("tokens that a tail drops", f"{CUT} --model tailed --keep-macs 0.9 --product tokens", ("exact tail", "expected a token for each patch", "--product output"), 2),
    Bad("tokens that a tail drops, planned", "plan --model tailed --keep-macs 0.9 --product tokens", ("exact tail", "--product output"), 2),
    Bad("tokens that a tail drops, scored", "evaluate tailed --against model --data photos --product tokens", ("exact tail", "--product output"), 2),
    Bad("tokens that a tail drops, learned", "recover tailed --teacher model --data photos --product tokens --out new", ("exact tail", "--product output"), 2),
    Bad("tokens learned from labels", "recover model --teacher model --data photos --product tokens --objective distilled --out new", ("product='tokens'", "expected objective='label_free'"), 2),
    # models
    Bad("unknown model", "cost timm:vit_tiny_patch16_244", ("vit_tiny_patch16_244", "did you mean", "vit_tiny_patch16_224")),
    Bad("unknown source", "cost tim:vit_tiny_patch16_224", ("no source named 'tim'", "did you mean 'timm'?")),
    Bad("unknown built-in", "cost builtin:cifar10-vit-nano", ("no built-in model 'cifar10-vit-nano'",)),
    Bad("a file as model", "cost one.txt", ("is a file", "expected")),
    Bad("hub without network", "evaluate hub:someone/nothing --data photos", ("someone/nothing",)),
    Bad("checkpoint of no shape", "evaluate model --checkpoint x.pth --data photos", ("needs a name such as timm:NAME",)),
    Bad("checkpoint and none", "evaluate timm:vit_tiny_patch16_224 --checkpoint x.pth --no-pretrained --data photos", ("contradict",), 2),
    Bad("checkpoint missing", "evaluate timm:test_vit --checkpoint gone.pth --data photos", ("gone.pth", "is not there", ".safetensors")),
    Bad("checkpoint of text", "evaluate timm:test_vit --checkpoint mine.pth --data photos", ("mine.pth",), before=text_checkpoint),
    Bad("checkpoint of another", "evaluate timm:test_vit --checkpoint mine.safetensors --data photos", ("mine.safetensors", "missing"), before=foreign_checkpoint),
    # saved folders
    Bad("newer schema", "cost model", ("schema 99", "reads up to 1", "newer vitrim"), before=newer_schema),
    Bad("newer schema, loaded", "evaluate model --data photos", ("99",), before=newer_schema),
    Bad("misspelt field", "cost model", ("unknown field 'qk_dims'", "did you mean 'qk_dim'?"), before=misspelt_field),
    Bad("config that is no JSON", "cost model", ("is not JSON",), before=not_json),
    Bad("truncated weights", "evaluate model --data photos", ("truncated", "again"), before=truncated),
    Bad("edited weights", "evaluate model --data photos", ("sha256",), before=edited),
    Bad("pickle under another name", "evaluate model --data photos", ("pickle",), before=pickled),
    Bad("link that leaves the folder", "evaluate model --data photos", ("link that leaves",), before=linked_away),
    Bad("weights missing", "evaluate model --data photos", ("model.safetensors", "missing"), before=no_weights),
    Bad("width of a billion", "evaluate model --data photos", ("1000000000",), before=billion_wide),
    Bad("folder of transformers", "evaluate model --data photos", ("transformers", "Load it as hf:"), before=of_transformers),
    Bad("folder of timm", "evaluate model --data photos", ("timm", "not an artifact", "Load it as timm:local-dir:"), before=of_timm),
    Bad("folder of pictures", "evaluate photos --data photos", ("config.json", "Expected a folder that vitrim saved")),
    # images
    Bad("no such data", "evaluate model --data gone", ("'gone'", "expected a folder of images", "Check the path")),
    Bad("empty folder", "evaluate model --data empty", ("empty", "image")),
    Bad("folder without images", "evaluate model --data notes", ("notes", "image")),
    Bad("file that is no data", "evaluate model --data one.txt", ("one.txt", "expected a folder of images or a .parquet file")),
    Bad("labels missing", "evaluate model --data loose", ("without labels", "subfolder for each class")),
    Bad("labels missing for training", "train --model model --data loose --out new", ("without labels", "subfolder")),
    Bad("classes of others", "evaluate model --data others", ("'cat'", "'rose'", "--new-head")),
    Bad("unknown split", "evaluate model --data photos --split tset", ("did you mean 'test'?",), 2),
    Bad("split that is not there", "evaluate model --data photos --split test", ("test",)),
    Bad("broken image", "evaluate model --data photos --split all", ("0.png", "not a readable image"), before=broken_image),
    Bad("image that is not there", "predict model gone.jpg", ("'gone.jpg' is not there", "expected an image file")),
    Bad("file that is no image", "predict model one.txt", ("one.txt", "not a readable image")),
    # configs, recipes and training
    Bad("misspelt config key", f"{CUT} --keep-macs 0.9 --config run.json", ("unknown key 'epoch'", "'epochs'"), 2, misspelt_key),
    Bad("misspelt config part", f"{CUT} --keep-macs 0.9 --config run.json", ("'recovery'", "did you mean 'recover'?"), 2, misspelt_part),
    Bad("misspelt setting", f"{CUT} --keep-macs 0.9 --config run.json", ("unknown key 'imagse'", "'images'"), 2, misspelt_setting),
    Bad("misspelt limit", f"{CUT} --config run.json", ("'keep_mac'", "did you mean 'keep_macs'?"), 2, misspelt_limit),
    Bad("config of another kind", "train --model model --data photos --out new --config run.json", ("is not JSON",), 2, config_of_words),
    Bad("config value of another kind", "train --model model --data photos --out new --config run.json", ("lr='fast'",), 2, wrong_value),
    Bad("config that is not there", "train --model model --data photos --out new --config gone.json", ("gone.json", "cannot be read"), 2),
    Bad("unknown recipe", "train --recipe cifar10-vit-mikro --data photos --out new", ("did you mean 'cifar10-vit-micro'?",), 2),
    Bad("neither model nor recipe", "train --data photos --out new", ("--model", "--recipe"), 2),
    Bad("recovery without teacher", "recover model --data photos --out new", ("--teacher is missing", "--objective supervised"), 2),
    Bad("batch above the data", "train --model model --data photos --out new --batch-size 64", ("64",)),
    Bad("weights that are no numbers", "evaluate model --data photos", ("heads.head.bias", "NaN"), before=not_finite),
    Bad("loss that is no number", "train --model model --data photos --out new --batch-size 4 --steps 2 --lr 9e18", ("step 2 of 2", "Lower lr"), leaves=("new", "new/metrics.jsonl", *(f"new/checkpoints{x}" for x in ("", "/step-00000001", "/step-00000001/state.json", "/step-00000001/state.safetensors")))),
    # places
    Bad("out is not empty", "compress --model model --keep-macs 0.9 --data photos --out full", ("is not empty", "--force"), 2),
    Bad("out is a file", "compress --model model --keep-macs 0.9 --data photos --out one.txt", ("is a file", "expected a folder"), 2),
    Bad("out below a file", "compress --model model --keep-macs 0.9 --data photos --out one.txt/new", ("is a file",), 2),
    Bad("force on a foreign folder", "compress --model model --keep-macs 0.9 --data photos --out full --force", ("did not write",), 2),
    Bad("resume without a run", f"{CUT} --keep-macs 0.9 --resume", ("--resume found no run", "leave --resume out"), 2),
    Bad("report of no run", "report model", ("summary.json", "expected")),
    Bad("report of nothing", "report gone", ("gone", "expected")),
    Bad("push of nothing", "push gone someone/model", ("gone", "expected")),
    Bad("push to a bad name", "push model 'a b'", ("a b",)),
]  # fmt: skip


def contents(root: Path) -> dict[str, bytes | None]:
    """Every file below, with its bytes; folders as None."""
    return {str(p.relative_to(root)): p.read_bytes() if p.is_file() else None for p in sorted(root.rglob("*"))}


def copied(stage: Path, root: Path) -> None:
    shutil.copytree(stage, root, dirs_exist_ok=True)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input_is_told_in_one_sentence_and_writes_nothing(
    case: Bad, stage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied(stage, tmp_path)
    if case.before is not None:
        case.before(tmp_path)
    monkeypatch.chdir(tmp_path)
    before = contents(tmp_path)
    done = CliRunner().invoke(main, shlex.split(case.words))
    assert done.exception is None or isinstance(done.exception, SystemExit), repr(done.exception)
    assert done.exit_code == case.code, done.output
    assert done.stdout == ""
    for word in case.says:
        assert word in done.stderr
    told = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert len(told) == 1
    assert "Traceback" not in done.stderr
    assert str(tmp_path) not in told[0] or case.name == "link that leaves the folder"
    after = contents(tmp_path)
    assert {path: data for path, data in after.items() if path not in case.leaves} == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_place_is_refused_before_any_work(
    stage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied(stage, tmp_path)
    read_only(tmp_path)
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(main, [*CUT.split()[:-1], "locked/new", "--keep-macs", "0.9"])
    assert done.exit_code == 2
    assert "no permission" in done.stderr


def test_a_place_that_may_not_be_written_is_refused_before_any_work(
    stage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied(stage, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(options.os, "access", lambda *_: False)
    before = contents(tmp_path)
    done = CliRunner().invoke(main, [*CUT.split(), "--keep-macs", "0.9"])
    assert done.exit_code == 2
    assert "cannot be written: no permission" in done.stderr
    assert contents(tmp_path) == before


def test_a_full_disk_is_told_in_one_sentence(stage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", "new")

    copied(stage, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("vitrim.cli.cost.spec_named", full)
    done = CliRunner().invoke(main, ["cost", "model"])
    assert done.exit_code == 1
    assert done.stderr.strip().startswith("Error: cannot read or write 'new': No space left on device.")


def test_an_image_of_another_size_is_resized_as_the_model_says(
    stage: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    copied(stage, tmp_path)
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (40, 23)).save("wide.png")
    done = CliRunner().invoke(main, ["predict", "model", "wide.png", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)["predictions"]["wide.png"]
    assert {answer["label"] for answer in found} == set(CLASSES)


def test_a_model_of_another_size_is_refused_by_the_network(
    stage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied(stage, tmp_path)
    monkeypatch.chdir(tmp_path)
    change_config(tmp_path, lambda values: values["spec"].update(image_px=[3, 16]))
    done = CliRunner().invoke(main, ["cost", "model"])
    assert done.exit_code == 1
    assert "image_px" in done.stderr


def test_a_classifier_is_asked_for_where_names_are_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = replace(SPEC, outputs=())
    save_model(tmp_path / "encoder", spec, labels=None)
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (16, 16)).save("a.png")
    done = CliRunner().invoke(main, ["predict", "encoder", "a.png"])
    assert done.exit_code == 2
    assert "no classifier" in done.stderr
    assert "--new-head" in done.stderr


def test_a_step_in_a_place_where_it_cannot_be_is_told(
    stage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied(stage, tmp_path)
    monkeypatch.chdir(tmp_path)
    first, last = SPEC.blocks
    good = replace(SPEC, blocks=(first, replace(last, steps=(Prefix(),))))
    blocks = good.to_dict()["blocks"]
    change_config(tmp_path, lambda values: values["spec"].update(blocks=blocks[::-1]))
    done = CliRunner().invoke(main, ["cost", "model"])
    assert done.exit_code == 1
    assert "block 0" in done.stderr
