"""Tokens as an axis: the plan of merges is exact at a price, within its budget, and merges where that pays."""

from dataclasses import replace
from itertools import pairwise, product

import numpy as np
import pytest
import torch

from tests.specs import images, make, vit
from vitrim import surgery
from vitrim.budget import Budget
from vitrim.counting import cost, macs
from vitrim.errors import BudgetError, ConfigError
from vitrim.methods.auto import AutoConfig, choose, merges
from vitrim.methods.auto import run as auto
from vitrim.methods.auto.merges import Merges, Node, Plan, Stage
from vitrim.spec import ModelSpec, Position, Similarity, Step, token_walk

CLASSIFIER = vit(blocks=4, width=64, heads=4, head_dim=16, hidden=256, image=32)
SPEC = replace(CLASSIFIER, outputs=())  # 64 patch tokens, which are the product


GRID = Node(16, (4, 4)), Node(12, (4, 3)), Node(8, (4, 2)), Node(9, (3, 3)), Node(13), Node(10), Node(8)


def stages(seed: int, count: int = 3, choices: int = 3) -> tuple[list[Stage], list[tuple[int, int]]]:
    random, along = np.random.default_rng(seed), [*((n, n) for n in range(len(GRID))), *merges.ways(GRID)]
    found = []
    for _ in range(count):
        merged, moves = random.random(len(along)), 0.1 * random.random(len(along))
        merged[: len(GRID)] = moves[: len(GRID)] = 0.0
        merged[-1] = np.inf
        found.append(Stage(random.random(choices), *random.random((2, choices, len(GRID))), merged, moves))
    return found, along


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("price", [0.0, 0.3, 3.0])
def test_no_other_nodes_and_choices_are_better_at_a_price(seed: int, price: float) -> None:
    given, along = stages(seed)

    def value(path: tuple[int, ...], chosen: tuple[int, ...]) -> tuple[float, float]:
        lost = used = 0.0
        for own, before, after, choice in zip(given, (0, *path), path, chosen, strict=False):
            way = along.index((before, after))
            lost += own.loss[choice] + own.merged[way]
            used += own.attention[choice, before] + own.mlp[choice, after] + own.moves[way]
        return lost, used

    paths = [path for path in product(range(len(GRID)), repeat=3) if all(way in along for way in pairwise((0, *path)))]
    every = [value(*one) + one for one in product(paths, product(range(3), repeat=3))]
    best = min(every, key=lambda one: one[0] + price * one[1])
    path, used = merges.cheapest(given, along, price)
    assert tuple(path) == best[2]
    assert used == pytest.approx(best[1])


def plan(keep: float, loss: float, spec: ModelSpec = SPEC) -> tuple[choose.Nets, list[merges.Schedule]]:
    """Of a network whose merges lose so much from the whole to the least, and whose choices all lose 1."""
    nets = choose.nets_of(spec, AutoConfig(axes=("mlp", "tokens")))
    space = nets.space(spec.width, ())
    losses = [{one: float(one != own.whole) for one in own.choices()} for own in space.levels]
    rising = np.array([loss * (64 - node.patches) / 56 for node in nets.nodes])
    given = Merges(nets.nodes, np.stack([rising] * len(spec.blocks)))
    limit = Budget(keep_macs=keep).limits(cost(spec))["macs"]
    return nets, Plan(space, losses, given, carry=nets.restores).schedules(limit)


@pytest.mark.parametrize("spec", [SPEC, CLASSIFIER], ids=["encoder", "classifier"])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.9])
def test_merges_that_lose_nothing_take_the_place_of_cuts_and_meet_the_budget(share: float, spec: ModelSpec) -> None:
    nets, _ = plan(0.9, 0.0, spec)
    least = macs(nets.spec(nets.uncut(nets.steepest(spec.width)))) / macs(spec)
    keep = least + (1 - least) * share
    nets, (steps, _) = plan(keep, 0.0, spec)
    assert steps
    assert macs(nets.spec(nets.uncut(steps))) <= keep * macs(spec)


