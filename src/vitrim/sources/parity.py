"""Whether our model computes what the module that it came from computes: both on one random image."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import SourceError
from ..model import Vit

Answer = Callable[[Any, Tensor], Any]
"""What a module says of images: logits, or features of an encoder."""


@torch.no_grad()
def verify(
    module: nn.Module,
    model: Vit,
    *,
    blocks: Callable[[Any], Sequence[nn.Module]],
    what: str,
    advice: str,
    answer: Answer = lambda module, x: module(x),
    tolerance: float = 1e-4,
) -> None:
    """Compare both on one random image in float32; a difference is named by the first block that shows it.

    blocks: the module's blocks, whose outputs (or the first of a tuple) are streams [B, N, D].
    what: the class that `module` should compute as, for the message.  The module's flags are put back.
    Raises SourceError.
    """
    spec = model.spec
    x = torch.randn(1, spec.channels, *spec.image_px, generator=torch.Generator().manual_seed(0))
    with _evaluated(module) as (theirs, device):
        expected = _answer(theirs, x.to(device), answer, advice)
        if close(model(x), expected, tolerance):
            return
        streams: list[Tensor] = []
        parts = list(blocks(theirs))
        hooks = [part.register_forward_hook(lambda _m, _i, out: streams.append(_stream(out))) for part in parts]
        if parts:
            hooks.append(
                parts[0].register_forward_pre_hook(
                    lambda _m, args, kwargs: streams.append(_stream((*args, *kwargs.values()))), with_kwargs=True
                )
            )
        try:
            answer(theirs, x.to(device))
        finally:
            for hook in hooks:
                hook.remove()
    ours = model(x, want=tuple(f"block:{i}" for i in range(len(spec.blocks))))
    named = [
        ("the embedding", model.embed(x).x),
        *((f"block {i}", ours[f"block:{i}"]) for i in range(len(spec.blocks))),
    ]
    place = next(
        (name for (name, own), their in zip(named, streams, strict=False) if not close(own, their, tolerance)),
        "what follows the blocks (norm, pooling, classifier)"
        if len(named) == len(streams)
        else "how it runs its blocks",
    )
    raise SourceError(
        f"{type(module).__name__} computes something else than {what}: outputs differ, first in {place}. "
        f"Its forward was changed, and the spec cannot say how. {advice}"
    )


def close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    """Equal up to a share of the largest value (or of 1)."""
    return a.shape == b.shape and bool((a - b).abs().max() <= tolerance * max(1.0, float(b.abs().max())))


def _stream(out: Any) -> Tensor:
    return (out[0] if isinstance(out, tuple) else out).cpu()


@contextmanager
def _evaluated(module: nn.Module) -> Iterator[tuple[Any, torch.device]]:
    """The module in eval mode and float32 (a copy if it is in another precision); its flags are put back."""
    tensors = list(module.state_dict().values())
    if any(t.is_floating_point() and t.dtype != torch.float32 for t in tensors):
        module = copy.deepcopy(module).float()
    flags = {part: part.training for part in module.modules()}
    try:
        module.eval()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of gradient checkpointing without gradients
            yield module, tensors[0].device
    finally:
        for part, flag in flags.items():
            part.training = flag


def _answer(module: nn.Module, x: Tensor, answer: Answer, advice: str) -> Tensor:
    """The module's output, finite, on the CPU. Raises SourceError where it gives none."""
    name = type(module).__name__
    try:
        found = answer(module, x)
    except (AssertionError, AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise SourceError(
            f"{name} cannot be run on an image of shape {tuple(x.shape)} ({type(error).__name__}: {error}). Mend its forward, or "
            "pass verify=False to trust its parts."
        ) from error
    if not isinstance(found, Tensor):
        raise SourceError(
            f"{name} gives a {type(found).__name__} instead of one tensor, which vitrim cannot take in. {advice}"
        )
    if not found.isfinite().all():
        raise SourceError(f"{name} gives NaN or infinity on a random image: its weights are damaged. Load them again.")
    return found.cpu()
