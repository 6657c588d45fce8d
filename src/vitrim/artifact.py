"""A folder as the Hub has it: one model, what it is, how it was cut and where it comes from. Never a pickle.

    config.json        schema, spec, task, preprocess, labels, gate policy
    model.safetensors  the tensors, named as the model names them
    selection.json     which dense units survived, step by step
    provenance.json    source, method, versions, data, seed, metrics; the sha256 of model.safetensors
    README.md          the model card

Reading needs torch and safetensors only, runs no code of the folder, and compares the header of the weights with what
the spec says before it takes memory. Writing goes to a temporary folder on the same disk, is flushed to the disk, and
is renamed: a folder under its final name is whole, or is not there.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, is_dataclass, replace
from pathlib import Path, PureWindowsPath
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .errors import ArtifactError, SpecError
from .files import (
    DTYPE_BYTES,
    is_marked,
    make_whole,
    names_in,
    read_header,
    refuse_foreign,
    refuse_no_utf8,
    replace_within,
    sha256,
    sync_file,
    whose_folder,
    write_json,
    write_text,
)
from .foreign import read_json
from .model import Vit, not_finite
from .spec import Config, ModelSpec, Selection, has_own_positions

CONFIG, WEIGHTS, SELECTION = "config.json", "model.safetensors", "selection.json"
PROVENANCE, CARD = "provenance.json", "README.md"
NEEDED = (CONFIG, WEIGHTS, SELECTION, PROVENANCE)
FILES = (*NEEDED, CARD)

_DAMAGED = "It was edited or damaged, or is no file of vitrim's: copy or download the folder again."
_ROOM = 1 << 24  # numbers that any network may ask for one image, however small its weights: 64 MB
_ROOM_BY_NUMBER = 256  # and so many more for each of its weights: a DeiT-S may ask for images of 8192 px
_FLOATS = ("F64", "F32", "F16", "BF16")
_NAME_OF_DTYPE = {torch.bool: "BOOL", torch.uint8: "U8", torch.int32: "I32", torch.int64: "I64"}

# An absolute path in a text: a root, a drive or a home, then at least one folder. Not the slashes of a URL or of "a/b".
_FOLDERS = re.compile(
    r"(?:(?<=^)|(?<=[\s'\"`=(\[{,;:]))(?:file:/{2,3}|~\w*[/\\]|[A-Za-z]:[/\\]|/(?!/)|\\{1,2})(?:[^\s'\"/\\]+[/\\])+"
)


class HasModel(Protocol):
    """What a compression gives: the network under `model`, and what made it."""

    @property
    def model(self) -> Vit: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Contents:
    """What a folder says of its model, without the weights."""

    config: Config
    selection: Selection
    provenance: dict[str, Any]


# ------------------------------------------------------------------------------------------------------------ writing


def save(
    thing: nn.Module | HasModel,
    folder: str | os.PathLike[str],
    *,
    provenance: Mapping[str, Any] | None = None,
    force: bool = False,
    like: str | os.PathLike[str] | None = None,
    half: bool = False,
) -> Path:
    """Write a model as an artifact and return its folder.

    thing: a model, or what a compression gave (its method and history then go into the provenance).
    provenance: keys to set over those that the model (or `like`) brought; keys that nobody knows are kept.
    force: replace the artifact that stands in the folder. Other files there are left as they are.
    like: the folder whose config, selection and provenance the model takes: for one that was trained further by hand.
    half: store half precision; it is read back as float32.
    Positions that were made for another grid of patches than the model's own are written as they are used there, resized once.

    Figures measured on other weights are no longer the model's own: where the weights changed since, and no new
    `metrics` are given, the old ones are moved under "parent". Absolute paths in the provenance lose their folders.
    Raises ArtifactError; the folder is then as it was before.
    """
    folder = Path(os.path.abspath(folder))
    folder = folder.resolve() if folder.is_dir() else folder  # a link of the user's to a folder stays a link
    refuse_overwriting(folder, force=force)
    model = _network(thing)
    contents = _contents_of(model, like)
    if isinstance(model, Vit) and not has_own_positions(model.spec):  # else every forward pass resizes them anew
        from .surgery import resized

        own = resized(model, model.spec.image_px)
        if contents.config.spec == model.spec:
            contents = replace(contents, config=replace(contents.config, spec=own.spec))
        model = own
    if isinstance(model, Vit) and contents.config.spec != model.spec:
        raise ArtifactError(
            f"{os.fspath(like or '')}: its spec is not the model's ({_difference(contents.config.spec, model.spec)}). "
            "By like= name the folder that the model was loaded from, or leave `like` out."
        )
    tensors = _tensors(model, half=half)
    if (bad := not_finite(tensors)) is not None:
        raise ArtifactError(
            f"the model is not saved: {bad}; expected finite weights. Go back to a checkpoint from before, and train with a "
            "lower lr."
        )
    _compare(_shapes_in_memory(tensors), expected_tensors(contents.config), "the model")
    if (too_big := _out_of_proportion(contents.config, sum(t.numel() for t in tensors.values()))) is not None:
        raise ArtifactError(
            f"{too_big}, too much for so few weights: such a folder would not load. Use smaller images."
        )
    known: dict[str, Any] = {**contents.provenance, **_facts_of(thing), **_plain(provenance or {}, "provenance")}
    known["versions"] = _versions()

    def fill(staging: Path) -> None:
        save_file(tensors, staging / WEIGHTS, metadata={"format": "pt"})
        sync_file(staging / WEIGHTS)
        own = _with_hash(known, sha256(staging / WEIGHTS), given=provenance or {})
        write_json(staging / CONFIG, contents.config.to_dict())
        write_json(staging / SELECTION, contents.selection.to_dict())
        write_json(staging / PROVENANCE, own)
        from .card import card  # the card counts and formats; loading needs neither

        write_text(staging / CARD, card(contents.config, contents.selection, own))

    try:
        if folder.exists():
            replace_within(folder, fill, names=FILES)
        else:
            make_whole(folder, fill)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(_why_not_written(folder, error)) from error
    return folder


def refuse_overwriting(folder: Path, *, force: bool) -> None:
    """Raise ArtifactError where something stands at `folder` that is not an empty folder, unless `force` replaces it.

    Raises ConfigError where `force` would replace what is no artifact.
    """
    if os.path.lexists(folder) and not folder.is_dir():
        raise ArtifactError(f"{folder}: is a file; expected a folder to write. Give another name.")
    try:
        found = names_in(folder)
    except OSError as error:
        raise ArtifactError(_why_not_written(folder, error)) from error
    if found and not force:
        raise ArtifactError(
            f"{folder}: exists and holds {found[0]!r}; nothing is overwritten unasked. "
            "Give another folder, or force=True (--force)."
        )
    refuse_foreign(folder, ours=is_marked(folder / PROVENANCE), taken=[name for name in FILES if name in found])


def _why_not_written(folder: Path, error: Exception) -> str:
    text = str(error)
    number = getattr(error, "errno", None) or int((re.findall(r"os error (\d+)", text) or [0])[0])  # Rust says it so
    mend = {
        errno.ENOSPC: "Free space on that disk, or give a folder on another one.",
        errno.EDQUOT: "Free space within your quota, or give a folder elsewhere.",
        errno.EROFS: "The file system is read-only: give a folder that can be written.",
        errno.EACCES: "Give a folder in which you may write.",
        errno.EPERM: "Give a folder in which you may write.",
    }.get(number, "Give a folder in which files can be written.")
    why = (getattr(error, "strerror", None) or text).rstrip(".")
    return f"{folder}: could not be saved ({why}); what stood there is unchanged. {mend}"


# --------------------------------------------------------------------------------------------------- what gets written


def _network(thing: Any) -> nn.Module:
    """The model itself, out of a compression's result or a wrapper of torch (compiled, data-parallel)."""
    if not isinstance(thing, nn.Module):
        thing = getattr(thing, "model", thing)
    while not isinstance(thing, Vit):
        inner = next(
            (m for name in ("_orig_mod", "module") if isinstance(m := getattr(thing, name, None), nn.Module)), None
        )
        if inner is None:
            break
        thing = inner
    if not isinstance(thing, nn.Module):
        raise ArtifactError(
            f"cannot save a {type(thing).__name__}; expected a model of vitrim, or what vitrim.compress gave. "
            "Take a model of timm in by vitrim.from_model first."
        )
    return thing


