"""What the objectives score, and training on labels from a spec, a model or with a new head."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.specs import make, vit
from tests.training.kit import CLASSES, SPEC, as_lists, config_of, pictures, settings, tiny, weights
from vitrim import artifact, recipes
from vitrim.config import read
from vitrim.errors import ConfigError, DataError, TrainingError
from vitrim.model import Vit
from vitrim.recipes import names
from vitrim.spec import Config, Output, Prefix, Similarity
from vitrim.training import Batch, Step, TrainConfig, fit
from vitrim.training.objectives import Distilled, LabelFree, Supervised, decay_groups, train

STEP = Step(index=0, total=1, epoch=0)
EXAMPLES = torch.randn(6, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 3, 0, 1])


def configured(spec: Any = SPEC, seed: int = 0) -> Vit:
    """A random float64 model without gradients: these tests compare values."""
    model = make(spec, seed).requires_grad_(False)
    model.config = config_of(spec)
    return model


def scored(objective: Any, model: Vit, labels: Tensor | None = LABELS) -> float:
    objective.param_groups(model)
    return float(objective.loss(model, Batch(images=EXAMPLES, labels=labels), STEP))


# ---------------------------------------------------------------------------------------------------------------- labels


def test_supervised_is_cross_entropy_with_hard_and_soft_labels() -> None:
    model = configured()
    logits = model(EXAMPLES)
    hot = F.one_hot(LABELS, CLASSES).double()
    assert scored(Supervised(), model) == pytest.approx(float(F.cross_entropy(logits, LABELS)))
    assert scored(Supervised(), model, hot) == pytest.approx(float(F.cross_entropy(logits, LABELS)))
    expected = -((hot * 0.9 + 0.1 / CLASSES) * logits.log_softmax(-1)).sum(-1).mean()
    assert scored(Supervised(smoothing=0.1), model) == pytest.approx(float(expected))


def test_several_labels_are_scored_by_binary_cross_entropy() -> None:
    model = configured()
    several = torch.randint(0, 2, (6, CLASSES), generator=torch.Generator().manual_seed(1)).double()
    expected = F.binary_cross_entropy_with_logits(model(EXAMPLES), several * 0.8 + 0.1)
    assert scored(Supervised(smoothing=0.2, multi_label=True), model, several) == pytest.approx(float(expected))


def test_a_loss_of_the_callers_replaces_the_default() -> None:
    assert scored(Supervised(loss=lambda logits, labels: logits.sum() * 0 + 7), configured()) == 7


def test_missing_labels_are_refused() -> None:
    with pytest.raises(DataError, match="no labels"):
        scored(Supervised(), configured(), None)


def test_vectors_tokens_and_tables_do_not_decay() -> None:
    model = tiny()
    decayed, free = decay_groups(model.named_parameters())
    named = {id(p): name for name, p in model.named_parameters()}
    assert {"position", "prefix", "norm.weight", "stem.proj.bias"} <= {named[id(p)] for p in free["params"]}
    assert {"blocks.0.attention.qkv", "heads.head.weight"} <= {named[id(p)] for p in decayed["params"]}
    assert free["weight_decay"] == 0.0
    assert len(decayed["params"]) + len(free["params"]) == len(named)


# --------------------------------------------------------------------------------------------------------------- teachers


def test_soft_distillation_weighs_labels_and_the_teachers_probabilities() -> None:
    model, teacher = configured(), configured(seed=1)
    ours, theirs = model(EXAMPLES), teacher(EXAMPLES)
    kl = F.kl_div((ours / 3).log_softmax(-1), (theirs / 3).softmax(-1), reduction="batchmean") * 9
    expected = 0.7 * kl + 0.3 * F.cross_entropy(ours, LABELS)
    assert scored(Distilled(teacher, alpha=0.7, tau=3.0), model) == pytest.approx(float(expected))


def test_hard_distillation_follows_the_teachers_choice_and_needs_no_labels_at_alpha_one() -> None:
    model, teacher = configured(), configured(seed=1)
    expected = F.cross_entropy(model(EXAMPLES), teacher(EXAMPLES).argmax(-1))
    assert scored(Distilled(teacher, kind="hard", alpha=1.0), model, None) == pytest.approx(float(expected))


def test_a_distillation_token_answers_the_teacher_and_the_class_token_the_labels() -> None:
    spec = dataclasses.replace(
        SPEC,
        prefix=("cls", "dist"),
        outputs=(Output(classes=CLASSES), Output(name="head_dist", classes=CLASSES, reads=("dist",))),
    )
    model, teacher = configured(spec), configured(seed=1)
    found = model.outputs(EXAMPLES)
    choice = teacher(EXAMPLES).argmax(-1)
    expected = 0.5 * F.cross_entropy(found["head"], LABELS) + 0.5 * F.cross_entropy(found["head_dist"], choice)
    assert scored(Distilled(teacher, kind="hard"), model) == pytest.approx(float(expected))


def test_feature_matching_adds_the_relative_distance_of_the_streams() -> None:
    model, teacher = configured(), configured(seed=1)
    plain = scored(Distilled(teacher), model)
    ours, theirs = (m(EXAMPLES, want=("block:0",))["block:0"] for m in (model, teacher))
    distance = float((ours - theirs).square().mean() / theirs.square().mean())
    objective = Distilled(teacher, features=(0,), feature_weight=2.0)
    assert scored(objective, model) == pytest.approx(plain + 2 * distance)
    assert objective.metrics()["feature_loss"] == pytest.approx(distance)


def test_several_labels_are_distilled_label_by_label() -> None:
    model, teacher = configured(), configured(seed=1)
    goal = torch.sigmoid(teacher(EXAMPLES) / 2)
    expected = 4 * F.binary_cross_entropy_with_logits(model(EXAMPLES) / 2, goal)
    assert scored(Distilled(teacher, multi_label=True, alpha=1.0), model, None) == pytest.approx(float(expected))


def test_label_free_is_nothing_for_the_teacher_itself() -> None:
    teacher = configured()
    assert scored(LabelFree(teacher, taps=("block:0", "mid:1")), configured(), None) == pytest.approx(0, abs=1e-12)
    assert scored(LabelFree(teacher), configured(seed=1), None) > 0


def test_label_free_matches_the_features_of_an_encoder() -> None:
    spec = dataclasses.replace(SPEC, outputs=())
    model, teacher = configured(spec), configured(spec, seed=1)
    ours, theirs = model(EXAMPLES), teacher(EXAMPLES)
    expected = float((ours - theirs).square().mean() / theirs.square().mean())
    assert scored(LabelFree(teacher, taps=(), product="output"), model, None) == pytest.approx(expected)


@pytest.mark.parametrize("outputs", [(), SPEC.outputs])
def test_label_free_matches_every_token_where_they_are_the_product(outputs: Any) -> None:
    step = Similarity(keep=3, match="ward", carry=2)
    spec = dataclasses.replace(SPEC, outputs=outputs)
    merging = dataclasses.replace(
        spec, restore=True, blocks=(dataclasses.replace(SPEC.blocks[0], steps=(step,)), SPEC.blocks[1])
    )
    model, teacher = configured(merging), configured(spec, seed=1)
    ours, theirs = (one(EXAMPLES, want=("tokens",))["tokens"] for one in (model, teacher))
    expected = float((ours - theirs).square().mean() / theirs.square().mean())
    assert scored(LabelFree(teacher, taps=(), product="tokens"), model, None) == pytest.approx(expected)
    tapped = LabelFree(teacher, taps=("restored:1",), product="tokens")
    ours, theirs = (one(EXAMPLES, want=("restored:1",))["restored:1"] for one in (model, teacher))
    beside = float((ours - theirs).square().mean() / theirs.square().mean())
    assert scored(tapped, model, None) == pytest.approx(expected + beside)


def test_tokens_that_a_model_does_not_give_are_not_learned() -> None:
    last = dataclasses.replace(SPEC.blocks[-1], steps=(Prefix(),))
    model = configured(dataclasses.replace(SPEC, blocks=(SPEC.blocks[0], last)))
    with pytest.raises(ConfigError, match="no patch tokens are left"):
        scored(LabelFree(configured(), taps=(), product="tokens"), model, None)


def test_an_exact_tail_is_matched_on_its_prefix_tokens() -> None:
    last = dataclasses.replace(SPEC.blocks[-1], steps=(Prefix(),))
    model, teacher = configured(dataclasses.replace(SPEC, blocks=(SPEC.blocks[0], last))), configured()
    assert scored(LabelFree(teacher, taps=("block:1",)), model, None) == pytest.approx(0, abs=1e-12)


def test_streams_of_other_shapes_are_refused() -> None:
    first = dataclasses.replace(SPEC.blocks[0], steps=(Similarity(keep=3),))
    model = configured(dataclasses.replace(SPEC, blocks=(first, SPEC.blocks[1])))
    with pytest.raises(ConfigError, match="block:0: the model's stream is"):
        scored(LabelFree(configured(), taps=("block:0",)), model, None)


def test_a_teacher_sees_images_as_it_was_trained_on_them() -> None:
    model, teacher = configured(), configured()
    other = dataclasses.replace(config_of().preprocess, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))  # type: ignore[type-var]
    teacher.config = dataclasses.replace(teacher.config, preprocess=other)
    pixels = EXAMPLES * 0.25 + 0.5
    theirs = teacher((pixels - torch.tensor(other.mean).view(-1, 1, 1)) / torch.tensor(other.std).view(-1, 1, 1))
    expected = F.cross_entropy(model(EXAMPLES), theirs.argmax(-1))
    assert scored(Distilled(teacher, kind="hard", alpha=1.0), model) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize(
    ("make_it", "words"),
    [
        (lambda: Distilled(configured(), kind="firm"), "kind='firm'"),  # type: ignore[arg-type]
        (lambda: Distilled(configured(), alpha=2.0), r"alpha=2\.0"),
        (lambda: Distilled(configured(dataclasses.replace(SPEC, outputs=()))), "no classifier"),
        (lambda: scored(LabelFree(configured(vit(image=8, classes=7))), configured()), "7 classes"),
    ],
)
def test_a_teaching_that_cannot_be_is_refused(make_it: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make_it()


def test_fitting_with_a_teacher_lowers_the_loss_and_leaves_the_teacher_alone() -> None:
    teacher = tiny(seed=1).train()
    before = as_lists(teacher)
    result = fit(tiny(), LabelFree(teacher, taps=("block:0",)), pictures(labels=False), settings(steps=30, log_every=1))
    assert result.history[-1]["loss"] < 0.7 * result.history[0]["loss"]
    assert "feature_loss" in result.history[-1]
    assert teacher.training
    assert all(torch.equal(t, before[name]) for name, t in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())


# ------------------------------------------------------------------------------------------------------ train, on labels


def pair(count: int = 60) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 255, (count, 3, 8, 8), generator=generator, dtype=torch.uint8), torch.arange(
        count
    ) % CLASSES


def test_training_from_a_spec_leaves_an_artifact_that_loads(tmp_path: Path) -> None:
    result = train(config_of(), pair(), settings(), out=tmp_path / "run")
    loaded = artifact.load(tmp_path / "run")
    assert torch.allclose(weights(loaded), weights(result.model))
    known = json.loads((tmp_path / "run/provenance.json").read_text())
    assert known["config"]["lr"] == 1e-2
    assert set(known["metrics"]["validation"]) == {"loss", "count", "top1"}
    assert "validate" in (tmp_path / "run/metrics.jsonl").read_text()
    again = train(config_of(), pair(), settings(), out=tmp_path / "run", resume=True)
    assert torch.equal(weights(again.model), weights(result.model))


def test_smoothing_of_the_config_reaches_the_loss() -> None:
    a, b = (train(config_of(), pair(), settings(smoothing=s)).model for s in (0.0, 0.2))
    assert not torch.equal(weights(a), weights(b))


def test_the_start_is_a_function_of_the_seed_alone() -> None:
    torch.manual_seed(1)
    first = train(config_of(), pair(), settings())
    torch.manual_seed(2)
    second = train(config_of(), pair(), settings())
    assert torch.equal(weights(first.model), weights(second.model))


def test_fine_tuning_gives_a_new_model_and_leaves_the_callers_alone() -> None:
    model = tiny()
    before = as_lists(model)
    result = train(model, pair(), settings())
    assert result.model is not model
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_a_new_head_fits_the_classes_and_keeps_the_rest() -> None:
    model = tiny(dataclasses.replace(SPEC, outputs=(Output(classes=9, rank=2),)))
    result = train(model, pair(), settings(lr=1e-9, min_lr=0.0, steps=1), new_head=True)
    assert result.model.spec.outputs == (Output(classes=CLASSES),)
    assert torch.allclose(result.model.blocks[0].mlp.fc1.weight, model.blocks[0].mlp.fc1.weight, atol=1e-6)  # type: ignore[union-attr, arg-type]
    assert (
        train(tiny(dataclasses.replace(SPEC, outputs=())), pair(), settings(steps=1), new_head=True).model.spec.classes
        == CLASSES
    )


def test_too_few_classes_and_no_classifier_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"4 classes, the model 2.*--new-head"):
        train(tiny(dataclasses.replace(SPEC, outputs=(Output(classes=2),))), pair(), settings(), out=tmp_path / "run")
    with pytest.raises(ConfigError, match="no classifier"):
        train(tiny(dataclasses.replace(SPEC, outputs=())), pair(), settings(), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_several_labels_train_with_mixing_and_score_each_label() -> None:
    images, labels = pair()
    several = F.one_hot(labels, CLASSES).float()
    several[:, 0] = 1
    result = train(config_of(), (images, several), settings(mixup=0.5))
    last = [line for line in result.history if line["kind"] == "validate"][-1]
    assert 0 < last["map"] <= 1
    assert result.model.config.multi_label


def test_a_multi_label_model_stays_one_on_class_numbers_and_its_loss_is_that_of_each_label() -> None:
    images, labels = pair()
    config = dataclasses.replace(config_of(), problem_type="multi_label_classification")
    last = [line for line in train(config, (images, labels), settings(steps=1)).history if line["kind"] == "validate"][
        -1
    ]
    assert "top1" not in last
    logits = torch.randn(4, CLASSES)
    wanted = F.one_hot(torch.tensor([0, 2, 1, 0]), CLASSES).float()
    score = Supervised(multi_label=True).score
    assert score(logits, torch.tensor([0, 2, 1, 0])) == F.binary_cross_entropy_with_logits(logits, wanted)


def test_shares_train_by_cross_entropy_and_score_the_likeliest() -> None:
    images, labels = pair()
    soft = F.one_hot(labels, CLASSES) * 0.75 + 0.25 / CLASSES
    result = train(config_of(), (images, soft), settings(steps=1))
    assert not result.model.config.multi_label
    assert "top1" in [line for line in result.history if line["kind"] == "validate"][-1]


def test_class_numbers_with_gaps_are_refused_for_a_new_head() -> None:
    images, labels = pair()
    with pytest.raises(
        DataError, match=r"class numbers run from 0 to \d+, and \d+ of them are no image's \(the first is 1\)"
    ):
        train(tiny(SPEC), (images, labels * 2), settings(steps=1), new_head=True)
    with pytest.raises(DataError, match="every image has the same label"):
        train(tiny(SPEC), (images, labels * 0), settings(steps=1), new_head=True)


def test_without_labels_a_multi_label_teacher_is_followed_label_by_label() -> None:
    teacher, student = tiny(SPEC), tiny(SPEC)
    teacher.config = dataclasses.replace(teacher.config, problem_type="multi_label_classification")
    with torch.no_grad():
        next(iter(student.heads.values())).bias.add_(3.0)  # type: ignore[operator] # a softmax would not see it
    batch = Batch(images=pair()[0][:4].float() / 255, labels=None)
    objective = LabelFree(teacher, taps=())
    objective.param_groups(student)
    with torch.no_grad():
        p, q = teacher(batch.images).sigmoid().double(), student(batch.images).sigmoid().double()
        expected = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum(1).mean()
        assert float(objective.loss(student, batch, Step(index=0, total=1, epoch=0))) == pytest.approx(
            float(expected), rel=1e-4
        )


def test_loss_and_metric_of_the_callers_are_used() -> None:
    def metric(logits: Tensor, labels: Tensor) -> dict[str, float]:
        return {"shape": float(logits.shape[1]), "seen": float(len(labels))}

    result = train(config_of(), pair(), settings(), loss=lambda logits, labels: (logits**2).mean(), metric=metric)
    last = [line for line in result.history if line["kind"] == "validate"][-1]
    assert last["shape"] == CLASSES
    assert "top1" not in last


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_of_something_else_is_left_alone(tmp_path: Path, resume: bool) -> None:
    (tmp_path / "diary.txt").write_text("mine")
    with pytest.raises(TrainingError, match=r"diary\.txt"):
        train(config_of(), pair(), settings(), out=tmp_path, resume=resume)
    assert [p.name for p in tmp_path.iterdir()] == ["diary.txt"]


# --------------------------------------------------------------------------------------------------------------- recipes


@pytest.mark.parametrize("name", names())
def test_a_recipe_says_what_it_is_in_words(name: str) -> None:
    assert len(recipes.read(name)["doc"]) > 80


@pytest.mark.parametrize(
    ("name", "count"),
    [("cifar10-vit-micro", 1_205_898), ("cifar10-vit-tiny", 5_362_762), ("cifar10-t2t-micro", 1_408_752)],
)
def test_a_training_recipe_trains_for_a_few_steps(name: str, count: int) -> None:
    recipe = recipes.read(name)
    config = Config.from_dict(recipe["model"])
    values = {**recipe["train"], "steps": 2, "batch_size": 4, "device": "cpu", "eval_every": None}
    generator = torch.Generator().manual_seed(0)
    data = torch.randint(0, 255, (20, 3, 32, 32), generator=generator, dtype=torch.uint8), torch.arange(20) % 10
    result = train(dataclasses.replace(config, labels=None), data, read(TrainConfig, values))
    assert sum(p.numel() for p in result.model.parameters()) == count
    assert weights(result.model).isfinite().all()


def test_an_unknown_recipe_is_refused_with_the_near_miss() -> None:
    with pytest.raises(ConfigError, match="did you mean 'cifar10-vit-micro'"):
        recipes.read("cifar10-vit-mikro")
