"""One table of what a foreign family can say: every row has its sentence, and a declaration that lets it pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from tests.specs import vit
from vitrim.errors import SourceError
from vitrim.sources.expressible import KINDS, Family, require, unsayable
from vitrim.spec import Merge, ModelSpec, Output, Pool, Prefix, Similarity, T2TTransformer

PLAIN = Family(name="Plain")


def halved(attention: dict[str, Any] | None = None, mlp: dict[str, Any] | None = None, at: int = 1) -> ModelSpec:
    """A small classifier whose block `at` has other halves."""
    spec = vit()
    blocks = list(spec.blocks)
    a, m = blocks[at].attention, blocks[at].mlp
    assert a is not None
    assert m is not None
    blocks[at] = replace(blocks[at], attention=replace(a, **(attention or {})), mlp=replace(m, **(mlp or {})))
    return replace(spec, blocks=tuple(blocks))


def stepped(step: Any, **parts: Any) -> ModelSpec:
    spec = vit()
    return replace(spec, blocks=(spec.blocks[0], replace(spec.blocks[1], steps=(step,), **parts)))


def without(**parts: None) -> ModelSpec:
    spec = vit()
    return replace(spec, blocks=(spec.blocks[0], replace(spec.blocks[1], **parts)))


def positioned(**fields: Any) -> ModelSpec:
    spec = vit()
    return replace(spec, position=replace(spec.position, **fields))


MAP = Pool(kind="map", heads=2, hidden=20)
READ_MEAN = (Output(classes=5, reads=("mean",)),)

# the spec, the sentence, and what a family must declare to say it (None: no family here can)
ROWS: dict[str, tuple[Callable[[], ModelSpec], str, dict[str, Any] | None]] = {
    "stem": (
        lambda: vit(stem=T2TTransformer(strides=(2, 2, 1)), position=replace(vit().position, kind="fixed")),
        "its stem is that of T2T-ViT",
        {"stems": (T2TTransformer,)},
    ),
    "no blocks": (lambda: vit(blocks=0), "it has no blocks", None),
    "no attention": (lambda: without(attention=None), "block 1 has no attention, and Plain's blocks have both", None),
    "no MLP": (lambda: without(mlp=None), "block 1 has no MLP, and Plain's blocks have both", None),
    "merge": (lambda: stepped(Merge(axis="h", keep=2)), "block 1 merges tokens", None),
    "merge that restores": (
        lambda: replace(stepped(Similarity(keep=12)), restore=True),
        "block 1 merges tokens",
        None,
    ),
    "gate": (lambda: halved({"gate": True}), "block 1 has a gate", None),
    "gated MLP": (lambda: halved(mlp={"gate": True}), "block 1 has a gate", None),
    "factors": (lambda: halved(mlp={"fc2_rank": 3}), "block 1 has an MLP in two factors", None),
    "value width": (lambda: halved({"v_dim": 3}), "block 1 has heads of 8 for queries and 3 for values", None),
    "heads": (
        lambda: halved({"heads": 1}),
        "block 1 has 1 heads of 8, and Plain wants heads times head width equal to the width 16",
        None,
    ),
    "scale": (lambda: halved({"scale": 0.25}), "block 1 scales its scores by 0.25", {"any_scale": True}),
    "qk norm": (lambda: halved({"qk_norm": "rms"}), "block 1 has rms norms of queries and keys", None),
    "activation": (
        lambda: halved(mlp={"kind": "relu"}, at=0),
        "block 0 has the activation 'relu', and Plain takes 'gelu' or 'silu'",
        None,
    ),
    "layer scale": (lambda: halved({"layer_scale": True}), "block 1 has a LayerScale", {"layer_scale": True}),
    "linear bias": (
        lambda: halved(mlp={"fc1_bias": False}),
        "block 1 has a linear without bias",
        {"every_bias": False},
    ),
    "qkv bias": (
        lambda: halved({"q_bias": False, "k_bias": False, "v_bias": False}),
        "block 1 differs from block 0 (qkv bias False, there True)",
        {"every_bias": False},
    ),
    "uneven heads": (
        lambda: halved({"heads": 4, "qk_dim": 4, "v_dim": 4, "scale": 0.5}),
        "block 1 differs from block 0 (heads 4, there 2)",
        None,
    ),
    "uneven MLP": (lambda: halved(mlp={"hidden": 7}), "block 1 differs from block 0 (MLP units 7, there 24)", None),
    "norm and bias": (lambda: vit(pre_norm=True), "a norm before its blocks beside a bias in its stem", None),
    "channels": (lambda: vit(channels=1), "its images have 1 channels, not 3", {"channels": None}),
    "oblong": (
        lambda: vit(image_px=(16, 8), position=replace(vit().position, grid=(4, 2))),
        "its images of (16, 8) px in patches of (4, 4) are not square",
        {"square": False},
    ),
    "prefix": (lambda: vit(prefix=("cls", "reg")), "its prefix tokens are ('cls', 'reg')", {"prefix": "cls( reg)*"}),
    "positions": (
        lambda: positioned(kind="fixed"),
        "its position table is 'fixed', not 'learned'",
        {"positions": ("learned", "fixed")},
    ),
    "grid": (lambda: positioned(grid=(3, 3)), "its position table is for (3, 3), not (4, 4)", {"any_grid": True}),
    "rows": (
        lambda: positioned(prefix_rows=False),
        "its position table has no rows for the prefix tokens",
        {"prefix_rows": False},
    ),
    "pooling": (lambda: vit(pool=Pool(kind="mean")), "its pooling is 'mean'", {"pools": ("mean",)}),
    "norms": (
        lambda: vit(pool_norm=True),
        "its norms outside the blocks stand behind them and behind the pooling",
        {"last_norms": ((True, True),)},
    ),
    "no norm": (
        lambda: vit(final_norm=False),
        "it has no norm outside its blocks",
        {"last_norms": ((False, False),)},
    ),
    "eps": (lambda: vit(norm_eps=1e-5), "its norms have eps 1e-05, not 1e-06", {"eps": None}),
    "reads": (lambda: vit(outputs=READ_MEAN), "its classifiers read [('mean',)]", {"reads": ((("mean",),),)}),
    "no classifier": (lambda: vit(outputs=()), "it has no classifier", {"reads": ((),)}),
    "rank": (lambda: vit(outputs=(Output(classes=5, rank=2),)), "a classifier in two factors", None),
    "classifier bias": (
        lambda: vit(outputs=(Output(classes=5, bias=False),)),
        "a classifier without bias",
        {"every_bias": False},
    ),
    "pool like blocks": (
        lambda: vit(pool=MAP),
        "its attention pooling differs from the blocks (MLP units 20, there 24)",
        None,
    ),
}
STRICT = replace(
    PLAIN,
    channels=3,
    square=True,
    positions=("learned",),
    prefix_rows=True,
    kinds=("gelu", "silu"),
    every_bias=True,
    layer_scale=False,
    eps=1e-6,
    reads=((("pool",),),),
)


@pytest.mark.parametrize("row", ROWS)
def test_what_a_family_has_no_word_for_is_said(row: str) -> None:
    made, sentence, declares = ROWS[row]
    family = replace(STRICT, pools=("cls", "map")) if "pool like" in row else STRICT
    found = list(unsayable(made(), family))
    assert any(said.startswith(sentence) for said in found), found
    if declares is not None:
        left = list(unsayable(made(), replace(family, **declares)))
        assert not any(said.startswith(sentence) for said in left), left


def test_what_it_can_say_gives_the_halves_of_all_blocks() -> None:
    spec = vit()
    assert require(spec, STRICT) == (spec.blocks[0].attention, spec.blocks[0].mlp)
    assert not list(unsayable(stepped(Prefix()), PLAIN)), "an exact tail is left out: it changes no output"
    assert set(PLAIN.kinds) == set(KINDS)


def test_the_stem_comes_before_the_first_block_in_the_way_and_that_before_the_rest() -> None:
    spec = replace(halved({"gate": True}), pool=Pool(kind="mean"))
    with pytest.raises(
        SourceError, match=r"Plain cannot say this model: block 1 has a gate\. Save it as a folder of vitrim"
    ):
        require(spec, PLAIN)
    assert [said.split()[0] for said in unsayable(spec, PLAIN)] == ["block", "its"]
