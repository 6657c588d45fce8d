"""Scores of classifiers and encoders."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.data.pictures import SMALL, class_folder, jpeg, parquet
from vitrim import data, surgery
from vitrim.errors import ConfigError, DataError
from vitrim.model import Vit, build
from vitrim.spec import (
    AttentionSpec,
    BlockSpec,
    Config,
    ConvStem,
    MlpSpec,
    ModelSpec,
    Output,
    Pool,
    Position,
    Similarity,
)
from vitrim.tasks.classification import Kind, evaluate, likeness, mean_average_precision, nearest, scores
from vitrim.tasks.samples import answers
from vitrim.tasks.task import quality

CIFAR = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def tiny(classes: int = 10, *, labels: tuple[str, ...] | None = CIFAR, seed: int = 0) -> Vit:
    attention = AttentionSpec(
        heads=2, qk_dim=8, v_dim=8, scale=8**-0.5, q_bias=True, k_bias=True, v_bias=True, out_bias=True
    )
    spec = ModelSpec(
        image_px=(32, 32),
        patch_px=(16, 16),
        channels=3,
        stem=ConvStem(bias=True),
        width=16,
        prefix=("cls",),
        position=Position(kind="learned", grid=(2, 2), prefix_rows=True),
        blocks=(BlockSpec(attention=attention, mlp=MlpSpec(kind="gelu", hidden=16)),),
        pool=Pool(kind="cls"),
        outputs=(Output(name="classifier", reads=("pool",), classes=classes),) if classes else (),
    )
    torch.manual_seed(seed)
    model = build(Config(spec=spec, task="classification" if classes else "features", preprocess=SMALL, labels=labels))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model


class Oracle(nn.Module):
    """Looks the label up by the image."""

    def __init__(self, images: data.Images, offset: int = 0) -> None:
        super().__init__()
        view = data.evaluation(SMALL)
        self.known = {view(images[i][0]).numpy().tobytes(): int(images.labels[i]) for i in range(len(images))}
        self.offset = offset
        self.config = Config(spec=tiny().spec, preprocess=SMALL, labels=CIFAR)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wanted = torch.tensor([self.known[image.numpy().tobytes()] for image in x])
        return 10.0 * nn.functional.one_hot((wanted + self.offset) % 10, 10).float()


def test_a_perfect_model_scores_one_and_a_wrong_one_nothing():
    images = data.open("sample", split="validation", limit=30)
    right, wrong = evaluate(Oracle(images), images), evaluate(Oracle(images, 1), images)
    assert (right["top1"], right["top5"], right["count"]) == (1.0, 1.0, 30)
    assert right["loss"] < 0.01
    assert all(right["correct"])
    assert wrong["top1"] == 0.0
    assert right["predictions"] == images.labels.tolist()


def test_figures_agree_with_plain_torch_and_between_ways_of_running():
    model, images = tiny(), data.open("sample", split="validation", limit=50)
    facts = evaluate(model, images, batch_size=16)
    x = torch.stack([data.evaluation(SMALL)(images[i][0]) for i in range(50)])
    with torch.no_grad():
        logits = model(x)
    assert facts["predictions"] == logits.argmax(1).tolist()
    assert facts["loss"] == pytest.approx(nn.functional.cross_entropy(logits, images.labels).item(), rel=1e-5)
    assert facts["top1"] == pytest.approx((logits.argmax(1) == images.labels).double().mean().item())
    assert evaluate(model, images, batch_size=7, workers=2)["predictions"] == facts["predictions"]
    assert evaluate(model, "sample", limit=50)["predictions"] == facts["predictions"]
    assert evaluate(model, images, amp="bf16")["loss"] == pytest.approx(facts["loss"], rel=0.05)


def test_the_model_is_left_as_it_was_found():
    model = tiny()
    model.train()
    model.blocks[0].eval()
    evaluate(model, "sample", limit=10)
    assert model.training
    assert not model.blocks[0].training
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_labels_are_matched_by_name():
    images = data.open("sample", split="validation", limit=40)
    model = tiny()
    turned = tiny(labels=CIFAR[::-1])
    with torch.no_grad():
        turned.heads["classifier"].weight.copy_(model.heads["classifier"].weight.flip(0))
        turned.heads["classifier"].bias.copy_(model.heads["classifier"].bias.flip(0))
    assert evaluate(turned, images)["correct"] == evaluate(model, images)["correct"]


class Named(torch.utils.data.Dataset):
    """The sample's images with their labels as names, and nothing beside the items."""

    def __init__(self, images: data.Images) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[object, str]:
        image, label = self.images[index]
        return image, CIFAR[int(label)]  # type: ignore[arg-type]


