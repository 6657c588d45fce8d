"""Make `src/vitrim/architectures/timm.json` from the installed timm: every model that the timm source reads, as a spec.

Run from the repository's root: `python scripts/make_architectures.py`. Modules are built on the meta device, so it
takes no memory and under a minute. Of a tag (timm's name for one set of weights) only what differs is kept.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import model_entrypoint

from vitrim.architectures import DEFAULTS, expand
from vitrim.errors import SourceError
from vitrim.sources.timm import spec_of
from vitrim.spec import ConvStem, ModelSpec

TARGET = Path(__file__).parents[1] / "src" / "vitrim" / "architectures" / "timm.json"
FILES = ("vision_transformer", "deit")


def candidates() -> Iterator[str]:
    """Names, without tags, of the models in the files that hold plain Vision Transformers."""
    for name in timm.list_models():
        if model_entrypoint(name).__module__.rsplit(".", 1)[-1] in FILES:
            yield name


def built(name: str) -> ModelSpec:
    """The spec of timm's own module. Raises SourceError where the source refuses it."""
    with torch.device("meta"):
        return spec_of(timm.create_model(name))


def fields_of(spec: ModelSpec) -> dict[str, Any]:
    """The entry that stands for a spec, without defaults; whatever an entry cannot say is an assertion."""
    block = spec.blocks[0]
    attention, mlp = block.attention, block.mlp
    assert attention is not None
    assert mlp is not None
    assert isinstance(spec.stem, ConvStem)
    full = {
        "image": list(spec.image_px),
        "patch": list(spec.patch_px),
        "channels": spec.channels,
        "stem_bias": spec.stem.bias,
        "width": spec.width,
        "depth": len(spec.blocks),
        "heads": attention.heads,
        "hidden": mlp.hidden,
        "kind": mlp.kind,
        "prefix": " ".join(spec.prefix),
        "position": spec.position.kind,
        "prefix_rows": spec.position.prefix_rows,
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
    assert expand(full) == spec, "the table has no field for something in this spec"
    return {key: value for key, value in full.items() if key not in DEFAULTS or DEFAULTS[key] != value}


def entry_of(name: str) -> dict[str, Any]:
    """The table's entry of an architecture, with what its tags change."""
    base = fields_of(built(name))
    tags = {}
    for full_name in timm.list_pretrained(f"{name}.*"):
        tagged = fields_of(built(full_name))
        changed = {key: tagged.get(key, DEFAULTS.get(key)) for key in {*base, *tagged}}
        tags[full_name.partition(".")[2]] = {
            key: value for key, value in sorted(changed.items()) if value != base.get(key, DEFAULTS.get(key))
        }
    return {**base, "tags": tags}


def table() -> tuple[dict[str, Any], dict[str, str]]:
    """Entries by name, and why the rest was refused."""
    entries, refused = {}, {}
    for name in candidates():
        try:
            entries[name] = entry_of(name)
        except SourceError as error:
            refused[name] = str(error)
    return entries, refused


def main() -> None:
    entries, refused = table()
    lines = [f"{json.dumps(name)}: {json.dumps(entry, sort_keys=True)}" for name, entry in sorted(entries.items())]
    head = f'{{"schema": 1, "timm": {json.dumps(timm.__version__)}, "models": {{\n'
    TARGET.write_text(head + ",\n".join(lines) + "\n}}\n", encoding="utf-8")
    for name, why in sorted(refused.items()):
        sys.stderr.write(f"{name}: {why.partition(', which')[0]}\n")
    sys.stderr.write(
        f"{len(entries)} models, {sum(len(e['tags']) for e in entries.values())} tags, {len(refused)} refused\n"
    )


if __name__ == "__main__":
    main()
