"""The main job: what each stage leaves, how a run goes on, and what is refused before anything is written."""

import copy
import json
import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import vitrim
from vitrim import artifact, counting, pipeline, surgery
from vitrim.budget import Budget
from vitrim.config import read
from vitrim.errors import ArtifactError, BudgetError, ConfigError, DataError, VitrimError
from vitrim.methods.auto import AutoConfig
from vitrim.methods.comcat import ComcatConfig
from vitrim.methods.dcvit import DcvitConfig
from vitrim.methods.uvc import UvcConfig
from vitrim.methods.uvc import run as uvc
from vitrim.model import Vit, build
from vitrim.pipeline import EvaluateConfig, MeasureConfig, RecoverConfig, comparison
from vitrim.pipeline.folder import STAGES
from vitrim.pipeline.recovery import harm
from vitrim.pipeline.reference import reference_of
from vitrim.reporting.page import render
from vitrim.result import Compressed
from vitrim.spec import AttentionSpec, BlockSpec, Config, MlpSpec, ModelSpec, Output, Position, Prefix, Preprocess
from vitrim.tasks.classification import Classification
from vitrim.training import TrainConfig

COMCAT = ComcatConfig(budget=Budget(keep_macs=0.6), images=16, probe_images=4, align=2)
RECOVER = RecoverConfig(steps=3, batch_size=8, eval_every=2, log_every=1)
MEASURE = MeasureConfig(batch_sizes=(1,), runs=2, runtimes=("eager",))
JUDGE = EvaluateConfig(samples=4, check_dense=False)


def tiny(seed: int = 0, *, outputs: bool = True) -> Vit:
    block = BlockSpec(attention=AttentionSpec(heads=2, qk_dim=8, v_dim=8, scale=8**-0.5), mlp=MlpSpec(hidden=32))
    spec = ModelSpec(
        image_px=(8, 8),
        patch_px=(4, 4),
        width=16,
        position=Position(grid=(2, 2)),
        blocks=(block, block),
        outputs=(Output(classes=3),) if outputs else (),
    )
    how = Preprocess(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), size_px=(8, 8))
    config = Config(
        spec=spec,
        preprocess=how,
        labels=("cat", "dog", "owl") if outputs else None,
        task="classification" if outputs else "features",
    )
    torch.manual_seed(seed)
    model = build(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def pictures(count: int = 40, *, labelled: bool = True) -> Any:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (count, 3, 8, 8), generator=generator, dtype=torch.uint8)
    return (images, torch.arange(count) % 3) if labelled else images


def job(out: Path, **changes: Any) -> pipeline.RunResult:
    settings: dict[str, Any] = {
        "data": pictures(),
        "recover": RECOVER,
        "measure": MEASURE,
        "evaluate": JUDGE,
    }
    model, config = changes.pop("model", None) or tiny(), changes.pop("config", COMCAT)
    return pipeline.run(model, config, out=out, **{**settings, **changes})


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> Any:
    """The tiny network is never faster; the warnings of it have tests of their own."""
    logging.getLogger("vitrim.pipeline").setLevel(logging.ERROR)
    yield
    logging.getLogger("vitrim.pipeline").setLevel(logging.NOTSET)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> pipeline.RunResult:
    return job(tmp_path_factory.mktemp("run") / "small")


@pytest.fixture
def again(whole: pipeline.RunResult, tmp_path: Path) -> Path:
    """A copy of the finished run's folder."""
    import shutil

    return Path(shutil.copytree(whole.folder, tmp_path / "small"))


def figures_of(result: pipeline.RunResult) -> dict[str, Any]:
    """What does not depend on the clock."""
    return {
        key: result.summary[key]
        for key in ("specs", "costs", "metrics", "difference", "file_bytes", "data", "provenance")
    }


def test_the_folder_is_an_artifact_with_a_report(whole: pipeline.RunResult) -> None:
    names = {path.name for path in whole.folder.iterdir()}
    assert names == {*artifact.FILES, "report.html", "summary.json", "stages"}
    loaded = vitrim.load(str(whole.folder))
    assert loaded.spec == whole.spec
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), whole.model.parameters(), strict=True))
    assert whole.redone == STAGES


def test_the_result_meets_the_budget(whole: pipeline.RunResult) -> None:
    assert counting.cost(whole.spec).macs <= 0.6 * counting.cost(tiny().spec).macs


def test_the_last_block_lets_only_the_read_tokens_through(whole: pipeline.RunResult, tmp_path: Path) -> None:
    assert [step["method"] for step in whole.model.selection.to_dict()["steps"]] == ["exact_tail", "comcat"]
    assert isinstance(whole.spec.blocks[-1].steps[-1], Prefix)
    kept = job(tmp_path / "kept", exact_tail=False, recover=None, measure=None)
    assert [step["method"] for step in kept.model.selection.to_dict()["steps"]] == ["comcat"]
    assert not kept.spec.blocks[-1].steps
    page = (whole.folder / "report.html").read_text(encoding="utf-8")
    assert "changes no output" in page
    assert "changes no output" not in (tmp_path / "kept" / "report.html").read_text(encoding="utf-8")