def test_names_of_a_datasets_items_are_matched_by_name() -> None:
    images = data.open("sample", split="validation", limit=30)
    few = images.subset((images.labels >= 4).nonzero()[:, 0].numpy())  # the names' own order differs from the model's
    assert evaluate(Oracle(images), Named(few), split="all")["top1"] == 1.0


def test_numbers_without_names_are_those_of_a_model_without_names(tmp_path) -> None:
    file = parquet(tmp_path / "a.parquet", [jpeg(i) for i in range(4)], [0, 2, 0, 2])
    assert evaluate(tiny(labels=None), file, split="all")["count"] == 4
    with pytest.raises(DataError, match="the data numbers its classes"):
        evaluate(tiny(), file, split="all")


def test_other_classes_are_refused(tmp_path):
    class_folder(tmp_path, {"fox": 10, "cat": 10})
    with pytest.raises(DataError, match=r"'fox'.*--new-head"):
        evaluate(tiny(), tmp_path)
    with pytest.raises(DataError, match=r"3 classes without names, the data 10: airplane.*--new-head"):
        evaluate(tiny(3, labels=None), "sample", limit=10)
    with pytest.raises(DataError, match="label 12 for a model of 10 classes"):
        evaluate(tiny(), (torch.zeros(20, 3, 32, 32), torch.full((20,), 12)))
    with pytest.raises(DataError, match="--mean, --std and --size"):
        evaluate(nn.Flatten(), "sample", limit=10)


def test_agreement_with_a_model_its_metrics_or_its_predictions():
    images = data.open("sample", split="validation", limit=40)
    first, second = tiny(seed=0), tiny(seed=1)
    other = evaluate(second, images)
    expected = (
        sum(a == b for a, b in zip(evaluate(first, images)["predictions"], other["predictions"], strict=True)) / 40
    )
    for reference in (second, other, other["predictions"], torch.tensor(other["predictions"])):
        assert evaluate(first, images, reference=reference)["agreement"] == expected
    assert evaluate(first, images, reference=first)["agreement"] == 1.0
    with pytest.raises(DataError, match="predictions for 40 images, this model for 20"):
        evaluate(first, images.take(20), reference=other)


def test_unlabelled_images_give_predictions_and_agreement(tmp_path):
    class_folder(tmp_path, {"photos": 20})
    facts = evaluate(tiny(), tmp_path, split="all", reference=tiny())
    assert (facts["top1"], facts["loss"], facts["count"], facts["agreement"]) == (None, None, 20, 1.0)


def test_encoders_are_compared_with_the_dense_model():
    images = data.open("sample", split="validation", limit=40)
    dense, other = tiny(0, labels=None), tiny(0, labels=None, seed=1)
    assert evaluate(dense, images, reference=dense, product="output") == {
        "count": 40,
        "skipped": 0,
        "cosine": pytest.approx(1.0),
        "knn_agreement": 1.0,
    }
    facts = evaluate(other, images, reference=dense, product="output")
    assert facts["cosine"] < 0.99
    assert facts["knn_agreement"] < 1.0
    with pytest.raises(DataError, match="compared with a model"):
        evaluate(dense, images, reference=[0] * 40)


def test_tokens_are_compared_one_by_one_and_as_all_at_once_whatever_the_batch():
    images = data.open("sample", split="validation", limit=20)
    dense, other = tiny(0, labels=None), tiny(0, labels=None, seed=1)
    facts = evaluate(other, images, reference=dense, batch_size=7)
    assert {*facts} == {
        "count",
        "skipped",
        "token_cosine",
        "worst_image_cosine",
        "class_cosine",
        "knn_agreement",
    }
    assert dense.config.preprocess is not None
    x = torch.stack([data.evaluation(dense.config.preprocess)(images[i][0]) for i in range(20)])
    with torch.no_grad():
        ours, theirs = (one(x, want=("tokens",))["tokens"].double() for one in (other, dense))
    cosine = (ours * theirs).sum(-1) / ours.norm(dim=-1) / theirs.norm(dim=-1)
    assert facts["token_cosine"] == pytest.approx(cosine.mean().item(), abs=1e-6)
    assert facts["worst_image_cosine"] == pytest.approx(cosine.mean(1).min().item(), abs=1e-6)
    assert facts["class_cosine"] == pytest.approx(cosine[:, 0].mean().item(), abs=1e-6)
    assert evaluate(other, images, reference=dense, batch_size=20) == pytest.approx(facts, abs=1e-6)
    assert quality(facts) == "token_cosine"


