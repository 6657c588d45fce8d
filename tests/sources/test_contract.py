"""One contract for every family: the same numbers in, cut equals masked, every method works, and back.

`scripts/make_compatibility.py` writes docs/compatibility.md from what these tests ran.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vitrim
from tests import t2t_reference
from tests.methods.test_contract import SMALL as QUICK
from tests.methods.test_contract import data_for
from tests.sources.huggingface import kit as huggingface_kit
from tests.sources.timm import kit as timm_kit
from tests.sources.torchvision import kit as torchvision_kit
from vitrim import methods, sources, surgery
from vitrim.budget import Budget
from vitrim.counting import cost
from vitrim.errors import SourceError
from vitrim.model import Vit
from vitrim.sources import huggingface, t2t
from vitrim.sources.huggingface.read import encoder_of, parts_of
from vitrim.spec import AttentionSpec, MlpSpec, ModelSpec, Preprocess


@dataclass(frozen=True, kw_only=True)
class Family:
    """How a family's own module is made small and random, asked, and taken apart."""

    make: Callable[[str], Any]
    answer: Callable[[Any, Tensor, ModelSpec], Tensor]
    blocks: Callable[[Any], Sequence[nn.Module]]
    back: Callable[[Vit, str], Any]
    format: str


def _module(source: str) -> Callable[[Vit, str], Any]:
    """The way back of a family whose package makes the module."""
    return lambda model, _: import_module(f"vitrim.sources.{source}").to_module(model)


def _t2t_back(model: Vit, name: str) -> Any:
    """The authors' network with fewer blocks and narrower MLPs, whose keys the state dict must have exactly."""
    ratio = model.spec.blocks[0].mlp.hidden / model.spec.width  # type: ignore[union-attr]
    module = t2t_reference.tiny(**{**T2T[name], "depth": len(model.spec.blocks), "mlp_ratio": ratio})
    module.load_state_dict(t2t.to_state(model), strict=True)
    return module


def _hugging_answer(module: Any, x: Tensor, spec: ModelSpec) -> Tensor:
    return huggingface.answer(encoder_of(module)[0], x, spec)


def _hugging_blocks(module: Any) -> Sequence[nn.Module]:
    return list(parts_of(encoder_of(module)[0]).block_modules)


def _t2t(name: str) -> Any:
    return t2t_reference.tiny(**T2T[name]).float()


T2T: dict[str, dict[str, Any]] = {
    "performer": {},
    "transformer": {"tokens_type": "transformer"},
    "performer, 48 px": {"img_size": 48, "num_heads": 8, "mlp_ratio": 3.0},
    "transformer encoder": {"tokens_type": "transformer", "num_classes": 0},
}
TORCHVISION: dict[str, dict[str, Any]] = {
    "vit": {},
    "vit, 48 px": {"image_size": 48, "patch_size": 16},
    "vit, two classes": {"num_classes": 2, "num_layers": 2},
}
TIMM = (
    "deit_tiny_patch16_224",
    "deit_tiny_distilled_patch16_224",
    "deit3_small_patch16_224",
    "vit_small_patch14_dinov2",
    "vit_base_patch14_reg4_dinov2",
    "vit_base_patch32_clip_224",
    "vit_base_patch16_siglip_224",
    "vit_giant_patch14_dinov2",
)
FAMILIES = {
    "timm": Family(
        make=timm_kit.small,
        answer=lambda m, x, _: m(x),
        blocks=lambda m: list(m.blocks),
        back=_module("timm"),
        format="timm",
    ),
    "transformers": Family(
        make=huggingface_kit.small,
        answer=_hugging_answer,
        blocks=_hugging_blocks,
        back=_module("huggingface"),
        format="hf",
    ),
    "torchvision": Family(
        make=lambda name: torchvision_kit.small(**TORCHVISION[name]),
        answer=lambda m, x, _: m(x),
        blocks=lambda m: list(m.encoder.layers),
        back=_module("torchvision"),
        format="torchvision",
    ),
    "T2T-ViT": Family(
        make=_t2t, answer=lambda m, x, _: m(x), blocks=lambda m: list(m.blocks), back=_t2t_back, format="t2t"
    ),
}
VARIANTS = {
    "timm": TIMM,
    "transformers": tuple(huggingface_kit.VARIANTS),
    "torchvision": tuple(TORCHVISION),
    "T2T-ViT": tuple(T2T),
}
CASES = [f"{family}/{name}" for family, names in VARIANTS.items() for name in names]
FEW = [
    "timm/deit_tiny_distilled_patch16_224",
    "timm/vit_base_patch14_reg4_dinov2",
    "transformers/vit",
    "transformers/dinov2",
    "transformers/siglip_tower",
    "torchvision/vit",
    "T2T-ViT/performer",
]
"""One of each kind, on which every method is run."""


def taken(case: str) -> tuple[Family, Any, Vit]:
    """The family, its module and our model of it; the module in float32, whose numbers both hold exactly."""
    family, _, name = case.partition("/")
    module = FAMILIES[family].make(name)
    return FAMILIES[family], module, vitrim.from_model(module)


def images(spec: ModelSpec, count: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(count, spec.channels, *spec.image_px, generator=generator, dtype=torch.float64)


def same(ours: Tensor, theirs: Tensor) -> bool:
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max()) <= 1e-10 * max(1.0, float(theirs.abs().max()))