def test_a_method_may_start_from_anothers_network_at_twice_the_budget(tmp_path: Path) -> None:
    half = replace(COMCAT, budget=Budget(keep_macs=0.4))
    made = job(tmp_path / "b", config=half, init="dcvit", recover=None, measure=None, data=pictures(80))
    dense = counting.cost(tiny().spec).macs
    assert [step.method for step in made.model.selection.steps] == ["exact_tail", "dcvit", "comcat"]
    assert counting.cost(made.spec).macs <= 0.4 * dense
    assert made.model.provenance["config"]["init"] == "dcvit"
    assert not (made.folder / "stages" / "search").exists()
    for wrong, said in (("comcat", "another method"), ("uvc", "closed forms")):
        with pytest.raises(ConfigError, match=said):
            job(tmp_path / "c", config=half, init=wrong)
        assert not (tmp_path / "c").exists()


def test_shares_refer_to_the_model_as_it_was_passed_in(whole: pipeline.RunResult) -> None:
    assert whole.summary["budget"] == {"keep_macs": 0.6}
    assert whole.summary["limits"]["macs"] == int(0.6 * counting.cost(tiny().spec).macs)


def test_before_and_after_are_scored_on_the_validation_split(whole: pipeline.RunResult) -> None:
    metrics = whole.summary["metrics"]
    assert set(metrics) == {"dense", "compressed", "recovered"}
    assert {facts["count"] for facts in metrics.values()} == {4}  # a tenth of 40
    assert whole.summary["data"]["split"] == "validation"
    told = vitrim.load(str(whole.folder)).provenance
    assert told["metrics"]["before"]["top1"] == metrics["dense"]["top1"]
    assert told["metrics"]["after"]["top1"] == metrics["recovered"]["top1"]


def test_the_summary_is_what_was_returned_and_the_report_shows_it(whole: pipeline.RunResult) -> None:
    assert json.loads((whole.folder / "summary.json").read_text()) == json.loads(json.dumps(whole.summary))
    page = whole.report.read_text()
    assert f'value="{whole.summary["metrics"]["recovered"]["loss"]!r}" data-path="metrics/recovered/loss"' in page
    assert page.count("<img ") == 4


def test_nothing_written_holds_a_path_of_this_machine(whole: pipeline.RunResult) -> None:
    for path in whole.folder.rglob("*"):
        if path.suffix in (".json", ".html", ".md", ".jsonl"):
            assert str(whole.folder.parent) not in path.read_text(encoding="utf-8"), path.name


