"""T2T-ViT's published names and the files of its authors, UVC's copy included."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tests.sources.t2t.kit import PUBLISHED, pictures
from tests.specs import close
from tests.t2t_reference import T2T_ViT, tiny
from vitrim import sources
from vitrim.architectures import t2t as names
from vitrim.counting import cost
from vitrim.errors import SourceError
from vitrim.model import Vit
from vitrim.sources import t2t
from vitrim.sources.t2t.read import shapes_of
from vitrim.spec import Config, ModelSpec, T2TPerformer, T2TTransformer


@pytest.fixture
def tiny_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two small networks among the published names, of the shapes that `tiny` makes."""
    monkeypatch.setitem(names.SIZES, "tiny", (24, 3, 3, 2, T2TPerformer(token_dim=8, features=4)))
    monkeypatch.setitem(names.SIZES, "tiny_t", (24, 3, 3, 2, T2TTransformer(token_dim=8)))


# -------------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_network_has_the_keys_shapes_and_numbers_of_its_sheet(name: str) -> None:
    arguments, params, trainable, gmacs = PUBLISHED[name]
    kind = "transformer" if "_t_" in name else "performer"
    with torch.device("meta"):
        theirs = T2T_ViT(tokens_type=kind, **arguments)
        ours = Vit(Config(spec=names.spec(name)))
    shapes = {key: tuple(value.shape) for key, value in theirs.state_dict().items()}
    assert shapes_of(ours.spec) == shapes
    assert t2t.spec_of(theirs) == ours.spec
    assert cost(ours.spec).params == sum(p.numel() for p in ours.parameters()) == params
    assert sum(p.numel() for p in ours.parameters() if p.requires_grad) == trainable
    assert cost(ours.spec).macs == pytest.approx(gmacs * 1e9, rel=0.01)
    if arguments["depth"] == 14:
        assert len(shapes) == (184 if kind == "transformer" else 188)


def test_macs_by_our_count_leave_out_the_sheets_elementwise_work() -> None:
    found = {name: cost(spec).macs for name, spec in names.specs().items()}
    assert (found["t2t_vit_14"], found["t2t_vit_t_14"]) == (4_783_468_544, 6_088_721_920)
    assert sorted(found) == names.names() == sorted(PUBLISHED)


def test_names_need_no_torch() -> None:
    code = "import sys; from vitrim.architectures import t2t; t2t.specs(); assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_a_random_network_by_name_has_the_authors_preprocessing_and_classes() -> None:
    model = t2t.load("t2t_vit_7", pretrained=False, classes=10)
    assert model.spec == names.spec("t2t_vit_7", classes=10)
    preprocess = model.config.preprocess
    assert preprocess is not None
    assert (preprocess.size_px, preprocess.crop, preprocess.interpolation) == ((224, 224), 0.9, "bicubic")
    assert preprocess.mean == (0.485, 0.456, 0.406)
    assert model(torch.zeros(1, 3, 224, 224)).shape == (1, 10)
    assert model.provenance == {"source": "t2t:t2t_vit_7", "weights": "random"}
    assert t2t.load("t2t_vit_7", pretrained=False, classes=0).spec.outputs == ()


def test_published_weights_are_asked_for_as_a_file() -> None:
    with pytest.raises(SourceError, match=r"cannot be fetched.*--checkpoint PATH.*--no-pretrained"):
        t2t.load("t2t_vit_14")
    with pytest.raises(SourceError, match=r"no model 't2t_vit_t14'; did you mean 't2t_vit_t_14'"):
        t2t.load("t2t_vit_t14", pretrained=False)


def test_specs_by_name_are_what_the_design_costs() -> None:
    spec = names.spec("t2t_vit_14")
    assert isinstance(spec, ModelSpec)
    found = cost(spec)
    assert found.stem_params - 384 * (1 + 197) == 391_526  # the sheet's module, without class token and table
    assert math.isclose(found.stem_macs, 0.305e9, rel_tol=0.06)  # the sheet adds elementwise work


# --------------------------------------------------------------------------------------------------------------- files


def container(kind: str, state: dict[str, torch.Tensor], path: Path) -> Path:
    """The ways in which files of this network are found."""
    other = {name: torch.zeros_like(value) for name, value in state.items()}
    wrapped = {f"module.{name}": value for name, value in state.items()}
    if kind == "safetensors":
        save_file(state, path / "t.safetensors")
        return path / "t.safetensors"
    content: Any = {
        "bare": state,
        "state_dict": {"state_dict": state, "epoch": 310, "arch": "t2t_vit_14"},
        "averaged": {"state_dict": other, "state_dict_ema": state, "metric": 81.5},
        "cifar": {"net": wrapped, "acc": 98.3, "epoch": 59},
        "half": {name: value.half() for name, value in state.items()},
    }[kind]
    torch.save(content, path / "t.pth.tar")
    return path / "t.pth.tar"