def _contents_of(model: nn.Module, like: str | os.PathLike[str] | None) -> Contents:
    if like is not None:
        return inspect(like, weights=False)
    if not isinstance(model, Vit):
        raise ArtifactError(
            f"cannot save a {type(model).__name__}; expected a model of vitrim. "
            "Take a model of timm in by vitrim.from_model first, or name by like= the folder whose weights it holds."
        )
    return Contents(
        config=model.config,
        selection=model.selection,
        provenance=_plain(model.provenance or {}, "the model's provenance"),
    )


def _difference(saved: ModelSpec, own: ModelSpec) -> str:
    there, here = saved.to_dict(), own.to_dict()
    for key in here:
        if key != "blocks" and here[key] != there.get(key):
            return f"{key}: {there.get(key)!r} there, {here[key]!r} in the model"
    if len(here["blocks"]) != len(there["blocks"]):
        return f"{len(there['blocks'])} blocks there, {len(here['blocks'])} in the model"
    at = next(i for i, (a, b) in enumerate(zip(here["blocks"], there["blocks"], strict=True)) if a != b)
    return f"block {at} differs"


def _facts_of(thing: Any) -> dict[str, Any]:
    """What a compression's result tells of itself beyond its model."""
    if isinstance(thing, nn.Module):
        return {}
    told = {key: getattr(thing, key, None) for key in ("method", "variant", "history", "report")}
    return _plain({key: value for key, value in told.items() if value}, "the result")