def test_the_callers_model_and_random_state_are_left_as_they_were(tmp_path: Path) -> None:
    model = tiny().train()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    job(tmp_path / "small", model=model)
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_goes_on_at_the_first_missing_stage(stage: str, again: Path, whole: pipeline.RunResult) -> None:
    (again / "stages" / f"{stage}.json").unlink()
    result = job(again, resume=True)
    assert result.redone == STAGES[STAGES.index(stage) :]
    assert figures_of(result) == figures_of(whole)
    for ours, theirs in zip(result.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_resuming_a_whole_run_does_nothing_again(again: Path, whole: pipeline.RunResult) -> None:
    result = job(again, resume=True)
    assert result.redone == ()
    assert result.summary == whole.summary


def test_a_run_killed_inside_the_recovery_ends_as_an_undisturbed_one(tmp_path: Path, whole: pipeline.RunResult) -> None:
    def die(stage: str, done: int, total: int, **facts: Any) -> None:
        if stage == "train" and done == 2:
            raise KeyboardInterrupt

    changes = {"recover": replace(RECOVER, checkpoint_seconds=0)}
    with pytest.raises(KeyboardInterrupt):
        job(tmp_path / "small", progress=die, **changes)
    assert not (tmp_path / "small" / "config.json").exists()
    result = job(tmp_path / "small", resume=True, **changes)
    assert result.redone == STAGES[2:]
    assert figures_of(result)["metrics"] == figures_of(whole)["metrics"]


def test_without_recovery_and_measuring_these_stages_are_left_out(tmp_path: Path) -> None:
    result = job(tmp_path / "small", recover=None, measure=None)
    assert (result.summary["recovery"], result.summary["timing"], result.summary["metrics"]["recovered"]) == (None,) * 3
    assert result.report.is_file()


def test_unlabelled_photos_are_judged_by_agreement(tmp_path: Path) -> None:
    result = job(tmp_path / "small", data=pictures(labelled=False))
    metrics = result.summary["metrics"]["recovered"]
    assert metrics["top1"] is None
    assert 0 <= metrics["agreement"] <= 1
    assert result.summary["recovery"]["objective"] == "label_free"
    assert result.summary["difference"] is None


def test_an_encoder_is_judged_by_its_tokens(tmp_path: Path) -> None:
    result = job(tmp_path / "small", model=tiny(outputs=False), data=pictures(labelled=False), measure=None)
    metrics = result.summary["metrics"]["recovered"]
    assert -1 <= metrics["worst_image_cosine"] <= metrics["token_cosine"] <= 1
    assert "cosine" not in metrics
    assert result.summary["recovery"]["objective"] == "label_free"
    assert result.summary["product"]["name"] == "tokens"
    page = result.report.read_text()
    assert "It is for all its 5 tokens behind the final norm, the class token among them." in page
    assert "tokens at cosine" in page.split("</h1>")[0]
    assert "all its tokens behind the final norm" in (result.folder / "README.md").read_text()


def test_merged_tokens_come_back_through_the_whole_job(tmp_path: Path) -> None:
    model = surgery.resized(tiny(outputs=False), (24, 24))  # 36 patch tokens
    generator = torch.Generator().manual_seed(1)
    photos = torch.randint(0, 256, (24, 3, 24, 24), generator=generator, dtype=torch.uint8)
    config = AutoConfig(budget=Budget(keep_macs=0.8), images=8, axes=("tokens",), builds=1)
    result = job(tmp_path / "small", model=model, config=config, data=photos, measure=None)
    assert result.spec.restore
    assert result.summary["recovery"]["objective"] == "label_free"
    assert 0 < result.summary["metrics"]["recovered"]["token_cosine"] <= 1
    x = torch.randn(2, 3, 24, 24)
    assert result.model(x, want=("tokens",))["tokens"].shape == (2, 37, 16)
    assert [one.shape for one in result.model.features(x, [0, 1])] == [(2, 16, 6, 6)] * 2
    page = result.report.read_text()
    assert re.search(
        r"Its blocks run on \d+ tokens in the first to \d+ in the last; behind that all 37 come back.", page
    )
    assert "tokens out" in page


def test_an_encoder_whose_output_is_the_product_is_judged_by_its_features(tmp_path: Path) -> None:
    config = replace(COMCAT, product="output")
    result = job(
        tmp_path / "small",
        model=tiny(outputs=False),
        config=config,
        data=pictures(labelled=False),
        recover=None,
        measure=None,
    )
    assert -1 <= result.summary["metrics"]["compressed"]["cosine"] <= 1
    assert "token_cosine" not in result.summary["metrics"]["compressed"]
    words = "It is for its features, the class token; tokens by themselves are not, and may be lost."
    assert words in result.report.read_text()


def test_the_methods_product_goes_on_to_recovery_scores_and_report(tmp_path: Path) -> None:
    """A classifier that is for its tokens: none is dropped, all are learned and compared; or what the two name themselves."""
    config = replace(COMCAT, product="tokens")
    result = job(tmp_path / "small", config=config, measure=None)
    assert not surgery.has_exact_tail(result.spec)
    assert result.summary["recovery"]["objective"] == "label_free"
    assert {"token_cosine", "top1", "agreement"} <= {*result.summary["metrics"]["recovered"]}
    page = result.report.read_text()
    assert "the classifier&#39;s answers are not, and may be lost" in page
    assert "tokens at cosine" in page.split("</h1>")[0]
    own = {"recover": replace(RECOVER, product="output"), "evaluate": replace(JUDGE, product="output")}
    result = job(tmp_path / "other", config=config, measure=None, **own)
    assert result.summary["recovery"]["objective"] == "distilled"
    assert "token_cosine" not in result.summary["metrics"]["recovered"]


def test_tokens_that_an_exact_tail_drops_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    tail = surgery.exact_tail(tiny())
    for settings in (
        {"model": tail, "config": replace(COMCAT, product="tokens")},
        {"evaluate": replace(JUDGE, product="tokens")},  # the job puts a tail in front of a method that goes by answers
        {"recover": replace(RECOVER, product="tokens")},
    ):
        with pytest.raises(ConfigError, match=r"exact tail.*expected a token for each patch.*--product output"):
            job(tmp_path / "small", **settings)
        assert not (tmp_path / "small").exists()


def test_a_second_cut_can_refer_to_the_first_model(whole: pipeline.RunResult, tmp_path: Path) -> None:
    dense = counting.cost(tiny().spec).macs
    half = replace(COMCAT, budget=Budget(keep_macs=0.45))
    settings: dict[str, Any] = {"config": half, "recover": None, "measure": None}
    result = job(tmp_path / "b", model=whole.model, relative_to="original", **settings)
    assert 0.9 * 0.45 * dense < counting.cost(result.spec).macs <= 0.45 * dense
    assert artifact.load(result.folder).provenance["original"]["spec"] == tiny().spec.to_dict()
    assert [step.method for step in result.model.selection.steps] == ["exact_tail", "comcat", "comcat"]


# --------------------------------------------------------------------------------------- refusals: nothing is written


def test_an_existing_folder_is_refused_without_force_or_resume(again: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in again.rglob("*")}
    with pytest.raises(ConfigError, match=r"not empty.*--resume.*--force"):
        job(again)
    assert before == {path: path.stat().st_mtime_ns for path in again.rglob("*")}


def test_force_replaces_a_run_and_leaves_other_files(again: Path) -> None:
    (again / "notes.txt").write_text("mine")
    result = job(again, force=True, recover=None, measure=None)
    assert result.redone == STAGES
    assert (again / "notes.txt").read_text() == "mine"
    assert not (again / "stages" / "recovered").exists()


def test_force_does_not_replace_what_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(ConfigError, match="did not write"):
        job(tmp_path, force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"config": replace(COMCAT, budget=Budget(keep_macs=0.7))}, "settings.budget.keep_macs was 0.6 and is 0.7"),
        ({"recover": replace(RECOVER, lr=0.1)}, "recover.lr"),
        ({"data": pictures(50)}, "data.train"),
        ({"model": tiny(seed=1)}, "weights"),
        ({"recover": None}, "recover"),
    ],
)
def test_resuming_with_another_config_says_which_key_differs(again: Path, changes: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        job(again, resume=True, **changes)
    assert (again / "summary.json").is_file()


def test_resuming_with_other_workers_is_allowed(again: Path) -> None:
    assert job(again, resume=True, recover=replace(RECOVER, workers=1, log_every=2)).redone == ()


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"config": replace(COMCAT, budget=Budget(keep_macs=0.001))}, BudgetError, "out of reach"),
        ({"resume": True}, ConfigError, "nothing to resume"),
        ({"resume": True, "force": True}, ConfigError, "contradict"),
        ({"config": Budget(keep_macs=0.5)}, ConfigError, "no method's config"),
        ({"relative_to": "parent"}, ConfigError, "relative_to"),
        ({"recover": replace(RECOVER, batch_size=64)}, DataError, "at least one full batch"),
        (
            {"recover": replace(RECOVER, objective="supervised"), "data": pictures(labelled=False)},
            DataError,
            "no labels",
        ),
        (
            {"evaluate": EvaluateConfig(), "data": pictures(1200)},
            DataError,
            r"chance is 33.3 %.*mean=\(0.5, 0.5, 0.5\)",
        ),
        ({"data": "no/such/place"}, DataError, "no such file"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(
    tmp_path: Path, changes: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        job(tmp_path / "small", **changes)
    assert list(tmp_path.iterdir()) == []


def test_an_out_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "small").write_text("mine")
    with pytest.raises(ConfigError, match="is a file"):
        job(tmp_path / "small")


@pytest.mark.parametrize("name", ["plan", "config"])
def test_a_damaged_stage_file_is_named(again: Path, name: str) -> None:
    (again / "stages" / f"{name}.json").write_text("{")
    with pytest.raises(ArtifactError, match=rf"{name}\.json.*damaged"):
        job(again, resume=True)


@pytest.mark.parametrize("name", ["compress", "evaluate"])
def test_an_edited_stage_file_is_refused_and_can_be_made_again(again: Path, name: str) -> None:
    place = again / "stages" / f"{name}.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | {"seconds": "x"}))
    (again / "stages" / "report.json").unlink()
    with pytest.raises(ArtifactError, match=rf"{name}\.json' is not what the run wrote. Remove it and resume"):
        job(again, resume=True)


# ------------------------------------------------------------------------------------------------------------ warnings


def test_a_plan_that_cannot_pay_is_said_before_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    said_at: list[int] = []

    def look(stage: str, done: int, total: int, **facts: Any) -> None:
        if stage == "train" and done == 1:
            said_at.append(len(caplog.records))

    with caplog.at_level(logging.WARNING, logger="vitrim.pipeline"):
        result = job(tmp_path / "small", config=replace(COMCAT, budget=Budget(keep_macs=0.98)), progress=look)
    assert any("at best 1.02 times" in text for text in result.summary["warnings"])
    assert said_at
    assert said_at[0] >= 1


def test_a_budget_that_is_met_already_is_said_and_what_is_left_of_the_original(tmp_path: Path) -> None:
    settings = {"recover": None, "measure": None}
    half = job(tmp_path / "half", config=replace(COMCAT, budget=Budget(keep_macs=0.5)), **settings)
    assert half.summary["original"] is None
    same = replace(COMCAT, budget=Budget(keep_macs=0.9))
    again = job(tmp_path / "again", model=half.folder, config=same, relative_to="original", **settings).summary
    assert any("meets the budget as it is" in text for text in again["warnings"])
    assert not any("The budget asks for" in text for text in again["warnings"])
    small, whole = again["costs"]["compressed"], counting.cost(tiny().spec)
    assert again["original"] == {
        "model": "a model in memory",
        "kept_macs": small["macs"] / whole.macs,
        "kept_params": small["params"] / whole.params,
    }
    said = render(again)
    assert "Of a model in memory, which it was first cut from, " in said


def test_a_recovery_that_did_harm_is_said_and_the_better_network_stays(tmp_path: Path) -> None:
    wild = replace(RECOVER, objective="label_free", lr=3.0, steps=12, warmup=0.0)
    made = job(tmp_path / "small", recover=wild, measure=None, data=pictures(300, labelled=False))
    told, metrics = made.summary["recovery"], made.summary["metrics"]
    assert told["kept"] == "cut"
    assert told["validation"][-1]["agreement"] < told["before"]["agreement"] == metrics["compressed"]["agreement"]
    assert metrics["recovered"]["agreement"] == told["before"]["agreement"]
    (said,) = (text for text in made.summary["warnings"] if "recovery lowered the agreement" in text)
    assert "on 30 validation images" in said
    assert "the network from before it was kept" in said
    cut = artifact.load(made.folder / "stages" / "compressed")
    assert all(torch.equal(a, b) for a, b in zip(cut.parameters(), made.model.parameters(), strict=True))
    assert made.model.provenance["recovery"]["kept"] == "cut"
    again = pipeline.recover(cut, teacher=tiny(), data=pictures(300, labelled=False), config=wild)
    assert again.report["recovery"]["warnings"] == [said]
    assert all(torch.equal(a, b) for a, b in zip(cut.parameters(), again.model.parameters(), strict=True))


def test_a_loss_within_the_interval_is_said_to_be_no_more_than_chance() -> None:
    assert "from 73.5% to 73.2%, a difference that so many images cannot tell from chance:" in harm(
        "top1", 0.735, 0.732, 1000
    )
    assert "from 73.5% to 60.0%: the network" in harm("top1", 0.735, 0.6, 1000)
    assert "from 0.981 to 0.973: the network" in harm("cosine", 0.981, 0.973, 10)


# ------------------------------------------------------------------------------------------------------------- figures


def test_the_difference_is_in_points_with_an_interval_around_it() -> None:
    before = [True] * 80 + [False] * 20
    after = [True] * 70 + [False] * 10 + [True] * 5 + [False] * 15
    found = comparison.difference(before, after)
    assert found is not None
    assert found["points"] == pytest.approx(-5)
    assert found["low"] < -5 < found["high"]
    same = comparison.difference(before, before)
    assert same is not None
    assert (same["points"], same["count"], same["worse"], same["better"]) == (0, 100, 0, 0)
    assert 0 < same["high"] == pytest.approx(-same["low"])  # a hundred images do not show that nothing changed
    assert comparison.difference(None, after) is None


def test_a_trained_model_passes_the_check_and_unlabelled_images_need_none() -> None:
    from vitrim import data

    images, labels = pictures(120)
    model = tiny()
    how = model.config.preprocess
    assert how is not None
    with torch.no_grad():
        labels = model((images / 255 - 0.5) / 0.25).argmax(-1)
    if len(np.unique(labels.numpy())) < 2:
        pytest.skip("this random network says one class")
    held = data.open((images, labels), split="all")
    assert Classification().refuse_untrained(model, held) == 1.0
    assert Classification().refuse_untrained(model, data.open(images, split="all")) is None


def test_recover_leaves_its_inputs_and_gives_a_trained_copy() -> None:
    model, teacher = tiny(1), tiny(0)
    before = copy.deepcopy(model.state_dict())
    made = pipeline.recover(model, teacher=teacher, data=pictures(), config=RECOVER)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert any(not torch.equal(before[name], tensor) for name, tensor in made.model.state_dict().items())
    assert [line["step"] for line in made.history if line["kind"] == "train"] == [1, 2, 3]
    assert made.variant == "distilled"


def test_recovering_a_name_or_with_another_config_is_refused() -> None:
    cases: tuple[tuple[dict[str, Any], type[VitrimError], str], ...] = (
        ({"small": "small/"}, VitrimError, "the model is a str"),
        ({"teacher": "timm:x"}, VitrimError, "the teacher is a str"),
        ({"config": TrainConfig(steps=1)}, ConfigError, "TrainConfig; expected a RecoverConfig"),
    )
    for case, kind, said in cases:
        how = {"small": tiny(), "teacher": tiny(), "data": pictures(), "config": RECOVER, **case}
        with pytest.raises(kind, match=said):
            pipeline.recover(how.pop("small"), **how)


def test_recovering_without_a_teacher_says_what_to_pass() -> None:
    with pytest.raises(ConfigError, match="teacher="):
        pipeline.recover(tiny(), data=pictures(), config=RECOVER)


@pytest.mark.parametrize(
    ("settings", "said"), [({"batch_sizes": ()}, "batch_sizes"), ({"runtimes": ()}, "measure=None")]
)
def test_a_measurement_of_nothing_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        read(MeasureConfig, settings)


# ------------------------------------------------------------------------------ what a method needs, freezes and hands over

SEARCH: dict[str, Any] = {"steps": 4, "batch_size": 8, "device": "cpu", "log_every": 1}


@pytest.mark.parametrize(
    ("settings", "data", "said"),
    [
        ({}, pictures(labelled=False), "without labels"),
        ({"batch_size": 39}, pictures(), "training images for batch_size=39"),
        ({"amp": "fp16"}, pictures(), "needs a GPU"),
        ({"world_size": 2}, pictures(), "world_size=2"),
    ],
)
def test_what_a_search_lacks_is_said_before_anything_is_written(
    settings: dict[str, Any], data: Any, said: str, tmp_path: Path
) -> None:
    config = UvcConfig(budget=Budget(keep_macs=0.6), **{**SEARCH, **settings})
    with pytest.raises(VitrimError, match=said):
        job(tmp_path / "a", config=config, data=data, recover=None)
    assert not (tmp_path / "a").exists()


def test_the_whole_job_refuses_to_run_in_several_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="one process"):
        job(tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_frozen_parts_stay_through_the_recovery(tmp_path: Path) -> None:
    model = tiny()
    frozen = replace(COMCAT, freeze=("blocks.0", "blocks.1.mlp"), budget=Budget(keep_macs=0.9))
    made = job(tmp_path / "a", model=model, config=frozen, measure=None)
    before, after = model.state_dict(), made.model.state_dict()
    held = [n for n in before if n.startswith(("blocks.0.", "blocks.1.mlp.", "blocks.1.norm2."))]
    assert len(held) > 10
    assert all(torch.equal(before[name], after[name]) for name in held)
    assert any(not torch.equal(before[n], after[n]) for n in ("heads.label.weight", "norm.weight") if n in after)
    assert all(p.requires_grad for p in made.model.parameters())


def test_a_search_behind_another_method_learns_from_the_dense_network_and_counts_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    inner = uvc._inner

    def looked(teacher: Vit, *args: Any, **more: Any) -> Any:
        seen.append(teacher)
        return inner(teacher, *args, **more)

    monkeypatch.setattr(uvc, "_inner", looked)
    model = tiny()
    config = UvcConfig(budget=Budget(keep_macs=0.35), **SEARCH)
    made = job(tmp_path / "a", model=model, config=config, init="auto", recover=None, measure=None)
    assert [step.method for step in made.model.selection.steps] == ["exact_tail", "auto", "uvc"]
    assert seen[0].spec == model.spec
    dense, small = counting.cost(model.spec).macs, counting.cost(made.spec).macs
    (lines,) = (part["series"] for part in made.summary["sections"] if part["caption"] == "MACs against the budget")
    assert lines[1]["name"] == "budget"
    assert lines[1]["points"][-1][1] == pytest.approx(0.35, abs=1e-3)
    (saved,) = (part["rows"] for part in made.summary["sections"] if part["kind"] == "table")
    share, before, widths, skipping, _ = (row[1] for row in saved)
    assert share == pytest.approx(1 - small / dense)
    assert before + widths + skipping == pytest.approx(1)
    assert before > 0.2
    assert "before the search" in made.report.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("config", "title"),
    [
        (COMCAT, "Energy lost"),
        (AutoConfig(budget=Budget(keep_macs=0.6), images=16, builds=1), "Predicted and reached"),
        (DcvitConfig(budget=Budget(keep_macs=0.6), images=16, probe_images=4, batch_size=4), "Predicted loss by block"),
    ],
)
def test_what_a_method_shows_of_its_choice_is_on_the_page(tmp_path: Path, config: Any, title: str) -> None:
    made = job(tmp_path / "a", config=config, recover=None, measure=None, data=pictures(80))
    assert {part["title"] for part in made.summary["sections"]} == {title}
    page = made.report.read_text(encoding="utf-8")
    assert f"<h2>{title}</h2>" in page
    assert 'data-path="sections/0/rows/0/1"' in page


