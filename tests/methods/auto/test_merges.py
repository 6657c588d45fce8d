"""Tokens as an axis: the plan of merges is exact at a price, within its budget, and merges where that pays."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch

from tests.specs import images, make, vit
from vitrim import surgery
from vitrim.budget import Budget
from vitrim.counting import cost, macs
from vitrim.methods.auto import AutoConfig, choose, merges
from vitrim.methods.auto import run as auto
from vitrim.methods.auto.merges import Merges, Stage

CLASSIFIER = vit(blocks=4, width=64, heads=4, head_dim=16, hidden=256, image=32)
SPEC = replace(CLASSIFIER, outputs=())  # 64 patch tokens, which are the product


def stages(seed: int, count: int = 3, levels: int = 4, choices: int = 3) -> list[Stage]:
    random = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        merged = np.triu(random.random((levels, levels)), 1)
        merged[np.tril_indices(levels, -1)] = np.inf
        cost_of = [np.sort(random.random((choices, levels)), axis=1)[:, ::-1] for _ in range(2)]
        found.append(Stage(random.random(choices), *cost_of, merged, 0.1 * random.random((levels, levels))))
    return found


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("price", [0.0, 0.3, 3.0])
def test_no_other_levels_and_choices_are_better_at_a_price(seed: int, price: float) -> None:
    given = stages(seed)

    def value(levels: tuple[int, ...], chosen: tuple[int, ...]) -> tuple[float, float]:
        lost = used = 0.0
        for own, before, after, choice in zip(given, (0, *levels), levels, chosen, strict=False):
            lost += own.loss[choice] + own.merged[before, after]
            used += own.attention[choice, before] + own.mlp[choice, after] + own.moves[before, after]
        return lost, used

    every = product(product(range(4), repeat=3), product(range(3), repeat=3))
    best = min((value(*one) + one for one in every), key=lambda one: one[0] + price * one[1])
    levels, used = merges.cheapest(given, price)
    assert tuple(levels) == best[2]
    assert used == pytest.approx(best[1])


def plan(keep: float, loss: float) -> tuple[choose.Nets, merges.Schedule | None]:
    """Of a network whose merges lose so much from the whole to the least, and whose choices all lose 1."""
    nets = choose.nets_of(SPEC, AutoConfig(axes=("mlp", "tokens")))
    space = nets.space(SPEC.width, ())
    losses = [{one: float(one != own.whole) for one in own.choices()} for own in space.levels]
    rising = np.linspace(0, loss, len(nets.ladder))
    given = Merges(nets.ladder, np.stack([rising] * len(SPEC.blocks)))
    limit = Budget(keep_macs=keep).limits(cost(SPEC))["macs"]
    return nets, merges.schedule(space, losses, given, limit, carry=True)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.9])
def test_merges_that_lose_nothing_take_the_place_of_cuts_and_meet_the_budget(share: float) -> None:
    nets, _ = plan(0.9, loss=0.0)
    least = macs(nets.spec(nets.uncut(nets.steepest(SPEC.width)))) / macs(SPEC)
    keep = least + (1 - least) * share
    nets, steps = plan(keep, loss=0.0)
    assert steps
    assert macs(nets.spec(nets.uncut(steps))) <= keep * macs(SPEC)


def test_merges_that_lose_much_are_left_out_and_what_is_out_of_reach_is_not_planned() -> None:
    assert plan(0.8, loss=1e6)[1] == ()
    assert plan(0.01, loss=1.0)[1] is None


def test_the_ladder_goes_from_all_tokens_to_an_eighth_and_no_step_takes_more_than_half() -> None:
    for patches in (9, 16, 64, 196, 256, 1369):
        counts = merges.ladder(patches)
        assert counts[0] == patches
        assert counts[-1] == max(4, round(patches / 8))
        assert list(counts) == sorted(set(counts), reverse=True)
        for level, before in enumerate(counts[:-1]):
            after = counts[merges.furthest(counts, level)]
            assert before - before // 2 <= after < before
    assert merges.ladder(4) == (4,)


def test_the_steepest_schedule_is_a_network_and_the_floor_counts_it() -> None:
    nets = choose.nets_of(SPEC, AutoConfig(axes=("mlp", "tokens")))
    spec = nets.spec(nets.uncut(nets.steepest(SPEC.width)))
    assert macs(spec) < macs(SPEC)
    assert nets.floor.macs < macs(nets.spec(replace(nets.uncut(), choices=nets.whole.lowest)))


def test_a_schedule_loses_what_its_steps_lose_in_order() -> None:
    losses = np.array([[0.0, 1.0, 3.0], [0.0, 2.0, 5.0]])
    given = Merges((8, 6, 4), losses)
    steps = ((0, merges.merge(6, 64, carry=False)), (1, merges.merge(4, 64, carry=False)))
    assert given.total(steps) == 1.0 + 3.0
    assert given.loss(1, 8, 7) == 1.0


def test_where_tokens_are_the_product_all_come_back_and_the_stream_keeps_its_width() -> None:
    for spec, named in ((SPEC, None), (CLASSIFIER, "tokens")):
        nets = choose.nets_of(spec, AutoConfig(product=named))
        found = nets.spec(nets.uncut(nets.steepest(spec.width)))
        assert found.restore
        assert all(step.carry for block in found.blocks for step in block.steps)  # type: ignore[union-attr]
        assert nets.widths == (64,)
        assert not nets.tail
    assert (
        len(choose.nets_of(CLASSIFIER, AutoConfig()).ladder) == 1
    )  # merges of a classifier are schedules of their own


def test_an_encoder_cut_on_its_tokens_gives_the_shapes_of_the_dense_one_and_is_like_it() -> None:
    model, x = make(SPEC, dtype=torch.float32), images(SPEC, 12, dtype=torch.float32)
    given = AutoConfig(budget=Budget(keep_macs=0.85), axes=("tokens",), images=12, batch_size=5, builds=1)
    small = auto.compress(model, given, data=x)
    assert small.spec.restore
    assert any(block.steps for block in small.spec.blocks)
    assert macs(small.spec) <= 0.85 * macs(SPEC)
    with torch.no_grad():
        ours, theirs = (net(x, want=("tokens",))["tokens"] for net in (small.model, model))
        maps = small.model.features(x, [2])[0]
    assert ours.shape == theirs.shape == (12, 65, 64)
    assert maps.shape == (12, 64, 8, 8)
    like = torch.nn.functional.cosine_similarity(ours, theirs, dim=-1).mean()
    plain = surgery.with_spec(
        small.model,
        replace(
            small.spec,
            blocks=tuple(replace(b, steps=tuple(replace(s, carry=False) for s in b.steps)) for b in small.spec.blocks),
        ),  # type: ignore[call-arg]
        {name: value for name, value in small.model.state_dict().items() if not name.endswith(".carry")},
    )
    with torch.no_grad():
        without = torch.nn.functional.cosine_similarity(plain(x, want=("tokens",))["tokens"], theirs, dim=-1).mean()
    assert like > without  # what is carried along brings merged tokens nearer
    assert like > 0.9
