"""The loop: what each setting does, how a run ends badly, and what it leaves behind."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import random
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import Tensor, nn

from tests.training.kit import BASE, CLASSES, Searching, as_lists, on_two_processes, pictures, settings, tiny, weights
from vitrim import checkpoints
from vitrim.config import read
from vitrim.data import Augment
from vitrim.errors import ArtifactError, ConfigError, DataError, TrainingError
from vitrim.model import Block, Vit
from vitrim.training import Batch, FitResult, Step, TrainConfig, fit, loop, schedule
from vitrim.training.config import filled
from vitrim.training.objectives import Supervised


def trained(*, dtype: torch.dtype = torch.float32, objective: Any = None, **changes: Any) -> FitResult:
    return fit(tiny(dtype=dtype), objective or Supervised(), pictures(), settings(**changes))


class Recording(Supervised):
    """Keeps what the loop hands to `loss`."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[Batch] = []
        self.steps: list[Step] = []

    def loss(self, model: nn.Module, batch: Batch, step: Step) -> Tensor:
        self.batches.append(batch)
        self.steps.append(step)
        return super().loss(model, batch, step)


def test_the_loss_falls_and_the_model_learns() -> None:
    result = trained(steps=60, batch_size=20, log_every=1)
    losses = [line["loss"] for line in result.history]
    assert sum(losses[-5:]) < 0.75 * sum(losses[:5])
    assert result.steps == 60
    assert not result.model.training


# ------------------------------------------------------------------------------------------------ each field does something

CHANGES_WEIGHTS: dict[str, dict[str, Any]] = {
    "batch_size": {"batch_size": 4},
    "optimizer": {"optimizer": "sgd"},
    "lr": {"lr": 2e-2},
    "min_lr": {"min_lr": 5e-3},
    "warmup": {"warmup": 0.5},
    "weight_decay": {"weight_decay": 0.5},
    "clip": {"clip": 0.01, "optimizer": "sgd"},
    "ema_decay": {"ema_decay": 0.9},
    "amp": {"amp": "bf16"},
    "mixup": {"mixup": 0.5},
    "cutmix": {"cutmix": 1.0},
    "mix_share": {"mixup": 0.5, "mix_share": 0.4},
    "augment": {"augment": Augment(crop="pad", pad=2, flip=0.5)},
    "seed": {"seed": 1},
}
AGAINST: dict[str, dict[str, Any]] = {"clip": {"optimizer": "sgd"}, "mix_share": {"mixup": 0.5}}
ELSEWHERE = {
    "epochs": "test_epochs_count_passes_over_the_images",
    "steps": "test_epochs_count_passes_over_the_images",
    "accumulate": "test_accumulated_micro_batches_equal_one_batch",
    "workers": "test_workers_change_no_result",
    "device": "test_a_device_that_is_not_there_is_refused",
    "world_size": "test_the_world_size_is_asserted",
    "grad_checkpoint": "test_gradient_checkpointing_recomputes_blocks_and_changes_nothing",
    "eval_every": "test_eval_every_and_log_every_set_the_lines",
    "log_every": "test_eval_every_and_log_every_set_the_lines",
    "checkpoint_seconds": "test_checkpoints_are_taken_at_the_time_asked_for",
    "tracker": "test_tensorboard_gets_the_metrics",
    "smoothing": "tests/test_objectives.py",
}


@pytest.mark.parametrize("field", CHANGES_WEIGHTS)
def test_each_setting_changes_the_weights(field: str) -> None:
    before = weights(trained(**AGAINST.get(field, {})).model)
    after = weights(trained(**CHANGES_WEIGHTS[field]).model)
    assert after.isfinite().all()
    assert not torch.equal(before, after)


def test_no_field_of_the_config_is_dead() -> None:
    assert {f.name for f in dataclasses.fields(TrainConfig)} == {*CHANGES_WEIGHTS, *ELSEWHERE}


