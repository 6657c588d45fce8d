"""From an RGB image to the model's input: the model's own evaluation view, and augmented views for training."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vitrim.config import Augment
from vitrim.errors import DataError
from vitrim.model import Vit
from vitrim.spec import Preprocess

MOST_PX = 2**27
"""Pixels that a picture may have on its way: of a strip one pixel high, the shorter side is resized all the same."""
PAD_CROP_PX = 64
"""Up to this side, crop="auto" shifts within a padded image; above, it takes a random resized crop."""


UNPREPARED = (
    "the model does not say how its images are prepared; give what it was trained with: --mean, --std and --size "
    "(vitrim.data.prepare in Python), such as --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225 for ImageNet's."
)
"""For whoever needs a model's preprocessing and finds none: it is never guessed."""
log = logging.getLogger("vitrim.data")


def prepare(
    model: Vit, *, mean: Sequence[float] | None = None, std: Sequence[float] | None = None, size: int | None = None
) -> Vit:
    """Say how a model's images are prepared, in its config, in place of what that says; gives the model.

    mean, std: of pixels in [0, 1], one for each channel or one for all; None keeps the model's own, if it has any.  size: the
    shorter side in pixels before the middle is cropped to the model's own size; None keeps what was, or crops nothing.
    DataError for one of mean and std without the other, numbers that do not fit, and a size below the model's.
    """
    own, spec = model.config.preprocess, model.spec
    if (mean is None) != (std is None):
        raise DataError("one of --mean and --std (mean=, std=) without the other; give both, or neither.")
    if mean is None or std is None:
        if own is None:
            raise DataError(UNPREPARED)
        if size is None:
            return model
        mean, std = own.mean, own.std
    mean, std = (tuple(map(float, (*values,) * (spec.channels if len(values) == 1 else 1))) for values in (mean, std))
    if len(mean) != spec.channels or len(std) != spec.channels:
        raise DataError(
            f"mean={mean!r} and std={std!r} for a model of {spec.channels} channels; expected one for each."
        )
    if not all(0 <= value <= 1 for value in mean) or not all(0 < value <= 1 for value in std):
        raise DataError(
            f"mean={mean!r} and std={std!r}; expected numbers of pixels in [0, 1], std above 0. Divide those of 0 to 255 by 255."
        )
    base = own or Preprocess(mean=mean, std=std, size_px=spec.image_px)
    told = replace(base, mean=mean, std=std, size_px=spec.image_px)
    if size is not None:
        side = min(spec.image_px)
        if size < side:
            raise DataError(f"size={size} below the {side} px of the model; expected the shorter side before the crop.")
        told = replace(told, crop=side / size if math.floor(side / (side / size)) == size else side / (size + 0.5))
    if told != own:
        log.info(
            "preprocessing as given: mean %s, std %s, %s x %s px, crop %.3g.",
            told.mean,
            told.std,
            *told.size_px,
            told.crop,
        )
    model.config = replace(model.config, preprocess=told)
    return model


class View:
    """RGB image -> uint8 [C,h,w]: resized and cropped as `preprocess` says, not yet normalised."""

    def __init__(self, preprocess: Preprocess, *, crop: float | None = None) -> None:
        """crop: in place of preprocess.crop."""
        from timm.data.transforms_factory import transforms_imagenet_eval
        from torchvision.transforms import CenterCrop

        share = preprocess.crop if crop is None else crop
        if len(preprocess.mean) not in (1, 3):
            raise DataError(f"a model of {len(preprocess.mean)} channels; images are read in colour (3) or grey (1).")
        self.grey = len(preprocess.mean) == 1
        self.key = (
            preprocess.size_px,
            share,
            preprocess.crop_mode,
            preprocess.interpolation,
            preprocess.mean,
            preprocess.crop_rounding,
        )
        center = preprocess.crop_mode == "center"
        self._outer_px = math.floor(max(preprocess.size_px) / share) if center else None  # else no side grows beyond it
        try:
            resize: Any = transforms_imagenet_eval(
                img_size=preprocess.size_px,
                crop_pct=share,
                crop_mode=preprocess.crop_mode,
                interpolation=preprocess.interpolation,
                mean=preprocess.mean,
                std=preprocess.std,
                normalize=False,
            )
        except KeyError as error:
            raise DataError(
                f"preprocess: interpolation={preprocess.interpolation!r}; expected bicubic, bilinear, lanczos, nearest, box or hamming."
            ) from error
        down = preprocess.crop_rounding == "down"
        self._steps = [
            _CropDown(preprocess.size_px) if down and isinstance(step, CenterCrop) else step
            for step in resize.transforms
        ]

    def __call__(self, image: Image.Image) -> Tensor:
        short, long = sorted(image.size)
        if self._outer_px is not None and self._outer_px**2 * long > MOST_PX * short:
            raise DataError(
                f"a picture of {image.width} x {image.height} px is too long and narrow to be resized to {self._outer_px} px across. "
                "Crop or remove it, or go on without it: --on-broken skip (on_broken='skip')."
            )
        view: Any = image.convert("L") if self.grey else image
        for step in self._steps:
            view = step(view)
        pixels: Tensor = view
        return pixels