def test_merges_that_lose_much_are_left_out_and_what_is_out_of_reach_is_not_planned() -> None:
    assert plan(0.8, loss=1e6)[1][0] == ()
    assert plan(0.01, loss=1.0)[1] == []


@pytest.mark.parametrize("grid", [(3, 3), (4, 4), (8, 8), (14, 14), (16, 16), (37, 37), (2, 9), (1, 12)])
def test_every_way_is_a_step_that_the_spec_allows_and_none_leads_back_to_a_lattice(grid: tuple[int, int]) -> None:
    found = merges.nodes(grid)
    patches = grid[0] * grid[1]
    assert found[0] == Node(patches, grid)
    assert len(set(found)) == len(found)
    assert {node.patches for node in found if node.grid is None} >= {max(4, round(patches / 8))}
    spec = replace(vit(blocks=1, patch=1), image_px=grid, position=Position(grid=grid))
    reached = {0}
    for a, b in merges.ways(found):
        before, after = found[a], found[b]
        assert before.grid is not None or after.grid is None
        step = merges.merge(before, after, spec.width, carry=False)
        assert before.after(step) == after
        if before == found[0]:
            walked = token_walk(replace(spec, blocks=(replace(spec.blocks[0], steps=(step,)),)))
            assert (walked[0].leave.patches, walked[0].leave.grid) == after
        reached |= {b} if a in reached else set()
    assert reached == set(range(len(found)))


@pytest.mark.parametrize("grid", [(2, 2), (1, 4), (1, 1)])
def test_a_grid_too_small_to_merge_says_so_where_that_is_asked_for(grid: tuple[int, int]) -> None:
    assert len(merges.nodes(grid)) == 1
    spec = replace(vit(blocks=2, patch=1), image_px=grid, position=Position(grid=grid))
    with pytest.raises(
        ConfigError, match=f"'tokens' does not apply .* a grid of {grid[0]} x {grid[1]} patches is too small"
    ):
        choose.plan(spec, AutoConfig(axes=("tokens", "mlp")))
    assert "too small" in choose.plan(spec)["dense"]["tokens"]


@pytest.mark.parametrize("spec", [SPEC, CLASSIFIER], ids=["encoder", "classifier"])
def test_the_least_of_merges_and_widths_together_is_the_floor_and_below_it_is_refused_with_the_range(
    spec: ModelSpec,
) -> None:
    config = AutoConfig(axes=("mlp", "tokens"))
    nets = choose.nets_of(spec, config)
    assert macs(nets.spec(nets.uncut(nets.steepest(spec.width)))) < macs(spec)
    least = nets.floor().macs
    assert least < cost(nets.spec(nets.slimmest)).macs
    assert choose.plan(spec, replace(config, budget=Budget(max_macs=least)))["range"]["macs"] == [least, macs(spec)]
    with pytest.raises(BudgetError, match=f"auto reaches {least:,} to {macs(spec):,}"):
        choose.plan(spec, replace(config, budget=Budget(max_macs=least - 1)))


def test_a_budget_of_parameters_is_met_without_merges_and_their_weights() -> None:
    config = AutoConfig(axes=("mlp", "tokens"))
    nets = choose.nets_of(SPEC, config)
    slim = cost(nets.spec(nets.slimmest))
    assert (
        choose.plan(SPEC, replace(config, budget=Budget(max_params=slim.params)))["range"]["params"][0] == slim.params
    )
    zeros = Merges(nets.nodes, np.zeros((4, len(nets.nodes))))
    scores = choose.Scores((choose.Losses(*({1: 0.0} for _ in range(4))),) * 4, {64: 0.0}, zeros)
    assert choose.planned(nets, scores, 64, {"params": slim.params}) == [()]
    assert len(choose.planned(nets, scores, 64, {"memory_bytes": slim.memory_bytes})) > 1


