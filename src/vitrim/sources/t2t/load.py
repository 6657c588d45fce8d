"""T2T-ViT: a module with its authors' structure, or a file of their tensors -> spec and weights.

Source   Yuan et al., ICCV 2021, arXiv:2101.11986; names and layout of the authors' released networks.
Takes    a published name with a local file (`.pth.tar`) or random weights, or a module from memory.
Refuses  the convolutional tokeniser, squeeze-and-excitation, dense and ghost variants, half-block gates of UVC's copy that
         say skip.

Their code is no package, so a module is known by its parts, and by running both networks on a random image.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import nn

from ...architectures import t2t as names
from ...errors import SourceError
from ...model import Vit, build
from ...spec import BlockSpec, Config, ModelSpec, Preprocess
from .. import files, parity
from ..places import Told, filled, taken
from .read import ADVICE, places_of, plain, position_of, shapes_of, skipped_blocks, spec_of, weights_of

CROP = 0.9
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def load(
    name: str,
    *,
    pretrained: bool = True,
    checkpoint: str | Path | None = None,
    checkpoint_key: str | None = None,
    classes: int | None = None,
    verify: bool = True,
    image_px: tuple[int, int] | None = None,
) -> Vit:
    """A published T2T-ViT by its builder's name (`t2t_vit_14`).

    pretrained: their weights are on no hub that vitrim reads, so give the downloaded file; False: random ones.
    checkpoint: such a file, of any square image size (so `image_px` changes nothing) and with a classifier of any size, or of
    UVC's copy of the network.
    verify: a file is held against the names and shapes of the network; there is no module of theirs to run beside it.
    """
    base = names.spec(name)
    if checkpoint is not None:
        return _from_file(name, base, Path(checkpoint), classes, checkpoint_key)
    if pretrained:
        raise SourceError(
            f"the weights of {name!r} cannot be fetched: they are published as files of their authors' repository alone. Pass "
            "a downloaded file (--checkpoint PATH, checkpoint=), or take random weights (--no-pretrained, pretrained=False)."
        )
    spec = base if classes is None else names.spec(name, classes=classes)
    model = build(
        Config(spec=spec, task="classification" if spec.outputs else "features", preprocess=_preprocess(spec))
    )
    model.provenance = {"source": f"t2t:{name}", "weights": "random"}
    return model


def from_module(module: nn.Module, *, verify: bool = True, **told: Unpack[Told]) -> Vit:
    """Our model with a copy of a T2T-ViT module's numbers; the module and the random state stay as they are.

    preprocess: None takes ImageNet's at the module's size, as the authors evaluate.
    """
    spec = spec_of(module)
    told["preprocess"] = told.get("preprocess") or _preprocess(spec)
    model = filled(spec, weights_of(module, spec), **told)
    if verify:
        parity.verify(module, model, blocks=lambda theirs: theirs.blocks, what="T2T-ViT", advice=ADVICE, answer=_first)
    return model


# ---------------------------------------------------------------------------------------------------------------- files


def _from_file(name: str, base: ModelSpec, path: Path, classes: int | None, key: str | None) -> Vit:
    known = {name: torch.empty(shape, device="meta") for name, shape in shapes_of(base).items()}
    raw = files.weights(path, known, key=key)
    skipped = skipped_blocks(raw, len(base.blocks), path.name)
    state = plain(raw, skipped)
    state, found = files.with_classifier(state, "head.weight", classes, file=path.name)
    table = state.get("pos_embed")
    rows = table.shape[1] if table is not None and table.dim() == 3 else base.position_rows
    try:
        spec = names.resized(base, rows, found)
    except SourceError as error:
        raise SourceError(f"{path.name}: {error}") from None
    gone = BlockSpec(attention=None, mlp=None)
    spec = replace(spec, blocks=tuple(gone if i in skipped else block for i, block in enumerate(spec.blocks)))
    files.check(path, state, shapes_of(spec), f"{name!r}")
    spec = replace(spec, position=position_of(state["pos_embed"][0], spec.grid[0]))
    told = {"source": f"t2t:{name}", "weights": path.name}
    if skipped:
        told["skipped_blocks"] = ", ".join(str(i) for i in sorted(skipped))
    weights = taken(state, places_of(spec), spec.width)
    return filled(spec, weights, preprocess=_preprocess(spec), labels=None, provenance=told)


def _preprocess(spec: ModelSpec) -> Preprocess | None:
    """ImageNet's at the network's size, as the authors evaluate; None for other channels."""
    return Preprocess(mean=MEAN, std=STD, size_px=spec.image_px, crop=CROP) if spec.channels == len(MEAN) else None


def _first(module: Any, x: torch.Tensor) -> Any:
    """A module's answer; UVC's copy gives its operations beside the logits."""
    found = module(x)
    return found[0] if isinstance(found, tuple) else found
