"""What comes in: no labels, no equal images, no unsaid normalisation."""

import pytest
import torch

from tests.methods.dcvit.kit import WIDE, config, normalised, photos, tuning
from tests.specs import images, make
from vitrim.budget import Budget
from vitrim.errors import DataError
from vitrim.methods import dcvit


def test_labels_are_never_read():
    model = normalised()
    labels = torch.arange(16) % 5
    runs = [
        dcvit.compress(model, config(Budget(keep_macs=0.5)), data=d)
        for d in ((photos(), labels), (photos(), labels.flip(0)))
    ]
    runs += [dcvit.compress(model, config(Budget(keep_macs=0.5)), data=photos())]
    for other in runs[1:]:
        for a, b in zip(runs[0].model.parameters(), other.model.parameters(), strict=True):
            assert torch.equal(a, b)


def test_equal_images_and_unsaid_normalisation_are_refused_by_every_form_before_work():
    seen: list[str] = []
    same = photos(1).expand(16, -1, -1, -1)
    with pytest.raises(DataError, match="are equal"):
        dcvit.compress(normalised(), tuning(Budget(keep_macs=0.6)), data=same)
    with pytest.raises(DataError, match="how its images are prepared"):
        dcvit.compress(
            make(WIDE),
            config(Budget(keep_macs=0.6), finetune_steps=2),
            data=images(WIDE, 16),
            progress=lambda stage, *_, **__: seen.append(stage),
        )
    assert not seen
