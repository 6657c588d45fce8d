"""Folders that are written whole or not at all, by one run at a time, and never over what is not ours; the header of a
safetensors file. Standard library only."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import platform
import secrets
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import processes
from .errors import ArtifactError, ConfigError, VitrimError
from .foreign import parse_json, read_json

LOCK = ".vitrim.lock"
"""Stands in a folder while a run writes there."""
log = logging.getLogger("vitrim.files")
_HEADER_BYTES = 100_000_000  # the format's own limit
DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "I16": 2, "U16": 2, "I32": 4, "U32": 4, "I64": 8, "U64": 8,
    "F16": 2, "BF16": 2, "F32": 4, "F64": 8,
}  # fmt: skip


def make_whole(folder: Path, fill: Callable[[Path], None]) -> None:
    """Fill a temporary sibling of a folder that is not there yet, and rename it.

    On failure nothing is left, parents that had to be made included.
    """
    missing = [parent for parent in folder.parents if not parent.exists()]
    staging = folder.with_name(f".{secrets.token_hex(8)}.partial")
    renamed = False
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging.mkdir()
        fill(staging)
        sync_folder(staging)
        os.rename(staging, folder)
        renamed = True
        sync_folder(folder.parent)
    except BaseException:
        shutil.rmtree(folder if renamed else staging, ignore_errors=True)
        for parent in missing:
            with contextlib.suppress(OSError):
                parent.rmdir()
        raise


def replace_within(folder: Path, fill: Callable[[Path], None], *, names: Sequence[str]) -> None:
    """Swap the named files of a folder that stays where it is: it may be a mount point, or hold other files.

    names: what `fill` may write; those that it does not write leave. The first leaves first and comes last: while it is
    missing nobody takes the rest for whole. On failure the old files are put back.
    """
    staging = folder / f".{secrets.token_hex(8)}.partial"
    old = staging / "old"
    moved: list[tuple[Path, Path]] = []

    def move(source: Path, target: Path) -> None:
        os.rename(source, target)
        moved.append((source, target))

    try:
        staging.mkdir()
        old.mkdir()
        fill(staging)
        sync_folder(staging)
        for name in names:
            if os.path.lexists(folder / name):
                move(folder / name, old / name)
        for name in reversed(names):
            if (staging / name).exists():
                move(staging / name, folder / name)
        sync_folder(folder)
    except BaseException as error:
        try:
            for source, target in reversed(moved):
                os.rename(target, source)
        except OSError as second:
            raise ArtifactError(
                f"{folder}: could not be written ({error}), nor put back as it was ({second}). "
                f"The files that stood there are in {old}: move them up by hand."
            ) from error
        shutil.rmtree(staging, ignore_errors=True)
        raise
    shutil.rmtree(staging, ignore_errors=True)


def replace_file(path: Path, fill: Callable[[Path], object]) -> None:
    """Write a file so that it has either its old or its new content, even after a crash."""
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)  # of a process that was killed
    try:
        fill(partial)
        sync_file(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a new file and flush it to the disk."""
    with open(path, "x", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a new file of sorted JSON without NaN and flush it to the disk."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n")


SEAL = "seal"
"""The key under which a sealed value says what the rest of it was."""


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """Plain JSON values with a mark of what they are, by which `unsealed` knows that nothing was changed since."""
    return {**value, SEAL: _mark(value)}


def unsealed(found: Mapping[str, Any]) -> dict[str, Any] | None:
    """The values that were sealed; None where they are others now. Those without a seal are of before there was one."""
    rest = {key: value for key, value in found.items() if key != SEAL}
    return rest if SEAL not in found or found[SEAL] == _mark(rest) else None


def _mark(value: Mapping[str, Any]) -> str:
    as_read = json.loads(json.dumps(value))  # keys as text, which are sorted otherwise than numbers
    return hashlib.sha256(json.dumps(as_read, sort_keys=True).encode()).hexdigest()


def sync_file(path: Path) -> None:
    """Flush a file that another library wrote, and give it the permissions of any new file here.

    safetensors makes its files readable by their owner alone, whatever the umask says.
    """
    probe = path.with_name(
        f".{secrets.token_hex(8)}.partial"
    )  # asking for the umask itself would change it for all threads
    try:
        probe.touch()
        path.chmod(probe.stat().st_mode & 0o777)
    finally:
        probe.unlink(missing_ok=True)
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder, where the system can."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


# ------------------------------------------------------------------------------------------------ whose a folder is


