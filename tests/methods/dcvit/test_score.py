"""Scores serve every budget, are taken up where they were left, and rank as real images do."""

import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import vitrim
from tests.methods.dcvit.kit import (
    WIDE,
    config,
    job,
    normalised,
    photos,
)
from tests.specs import images, make
from vitrim import data as opened
from vitrim.budget import Budget
from vitrim.closed_form.fisher import Product
from vitrim.counting import cost
from vitrim.errors import TrainingError
from vitrim.methods import dcvit
from vitrim.methods.dcvit import DcvitConfig
from vitrim.methods.dcvit.finetune import (
    mismatch,
    narrow,
)
from vitrim.methods.dcvit.score import score


def test_scores_serve_every_budget_of_a_family():
    model, x = make(WIDE), images(WIDE, 16)
    told: list[str] = []
    budgets = [Budget(keep_macs=k) for k in (0.8, 0.6, 0.4)]
    family = dcvit.compress_family(
        model, config(), budgets, data=x, progress=lambda stage, done, total, **facts: told.append(stage)
    )
    assert told.count("score") == 4
    assert told.count("refit") == 12
    alone = dcvit.compress(model, config(budgets[1]), data=x)
    assert alone.spec == family[1].spec
    for a, b in zip(alone.model.parameters(), family[1].model.parameters(), strict=True):
        assert torch.equal(a, b)
    macs = [cost(one.spec).macs for one in family]
    assert macs == sorted(macs, reverse=True)
    predicted = [one.report["predicted"] for one in family]
    assert predicted == sorted(predicted)


def _stopping(at: int):
    def progress(stage: str, done: int, total: int, **facts: object) -> None:
        if stage == "score" and done == at:
            raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize("at", [1, 3])
def test_a_killed_scoring_goes_on_behind_the_last_block(tmp_path, at):
    model, x = make(WIDE), images(WIDE, 16)
    settings_ = config(Budget(keep_macs=0.5))
    whole = dcvit.compress(model, settings_, data=x)
    with pytest.raises(KeyboardInterrupt):
        dcvit.compress(model, settings_, data=x, folder=tmp_path, progress=_stopping(at))
    with pytest.raises(TrainingError, match="holds a run already"):
        dcvit.compress(model, settings_, data=x, folder=tmp_path)
    with pytest.raises(TrainingError, match="images was 16 and is 12"):
        dcvit.compress(model, replace(settings_, images=12), data=x, folder=tmp_path, resume=True)
    scored: list[int] = []
    again = dcvit.compress(
        model,
        settings_,
        data=x,
        folder=tmp_path,
        resume=True,
        progress=lambda stage, done, total, **facts: scored.append(done) if stage == "score" else None,
    )
    assert scored == list(range(at + 1, 5))
    assert again.spec == whole.spec
    for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow
def test_a_process_killed_in_the_scoring_goes_on(tmp_path):
    script = textwrap.dedent(
        """
        import os, signal, sys
        import torch
        torch.set_num_threads(1)
        from tests.methods.dcvit.kit import WIDE, config
        from tests.specs import images, make
        from pathlib import Path
        from vitrim.budget import Budget
        from vitrim.methods.dcvit import run as dcvit

        def progress(stage, done, total, **facts):
            if stage == "score" and done == 2:
                os.kill(os.getpid(), signal.SIGKILL)

        dcvit.compress(make(WIDE), config(Budget(keep_macs=0.5)), data=images(WIDE, 16), folder=Path(sys.argv[1]), progress=progress)
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], env={**os.environ}, check=False, capture_output=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    model, x, settings_ = make(WIDE), images(WIDE, 16), config(Budget(keep_macs=0.5))
    whole = dcvit.compress(model, settings_, data=x)
    again = dcvit.compress(model, settings_, data=x, folder=tmp_path, resume=True)
    assert again.spec == whole.spec
    for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow
def test_blocks_are_ranked_as_real_images_rank_their_plain_cuts(tmp_path: Path) -> None:
    model = vitrim.load("builtin:cifar10-vit-micro")
    config = DcvitConfig(images=64, probe_images=16)
    run = job(model, config, "sample", scratch=tmp_path)
    scores, _ = score(run)
    ours = [one.bare.loss(256) for one in scores if one.bare is not None]
    held = opened.open("sample", split="validation", labelled=False).take(64, 0, balanced=False)
    assert model.config.preprocess is not None
    ((x, _),) = opened.batches(held, opened.evaluation(model.config.preprocess), 64)
    cuts = [narrow(run, model, i, 256)[0] for i in range(len(model.blocks))]
    theirs = [mismatch(model, small, x, 64, Product.of(model.config)) for small in cuts]
    ranks = torch.stack([torch.tensor(values).argsort().argsort().double() for values in (ours, theirs)])
    assert len(ours) == 6
    assert float(torch.corrcoef(ranks)[0, 1]) > 0.5


def test_scores_of_another_model_are_not_taken_up(tmp_path):
    x = photos()
    dcvit.compress(normalised(), config(Budget(keep_macs=0.6)), data=x, folder=tmp_path)
    other = normalised()
    with torch.no_grad():
        other.blocks[0].mlp.fc1.weight.mul_(1.01)
    with pytest.raises(TrainingError, match="weights"):
        dcvit.compress(other, config(Budget(keep_macs=0.6)), data=x, folder=tmp_path, resume=True)