def test_there_are_as_many_variants_as_promised() -> None:
    assert len(VARIANTS["transformers"]) >= 12
    assert len(VARIANTS["torchvision"]) >= 3
    assert len(VARIANTS["T2T-ViT"]) >= 4


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_logits_and_features_are_the_familys_own(case: str) -> None:
    family, module, model = taken(case)
    module, model = module.double(), model.double()
    x, depth = images(model.spec), len(model.blocks)
    streams: list[Tensor] = []
    hooks = [
        block.register_forward_hook(lambda _m, _i, out: streams.append(out[0] if isinstance(out, tuple) else out))
        for block in family.blocks(module)
    ]
    theirs = family.answer(module, x, model.spec)
    for hook in hooks:
        hook.remove()
    found = model(x, want=("logits", *(f"block:{i}" for i in range(depth))))
    assert float(theirs.abs().max()) > 0.01
    assert same(found["logits"], theirs)
    assert len(streams) == depth
    assert all(same(found[f"block:{i}"], stream) for i, stream in enumerate(streams))


def keeps_of(model: Vit) -> list[surgery.Keep | None]:
    """Heads, dims, units and halves gone, other ones in each block."""
    keeps: list[surgery.Keep | None] = []
    for i, block in enumerate(model.spec.blocks):
        a, m = block.attention, block.mlp
        assert isinstance(a, AttentionSpec)
        assert isinstance(m, MlpSpec)
        heads = tuple(range(i % 2, a.heads))
        v = tuple(tuple(sorted((h + j) % a.v_dim for j in range(a.v_dim - 1))) for h in heads)
        keeps.append(surgery.Keep(heads=heads, v=v, hidden=tuple(range(i, m.hidden, 2)), mlp=i != 1, attention=i != 2))
    return keeps


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_cut_equals_masked(case: str) -> None:
    _, _, model = taken(case)
    model = model.double()
    x, keeps = images(model.spec), keeps_of(model)
    assert same(surgery.cut(model, keeps, method="test")(x), model(x, masks=surgery.masked_twin(model, keeps)))


@torch.no_grad()
@pytest.mark.parametrize("case", FEW)
@pytest.mark.parametrize("method", list(methods.METHODS))
def test_every_method_cuts_it_and_the_folder_gives_the_same_answers(case: str, method: str, tmp_path: Path) -> None:
    _, _, model = taken(case)
    low, high = methods.plan(method, model.spec)["range"]["macs"]
    share = math.ceil(1000 * (0.35 * low + 0.65 * high) / high) / 1000
    config = methods.configure(method, {"budget": Budget(keep_macs=share), **QUICK[method]})
    how = Preprocess(mean=(0.5,) * model.spec.channels, std=(0.25,) * model.spec.channels, size_px=model.spec.image_px)
    model.config = replace(model.config, preprocess=how, labels=None)
    with torch.enable_grad():
        small = methods.compress(model, config, data=data_for(model.spec, method))
    x = images(model.spec, 8).float()
    assert cost(small.spec).macs <= share * cost(model.spec).macs
    small.save(tmp_path / "small")
    found, made = vitrim.load(tmp_path / "small"), small.model
    assert found.spec == made.spec
    assert all(torch.equal(value, made.state_dict()[name]) for name, value in found.state_dict().items())
    assert torch.allclose(found(x), made(x), rtol=1e-4, atol=1e-5)


def sayable(model: Vit) -> Vit:
    """Cut to what each family can say: one block fewer, and every MLP to its first half.

    AttentionSpec pooling has the blocks' own width in all families, and is never cut: there the MLPs stay.
    """
    half: list[surgery.Keep | None] = [
        None
        if block.mlp is None or model.spec.pool.kind == "map"
        else surgery.Keep(hidden=tuple(range(block.mlp.hidden // 2)))
        for block in model.spec.blocks
    ]
    last = len(model.spec.blocks) - 1
    return surgery.drop(surgery.cut(model, half, method="test"), blocks=(last,))


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_a_cut_model_goes_back_into_its_family(case: str, tmp_path: Path) -> None:
    family, _, model = taken(case)
    small = sayable(model)
    module = family.back(surgery.without_empty(small), case.partition("/")[2])
    x = images(small.spec)
    assert same(family.answer(module.double(), x, small.spec), small.double()(x))
    assert sources.write(small.float(), family.format, tmp_path / "back").exists()


@pytest.mark.parametrize("case", CASES)
def test_what_the_family_cannot_say_is_refused_with_the_block_in_the_way(case: str, tmp_path: Path) -> None:
    family, _, model = taken(case)
    keeps: list[surgery.Keep | None] = [None] * len(model.spec.blocks)
    keeps[1] = surgery.Keep(hidden=(0, 1, 2))
    with pytest.raises(SourceError, match=r"block [01]"):
        sources.write(surgery.cut(model, keeps, method="test"), family.format, tmp_path / "back")
    assert not list(tmp_path.iterdir())


def test_the_compatibility_table_lists_every_variant_and_no_failure() -> None:
    page = (Path(__file__).parents[2] / "docs" / "compatibility.md").read_text(encoding="utf-8")
    assert all(f"`{case.partition('/')[2]}`" in page for case in CASES), "run scripts/make_compatibility.py"
    assert all(f"`{method}`" in page for method in methods.METHODS), "run scripts/make_compatibility.py"
    assert "fails:" not in page
