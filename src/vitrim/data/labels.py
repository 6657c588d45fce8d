"""Class names of a model and of data, matched by name and never by position."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

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
    for theirs, ours in _readings(list(data_classes), list(model_labels)):
        index = {label: i for i, label in enumerate(ours)}
        if len(index) == len(ours) and len(set(theirs)) == len(theirs) and all(label in index for label in theirs):
            return torch.tensor([index[label] for label in theirs], dtype=torch.int64)
    if are_numbers(data_classes) and not are_numbers(model_labels):
        raise DataError(
            f"the data numbers its classes (0 to {len(data_classes) - 1}) and the model names them ({_listed(model_labels)}); expected "
            "names in both, since nothing says that their orders agree. Write the names into the label column, or sort the images "
            "into folders of these names."
        )
    known = {_loose(label) for label in model_labels}
    missing = [label for label in data_classes if _loose(label) not in known]
    raise DataError(
        f"the data's classes are not the model's: {_listed(missing or list(data_classes))} of the data "
        f"{'are' if len(missing) != 1 else 'is'} unknown to the model. "
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


def _readings(data: list[str], model: list[str]) -> Iterator[tuple[list[str], list[str]]]:
    """Both lists in ways of reading a name, from the strictest on."""
    yield data, model
    yield [_loose(label) for label in data], [_loose(label) for label in model]
    yield [_first_name(label) for label in data], [_first_name(label) for label in model]
    if all(re.fullmatch(r"n\d{8}", label) for label in data):
        from timm.data import ImageNetInfo  # here: only such data needs timm's tables

        info = ImageNetInfo("imagenet-1k")
        # two classes of ImageNet share a name ("crane"), so the list as a whole is what tells them apart
        for names in (info.label_descriptions(), info.label_descriptions(detailed=True)):
            if [_loose(label) for label in model] == [_loose(str(name)) for name in names]:
                yield data, list(info.label_names())


def _loose(label: str) -> str:
    return re.sub(r"[\s_-]+", " ", label).strip().lower()


def _first_name(label: str) -> str:
    return _loose(label.split(",")[0])


def _listed(labels: Sequence[str]) -> str:
    shown = ", ".join(repr(label) for label in labels[:_SHOWN])
    return f"{shown}, ... ({len(labels)} in all)" if len(labels) > _SHOWN else f"{shown} ({len(labels)} in all)"