def test_few_photos_are_recovered_on_in_smaller_batches_and_it_is_said(tmp_path: Path) -> None:
    made = job(tmp_path / "a", recover=RecoverConfig(steps=2), data=pictures(50, labelled=False), measure=None)
    assert "Recovery: There are 45 training images, so one step takes 40 of them." in made.summary["warnings"]
    assert made.summary["recovery"]["steps"] == 2


def test_a_step_of_the_recovery_is_timed_in_turns_with_the_same_step_of_the_dense_model(tmp_path: Path) -> None:
    rates = job(tmp_path / "short", measure=None).summary["recovery"]["images_per_s"]
    assert rates is None  # three steps are too few to pay for a timing
    made = job(tmp_path / "long", recover=replace(RECOVER, steps=50, log_every=50), measure=None)
    rates = made.summary["recovery"]["images_per_s"]
    assert set(rates) == {"dense", "compressed"}
    assert min(rates.values()) > 0
    assert f"{rates['compressed'] / rates['dense']:.2f} times as fast" in made.report.read_text(encoding="utf-8")
    assert len(made.summary["recovery"]["curve"]) == 1  # the timing's own steps are not the recovery's


def test_timing_a_step_leaves_the_models_as_they_were() -> None:
    models = {"dense": tiny(), "other": tiny(1)}
    before = {name: copy.deepcopy(model.state_dict()) for name, model in models.items()}
    images = vitrim.data.open(pictures(), split="train", labelled=None)
    rates = pipeline.recovery.training_speeds(models, models["dense"], images, RECOVER, rounds=1)
    assert set(rates) == set(models)
    for name, model in models.items():
        assert all(torch.equal(value, before[name][key]) for key, value in model.state_dict().items())


