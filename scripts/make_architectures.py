"""Make `src/vitrim/architectures/FAMILY.json`: every named model that a family's source reads, as a spec.

Run from the repository's root: `python scripts/make_architectures.py [FAMILY ...]`. timm's and torchvision's modules are
built on the meta device, so it takes no memory and about a minute; T2T-ViT's names are vitrim's own. Of a tag (a family's
name for one set of weights) only what differs is kept.
"""

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from timm.models import model_entrypoint

from vitrim.architectures import DEFAULTS, FAMILIES, expand, t2t
from vitrim.errors import SourceError
from vitrim.sources import timm as timm_source
from vitrim.sources import torchvision as torchvision_source
from vitrim.spec import ConvStem, ModelSpec, T2TPerformer

TARGET = Path(__file__).parents[1] / "src" / "vitrim" / "architectures"
FILES = ("vision_transformer", "deit")


@dataclass(frozen=True)
class Family:
    """Where the models of one family come from.

    candidates: names without tags.  tags: of a name.  built: the spec of a name with or without a tag; raises SourceError
    where the source refuses it.
    """

    version: str
    candidates: Callable[[], Iterator[str]]
    tags: Callable[[str], list[str]]
    built: Callable[[str], ModelSpec]


def timm_candidates() -> Iterator[str]:
    """Names, without tags, of the models in the files that hold plain Vision Transformers."""
    for name in timm.list_models():
        if model_entrypoint(name).__module__.rsplit(".", 1)[-1] in FILES:
            yield name


def timm_tags(name: str) -> list[str]:
    return [full.partition(".")[2] for full in timm.list_pretrained(f"{name}.*")]


def timm_built(name: str) -> ModelSpec:
    with torch.device("meta"):
        return timm_source.spec_of(timm.create_model(name))


def torchvision_tags(name: str) -> list[str]:
    return [member.name for member in torchvision_source.weights_named(name)]


def torchvision_built(name: str) -> ModelSpec:
    with torch.device("meta"):
        return torchvision_source.spec_of(torchvision_source.module_named(name))


MAKERS = {
    "timm": Family(timm.__version__, timm_candidates, timm_tags, timm_built),
    "torchvision": Family(
        torchvision.__version__.partition("+")[0],
        lambda: iter(torchvision_source.names()),
        torchvision_tags,
        torchvision_built,
    ),
    "t2t": Family("", lambda: iter(t2t.names()), lambda _: [], t2t.spec),
}
assert tuple(MAKERS) == FAMILIES


def fields_of(spec: ModelSpec) -> dict[str, Any]:
    """The entry that stands for a spec, without defaults; whatever an entry cannot say is an assertion."""
    block = spec.blocks[0]
    attention, mlp, stem = block.attention, block.mlp, spec.stem
    assert attention is not None
    assert mlp is not None
    full = {
        "image": list(spec.image_px),
        "patch": list(spec.patch_px),
        "channels": spec.channels,
        "stem": "conv" if isinstance(stem, ConvStem) else "t2t_transformer",
        "width": spec.width,
        "depth": len(spec.blocks),
        "heads": attention.heads,
        "hidden": mlp.hidden,
        "kind": mlp.kind,
        "prefix": " ".join(spec.prefix),
        "position": spec.position.kind,
        "prefix_rows": spec.position.prefix_rows,
        "resize": spec.position.resize,
        "pre_norm": spec.pre_norm,
        "final_norm": spec.final_norm,
        "pool_norm": spec.pool_norm,
        "eps": spec.norm_eps,
        "qkv_bias": attention.q_bias,
        "proj_bias": attention.out_bias,
        "qk_norm": attention.qk_norm,
        "layer_scale": attention.layer_scale,
        "pool": spec.pool.kind,
        "classes": spec.classes or 0,
    }
    if isinstance(stem, ConvStem):
        full["stem_bias"] = stem.bias
    else:
        full["token_dim"] = stem.token_dim
    if isinstance(stem, T2TPerformer):
        full.update(stem="t2t_performer", features=stem.features)
    assert expand(full) == spec, "the table has no field for something in this spec"
    return {key: value for key, value in full.items() if key not in DEFAULTS or DEFAULTS[key] != value}


def entry_of(name: str, family: str = "timm") -> dict[str, Any]:
    """The table's entry of an architecture, with what its tags change."""
    maker = MAKERS[family]
    base = fields_of(maker.built(name))
    tags = {}
    for tag in maker.tags(name):
        tagged = fields_of(maker.built(f"{name}.{tag}"))
        changed = {key: tagged.get(key, DEFAULTS.get(key)) for key in {*base, *tagged}}
        tags[tag] = {key: value for key, value in sorted(changed.items()) if value != base.get(key, DEFAULTS.get(key))}
    return {**base, "tags": tags}


def table(family: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Entries by name, and why the rest was refused."""
    entries, refused = {}, {}
    for name in MAKERS[family].candidates():
        try:
            entries[name] = entry_of(name, family)
        except SourceError as error:
            refused[name] = str(error)
    return entries, refused


def text_of(family: str, entries: dict[str, Any]) -> str:
    """The file: one line for each model."""
    lines = [f"{json.dumps(name)}: {json.dumps(entry, sort_keys=True)}" for name, entry in sorted(entries.items())]
    version = MAKERS[family].version
    made = f"{json.dumps(family)}: {json.dumps(version)}, " if version else ""
    return f'{{"schema": 1, {made}"models": {{\n' + ",\n".join(lines) + "\n}}\n"


def main(families: tuple[str, ...]) -> None:
    for family in families or FAMILIES:
        entries, refused = table(family)
        (TARGET / f"{family}.json").write_text(text_of(family, entries), encoding="utf-8")
        for name, why in sorted(refused.items()):
            sys.stderr.write(f"{name}: {why.partition(', which')[0]}\n")
        tags = sum(len(entry["tags"]) for entry in entries.values())
        sys.stderr.write(f"{family}: {len(entries)} models, {tags} tags, {len(refused)} refused\n")


if __name__ == "__main__":
    main(tuple(sys.argv[1:]))
