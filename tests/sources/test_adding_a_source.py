"""docs/adding-a-source.md is true: its code runs as it stands there, and says what the page says it does."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from vitrim.errors import SourceError

PAGE = (Path(__file__).parents[2] / "docs" / "adding-a-source.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    """What the page's code defines, run from top to bottom."""
    torch.manual_seed(0)
    names: dict[str, Any] = {"print": lambda error: names.setdefault("said", str(error))}
    for code in re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL):
        exec(compile(code, "adding-a-source.md", "exec"), names)
    return names


def test_the_page_prints_the_refusal_that_it_shows(page: dict[str, Any]) -> None:
    assert page["said"] in " ".join(PAGE.split())


def test_the_page_reads_the_same_network_and_writes_it_back_to_the_number(page: dict[str, Any]) -> None:
    module, model = page["module"], page["model"]
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    assert torch.allclose(model.double()(x), module.double()(x), rtol=0, atol=1e-10)
    back = page["to_module"](model).state_dict()
    assert all(torch.equal(value.float(), back[name].float()) for name, value in module.state_dict().items())


def test_the_page_refuses_by_name_what_the_spec_cannot_say(page: dict[str, Any]) -> None:
    theirs, block = page["Theirs"], page["TheirBlock"]

    class Added(block):  # type: ignore[misc, valid-type]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + super().forward(x)  # type: ignore[no-any-return]

    odd = theirs()
    odd.layers[1].__class__ = Added
    with pytest.raises(SourceError, match="outputs differ, first in block 1"):
        page["from_module"](odd)
    odd = theirs()
    odd.layers[1].up = torch.nn.Sequential(odd.layers[1].up)
    with pytest.raises(SourceError, match="a Sequential as up in block 1"):
        page["from_module"](odd)
    odd = theirs()
    odd.prompt = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(SourceError, match="numbers that a plain one does not have: prompt"):
        page["from_module"](odd)
    with pytest.raises(SourceError, match=r"another design \(Linear\)"):
        page["from_module"](torch.nn.Linear(2, 2))


def test_the_files_that_the_page_names_are_there() -> None:
    root = Path(__file__).parents[2]
    sources = root / "src" / "vitrim" / "sources"
    assert all((sources / name).is_file() for name in re.findall(r"`(\w+\.py)` \(", PAGE))
    for family in ("timm", "huggingface", "torchvision", "t2t"):
        assert all((sources / family / f"{name}.py").is_file() for name in ("load", "read", "write"))
    assert all((root / name).is_file() for name in re.findall(r"(?:tests|scripts|docs)/[\w/-]+\.(?:py|md)", PAGE))