class _CropDown:
    """The middle of an image that is no smaller; of an odd margin the smaller half comes first."""

    def __init__(self, size_px: tuple[int, int]) -> None:
        self.height, self.width = size_px

    def __call__(self, image: Image.Image) -> Image.Image:
        left, top = (image.width - self.width) // 2, (image.height - self.height) // 2
        return image.crop((left, top, left + self.width, top + self.height))


def normalise(pixels: Tensor, preprocess: Preprocess) -> Tensor:
    """uint8 [..., C, h, w] -> float32 of the same shape and device."""
    mean = torch.tensor(preprocess.mean, device=pixels.device).view(-1, 1, 1)
    std = torch.tensor(preprocess.std, device=pixels.device).view(-1, 1, 1)
    return pixels.to(torch.float32).div_(255.0).sub_(mean).div_(std)


class Evaluation:
    """RGB image -> float32 [C,h,w]: the model's own view of an image, equal to timm's evaluation transform."""

    def __init__(self, preprocess: Preprocess) -> None:
        self.preprocess = preprocess
        self.view = View(preprocess)

    def __call__(self, image: Image.Image) -> Tensor:
        return normalise(self.view(image), self.preprocess)


class Training:
    """RGB image -> float32 [C,h,w]: an augmented view, drawn from the global generators.

    augment: None means the defaults of `Augment`.  `batched` says that the draws are a shifted crop, a flip and an erasure at most, which `vitrim.data.pixels` makes for a
    whole batch at once.
    """

    def __init__(self, preprocess: Preprocess, augment: Augment | None = None) -> None:
        augment = augment or Augment()
        self.preprocess, self.augment = preprocess, augment
        side = max(preprocess.size_px)
        self.crop = augment.crop if augment.crop != "auto" else ("pad" if side <= PAD_CROP_PX else "resized")
        self.view = View(preprocess, crop=1.0)
        self.batched = self.crop in ("pad", "none") and augment.randaugment is None and augment.jitter == 0
        self._steps = self._image_steps()
        self._erase = self._erasing() if augment.erase else None

    def __call__(self, image: Image.Image) -> Tensor:
        if self.view.grey:
            image = image.convert("L")
        x = normalise(self._steps(image), self.preprocess)
        return x if self._erase is None else self._erase(x)

    def _image_steps(self) -> Any:
        from timm.data.transforms import str_to_interp_mode
        from torchvision import transforms

        augment, size = self.augment, self.preprocess.size_px
        interpolation = str_to_interp_mode(self.preprocess.interpolation)
        steps: list[Any] = []
        if self.crop == "resized":
            scale = (augment.min_area, 1.0)
            steps.append(transforms.RandomResizedCrop(size, scale=scale, interpolation=interpolation))
        else:
            steps += [self.view, transforms.ToPILImage()]
        if self.crop == "pad" and augment.pad:
            steps.append(transforms.RandomCrop(size, padding=augment.pad))
        if augment.flip:
            steps.append(transforms.RandomHorizontalFlip(augment.flip))
        if augment.randaugment is not None:
            steps.append(self._randaugment(augment.randaugment))
        if augment.jitter:
            steps.append(transforms.ColorJitter(augment.jitter, augment.jitter, augment.jitter))
        return transforms.Compose([*steps, transforms.PILToTensor()])

    def _randaugment(self, description: str) -> Any:
        from timm.data.auto_augment import rand_augment_transform

        fill = tuple(round(255 * value) for value in self.preprocess.mean)
        settings = {
            "translate_const": int(min(self.preprocess.size_px) * 0.45),
            "img_mean": fill if len(fill) > 1 else fill[0],
        }
        try:
            made = rand_augment_transform(description, settings)
        except (AssertionError, ValueError, KeyError, IndexError) as error:
            raise DataError(
                f"randaugment={description!r} is not understood by timm; expected such as 'rand-m9-mstd0.5-inc1'."
            ) from error
        for operation in made.ops:
            if operation.name.startswith("Posterize"):
                operation.level_fn = partial(_at_least_one_bit, operation.level_fn)
        return made

    def _erasing(self) -> Any:
        from timm.data.random_erasing import RandomErasing

        return RandomErasing(self.augment.erase, mode="const", device="cpu")  # 0 after normalising is the mean colour


def _at_least_one_bit(level: Callable[[float, Any], tuple[int]], magnitude: float, settings: Any) -> tuple[int]:
    """timm's strongest posterising keeps no bit of a colour, which newer versions of Pillow refuse."""
    return (max(1, level(magnitude, settings)[0]),)


evaluation, training = Evaluation, Training
