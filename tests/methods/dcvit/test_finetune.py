"""The paper's way: within the budget, the ends spared, resumable; its metric images."""

from dataclasses import replace

import pytest
import torch

from tests.methods.dcvit.kit import PREPROCESS, WIDE, config, job, keeps_of, normalised, photos, tuning
from tests.specs import close, images, make
from vitrim import surgery
from vitrim.budget import Budget, exceeded
from vitrim.counting import cost
from vitrim.data import Augment
from vitrim.methods import dcvit
from vitrim.methods.dcvit import tolerance
from vitrim.methods.dcvit.finetune import Mimic, finetune, jpeg_round_trip, metric_images, narrow, subset, synthesise
from vitrim.spec import (
    Merge,
    MlpSpec,
)
from vitrim.surgery import Keep


def test_the_trials_rank_a_planted_block_first():
    model = normalised(replace(WIDE, blocks=WIDE.blocks[:1] * 5))
    with torch.no_grad():
        for name in ("attention.out", "mlp.fc2"):
            model.blocks[2].get_submodule(name).weight.zero_()
        model.blocks[2].attention.out.bias.zero_()
    small = dcvit.compress(model, tuning(Budget(keep_macs=0.9)), data=photos())
    assert small.report["order"][0] == 2


def test_a_compressed_block_mixes_no_tokens_and_forgets_the_order_of_its_units():
    model, x = make(WIDE), images(WIDE, 2)
    small, _ = narrow(job(model, tuning(), images(WIDE, 16)), model, 1, 20)
    stream = model.embed(x)
    moved = stream.x.clone()
    moved[:, 3] += 1
    one, two = (small.blocks[1](stream._replace(x=v))[0].x for v in (stream.x, moved))
    assert torch.equal(one[:, 4:], two[:, 4:])
    assert not torch.equal(one[:, 3], two[:, 3])
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    again = surgery.cut(small, [None, Keep(hidden=tuple(order.tolist())), None, None], method="order")
    assert close(again(x), small(x))


def test_subsets_are_a_function_of_seed_and_block():
    assert subset(40, 10, seed=0, block=3) == subset(40, 10, seed=0, block=3)
    assert len({subset(40, 10, seed=s, block=b) for s in range(2) for b in range(3)}) == 6
    assert set(subset(40, 9, seed=0, block=3)) < set(subset(40, 10, seed=0, block=3))


def test_the_fine_tuned_form_meets_the_budget_and_spares_the_ends():
    model = normalised(replace(WIDE, blocks=WIDE.blocks[:1] * 5))
    before = {n: v.clone() for n, v in model.state_dict().items()}
    for keep in (0.85, 0.6):
        small = dcvit.compress(model, tuning(Budget(keep_macs=keep)), data=photos())
        reference, found = cost(model.spec), cost(small.spec)
        assert found.macs <= keep * reference.macs
        assert keep * reference.macs - found.macs <= max(0.01 * reference.macs, tolerance(model.spec, tuning())["macs"])
        rows = small.report["blocks"]
        assert [rows[0]["attention"], rows[-1]["attention"]] == ["kept", "kept"]
        assert sorted(small.report["order"]) == [r["block"] for r in rows if r["attention"] == "lost"]
        assert small.variant == "finetune"
        kept = keeps_of(model.spec, small.model)
        assert surgery.with_folded(surgery.cut(model, kept, method="x").spec) == surgery.with_folded(small.spec)
        last = max(small.report["order"]) + 1
        for name, value in small.model.state_dict().items():
            if name.startswith("heads") or (name.startswith("blocks") and int(name.split(".")[1]) > last):
                assert torch.equal(value, before[name]), name
    assert all(torch.equal(before[n], v) for n, v in model.state_dict().items())
    assert all(p.requires_grad for p in small.model.parameters())


