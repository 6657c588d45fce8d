"""Order, augmentation, workers, restarts, broken images, and the fast path."""

from __future__ import annotations

import hashlib
import random
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.data.pictures import SMALL, class_folder, jpeg
from vitrim import data
from vitrim.data.draws import mix, seeded, uniform
from vitrim.data.pixels import erase
from vitrim.errors import ConfigError, DataError

STREAMED = data.Augment(randaugment="rand-m9-mstd0.5-inc1", jitter=0.3, erase=0.5)
FAST = data.Augment(erase=0.3)


def collect(images: data.Images, transform, **settings) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    return list(data.batches(images, transform, settings.pop("batch_size", 8), **settings))


def same(first, second) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(first, second, strict=True)
    )


@pytest.fixture(scope="module")
def images() -> data.Images:
    return data.open("sample", limit=40)


@pytest.mark.parametrize("augment", [STREAMED, FAST], ids=["streamed", "fast"])
def test_batches_do_not_depend_on_workers_or_on_where_they_start(images, augment):
    transform = data.training(SMALL, augment)
    settings = {"seed": 5, "epoch": 2, "shuffle": True, "drop_last": True}
    undisturbed = collect(images, transform, **settings)
    assert len(undisturbed) == 5
    assert same(undisturbed, collect(images.take(40), transform, workers=2, **settings))
    assert same(undisturbed[3:], collect(images, transform, start=3, **settings))
    assert same(undisturbed[3:], collect(images.take(40), transform, workers=2, start=3, **settings))
    assert not same(undisturbed, collect(images, transform, **{**settings, "epoch": 3}))
    assert not same(undisturbed, collect(images, transform, **{**settings, "seed": 6}))


@pytest.mark.parametrize("augment", [STREAMED, FAST], ids=["streamed", "fast"])
def test_an_image_is_augmented_alike_in_any_batch_and_subset(images, augment):
    transform = data.training(SMALL, augment)
    whole = torch.cat([x for x, _ in collect(images, transform, seed=1)])
    singly = torch.cat([x for x, _ in collect(images, transform, seed=1, batch_size=1)])
    some = torch.cat([x for x, _ in collect(images.subset(np.array([30, 2])), transform, seed=1)])
    assert torch.equal(whole, singly)
    assert torch.equal(whole[[30, 2]], some)


@pytest.mark.slow
def test_another_process_makes_the_same_batches(images):
    program = (
        "import hashlib; from vitrim import data; from tests.data.pictures import SMALL; "
        "images = data.open('sample', limit=40); "
        "t = data.training(SMALL, data.Augment(randaugment='rand-m9-mstd0.5-inc1', jitter=0.3, erase=0.5)); "
        "print(hashlib.sha256(b''.join(x.numpy().tobytes() for x, y in "
        "data.batches(images, t, 8, seed=5, epoch=2, shuffle=True))).hexdigest())"
    )
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip()
    here = collect(images, data.training(SMALL, STREAMED), seed=5, epoch=2, shuffle=True)
    assert printed == hashlib.sha256(b"".join(x.numpy().tobytes() for x, _ in here)).hexdigest()


@pytest.mark.parametrize("workers", [0, 2])
def test_the_callers_random_state_is_left_as_it_was(images, workers):
    before = random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state()
    collect(images, data.training(SMALL, STREAMED), shuffle=True, workers=workers)
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tobytes() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


def test_ranks_share_out_each_batch(images):
    transform = data.training(SMALL)
    whole = collect(images, transform, shuffle=True, drop_last=True)
    halves = [collect(images, transform, shuffle=True, drop_last=True, shard=(rank, 2)) for rank in (0, 1)]
    for all_, first, second in zip(whole, *halves, strict=True):
        assert torch.equal(all_[0], torch.cat([first[0], second[0]]))
    with pytest.raises(DataError, match="positive multiple of 3"):
        data.batches(images, transform, 8, shard=(0, 3))


