"""T2T-ViT: laws 3 and 5 for the family, its files, and the way back. The counterpart is a network written in plain torch."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.specs import close, images, make, vit
from tests.t2t_reference import T2T_ViT, tiny
from torch import nn

from vitrim import artifact, sources
from vitrim.budget import Budget
from vitrim.counting import cost
from vitrim.errors import SourceError
from vitrim.methods import comcat
from vitrim.model import Masks, Vit
from vitrim.sources import t2t, t2t_names
from vitrim.spec import Config, Merge, ModelSpec, T2TPerformer, T2TTransformer
from vitrim.surgery import Keep, cut, drop, exact_tail, fold_layer_scale, masked_twin

# name: arguments of the authors' class, parameters, trainable ones, GMACs (the sheet's counted columns)
PUBLISHED: dict[str, tuple[dict[str, Any], int, int, float]] = {
    "t2t_vit_7": ({"embed_dim": 256, "depth": 7, "num_heads": 4, "mlp_ratio": 2.0}, 4_310_222, 4_255_694, 1.156),
    "t2t_vit_10": ({"embed_dim": 256, "depth": 10, "num_heads": 4, "mlp_ratio": 2.0}, 5_889_230, 5_834_702, 1.527),
    "t2t_vit_12": ({"embed_dim": 256, "depth": 12, "num_heads": 4, "mlp_ratio": 2.0}, 6_941_902, 6_887_374, 1.775),
    "t2t_vit_14": ({"embed_dim": 384, "depth": 14, "num_heads": 6, "mlp_ratio": 3.0}, 21_545_550, 21_465_806, 4.800),
    "t2t_vit_19": ({"embed_dim": 448, "depth": 19, "num_heads": 7, "mlp_ratio": 3.0}, 39_177_422, 39_085_070, 8.503),
    "t2t_vit_24": ({"embed_dim": 512, "depth": 24, "num_heads": 8, "mlp_ratio": 3.0}, 64_105_934, 64_000_974, 13.69),
    "t2t_vit_t_14": ({"embed_dim": 384, "depth": 14, "num_heads": 6, "mlp_ratio": 3.0}, 21_541_070, 21_465_422, 6.106),
    "t2t_vit_t_19": ({"embed_dim": 448, "depth": 19, "num_heads": 7, "mlp_ratio": 3.0}, 39_172_942, 39_084_686, 9.808),
    "t2t_vit_t_24": ({"embed_dim": 512, "depth": 24, "num_heads": 8, "mlp_ratio": 3.0}, 64_101_454, 64_000_590, 15.00),
    "t2t_vit_14_wide": (
        {"embed_dim": 768, "depth": 4, "num_heads": 12, "mlp_ratio": 3.0},
        25_156_302,
        25_000_910,
        5.242,
    ),
    "t2t_vit_14_resnext": (
        {"embed_dim": 384, "depth": 14, "num_heads": 32, "mlp_ratio": 3.0},
        21_545_550,
        21_465_806,
        4.800,
    ),
}
VARIANTS: dict[str, dict[str, Any]] = {
    "performer": {},
    "transformer": {"tokens_type": "transformer"},
    "performer, qkv bias, other scale": {"qkv_bias": True, "qk_scale": 24**-0.5},
    "transformer, one channel, encoder": {"tokens_type": "transformer", "in_chans": 1, "num_classes": 0},
    "performer, 48 px, many heads": {"img_size": 48, "num_heads": 8, "mlp_ratio": 3.0},
}


@pytest.fixture
def tiny_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two small networks among the published names, of the shapes that `tiny` makes."""
    monkeypatch.setitem(t2t_names.SIZES, "tiny", (24, 3, 3, 2, T2TPerformer(token_dim=8, features=4)))
    monkeypatch.setitem(t2t_names.SIZES, "tiny_t", (24, 3, 3, 2, T2TTransformer(token_dim=8)))


def read(module: nn.Module, **options: Any) -> Vit:
    """Our model of a reference network, in float64 with all digits."""
    model = t2t.from_module(module, **options).double()
    exact = t2t.weights_of(module, model.spec)
    assert all(torch.equal(exact[name].double(), value) for name, value in model.state_dict().items())
    state = {name: value.double() for name, value in module.state_dict().items()}
    with torch.no_grad():
        for theirs, ours in t2t._places(model.spec).items():
            if not ours.endswith("qkv_bias"):
                target = model.get_parameter(ours)
                target.copy_(state[theirs].reshape(target.shape))
    return model


def pictures(module: nn.Module, count: int = 2, px: int | None = None) -> torch.Tensor:
    spec = t2t.spec_of(module)
    return images(spec if px is None else replace(spec, image_px=(px, px)), count)


