"""The folder of a run: which stages are done, what each found, and whether it may be touched."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vitrim import checkpoints, reporting
from vitrim.checkpoints import replace_text
from vitrim.codec import flat
from vitrim.errors import ArtifactError, ConfigError
from vitrim.files import is_marked, names_in, refuse_foreign, refuse_locked, sealed, unsealed
from vitrim.training.state import say_other_threads

STAGES = ("plan", "compress", "recover", "evaluate", "measure", "save", "report")
LEFT_BY = {
    "compress": ("stages/compressed",),
    "recover": ("stages/recover", "stages/recovered"),
    "evaluate": ("stages/samples.json",),
    "report": ("report.html", "summary.json"),
}
"""What a stage leaves beside its own file; the artifact in OUT itself is replaced, never removed."""

FREE = ("workers", "device", "checkpoint_seconds", "log_every", "eval_every", "tracker", "grad_checkpoint", "threads")
"""Settings that may differ between a run and its resumption."""


class Folder:
    """OUT, seen as stages. Nothing is written before `begin`."""

    def __init__(self, out: Path, *, resume: bool, force: bool) -> None:
        self.out, self.resume = out, resume
        self.stages = out / "stages"
        filled = check_place(out, resume=resume, force=force)
        begun = (self.stages / "config.json").is_file()
        if resume and not begun:
            raise ConfigError(
                f"nothing to resume in {str(out)!r}; expected the folder of a run. To start one, leave resume out."
            )
        if filled and force:
            ours = is_marked(self.stages / "config.json") or is_marked(out / "provenance.json")
            refuse_foreign(out, ours=ours, taken=names_in(out))

    def begin(self, config: Mapping[str, Any]) -> None:
        """Make the folder and keep the resolved config; or, when resuming, compare with what is kept there."""
        if self.resume:
            self._compare(config)
            self._forget()
            return
        for name in ("summary.json", "report.html", "stages"):
            _remove(self.out / name)
        self.stages.mkdir(parents=True, exist_ok=True)
        self._write("config", config)

    def stage(self, name: str, work: Callable[[], dict[str, Any]]) -> tuple[dict[str, Any], bool]:
        """The stage's result, and whether it was done just now. A result is kept only once it is whole."""
        if self._path(name).is_file():
            path = self._path(name)
            if (kept := unsealed(self._read(name))) is None:
                raise ArtifactError(f"{str(path)!r} is not what the run wrote. Remove it and resume.")
            return kept, False
        began = time.monotonic()
        found = json.loads(json.dumps(work()))
        found["seconds"] = round(time.monotonic() - began, 2)
        self._write(name, sealed(found))
        return found, True

    def _forget(self) -> None:
        """Later stages stand on the first missing one. What that one itself had begun stays: a recovery has checkpoints."""
        first = next((i for i, stage in enumerate(STAGES) if not self._path(stage).is_file()), len(STAGES))
        for stage in STAGES[first + 1 :]:
            _remove(self._path(stage))
            for name in LEFT_BY.get(stage, ()):
                _remove(self.out / name)

    def _compare(self, config: Mapping[str, Any]) -> None:
        before, now = flat(self._read("config")), flat(json.loads(json.dumps(config)))
        for key in sorted({*before, *now}):
            if before.get(key) != now.get(key) and key.rsplit(".", 1)[-1] not in FREE:
                raise ConfigError(
                    f"resume with another config: {key} was {before.get(key)!r} and is {now.get(key)!r}. "
                    "Resume with the same settings, or start anew in another folder (or with force)."
                )
        say_other_threads(before.get("threads"), now["threads"])

    def forget_what_is_worth_nothing(self) -> bool:
        """After a failure: removes what this call wrote, where nothing could go on from it. Whether something is left."""
        if self.resume or self._path("compress").is_file() or checkpoints.hold_work(self.stages / "search"):
            return True
        _remove(self.stages)
        return False

    def _path(self, stage: str) -> Path:
        return self.stages / f"{stage}.json"

    def _write(self, stage: str, value: Mapping[str, Any]) -> None:
        replace_text(self._path(stage), reporting.as_text(value))

    def _read(self, stage: str) -> dict[str, Any]:
        return reporting.read_object(self._path(stage), mend="Remove it and resume.")


def check_place(out: Path, *, resume: bool, force: bool) -> bool:
    """Refuses a place where no run, or family of them, can go; gives whether there is anything already."""
    if resume and force:
        raise ConfigError("resume and force contradict each other; pass one: go on with what is there, or start anew.")
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{str(out)!r} is a file; expected a folder, new or empty. Choose another name.")
    refuse_locked(out)
    filled = bool(names_in(out))
    if filled and not (resume or force):
        raise ConfigError(
            f"{str(out)!r} is not empty. Pass resume (--resume) to go on with it, force (--force) to replace it, or choose another folder."
        )
    return filled


@contextmanager
def written_or_said(out: Path) -> Iterator[None]:
    """A full or read-only disk in one sentence; what is whole stays, so that the run can be resumed."""
    try:
        yield
    except OSError as error:
        raise ArtifactError(
            f"{str(out)!r} cannot be written: {error.strerror or error}. Free some space or mend the permissions, then resume."
        ) from error


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
