"""The one set of weights in a checkpoint: which of several it is, what stands beside it, under which names.

A file's mappings become one row of dotted names. Wrappers inside names go (`module`, `_orig_mod`, the wrappers of FSDP and of
activation checkpointing), pruning masks are applied, blocks that are numbered by chunk are numbered through. A set of
weights is a prefix under which a family's names stand, with its patch embedding and tables; whatever it is called. Of
several such sets the averaged one is taken, and said; where that is not clear the caller is asked (`checkpoint_key`).
Every tensor is used or named in the log.
"""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import SourceError, did_you_mean

SHOWN = 10
MERGE = "Merge them first: PeftModel.from_pretrained(base, FOLDER).merge_and_unload().save_pretrained(NEW), then load hf:NEW."
SAVE = "torch.save(model.state_dict(), ...)"
WRAPPERS = (
    "module",
    "_orig_mod",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
    "_fpw_module",
    "_forward_module",
)
"""Parts of names that wrappers add: data parallel, torch.compile, FSDP, activation checkpointing, FairScale, Fabric."""
AVERAGED = {"ema", "swa", "averaged", "average", "avg", "polyak", "shadow", "momentum", "target"}
"""Words in the name of an averaged set; `teacher` is one beside a `student`."""
MOMENTS = {"momentum", "average", "averaged", "avg"}
"""Those of `AVERAGED` that an optimizer calls its own lists by, which are no weights."""
TRAINING = re.compile(
    r"(.*_)?(criterion|loss|losses|loss_fn|metrics?|optimizers?|dino_loss|ibot_loss)(_.*)?|(decoder|predictor|projector)(_.*)?"
)
"""First parts of names that belong to the training, or to what pretraining puts behind the encoder, and not to the model."""
TOWERS = ("visual", "vision_encoder")
"""What the image tower is called in files with a text tower, whose names a family translates with the tower's own."""
OPTIMIZER = re.compile(r"(^|[._])optim(izer)?s?(_states?)?([._]|$)")
ADAPTER = re.compile(r"(^|\.)(lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|ia3_l|base_layer)(\.|$)")
LOG = logging.getLogger("vitrim.sources")


