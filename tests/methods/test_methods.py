"""The methods by name: those of vitrim, and those of other packages."""

from __future__ import annotations

import importlib.metadata
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.specs import make, vit
from vitrim import methods
from vitrim.budget import Budget
from vitrim.config import checked, default
from vitrim.errors import ConfigError, DataError, MeasureError
from vitrim.methods import METHODS, PLANNED, comcat, method_named, method_of
from vitrim.methods.method import MethodConfig
from vitrim.result import Compressed

BUILT_IN = ["auto", "comcat", "dcvit", "uvc"]


@checked
class OtherConfig(MethodConfig):
    """Of another package."""


OTHER = replace(comcat.METHOD, name="other", config=OtherConfig, compress=lambda model, config, **_: (model, config))


@pytest.fixture
def offer(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Install packages that offer methods: pairs of a name and a value."""

    def install(*offered: tuple[str, object]) -> None:
        entries = []
        for index, (name, value) in enumerate(offered):
            module = types.ModuleType(f"package_{index}")
            module.METHOD = value  # type: ignore[attr-defined]
            if value is not None:
                monkeypatch.setitem(sys.modules, module.__name__, module)
            entry = importlib.metadata.EntryPoint(name, f"package_{index}:METHOD", "vitrim.methods")
            dist = types.SimpleNamespace(name=f"vitrim-{index}")
            entries.append(entry._for(dist))  # type: ignore[attr-defined]
        monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: entries)

    return install


def test_the_methods_are_the_packages_that_there_are() -> None:
    folder = Path(methods.__file__).parent
    assert sorted(METHODS) == BUILT_IN == sorted(path.parent.name for path in folder.glob("*/__init__.py"))
    assert not set(PLANNED) & set(METHODS)
    assert len(METHODS) == 4
    assert "auto" in METHODS
    assert "cait" not in METHODS


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_record_says_what_its_config_says(name: str) -> None:
    method = METHODS[name]
    assert method.name == name
    if method.variants:
        assert default(method.config, "variant") == method.variants[0]
        for variant in method.variants:
            methods.configure(name, {"budget": {"keep_macs": 0.5}, "variant": variant})


def test_a_method_of_another_package_is_one_of_the_methods(offer: Any) -> None:
    offer(("other", OTHER))
    assert list(METHODS) == [*BUILT_IN, "other"]
    assert METHODS["other"] is method_named("other") is OTHER
    assert method_of(OtherConfig()) == "other"
    assert isinstance(methods.configure("other", {"seed": 3}), OtherConfig)


@pytest.mark.parametrize(
    ("offered", "says"),
    [
        ([("auto", OTHER)], "method 'auto' of the package vitrim-0 is one of vitrim already"),
        ([("other", OTHER), ("other", OTHER)], "method 'other' of the package vitrim-1 is one of vitrim-0 already"),
        ([("other", None)], "method 'other' of the package vitrim-0 cannot be loaded"),
        (
            [("other", "no record")],
            "method 'other' of the package vitrim-0: package_0:METHOD is no Method of that name",
        ),
        ([("mine", OTHER)], "method 'mine' of the package vitrim-0: package_0:METHOD is no Method of that name"),
    ],
    ids=["vitrim's name", "twice", "broken", "no record", "another name"],
)
def test_a_package_in_the_way_is_named(offer: Any, offered: list[tuple[str, object]], says: str) -> None:
    offer(*offered)
    with pytest.raises(ConfigError, match=says):
        METHODS[next(name for name in METHODS if name not in BUILT_IN)]
    assert METHODS["auto"].name == "auto"  # those of vitrim go on


def test_what_belongs_to_no_method_is_refused() -> None:
    with pytest.raises(
        ConfigError, match="MethodConfig is no method's config; expected one of AutoConfig, ComcatConfig"
    ):
        method_of(MethodConfig())
    with pytest.raises(ConfigError, match=r"'comkat' is not known; expected one of auto.*did you mean 'comcat'"):
        method_named("comkat")
    with pytest.raises(ConfigError, match="'cait' is planned and not there yet"):
        method_named("cait")


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_model_whose_weights_are_no_numbers_is_not_cut_and_the_tensor_is_named(name: str) -> None:
    model = make(vit(classes=3), dtype=torch.float32)
    with torch.no_grad():
        model.blocks[0].attention.qkv[0, 0] = float("nan")
    config = methods.configure(name, {"budget": {"keep_macs": 0.5}})
    with pytest.raises(DataError, match=r"the model is not cut: 'blocks\.0\.attention\.qkv' holds 1 of"):
        methods.compress(model, config, data=torch.rand(8, 3, 16, 16))


def test_a_result_whose_weights_are_no_numbers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    astray = make(vit(classes=3), dtype=torch.float32)
    with torch.no_grad():
        next(astray.parameters()).fill_(float("inf"))
    made = replace(METHODS["comcat"], compress=lambda *_, **__: Compressed(model=astray, method="comcat", variant=None))
    monkeypatch.setattr(methods, "METHODS", {"comcat": made})
    with pytest.raises(DataError, match="comcat: no result"):
        methods.compress(make(vit(classes=3)), methods.configure("comcat", {"budget": {"keep_macs": 0.5}}))


def test_a_device_that_is_not_there_is_refused_in_one_sentence() -> None:
    for name in ("gpu", "cuda:99"):
        config = comcat.METHOD.config(budget=Budget(keep_macs=0.5), variant="svd", device=name)
        with pytest.raises(MeasureError, match=f"device '{name}'"):
            methods.compress(make(vit(), dtype=torch.float32), config)
