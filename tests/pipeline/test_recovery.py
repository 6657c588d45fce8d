"""What a recovery learns, by what the network is for."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.specs import make, vit
from vitrim.errors import ConfigError
from vitrim.pipeline import EvaluateConfig, RecoverConfig
from vitrim.pipeline.recovery import objective_named, taps_for
from vitrim.spec import BlockSpec, ModelSpec, Prefix, Similarity


def merged(spec: ModelSpec, *at: int, restore: bool) -> ModelSpec:
    def block(i: int, block: BlockSpec) -> BlockSpec:
        return replace(block, steps=(Similarity(keep=15 - at.index(i)),)) if i in at else block

    return replace(spec, restore=restore, blocks=tuple(block(i, b) for i, b in enumerate(spec.blocks)))


def test_blocks_behind_a_merge_are_matched_where_tokens_are_restored() -> None:
    dense = vit(blocks=6)
    teacher = make(dense)
    assert taps_for(teacher, teacher) == ("block:1", "block:3", "block:5")
    assert taps_for(make(merged(dense, 2, 4, restore=False)), teacher) == ("block:0", "block:1")
    assert taps_for(make(merged(dense, 2, 4, restore=True)), teacher) == ("restored:1", "restored:3", "restored:5")
    assert taps_for(make(vit(blocks=6, width=8)), teacher) == ()


def test_tokens_are_learned_without_labels_and_answers_with_them() -> None:
    classifier, encoder = make(vit()), make(vit(outputs=()))
    assert objective_named(RecoverConfig(), classifier, labelled=True) == "distilled"
    assert objective_named(RecoverConfig(product="tokens"), classifier, labelled=True) == "label_free"
    assert objective_named(RecoverConfig(), encoder, labelled=True) == "label_free"
    tail = vit()
    tail = replace(tail, blocks=(tail.blocks[0], replace(tail.blocks[1], steps=(Prefix(),))))
    with pytest.raises(ConfigError, match="an exact tail"):
        objective_named(RecoverConfig(product="tokens"), make(tail), labelled=True)


@pytest.mark.parametrize("objective", ["distilled", "supervised"])
def test_tokens_are_no_goal_of_what_learns_answers(objective: str) -> None:
    with pytest.raises(ConfigError, match="expected objective='label_free'"):
        RecoverConfig(product="tokens", objective=objective)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="expected 'output' or 'tokens'"):
        EvaluateConfig(product="token")  # type: ignore[arg-type]