# -------------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_network_has_the_keys_shapes_and_numbers_of_its_sheet(name: str) -> None:
    arguments, params, trainable, gmacs = PUBLISHED[name]
    kind = "transformer" if "_t_" in name else "performer"
    with torch.device("meta"):
        theirs = T2T_ViT(tokens_type=kind, **arguments)
        ours = Vit(Config(spec=t2t_names.spec(name)))
    shapes = {key: tuple(value.shape) for key, value in theirs.state_dict().items()}
    assert t2t._shapes(ours.spec) == shapes
    assert t2t.spec_of(theirs) == ours.spec
    assert cost(ours.spec).params == sum(p.numel() for p in ours.parameters()) == params
    assert sum(p.numel() for p in ours.parameters() if p.requires_grad) == trainable
    assert cost(ours.spec).macs == pytest.approx(gmacs * 1e9, rel=0.01)
    if arguments["depth"] == 14:
        assert len(shapes) == (184 if kind == "transformer" else 188)


def test_macs_by_our_count_leave_out_the_sheets_elementwise_work() -> None:
    found = {name: cost(spec).macs for name, spec in t2t_names.specs().items()}
    assert (found["t2t_vit_14"], found["t2t_vit_t_14"]) == (4_783_468_544, 6_088_721_920)
    assert sorted(found) == t2t_names.names() == sorted(PUBLISHED)


def test_names_need_no_torch() -> None:
    code = "import sys; from vitrim.sources import t2t_names; t2t_names.specs(); assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_a_random_network_by_name_has_the_authors_preprocessing_and_classes() -> None:
    model = t2t.load("t2t_vit_7", pretrained=False, classes=10)
    assert model.spec == t2t_names.spec("t2t_vit_7", classes=10)
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


# ------------------------------------------------------------------------------------------------- law 5: from memory


@pytest.mark.parametrize("variant", VARIANTS)
def test_law_5_logits_and_features_are_the_modules_own(variant: str) -> None:
    module = tiny(**VARIANTS[variant]).float().double()
    model, x = read(module), pictures(module)
    streams: list[torch.Tensor] = []
    hooks = [block.register_forward_hook(lambda _m, _i, out: streams.append(out)) for block in module.blocks]
    expected = module(x)
    for hook in hooks:
        hook.remove()
    assert close(expected, model(x))
    found = model(x, want=tuple(f"block:{i}" for i in range(3)))
    assert all(close(stream, found[f"block:{i}"]) for i, stream in enumerate(streams))


@pytest.mark.parametrize("kind", ["performer", "transformer"])
def test_law_5_another_resolution_is_the_network_built_for_it(kind: str) -> None:
    module = tiny(kind).float().double()
    larger = tiny(kind, img_size=48).double()
    table = larger.pos_embed.detach().clone()
    larger.load_state_dict({**module.state_dict(), "pos_embed": table})
    model = read(module)
    assert close(larger(pictures(module, px=48)), model(pictures(module, px=48)), 1e-7)  # tables are float32 in both


@pytest.mark.parametrize("variant", ["performer", "transformer"])
def test_law_3_cut_equals_masked(variant: str) -> None:
    module = tiny(**VARIANTS[variant]).float().double()
    model, x = read(module), pictures(module)
    keeps = [
        Keep(heads=(0, 2), qk=((0, 3, 5), (1, 2, 7)), v=((0, 1), (4, 6)), hidden=tuple(range(0, 48, 3))),
        None,
        Keep(attention=False),
    ]
    smaller = cut(model, keeps, method="test")
    assert close(model(x, masks=masked_twin(model, keeps)), smaller(x))
    assert cost(smaller.spec).stem_macs == cost(model.spec).stem_macs
    assert cost(smaller.spec).params == sum(p.numel() for p in smaller.parameters()) < cost(model.spec).params
    assert close(model(x), fold_layer_scale(model)(x))
    assert close(model(x), exact_tail(model)(x))


def test_the_callers_module_and_random_state_stay_as_they_are() -> None:
    module = tiny().float().train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    state = torch.get_rng_state()
    model = t2t.from_module(module)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert module.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


def test_a_module_from_memory_is_recognised_by_its_structure() -> None:
    class Mine(T2T_ViT):
        """A user's subclass."""

    module = tiny().float()
    module.__class__ = Mine
    model = sources.from_model(module)
    assert isinstance(model.spec.stem, T2TPerformer)
    assert model.config.preprocess is not None


def test_a_table_that_is_not_the_sinusoids_is_resized_and_not_rebuilt() -> None:
    module = tiny().float()
    assert t2t.spec_of(module).position.resize == "rebuild_1d"
    assert t2t.spec_of(module.half()).position.resize == "rebuild_1d"
    with torch.no_grad():
        module.pos_embed[0, 2] += 0.5
    assert t2t.spec_of(module).position.resize == "bicubic"