def test_only_the_front_learns_and_nothing_is_lost_where_nothing_was_cut():
    teacher = normalised()
    student = surgery.copy(teacher)
    still = Mimic(teacher, last=1, fixed=frozenset())
    still.param_groups(student)
    from vitrim.training import Batch, Step

    loss = still.loss(
        student, Batch(images=images(WIDE, 2, dtype=torch.float32), labels=None), Step(index=0, total=1, epoch=0)
    )
    assert float(loss.detach()) == 0
    run = job(teacher, tuning(lr=1e-3), photos())
    cut, _ = narrow(run, surgery.copy(teacher), 1, 20)
    before = {n: v.clone() for n, v in cut.state_dict().items()}
    finetune(run, cut, last=1, steps=30)
    for name, value in cut.state_dict().items():
        learns = not name.startswith(("heads", "blocks.3"))
        assert torch.equal(before[name], value) != learns, name
    start = {**cut.state_dict(), **before}
    x = images(WIDE, 8, dtype=torch.float32)
    aim = teacher(x, want=("tokens",))["tokens"]
    after = (cut(x, want=("tokens",))["tokens"] - aim).square().mean()
    cut.load_state_dict(start)
    assert after < (cut(x, want=("tokens",))["tokens"] - aim).square().mean()


def test_fine_tuning_is_resumed_between_trials(tmp_path):
    model, settings_ = normalised(), tuning(Budget(keep_macs=0.7))
    whole = dcvit.compress(model, settings_, data=photos())

    def stop(stage: str, done: int, total: int, **facts: object) -> None:
        if stage.startswith("trial of block 2") and done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dcvit.compress(model, settings_, data=photos(), folder=tmp_path, progress=stop)
    again = dcvit.compress(model, settings_, data=photos(), folder=tmp_path, resume=True)
    assert again.report["order"] == whole.report["order"]
    for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_paper_preset_and_steps_after_the_closed_form_run():
    spec = replace(WIDE, blocks=tuple(replace(b, mlp=MlpSpec(hidden=128)) for b in WIDE.blocks))
    model = normalised(spec)
    paper = dcvit.compress(model, tuning(Budget(keep_macs=0.7), preset="paper", steps=2), data=photos())
    assert cost(paper.spec).macs <= 0.7 * cost(spec).macs
    runs = [
        dcvit.compress(
            model, config(Budget(keep_macs=0.6), finetune_steps=n, lr=1e-3, augment=Augment()), data=photos()
        )
        for n in (0, 20)
    ]
    assert runs[0].spec == runs[1].spec
    assert not all(
        torch.equal(a, b) for a, b in zip(runs[0].model.parameters(), runs[1].model.parameters(), strict=True)
    )


def test_metric_images_become_typical_and_depend_on_the_seed_alone():
    model = normalised()
    one = synthesise(model, 4, 30, seed=0, size_px=(16, 16))
    assert torch.equal(one, synthesise(model, 4, 30, seed=0, size_px=(16, 16)))
    assert not torch.equal(one, synthesise(model, 4, 30, seed=1, size_px=(16, 16)))
    assert one.abs().max() <= 2 + 1e-6  # valid pixels
    noise = synthesise(model, 4, 1, seed=0, size_px=(16, 16))
    sharp, flat = (model(v).softmax(-1).max(-1).values.mean() for v in (one, noise))
    assert sharp > flat
    assert jpeg_round_trip(one, PREPROCESS).shape == one.shape


@pytest.mark.parametrize("limits", [{"keep_macs": 0.69, "keep_params": 0.6}, {"keep_macs": 0.8}])
def test_fine_tuning_keeps_two_limits_on_an_uneven_network(limits):
    merge = Merge(at="end", axis="h", keep=2)
    blocks = list(WIDE.blocks)
    blocks[1] = replace(blocks[1], steps=(merge,))
    blocks[2] = replace(blocks[2], mlp=MlpSpec(hidden=160))
    model = normalised(replace(WIDE, blocks=tuple(blocks)))
    budget = Budget(**limits)
    small = dcvit.compress(model, tuning(budget), data=photos())
    assert not exceeded(cost(small.spec), budget.limits(cost(model.spec)))


def test_an_encoders_metric_images_are_no_more_than_were_asked_for():
    model = normalised(replace(WIDE, outputs=()))
    run = job(model, tuning(metric_images=6, images=40), photos(40))
    inputs, read = run.inputs, []
    plain_batches = inputs.batches
    inputs.batches = lambda: (read.append(len(x)) or x for x in plain_batches())  # type: ignore[method-assign]
    assert len(metric_images(run)) == 6
    assert sum(read) < 20
