"""docs/adding-a-method.md is true: its method is a package's, and stands in the contract, the command and the report."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.methods import test_contract as contract
from vitrim import methods

PAGE = (Path(__file__).parents[2] / "docs" / "adding-a-method.md").read_text(encoding="utf-8")
NAME = "dropping"
RUNS = [name for name, value in vars(contract).items() if name.startswith("test_") and inspect.isfunction(value)]


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The page's code as a package beside vitrim, as an installer leaves it."""
    site = tmp_path / "site"
    (site / "dropping-1.0.dist-info").mkdir(parents=True)
    (code,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    (entry,) = re.findall(r'^\[project\.entry-points\."(.*?)"\]\n(.*?) = "(.*?)"', PAGE, re.MULTILINE)
    (site / "dropping.py").write_text(code, encoding="utf-8")
    (site / "dropping-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: dropping\nVersion: 1.0\n")
    (site / "dropping-1.0.dist-info" / "entry_points.txt").write_text(f"[{entry[0]}]\n{entry[1]} = {entry[2]}\n")
    monkeypatch.syspath_prepend(site)
    monkeypatch.setitem(contract.SMALL, NAME, {"images": 8})
    yield site
    sys.modules.pop(NAME, None)


def test_the_method_is_listed_beside_those_of_vitrim(installed: Path) -> None:
    assert list(methods.METHODS) == [*methods.BUILT_IN, NAME]
    assert methods.METHODS[NAME].cuts == "whole blocks"
    lines = [line for line in (installed / "dropping.py").read_text(encoding="utf-8").splitlines() if line.strip()]
    assert len([line for line in lines if not line.startswith(("import", "from"))]) < 70


@pytest.mark.parametrize("name", RUNS)
def test_the_contract_holds_for_it(name: str, installed: Path, tmp_path: Path) -> None:
    test = getattr(contract, name)
    given: dict[str, Any] = {"method": NAME, "spec": contract.scaled(contract.SPEC), "tmp_path": tmp_path / "run"}
    (tmp_path / "run").mkdir()
    test(**{key: value for key, value in given.items() if key in inspect.signature(test).parameters})


@pytest.mark.slow
def test_the_command_lists_it_runs_it_and_reports_it(installed: Path, tmp_path: Path) -> None:
    first, second = re.findall(r"^(vitrim (?:methods|compress) .*)$", PAGE, re.MULTILINE)
    run = f"import sys; sys.path.insert(0, {str(installed)!r}); from vitrim.cli import main; main()"

    def command(words: list[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", run, *words], cwd=tmp_path, capture_output=True, text=True, timeout=200
        )

    listed = command(first.split()[1:])
    assert listed.returncode == 0, listed.stderr
    assert "Unlabelled images on which outputs are compared." in " ".join(listed.stdout.split())
    more = ["--recover-steps", "0", "--no-measure", "--json", "--quiet"]
    done = command([*second.split()[1:], *more])
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["method"] == {"name": NAME, "variant": ""}
    page = (tmp_path / "small" / "report.html").read_text(encoding="utf-8")
    assert "Blocks that went, in order" in page
    wrong = command(
        [
            "compress",
            "--model",
            "x",
            "--method",
            NAME,
            "--set",
            "image=3",
            "--keep-macs",
            "0.8",
            "--data",
            "sample",
            "--out",
            "no",
        ]
    )
    assert wrong.returncode == 2
    assert "did you mean 'images'?" in wrong.stderr
    assert not (tmp_path / "no").exists()