def names_in(folder: Path) -> list[str]:
    """What a folder holds, beside the lock of a run; nothing where there is no folder."""
    return sorted(entry.name for entry in folder.iterdir() if entry.name != LOCK) if folder.is_dir() else []


def is_marked(path: Path) -> bool:
    """Whether a JSON file says that vitrim wrote it, as the records beside every result do."""
    try:
        found = read_json(path, error=ArtifactError, mend="", finite=False)
    except ArtifactError:
        return False
    versions = found.get("versions")
    return "vitrim" in found or (isinstance(versions, dict) and "vitrim" in versions)


def whose_folder(config: Mapping[str, Any], folder: Path) -> str:
    """Whose model lies in a folder that is no artifact, by its config.json, and under which name it loads, for a sentence."""
    kinds = {
        "model_type": ("transformers", "hf:"),
        "kwargs": ("torchvision", "torchvision:"),
        "architecture": ("timm", "timm:local-dir:"),
    }
    for key, (library, prefix) in kinds.items():
        if key in config:
            return f"is a model folder of {library}, not an artifact of vitrim. Load it as {prefix}{folder}."
    return "is not an artifact of vitrim: its config.json has no 'spec'. Expected a folder that vitrim saved."


def refuse_foreign(place: Path, *, ours: bool, taken: Sequence[str] = ()) -> None:
    """The one guard of every `force`: raise ConfigError where it would replace what vitrim did not write.

    ours: whether the place carries the mark of what is to be written. taken: what stands under the names to be written;
    nothing else in a folder is ever touched.
    """
    if place.is_symlink() and not place.is_dir():
        raise ConfigError(f"{str(place)!r} is a link, and is not replaced. Name the place itself, or another one.")
    if (place.is_file() or taken) and not ours:
        what = f" holds {taken[0]!r}, which" if taken else " is a file that"
        raise ConfigError(
            f"{str(place)!r}{what} vitrim did not write as part of such a result; it is not replaced, even with force "
            "(--force). Move it away, or choose another place."
        )


def refuse_no_utf8(place: Path, *, error: type[VitrimError]) -> None:
    """Raise the error for a name whose bytes are no UTF-8: safetensors opens no such file."""
    try:
        str(place).encode()
    except UnicodeEncodeError:
        raise error(
            f"{str(place)!r}: the name is no UTF-8, which files of weights need; rename it, or choose another place."
        ) from None


@contextlib.contextmanager
def locked(folder: Path | None) -> Iterator[None]:
    """Keep a folder to one run at a time, by a file that names its process and host. None: nothing is written, nor kept.

    The folder is made if it is not there, and goes again with the lock if nothing was put into it. The lock of a process
    that is no more is taken over, and that is said. Of several processes of one training the first holds it.
    Raises ConfigError at once where another run writes there, ArtifactError where nothing can be written.
    """
    if folder is None or not processes.is_first():
        yield
        return
    refuse_no_utf8(folder, error=ConfigError)
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    for place in missing:
        if place.is_symlink():
            raise ConfigError(
                f"{str(folder)!r}: {str(place)!r} is a link to nothing. Remove it, or choose another folder."
            )
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            own = _enter(folder)
        except OSError as error:
            raise ArtifactError(
                f"{str(folder)!r} cannot be written ({error.strerror or error}). Give a folder in which files can be written."
            ) from error
        try:
            yield
        finally:
            if own:
                (folder / LOCK).unlink(missing_ok=True)
    finally:
        for place in missing:
            with contextlib.suppress(OSError):
                place.rmdir()


def refuse_locked(folder: Path) -> None:
    """Raise ConfigError where a run writes to the folder that is not this one."""
    with contextlib.suppress(OSError):
        _refuse_alive(folder, _holder((folder / LOCK).read_text(encoding="utf-8")))


def _enter(folder: Path) -> bool:
    """Take the lock; False where this thread holds it already, further out."""
    path = folder / LOCK
    while True:
        with open(path, "a+", encoding="utf-8") as file:
            _alone(file.fileno())
            file.seek(0)
            text = file.read()
            holder = _holder(text)
            if holder == _me():
                return False
            _refuse_alive(folder, holder)
            if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
                continue  # it was given back while we waited
            if text:
                log.warning(
                    "%s: the run of process %s ended without a word; its lock is taken over.",
                    folder,
                    holder.get("process"),
                )
            try:
                file.truncate(0)
                file.write(json.dumps(_me()))
                file.flush()
            except BaseException:
                path.unlink(missing_ok=True)  # a full disk: half a lock would stay
                raise
            return True


