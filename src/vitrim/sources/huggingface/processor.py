"""Settings of transformers' image processors <-> our preprocessing, where each can say the other."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

from ...spec import Preprocess

LOG = logging.getLogger("vitrim.sources")
INTERPOLATIONS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
"""Pillow's numbers, which image processors store."""
NUMBERS = {name: number for number, name in INTERPOLATIONS.items()}


NAME = "image_processor_type"
READ = (
    *("do_resize", "size", "resample", "do_center_crop", "crop_size", "crop_pct", "do_pad", "pad_size"),
    *("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std"),
)
INERT = (
    *("default_to_square", "do_convert_rgb", "do_reduce_labels", "data_format", "input_data_format", "device"),
    *("return_tensors", "disable_grouping", "image_seq_length"),
)
"""Without effect on an RGB image of the size that is asked for."""
SQUASHED_FROM = 384
"""From this side on ConvNeXt's processor resizes both sides, and crops nothing."""
PROBES = ((61, 90), (101, 74))
"""Height and width of the images on which a processor and ours are compared: wide and tall, with odd margins."""
MEAN_LEVELS, MOST_LEVELS = 1.0, 32.0
"""What they may differ by, in grey levels. Two libraries round between the two passes of a resizing; another filter, crop or
scale is far beyond on an image of noise."""


class Unsaid(Exception):
    """A setting that ours cannot say: its key, and why."""


def processor_preprocess(
    processor: Any, image_px: tuple[int, int] | None = None, channels: int = 3
) -> Preprocess | None:
    """The preprocessing of an image processor of transformers; None, with a warning that names the key, where ours cannot say it.

    What the keys say is compared with what the processor makes of two images of noise: some classes do more than their keys tell.
    """
    said = processor.to_dict()
    active = getattr(getattr(processor, "valid_kwargs", None), "__annotations__", None)
    if active is not None:  # any other key is kept by the processor and never read
        said = {key: value for key, value in said.items() if key in active or key == NAME}
        said |= {"crop_pct": None} if "crop_pct" not in active else {}
    found = preprocess_of(said, image_px, channels)
    if found is None:
        return None
    try:
        mean, most = apart(processor, found)
        fault = f"makes of a random image what is {mean:.1f} grey levels from what its keys say"
    except Exception as error:  # whatever a processor raises on an image; ours is then not known to equal it
        mean = most = math.inf
        fault = f"fails on a random image ({type(error).__name__}: {' '.join(str(error).split())[:120]})"
    if not (mean <= MEAN_LEVELS and most <= MOST_LEVELS):
        _not_taken(said, f"it {fault}")
        return None
    return found


def apart(processor: Any, preprocess: Preprocess) -> tuple[float, float]:
    """How far what a processor makes of random images is from ours, in grey levels: the mean, and the most. Inf for other shapes."""
    import torch
    from PIL import Image

    from ...data.transforms import evaluation

    ours = evaluation(preprocess)
    levels = 255 * torch.tensor(preprocess.std).view(-1, 1, 1)
    draws, mean, most = torch.Generator().manual_seed(0), 0.0, 0.0
    for height, width in PROBES:
        noise = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=draws).numpy()
        image = Image.fromarray(noise)
        image = image if len(preprocess.mean) == 3 else image.convert("L")
        theirs = torch.as_tensor(processor(image, return_tensors="pt")["pixel_values"][0])
        mine = ours(image)
        if theirs.shape != mine.shape:
            return math.inf, math.inf
        off = (theirs - mine).abs() * levels
        mean, most = max(mean, float(off.mean())), max(most, float(off.max()))
    return mean, most


def preprocess_of(
    said: Mapping[str, Any], image_px: tuple[int, int] | None = None, channels: int = 3
) -> Preprocess | None:
    """An image processor's settings (its `to_dict()`) as ours; None, with a warning that names the key, where ours cannot say them.

    image_px: the size that the model takes; None: any.  channels: that the model takes.
    """
    try:
        for key, value in said.items():
            if key not in (NAME, *READ, *INERT) and value not in (None, False):
                raise Unsaid(f"{key}={value!r} is not understood")
        if not said.get("do_resize", True):
            raise Unsaid("do_resize=False leaves images of every size")
        size, final, squash = _sizes(said)
        if said.get("do_pad") and (pad := said.get("pad_size")) and _sides(pad, "pad_size") != (final, True):
            raise Unsaid(f"pad_size={_shown(pad)} adds a border")
        resample = said.get("resample", 2)
        if resample not in INTERPOLATIONS:
            raise Unsaid(f"resample={resample!r} is no filter of Pillow's")
        mean, std = _scale(said, channels)
        crop = _share(final, size)
        if image_px is not None and final != image_px:
            raise Unsaid("it makes {} x {} px, the model takes {} x {}".format(*final, *image_px))
        odd = not squash or any((outer - inner) % 2 for inner, outer in zip(final, size, strict=True))
        return Preprocess(
            mean=mean,
            std=std,
            size_px=final,
            crop=crop,
            crop_mode="squash" if squash else "center",
            interpolation=INTERPOLATIONS[int(resample)],
            crop_rounding="down" if odd else "even",
        )
    except Unsaid as error:
        _not_taken(said, str(error))
    except (TypeError, ValueError, ArithmeticError) as error:  # a file may hold anything
        _not_taken(said, f"its settings are not valid ({error})")
    return None


def _not_taken(said: Mapping[str, Any], why: str) -> None:
    LOG.warning(
        "its image processor (%s) is not taken: %s. Give the preprocessing yourself: --mean, --std and --size, or preprocess=.",
        said.get(NAME, "of an unnamed class"),
        why,
    )