def test_every_image_comes_once_an_epoch_and_batches_are_counted(images):
    labels = torch.cat([y for _, y in collect(images, data.evaluation(SMALL), shuffle=True, batch_size=16)])
    assert torch.bincount(labels).tolist() == [4] * 10
    assert [len(x) for x, _ in collect(images, data.evaluation(SMALL), batch_size=16)] == [16, 16, 8]
    assert (data.batch_count(40, 16), data.batch_count(40, 16, drop_last=True)) == (3, 2)
    with pytest.raises(DataError, match="do not fill one batch of 64"):
        data.batches(images, data.evaluation(SMALL), 64, drop_last=True)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("augment", [STREAMED, FAST], ids=["streamed", "fast"])
def test_a_broken_image_is_refused_by_its_path_or_skipped_and_noted(tmp_path, workers, augment):
    class_folder(tmp_path, {"cat": 6, "dog": 6})
    (tmp_path / "cat" / "2.jpg").write_bytes(jpeg(0)[:200])
    (tmp_path / "dog" / "4.jpg").write_text("hello")
    transform = data.training(SMALL, augment)
    with pytest.raises(DataError, match=r"cat/2.jpg: not a readable image .*on_broken='skip'") as caught:
        collect(data.open(tmp_path, split="all"), transform, workers=workers)
    assert "Traceback" not in str(caught.value)
    skipping = data.open(tmp_path, split="all", on_broken="skip")
    assert [len(x) for x, _ in collect(skipping, transform, workers=workers, batch_size=4)] == [3, 4, 3]
    assert set(skipping.broken) == {"cat/2.jpg", "dog/4.jpg"}
    full = collect(skipping, transform, workers=workers, batch_size=4, drop_last=True)
    assert [len(x) for x, _ in full] == [4, 4, 4]
    assert data.calibration(skipping, SMALL, 12).shape == (10, 3, 32, 32)
    pixels, labels = data.in_memory(skipping, 32)
    assert (len(pixels), len(labels)) == (10, 10)