def test_epochs_count_passes_over_the_images() -> None:
    assert trained(steps=None, epochs=2).steps == 10  # 40 images, 8 at a time
    assert trained(steps=None, epochs=0.5).steps == 2
    assert trained(steps=7, epochs=2).steps == 7


def test_each_image_is_seen_once_an_epoch() -> None:
    objective = Recording()
    trained(steps=5, objective=objective)
    labels = torch.cat([b.labels for b in objective.batches if b.labels is not None])
    assert labels.bincount().tolist() == [10] * CLASSES
    assert {s.epoch for s in objective.steps} == {0}


def test_accumulated_micro_batches_equal_one_batch() -> None:
    objective = Recording()
    whole = trained(dtype=torch.float64)
    parts = trained(dtype=torch.float64, accumulate=4, objective=objective)
    assert torch.allclose(weights(whole.model), weights(parts.model), rtol=0, atol=1e-10)
    assert {len(b.images) for b in objective.batches} == {2}
    assert len(objective.batches) == 4 * 6


def test_workers_change_no_result() -> None:
    grainy = {"augment": Augment(crop="pad", pad=2, jitter=0.3), "steps": 2}  # a jitter is drawn image by image
    assert torch.equal(weights(trained(**grainy).model), weights(trained(**grainy, workers=1).model))


def test_gradient_checkpointing_recomputes_blocks_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    forward = Block.forward
    monkeypatch.setattr(Block, "forward", lambda self, *a, **k: (calls.append(1), forward(self, *a, **k))[1])
    plain, once = trained(steps=2), len(calls)
    kept, both = trained(steps=2, grad_checkpoint=True), len(calls) - once
    assert both == 2 * once
    assert torch.equal(weights(plain.model), weights(kept.model))
    assert not kept.model.grad_checkpoint


def test_eval_every_and_log_every_set_the_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    result = fit(
        tiny(), Supervised(), pictures(), settings(eval_every=4, log_every=3), validate=lambda m: {"top1": 0.5}
    )
    assert [(r["kind"], r["step"]) for r in result.history] == [
        ("train", 3),
        ("validate", 4),
        ("train", 6),
        ("validate", 6),
    ]
    for least, steps in ((50, [10]), (4, [5, 10]), (6, [10])):  # epochs of 5 steps
        monkeypatch.setattr(loop, "LEAST_BETWEEN", least)
        found = fit(tiny(), Supervised(), pictures(), settings(steps=10), validate=lambda m: {"top1": 0.5})
        assert [r["step"] for r in found.history if r["kind"] == "validate"] == steps


