"""Checkpoints of a training: safetensors and JSON in a folder that is whole or is not there.

A folder `step-00000120` is written under another name, flushed to the disk, and renamed; only then is the one before it
removed. Whatever moment a process is killed at, the newest folder with a final name is a whole checkpoint.
"""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Collection, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from . import __version__, processes
from .codec import plain
from .errors import TrainingError
from .files import is_marked, make_whole, replace_file, sealed, sha256, sync_file, unsealed, write_text
from .foreign import read_json
from .model import Vit
from .spec import ModelSpec, spec_hash
from .surgery import fingerprint

SCHEMA = 1
_NAME = re.compile(r"step-(\d{8,})")
_TENSORS, _VALUES = "state.safetensors", "state.json"
_NOTHING = "none"  # safetensors files need a tensor


def write(folder: Path, step: int, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> Path:
    """Write the checkpoint of an optimiser step under `folder`, then remove the older ones.

    tensors: by name, on any device. values: plain JSON values. Raises TrainingError if the disk refuses.
    """
    final = folder / f"step-{step:08d}"
    if final.is_dir():  # a run reaches a step in one state only; rewriting it would leave a moment with none
        return final

    def fill(staging: Path) -> None:
        # clones: safetensors refuses tensors that share memory, and the caller's may be views
        save_file({k: t.detach().to("cpu", copy=True).contiguous() for k, t in tensors.items()}, staging / _TENSORS)
        sync_file(staging / _TENSORS)
        own = {**values, "sha256": sha256(staging / _TENSORS)}
        write_text(
            staging / _VALUES,
            json.dumps(sealed({"schema": SCHEMA, "vitrim": __version__, "step": step, **own}), sort_keys=True),
        )

    try:
        make_whole(final, fill)
        for old in _found(folder):
            if old != final:
                _clear(old)
    except (OSError, SafetensorError) as error:
        onward = "start again" if newest(folder) is None else "resume: the one before it is untouched"
        raise TrainingError(
            f"the checkpoint of step {step} could not be written to {folder.name}/ ({error}). Free some space or choose "
            f"another output folder, then {onward}."
        ) from error
    return final


def newest(folder: Path) -> Path | None:
    """The newest whole checkpoint, or None."""
    return max(_found(folder), key=lambda path: int(path.name.removeprefix("step-")), default=None)


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors (on the CPU) and values of a checkpoint. Raises TrainingError if it is damaged or of a newer vitrim."""
    try:
        found = read_json(path / _VALUES, error=TrainingError, named=_VALUES, mend="It is damaged.", finite=False)
        values, digest = unsealed(found), sha256(path / _TENSORS)
        if values is None or values.get("sha256", digest) != digest:
            raise ValueError(f"{_VALUES if values is None else _TENSORS} is not what was written")
        tensors = load_file(path / _TENSORS)
    except (OSError, ValueError, SafetensorError) as error:
        raise TrainingError(
            f"checkpoint {path.name} cannot be read ({error}); expected a whole {_VALUES} and {_TENSORS}. "
            "Remove that folder to go on from nothing, or bring the files back."
        ) from error
    if values.get("schema") != SCHEMA:
        raise TrainingError(
            f"checkpoint {path.name} has schema {values.get('schema')!r}; this vitrim reads {SCHEMA}. "
            "Resume with the version that wrote it."
        )
    return tensors, values


def are_in(folder: Path) -> bool:
    """Whether a folder holds journals, of whatever method; one without anything does too."""
    held = list(folder.iterdir()) if folder.is_dir() else []
    return all(any(map(is_marked, journal.glob(f"run/*/{_VALUES}"))) for journal in held)


def hold_work(folder: Path) -> bool:
    """Whether a folder holds a checkpoint, or a piece of a journal beyond what says whose it is."""
    return any(path.parent.parent.name != "run" for path in folder.rglob(_VALUES)) if folder.is_dir() else False


def sweep(folder: Path) -> None:
    """Remove what a killed process left half-written or half-removed."""
    if folder.is_dir():
        for path in folder.iterdir():
            if path.name.endswith(".partial") or path.name.startswith(
                ("partial-", "gone-")
            ):  # partial-: of earlier versions
                shutil.rmtree(path, ignore_errors=True)


class Piece(NamedTuple):
    """What is kept of a finished piece of work. values: plain JSON."""

    tensors: dict[str, Tensor]
    values: dict[str, Any]


def identity_of(config: Any, *, free: Collection[str], given: ModelSpec, weights: Vit, data: Any) -> dict[str, Any]:
    """What a run of a method is known by, for its `Journal`: its settings, what it cuts, and the images it looks at.

    free: settings that may be others when the run is gone on with. data: a mark of the images, plain JSON.
    """
    settings = {f.name: plain(getattr(config, f.name)) for f in fields(config) if f.name not in free}
    return settings | {"spec": spec_hash(given), "weights": fingerprint(weights), "data": data}


class Journal:
    """What a killed run goes on from: a small checkpoint for each finished piece of work, in FOLDER/METHOD.

    folder None: nothing is kept. identity: plain JSON values that must agree for a run to be gone on with.
    Raises TrainingError where a run is there that `resume` does not ask for, or another one.
    """

    def __init__(self, folder: Path | None, method: str, identity: Mapping[str, Any], *, resume: bool) -> None:
        self.folder = None if folder is None else folder / method
        if self.folder is None:
            return
        if processes.count() > 1:
            raise TrainingError(
                f"{method} keeps what it has done from one process, and torchrun started {processes.count()}. Start it without "
                "torchrun, or pass no folder."
            )
        if self.folder.is_dir() and any(self.folder.iterdir()) and not resume:
            raise TrainingError(taken(self.folder.parent, method))
        before = self.get("run")
        if before is None:
            self.put("run", values=identity)
        else:
            same_run(self.folder.parent, before.values, identity)

    def get(self, name: str) -> Piece | None:
        """A finished piece; None where it is not there yet."""
        if self.folder is None:
            return None
        sweep(self.folder / name)
        path = newest(self.folder / name)
        if path is None:
            return None
        tensors, values = read(path)
        # copies: sums over memory that starts elsewhere may round otherwise, and a resumed run must not differ
        return Piece({key: tensor.clone() for key, tensor in tensors.items() if key != _NOTHING}, values)

    def put(
        self, name: str, tensors: Mapping[str, Tensor] | None = None, values: Mapping[str, Any] | None = None
    ) -> None:
        """Keep a piece, once it is whole."""
        if self.folder is not None:
            write(self.folder / name, 0, tensors or {_NOTHING: torch.zeros(1)}, values or {})


def taken(place: Path, what: str) -> str:
    """The sentence for a folder that holds a run which nobody asked to go on with."""
    return (
        f"{place.name}/ holds a run already ({what}); nothing is overwritten. Pass resume=True (--resume) to go on with it, or "
        "choose another folder."
    )


def same_run(place: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise TrainingError unless what is there was begun with the same values."""
    for key, value in now.items():
        if before.get(key) != value:
            raise TrainingError(
                f"{place.name}/ holds another run: {key} was {before.get(key)!r} and is {value!r}. Resume with the same model, "
                "settings and data, or choose another folder."
            )


def replace_text(path: Path, text: str) -> None:
    """Write a text so that the file has either its old or its new content, even after a crash."""
    replace_file(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def pack(prefix: str, values: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split a (nested) state into tensors by dotted name and the plain values that remain, each a dict.

    A key may not hold a slash, which separates the levels.
    """
    tensors: dict[str, Tensor] = {}
    rest: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}/{key}"
        if isinstance(value, Tensor):
            tensors[name] = value
        elif isinstance(value, Mapping):
            inner, plain = pack(name, value)
            tensors.update(inner)
            rest[str(key)] = plain
        else:
            rest[str(key)] = value
    return tensors, rest


def unpack(prefix: str, tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `pack`. Keys come back as strings, tuples as lists."""
    state: dict[str, Any] = copy.deepcopy(dict(rest))
    for name, tensor in tensors.items():
        if name.startswith(f"{prefix}/"):
            *levels, last = name[len(prefix) + 1 :].split("/")
            inner = state
            for level in levels:
                inner = inner.setdefault(level, {})
            inner[last] = tensor
    return state


def _found(folder: Path) -> list[Path]:
    return [p for p in folder.iterdir() if _NAME.fullmatch(p.name) and p.is_dir()] if folder.is_dir() else []


def _clear(path: Path) -> None:
    """Remove a folder so that nothing half-removed is ever found under its name."""
    if path.exists():
        gone = path.with_name(f"gone-{path.name}")
        shutil.rmtree(gone, ignore_errors=True)
        path.rename(gone)
        shutil.rmtree(gone)
