"""The tables of named models: exact counts, no torch, and the same as each family's package makes them today."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import timm

import vitrim
from vitrim import architectures, counting
from vitrim.spec import Pool, spec_hash

SAMPLE = [
    "deit_tiny_patch16_224",
    "deit_small_distilled_patch16_224",
    "deit3_small_patch16_384",
    "vit_base_patch16_224",
    "vit_base_patch16_clip_quickgelu_224",
    "vit_giant_patch14_reg4_dinov2",
    "vit_so400m_patch14_siglip_gap_224",
    "vit_intern300m_patch14_448",
    "vit_wee_patch16_reg1_gap_256",
    "vit_base_patch16_siglip_224",
    "vit_base_patch32_siglip_256",
]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = Path(__file__).parents[1] / "scripts" / "make_architectures.py"
    found = importlib.util.spec_from_file_location("make_architectures", path)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("name", "macs", "params"),
    [
        ("deit_tiny_patch16_224", 1_253_683_200, 5_717_416),
        ("deit_small_patch16_224", 4_598_882_304, 22_050_664),
        ("deit_base_patch16_224", 17_563_828_224, 86_567_656),
    ],
)
def test_deit_has_the_known_counts(name: str, macs: int, params: int) -> None:
    spec = architectures.spec(name)
    assert spec is not None
    cost = counting.cost(spec)
    assert (cost.macs, cost.params) == (macs, params)


@pytest.mark.parametrize(
    ("name", "macs", "params"),
    [
        ("torchvision:vit_b_16", 17_563_828_224, 86_567_656),
        ("torchvision:vit_b_16.IMAGENET1K_SWAG_E2E_V1", None, 86_859_496),
        ("torchvision:vit_b_32", None, 88_224_232),
        ("torchvision:vit_l_16", None, 304_326_632),
        ("torchvision:vit_l_32", None, 306_535_400),
        ("torchvision:vit_h_14", None, 633_470_440),
        ("torchvision:vit_h_14.IMAGENET1K_SWAG_LINEAR_V1", None, 632_045_800),
        ("t2t:t2t_vit_14", 4_783_468_544, None),
        ("t2t:t2t_vit_t_14", 6_088_721_920, None),
    ],
)
def test_other_families_have_the_counts_that_they_publish(name: str, macs: int | None, params: int | None) -> None:
    family, _, rest = name.partition(":")
    spec = architectures.spec(rest, family=family)
    assert spec is not None
    cost = counting.cost(spec)
    assert macs in (None, cost.macs)
    assert params in (None, cost.params)


@pytest.mark.parametrize("name", SAMPLE)
def test_an_entry_made_again_from_timm_is_the_same(name: str, script: ModuleType) -> None:
    assert script.entry_of(name) == architectures._table("timm")[name]


@pytest.mark.parametrize("family", ["torchvision", "t2t"])
def test_a_table_made_again_is_the_same_file(family: str, script: ModuleType) -> None:
    entries, refused = script.table(family)
    assert not refused
    assert entries == architectures._table(family)
    head, *lines = script.text_of(family, entries).splitlines()
    stored, *others = (script.TARGET / f"{family}.json").read_text(encoding="utf-8").splitlines()
    assert lines == others
    assert head.startswith('{"schema": 1, ')  # behind it the family's version, which another installation may have
    assert stored.startswith('{"schema": 1, ')


def test_the_table_has_every_candidate_or_the_source_refuses_it(script: ModuleType) -> None:
    assert set(architectures.names()) <= set(script.timm_candidates())
    assert len(architectures.names()) > 140
    assert all((script.TARGET / f"{family}.json").stat().st_size < 300_000 for family in architectures.FAMILIES)


@pytest.mark.parametrize("family", architectures.FAMILIES)
def test_every_entry_is_a_spec(family: str) -> None:
    assert architectures.names(family)
    for name in architectures.names(family):
        changed = [tag for tag, fields in architectures._table(family)[name]["tags"].items() if fields]
        for full in (name, *(f"{name}.{tag}" for tag in changed)):
            spec = architectures.spec(full, family=family)
            assert spec is not None
            assert counting.params(spec) > 0


def test_parameters_are_those_of_timm() -> None:
    import torch

    for name in SAMPLE:
        with torch.device("meta"):
            module = timm.create_model(name)
        spec = architectures.spec(name)
        assert spec is not None
        assert counting.params(spec) == sum(parameter.numel() for parameter in module.parameters())


def test_tags_resolve_and_know_where_they_differ() -> None:
    base = architectures.spec("vit_base_patch16_224")
    assert base is not None
    assert architectures.spec("vit_base_patch16_224.augreg_in1k") == base
    larger = architectures.spec("vit_base_patch16_224.augreg_in21k")
    assert larger is not None
    assert larger.classes == 21843
    assert "augreg_in21k" in architectures.tags("vit_base_patch16_224")


def test_unknown_names_and_tags_give_none() -> None:
    for name in ("resnet18", "vit_base_patch16_224.nothing", "", "vit_base_patch16_xp_224", "vit_b_16"):
        assert architectures.spec(name) is None
    assert architectures.tags("resnet18") == []
    assert architectures.spec("vit_base_patch16_224", family="torchvision") is None
    assert architectures.spec("vit_base_patch16_224", family="hf") is None
    assert architectures.names("hf") == []


def test_classes_can_be_chosen() -> None:
    for classes in (0, 10):
        spec = architectures.spec("deit_tiny_distilled_patch16_224", classes=classes)
        assert spec is not None
        assert (spec.classes or 0) == classes
        assert len(spec.outputs) == (2 if classes else 0)


def test_the_loaded_model_has_the_tables_spec() -> None:
    spec = architectures.spec("deit_tiny_patch16_224")
    assert spec is not None
    model = vitrim.load("timm:deit_tiny_patch16_224", pretrained=False, verify=False)
    assert spec_hash(model.spec) == spec_hash(spec)


def test_map_pooling_stands_in_the_table() -> None:
    exact = architectures.spec("vit_base_patch16_siglip_224")
    tanh = architectures.spec("vit_so400m_patch14_siglip_378")
    assert exact is not None
    assert tanh is not None
    assert exact.pool == Pool(kind="map", heads=12, hidden=3072)
    assert tanh.pool.hidden == 4304
    assert (exact.outputs, exact.prefix) == ((), ())


def test_a_named_cost_needs_neither_torch_nor_timm() -> None:
    code = (
        "import sys\nfrom vitrim import architectures, counting\n"
        "assert counting.cost(architectures.spec('deit_small_patch16_224')).macs == 4598882304\n"
        "assert counting.cost(architectures.spec('vit_b_16', family='torchvision')).macs == 17563828224\n"
        "assert counting.cost(architectures.spec('t2t_vit_14', family='t2t')).macs == 4783468544\n"
        "assert not {'torch', 'timm', 'torchvision', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
