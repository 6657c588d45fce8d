"""One `load` for every kind of name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

import vitrim
from vitrim import artifact, hub
from vitrim.errors import ArtifactError, ConfigError, SourceError, VitrimError
from vitrim.model import Vit, build
from vitrim.sources import builtin
from vitrim.spec import AttentionSpec, BlockSpec, Config, MlpSpec, ModelSpec, Output, Position, ProblemType


def spec(classes: int = 3) -> ModelSpec:
    block = BlockSpec(attention=AttentionSpec(heads=2, qk_dim=4, v_dim=4, scale=0.5), mlp=MlpSpec(hidden=8))
    return ModelSpec(
        image_px=(8, 8),
        patch_px=(4, 4),
        width=8,
        position=Position(grid=(2, 2)),
        blocks=(block,),
        outputs=(Output(classes=classes),),
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    artifact.save(build(spec()), tmp_path / "small")
    return tmp_path / "small"


def equal(a: Vit, b: Vit) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_a_folder_is_loaded_by_its_path(folder: Path) -> None:
    assert equal(vitrim.load(folder), vitrim.load(str(folder)))
    assert vitrim.load(folder, classes=3).spec == spec()


def test_a_folder_without_its_weights_gives_random_ones_of_its_shape(folder: Path) -> None:
    fresh = vitrim.load(folder, pretrained=False)
    assert fresh.spec == spec()
    assert not equal(fresh, vitrim.load(folder))


def test_other_classes_than_the_folders_are_refused(folder: Path) -> None:
    with pytest.raises(SourceError, match=r"classes=5: .* has 3 classes.*--new-head"):
        vitrim.load(folder, classes=5)


def test_a_checkpoint_belongs_to_timm_names(folder: Path) -> None:
    with pytest.raises(SourceError, match="a checkpoint needs a name such as timm:NAME"):
        vitrim.load(folder, checkpoint="x.pth")


def test_builtin_models_are_artifacts_in_the_package(folder: Path) -> None:
    assert builtin.names(folder.parent) == ["small"]
    assert equal(builtin.load("small", folder.parent), vitrim.load(folder))
    with pytest.raises(SourceError, match="did you mean 'small'"):
        builtin.load("smal", folder.parent)
    with pytest.raises(SourceError, match="no built-in model 'cifar100-vit'"):
        vitrim.load("builtin:cifar100-vit")


def test_a_file_is_refused_with_the_way_to_use_it(tmp_path: Path) -> None:
    (tmp_path / "mine.pth").write_bytes(b"x")
    with pytest.raises(SourceError, match=r"timm:NAME .*with checkpoint='mine\.pth'"):
        vitrim.load(tmp_path / "mine.pth")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("deit_small_patch16_224", "did you mean 'timm:deit_small_patch16_224'"),
        ("deit_smal_patch16_224", "did you mean 'timm:deit_small_patch16_224'"),
        ("tim:deit_small_patch16_224", "no source named 'tim'; did you mean 'timm'"),
        ("runs", "no model 'runs'.*expected timm:NAME"),
        ("", "expected timm:NAME"),
    ],
)
def test_names_of_nothing_give_the_near_miss_or_what_is_expected(name: str, words: str, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        with pytest.raises((SourceError, ArtifactError), match=words):
            vitrim.load(name)


def test_hub_names_are_fetched_and_a_mistyped_folder_says_both(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    asked = []

    def fetch(name: str) -> Vit:
        asked.append(name)
        if name == "runs/teacher":
            raise ArtifactError("runs/teacher: not found.")
        return artifact.load(folder)

    monkeypatch.setattr(hub, "load_hub", fetch)
    vitrim.load("hub:someone/small")
    vitrim.load("someone/small")
    assert asked == ["someone/small"] * 2
    with pytest.raises(SourceError, match=r"no folder 'runs/teacher' here.*not found"):
        vitrim.load("runs/teacher")


def test_loading_a_folder_does_not_import_timm(folder: Path) -> None:
    code = f"import sys, vitrim; vitrim.load({str(folder)!r}); assert 'timm' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_folder_is_resized_when_asked_and_a_size_that_is_none_is_refused(folder: Path) -> None:
    model = vitrim.load(folder)
    side = 2 * model.spec.image_px[0]
    sized = vitrim.load(folder, image_px=side)
    x = torch.randn(1, 3, side, side)
    assert torch.equal(sized(x), model(x))
    assert sized.spec.image_px == (side, side)
    for wrong in (0, -8, (8,), (8, 0), True, 10**9):
        with pytest.raises(VitrimError, match="image_px"):
            vitrim.load(folder, image_px=wrong)  # type: ignore[arg-type]


def test_a_module_whose_weights_are_no_numbers_is_refused_with_the_tensor() -> None:
    import timm

    module = timm.create_model("test_vit")
    with torch.no_grad():
        module.blocks[0].norm1.bias[3] = float("nan")
    with pytest.raises(SourceError, match=r"VisionTransformer: 'blocks\.0\.norm1\.bias' holds 1 of 64 numbers"):
        vitrim.from_model(module, verify=False)


def classifying(kind: ProblemType) -> Vit:
    """A small network that each library's own class can say, for images of 3 channels."""
    attention = AttentionSpec(heads=2, qk_dim=4, v_dim=4, scale=0.5)
    small = ModelSpec(
        image_px=(8, 8),
        patch_px=(4, 4),
        width=8,
        position=Position(grid=(2, 2), prefix_rows=True),
        blocks=(BlockSpec(attention=attention, mlp=MlpSpec(hidden=8)),),
        outputs=(Output(classes=3),),
    )
    return build(Config(spec=small, task="classification", problem_type=kind))


