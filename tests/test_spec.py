"""What a network is for, from its spec."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.specs import vit
from vitrim.errors import ConfigError
from vitrim.spec import Merge, ModelSpec, Pool, Prefix, Similarity, Step, product_of, tokens_given


def ending(spec: ModelSpec, step: Step, *, restore: bool = False) -> ModelSpec:
    return replace(spec, restore=restore, blocks=(spec.blocks[0], replace(spec.blocks[1], steps=(step,))))


ENCODER = vit(outputs=())
MAPPED = vit(outputs=(), pool=Pool(kind="map", heads=2, hidden=8))


def test_an_encoder_is_for_its_tokens_where_it_gives_one_for_each_patch() -> None:
    assert product_of(vit()) == "output"
    for whole in (ENCODER, MAPPED, vit(outputs=(), pool=Pool(kind="none"))):
        assert product_of(whole) == "tokens"
        assert tokens_given(ending(whole, Similarity(keep=12), restore=True)) == tokens_given(whole) == (17, 16)
        assert product_of(ending(whole, Similarity(keep=12), restore=True)) == "tokens"
        for step in (Similarity(keep=12), Merge(axis="h", keep=2)):
            assert product_of(ending(whole, step)) == "output"
    assert product_of(ending(ENCODER, Prefix())) == "output"
    assert product_of(ENCODER, "output") == "output"


def test_beside_another_network_both_give_as_many_tokens_of_one_width() -> None:
    assert product_of(ENCODER, "tokens", beside=vit(outputs=(), image=32)) == "tokens"  # it sees the same images
    merged, narrow = ending(ENCODER, Similarity(keep=12)), vit(outputs=(), width=8)
    assert product_of(ENCODER, beside=ending(ENCODER, Similarity(keep=12), restore=True)) == "tokens"
    for other, said in ((merged, "13 tokens of width 16"), (narrow, "17 tokens of width 8")):
        assert product_of(other, beside=ENCODER) == "output"
        with pytest.raises(
            ConfigError, match=f"the network gives {said}, the dense one 17 tokens of width 16; expected"
        ):
            product_of(other, "tokens", beside=ENCODER)


def test_a_classifiers_tokens_are_its_product_where_they_are_named_and_there() -> None:
    assert product_of(vit(), "tokens") == "tokens"
    with pytest.raises(ConfigError, match=r"exact tail.*--product output") as told:
        product_of(ending(vit(), Prefix()), "tokens")
    assert "\n" not in str(told.value)
