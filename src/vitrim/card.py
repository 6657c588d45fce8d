"""The model card: what the Hub shows of an artifact. Text from the spec and the provenance; no torch."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from .counting import cost
from .spec import Config, Selection

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_PERCENT = ("top1", "top5", "agreement", "knn", "knn_agreement", "accuracy")
_SCALED = {"macs": ("GMACs", 1e9), "params": ("parameters (M)", 1e6), "file_bytes": ("file (MB)", 1e6)}


def card(config: Config, selection: Selection, provenance: Mapping[str, Any]) -> str:
    """README.md of a model.

    provenance: `source` names the base model, `metrics` may hold `before` and `after`, `license` the licence of the
    weights. Without `license` the card says that the base model's holds: a compression gives no new rights.
    """
    base = str(provenance.get("source") or "A Vision Transformer").replace("\n", " ")
    title = f"# {base}, compressed" if selection.steps else f"# {base}"
    return "\n".join(
        [*_front_matter(config, selection, provenance), "", title, "", *_body(config, selection, provenance)]
    )


def base_model(provenance: Mapping[str, Any]) -> str | None:
    """The Hub's name of the published model that these weights come from; None where there is none to name.

    A source that only gave the architecture (random weights, a checkpoint of one's own) is no base model.
    """
    named = provenance.get("base_model")
    if isinstance(named, str) and _HUB_NAME.fullmatch(named):
        return named
    kind, _, name = str(provenance.get("source") or "").partition(":")
    if provenance.get("weights", "pretrained") != "pretrained":
        return None
    if kind == "timm" and re.fullmatch(r"[\w.-]+", name):
        return f"timm/{name}"
    if kind in ("hf-hub", "hub") and _HUB_NAME.fullmatch(name):
        return name
    return None


TRAINED = {"train": "trained", "recover": "recovered"}
"""What a provenance names as its method and cuts nothing."""


PRODUCTS = {
    "tokens": "all its tokens behind the final norm, as many as the dense model gives",
    "output": "what `model(images)` gives",
}
"""What a provenance names as its product."""


def _front_matter(config: Config, selection: Selection, provenance: Mapping[str, Any]) -> Iterator[str]:
    """YAML, each value in JSON's spelling, which YAML reads alike."""
    methods = list(dict.fromkeys(step.method for step in selection.steps))
    task = "image-classification" if config.spec.outputs else "image-feature-extraction"
    licence = provenance.get("license")
    if licence is None and str(provenance.get("source", "")).startswith("builtin:"):
        licence = "apache-2.0"
    yield "---"
    yield "library_name: vitrim"
    if (base := base_model(provenance)) is not None:
        yield f"base_model: {json.dumps(base)}"
    if licence is None:
        yield "license: other"
        yield "license_name: that-of-the-base-model"
    else:
        yield f"license: {json.dumps(str(licence).lower())}"
    yield f"pipeline_tag: {task}"
    yield "tags:"
    for tag in dict.fromkeys(("vitrim", "vision-transformer", "model-compression", *methods)):
        yield f"- {json.dumps(tag)}"
    yield "---"


def _body(config: Config, selection: Selection, provenance: Mapping[str, Any]) -> Iterator[str]:
    total = cost(config.spec)
    height, width = config.spec.image_px
    yield (
        f"A Vision Transformer of {total.macs / 1e9:.3f} GMACs (the papers' FLOPs) and {total.params / 1e6:.2f} M "
        f"parameters for images of {height} x {width} px, saved by [vitrim](https://pypi.org/project/vitrim/)."
    )
    yield ""
    if method := provenance.get("method"):
        variant = f" (variant `{provenance['variant']}`)" if provenance.get("variant") else ""
        cut = ", ".join(dict.fromkeys(f"`{step.method}`" for step in selection.steps))
        trained = TRAINED.get(method) if isinstance(method, str) else None
        if trained and not cut:
            yield f"{trained.capitalize()} by vitrim{variant}."
        else:
            by = f"{cut}, then {trained}" if trained else f"`{method}`"
            yield f"Compressed by {by}{variant}. `selection.json` says which units of the dense network survived."
        yield ""
    if (product := provenance.get("product")) in PRODUCTS:
        yield f"It is for {PRODUCTS[product]}; what else it gives may be lost."
        yield ""
    rows = list(_rows(provenance.get("metrics"), total.macs, total.params))
    if rows:
        yield "| | before | after |"
        yield "| --- | ---: | ---: |"
        yield from rows
        yield ""
    yield "## How to load it"
    yield ""
    yield "```python"
    yield "import vitrim"
    yield 'model = vitrim.load("FOLDER")  # this folder, or "hub:USER/NAME" from the Hub'
    yield f"logits = model(images)  # B {config.spec.channels} {height} {width} -> B {config.spec.classes or 'D'}"
    yield "```"
    yield ""
    if config.preprocess is not None:
        p = config.preprocess
        yield f"Images are scaled to [0, 1], then normalised with mean {list(p.mean)} and deviation {list(p.std)}."
        yield ""


def _rows(metrics: Any, macs: int, params: int) -> Iterator[str]:
    """One row for each number that was taken before and after; what the spec counts is counted, not copied."""
    if not isinstance(metrics, Mapping):
        return
    before, after = ({**(metrics.get(key) or {})} for key in ("before", "after"))
    if not before and not after:
        return
    after |= {"macs": macs, "params": params}
    for key in dict.fromkeys((*before, *after)):
        cells = [_cell(key, side.get(key)) for side in (before, after)]
        if any(cells):
            yield f"| {_SCALED[key][0] if key in _SCALED else key} | {cells[0]} | {cells[1]} |"


def _cell(key: str, value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return ""
    if key in _PERCENT:
        return f"{100 * value:.2f} %"
    if key in _SCALED:
        return f"{value / _SCALED[key][1]:.3f}"
    return f"{value}" if isinstance(value, int) else f"{value:.4g}"