@dataclass(frozen=True, slots=True)
class Row:
    """A checkpoint's tensors in one row.

    home: the mapping that each name stood in, as a dotted path.  lists: tensors without names, by their path.
    averaged: paths that torch's `AveragedModel` wrote.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    home: dict[str, str] = field(default_factory=dict)
    lists: dict[str, list[Tensor]] = field(default_factory=dict)
    averaged: set[str] = field(default_factory=set)


def row_of(found: Any, *, file: str) -> Row:
    """Everything that is a tensor in mappings and lists of them, by name. Raises SourceError where names stand there twice, or adapters not yet merged."""
    row, before = Row(), dict[str, str]()
    try:
        _collect(_numbered(found) or {}, "", "", row, before, file)
    except RecursionError:
        raise SourceError(f"{file} holds mappings within mappings without end. Save weights alone by {SAVE}.") from None
    if adapters := [name for name in row.tensors if ADAPTER.search(name)]:
        raise SourceError(f"{file} holds adapters of PEFT beside or without the model ({listed(adapters)}). {MERGE}")
    _apply_masks(row, file)
    _number_through(row)
    return row


def chosen(row: Row, expected: Mapping[str, Tensor], *, file: str, key: str | None = None) -> dict[str, Tensor]:
    """The set of weights, under its own names without what is before them. Raises SourceError where it has to be asked for.

    expected: a family's tensors by name; without any, and for names of another layout, a mapping of the file is a set.
    key: path of the set in the file, as the log and the question name it; `.` is the outermost.
    """
    path, asked = None, key is not None
    if key is not None and key != ".":
        key = _joined(*key.split("."))
        if key in row.lists:
            key, path = None, key
        else:
            row = _under(row, key, file)
    sets = _complete(row, expected) or _mappings(row)
    prefix = _raw(row, sets) if path or key == "." else _preferred(row, sets, file=file)
    state = {_rest(name, prefix): row.tensors[name] for name in sets[prefix]}
    left = [name for name in row.tensors if name not in set(sets[prefix])]
    if expected:
        around = _around(row, left, state, expected, prefix, sets, file)
        state.update({rest: row.tensors[name] for rest, name in around.items()})
        known = {name.partition(".")[0] for name in expected}
        gone = [name for name in state if TRAINING.fullmatch(first := name.partition(".")[0]) and first not in known]
        left = [*(name for name in left if name not in around.values()), *(_joined(prefix, name) for name in gone)]
        state = {name: value for name, value in state.items() if name not in gone}
    state, lists = _by_order(row, state, file=file, asked=asked, path=path)
    groups = _grouped(left, prefix) | {place: len(row.lists[place]) for place in lists}
    if not asked and not _is_averaged(row, prefix, [prefix, *groups]):
        _check_averaged(groups, prefix, sets, len(state), file)
    told = [f"{place} ({count} tensors)" if count > 1 else place for place, count in groups.items()]
    if told:
        known = {name for names in sets.values() for name in names}  # were told as sets
        odd = any(
            row.tensors[name].is_floating_point() and not _is_training(name) for name in left if name not in known
        )
        LOG.log(
            logging.WARNING if odd else logging.INFO,
            "%s: the weights are those under %r; not read: %s.",
            file,
            prefix or ".",
            listed(told),
        )
    elif prefix and prefix != (home := row.home[sets[prefix][0]]):
        LOG.info("%s: every name begins with %r, which is left out.", file, f"{_rest(prefix, home)}.")
    return state


def listed(names: Iterable[str]) -> str:
    """At most ten names, then how many more."""
    every = list(names)
    more = f" and {len(every) - SHOWN} more" if len(every) > SHOWN else ""
    return ", ".join(every[:SHOWN]) + more


# --------------------------------------------------------------------------------------------------------------- the row


def _collect(found: Mapping[Any, Any], path: str, spelt: str, row: Row, before: dict[str, str], file: str) -> None:
    """Enter a mapping's tensors into the row. spelt: the path as the file has it.  before: names as the file has them."""
    keys = [key for key in found if isinstance(key, str)]
    if "n_averaged" in keys and all(key.startswith("module.") for key in keys if key != "n_averaged"):
        row.averaged.add(path)  # torch's averaged model: a counter beside the wrapped weights
        keys.remove("n_averaged")
    for key in keys:
        value, name, full = found[key], _joined(path, *key.split(".")), f"{spelt}.{key}" if spelt else key
        if isinstance(value, Tensor):
            if name in row.tensors and not _equal(row.tensors[name], value):
                raise SourceError(
                    f"{file} holds weights twice, with the prefix of a wrapper and without: {before[name]}, {full}. Save one of them "
                    "alone by torch.save(model.state_dict(), ...)."
                )
            row.tensors[name], row.home[name], before[name] = value.detach(), path, full
        elif isinstance(value, (list, tuple)) and value and all(isinstance(one, Tensor) for one in value):
            row.lists[name] = [one.detach() for one in value]
        elif (inner := _numbered(value)) is not None:
            _collect(inner, name, full, row, before, file)
    for key in (key for key in found if not isinstance(key, str)):  # an optimizer's state, by the parameter's number
        if isinstance(found[key], Mapping):
            _collect(found[key], _joined(path, str(key)), f"{spelt}.{key}", row, before, file)


def _numbered(value: Any) -> Mapping[Any, Any] | None:
    """A mapping itself, or a list's members by their number; None for anything else."""
    if isinstance(value, (list, tuple)):
        return {str(i): one for i, one in enumerate(value)}
    return value if isinstance(value, Mapping) else None


def _joined(*parts: str) -> str:
    """A dotted name without the parts that wrappers add."""
    return ".".join(part for part in parts if part and part not in WRAPPERS)


def _equal(a: Tensor, b: Tensor) -> bool:
    if a is b or a.shape != b.shape or a.dtype != b.dtype:
        return a is b
    try:
        return torch.equal(a, b)
    except RuntimeError:  # torch compares no tensors of this kind (float8, meta)
        return False


def is_plain(value: Tensor) -> bool:
    """Whether these are numbers in memory, one behind the other."""
    return value.layout is torch.strided and not value.is_meta and not value.is_quantized


