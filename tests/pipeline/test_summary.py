"""What to do with a result: commands that work as they are printed."""

import shlex
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from PIL import Image

from tests.pipeline.test_running import JUDGE, MEASURE, job, tiny
from vitrim import artifact, pipeline
from vitrim.budget import Budget
from vitrim.cli import main
from vitrim.methods.auto import AutoConfig
from vitrim.pipeline.summary import next_commands


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs in folders whose names need quotes."""
    place = tmp_path_factory.mktemp("my photos")
    for name in ("cat", "dog", "owl"):
        (place / name).mkdir()
        for index in range(7):
            Image.new("RGB", (9, 9), (40 * index, 99, 10)).save(place / name / f"{name} {index}.png")
    return place


@pytest.fixture(scope="module")
def made(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> pipeline.RunResult:
    config = AutoConfig(budget=Budget(keep_macs=0.7), images=8, axes=("block",))
    out = tmp_path_factory.mktemp("out") / "a b"
    return job(out, config=config, data=str(photos), recover=None, measure=MEASURE, evaluate=JUDGE)


@pytest.mark.slow
def test_each_command_works_as_it_is_printed(made: pipeline.RunResult, photos: Path, tmp_path: Path) -> None:
    dense = artifact.save(tiny(), tmp_path / "dense one")
    rows = next_commands(made.summary["onward"], place=str(made.folder), model=str(dense), data=str(photos))
    verbs = []
    for row in rows:
        words = shlex.split(row["command"])
        done = CliRunner().invoke(main, words[1:])
        assert done.exit_code == 0, f"{row['command']}\n{done.output}"
        verbs.append(words[1])
    assert verbs == ["evaluate", "predict", "cost", "measure", "report", "export"]
    assert "there is no test split" in rows[0]["does"]


def test_only_what_can_be_done_is_offered() -> None:
    onward: dict[str, Any] = {"split": "test", "picture": None, "library": None, "predicts": False}
    rows = next_commands(onward, place="small", model="timm:x", data="d")
    assert [row["command"].split()[1] for row in rows] == ["evaluate", "cost", "measure", "report"]
    assert rows[0]["command"] == "vitrim evaluate small --against timm:x --data d --split test"
    onward |= {"predicts": True, "labelled": False}  # a score of its own needs labels
    first = next_commands(onward, place="small", model="timm:x", data="d")[0]
    assert first["command"] == "vitrim evaluate small --against timm:x --data d --split test"