def _tensors(model: nn.Module, *, half: bool) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if tensor.is_meta:
            raise ArtifactError(f"{name} has no numbers: it is on the device 'meta'. Load the model's weights before.")
        value = tensor.detach().to("cpu")
        if half and value.is_floating_point():
            small = value.to(torch.float16)
            if not torch.isfinite(small).all() and torch.isfinite(value).all():
                raise ArtifactError(
                    f"{name}: {value.abs().max().item():.3g} does not fit half precision (65504). Save with half=False."
                )
            value = small
        out[name] = value.clone(memory_format=torch.contiguous_format)  # safetensors refuses views of one storage
    return out


def _versions() -> dict[str, str]:
    import platform

    from . import __version__

    return {"vitrim": __version__, "torch": torch.__version__, "python": platform.python_version()}


def _with_hash(known: dict[str, Any], digest: str, *, given: Mapping[str, Any]) -> dict[str, Any]:
    """Add the weights' own hash, and move what was measured on other weights out of the way."""
    before = known.get("sha256")
    out = {**known, "sha256": digest}
    metrics = known.get("metrics")
    if before not in (None, digest) and "metrics" not in given and isinstance(metrics, dict) and "after" in metrics:
        out["metrics"] = {key: value for key, value in metrics.items() if key != "after"}
        out["parent"] = {"sha256": before, "metrics": metrics}
    return out


def _plain(value: Any, where: str) -> Any:
    """As JSON has it: tuples become lists, numbers of numpy and torch plain ones, nan and infinity null."""
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if value - value == 0 else None
    if isinstance(value, str | os.PathLike):
        return _without_folders(os.fsdecode(value).encode("utf-8", "backslashreplace").decode("utf-8"))
    if isinstance(value, Mapping):
        return {_without_folders(str(key)): _plain(inner, f"{where}[{key!r}]") for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner, f"{where}[{i}]") for i, inner in enumerate(value)]
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value), where)
    if callable(getattr(value, "item", None)) and getattr(value, "shape", None) in ((), torch.Size([])):
        return _plain(value.item(), where)
    raise ArtifactError(
        f"{where} is a {type(value).__name__}; expected what JSON can say: text, numbers, lists, dicts, None. "
        "Turn it into text or numbers."
    )


def _without_folders(text: str) -> str:
    """Cut absolute paths to their last part: they name a machine and a person, and say nothing elsewhere."""
    if text.startswith("/") and text.count("/") == 1 and len(text) > 1:
        return text[1:]
    if PureWindowsPath(text).drive and PureWindowsPath(text).root and "\n" not in text:
        return PureWindowsPath(text).name
    if text.startswith(("/", "~/")) and "\n" not in text and os.path.isabs(os.path.expanduser(text)):
        return text.rstrip("/").rsplit("/", 1)[-1]  # a whole path, which may hold spaces
    return _FOLDERS.sub("", text)


# ------------------------------------------------------------------------------------------------------------ reading


