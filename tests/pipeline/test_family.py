"""Several budgets at once: an ordinary run for each, and a page to pick from."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import vitrim
from tests.pipeline.test_running import COMCAT, JUDGE, MEASURE, RECOVER, pictures, tiny
from vitrim import counting, pipeline, reporting
from vitrim.budget import Budget
from vitrim.cli import main
from vitrim.errors import BudgetError, ConfigError
from vitrim.methods import comcat
from vitrim.methods.dcvit import DcvitConfig
from vitrim.result import Compressed

BUDGETS = (Budget(keep_macs=0.8), Budget(keep_macs=0.6))


def family(out: Path, **changes: Any) -> pipeline.FamilyResult:
    settings: dict[str, Any] = {"data": pictures(), "recover": RECOVER, "measure": MEASURE, "evaluate": JUDGE}
    return pipeline.run_family(tiny(), COMCAT, BUDGETS, out=out, **{**settings, **changes})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> pipeline.FamilyResult:
    return family(tmp_path_factory.mktemp("family") / "all")


def test_each_member_is_an_ordinary_run_within_its_budget(whole: pipeline.FamilyResult) -> None:
    dense = counting.cost(tiny().spec).macs
    assert {path.name for path in whole.folder.iterdir()} == {
        "keep_macs-0.8", "keep_macs-0.6", "family.json", "report.html"
    }  # fmt: skip
    for budget in BUDGETS:
        place = whole.folder / pipeline.family.member_name(budget)
        assert budget.keep_macs is not None
        assert counting.cost(vitrim.load(place).spec).macs <= budget.keep_macs * dense
        assert (place / "report.html").is_file()
        assert json.loads((place / "summary.json").read_text(encoding="utf-8"))["budget"] == budget.to_dict()


def test_the_page_links_and_plots_every_member(whole: pipeline.FamilyResult, tmp_path: Path) -> None:
    page = whole.report.read_text(encoding="utf-8")
    for row in whole.summary["members"]:
        assert f'href="./{row["name"]}/report.html"' in page
        assert f"{row['name']}: " in page  # its point in the plot
    assert "against measured time" in page
    assert "cp -r all/keep_macs-0." in page
    assert "http://" not in page.replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in page
    assert reporting.write(whole.folder, tmp_path / "again.html").read_text(encoding="utf-8") == page


def test_a_finished_family_resumes_without_work(whole: pipeline.FamilyResult) -> None:
    again = family(whole.folder, resume=True)
    assert all(member.redone == () for member in again.members)
    assert again.summary == whole.summary


def test_a_stopped_family_goes_on(whole: pipeline.FamilyResult, tmp_path: Path) -> None:
    def stop(stage: str, done: int, total: int, **facts: Any) -> None:
        if stage == "family" and done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        family(tmp_path / "all", progress=stop)
    assert not (tmp_path / "all" / "family.json").exists()
    found = family(tmp_path / "all", resume=True)
    assert found.members[0].redone == ()
    for mine, theirs in zip(found.members, whole.members, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine.model.parameters(), theirs.model.parameters(), strict=True))


def test_a_method_that_scores_for_all_is_called_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def together(model: Any, config: Any, budgets: Any, **rest: Any) -> list[Compressed]:
        calls.append(len(budgets))
        return [comcat.METHOD.compress(model, replace(config, budget=b), data=rest["data"]) for b in budgets]

    monkeypatch.setattr(comcat, "METHOD", replace(comcat.METHOD, family=together))
    found = family(tmp_path / "all", recover=None, measure=None)
    assert calls == [2]
    shares = [row["kept_macs"] for row in found.summary["members"]]
    assert 0.6 < shares[0] <= 0.8
    assert shares[1] <= 0.6


def test_bad_families_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"budgets": (BUDGETS[0],)}, ConfigError, "two or more"),
        ({"budgets": (BUDGETS[0], BUDGETS[0])}, ConfigError, "different"),
        ({"budgets": (BUDGETS[0], Budget(keep_macs=0.001))}, BudgetError, "out of reach"),
        ({"budgets": (0.5, 0.3)}, ConfigError, r"budgets: 0\.5; expected each a Budget"),
        ({"budgets": BUDGETS, "resume": True, "force": True}, ConfigError, "contradict"),
    ]
    for case, kind, words in cases:
        settings: dict[str, Any] = {"data": pictures(), "out": tmp_path / "all", "recover": None, "measure": None}
        with pytest.raises(kind, match=words):
            pipeline.run_family(tiny(), COMCAT, **{**settings, **case})
        assert not (tmp_path / "all").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("x")
    with pytest.raises(ConfigError, match="not empty"):
        family(tmp_path / "mine")


@pytest.mark.slow
def test_the_command_makes_a_family_from_a_list_of_shares(tmp_path: Path) -> None:
    words = (
        "compress --model builtin:cifar10-vit-micro --method comcat --variant svd --keep-macs 0.7,0.5 --recover-steps 0"
    )
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"evaluate": {"limit": 64, "samples": 0}, "settings": {"probe_images": 0}}))
    more = ["--no-measure", "--config", str(config), "--out", str(tmp_path / "all"), "--quiet"]
    done = CliRunner().invoke(main, [*words.split(), *more])
    assert done.exit_code == 0, done.output
    assert "keep_macs-0.7" in done.stdout
    assert (tmp_path / "all" / "keep_macs-0.5" / "model.safetensors").is_file()
    shown = CliRunner().invoke(main, ["report", str(tmp_path / "all"), "--out", str(tmp_path / "page.html")])
    assert shown.exit_code == 0, shown.output
    assert "vitrim family" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_a_replaced_family_takes_up_nothing_of_a_killed_one(tmp_path: Path) -> None:
    config = DcvitConfig(images=16, probe_images=4, batch_size=4)
    settings: dict[str, Any] = {"data": pictures(80), "recover": None, "measure": None, "evaluate": JUDGE}

    def stop(stage: str, done: int, total: int, **facts: Any) -> None:
        if stage == "refit":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipeline.run_family(tiny(), config, BUDGETS, out=tmp_path / "a", progress=stop, **settings)
    assert (tmp_path / "a" / "scoring").is_dir()
    other = tiny(seed=5)
    scored: list[int] = []
    made = pipeline.run_family(
        other,
        config,
        BUDGETS,
        out=tmp_path / "a",
        force=True,
        progress=lambda stage, done, *_, **__: scored.append(done) if stage == "score" else None,
        **settings,
    )
    clean = pipeline.run_family(other, config, BUDGETS, out=tmp_path / "b", **settings)
    assert scored == [1, 2]
    for one, two in zip(made.members, clean.members, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True))


def test_a_folder_of_photos_gives_a_family_by_one_command(tmp_path: Path) -> None:
    """Fifty photos without labels, nested as people keep them; scored once, judged by agreement."""
    photos = tmp_path / "photos"
    for i, image in enumerate(pictures(50, labelled=False)):
        place = photos / ("2024" if i % 2 else "2025/may")
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(place / f"{i}.png")
    vitrim.save(tiny(), tmp_path / "dense")
    words = f"compress --model {tmp_path / 'dense'} --method dcvit --keep-macs 0.8,0.6 --data {photos} --images 40"
    done = CliRunner().invoke(
        main, [*words.split(), "--recover-steps", "0", "--no-measure", "--out", str(tmp_path / "family"), "--json"]
    )
    assert done.exit_code == 0, done.output
    told = json.loads((tmp_path / "family" / "family.json").read_text(encoding="utf-8"))
    assert [row["name"] for row in told["members"]] == ["keep_macs-0.8", "keep_macs-0.6"]
    page = (tmp_path / "family" / "report.html").read_text(encoding="utf-8")
    assert "greement" in page