# ------------------------------------------------------------------------------------------------------------ refusals


def spoiled(what: str) -> nn.Module:
    """A network that T2T-ViT's spec cannot say."""
    module: Any = tiny(tokens_type="transformer" if what == "scale" else "performer").float()
    stem = module.tokens_to_token
    if what == "extra":
        module.blocks[1].attn.se_layer = nn.Linear(24, 24)
    elif what == "tokeniser":
        stem.soft_split0 = nn.Conv2d(3, 8, 7, 4, 2)
    elif what == "padding":
        stem.soft_split1 = nn.Unfold((3, 3), stride=(2, 2), padding=(0, 0))
    elif what == "scale":
        stem.attention1.attn.scale = 8**-0.5
    elif what == "epsilon":
        stem.attention2.epsilon = 1e-6
    elif what == "eps":
        module.blocks[2].norm1.eps = 1e-6
    elif what == "activation":
        module.blocks[0].mlp.act = nn.ReLU()
    elif what == "head":
        module.head = nn.Sequential(nn.Linear(24, 5))
    elif what == "missing":
        del module.blocks[1].norm2
    elif what == "stage":
        del stem.attention2.norm1
    elif what == "no table":
        module.pos_embed = None
    elif what == "table":
        module.pos_embed = nn.Parameter(torch.zeros(1, 7, 24), requires_grad=False)
    elif what == "quantised":
        module.blocks[0].attn.qkv = nn.Sequential(nn.Linear(24, 72))
    else:
        return nn.Linear(3, 3)
    return module


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("extra", r"numbers that a plain one does not have: blocks\.1\.attn\.se_layer"),
        ("tokeniser", r"tokeniser of another design \(soft_split0: Conv2d\)"),
        ("padding", r"another padding or dilation \(soft_split1"),
        ("scale", r"another scale than 147 \*\* -0\.5 \(tokens_to_token\.attention1\)"),
        ("epsilon", r"another epsilon than 1e-08 \(tokens_to_token\.attention2\)"),
        ("eps", r"norms with different eps \[1e-06, 1e-05\]"),
        ("activation", r"the activation ReLU\(\) \(block 0\)"),
        ("head", "a classifier that is more than one linear"),
        ("missing", r"block 1: Block without norm2"),
        ("table", "a position table of 7 rows"),
        ("quantised", "a Sequential as qkv in block 0"),
        ("stage", r"tokens_to_token\.attention2: Token_performer without norm1"),
        ("no table", "no position table"),
        ("other", "Linear without tokens_to_token, cls_token"),
    ],
)
def test_what_the_spec_cannot_say_is_refused_by_name(what: str, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        t2t.from_module(spoiled(what))


def test_a_changed_forward_is_refused_with_the_first_block_that_differs() -> None:
    module = tiny().float()
    attn = module.blocks[1].attn
    whole = type(attn).forward
    attn.forward = lambda x: whole(attn, x) * 1.5
    with pytest.raises(SourceError, match="first in block 1"):
        t2t.from_module(module)
    assert t2t.from_module(module, verify=False).spec == t2t.spec_of(module)


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
    assert model.spec == replace(t2t_names.spec("tiny"), outputs=model.spec.outputs)
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


# ----------------------------------------------------------------------------------------------------------------- back


@pytest.mark.parametrize("suffix", [".pth.tar", ".safetensors"])
@pytest.mark.parametrize("kind", ["performer", "transformer"])
def test_a_compressed_network_goes_back_to_its_authors_class(kind: str, suffix: str, tmp_path: Path) -> None:
    """Fewer blocks, a uniform MLP and an exact tail."""
    model = read(tiny(kind).float().double())
    halves = [Keep(hidden=tuple(range(0, 48, 2)))] * 3
    smaller = exact_tail(drop(cut(model, halves, method="test"), attention=[1], mlp=[1], method="test"))
    file = t2t.write(smaller, tmp_path / f"small{suffix}")
    state = load_file(file) if suffix == ".safetensors" else torch.load(file, weights_only=True)
    module = tiny(kind, depth=2, mlp_ratio=1.0)
    module.load_state_dict(state, strict=True)
    x = images(model.spec, 3)
    assert close(module(x), smaller(x))
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_reading_and_writing_gives_the_same_file_back(tmp_path: Path) -> None:
    for fields in ({}, {"tokens_type": "transformer"}, {"qkv_bias": True}, {"num_classes": 0}):
        module = tiny(**fields).float()
        state = t2t.to_state(t2t.from_module(module))
        assert sorted(state) == sorted(module.state_dict())
        assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    out = sources.write(t2t.from_module(module), "t2t", tmp_path / "back.pth.tar")
    assert len(torch.load(out, weights_only=True)) == len(state)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (
            "heads",
            r"block 1 has 2 heads of 8 \(values 8\), and T2T-ViT wants heads times head width equal to the width 24",
        ),
        ("half", "block 2 has no attention, and T2T-ViT's blocks have both halves"),
        ("hidden", r"block 1 differs from block 0 \(MLP units 7, there 48\)"),
        ("steps", "block 0 merges tokens"),
        ("splits", r"its soft splits have kernels \(7, 3, 3\) and strides \(2, 2, 1\)"),
        ("stem", "its stem is one convolution"),
        ("scale", r"block 0 scales its scores by 0\.3"),
        ("eps", r"its norms have eps 1e-06"),
    ],
)
def test_what_t2t_cannot_say_is_refused_with_the_block_in_the_way(what: str, message: str, tmp_path: Path) -> None:
    model = t2t.from_module(tiny().float())
    spec = model.spec
    if what in ("heads", "half", "hidden"):
        one = {"heads": Keep(heads=(0, 2)), "half": Keep(attention=False), "hidden": Keep(hidden=tuple(range(7)))}[what]
        keeps = [None, None, one] if what == "half" else [None, one, None]
        model = cut(model, keeps, method="test")
    elif what == "steps":
        merge = Merge(axis="h", keep=1)
        model = make(replace(spec, blocks=(replace(spec.blocks[0], steps=(merge,)), *spec.blocks[1:])))
    elif what == "splits":
        stem = T2TPerformer(token_dim=8, features=4, strides=(2, 2, 1))
        side = spec.grid[0] * 4
        model = make(replace(spec, stem=stem, patch_px=(4, 4), image_px=(side, side)))
    elif what == "stem":
        model = make(vit())
    elif what == "scale":
        attention = replace(spec.blocks[0].attention, scale=0.3)
        model = make(replace(spec, blocks=(replace(spec.blocks[0], attention=attention), *spec.blocks[1:])))
    else:
        model = make(replace(spec, norm_eps=1e-6))
    with pytest.raises(SourceError, match=message):
        t2t.write(model, tmp_path / "no.pth.tar")
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------------- compression


