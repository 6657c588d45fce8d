"""The report: one self-contained HTML page about one run, for people who would rather look than read.

`write` takes a result, or a folder that a run left. A result is a dictionary of plain JSON values:

    schema    1
    name      of the run's folder
    model     what was compressed, as the user named it, without a path
    method    {name, variant}
    data      {name, split, count}
    budget    {limit: value}, as given
    product   {name, words}: what the network is for, and what else may be lost; absent from results of before it was there
    specs     {dense, compressed}: `ModelSpec.to_dict()`
    costs     {dense, compressed}: `Cost.to_dict()`
    original  {model, kept_macs, kept_params}: what is left of the network that the dense one was itself cut from; None where it was
              not, absent from results of before it was there
    file_bytes {dense, compressed}: of the weights on disk
    metrics   {dense, compressed, recovered}: figures of `vitrim.tasks.task.METRICS`, shares in [0, 1], and count; any may be absent or None.
              "compressed" is before recovery, "recovered" after it; None where there was no recovery
    difference {points, low, high, count, worse, better}: top-1 of the final model minus the dense one in percentage points with its paired
              95 % interval; None without labels
    timing    {rows, speedups, notes}: of `vitrim.timing`, models named "dense" and "compressed"; None if not measured
    recovery  {objective, steps, seconds, curve: [{step, loss}], validation: [{step, top1}], images_per_s: {dense, compressed}: of a
              training step, timed in turns; None after a short one}; None without one
    sections  [what the method shows of its own choice: `vitrim.result.Table.to_dict()` or `Curve.to_dict()`]; the page knows these two
              and no method. Absent from results of before they were there
    samples   [{image: data URI, name, label, predictions: {dense, compressed, recovered: {label, probability}}}]
    samples_note  how they were chosen
    warnings  [sentence]
    seconds   {stage: seconds}
    provenance {key: text}
    onward    {split, picture, library, predicts, labelled}: what the commands below name, for programs that print them with other places
    commands  [{command, does}]

Every figure on the page is a `<data value= data-path=>` element: the value is the result's own, found by its path.
"""

import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vitrim.errors import ArtifactError
from vitrim.files import unsealed
from vitrim.foreign import read_json
from vitrim.reporting import family
from vitrim.reporting.page import render

SUMMARY = "summary.json"
GENERATOR = b'<meta name="generator" content="vitrim">'
"""In the head of every page."""
SAMPLES = "stages/samples.json"
_PICTURE = re.compile(r"data:image/(?:png|jpeg);base64,[A-Za-z0-9+/]+={0,2}")


def read(folder: Path) -> dict[str, Any]:
    """The result that a run left in its folder. Raises ArtifactError where there is none."""
    place = folder / SUMMARY
    if not place.is_file():
        raise ArtifactError(
            f"{str(folder)!r} has no {SUMMARY}; expected the folder of a finished `vitrim compress`. "
            "If the run was stopped, finish it with --resume."
        )
    result = read_object(place)
    if result.get("schema") != 1:
        raise ArtifactError(
            f"{str(place)!r} has schema {result.get('schema')!r}; expected 1. Write it with this version of vitrim."
        )
    return {**result, **read_samples(folder)}


def read_samples(folder: Path) -> dict[str, Any]:
    """Samples and their note, which a run keeps apart since images are long; empty if there are none."""
    place = folder / SAMPLES
    found = unsealed(read_object(place)) if place.is_file() else {}
    if found is None:
        raise ArtifactError(f"{str(place)!r} is damaged: it is not what the run wrote. Run `vitrim compress` again.")
    cards = found.get("samples") or []
    uris = (
        [card.get("image") if isinstance(card, dict) else None for card in cards] if isinstance(cards, list) else [None]
    )
    for index, uri in enumerate(uris):
        if not isinstance(uri, str) or not _PICTURE.fullmatch(uri):
            raise ArtifactError(
                f"{str(place)!r} is damaged: image {index} is no picture in the file itself, which the page would have to "
                "load from elsewhere. Run `vitrim compress` again."
            )
    return found


def as_text(value: Mapping[str, Any]) -> str:
    """JSON as the files of a run have it."""
    return json.dumps(value, indent=1, sort_keys=True) + "\n"


def read_object(place: Path, *, mend: str = "Run `vitrim compress` again.") -> dict[str, Any]:
    """The JSON object in a file of a run. Raises ArtifactError where there is none, with how to mend it."""
    return read_json(place, error=ArtifactError, named=f"{str(place)!r} is damaged: it", mend=mend, finite=False)


def write(source: Mapping[str, Any] | str | Path, out: str | Path) -> Path:
    """Writes the page of a run, or of a family. Gives the path of the file.

    source: a result, or the folder of a run or of a family.
    """
    if isinstance(source, Mapping):
        return write_page(render(source), Path(out))
    place = Path(source) / family.SUMMARY
    if place.is_file():
        return write_page(_drawn(family.render, read_object(place), place), Path(out))
    return write_page(_drawn(render, read(Path(source)), Path(source) / SUMMARY), Path(out))


def _drawn(draw: Callable[[Mapping[str, Any]], str], found: Mapping[str, Any], place: Path) -> str:
    """The page of what a file says. Only a run writes such a file, whole; what does not fit the page was changed since."""
    from jinja2 import TemplateError

    try:
        return draw(found)
    except (
        TemplateError,
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
        ArithmeticError,
        RecursionError,
    ) as error:
        raise ArtifactError(
            f"{str(place)!r} is damaged: it is no summary that a run wrote ({type(error).__name__}: {error}). "
            "Run `vitrim compress` again."
        ) from error


def is_page(place: Path) -> bool:
    """Whether a file is a page that vitrim wrote."""
    if not place.is_file():
        return False
    with open(place, "rb") as file:
        return GENERATOR in file.read(2048)


def write_page(page: str, place: Path) -> Path:
    """A page as a file, in one step: a reader never finds half of it."""
    place.parent.mkdir(parents=True, exist_ok=True)
    passing = place.with_name(f".{place.name}.{os.getpid()}.tmp")
    try:
        passing.write_text(page, encoding="utf-8", errors="backslashreplace")  # names that are no UTF-8
        passing.replace(place)
    finally:
        passing.unlink(missing_ok=True)
    return place


__all__ = ["SUMMARY", "as_text", "family", "is_page", "read", "read_object", "read_samples", "write", "write_page"]