def load(folder: str | os.PathLike[str]) -> Vit:
    """Read an artifact: a float32 model on the CPU, in eval mode. Raises ArtifactError."""
    root = Path(folder)
    contents = inspect(root)
    with torch.device("meta"):  # no memory and no random numbers for values that are about to be replaced
        model = Vit(contents.config, selection=contents.selection, provenance=contents.provenance)
    try:
        stored = load_file(_own_file(root, WEIGHTS), device="cpu")
        # copies: what safetensors gives may be the file itself, mapped into memory
        state = {
            name: t.to(torch.float32 if t.is_floating_point() else t.dtype, copy=True) for name, t in stored.items()
        }
    except (OSError, SafetensorError) as error:
        raise ArtifactError(
            f"{root / WEIGHTS}: cannot be read ({error}). Copy or download the folder again."
        ) from error
    if (bad := not_finite(state)) is not None:
        raise ArtifactError(
            f"{root / WEIGHTS}: {bad}; expected finite weights. Copy or download it again, or train it anew with a lower lr."
        )
    model.load_state_dict(state, strict=True, assign=True)
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers())), "a tensor outside the state dict"
    return model.eval()


def inspect(folder: str | os.PathLike[str], *, weights: bool = True) -> Contents:
    """Check a folder and say what it holds, building nothing.

    weights: also compare the header and the hash of model.safetensors; False where it need not be there.
    Raises ArtifactError with the file, what is wrong and how to mend it.
    """
    root = Path(folder)
    if not root.is_dir():
        what = "is a file, not a folder" if root.exists() else "does not exist"
        raise ArtifactError(f"{root}: {what}; expected a folder that vitrim saved, with {CONFIG} and {WEIGHTS} in it.")
    refuse_no_utf8(root, error=ArtifactError)
    raw = _read_json(root, CONFIG)
    if not {"spec", "schema"} & set(raw):
        raise ArtifactError(f"{root}: {whose_folder(raw, root)}")
    config = _decoded(root / CONFIG, Config.from_dict, raw)
    selection = _decoded(root / SELECTION, Selection.from_dict, _read_json(root, SELECTION))
    provenance = _read_json(root, PROVENANCE)
    if weights:
        path = _own_file(root, WEIGHTS)
        check_weights(path, config)
        if sha256(path) != provenance.get("sha256"):
            raise ArtifactError(
                f"{path}: is not the file that was saved (its sha256 differs from the one in {PROVENANCE}): edited, or "
                "damaged on the way. Copy or download the folder again; to keep changed weights, save them with like=."
            )
    return Contents(config=config, selection=selection, provenance=provenance)


def expected_tensors(config: Config) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> (dtype, shape) of every tensor of the network, computed without taking memory. Raises ArtifactError."""
    try:
        with torch.device("meta"):
            model = Vit(config)
    except SpecError as error:
        raise ArtifactError(str(error)) from error
    except (RuntimeError, OverflowError, TypeError, MemoryError) as error:
        raise ArtifactError(f"the spec asks for tensors that no memory can hold ({error}).") from error
    return _shapes_in_memory(model.state_dict())


def check_weights(path: Path, config: Config) -> None:
    """Compare the header of a safetensors file with what the spec says; reads nothing but the header."""
    header, data_bytes = read_header(path)
    numbers = data_bytes // min(DTYPE_BYTES[name] for name in _FLOATS)
    if (too_big := _beyond(config, numbers) or _out_of_proportion(config, numbers)) is not None:
        raise ArtifactError(
            f"{path}: {too_big}, but the file holds {data_bytes} bytes of numbers in all. The folder's files do not "
            "belong together: copy or download it again."
        )
    _compare({name: (entry.dtype, entry.shape) for name, entry in header.items()}, expected_tensors(config), str(path))


def _shapes_in_memory(tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {
        name: ("F32" if t.is_floating_point() else _NAME_OF_DTYPE[t.dtype], tuple(t.shape))
        for name, t in tensors.items()
    }


def _compare(
    found: Mapping[str, tuple[str, tuple[int, ...]]], expected: Mapping[str, tuple[str, tuple[int, ...]]], where: str
) -> None:
    """Any precision of floats will do: they are read back as float32."""
    for name, (dtype, shape) in expected.items():
        if name not in found:
            raise ArtifactError(
                f"{where}: has no tensor {name!r}, which the spec asks for (shape {list(shape)}). "
                "They do not belong together."
            )
        kind, there = found[name]
        if there != shape or (kind != dtype and not (kind in _FLOATS and dtype in _FLOATS)):
            raise ArtifactError(
                f"{where}: {name!r} is {kind} of shape {list(there)}; the spec asks for {dtype}, shape {list(shape)}. "
                "They do not belong together."
            )
    if extra := sorted(set(found) - set(expected)):
        raise ArtifactError(
            f"{where}: holds {extra[0]!r}{f' and {len(extra) - 1} more' if extra[1:] else ''}, which the spec does not "
            "know. They do not belong together."
        )


def _beyond(config: Config, numbers: int) -> str | None:
    """The first size in a spec above the count of all numbers in the file, of which each size is a tensor's side."""

    def sizes(value: Any, where: str) -> Iterator[tuple[str, int]]:
        if isinstance(value, dict):
            for key, inner in value.items():
                yield from sizes(inner, f"{where}.{key}")
        elif isinstance(value, list):
            for i, inner in enumerate(value):
                yield from sizes(inner, f"{where}[{i}]")
        elif isinstance(value, int) and not isinstance(value, bool):
            yield where, value

    spec = config.to_dict()["spec"]
    for part in ("width", "channels", "stem", "blocks", "pool", "outputs"):
        for where, size in sizes(spec[part], part):
            if ".steps[" not in where and size > numbers:
                return f"the spec says {where}={size}"
    return None


