"""Figures with their counts, their intervals and their words."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.specs import vit
from vitrim.pipeline.comparison import difference
from vitrim.spec import Pool, Similarity
from vitrim.tasks.task import counts, interval, paired, product_words, quality, seen


def test_what_a_network_is_for_and_what_may_be_lost_is_said_in_words() -> None:
    dense = vit(blocks=3)
    encoder = replace(dense, outputs=())
    merged = replace(
        encoder, blocks=(encoder.blocks[0], replace(encoder.blocks[1], steps=(Similarity(keep=12),)), encoder.blocks[2])
    )
    said = product_words(encoder, replace(merged, restore=True), "tokens")
    assert said == (
        "It is for all its 17 tokens behind the final norm, the class token among them. Its blocks run on 17 tokens in the first to 13 in "
        "the last; behind that all 17 come back."
    )
    assert "answers are not, and may be lost" in product_words(dense, dense, "tokens")
    assert (
        product_words(dense, dense, "output") == "It is for its answers; tokens by themselves are not, and may be lost."
    )
    assert product_words(encoder, merged, "output") == (
        "It is for its features, the class token; tokens by themselves are not, and may be lost: it gives 13 where the dense one gives 17."
    )
    everything = replace(encoder, pool=Pool(kind="none"))
    assert product_words(everything, everything, "output") == "It is for its tokens."


def test_the_interval_of_a_share_is_wilsons() -> None:
    assert interval(8, 10) == pytest.approx((0.49016, 0.94331), abs=1e-5)
    assert interval(0, 21) == pytest.approx((0.0, 0.15464), abs=1e-4)
    assert interval(21, 21)[1] == 1.0
    low, high = interval(7318, 10_000)
    assert (low, high) == pytest.approx((0.72303, 0.74038), abs=1e-4)


def test_counts_stand_beside_every_share_of_the_images() -> None:
    found = counts({"top1": 0.75, "top5": 1.0, "loss": 0.4, "agreement": None, "map": 0.9, "count": 12})
    assert {key: (of["right"], of["count"]) for key, of in found.items()} == {"top1": (9, 12), "top5": (12, 12)}
    assert found["top1"]["low"] < 0.75 < found["top1"]["high"]


def test_a_paired_interval_does_not_shrink_to_nothing_on_few_images() -> None:
    low, high = paired(0, 0, 21)
    assert (low, high) == (pytest.approx(-high), pytest.approx(0.1205, abs=1e-3))
    low, high = paired(300, 200, 10_000)  # as the plain normal interval has it, where there are many
    assert (low, high) == pytest.approx((-0.01 - 0.00438, -0.01 + 0.00438), abs=1e-4)


def test_on_few_images_nothing_could_be_seen_and_that_is_said() -> None:
    same = difference([True] * 21, [True] * 21)
    assert same is not None
    assert (same["points"], same["worse"], same["better"]) == (0.0, 0, 0)
    assert seen(same) == "too few images to tell: on 21, less than 12 points cannot be seen"
    many = difference([True] * 2000, [True] * 1985 + [False] * 15)
    assert many is not None
    assert many["worse"] == 15
    assert seen(many) == "-0.75 points"
    assert seen(difference([True, False] * 1000, [True, False] * 999 + [False, True])) == "no difference seen"  # type: ignore[arg-type]
    assert difference(None, [True]) is None


def test_quality_of_a_multi_label_model_is_its_mean_average_precision() -> None:
    assert quality({"map": 0.5, "agreement": 0.9}) == "map"
    assert quality({"map": None, "agreement": 0.9}) == "agreement"