@pytest.mark.parametrize(
    ("format", "prefix"), [("timm", "timm:local-dir:"), ("torchvision", "torchvision:"), ("hf", "hf:")]
)
def test_an_export_keeps_how_the_classes_are_meant_and_its_folder_says_how_it_is_loaded(
    format: str, prefix: str, tmp_path: Path
) -> None:
    if format == "hf":
        pytest.importorskip("transformers")
    for kind in get_args(ProblemType):
        out = vitrim.sources.write(classifying(kind), format, tmp_path / kind)
        assert vitrim.load(f"{prefix}{out}").config.problem_type == kind
    with pytest.raises(ArtifactError, match=rf"Load it as {prefix}{out}\."):
        vitrim.load(out)
    for name in ("timm:", "torchvision:"):
        with pytest.raises(SourceError, match=r"has no (model|Vision Transformer) ''"):
            vitrim.load(name)
    if format != "torchvision":
        with pytest.raises(SourceError, match=f"{prefix}{out}"):
            vitrim.load(f"timm:{out}" if format == "timm" else f"timm:local-dir:{out}")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"name": torch.nn.Linear(2, 2)}, "name is a Linear; .*from_model"),
        ({"name": None}, "name is a NoneType"),
        ({"checkpoint": {"a": torch.ones(1)}}, "checkpoint is a dict; expected the path"),
        ({"checkpoint": "x.pth", "checkpoint_key": 3}, "checkpoint_key is a int"),
        *(({"classes": n}, "classes=.*; expected a whole number from 0 to") for n in (-3, "10", 10.0, True, 2**40)),
    ],
)
def test_arguments_of_another_kind_are_refused_before_anything_is_built(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        vitrim.load(**{"name": "timm:vit_tiny_patch16_224", "pretrained": False, **given})


def test_what_is_exported_is_a_model_of_finite_numbers(tmp_path: Path) -> None:
    model = classifying("single_label_classification")
    with pytest.raises(SourceError, match="cannot export a Linear"):
        vitrim.sources.write(torch.nn.Linear(2, 2), "timm", tmp_path / "out")  # type: ignore[arg-type]
    with torch.no_grad():
        model.get_parameter("blocks.0.mlp.fc1.weight").fill_(float("nan"))
    with pytest.raises(SourceError, match=r"the model is not exported: 'blocks\.0\.mlp\.fc1\.weight' holds"):
        vitrim.sources.write(model, "timm", tmp_path / "out")
    assert not (tmp_path / "out").exists()
