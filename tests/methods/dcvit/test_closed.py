"""The closed form: no worse than equal widths, no loss where nothing is lost, a refit that helps."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.methods.dcvit.kit import SPACE, WIDE, config, keeps_of, normalised, option, photos
from tests.specs import close, images, make
from vitrim import closed_form as cf
from vitrim import surgery
from vitrim.budget import Budget, exceeded
from vitrim.counting import cost
from vitrim.errors import BudgetError
from vitrim.methods import dcvit
from vitrim.methods.dcvit import allocate
from vitrim.model import Vit
from vitrim.space import Choice, Space
from vitrim.spec import (
    Merge,
    ModelSpec,
    Prefix,
    Similarity,
)


def _losses(space: Space, seed: int) -> list[dict[Choice, float]]:
    """Random losses that rise as less is kept."""
    g = np.random.default_rng(seed)
    found = []
    for levels in space.levels:
        fixed, scale = g.random() * 3, g.random() * 5
        hidden = levels.whole.hidden
        found.append(
            {
                o: (0.0 if n == 0 else scale * (1 - o.hidden / hidden) ** 2 + fixed * (not o.attention))
                for n, o in enumerate(levels.choices())
            }
        )
    return found


@pytest.mark.parametrize("seed", range(3))
def test_the_allocation_never_predicts_worse_than_equal_widths_or_than_a_smaller_budget(seed):
    losses = _losses(SPACE, seed)
    last = float("inf")
    for keep in np.linspace(0.3, 1.0, 6):
        budget = Budget(keep_macs=float(keep))
        chosen = allocate(SPACE, losses, budget)
        limit = budget.limits(cost(WIDE))
        assert not exceeded(cost(SPACE.spec(chosen)), limit)
        total = sum(loss[o] for loss, o in zip(losses, chosen, strict=True))
        for m in range(8, 65, 8):
            for lost in range(4):  # one attention stays
                equal = tuple(option(i, i >= lost, m) for i in range(4))
                if not exceeded(cost(SPACE.spec(equal)), limit):
                    assert total <= sum(loss[o] for loss, o in zip(losses, equal, strict=True)) + 1e-12
        assert total <= last + 1e-12
        last = total


def _planted(spec: ModelSpec = WIDE, at: int = 2) -> Vit:
    """A block whose attention writes a constant and most of whose hidden units write nothing."""
    model = make(spec)
    block = model.blocks[at]
    with torch.no_grad():
        block.attention.out.weight.zero_()
        block.attention.out.bias.fill_(0.7)
        block.mlp.fc2.weight[:, 8:] = 0
    return model


def test_a_planted_block_is_cut_first_and_without_loss():
    """Its constant goes into the bias: exactly, since LN2 does not see a constant along ones."""
    model, x = _planted(), images(WIDE, 16)
    least = cost(SPACE.spec(SPACE.with_choice(2, option(2, False, 8)))).macs
    small = dcvit.compress(model, config(Budget(max_macs=least), ridge=1e-10), data=x)
    row = small.report["blocks"][2]
    assert (row["attention"], row["hidden"]) == ("lost", 8)
    assert close(small.model(x), model(x), 1e-5)


def test_duplicate_units_go_without_loss():
    model, x = make(WIDE), images(WIDE, 16)
    with torch.no_grad():
        for block in model.blocks:
            block.mlp.fc1.weight[32:] = block.mlp.fc1.weight[:32]
            block.mlp.fc1.bias[32:] = block.mlp.fc1.bias[:32]
    gone = cost(SPACE.spec([option(i, True, 32) for i in range(4)])).macs
    small = dcvit.compress(model, config(Budget(max_macs=gone), ridge=1e-8), data=x)
    fresh = images(WIDE, 4, seed=7)
    assert [row["hidden"] for row in small.report["blocks"]] == [32] * 4
    assert close(small.model(fresh), model(fresh), 1e-4)


def test_the_refit_loses_less_than_the_plain_cut():
    model, x = make(WIDE), images(WIDE, 48)
    small = dcvit.compress(model, config(Budget(keep_macs=0.6), images=48), data=x)
    plain = surgery.cut(model, keeps_of(WIDE, small.model), method="cut")
    fresh = images(WIDE, 16, seed=11)
    aim = model(fresh).detach()
    assert (small.model(fresh).detach() - aim).square().mean() < 0.8 * (plain(fresh).detach() - aim).square().mean()


def test_more_images_lose_less_on_fresh_ones():
    model, fresh = make(WIDE), images(WIDE, 32, seed=99)
    aim = model(fresh).detach()
    lost = []
    for count in (8, 64):
        errors = []
        for seed in range(3):
            small = dcvit.compress(
                model, config(Budget(keep_macs=0.6), images=count, seed=seed), data=images(WIDE, count, seed=20 + seed)
            )
            errors.append(float((small.model(fresh).detach() - aim).square().mean()))
        lost.append(sum(errors))
    assert lost[1] < lost[0]


@pytest.mark.parametrize(
    "field", [{"weighted": False}, {"hand_over": True}, {"ridge": 0.5}, {"align": 4}, {"probe_images": 2}]
)
def test_each_setting_of_the_closed_form_is_heard(field):
    model, x = make(WIDE), images(WIDE, 16)
    budget = Budget(keep_macs=0.42)
    plain, other = (dcvit.compress(model, config(budget, **f), data=x) for f in ({}, field))
    same = plain.spec == other.spec and all(
        torch.equal(a, b) for a, b in zip(plain.model.parameters(), other.model.parameters(), strict=True)
    )
    assert not same


@pytest.mark.parametrize(
    "change",
    [
        {"steps": (Prefix(),), "at": -1},
        {"steps": (Merge(axis="h", keep=3),), "at": 1},
        {"steps": (Similarity(keep=12, at="mid"),), "at": 1},
        {"steps": (Similarity(keep=12, at="start"),), "at": 2},
    ],
)
def test_token_steps_are_kept_and_followed(change):
    at = change["at"] % 4
    blocks = list(WIDE.blocks)
    blocks[at] = replace(blocks[at], steps=change["steps"])
    spec = replace(WIDE, blocks=tuple(blocks))
    model, x = make(spec), images(spec, 24)
    small = dcvit.compress(model, config(Budget(keep_macs=0.6), images=24), data=x)
    assert small.spec.blocks[at].steps == change["steps"]
    plain = surgery.cut(model, keeps_of(spec, small.model), method="cut")
    aim = model(x).detach()
    assert (small.model(x).detach() - aim).square().mean() < (plain(x).detach() - aim).square().mean()


def test_streams_above_the_bound_lie_in_files(monkeypatch):
    """So memory does not grow with the images: each batch of each place goes through one file, and none stays behind."""
    monkeypatch.setattr(cf.streams, "IN_MEMORY_BYTES", 0)
    seen: dict[str, int] = {"put": 0, "file": 0}
    put, file = cf.StreamCache.put, cf.StreamCache._file

    def watch_put(self, stream):
        seen["put"] += 1
        put(self, stream)

    def watch_file(self, i, x):
        seen["file"] += 1
        assert self.folder is not None
        assert len(list(self.folder.glob(f"{self.name}-*.bin"))) <= 2 * 64  # this place and the one before
        return file(self, i, x)

    monkeypatch.setattr(cf.StreamCache, "put", watch_put)
    monkeypatch.setattr(cf.StreamCache, "_file", watch_file)
    in_files = dcvit.compress(normalised(), config(Budget(keep_macs=0.6)), data=photos())
    assert seen["put"] == seen["file"] > 8
    monkeypatch.undo()
    in_memory = dcvit.compress(normalised(), config(Budget(keep_macs=0.6)), data=photos())
    state = in_memory.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in in_files.model.state_dict().items())


def test_the_last_attention_stays():
    """Losses are added block by block, and say that attentions are worth little; the class token needs one."""
    losses = [{o: (2e-3 - 1e-3 * o.attention) + 1 - o.hidden / 64 for o in lv.choices()} for lv in SPACE.levels]
    budget = Budget(keep_macs=0.45)
    found = allocate(SPACE, losses, budget)
    assert sum(o.attention for o in found) == 1
    assert not exceeded(cost(SPACE.spec(found)), budget.limits(cost(WIDE)))
    tight = Budget(max_macs=SPACE.floor.macs)
    assert sum(o.attention for o in allocate(SPACE, losses, tight)) == 1
    with pytest.raises(BudgetError, match="out of reach"):
        allocate(SPACE, losses, Budget(max_macs=SPACE.floor.macs - 1))