def _apply_masks(row: Row, file: str) -> None:
    """Weights under masks of `torch.nn.utils.prune` become the weights that they compute with."""
    masked = []
    for name in [name for name in row.tensors if name.endswith("_orig")]:
        plain, mask = name.removesuffix("_orig"), row.tensors.get(f"{name.removesuffix('_orig')}_mask")
        weight = row.tensors[name]
        if (
            mask is None
            or mask.shape != weight.shape
            or plain in row.tensors
            or not is_plain(weight)
            or weight.element_size() < 2
        ):
            continue
        row.tensors[plain], row.home[plain] = weight * mask.to(weight.dtype), row.home[name]
        for gone in (name, f"{plain}_mask"):
            del row.tensors[gone], row.home[gone]
        masked.append(plain)
    if masked:
        LOG.info("%s: the pruning masks of %d tensors are applied: %s.", file, len(masked), listed(masked))


def _number_through(row: Row) -> None:
    """Number blocks that stand in chunks (`blocks.1.6.`, as DINOv2's) as one list, where every name of the list has both numbers."""
    inner: dict[str, list[tuple[str, int, int, str]]] = defaultdict(list)
    for name in row.tensors:
        if found := re.match(r"(.*?)\.(\d+)\.(\d+)\.(.+)", name):
            inner[found[1]].append((name, int(found[2]), int(found[3]), found[4]))
    for place, names in inner.items():
        pairs = sorted({(chunk, i) for _, chunk, i, _ in names})
        numbers = [i for _, i in pairs]
        through = numbers == list(range(len(pairs)))  # numbered through, with empty places before: DINOv2
        apart = all(i == 0 or (chunk, i - 1) in pairs for chunk, i in pairs)
        if len(names) != sum(name.startswith(f"{place}.") for name in row.tensors) or not (through or apart):
            continue
        new = {pair: pair[1] if through else at for at, pair in enumerate(pairs)}
        for name, chunk, i, rest in names:
            renamed = f"{place}.{new[chunk, i]}.{rest}"
            row.tensors[renamed], row.home[renamed] = row.tensors.pop(name), row.home.pop(name)


def _under(row: Row, key: str, file: str) -> Row:
    """What stands under a path. Raises SourceError where nothing does."""
    begin = f"{key}."
    kept = {name: value for name, value in row.tensors.items() if name.startswith(begin)} if key else row.tensors
    if not kept:
        places = dict.fromkeys(name.rpartition(".")[0] for name in row.tensors)
        tops = sorted(
            {place.partition(".")[0] for place in places if place} | {home for home in row.home.values() if home}
        )
        raise SourceError(
            f"checkpoint_key={key!r} (--checkpoint-key): {file} holds no weights under it{did_you_mean(key, tops)}; there are "
            f"{listed(tops) or 'none but the outermost (.)'}."
        )
    return Row(kept, {name: row.home[name] for name in kept}, {}, row.averaged)


# -------------------------------------------------------------------------------------------------------------- the sets