@pytest.mark.parametrize("kind", ["performer", "transformer"])
def test_comcat_compresses_the_backbone_and_an_artifact_keeps_the_result(kind: str, tmp_path: Path) -> None:
    module = tiny(kind, img_size=48, embed_dim=48, num_heads=3, mlp_ratio=4.0).float()
    model = t2t.from_module(module)
    pixels = np.random.default_rng(0).integers(0, 256, (24, 48, 48, 3), dtype=np.uint8)
    config = comcat.ComcatConfig(budget=Budget(keep_params=0.8))
    small = comcat.compress(model, config, data=torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()).model
    assert cost(small.spec).params <= 0.8 * cost(model.spec).params
    assert small.spec.stem == model.spec.stem
    stem = {name: value for name, value in model.state_dict().items() if name.startswith("stem.")}
    assert all(torch.equal(value, small.state_dict()[name]) for name, value in stem.items())
    assert not small.stem.state_dict(keep_vars=True).get("stages.0.features", torch.zeros(1)).requires_grad
    artifact.save(small, tmp_path / "small")
    loaded = artifact.load(tmp_path / "small")
    x = torch.randn(2, 3, 48, 48)
    assert torch.equal(loaded(x), small(x))
    assert loaded.spec == small.spec
    assert [n for n, p in loaded.named_parameters() if not p.requires_grad] == [
        n for n, p in model.named_parameters() if not p.requires_grad
    ]


def test_a_search_differentiates_through_the_backbone_only() -> None:
    model = t2t.from_module(tiny().float())
    hidden = tuple(torch.ones(48, requires_grad=True) for _ in range(3))
    model(torch.randn(2, 3, 32, 32), masks=Masks(hidden=hidden)).square().sum().backward()
    assert all(mask.grad is not None and mask.grad.abs().sum() > 0 for mask in hidden)
    assert model.stem.stages[0].features.grad is None
    assert model.stem.stages[0].kqv.weight.grad is not None


def test_specs_by_name_are_what_the_design_costs() -> None:
    spec = t2t_names.spec("t2t_vit_14")
    assert isinstance(spec, ModelSpec)
    found = cost(spec)
    assert found.stem_params - 384 * (1 + 197) == 391_526  # the sheet's module, without class token and table
    assert math.isclose(found.stem_macs, 0.305e9, rel_tol=0.06)  # the sheet adds elementwise work