def test_where_nothing_can_be_read_one_sentence_says_so(tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.jpg").write_bytes(b"")
    images = data.open(tmp_path, split="all", on_broken="skip")
    with pytest.raises(DataError, match=r"none of 3 images could be read; the first: 0\.jpg"):
        data.calibration(images, SMALL, 3)


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("size", [(32, 32), (48, 64), (112, 112)])
def test_the_evaluation_view_is_timms(crop_mode, size):
    from timm.data.transforms_factory import transforms_imagenet_eval

    preprocess = replace(SMALL, size_px=size, crop=0.875, crop_mode=crop_mode)
    theirs = transforms_imagenet_eval(
        size, crop_pct=0.875, crop_mode=crop_mode, interpolation="bicubic", mean=SMALL.mean, std=SMALL.std
    )
    image = data.open("sample", split="test")[3][0].resize((50, 40))
    assert torch.equal(data.evaluation(preprocess)(image), theirs(image))


def test_the_fast_path_evaluates_as_the_transform_does(images):
    transform = data.evaluation(SMALL)
    batched = torch.cat([x for x, _ in collect(images, transform)])
    singly = torch.stack([transform(images[i][0]) for i in range(len(images))])
    assert torch.equal(batched, singly)
    assert torch.equal(data.calibration(images, SMALL, 100), batched)


def test_augment_says_what_it_does():
    images = data.open("sample", limit=20)
    plain = torch.cat([x for x, _ in collect(images, data.evaluation(SMALL))])
    still = data.training(SMALL, data.Augment(crop="none", flip=0.0))
    assert torch.equal(torch.cat([x for x, _ in collect(images, still)]), plain)
    flipped = data.training(SMALL, data.Augment(pad=0, flip=1.0))
    assert torch.equal(torch.cat([x for x, _ in collect(images, flipped)]), plain.flip(-1))
    for changed in ({"crop": "resized"}, {"jitter": 0.5}, {"erase": 1.0}, {"randaugment": "rand-m9"}, {"pad": 2}):
        augment = data.Augment(
            **{"crop": "none", "flip": 0.0, **({"crop": "pad"} if "pad" in changed else {}), **changed}
        )
        assert not torch.equal(torch.cat([x for x, _ in collect(images, data.training(SMALL, augment))]), plain), (
            changed
        )
    wide = data.Augment(crop="resized", flip=0.0, min_area=1.0)
    narrow = data.Augment(crop="resized", flip=0.0)
    views = [torch.cat([x for x, _ in collect(images, data.training(SMALL, a))]) for a in (wide, narrow)]
    assert not torch.equal(*views)
    with pytest.raises(ConfigError, match="did you mean 'flip'"):
        data.Augment(flips=0.5)
    with pytest.raises(DataError, match="randaugment='strong'"):
        data.training(SMALL, data.Augment(randaugment="strong"))


@pytest.mark.slow
def test_strong_randaugment_never_breaks_an_image(images):
    transform = data.training(SMALL, data.Augment(randaugment="rand-m10-n6-p1-mstd2-inc1"))
    assert sum(len(x) for epoch in range(4) for x, _ in collect(images, transform, epoch=epoch)) == 160


def test_grey_models_get_one_channel(images):
    grey = replace(SMALL, mean=(0.5,), std=(0.25,))
    for transform in (data.evaluation(grey), data.training(grey), data.training(grey, STREAMED)):
        assert collect(images, transform)[0][0].shape == (8, 1, 32, 32)


@settings(max_examples=12)
@given(st.integers(0, 4), st.integers(0, 2**31))
def test_crop_and_flip_move_pixels_as_padding_and_slicing_would(pad, seed):
    pixels = torch.arange(1, 2 * 3 * 5 * 6 + 1).view(2, 3, 5, 6)
    rows = np.array([7, 90])
    made = data.crop_flip(pixels, rows, seed=seed, epoch=1, pad=pad)
    padded = torch.nn.functional.pad(pixels, (pad,) * 4)
    for one, whole in zip(made, padded, strict=True):
        windows = [whole[:, y : y + 5, x : x + 6] for y in range(2 * pad + 1) for x in range(2 * pad + 1)]
        assert any(torch.equal(one, w) or torch.equal(one, w.flip(-1)) for w in windows)


def test_draws_are_spread_evenly():
    rows = np.arange(20_000)
    shares = uniform(0, 0, rows, 1)
    assert abs(shares.mean() - 0.5) < 0.01
    assert np.histogram(shares, bins=10, range=(0, 1))[0].min() > 1_850
    assert len(np.unique(mix(0, rows))) == len(rows)
    assert abs(np.corrcoef(uniform(0, 0, rows), uniform(0, 1, rows))[0, 1]) < 0.03


def test_erasing_touches_its_share_of_images_and_a_third_at_most():
    x = torch.ones(2_000, 1, 32, 32)
    gone = 1 - erase(x, np.arange(2_000), seed=0, epoch=0, share=0.25).mean(dim=(1, 2, 3))
    assert abs((gone > 0).double().mean() - 0.25) < 0.04
    assert gone.max() < 0.36
    assert gone[gone > 0].min() > 0.015


def test_generators_are_put_back_after_an_error():
    before = random.getstate()
    with pytest.raises(KeyError), seeded(1, 2):
        {}[random.random()]
    assert random.getstate() == before


def test_a_failing_transform_is_one_sentence_from_a_worker(images):
    with pytest.raises(DataError, match=r"row \d+: the transform failed \(ZeroDivisionError"):
        collect(images, _divides_by_zero, workers=2)


def _divides_by_zero(image: Image.Image) -> torch.Tensor:
    return torch.tensor(1 // 0)


def test_workers_are_suggested_for_big_work_only(images):
    assert data.suggest_workers(images, (224, 224)) == 0
    assert data.suggest_workers(data.open("sample"), (224, 224)) >= 1
    assert same(collect(images, data.evaluation(SMALL), workers=None), collect(images, data.evaluation(SMALL)))