def _me() -> dict[str, Any]:
    return {"process": os.getpid(), "thread": threading.get_ident(), "host": platform.node(), "began": _began("self")}


def _refuse_alive(folder: Path, holder: Mapping[str, Any]) -> None:
    if holder != _me() and _lives(holder):
        raise ConfigError(
            f"{str(folder)!r}: another run is writing there (process {holder.get('process')} on {holder.get('host')}); "
            "expected a folder for each run. Wait for it to end, or choose another folder. If that run is no more, remove "
            f"{LOCK} from the folder."
        )


def _alone(number: int) -> None:
    """Let others wait while a lock is read and written; where the system has no such thing, two may meet in that moment."""
    with contextlib.suppress(ImportError, OSError):
        import fcntl

        fcntl.flock(number, fcntl.LOCK_EX)


def _holder(text: str) -> dict[str, Any]:
    try:
        found = parse_json(text, named=LOCK, error=ArtifactError, mend="")
    except ArtifactError:
        return {}
    return found if isinstance(found, dict) else {}


def _lives(holder: Mapping[str, Any]) -> bool:
    """Whether the process of a lock may still be there: on another host, nobody can tell."""
    process = holder.get("process")
    if not isinstance(process, int) or process <= 0:
        return False  # written in part: no run begins before its lock is whole
    if holder.get("host") != platform.node() or os.name != "posix":
        return True
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):  # no system has a process of such a number
        return False
    except OSError:
        return True
    return _began(process) == holder.get("began")


def _began(process: int | str) -> str | None:
    """When a process began, in the system's ticks: numbers of processes are given out again. None where that is not told,
    and for one that is dead and only waits to be buried."""
    try:
        text = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
        state, *fields = text.rpartition(")")[2].split()
        return None if state in "ZX" else fields[18]
    except (OSError, IndexError, ValueError):
        return None


def sha256(path: Path) -> str:
    """Of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One tensor of a safetensors header. begin, end: bytes behind the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(path: Path) -> tuple[dict[str, Entry], int]:
    """The entries of a safetensors file, and the bytes of its data. Every byte must belong to exactly one tensor.

    Reads nothing but the header. Raises ArtifactError.
    """
    try:
        total = path.stat().st_size
        with open(path, "rb") as file:
            first = file.read(9)
            length = int.from_bytes(first[:8], "little")
            if first[8:] != b"{" or length > min(total - 8, _HEADER_BYTES):
                raise ArtifactError(f"{path}: {_no_header(first, total)}")
            text = first[8:] + file.read(length - 1)
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read ({error.strerror or error}).") from error
    try:
        held = parse_json(text, named=f"{path}: its header", error=ArtifactError, mend="Copy or download it again.")
        entries = {name: _entry(value) for name, value in held.items() if name != "__metadata__"}
    except (ValueError, TypeError, KeyError) as error:
        raise ArtifactError(f"{path}: its safetensors header is damaged. Copy or download it again.") from error

    data, at = total - 8 - length, 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != at or entry.end - entry.begin != math.prod(entry.shape) * DTYPE_BYTES[entry.dtype]:
            raise ArtifactError(
                f"{path}: the header places {name!r} ({entry.dtype}, shape {list(entry.shape)}) at bytes {entry.begin} "
                f"to {entry.end}, which does not fit: edited or damaged. Copy or download it again."
            )
        at = entry.end
    if at != data:
        state = "truncated" if data < at else "longer than its header says"
        raise ArtifactError(f"{path}: {state} ({data} bytes of data, expected {at}). Copy or download it again.")
    return entries, data


def _no_header(first: bytes, total: int) -> str:
    if first[:2] == b"PK" or (first[:1] == b"\x80" and first[8:] != b"{"):
        return "is a pickle under another name, and is not opened. checkpoint= reads such files, weights only."
    return (
        f"has {total} bytes and no whole safetensors header: truncated, or another kind of file. "
        "Copy or download it again."
    )


def _entry(value: Any) -> Entry:
    begin, end = value["data_offsets"]
    shape = tuple(value["shape"])
    if value["dtype"] not in DTYPE_BYTES or any(type(n) is not int or n < 0 for n in (*shape, begin, end)):
        raise ValueError
    return Entry(dtype=value["dtype"], shape=shape, begin=begin, end=end)