def _complete(row: Row, expected: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Names of the row by prefix, of each prefix under which a whole set of the family's tensors stands; the best first.

    A set has the patch embedding and tables (three dims or more) of the best one, in the same shapes. Names under a set's
    prefix belong to it, known or not, unless they stood in another mapping or belong to another set.
    """
    matched: dict[str, dict[str, str]] = defaultdict(dict)
    for name in (name for name in row.tensors if not OPTIMIZER.search(name)):
        parts = name.split(".")
        for i in range(len(parts)):
            if (rest := ".".join(parts[i:])) in expected:
                matched[".".join(parts[:i])][rest] = name
    if not matched:
        return {}

    def fit(prefix: str) -> tuple[int, int]:
        found = matched[prefix]
        return sum(row.tensors[name].shape == expected[rest].shape for rest, name in found.items()), len(found)

    best = max(matched, key=lambda prefix: (*fit(prefix), -len(prefix)))
    anchors = {rest: name for rest, name in matched[best].items() if expected[rest].dim() >= 3}
    if len(anchors) < 2 and len(matched[best]) * (4 if anchors else 2) < len(expected):  # a few names alike make no set
        return {}
    sets = [best]
    for prefix in sorted(matched, key=fit, reverse=True):
        mine = matched[prefix]
        taken = {name for other in sets for name in matched[other].values()}
        same = [rest for rest, name in matched[best].items() if rest in mine and _like(row, name, mine[rest])]
        if not taken & set(mine.values()) and len(same) == len(matched[best]):
            sets.append(prefix)
    members = {prefix: _members(row, prefix, sets, matched[prefix].values()) for prefix in sets}
    if (tower := next((word for word in best.split(".") if word in TOWERS), None)) and len(sets) == 1:
        outer = best[: f".{best}.".index(f".{tower}.")].rstrip(".")
        return {outer: _members(row, outer, [outer], matched[best].values())}
    return members


def _like(row: Row, one: str, other: str) -> bool:
    return row.tensors[one].shape == row.tensors[other].shape


def _members(row: Row, prefix: str, sets: Collection[str], known: Iterable[str]) -> list[str]:
    homes = {row.home[name] for name in known}
    inner = [f"{other}." for other in sets if other != prefix and (not prefix or other.startswith(f"{prefix}."))]
    return [
        name
        for name in row.tensors
        if (not prefix or name.startswith(f"{prefix}."))
        and row.home[name] in homes
        and not any(name.startswith(other) for other in inner)
    ]


def _mappings(row: Row) -> dict[str, list[str]]:
    """Names by mapping of the file, of each that holds at least half as many as the fullest; all of them where those differ."""
    by_home: dict[str, list[str]] = defaultdict(list)
    for name, home in row.home.items():
        if not OPTIMIZER.search(name):
            by_home[home].append(name)
    most = max((len(names) for names in by_home.values()), default=0)
    full = {home: names for home, names in by_home.items() if 2 * len(names) >= most}
    shapes = {frozenset((_rest(name, home), row.tensors[name].shape) for name in names) for home, names in full.items()}
    return full if len(shapes) == 1 else {"": list(row.tensors)}


def _preferred(row: Row, sets: Mapping[str, list[str]], *, file: str) -> str:
    """The prefix of the one set, or of the averaged one. Raises SourceError where that is not clear."""
    first, *others = sets
    names = {prefix: {_rest(name, prefix): row.tensors[name] for name in sets[prefix]} for prefix in sets}
    if all(_same(names[first], names[other]) for other in others):
        return first
    averaged = [prefix for prefix in sets if _is_averaged(row, prefix, sets)]
    shown = ", ".join(repr(prefix or ".") for prefix in sets)
    if len(averaged) != 1:
        raise SourceError(
            f"{file} holds {len(sets)} complete sets of weights ({shown}), and it is not clear which is meant. Name one by "
            "--checkpoint-key KEY (checkpoint_key=)."
        )
    LOG.warning(
        "%s holds %d complete sets of weights (%s): %r is taken, the averaged one; --checkpoint-key names another.",
        file,
        len(sets),
        shown,
        averaged[0] or ".",
    )
    return averaged[0]


def _raw(row: Row, sets: Mapping[str, list[str]]) -> str:
    """The outermost prefix, or the first that is not averaged."""
    return min(sets, key=lambda prefix: (prefix != "", _is_averaged(row, prefix, sets)))


def _same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return set(one) == set(other) and all(_equal(value, other[name]) for name, value in one.items())


def _is_averaged(row: Row, prefix: str, sets: Iterable[str]) -> bool:
    words = _words(prefix)
    beside = set().union(*(_words(other) for other in sets if other != prefix))
    return any(prefix == place or prefix.startswith(f"{place}.") for place in row.averaged) or _is_averaged_beside(
        words, beside
    )


def _is_moments(place: str) -> bool:
    """Whether an optimizer's averages stand there, which are none of weights."""
    return bool(OPTIMIZER.search(place)) and not _words(place) & (AVERAGED - MOMENTS)


def _is_averaged_beside(words: set[str], beside: set[str]) -> bool:
    return bool((words - beside) & AVERAGED) or ("teacher" in words and "student" in beside)


def _words(path: str) -> set[str]:
    return {word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", path)}


def _rest(name: str, prefix: str) -> str:
    return name.removeprefix(f"{prefix}.") if prefix else name


# --------------------------------------------------------------------------------------------------- what stands beside it


def _around(
    row: Row,
    left: list[str],
    state: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    prefix: str,
    sets: Mapping[str, list[str]],
    file: str,
) -> dict[str, str]:
    """Names in the file of the family's tensors that stand outside the set, in what encloses it: a classifier behind a backbone.

    Raises SourceError where others that may stand between the two are there as well.
    """
    elsewhere = {name for names in sets.values() for name in names}
    outer = prefix
    while outer:
        outer = outer.rpartition(".")[0]
        beside = [name for name in left if name not in elsewhere and (not outer or _rest(name, outer) != name)]
        plain = {name: _without_places(_rest(name, outer)) for name in beside}
        found = {
            rest: name
            for name, rest in plain.items()
            if rest in expected
            and rest not in state
            and row.tensors[name].shape[1:] == expected[rest].shape[1:]
            and list(plain.values()).count(rest) == 1
        }
        if not found:
            continue
        others = [
            name
            for name in beside
            if name not in found.values()
            and name not in elsewhere
            and not TRAINING.fullmatch(_rest(name, outer).partition(".")[0])
        ]
        if others:
            raise SourceError(
                f"{file}: beside the weights under {prefix!r} stand {listed(found.values())}, but also {listed(others)}, which have no "
                f"place in the model. To take {prefix!r} alone pass --checkpoint-key {prefix} (checkpoint_key=)."
            )
        LOG.warning("%s: the model under %r is completed by %s.", file, prefix, listed(found.values()))
        return found
    return {}


def _without_places(name: str) -> str:
    """A tensor's name without its part's place in a list: `head.weight` of `head.1.weight`, where dropout is before it."""
    return re.sub(r"(\.\d+)+(?=\.(weight|bias)$)", "", name)


def _by_order(
    row: Row, state: dict[str, Tensor], *, file: str, asked: bool, path: str | None
) -> tuple[dict[str, Tensor], list[str]]:
    """Averaged weights that a file keeps as a list in the order of the parameters, and the lists that are not read.

    path: of the list that was asked for.
    """
    shapes = [value.shape for value in state.values()]
    alike = [place for place, values in row.lists.items() if [value.shape for value in values] == shapes]
    if path is None and not asked:
        averaged = [place for place in alike if _words(place) & AVERAGED and not _is_moments(place)]
        if len(averaged) > 1:
            raise SourceError(
                f"{file} keeps several lists of averaged weights ({', '.join(averaged)}). Name one by --checkpoint-key KEY "
                "(checkpoint_key=); `.` is the outermost set."
            )
        path = next(iter(averaged), None)
    if path is None:
        return state, list(row.lists)
    if path not in alike:
        raise SourceError(
            f"checkpoint_key={path!r} (--checkpoint-key): {file} keeps tensors without names there, which are not those of the model "
            "in their order. Name a set of weights with names."
        )
    LOG.warning(
        "%s: the weights are those in %r, in the order of the others; --checkpoint-key names another set.", file, path
    )
    return dict(zip(state, row.lists[path], strict=True)), [other for other in row.lists if other != path]


def _is_training(name: str) -> bool:
    """Whether a tensor belongs to the training: an optimizer, a loss, what pretraining puts behind the encoder."""
    return bool(OPTIMIZER.search(name)) or any(TRAINING.fullmatch(part) for part in name.split("."))


def _grouped(left: Iterable[str], prefix: str) -> dict[str, int]:
    """How many tensors of those left stand under which path, as short as sets it apart from the prefix."""
    groups: dict[str, int] = defaultdict(int)
    mine = prefix.split(".")
    for name in left:
        parts = name.split(".")
        shared = next(
            (i for i, (a, b) in enumerate(zip(parts, mine, strict=False)) if a != b), len(mine) if prefix else 0
        )
        groups[".".join(parts[: shared + 1])] += 1
    return {
        next(name for name in left if name.startswith(place)) if count == 1 else place: count
        for place, count in groups.items()
    }


def _check_averaged(groups: Mapping[str, int], prefix: str, sets: Iterable[str], count: int, file: str) -> None:
    """Raises SourceError where as good as all weights stand there averaged too, and not in the model's names."""
    doubtful = [
        place
        for place, many in groups.items()
        if _is_averaged_beside(_words(place), _words(prefix))
        and not _is_moments(place)
        and 2 * many >= count
        and not any(f"{of}.".startswith(f"{place}.") for of in sets)
    ]
    if doubtful:
        raise SourceError(
            f"{file} holds averaged weights too ({listed(doubtful)}), but not under the names of those under {prefix or '.'!r}. To take the "
            f"latter pass --checkpoint-key {prefix or '.'} (checkpoint_key=), or save the averaged weights alone."
        )