@pytest.mark.usefixtures("tiny_names")
@pytest.mark.parametrize("kind", ["bare", "state_dict", "averaged", "cifar", "half", "safetensors"])
def test_a_file_is_read_in_the_containers_of_its_authors(kind: str, tmp_path: Path) -> None:
    module = tiny(img_size=224).float()
    if kind == "half":
        module = module.half().float()
    file = container(kind, module.state_dict(), tmp_path)
    model = sources.load("t2t:tiny", checkpoint=file)
    assert model.spec == replace(names.spec("tiny"), outputs=model.spec.outputs)
    assert model.spec.classes == 5
    x = torch.randn(1, 3, 224, 224)
    assert close(module(x), model(x), 1e-5)
    assert model.provenance == {"source": "t2t:tiny", "weights": file.name}


@pytest.mark.usefixtures("tiny_names")
def test_a_file_of_another_image_size_keeps_its_own_table(tmp_path: Path) -> None:
    module = tiny("transformer", img_size=48).float()
    model = t2t.load("tiny_t", checkpoint=container("bare", module.state_dict(), tmp_path))
    assert (model.spec.image_px, model.spec.position.grid) == ((48, 48), (3, 3))
    assert model.config.preprocess is not None
    assert model.config.preprocess.size_px == (48, 48)
    assert close(module(pictures(module).float()), model(pictures(module).float()), 1e-5)


@pytest.mark.usefixtures("tiny_names")
def test_the_classifier_of_a_file_is_kept_dropped_or_named(tmp_path: Path) -> None:
    file = container("bare", tiny().float().state_dict(), tmp_path)
    assert t2t.load("tiny", checkpoint=file, classes=5).spec.classes == 5
    assert t2t.load("tiny", checkpoint=file, classes=0).spec.outputs == ()
    with pytest.raises(SourceError, match=r"classes=7: the classifier in t\.pth\.tar has 5 classes.*--new-head"):
        t2t.load("tiny", checkpoint=file, classes=7)


@pytest.mark.usefixtures("tiny_names")
@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("tiny", "missing", r"missing: blocks\.2\.norm1\.weight"),
        ("tiny", "more", r"unexpected: blocks\.0\.extra"),
        ("tiny_t", "", r"missing: tokens_to_token\.attention1\.attn\.qkv\.weight.*unexpected: tokens_to_token"),
        ("t2t_vit_7", "", r"of another shape: cls_token \(1, 1, 24\) \(expected \(1, 1, 256\)\)"),
        ("tiny", "table", "a position table of 7 rows"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_with_the_names(
    name: str, change: str, message: str, tmp_path: Path
) -> None:
    state = tiny().float().state_dict()
    if change == "missing":
        del state["blocks.2.norm1.weight"]
    elif change == "more":
        state["blocks.0.extra"] = torch.zeros(2)
    elif change == "table":
        state["pos_embed"] = torch.zeros(1, 7, 24)
    with pytest.raises(SourceError, match=message):
        t2t.load(name, checkpoint=container("bare", state, tmp_path))


def gated(state: dict[str, torch.Tensor], runs: tuple[bool, ...]) -> dict[str, torch.Tensor]:
    """A state as UVC's copy of the network has it; every half runs."""
    gates = torch.tensor([[0.2, 0.9] if run else [0.7, 0.1] for run in runs])
    halves = {f"blocks.{i}.{half}_skip_gating": torch.tensor([0.0, 1.0]) for i in range(3) for half in ("attn", "mlp")}
    return {**state, "block_skip_gating": gates, **halves}


@pytest.mark.usefixtures("tiny_names")
def test_a_file_of_uvcs_copy_loses_its_gates_and_its_skipped_blocks(tmp_path: Path) -> None:
    module = tiny().float()
    model = t2t.load("tiny", checkpoint=container("bare", gated(module.state_dict(), (True, False, True)), tmp_path))
    assert [block.attention is None and block.mlp is None for block in model.spec.blocks] == [False, True, False]
    assert model.provenance["skipped_blocks"] == "1"
    del module.blocks[1]
    x = pictures(module).float()
    assert close(module(x), model(x), 1e-5)
    assert set(t2t.to_state(model)) == set(module.state_dict())
    shut = gated(module.state_dict(), (True, True, True))
    shut["blocks.2.attn_skip_gating"] = torch.tensor([0.5, 0.5])
    with pytest.raises(SourceError, match="block 2 has its attn gate closed"):
        t2t.load("tiny", checkpoint=container("bare", shut, tmp_path))


def test_uvcs_copy_in_memory_is_read_with_its_answer_in_a_pair() -> None:
    class Copy(T2T_ViT):
        def forward(self, x: torch.Tensor) -> Any:
            blocks = self.blocks
            run = [block for block, gate in zip(blocks, self.block_skip_gating, strict=True) if gate[1] > gate[0]]
            self.blocks = nn.ModuleList(run)
            found = super().forward(x), 1e9
            self.blocks = blocks
            return found

    module = tiny().float()
    module.__class__ = Copy
    module.block_skip_gating = nn.Parameter(torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0]]))
    model = t2t.from_module(module)
    assert model.spec.blocks[1].attention is None
    assert close(module(pictures(module).float())[0], model(pictures(module).float()), 1e-5)
    with pytest.raises(SourceError, match="gates without values"):
        t2t.spec_of(module.to("meta"))