def test_a_start_that_changes_nothing_is_said(tmp_path: Path) -> None:
    config = UvcConfig(budget=Budget(keep_macs=0.7), **SEARCH)
    made = job(tmp_path / "a", config=config, init="auto", recover=None, measure=None)
    assert any("changes nothing" in text for text in made.summary["warnings"])


def test_a_tail_that_is_not_wanted_is_not_added_by_the_method_either(tmp_path: Path) -> None:
    config = AutoConfig(budget=Budget(keep_macs=0.7), images=16, builds=1)
    for name, changes in (
        ("flag", {"config": config, "exact_tail": False}),
        ("axes", {"config": replace(config, axes=("qk", "vo", "mlp"))}),
    ):
        made = job(tmp_path / name, recover=None, measure=None, **changes)
        assert not any(isinstance(step, Prefix) for step in made.spec.blocks[-1].steps)
        assert counting.cost(made.spec).macs <= 0.7 * counting.cost(tiny().spec).macs


def test_a_budget_that_leaves_no_attention_is_refused_with_the_least_that_does(tmp_path: Path) -> None:
    def dcvit(keep: float) -> DcvitConfig:
        return DcvitConfig(budget=Budget(keep_macs=keep), images=16, probe_images=4, batch_size=4, align=1)

    how: dict[str, Any] = {"recover": None, "measure": None, "data": pictures(80)}
    with pytest.raises(BudgetError, match="out of reach") as refused:
        job(tmp_path / "none", config=dcvit(0.1), **how)
    assert not (tmp_path / "none").exists()
    found = re.search(r"shares (\S+) to 1", str(refused.value))
    assert found is not None
    least = float(found[1])
    made = job(tmp_path / "least", config=dcvit(least), **how)
    assert sum(block.attention is not None for block in made.spec.blocks) == 1
    whole = counting.cost(tiny().spec).macs
    assert least * whole * 0.99 <= counting.cost(made.spec).macs <= least * whole


