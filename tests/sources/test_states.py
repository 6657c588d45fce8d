"""The one set of weights in a checkpoint: found by its shapes, named where there are several, and nothing lost in silence."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils import prune

from vitrim.errors import SourceError
from vitrim.sources import files, states

SHAPES = {
    "pos": (1, 5, 4),
    "patch.weight": (4, 3, 2, 2),
    **{f"blocks.{i}.{part}": shape for i in range(3) for part, shape in {"fc.weight": (8, 4), "fc.bias": (8,)}.items()},
    "norm.weight": (4,),
    "head.weight": (6, 4),
}
EXPECTED = {name: torch.empty(shape, device="meta") for name, shape in SHAPES.items()}


def weights(seed: int = 0, **shapes: tuple[int, ...]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in {**SHAPES, **shapes}.items()}


RAW, MEAN = weights(0), weights(1)


def under(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": value for name, value in state.items()}


def chosen(found: Any, key: str | None = None) -> dict[str, Tensor]:
    return states.chosen(states.row_of(found, file="x.pth"), EXPECTED, file="x.pth", key=key)


def same(found: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> bool:
    return set(found) == set(state) and all(torch.equal(found[name], state[name]) for name in state)


def wrapped(wrapper: str, at: str) -> dict[str, Tensor]:
    return {name.replace(at, f"{at}{wrapper}.", 1): value for name, value in RAW.items()}


@pytest.mark.parametrize("wrapper", states.WRAPPERS)
@pytest.mark.parametrize("at", ["blocks.0.", "blocks.1.fc."])
def test_wrappers_inside_names_go(wrapper: str, at: str) -> None:
    assert same(chosen(wrapped(wrapper, at)), RAW)
    assert same(chosen(under(f"model.{wrapper}.module", wrapped(wrapper, at))), RAW)


@pytest.mark.parametrize("path", [("module",), ("state_dict", "module"), ("any", "name", "at", "all")])
def test_weights_are_found_whatever_they_stand_in(path: tuple[str, ...]) -> None:
    found: Any = RAW
    for key in reversed(path):
        found = {key: found, "epoch": 3}
    assert same(chosen(found), RAW)


def test_weights_with_a_wrapper_and_without_are_refused_unless_they_are_the_same() -> None:
    assert same(chosen({**RAW, "module.norm.weight": RAW["norm.weight"].clone()}), RAW)
    with pytest.raises(SourceError, match=r"weights twice.*: norm\.weight, module\.norm\.weight\."):
        chosen({**RAW, "module.norm.weight": MEAN["norm.weight"]})


AVERAGED = {
    "ema": {"model": RAW, "ema": MEAN},
    "ema_state_dict": {"state_dict": RAW, "ema_state_dict": MEAN},
    "model_ema_state_dict": {"model_state_dict": RAW, "model_ema_state_dict": MEAN},
    "ema.module": {"model": RAW, "ema": {"module": MEAN, "updates": 7}},
    "modelEMA": {"modelEMA": MEAN, "model": RAW},
    "params_ema": {"params": RAW, "params_ema": MEAN},
    "in one mapping": {"state_dict": {**under("net", RAW), **under("ema_net.module", MEAN)}},
    "beside the raw": {**RAW, "swa": MEAN},
    "a callback": {"state_dict": under("model", RAW), "callbacks": {"EMA{'decay': 0.9}": {"weights": MEAN}}},
    "torch's counter": {
        "model": RAW,
        "other": {"n_averaged": torch.tensor(7), **under("module", MEAN)},
    },
    "student and teacher": {
        "student": under("module.backbone", RAW),
        "teacher": {**under("backbone", MEAN), "head.mlp.0.weight": torch.ones(2, 2)},
        "dino_loss": {"center": torch.ones(1, 2)},
    },
    "target encoder": {"encoder": under("module", RAW), "target_encoder": under("module", MEAN)},
    "an optimizer of Lightning's": {"state_dict": RAW, "optimizer_states": [{"opt": {}, "ema": tuple(MEAN.values())}]},
    "a list": {"model": RAW, "ema": {"decay": 0.9, "shadow_params": list(MEAN.values()), "collected_params": []}},
}


@pytest.mark.parametrize("name", AVERAGED)
def test_averaged_weights_are_taken_and_said(name: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "vitrim.sources"):
        assert same(chosen(AVERAGED[name]), MEAN)
    assert "averaged" in caplog.text or "the weights are those in" in caplog.text
    assert "--checkpoint-key" in caplog.text


def test_several_sets_without_an_averaged_one_are_asked_for_by_their_paths(caplog: pytest.LogCaptureFixture) -> None:
    found = {"first": RAW, "second": under("module.vit", MEAN)}
    with pytest.raises(
        SourceError, match=r"2 complete sets of weights \('first', 'second\.vit'\).*--checkpoint-key KEY"
    ):
        chosen(found)
    assert same(chosen(found, "first"), RAW)
    assert same(chosen(found, "second"), MEAN)
    assert same(chosen(found, "second.module.vit"), MEAN)
    with pytest.raises(SourceError, match=r"checkpoint_key='secnd'.*did you mean 'second'"):
        chosen(found, "secnd")
    assert same(chosen({"first": RAW, "second": {k: v.clone() for k, v in RAW.items()}}), RAW)
    two = {"ema_0.99": MEAN, "ema_0.999": RAW}
    with pytest.raises(SourceError, match="complete sets"):
        chosen(two)


def test_a_key_takes_the_raw_weights_too() -> None:
    assert same(chosen(AVERAGED["ema"], "model"), RAW)
    assert same(chosen(AVERAGED["beside the raw"], "."), RAW)
    assert same(chosen(AVERAGED["a list"], "model"), RAW)
    assert same(chosen(AVERAGED["a list"], "ema.shadow_params"), MEAN)
    assert same(chosen(AVERAGED["student and teacher"], "student.backbone"), RAW)


def test_another_network_in_the_file_is_no_question(caplog: pytest.LogCaptureFixture) -> None:
    large = {name: torch.ones([2 * n for n in value.shape]) for name, value in RAW.items()}
    with caplog.at_level(logging.INFO, "vitrim.sources"):
        assert same(chosen({"teacher": large, "model": RAW}), RAW)
    assert f"not read: teacher ({len(RAW)} tensors)" in caplog.text


def test_averaged_weights_under_other_names_are_not_passed_over() -> None:
    found = {"model": RAW, "ema": {name.replace(".", ""): value for name, value in MEAN.items()}}
    with pytest.raises(SourceError, match=r"averaged weights too \(ema\).*--checkpoint-key model"):
        chosen(found)
    assert same(chosen(found, "model"), RAW)


def test_averaged_weights_without_the_classifier_are_not_taken_for_the_model() -> None:
    part = {name: value for name, value in MEAN.items() if not name.startswith("head.")}
    with pytest.raises(SourceError, match=r"averaged weights too \(ema\)"):
        chosen({"model": RAW, "ema": part})
    with pytest.raises(SourceError, match=r"averaged weights too \(teacher\).*--checkpoint-key student"):
        chosen({"student": RAW, "teacher": part})
    assert same(chosen({"student": RAW, "teacher": part}, "teacher"), part)


def test_what_pretraining_puts_behind_the_encoder_is_named(caplog: pytest.LogCaptureFixture) -> None:
    behind = {"decoder_blocks.0.fc.weight": torch.ones(8, 4), "decoder_pred.bias": torch.ones(3)}
    with caplog.at_level(logging.INFO, "vitrim.sources"):
        assert same(chosen({"model": {**RAW, **behind}}), RAW)
    assert (
        "not read: decoder_blocks.0.fc.weight, decoder_pred.bias" in caplog.text
        or "not read: model.decoder_blocks" in caplog.text
    )


def test_an_optimizer_is_named_and_no_set_of_weights(caplog: pytest.LogCaptureFixture) -> None:
    moments = {i: {"step": torch.tensor(1.0), "exp_avg": v, "exp_avg_sq": v} for i, v in enumerate(MEAN.values())}
    optimizer = {"state": moments, "param_groups": [{"lr": 0.1, "params": [*range(len(MEAN))]}]}
    by_name = {"exp_avg": MEAN, "state": {name: {"momentum_buffer": value} for name, value in MEAN.items()}}
    found = {"model": RAW, "optimizer": optimizer, "rng": torch.ones(3)}
    with caplog.at_level(logging.INFO, "vitrim.sources"):
        assert same(chosen(found), RAW)
    assert f"not read: optimizer ({3 * len(RAW)} tensors), rng." in caplog.text
    assert same(chosen({"model": RAW, "optimizer": by_name}), RAW)


def test_sets_in_a_list_are_sets_by_their_numbers() -> None:
    for alone in ([RAW], (RAW, 3), [{"state_dict": RAW}, {"epoch": 3}]):
        assert same(chosen(alone), RAW)
    with pytest.raises(SourceError, match=r"2 complete sets of weights \('kept\.0', 'kept\.1'\)"):
        chosen({"kept": [RAW, MEAN]})
    assert same(chosen({"kept": [RAW, MEAN]}, "kept.1"), MEAN)


@pytest.mark.parametrize("name", ["momentum", "avg"])
def test_an_optimizers_lists_are_no_averaged_weights(name: str) -> None:
    assert same(chosen({"model": RAW, "optimizer": {name: list(MEAN.values())}}), RAW)


@pytest.mark.parametrize("prefix", ["", "model.", "a.b."])
def test_tensors_of_the_training_beside_the_models_are_named(prefix: str, caplog: pytest.LogCaptureFixture) -> None:
    state = {f"{prefix}{name}": value for name, value in RAW.items()}
    with caplog.at_level(logging.INFO, "vitrim.sources"):
        assert same(chosen({**state, "criterion.weight": torch.ones(3)}), RAW)
    assert "not read: criterion.weight." in caplog.text


def test_what_stands_in_the_set_stays_known_or_not() -> None:
    assert "blocks.0.adapter.weight" in chosen({**RAW, "blocks.0.adapter.weight": torch.ones(1)})
    assert "extra.weight" in chosen(under("model", {**RAW, "extra.weight": torch.ones(1)}))


def test_a_classifier_around_a_backbone_is_used_unless_something_may_stand_between(
    caplog: pytest.LogCaptureFixture,
) -> None:
    inner = {name: value for name, value in RAW.items() if not name.startswith("head.")}
    outer = {"head.weight": torch.ones(9, 4), "criterion.weight": torch.ones(2)}
    with caplog.at_level(logging.INFO, "vitrim.sources"):
        assert same(chosen({**under("backbone", inner), **outer}), {**inner, "head.weight": outer["head.weight"]})
    assert "completed by head.weight" in caplog.text
    assert "not read: criterion.weight." in caplog.text
    assert same(
        chosen({"backbone": inner, "head": {"weight": torch.ones(9, 4)}}), {**inner, "head.weight": torch.ones(9, 4)}
    )
    assert same(
        chosen({**under("backbone", inner), "head.1.weight": torch.ones(9, 4)}),
        {**inner, "head.weight": torch.ones(9, 4)},
    )  # dropout stands before it
    found = {**under("backbone", inner), **outer, "neck.weight": torch.ones(4, 4)}
    with pytest.raises(SourceError, match=r"head\.weight, but also neck\.weight.*--checkpoint-key backbone"):
        chosen(found)
    assert same(chosen(found, "backbone"), inner)


@pytest.mark.parametrize(
    "behind",
    [
        {"fc.weight": torch.ones(9, 4)},
        {"head.0.weight": torch.ones(8, 4), "head.2.weight": torch.ones(9, 8)},
        {"head.0.weight": torch.ones(4, 4), "head.2.weight": torch.ones(9, 4)},
    ],
)
def test_a_classifier_that_has_no_place_is_left_with_a_warning(
    behind: dict[str, Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    inner = {name: value for name, value in RAW.items() if not name.startswith("head.")}
    assert same(chosen({**under("backbone", inner), **behind}), inner)
    assert "those under 'backbone'; not read: " in next(
        line.message for line in caplog.records if line.levelno == logging.WARNING
    )
    caplog.clear()
    chosen(
        {"model": RAW, "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}, "rng": torch.ones(3, dtype=torch.uint8)}
    )
    assert not caplog.records


@pytest.mark.parametrize("numbers", [("0.0", "0.1", "1.2"), ("0.0", "0.1", "1.0"), ("0.0", "1.1", "2.2")])
def test_blocks_numbered_by_chunk_are_numbered_through(numbers: tuple[str, ...]) -> None:
    state = dict(RAW)
    for i, number in enumerate(numbers):
        for part in ("fc.weight", "fc.bias"):
            del state[f"blocks.{i}.{part}"]
            state[f"blocks.{number}.{part}"] = RAW[f"blocks.{i}.{part}"]
    assert same(chosen(state), RAW)
    assert same(chosen({"teacher": under("backbone", state), "student": under("backbone", weights(2))}), RAW)
    del state["blocks.0.0.fc.bias"], state["blocks.0.0.fc.weight"]
    assert "blocks.0.fc.bias" not in chosen(state)  # a block is missing: nothing takes its place


def test_pruning_masks_are_applied_and_said(caplog: pytest.LogCaptureFixture) -> None:
    module = torch.nn.Linear(4, 8)
    prune.l1_unstructured(module, "weight", amount=0.5)
    state = {name: value for name, value in RAW.items() if name != "blocks.1.fc.weight"}
    state.update({f"blocks.1.fc.{name}": value for name, value in module.state_dict().items() if name != "bias"})
    with caplog.at_level(logging.INFO, "vitrim.sources"):
        found = chosen(state)
    assert set(found) == set(RAW)
    assert torch.equal(found["blocks.1.fc.weight"], module.weight)
    assert int((found["blocks.1.fc.weight"] == 0).sum()) == 16
    assert "pruning masks of 1 tensors are applied: blocks.1.fc.weight" in caplog.text
    alone = {name: value for name, value in state.items() if not name.endswith("_mask")}
    assert "blocks.1.fc.weight" not in chosen(alone)


def test_adapters_that_are_not_merged_are_refused() -> None:
    for name in ("blocks.0.fc.lora_A.default.weight", "base_model.model.blocks.0.fc.lora_B.weight"):
        with pytest.raises(SourceError, match=r"adapters of PEFT .*merge_and_unload"):
            chosen({**RAW, name: torch.ones(2, 4)})


def test_a_mapping_that_holds_itself_gives_one_sentence(tmp_path: Path) -> None:
    found: dict[str, Any] = {"model": RAW}
    found["self"] = found
    torch.save(found, tmp_path / "x.pth")
    with pytest.raises(SourceError, match="without end"):
        files.read(tmp_path / "x.pth")


def test_fewer_blocks_than_the_family_has_are_still_its_names() -> None:
    deep = {f"blocks.{i}.fc.weight": torch.empty(8, 4, device="meta") for i in range(3, 60)}
    row = states.row_of({"net": under("model", RAW)}, file="x.pth")
    assert same(states.chosen(row, {**EXPECTED, **deep}, file="x.pth"), RAW)


def test_names_of_another_layout_are_those_of_their_mapping() -> None:
    foreign = {f"visual.{name}x": value for name, value in RAW.items()}
    assert same(chosen({"state_dict": foreign, "optimizer": {"state": {0: {"a": torch.ones(1)}}}}), foreign)
    mean = {name: value + 1 for name, value in foreign.items()}
    assert same(chosen({"state_dict": foreign, "state_dict_ema": mean}), mean)
    one = {**foreign, "visual.embed.pos": RAW["pos"]}  # a single name alike
    assert same(chosen({"state_dict": one}), one)
    assert same(
        chosen(under("model.visual.trunk", RAW)), under("visual.trunk", RAW)
    )  # a tower is translated by its family