@pytest.mark.parametrize("spec", [SPEC, CLASSIFIER], ids=["encoder", "classifier"])
@pytest.mark.parametrize("keep", [0.97, 0.94, 0.91, 0.88])
def test_operations_that_no_price_spends_are_spent_on_tokens(keep: float, spec: ModelSpec) -> None:
    nets = choose.nets_of(spec, AutoConfig(axes=("tokens",)))
    lost = [
        [(20 if node.grid else 1) * (1 - node.patches / 64) ** 2 / (i + 1) for node in nets.nodes] for i in range(4)
    ]
    whole = nets.levels[0].whole
    losses = choose.Losses({whole.qk: 0.0}, {whole.v: 0.0}, {whole.hidden: 0.0}, {})
    scores = choose.Scores((losses,) * 4, {64: 0.0}, Merges(nets.nodes, np.array(lost)))
    limits = Budget(keep_macs=keep).limits(cost(spec))
    best = choose.best_candidates(nets, scores, limits, count=1)[0]
    assert 0 <= limits["macs"] - macs(nets.spec(best)) < 0.01 * macs(spec)


def test_a_schedule_loses_what_its_steps_lose_in_order() -> None:
    found = Node(16, (4, 4)), Node(8, (4, 2)), Node(12), Node(8), Node(6)
    losses = np.array([[0.0, 5.0, 1.0, 3.0, 4.0], [0.0, 2.0, 2.0, 5.0, 9.0]])
    given = Merges(found, losses)
    steps = tuple(
        (i, merges.merge(a, b, 64, carry=False)) for i, a, b in ((0, found[0], found[2]), (1, found[2], found[4]))
    )
    assert given.total(steps) == 1.0 + (9.0 - 2.0)
    steps = tuple(
        (i, merges.merge(a, b, 64, carry=False)) for i, a, b in ((0, found[0], found[1]), (1, found[1], found[4]))
    )
    assert given.total(steps) == 5.0 + (9.0 - 5.0)
    assert given.loss(1, found[0], Node(14)) == 1.0
    assert merges.measured(found) == [1, 2, 4]  # of 8 tokens nothing is measured
    settled = Merges.settled(found, np.array([[0.0, -1.0, 1.0, 0.0, 9.0], [0.0, 1.0, 4.0, 0.0, 3.0]]))
    assert settled.losses.tolist() == [[0.0, 0.0, 1.0, pytest.approx((7 / 3) ** 2), 9.0], [0.0, 1.0, 4.0, 4.0, 4.0]]


def test_where_tokens_are_the_product_all_come_back_and_the_stream_keeps_its_width() -> None:
    for spec, named in ((SPEC, None), (CLASSIFIER, "tokens"), (CLASSIFIER, None)):
        nets = choose.nets_of(spec, AutoConfig(product=named))
        restored = not spec.outputs or named == "tokens"
        step = merges.merge(nets.nodes[0], Node(57), 64, carry=nets.restores)
        found = nets.spec(nets.uncut(((1, step),)))
        assert found.restore == restored
        assert isinstance(step, Similarity)
        assert bool(step.carry) == restored
        assert (nets.widths == (64,)) == restored
        assert nets.tail == (not restored)


def without_carry(step: Step) -> Step:
    return replace(step, carry=None) if isinstance(step, Similarity) else step


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
    bare = replace(
        small.spec,
        blocks=tuple(replace(block, steps=tuple(map(without_carry, block.steps))) for block in small.spec.blocks),
    )
    assert bare != small.spec  # some similar tokens merge
    weights = {name: value for name, value in small.model.state_dict().items() if ".carry_" not in name}
    plain = surgery.with_spec(small.model, bare, weights)
    with torch.no_grad():
        without = torch.nn.functional.cosine_similarity(plain(x, want=("tokens",))["tokens"], theirs, dim=-1).mean()
    assert like > without  # what is carried along brings merged tokens nearer
    assert like > 0.9