def test_tokens_of_a_classifier_stand_beside_its_answers_where_they_are_asked_for():
    images = data.open("sample", split="validation", limit=12)
    model = tiny()
    facts = evaluate(model, images, reference=model, product="tokens")
    assert (facts["token_cosine"], facts["agreement"]) == (pytest.approx(1.0), 1.0)
    assert facts["top1"] == evaluate(model, images)["top1"]
    assert "token_cosine" not in evaluate(model, images, reference=model)


def test_merged_tokens_are_compared_where_they_are_restored_and_refused_where_they_are_not():
    images = data.open("sample", split="validation", limit=8)
    dense = tiny(0, labels=None)
    step = Similarity(keep=3)
    blocks = (replace(dense.spec.blocks[0], steps=(step,)), *dense.spec.blocks[1:])
    lossy = surgery.with_spec(dense, replace(dense.spec, blocks=blocks), dense.state_dict())
    whole = surgery.with_spec(dense, replace(lossy.spec, restore=True), dense.state_dict())
    assert 0 < evaluate(whole, images, reference=dense)["token_cosine"] < 1
    assert "cosine" in evaluate(lossy, images, reference=dense)  # what is left to compare
    with pytest.raises(ConfigError, match="gives 4 tokens of width 16, the dense one 5") as told:
        evaluate(lossy, images, reference=dense, product="tokens")
    assert str(told.value).count(". ") == 1
    for reference in (None, evaluate(tiny(), images)):
        with pytest.raises(ConfigError, match="expected the dense one as reference="):
            evaluate(tiny(), images, reference=reference, product="tokens")


def test_neighbours_are_the_nearest_others():
    angles = torch.tensor([0.0, 0.1, 0.2, 2.0, 2.1, 2.2])
    points = torch.stack([angles.cos(), angles.sin()], dim=1)
    assert [sorted(row) for row in nearest(points, 2).tolist()] == [[1, 2], [0, 2], [0, 1], [4, 5], [3, 5], [3, 4]]
    assert likeness(points, points * 3.0) == {"cosine": pytest.approx(1.0), "knn_agreement": 1.0}


def test_several_labels_give_mean_average_precision():
    logits = torch.tensor([[3.0, 1.0], [2.0, 2.0], [1.0, 3.0]])
    targets = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
    assert mean_average_precision(logits, targets) == pytest.approx(((1 + 2 / 3) / 2 + 1) / 2)
    facts = scores(logits, targets, Kind(several=True))
    assert set(facts) == {"map", "loss", "predictions"}
    pixels = torch.rand(20, 3, 32, 32)
    whole = evaluate(tiny(), (pixels, (torch.rand(20, 10) > 0.5).float()), split="all", metric=_share)
    assert 0 < whole["map"] <= 1
    assert 0 <= whole["share"] <= 1


def test_a_multi_label_model_predicts_all_labels_above_one_half_and_agrees_where_all_are_the_same() -> None:
    images = data.open("sample", split="validation", limit=20)
    model, other = tiny(), tiny()
    for each in (model, other):
        each.config = replace(each.config, problem_type="multi_label_classification")
    with torch.no_grad():
        other.heads["classifier"].bias.add_(0.3)  # the likeliest class stays what it was
        x = torch.stack([data.evaluation(SMALL)(images[i][0]) for i in range(20)])
        said, theirs = model(x) > 0, other(x) > 0
        chances = model(x).sigmoid()
    facts = evaluate(model, images, reference=other)
    assert facts["predictions"] == [row.nonzero()[:, 0].tolist() for row in said]
    assert facts["agreement"] == (said == theirs).all(1).double().mean().item() < 1
    assert facts["map"] == pytest.approx(mean_average_precision(chances, nn.functional.one_hot(images.labels, 10)))
    assert "top1" not in facts
    assert evaluate(model, images, reference=evaluate(other, images))["agreement"] == facts["agreement"]
    for one, row in zip(answers(model, x, top=3), chances, strict=True):
        assert [each["probability"] for each in one] == pytest.approx(row.topk(3).values.tolist())


def test_shares_are_scored_by_their_likeliest_class() -> None:
    logits, soft = torch.randn(6, 3), torch.eye(3).repeat(2, 1) * 0.75 + 0.25 / 3
    facts = scores(logits, soft)
    assert facts["top1"] == (logits.argmax(1) == soft.argmax(1)).double().mean().item()
    assert facts["loss"] == pytest.approx(nn.functional.cross_entropy(logits, soft).item())