def test_checkpoints_are_taken_at_the_time_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []
    write = checkpoints.write
    monkeypatch.setattr(
        checkpoints, "write", lambda folder, step, *a: (written.append(step), write(folder, step, *a))[1]
    )
    fit(tiny(), Supervised(), pictures(), settings(checkpoint_seconds=0), out=tmp_path / "a")
    fit(tiny(), Supervised(), pictures(), settings(checkpoint_seconds=3600), out=tmp_path / "b")
    assert written == [1, 2, 3, 4, 5, 6, 6]
    assert [p.name for p in (tmp_path / "a" / "checkpoints").iterdir()] == ["step-00000006"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorboard")
def test_tensorboard_gets_the_metrics(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    fit(tiny(), Supervised(), pictures(), settings(tracker="tensorboard", log_every=1), out=tmp_path / "run")
    events = list((tmp_path / "run").rglob("events.out.tfevents.*"))
    assert events
    assert any(b"train/loss" in event.read_bytes() for event in events)


def test_an_unknown_tracker_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="tensorbored"):
        fit(tiny(), Supervised(), pictures(), settings(tracker="tensorbored"), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(TrainingError, match="needs a folder"):
        trained(tracker="tensorboard")


def test_a_device_that_is_not_there_is_refused() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(TrainingError, match=r"device='cuda'.*device='cpu'"):
        trained(device="cuda")
    with pytest.raises(TrainingError, match="fp16"):
        trained(amp="fp16")


# -------------------------------------------------------------------------------------------------------------- schedule


def test_the_rate_rises_in_a_line_and_falls_in_a_cosine() -> None:
    heights = [schedule(i, 100, 0.1) for i in range(100)]
    assert heights[:10] == pytest.approx([(i + 1) / 11 for i in range(10)])
    assert heights[10] == 1
    assert heights[55] == pytest.approx(0.5)
    assert 0 < heights[99] < 0.01
    assert all(a > b for a, b in itertools.pairwise(heights[10:]))


def test_a_group_keeps_its_own_rate_and_schedule() -> None:
    objective = Searching()
    result = trained(objective=objective, log_every=1)
    assert [line["phase"] for line in result.history] == ["search"] * 3 + ["tune"] * 3
    assert not torch.equal(objective.scale.detach(), torch.ones(CLASSES))


# ---------------------------------------------------------------------------------------------------------------- mixing


def test_mixing_draws_only_from_its_key() -> None:
    first = weights(trained(mixup=0.5, cutmix=1.0).model)
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    assert torch.equal(first, weights(trained(mixup=0.5, cutmix=1.0).model))


def test_mixed_labels_are_shares_of_the_labels_that_were_mixed() -> None:
    plain, mixed = Recording(), Recording()
    trained(steps=1, objective=plain)
    trained(steps=1, objective=mixed, mixup=0.5)
    one, two = plain.batches[0], mixed.batches[0]
    assert one.labels is not None
    assert two.labels is not None
    hot = nn.functional.one_hot(one.labels, CLASSES).float()
    share = float(((two.images - one.images.flip(0)) / (one.images - one.images.flip(0))).nanmedian())
    assert torch.allclose(two.labels, share * hot + (1 - share) * hot.flip(0), atol=1e-4)
    assert torch.allclose(two.images, share * one.images + (1 - share) * one.images.flip(0), atol=1e-4)


# ------------------------------------------------------------------------------------------------------- ending badly


class Failing(Supervised):
    """Goes wrong at a step."""

    def __init__(self, at: int, factor: float = math.nan) -> None:
        super().__init__()
        self.at, self.factor = at, factor

    def loss(self, model: nn.Module, batch: Batch, step: Step) -> Tensor:
        return super().loss(model, batch, step) * (self.factor if step.index == self.at else 1.0)


def test_a_nan_stops_with_one_sentence_and_keeps_the_last_good_state(tmp_path: Path) -> None:
    good = {}

    class Watching(Failing):
        def after_step(self, step: Step) -> None:
            good.update(as_lists(model))

    model = tiny()
    with pytest.raises(TrainingError, match=r"^the loss became nan at step 4 of 6 .*kept in run/checkpoints") as caught:
        fit(model, Watching(3), pictures(), settings(), out=tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert all(torch.equal(t, good[name]) for name, t in model.state_dict().items())
    tensors, values = checkpoints.read(checkpoints.newest(tmp_path / "run" / "checkpoints") or tmp_path)
    assert values["step"] == 3
    assert all(torch.equal(tensors[f"model/{name}"], t) for name, t in good.items())
    resumed = fit(tiny(), Supervised(), pictures(), settings(), out=tmp_path / "run", resume=True)
    assert torch.equal(weights(resumed.model), weights(trained().model))


def test_an_infinite_gradient_stops_before_the_step() -> None:
    class Steep(Supervised):
        def after_backward(self, step: Step) -> None:
            if step.index == 2:
                next(p for p in model.parameters() if p.grad is not None).grad.fill_(math.inf)  # type: ignore[union-attr]

    model = tiny()
    with pytest.raises(TrainingError, match=r"the gradient became .* at step 3"):
        fit(model, Steep(), pictures(), settings())
    assert weights(model).isfinite().all()


class Hungry(Supervised):
    """Runs out of memory above so many images."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most

    def loss(self, model: nn.Module, batch: Batch, step: Step) -> Tensor:
        if len(batch.images) > self.most:
            raise torch.OutOfMemoryError("out of memory. Tried to allocate 20.00 GiB.")
        return super().loss(model, batch, step)


def test_out_of_memory_names_the_batch_that_would_fit() -> None:
    with pytest.raises(TrainingError, match=r"8 images at a time; 2 would fit\. Set accumulate=4 to keep batch_size=8"):
        trained(objective=Hungry(3))
    assert trained(objective=Hungry(3), accumulate=4).steps == 6
    with pytest.raises(TrainingError, match=r"15 images at a time; 3 would fit\. Set accumulate=5"):
        trained(objective=Hungry(4), batch_size=15)
    with pytest.raises(TrainingError, match="one image does not fit either"):
        trained(objective=Hungry(0))


def test_other_errors_of_an_objective_pass_as_they_are() -> None:
    class Broken(Supervised):
        def loss(self, model: nn.Module, batch: Batch, step: Step) -> Tensor:
            raise RuntimeError("of its own")

    with pytest.raises(RuntimeError, match="of its own"):
        trained(objective=Broken())


@pytest.mark.parametrize(
    ("config", "images", "batch"),
    [
        (TrainConfig(), 128, 128),
        (TrainConfig(), 108, 104),
        (TrainConfig(), 7, 7),
        (TrainConfig(accumulate=2), 7, 6),
        (TrainConfig(mixup=0.2, accumulate=2), 23, 16),
        (TrainConfig(accumulate=4), 3, 128),  # not one image a part: refused by `ready`
    ],
)
def test_the_largest_batch_that_few_images_fill_is_taken(config: TrainConfig, images: int, batch: int) -> None:
    chosen, said = filled(config, images)
    assert chosen.batch_size == batch
    assert said == ([] if batch == 128 else [f"There are {images} training images, so one step takes {batch} of them."])
    assert filled(settings(batch_size=64), images) == (settings(batch_size=64), [])  # somebody chose it


def test_too_few_images_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="40 training images for batch_size=64"):
        fit(tiny(), Supervised(), pictures(), settings(batch_size=64), out=tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="cannot be written"):
        fit(tiny(), Supervised(), pictures(), settings(), out=tmp_path / "file")


def test_a_full_disk_keeps_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    def at_third(folder: Path, step: int, *rest: Any) -> Path:
        if step == 3:
            monkeypatch.setattr(checkpoints, "save_file", full)
        return write(folder, step, *rest)

    write = checkpoints.write
    monkeypatch.setattr(checkpoints, "write", at_third)
    with pytest.raises(TrainingError, match=r"step 3 could not be written.*No space left"):
        fit(tiny(), Supervised(), pictures(), settings(checkpoint_seconds=0), out=tmp_path / "run")
    newest = checkpoints.newest(tmp_path / "run" / "checkpoints")
    assert newest is not None
    assert checkpoints.read(newest)[1]["step"] == 2


def test_a_run_is_not_overwritten_nor_resumed_with_other_settings(tmp_path: Path) -> None:
    fit(tiny(), Supervised(), pictures(), settings(), out=tmp_path / "run")
    with pytest.raises(TrainingError, match=r"run/ holds a run already.*--resume"):
        fit(tiny(), Supervised(), pictures(), settings(), out=tmp_path / "run")
    with pytest.raises(TrainingError, match=r"lr was 0\.01 and is 0\.02"):
        fit(tiny(), Supervised(), pictures(), settings(lr=2e-2), out=tmp_path / "run", resume=True)
    with pytest.raises(TrainingError, match="another run: data"):
        fit(tiny(), Supervised(), pictures(44), settings(), out=tmp_path / "run", resume=True)


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    fit(tiny(), Supervised(), pictures(), settings(), out=tmp_path / "run")
    with (tmp_path / "run/checkpoints/step-00000006/state.safetensors").open("r+b") as file:
        file.truncate(100)
    with pytest.raises(TrainingError, match="step-00000006 cannot be read"):
        fit(tiny(), Supervised(), pictures(), settings(), out=tmp_path / "run", resume=True)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"learning_rate": 1}, "unknown key 'learning_rate'"),
        ({"warm_up": 0.1}, "did you mean 'warmup'"),
        ({"lr": -1}, "lr=-1"),
        ({"amp": "bf17"}, "amp='bf17'"),
        ({"augment": {"flipp": 1}}, "augment.flipp"),
        ({"batch_size": 10, "accumulate": 4}, "does not divide"),
        ({"batch_size": 3, "mixup": 0.5}, "expected an even number"),
        ({"lr": 1e-6}, "min_lr"),
    ],
)
def test_a_bad_config_is_refused_with_its_key(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        read(TrainConfig, values)


# ------------------------------------------------------------------------------------------------------ left as found


def test_the_callers_generators_threads_and_accelerator_are_left_as_found() -> None:
    model = tiny().train()
    try:
        own = accelerate.Accelerator(cpu=True)
        shared = [dict(s._shared_state) for s in (PartialState, AcceleratorState, GradientState)]
        random.seed(3)
        np.random.seed(3)
        torch.manual_seed(3)
        expected = random.random(), np.random.rand(), float(torch.rand(()))
        random.seed(3)
        np.random.seed(3)
        torch.manual_seed(3)
        threads, environment = torch.get_num_threads(), dict(os.environ)
        fit(model, Supervised(), pictures(), settings(amp="bf16", mixup=0.5))
        assert (random.random(), np.random.rand(), float(torch.rand(()))) == expected
        assert (torch.get_num_threads(), dict(os.environ)) == (threads, environment)
        assert [dict(s._shared_state) for s in (PartialState, AcceleratorState, GradientState)] == shared
        assert own.mixed_precision == "no"
    finally:
        for state in (PartialState, AcceleratorState, GradientState):
            state._shared_state.clear()
    assert "forward" not in vars(model)
    assert "_original_forward" not in vars(model)
    assert all(p.grad is None for p in model.parameters())


def test_progress_counts_to_the_end_and_says_the_time_left() -> None:
    told: list[tuple[str, int, int, dict[str, Any]]] = []
    fit(
        tiny(),
        Supervised(),
        pictures(),
        settings(),
        validate=lambda model: {"top1": 1.0},
        progress=lambda stage, done, total, **facts: told.append((stage, done, total, facts)),
    )
    assert told[0] == ("train", 0, 6, {})  # before the first step, which may take long
    assert [t[1] for t in told if t[0] == "train"] == [0, 1, 2, 3, 4, 5, 6]
    assert all({"loss", "lr", "seconds_left", "images_per_s"} <= set(t[3]) for t in told[1:] if t[0] == "train")
    assert told[-1] == ("validate", 6, 6, {"top1": 1.0})


def test_validation_sees_the_running_mean_and_training_goes_on_from_the_weights() -> None:
    seen: list[Tensor] = []

    def validate(model: Vit) -> dict[str, float]:
        assert not model.training
        seen.append(weights(model))
        return {}

    result = fit(tiny(), Supervised(), pictures(), settings(ema_decay=0.9, eval_every=3), validate=validate)
    unseen = fit(tiny(), Supervised(), pictures(), settings(ema_decay=0.9))
    assert torch.equal(seen[-1], weights(result.model))
    assert torch.equal(weights(result.model), weights(unseen.model))
    assert not torch.equal(weights(result.model), weights(trained().model))


# -------------------------------------------------------------------------------------------------- several processes


def test_the_world_size_is_asserted() -> None:
    with pytest.raises(TrainingError, match=r"world_size=2 was asked for, and 1 process.*torchrun"):
        trained(world_size=2)


TWO = """
import json, os, sys, torch
from pathlib import Path
from tests.training.kit import Searching, pictures, settings, tiny, weights
from vitrim.training import fit
torch.set_num_threads(1)
world = int(os.environ.get("WORLD_SIZE", "1"))
for name, parts in (("plain", 1), ("parts", 2)):
    objective = Searching()
    config = settings(steps=5, world_size=world, accumulate=parts, ema_decay=0.9, checkpoint_seconds=0)
    result = fit(tiny(dtype=torch.float64), objective, pictures(), config, out=Path(sys.argv[1]) / name,
                 validate=lambda m: {"top1": 0.0})
    if os.environ.get("RANK", "0") == "0":
        found = {"weights": weights(result.model), "scale": objective.scale.detach(),
                 "losses": torch.tensor([r["loss"] for r in result.history if r["kind"] == "train"])}
        torch.save(found, Path(sys.argv[1]) / f"{name}.pt")
"""


@pytest.mark.slow
def test_two_processes_train_what_one_trains(tmp_path: Path) -> None:
    on_two_processes(TWO, tmp_path)
    for name, parts in (("plain", 1), ("parts", 2)):
        two = torch.load(tmp_path / f"{name}.pt", weights_only=True)
        objective = Quiet()
        one = fit(
            tiny(dtype=torch.float64),
            objective,
            pictures(),
            settings(steps=5, accumulate=parts, ema_decay=0.9, log_every=20),
        )
        assert (two["weights"] - weights(one.model)).abs().max() < 1e-6
        assert (two["scale"] - objective.scale.detach()).abs().max() < 1e-6
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [5, 5]


class Quiet(Searching):
    """`Searching` without its noise, as it is with several processes."""

    def loss(self, model: nn.Module, batch: Batch, step: Step) -> Tensor:
        return super().loss(model, batch, dataclasses.replace(step, world=2))


assert BASE["steps"] == 6  # the tests above count on it


class Exploding(Supervised):
    """After the step `at` a weight is no number any more, as after one with too high a rate."""

    def __init__(self, model: Vit, at: int) -> None:
        super().__init__()
        self.model, self.at = model, at

    def after_step(self, step: Step) -> None:
        if step.index + 1 == self.at:
            with torch.no_grad():
                self.model.blocks[0].mlp.fc1.weight[0, 0] = math.inf


@pytest.mark.parametrize("at", [3, 6])
def test_weights_that_are_no_numbers_are_neither_scored_nor_kept_nor_a_result(at: int, tmp_path: Path) -> None:
    model, scored = tiny(), list[int]()
    with pytest.raises(TrainingError, match=rf"after step {at} of 6, 'blocks\.0\.mlp\.fc1\.weight' holds 1 of") as told:
        fit(
            model,
            Exploding(model, at),
            pictures(),
            settings(steps=6, checkpoint_seconds=0, eval_every=1),
            out=tmp_path,
            validate=lambda _: {"top1": float(not scored.append(1))},
        )
    assert len(scored) == at - 1
    assert f"step-{at - 1:08d} is whole" in str(told.value)
    tensors, _ = checkpoints.read(checkpoints.newest(tmp_path / "checkpoints") or tmp_path)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values() if tensor.is_floating_point())


def test_a_last_step_that_goes_astray_is_no_result_without_a_folder_either() -> None:
    with pytest.raises(TrainingError, match="no checkpoint is there from before"):
        trained(steps=1, lr=3e38, clip=None, optimizer="sgd", warmup=0.0, weight_decay=3e38)


@pytest.mark.parametrize("name", ["lr", "epochs", "weight_decay"])
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_settings_are_finite(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{name}={value!r}; expected a finite number"):
        TrainConfig(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "change", ['"x"', '{"step": "x"}', '{"step": 1}', '{"step": 1, "kind": "train", "seconds": {}}']
)
def test_a_line_of_metrics_that_no_training_writes_is_refused(tmp_path: Path, change: str) -> None:
    fit(tiny(), Supervised(), pictures(), settings(), out=tmp_path / "run")
    place = tmp_path / "run" / "metrics.jsonl"
    place.write_text(place.read_text() + change + "\n")
    with pytest.raises(
        TrainingError, match=r"run/metrics.jsonl: line \d+ is none that a training writes. Remove the file"
    ):
        fit(tiny(), Supervised(), pictures(), settings(), out=tmp_path / "run", resume=True)