def _sizes(said: Mapping[str, Any]) -> tuple[tuple[int, int], tuple[int, int], bool]:
    """Height and width that an image is resized to, and after the crop; and whether both sides are set, whatever the shape.

    Where only the shorter side is set, it is the first of both.
    """
    size, both = _sides(said.get("size"), "size")
    cropped = bool(said.get("do_center_crop"))
    if (share := said.get("crop_pct")) is not None:  # ConvNeXt's own way
        if both or cropped:
            what = f"size={_shown(said['size'])}" if both else "do_center_crop"
            raise Unsaid(f"{what} with crop_pct; expected a shortest_edge there, and no crop besides")
        if size[0] < SQUASHED_FROM:
            outer = int(size[0] / float(share))
            return (outer, outer), size, False
        both = True
    final = size
    if cropped:
        final, whole = _sides(said.get("crop_size"), "crop_size")
        if not whole:
            raise Unsaid(f"crop_size={_shown(said.get('crop_size'))} is no height and width")
        if not both and final[0] != final[1]:
            raise Unsaid(f"crop_size={_shown(said['crop_size'])} is no square where only the shorter side is resized")
    elif not both:
        raise Unsaid(f"size={_shown(said.get('size'))} without do_center_crop gives images of any shape")
    return size, final, both


def _sides(size: Any, key: str) -> tuple[tuple[int, int], bool]:
    """Height and width, and whether both are set (else the shorter side is, and the shape stays)."""
    if isinstance(size, int):
        return (size, size), True
    said = {name: value for name, value in dict(size or {}).items() if value is not None}
    if set(said) == {"height", "width"}:
        return (int(said["height"]), int(said["width"])), True
    if set(said) == {"shortest_edge"}:
        return (int(said["shortest_edge"]),) * 2, False
    raise Unsaid(f"{key}={_shown(size)}; expected height and width, or shortest_edge")


def _shown(size: Any) -> Any:
    return size if size is None or isinstance(size, int | tuple | list) else dict(size)


def _share(final: tuple[int, int], size: tuple[int, int]) -> float:
    """The one crop of both sides."""
    shares = [share_of(inner, outer) for inner, outer in zip(final, size, strict=True)]
    for share in shares:
        if share <= 1 and all(math.floor(inner / share) == outer for inner, outer in zip(final, size, strict=True)):
            return share
    beyond = "is beyond the image" if max(shares) > 1 else "is another share of the height than of the width"
    raise Unsaid(f"crop_size={final} of {size} {beyond}")


def _scale(said: Mapping[str, Any], channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation for pixels in [0, 1], into which whatever else scales them is folded."""
    factor = said.get("rescale_factor")
    factor = 1.0 if not said.get("do_rescale", True) else 1 / 255 if factor is None else float(factor)
    if not (factor > 0 and math.isfinite(factor)):
        raise Unsaid(f"rescale_factor={factor!r}")
    mean: Any = 0.0
    std: Any = 1.0
    if said.get("do_normalize", True):
        mean, std = said.get("image_mean"), said.get("image_std")
    both = []
    for key, values in (("image_mean", mean), ("image_std", std)):
        listed = [values] if isinstance(values, int | float) else list(values or ())
        listed = listed * channels if len(listed) == 1 else listed
        if len(listed) != channels:
            raise Unsaid(f"{key}={values!r} for {channels} channels")
        # at the usual factor the published figures stay as they are, to the last bit
        both.append(tuple(float(v) if factor == 1 / 255 else float(v) / (255 * factor) for v in listed))
    if min(both[1]) <= 0:
        raise Unsaid(f"image_std={std!r}")
    return both[0], both[1]


def share_of(inner: int, outer: int) -> float:
    """The crop from which `floor(inner / crop)` gives exactly `outer`, as the transforms take it."""
    share = inner / outer
    return share if share > 1 or math.floor(inner / share) == outer else inner / (outer + 0.5)


def unsaid_by_processors(preprocess: Preprocess) -> str:
    """What of a preprocessing no image processor does, for a sentence; "" where one does all of it."""
    if preprocess.crop_mode == "border":
        return "a border around the image (crop_mode='border')"
    height, width = preprocess.size_px
    if preprocess.crop_mode == "center" and height != width:
        return f"images of {height} x {width} px by a crop that keeps their proportions (crop_mode='center')"
    return ""


def processor_of(preprocess: Preprocess) -> dict[str, Any]:
    """An image processor's settings, where one can say them (`unsaid_by_processors`)."""
    height, width = preprocess.size_px
    before = {"height": math.floor(height / preprocess.crop), "width": math.floor(width / preprocess.crop)}
    squash = preprocess.crop_mode == "squash"
    cropped = not squash or preprocess.crop < 1
    if not squash and preprocess.crop_rounding != "down":
        LOG.info("transformers starts a crop at the half rounded down: it can lie one pixel before the model's own.")
    family = "CLIP" if not squash else "DeiT" if cropped else "ViT"
    return {
        "image_processor_type": f"{family}ImageProcessor",
        "do_resize": True,
        "size": before if squash else {"shortest_edge": min(before.values())},
        "resample": NUMBERS.get(preprocess.interpolation, NUMBERS["bicubic"]),
        "do_center_crop": cropped,
        **({"crop_size": {"height": height, "width": width}} if cropped else {}),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocess.mean),
        "image_std": list(preprocess.std),
    }
