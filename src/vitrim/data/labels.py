"""Class names of a model and of data, matched by name and never by position."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch

from vitrim.errors import DataError

_SHOWN = 8


def match_labels(model_labels: Sequence[str], data_classes: Sequence[str]) -> torch.Tensor:
    """int64 [data classes]: the model's index for each class of the data.

    The data may lack classes of the model (a part of ImageNet), never the reverse. Case, "_" and "-" against a space do not
    matter, one name of several ("tench, Tinca tinca") is enough where only one class has it, and WordNet ids (n01440764)
    are read as ImageNet's names. DataError names both lists.
    """
    if list(model_labels) == list(data_classes):
        return torch.arange(len(model_labels))  # also where two classes share a name
    for theirs, index in _readings(list(data_classes), list(model_labels)):
        found = [index.get(label, -1) for label in theirs]
        if -1 not in found and len(set(found)) == len(found):
            return torch.tensor(found, dtype=torch.int64)
    if are_numbers(data_classes) and not are_numbers(model_labels):
        raise DataError(
            f"the data numbers its classes (0 to {len(data_classes) - 1}) and the model names them ({_listed(model_labels)}); expected "
            "names in both, since nothing says that their orders agree. Write the names into the label column, or sort the images "
            "into folders of these names."
        )
    known = {loose(label) for label in model_labels}
    missing = [label for label in data_classes if loose(label) not in known]
    what = "unknown to the model" if missing else "not told apart by name there or in the data"
    raise DataError(
        f"the data's classes are not the model's: {_listed(missing or list(data_classes))} of the data "
        f"{'is' if len(missing or data_classes) == 1 else 'are'} {what}. "
        f"Model: {_listed(model_labels)}. Data: {_listed(data_classes)}. "
        "Rename the folders, or train a head for these classes: vitrim train --new-head."
    )


def are_numbers(labels: Sequence[str]) -> bool:
    """Whether classes are called by their own numbers, as where a source only numbers them."""
    return len(labels) > 0 and list(labels) == [str(i) for i in range(len(labels))]


def readable(labels: Sequence[str]) -> tuple[str, ...]:
    """Names for people: ImageNet's WordNet ids (n01440764) as words ("tench"), all others as they are."""
    if not labels or not all(re.fullmatch(r"n\d{8}", label) for label in labels):
        return tuple(labels)
    from timm.data import ImageNetInfo  # here: only such labels need timm's tables

    info = ImageNetInfo("imagenet-1k" if len(labels) <= 1000 else "imagenet-22k")
    known = set(info.label_names())
    return tuple(info.label_name_to_description(label).split(",")[0] if label in known else label for label in labels)


def _readings(data: list[str], model: list[str]) -> Iterator[tuple[list[str], Mapping[str, int]]]:
    """The data's names, and the model's indices by name, in ways of reading a name from the strictest on."""
    yield data, _by_name([label] for label in model)
    yield [loose(label) for label in data], _by_name([loose(label)] for label in model)
    yield [_names(label)[0] for label in data], _by_name(map(_names, model))
    if all(re.fullmatch(r"n\d{8}", label) for label in data):
        from timm.data import ImageNetInfo  # here: only such data needs timm's tables

        info = ImageNetInfo("imagenet-1k")
        # two classes of ImageNet share a name ("crane"), so the list as a whole is what tells them apart
        for names in (info.label_descriptions(), info.label_descriptions(detailed=True)):
            if [loose(label) for label in model] == [loose(str(name)) for name in names]:
                yield data, _by_name([name] for name in info.label_names())


def loose(label: str) -> str:
    """A name without what does not tell classes apart: case, "_" and "-" against a space, and how accents are encoded."""
    return re.sub(r"[\s_-]+", " ", unicodedata.normalize("NFC", label)).strip().lower()


def _names(label: str) -> list[str]:
    return [loose(name) for name in label.split(",")]


def _by_name(names: Iterable[Sequence[str]]) -> dict[str, int]:
    """The class of each name that only one has.  names: of each class."""
    each = [dict.fromkeys(those) for those in names]
    times = Counter(name for those in each for name in those)
    return {name: i for i, those in enumerate(each) for name in those if times[name] == 1}


def _listed(labels: Sequence[str]) -> str:
    shown = ", ".join(repr(label) for label in labels[:_SHOWN])
    return f"{shown}, ... ({len(labels)} in all)" if len(labels) > _SHOWN else f"{shown} ({len(labels)} in all)"
