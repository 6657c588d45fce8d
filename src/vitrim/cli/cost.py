"""`vitrim cost`: what a model costs, without its weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from vitrim.cli import options, tables
from vitrim.errors import ArtifactError
from vitrim.files import whose_folder
from vitrim.foreign import read_json

if TYPE_CHECKING:
    from vitrim.spec import ModelSpec

TABLES = ("timm", "torchvision", "t2t")
"""Families whose named models stand in tables, so that nothing else is imported for them."""
BUILT_IN = Path(__file__).parents[1] / "assets" / "models"


@click.command()
@click.argument("model")
@click.option(
    "--against", metavar="MODEL", help="Give shares of this model's cost; by default of what MODEL was cut from."
)
@options.IMAGE_PX
@options.OUTPUT
def cost(model: str, against: str | None, image_px: tuple[int, int] | None, output: options.Output) -> None:
    """Count MODEL's operations and parameters, per block.

    Needs no weights: vitrim cost timm:deit_small_patch16_224
    """
    spec = spec_named(model, image_px)
    from vitrim import counting

    counted = counting.cost(spec)
    origin = original_of(model) if against is None else (against, spec_named(against))
    dense = None if origin is None else (origin[0], counting.cost(sized(origin[1], image_px)))
    if output.as_json:
        values = {"model": model, "image_px": spec.image_px, **counted.to_dict()}
        if dense is not None:
            values["against"] = {"model": dense[0], "macs": dense[1].macs, "params": dense[1].params}
        tables.show_json(values)
    else:
        tables.show_cost(model, spec, counted, against=dense)


def spec_named(name: str, image_px: tuple[int, int] | None = None) -> ModelSpec:
    """The spec of a model by name or folder, at the size asked for or its own.

    torch is imported only where no table and no file says it.
    """
    return sized(_spec_named(name), image_px)


def sized(spec: ModelSpec, image_px: tuple[int, int] | None) -> ModelSpec:
    """The spec at another image size; None: its own."""
    if image_px is None:
        return spec
    from vitrim.spec import at_size

    return at_size(spec, image_px)


def _spec_named(name: str) -> ModelSpec:
    family, _, rest = name.partition(":")
    if family in TABLES:
        from vitrim import architectures

        known = architectures.spec(rest, family=family)
        if known is not None:
            return known
    if family == "hf":
        from vitrim.sources import describe

        return describe(rest)
    files = (path for path in BUILT_IN.glob("*/config.json") if path.parent.name == rest)
    file = next(files, None) if family == "builtin" else Path(name) / "config.json"
    if file is not None and file.is_file():
        return spec_in(file)
    from vitrim.sources import load

    return load(name, pretrained=False).spec


def original_of(name: str) -> tuple[str, ModelSpec] | None:
    """What the model in a folder was first cut from, by its name; None where there is no such folder, or it was never cut."""
    file = Path(name) / "provenance.json"
    if not file.is_file():
        return None
    expected = "Expected that of a folder that vitrim saved."
    original = read_json(file, error=ArtifactError, named=repr(str(file)), mend=expected).get("original")
    if not isinstance(original, dict) or "spec" not in original:
        return None
    from vitrim.spec import ModelSpec

    return f"{original.get('source', 'the original')}, which it was first cut from", ModelSpec.from_dict(
        original["spec"]
    )


def spec_in(file: Path) -> ModelSpec:
    """The spec in an artifact's config.json."""
    expected = "Expected the config.json of a folder that vitrim saved."
    values = read_json(file, error=ArtifactError, named=repr(str(file)), mend=expected)
    if "spec" not in values:
        raise ArtifactError(f"{str(file.parent)!r} {whose_folder(values, file.parent)}")
    from vitrim.spec import Config

    return Config.from_dict(values).spec