def _out_of_proportion(config: Config, numbers: int) -> str | None:
    """What one image would take that the weights of the file do not warrant: pixels, tokens, scores. None where all do."""
    spec, most = config.spec, _ROOM + _ROOM_BY_NUMBER * numbers
    sides = [spec.image_px] + ([] if config.preprocess is None else [config.preprocess.size_px])
    for height, width in sides:
        if spec.channels * height * width > most:
            return f"the spec says images of {height} x {width} px"
        tokens = len(spec.prefix) + (height // spec.patch_px[0]) * (width // spec.patch_px[1])
        heads = max((block.attention.heads for block in spec.blocks if block.attention is not None), default=0)
        if tokens * spec.width > most or tokens * tokens * heads > most:
            return f"the spec says {tokens} tokens in an image of {height} x {width} px"
    return None


def _read_json(root: Path, name: str) -> dict[str, Any]:
    return read_json(_own_file(root, name), error=ArtifactError, mend=_DAMAGED)


def _decoded(path: Path, decode: Callable[[Any], Any], raw: dict[str, Any]) -> Any:
    try:
        return decode(raw)
    except SpecError as error:
        raise ArtifactError(f"{path}: {error}") from error


def _own_file(root: Path, name: str) -> Path:
    """The path of a file that lies in the folder itself, or behind the Hub cache's own links."""
    path = root / name
    try:
        real, home = path.resolve(strict=True), root.resolve(strict=True)
        regular = stat.S_ISREG(real.stat().st_mode)
    except FileNotFoundError as error:
        names = sorted(entry.name for entry in root.iterdir())
        members = [name for name in names if (root / name / CONFIG).is_file()]
        if members and "family.json" in names:
            raise ArtifactError(
                f"{root}: is a family, a folder for each budget. Expected one of them, such as {root / members[0]}."
            ) from error
        if "stages" in names:
            raise ArtifactError(
                f"{root}: is a run that has not finished. The same `vitrim compress` with --resume ends it."
            ) from error
        others = names[:5]
        raise ArtifactError(
            f"{path}: is missing; the folder holds {', '.join(others) or 'nothing'}. "
            f"Expected a folder that vitrim saved, with {', '.join(NEEDED)}."
        ) from error
    except (OSError, RuntimeError) as error:
        raise ArtifactError(f"{path}: cannot be read ({error}).") from error
    if not real.is_relative_to(home) and not any(real.is_relative_to(store) for store in _hub_stores(home)):
        raise ArtifactError(
            f"{path}: is a link that leaves the folder, and is not followed. Put the file itself there."
        )
    if not regular:
        raise ArtifactError(f"{path}: is not a regular file. Expected a folder that vitrim saved.")
    return path


def _hub_stores(home: Path) -> tuple[Path, ...]:
    """Where huggingface_hub keeps the files that its snapshots (CACHE/models--USER--NAME/snapshots/REV) link to."""
    repo = home.parent.parent
    if home.parent.name != "snapshots" or not repo.name.startswith("models--"):
        return ()
    return (repo / "blobs", repo.parent / "blobs")  # the repository's own store, and the one that repositories share