def test_a_network_with_one_answer_for_every_image_is_refused_before_it_is_recovered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a method that leaves the attention there and takes what it hands on."""
    blind = tiny()
    for block in blind.blocks:
        torch.nn.init.zeros_(block.attention.out.weight)

    def emptied(model: Vit, config: Any, **how: Any) -> Compressed:
        return Compressed(model=blind, method="comcat", variant="svd")

    monkeypatch.setattr("vitrim.methods.comcat.run.compress", emptied)
    with pytest.raises(BudgetError, match=r"same for every image.*such as keep_macs=1"):
        job(tmp_path / "a")
    assert not (tmp_path / "a" / "stages" / "recover").exists()
    with pytest.raises(BudgetError, match="same for every image"):
        vitrim.compress(tiny(), COMCAT, data=pictures())
    with pytest.raises(ConfigError, match="the model gives the same for every image"):
        pipeline.recover(blind, teacher=tiny(), data=pictures(80))
    with pytest.raises(ConfigError, match="the teacher gives the same for every image"):
        pipeline.recover(tiny(), teacher=blind, data=pictures(80))


def test_a_blind_model_that_is_cut_is_said(caplog: pytest.LogCaptureFixture) -> None:
    blind = tiny()
    for block in blind.blocks:
        torch.nn.init.zeros_(block.attention.out.weight)
    with caplog.at_level(logging.WARNING, logger="vitrim"):
        vitrim.compress(blind, replace(COMCAT, variant="svd", budget=Budget(keep_macs=0.9)))
    assert "the model that was given gives the same for every image" in caplog.text


# --------------------------------------------------------------------------------------------- what a network says of itself


def described(model: Vit) -> Vit:
    """A dense model as a published one is: with figures, a licence and a history of its own."""
    model.provenance = {
        "source": "timm:tiny",
        "architecture": "tiny",
        "license": "cc-by-nc-4.0",
        "metrics": {"after": {"top1": 0.99}},
        "steps": 7020,
        "sha256": "0" * 64,
        "method": "train",
    }
    return model


def test_both_doors_say_what_a_network_was_cut_from_and_its_own_figures(tmp_path: Path) -> None:
    dense = described(tiny())
    small = vitrim.compress(dense, COMCAT, data=pictures())
    cut = artifact.load(small.save(tmp_path / "cut")).provenance
    fitted = pipeline.recover(small, teacher=dense, data=pictures(), config=RECOVER)
    recovered = artifact.load(fitted.save(tmp_path / "recovered")).provenance
    ran = artifact.load(job(tmp_path / "ran", model=dense, measure=None).folder).provenance
    for told in (cut, recovered, ran):
        first = told["original"]
        assert (first["source"], first["spec"], first["license"]) == ("timm:tiny", dense.spec.to_dict(), "cc-by-nc-4.0")
        assert first["metrics"] == dense.provenance["metrics"]
        assert (told["source"], told["architecture"]) == ("timm:tiny", "tiny")
        assert (told["method"], told["variant"], told["seed"]) == ("comcat", "whitened", 0)
        assert told["config"]["budget"]["keep_macs"] == 0.6
        assert not {"license", "steps", "parent"} & set(told)
    assert "metrics" not in cut
    assert set(recovered) == set(ran)
    assert recovered["data"] == ran["data"]
    spent = fitted.report["recovery"]
    assert recovered["metrics"]["after"] == spent["before" if spent["kept"] == "cut" else "after"]
    assert 0 <= recovered["metrics"]["before"]["top1"] < 0.99
    assert dense.provenance["steps"] == 7020
    # what it was cut from is found again
    again = job(tmp_path / "again", model=small.model, relative_to="original", recover=None, measure=None)
    assert counting.cost(again.spec).macs <= 0.6 * counting.cost(dense.spec).macs


def test_a_run_at_another_image_size_counts_its_budget_there_and_says_so(tmp_path: Path) -> None:
    dense = tiny()
    result = job(tmp_path / "small", model=dense, image_px=(12, 16), recover=None, measure=None)
    sized = surgery.resized(dense, (12, 16))
    assert result.spec.image_px == (12, 16)
    assert result.summary["costs"]["dense"]["macs"] == counting.cost(sized).macs
    assert result.summary["costs"]["compressed"]["macs"] <= 0.6 * counting.cost(sized).macs
    assert artifact.load(result.folder).config.preprocess == sized.config.preprocess
    assert "for images of 12 x 16 px" in result.report.read_text()
    assert json.loads((result.folder / "stages" / "config.json").read_text())["image_px"] == [12, 16]
    with pytest.raises(ConfigError, match="image_px"):
        job(tmp_path / "small", model=dense, recover=None, measure=None, resume=True)


def test_shares_of_the_original_are_of_it_at_the_same_image_size() -> None:
    original = tiny()
    keeps = [surgery.Keep(hidden=tuple(range(16))), None]
    small = surgery.cut(original, keeps, method="test")
    small.provenance = {"original": {"spec": original.spec.to_dict()}}
    found = reference_of(surgery.resized(small, (16, 16)), "original")
    assert found.macs == counting.cost(surgery.resized(original, (16, 16))).macs
    assert reference_of(small, "original").macs == counting.cost(original).macs


def test_positions_of_another_grid_are_folded_before_anything_is_counted_or_timed(tmp_path: Path) -> None:
    dense = tiny()
    odd = surgery.with_spec(
        dense,
        replace(dense.spec, position=Position(grid=(3, 3))),
        {**dense.state_dict(), "position": torch.randn(10, 16)},
    )
    result = job(tmp_path / "small", model=odd, recover=None, measure=None)
    assert result.summary["costs"]["dense"]["params"] == counting.cost(dense).params
    assert result.spec.position.grid == (2, 2)
    assert vitrim.compress(odd, COMCAT, data=pictures()).spec.position.grid == (2, 2)
    assert odd.spec.position.grid == (3, 3)