def _share(logits: torch.Tensor, targets: torch.Tensor) -> dict[str, float]:
    return {"share": ((logits > 0) == (targets > 0)).double().mean().item()}


def test_broken_images_are_counted(tmp_path):
    class_folder(tmp_path, {"cat": 10, "dog": 10})
    (tmp_path / "cat" / "0.jpg").write_bytes(jpeg(0)[:100])
    images = data.open(tmp_path, split="all", on_broken="skip")
    facts = evaluate(tiny(), images)
    assert (facts["count"], facts["skipped"], len(facts["correct"])) == (19, 1, 19)


def test_progress_is_told_after_each_batch_and_amp_is_checked():
    told: list[tuple[str, int, int]] = []
    evaluate(
        tiny(), "sample", limit=20, batch_size=8, progress=lambda stage, done, total: told.append((stage, done, total))
    )
    assert told == [("evaluate", 0, 20), ("evaluate", 8, 20), ("evaluate", 16, 20), ("evaluate", 20, 20)]
    with pytest.raises(DataError, match="amp='half'"):
        evaluate(tiny(), "sample", limit=10, amp="half")


def test_another_input_size_is_the_preprocessings_business():
    small = replace(SMALL, size_px=(16, 16))
    assert data.evaluation(small)(data.open("sample", limit=1)[0][0]).shape == (3, 16, 16)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_answers_that_are_no_numbers_are_never_scored(bad: float) -> None:
    images, labels = torch.zeros(8, 3, 32, 32, dtype=torch.uint8), torch.arange(8)
    good, astray = tiny(labels=None), tiny(labels=None)
    with torch.no_grad():
        astray.heads["classifier"].bias[2] = bad  # type: ignore[union-attr]
    for models in ({"model": astray}, {"model": good, "reference": astray}):
        with pytest.raises(DataError, match="8 of 8 images with NaN or infinite numbers"):
            evaluate(models["model"], (images, labels), split="all", reference=models.get("reference"))
    with pytest.raises(DataError, match="NaN or infinite"):
        answers(astray, torch.zeros(1, 3, 32, 32))
    with pytest.raises(DataError, match="metric: 'mine' is "):
        evaluate(good, (images, labels), split="all", metric=lambda *_: {"mine": bad})


def test_logits_of_another_library_are_found_and_what_is_none_is_refused() -> None:
    pair = torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.arange(4)

    class Answers(nn.Module):
        def __init__(self, made: Any) -> None:
            super().__init__()
            self.made = made

        def forward(self, x: torch.Tensor) -> Any:
            return self.made(torch.eye(10)[: len(x)])

    for made in (lambda y: y, lambda y: SimpleNamespace(logits=y), lambda y: {"loss": None, "logits": y}):
        assert evaluate(Answers(made), pair, split="all", preprocess=SMALL)["top1"] == 1.0
    for made, words in (
        (lambda y: y[None], "shape \\(1, 4, 10\\)"),
        (lambda y: {"y": y}, "answers with dict"),
        (lambda y: 3, "with int"),
    ):
        with pytest.raises(DataError, match=words):
            evaluate(Answers(made), pair, split="all", preprocess=SMALL)


def test_what_a_caller_brings_is_checked_in_one_sentence() -> None:
    pair = torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.arange(4)
    for settings, words in (
        ({"metric": lambda *_: None}, "gives NoneType; expected a dict"),
        ({"metric": lambda *_: {"mine": torch.tensor(float("nan"))}}, "'mine' is nan"),
        ({"reference": {}}, "no 'predictions'"),
        ({"seed": 2**70, "limit": 2}, "seed=1180591620717411303424; expected a whole number"),
        ({"limit": 2.5}, "limit=2.5; expected a whole number"),
        ({"split": None}, "unknown split None"),
        ({"batch_size": 0}, "batch_size=0; expected at least 1"),
    ):
        with pytest.raises(DataError, match=words):
            evaluate(tiny(labels=None), pair, **{"split": "all", **settings})
    found = evaluate(
        tiny(labels=None), pair, split="all", metric=lambda *_: {"mine": torch.tensor(2.0)}, reference=np.zeros(4, int)
    )
    assert (found["mine"], type(found["agreement"])) == (2.0, float)


def test_the_first_five_of_five_classes_are_no_figure() -> None:
    assert scores(torch.eye(5), torch.arange(5))["top5"] is None
    assert scores(torch.eye(6), torch.arange(6))["top5"] == 1.0
