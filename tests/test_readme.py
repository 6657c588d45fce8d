"""What the README tells people to type works: every command and every line of Python in it is run.

With less of everything (a smaller model in place of ViT-Tiny, fewer images, steps and samples), so that it takes seconds.
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import save_file

from vitrim.cli import main

README = Path(__file__).parents[1] / "README.md"
SMALLER = {
    "timm:vit_tiny_patch16_224": "timm:test_vit",
    "32": "8",
    "hf:facebook/dinov2-small": "hf:dino",
    "224": "56",
}
LESS = {
    "compress": ["--config", "less.json"],
    "evaluate": ["--limit", "20"],
    "measure": ["--runs", "1"],
}
CONFIG = {
    "settings": {"images": 12, "builds": 1},
    "evaluate": {"limit": 20, "check_dense": False},
    "measure": {"runs": 1, "runtimes": ["eager"], "batch_sizes": [1]},
}
OF_SAMPLE = {**CONFIG, "recover": {"batch_size": 4}}
"""A few photographs choose their batch themselves; the sample would fill the default."""


def blocks(language: str) -> list[str]:
    """The README's code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[list[str]]:
    """The words of each `vitrim` command, comments left out."""
    lines = (shlex.split(line, comments=True) for line in text.splitlines())
    return [[SMALLER.get(word, word) for word in words] for words in lines if words]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, with the photos and the weights that a user would bring."""
    import timm

    generator = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for index in range(6):
            pixels = generator.integers(0, 255, (24, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{index}.png")
    save_file(timm.create_model("test_vit").state_dict(), tmp_path / "mine.safetensors")
    (tmp_path / "less.json").write_text(json.dumps(CONFIG))
    (tmp_path / "sample.json").write_text(json.dumps(OF_SAMPLE))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("text", blocks("bash"), ids=["first steps", "own model and images", "encoders"])
def test_the_commands_work_in_the_order_they_stand(text: str, place: Path) -> None:
    if "hf:" in text:
        kit = pytest.importorskip("tests.sources.huggingface.kit")
        kit.saved(kit.small("dinov2_encoder"), place / "dino", do_resize=True)
    for words in commands(text):
        assert words[0] == "vitrim"
        less = LESS.get(words[1], [])
        if "photos/" not in words:
            less = [word.replace("less.json", "sample.json") for word in less]
        done = CliRunner().invoke(main, [*words[1:], *less])
        assert done.exit_code == 0, f"{shlex.join(words)}\n{done.output}\n{done.exception!r}"
        assert done.stdout


@pytest.mark.slow
def test_the_python_works_and_leaves_what_it_says(place: Path) -> None:
    (code,) = blocks("python")
    assert len([line for line in code.splitlines() if line.strip() and not line.startswith("import")]) <= 10
    names: dict[str, object] = {}
    assert "images=64" in code
    exec(compile(code.replace("images=64", "images=12, builds=1"), str(README), "exec"), names)
    exec(compile(code[code.index("small.save(") :], str(README), "exec"), names)  # people run it again
    assert names["again"].spec == names["small"].spec  # type: ignore[attr-defined]
    assert (place / "half" / "model.safetensors").is_file()


def test_every_file_that_the_readme_points_at_is_there() -> None:
    found = re.findall(r"\]\(([^)#:]+)\)", README.read_text(encoding="utf-8"))
    assert found
    assert not [name for name in found if not (README.parent / name).is_file()]


def test_the_results_are_those_of_the_result_files() -> None:
    place = README.parent / "scripts" / "make_results.py"
    made: dict[str, object] = {"__file__": str(place), "__name__": "make_results"}
    exec(compile(place.read_text(encoding="utf-8"), str(place), "exec"), made)
    section = made["section"]
    assert callable(section)
    assert section() in README.read_text(encoding="utf-8"), "run scripts/make_results.py"
