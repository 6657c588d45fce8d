"""Local files of weights: `.safetensors`, or `.pth`, `.pt`, `.bin` and the like, read without running their code.

`states` finds the set of weights in a training checkpoint; `weights` takes it to the names of a family: split queries, keys and
values are joined. Nothing is left out but classifiers, and those only where the caller asks for none (`without_heads`).
Files of other libraries are refused by what they are, with the way to a file that is read.
"""

from __future__ import annotations

import argparse
import logging
import math
import pickle
import re
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .. import __version__
from ..errors import SourceError
from ..files import make_whole, refuse_no_utf8, sync_file, write_json
from ..foreign import read_json
from . import flax
from .states import MERGE, SAVE, chosen, is_plain, row_of
from .states import listed as listed

WEIGHTS, CONFIG = "model.safetensors", "config.json"
"""Files of a folder that `write` makes, as timm, transformers and the Hub name them."""
MARK = {"vitrim": __version__}
"""What an export says in its config, or in the header of its one file: `force` replaces nothing else."""
NETWORK = ("huggingface_hub", "httpx", "httpcore", "requests", "urllib3")
"""Packages whose errors mean that a download failed or broke off."""
SPLIT = tuple(
    tuple(style.format(part) for part in parts)
    for style in ("{}", "{}_proj", "to_{}", "w{}", "{}_proj_weight")
    for parts in (("q", "k", "v"), ("query", "key", "value"))
)
"""Names under which files hold queries, keys and values apart, beside where a family joins them."""
EXPECTED = "expected a .safetensors, .pth or .pt file"
CONVERT = "Only weights of PyTorch are read: load the model in its library, and save a state dict with the names of timm's or transformers' model by torch.save"
BEGINNINGS = (
    (b"\x1f\x8b", "compressed by gzip. Unpack it first"),
    (b"\xfd7zXZ", "compressed by xz. Unpack it first"),
    (b"7z\xbc\xaf", "an archive of 7-Zip. Unpack it first"),
    (b"\x89HDF", f"an HDF5 file, as Keras and TensorFlow write. {CONVERT}"),
    (b"GGUF", f"a GGUF file, which holds quantised weights. {CONVERT}"),
    (
        b"version https://git-lfs",
        "a pointer of Git LFS and not the file itself. Fetch it by git lfs pull, or download it again",
    ),
    (b"<", "a web page or XML, not weights: the download gave a page in place of the file. Download it again"),
    (b"{", "JSON, not weights. Give the .safetensors, .pth or .pt file"),
)
"""How files begin that are none of weights, and what each is."""
ENDINGS = {
    ".onnx": "an ONNX graph, whose names are not those of the weights. Give the file of weights that it was exported from",
    ".npy": f"an array of NumPy. {CONVERT}",
    ".msgpack": f"a file of Flax. {CONVERT}",
    ".tflite": f"a model of TensorFlow Lite. {CONVERT}",
    ".pdparams": f"a file of PaddlePaddle. {CONVERT}",
    ".index": f"a checkpoint of TensorFlow. {CONVERT}",
    ".engine": "an engine of TensorRT. Give the file of weights that it was built from",
}
"""What a file is by its ending, where its beginning does not say."""
KINDS = (
    (
        r"_(orig|mask)$",
        "These are weights under pruning masks: call torch.nn.utils.prune.remove(part, 'weight') on each pruned part before.",
    ),
    (
        r"\.parametrizations\.|weight_[guv]$",
        "These are parametrised weights: call torch.nn.utils.parametrize.remove_parametrizations (or remove_weight_norm) before saving.",
    ),
    (
        r"\.(attn|self_attention)\..*(bitsandbytes|absmax|quant_map|qweight|qzeros|scales)$",
        "These are quantised weights: give those that they were made from.",
    ),
    (
        r"(^|[._])flat_param$",
        "These are flattened shards of FSDP: save a full state dict (StateDictType.FULL_STATE_DICT, or get_model_state_dict with full_state_dict=True).",
    ),
    (
        r"layers\.\d+\.ffn\.layers\.",
        "These are names of MMPretrain: rename them to timm's (layers to blocks, ln1 to norm1, ln2 to norm2, ffn.layers.0.0 to mlp.fc1, ffn.layers.1 to mlp.fc2, projection to proj).",
    ),
    (r"(^|\.)tokens_to_token\.", "These are names of T2T-ViT: t2t:NAME."),
    (r"(^|\.)blocks\.\d+\.attention\.(qkv|out)", "These are names of vitrim: load the folder that they are in."),
    (r"(^|\.)(conv_proj\.|encoder\.layers\.encoder_layer_\d)", "These are names of torchvision: torchvision:NAME."),
    (
        r"(^|\.)(embeddings\.(patch_embeddings?|class_embedding|cls_token)|patch_embeddings\.projection)\b",
        "These are names of Hugging Face's transformers: hf:FOLDER.",
    ),
    (
        r"(^|\.)transformer\.resblocks\.",
        "These are names of OpenAI's CLIP: timm:NAME of a CLIP model, such as vit_base_patch16_clip_224.",
    ),
    (
        r"(relative_position_bias_table|rel_pos_[hw]$|downsample\.reduction)",
        "This is a network with windows or relative positions (Swin, SAM), which vitrim does not read.",
    ),
    (
        r"(^|\.)(layer1\.0\.conv1|features\.0\.0|stages\.0\.)",
        "This is a convolutional or hierarchical network, which vitrim does not read.",
    ),
    (r"(^|\.)patch_embed\.proj\.", "These are names of timm: timm:NAME."),
)
"""Whose names tensors have, by a pattern, and what to do with such a file."""
LOG = logging.getLogger("vitrim.sources")


def read(path: Path, expected: Mapping[str, Tensor] | None = None, *, key: str | None = None) -> dict[str, Tensor]:
    """The weights in a file by name, on the CPU, as the file has them. Raises SourceError.

    expected: a family's own tensors by name, by which a set of weights is known.  key: path of the set in the file.
    """
    found = _opened(path)
    row = row_of(found, file=path.name) if isinstance(found, (Mapping, list, tuple)) else None
    if row is None or not row.tensors:
        what = "nothing" if found in (None, {}) else "no tensors" if row else f"a {type(found).__name__}"
        raise SourceError(f"{path.name} holds {what}, not weights by name. Save them by {SAVE}.")
    return chosen(row, expected or {}, file=path.name, key=key)


def weights(
    path: Path, expected: Mapping[str, Tensor], *, key: str | None = None, older: Mapping[str, str] | None = None
) -> dict[str, Tensor]:
    """A file's weights under a family's names, as far as that changes no number: what still does not fit, `check` says.

    expected: the family's own tensors by name.  key: as of `read`.  older: parts of names that the family had before, with
    what they are today.  Raises SourceError, also where a weight is stored as whole numbers (quantised).
    """
    aliases = {name.replace(now, was): value for name, value in expected.items() for was, now in (older or {}).items()}
    state = read(path, {**aliases, **expected}, key=key)
    for was, now in (older or {}).items():
        state = {name.replace(was, now): value for name, value in state.items()}
    return reconciled(state, expected, file=path.name)


def reconciled(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, file: str) -> dict[str, Tensor]:
    """The tensors with split queries, keys and values joined where a family joins them."""
    state = dict(state)
    for name in expected:
        if name not in state:
            _join(state, name)
    whole = [
        f"{key} ({str(value.dtype).removeprefix('torch.')})"
        for key, value in state.items()
        if key in expected and expected[key].is_floating_point() and not value.is_floating_point()
    ]
    if odd := [key for key, value in state.items() if key in expected and (not is_plain(value) or value.is_complex())]:
        raise SourceError(
            f"{file} holds tensors that are sparse, complex, quantised or without numbers: {listed(odd)}. Save dense weights in floating point."
        )
    if whole:
        raise SourceError(
            f"{file} holds whole numbers instead of weights in floating point: {listed(whole)}. A quantised model is not read; "
            "save the weights that it was made from."
        )
    return state


def without_heads(state: Mapping[str, Tensor], *, file: str) -> dict[str, Tensor]:
    """The tensors without classifiers of any name, auxiliary ones included; what goes is told in the log."""
    gone = [key for key in state if _is_head(key)]
    if gone:
        LOG.info("%s: without its classifier: %s.", file, listed(gone))
    return {key: value for key, value in state.items() if key not in gone}


def with_classifier(
    state: Mapping[str, Tensor], weight: str, classes: int | None, *, file: str
) -> tuple[dict[str, Tensor], int]:
    """A file's tensors and the classes of its classifier, 0 without one. Raises SourceError for other classes than asked for.

    weight: name of the classifier's matrix.  classes: None takes what the file has, 0 leaves every classifier out.
    """
    state = with_plain_head(state, weight.removesuffix(".weight"), file=file)
    found = state[weight].shape[0] if weight in state else 0
    if stays(classes, found, f"the classifier in {file} has"):
        return dict(state), found
    return without_heads(state, file=file), 0


def with_plain_head(state: Mapping[str, Tensor], head: str, *, file: str) -> dict[str, Tensor]:
    """The tensors with the one linear of a classifier under the name `head`, where a file has it in a list or in its place.

    torchvision's `heads.head` is `heads` or `heads.0` where it was replaced; dropout before it has no tensors.
    """
    place = head.partition(".")[0]
    found = [key for key in state if key.startswith(f"{place}.")]
    ends = {key.removeprefix(place).rpartition(".")[0] for key in found}
    kinds = {key.rpartition(".")[2]: state[key].dim() for key in found}
    named = next(iter(ends), "")
    if len(ends) != 1 or kinds.get("weight") != 2 or kinds.get("bias", 1) != 1 or set(kinds) - {"weight", "bias"}:
        return dict(state)
    if f"{place}{named}" == head or not re.fullmatch(r"(\.head)?(\.\d+)*", named):
        return dict(state)
    LOG.info("%s: the linear %s%s is the classifier.", file, place, named)
    return {f"{head}.{key.rpartition('.')[2]}" if key in found else key: value for key, value in state.items()}


def stays(classes: int | None, found: int, where: str) -> bool:
    """Whether a classifier stays as it is; else, with classes=0, it goes. Raises SourceError for other classes than there are.

    where: what has so many, for the sentence.
    """
    if classes not in (None, 0, found):
        raise SourceError(
            f"classes={classes}: {where} {found} classes. Leave classes out to keep them, or give the model a new head "
            "(`vitrim train --new-head`)."
        )
    return classes != 0


def another_size(path: Path, own: Sequence[int], name: str, asked: Sequence[int], fits: str = "") -> SourceError:
    """The error for a file of another image size than the name's; both as (height, width).  fits: names of its own size."""
    return SourceError(
        f"{path.name} was made for images of {px(own)}, and {name!r} is for {px(asked)}. Pass the size to run it at: --image-px "
        f"{','.join(map(str, dict.fromkeys(own)))} (image_px=) is its own, and for another one its positions are resized, once; or "
        f"name the model that it was saved from{fits}."
    )


def table_px(
    patches: int, own: tuple[int, int], patch_px: Sequence[int], asked: tuple[int, int] | None
) -> tuple[int, int]:
    """The image size (height, width) of a file whose positions are for so many patches: a square, or the size asked for.

    own: the size that the name says, taken where it has as many, and where nothing fits: the comparison of shapes says so then.
    """
    height, width = patch_px
    side = math.isqrt(max(patches, 0))
    sizes = [own, (side * height, side * width), *([] if asked is None else [asked])]
    return next((size for size in sizes if (size[0] // height) * (size[1] // width) == patches > 0), own)


def px(sides: Sequence[int]) -> str:
    """Height and width, for a sentence."""
    return f"{sides[0]} x {sides[1]} px"


def unfetched(name: str, why: str) -> SourceError:
    """The error for weights that cannot be had."""
    return SourceError(
        f"the weights of {name!r} are not on this machine and could not be fetched ({why}). Pass a local file "
        "(--checkpoint PATH, checkpoint=), or take random weights (--no-pretrained, pretrained=False)."
    )


def fill(
    module: nn.Module, state: Mapping[str, Tensor], path: Path, model: str, fitting: Callable[[], str] = lambda: ""
) -> nn.Module:
    """A module with a file's numbers in float32, in eval mode. Raises SourceError listing what does not fit.

    fitting: names of other models that the file fits, for a sentence.
    """
    check(path, state, {key: tuple(value.shape) for key, value in module.state_dict().items()}, model, fitting)
    module.load_state_dict({key: value.float() for key, value in state.items()}, strict=True, assign=True)
    return module.eval()


def write(
    out: Path, state: Mapping[str, Tensor], config: Mapping[str, Any], *, metadata: Mapping[str, str] | None = None
) -> Path:
    """A folder with `model.safetensors` and `config.json`, whole or not at all; gives the folder. Raises SourceError.

    metadata: further texts for the header of the weights.
    """

    def put(staging: Path) -> None:
        save_file(dict(state), staging / WEIGHTS, metadata={"format": "pt", **(metadata or {})})
        sync_file(staging / WEIGHTS)
        write_json(staging / CONFIG, {**config, **MARK})

    return write_folder(out, put)


def write_folder(out: Path, put: Callable[[Path], None]) -> Path:
    """A folder that `put` fills, whole or not at all; gives the folder. Raises SourceError where it cannot be."""
    if out.exists():
        raise SourceError(f"{out.name!r} is there already; choose another name, or remove it.")
    with written_or_said(out):
        make_whole(out, put)
    return out


@contextmanager
def written_or_said(out: Path) -> Iterator[None]:
    """Tells as SourceError that a place cannot be written."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise SourceError(
            f"{out.name!r} could not be written ({getattr(error, 'strerror', None) or error}); nothing is left of it. Give a "
            "folder in which files can be written."
        ) from error


def check(
    path: Path,
    state: Mapping[str, Tensor],
    expected: Mapping[str, tuple[int, ...]],
    model: str,
    fitting: Callable[[], str] = lambda: "",
) -> None:
    """Raises SourceError listing what is missing, unexpected or misshapen, at most ten names of each.  fitting: as of `fill`."""
    found = {key: tuple(value.shape) for key, value in state.items()}
    missing = [key for key in expected if key not in found]
    unexpected = [key for key in found if key not in expected]
    shapes = [(key, found[key], expected[key]) for key in expected if key in found and found[key] != expected[key]]
    if faults := misfits(missing, unexpected, shapes):
        only_heads = not missing and not shapes and all(_is_head(key) for key in unexpected)
        mend = " Or leave every classifier out (classes=0)." if only_heads else advice(unexpected)
        mend = mend if missing or unexpected else oblong(shapes)
        if any(0 in found[key] for key, *_ in shapes):
            mend = " Its tensors are empty, as DeepSpeed's ZeRO-3 leaves them: make one file of the folder by its zero_to_fp32.py."
        raise SourceError(
            f"{path.name} does not fit {model}; {faults}. Name the model that it was saved from{fitting()}.{mend}"
        )


def misfits(
    missing: Iterable[str], unexpected: Iterable[str], shapes: Iterable[tuple[str, Iterable[int], Iterable[int]]]
) -> str:
    """What does not fit, for a sentence, at most ten names of each; "" where all fits.

    shapes: names with the shape that was found and the one that was expected.
    """
    odd = [f"{key} {tuple(found)} (expected {tuple(expected)})" for key, found, expected in shapes]
    kinds = {"missing": list(missing), "unexpected": list(unexpected), "of another shape": odd}
    return "; ".join(f"{what}: {listed(names)}" for what, names in kinds.items() if names)


def oblong(shapes: Collection[tuple[str, Iterable[int], Iterable[int]]]) -> str:
    """What to do where positions alone have another shape; "" for other tensors.  shapes: as of `misfits`."""
    if not shapes or not all(re.search(r"(^|\.)pos", name) or "position" in name for name, *_ in shapes):
        return ""
    return " If it was made for images that are no squares, pass their height and width: --image-px H,W (image_px=)."


def advice(names: Iterable[str]) -> str:
    """What to do about tensors that do not fit, by whose names they have; "" for names of no known kind."""
    every = list(names)
    return next((f" {words}" for pattern, words in KINDS if any(re.search(pattern, name) for name in every)), "")


def _opened(path: Path) -> Any:
    """What is in a file. Raises SourceError naming what it is, where it is none of weights."""
    if path.is_dir():
        raise _folder(path)
    if not path.is_file():
        mend = "it is an address: download the file, and name it here" if re.match(r"[a-z]+:/", str(path)) else EXPECTED
        raise SourceError(f"checkpoint {str(path)!r} is not there; {mend}.")
    if path.name.endswith(".index.json"):
        return _shards(path)
    if (arrays := _arrays(path)) is not None:
        return arrays
    if other := _foreign(path):
        raise SourceError(f"{path.name} is {other}.")
    if not _is_safetensors(path):
        return _unpickled(path)
    refuse_no_utf8(path, error=SourceError)
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise SourceError(f"{path.name} is no whole safetensors file ({error}). Copy or download it again.") from None


def _is_safetensors(path: Path) -> bool:
    """Whether a file is read as safetensors: by how it begins, and by its ending where that says nothing."""
    with open(path, "rb") as file:
        first = file.read(9)
    if first[8:] == b"{":
        return True
    return path.suffix == ".safetensors" and not first.startswith((b"PK\3\4", b"\x80"))


def _folder(path: Path) -> SourceError:
    """The error for a folder in place of a file."""
    files = {file.name for file in path.iterdir()}
    if "adapter_config.json" in files or {"adapter_model.safetensors", "adapter_model.bin"} & files:
        return SourceError(f"checkpoint {path.name!r} is a folder of PEFT adapters, not of a whole model. {MERGE}")
    if ".metadata" in files or any(name.endswith(".distcp") for name in files):
        return SourceError(
            f"checkpoint {path.name!r} is a folder of torch.distributed.checkpoint. Make one file of it: python -m "
            "torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER FILE.pt."
        )
    if "zero_to_fp32.py" in files:
        return SourceError(
            f"checkpoint {path.name!r} is a folder of DeepSpeed. Make one file of it: python {path.name}/zero_to_fp32.py {path.name} OUT."
        )
    endings = (".safetensors", ".safetensors.index.json", ".pth", ".pt", ".bin", ".ckpt", ".tar")
    there = sorted(name for name in files if name.endswith(endings))
    hint = f"; there is {listed(there)}" if there else ""
    return SourceError(f"checkpoint {path.name!r} is a folder; {EXPECTED} in it{hint}.")


def _shards(path: Path) -> dict[str, Any]:
    """The tensors of the files that an index names, which stand beside it."""
    try:
        names = set(read_json(path, error=SourceError, mend="")["weight_map"].values())
        assert all(Path(name).name == name and not name.endswith(".index.json") for name in names)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, AssertionError, RecursionError):
        raise SourceError(
            f"{path.name} is no index of weights; expected a weight_map that names the files beside it. Copy or download it again."
        ) from None
    state: dict[str, Any] = {}
    for name in sorted(names):
        found = _opened(path.parent / name)
        if not isinstance(found, Mapping):
            raise SourceError(
                f"{name} of {path.name} holds a {type(found).__name__}, not weights by name. Copy or download it again."
            )
        state.update(found)
    return state


def _arrays(path: Path) -> dict[str, Any] | None:
    """The tensors of a `.npz` file of JAX's Vision Transformers under timm's names; None for other files."""
    if not zipfile.is_zipfile(path):
        return None
    try:
        with numpy.load(path, allow_pickle=False) as archive:
            names = archive.files
            if not names or (prefix := flax.prefix_of(dict.fromkeys(names))) is None:
                return None
            return flax.renamed(archive, prefix)
    except (
        OSError,
        ValueError,
        TypeError,
        EOFError,
        RuntimeError,
        MemoryError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        if path.suffix == ".npz":
            raise SourceError(
                f"{path.name} is no whole .npz file ({next(iter(str(error).splitlines()), type(error).__name__)}). Copy or download it again."
            ) from None
        return None


def _foreign(path: Path) -> str:
    """What a file is that torch.save and safetensors did not write, and what to do; "" where it looks like theirs."""
    with open(path, "rb") as file:
        first = file.read(256)
    if first[8:9] == b"{":  # safetensors, whose first bytes are a length and may look like anything
        return ""
    if first.startswith(b"PK"):
        try:
            with zipfile.ZipFile(path) as archive:
                inside = archive.namelist()
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
            return ""
        if inside and all(name.endswith(".npy") for name in inside):
            return f"an archive of NumPy arrays (.npz), but none of JAX's Vision Transformers. {CONVERT}"
        if any(name.endswith("/constants.pkl") for name in inside):
            return (
                "a TorchScript archive (torch.jit.save), whose code is not run. In the program that wrote it, save the weights alone by "
                f"{SAVE}"
            )
        if any(name.endswith(("/archive_format", "serialized_exported_program.json")) for name in inside):
            return f"a program of torch.export (.pt2). Give the file of weights that it was made from, saved by {SAVE}"
        if packed := [
            name for name in inside if name.endswith((".pth", ".pt", ".bin", ".ckpt", ".tar", ".safetensors"))
        ]:
            return f"an archive with {listed(packed)} in it. Unpack it first"
        if any(name.endswith("model.weights.h5") for name in inside):
            return f"a model of Keras. {CONVERT}"
    return next((what for begin, what in BEGINNINGS if first.lstrip().startswith(begin)), "") or ENDINGS.get(
        path.suffix, ""
    )


def _unpickled(path: Path) -> Any:
    try:
        # DeiT's files carry their training arguments; opened, since torch takes a path by its ending
        with torch.serialization.safe_globals([argparse.Namespace]), open(path, "rb") as file:
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if named := re.search(r"GLOBAL ([\w.]+)|class '?([\w.]+)", str(error)):
            raise SourceError(
                f"{path.name} holds an object of class {named[1] or named[2]}, which is not read because loading it may run code. In the "
                f"program that wrote the file, save the weights alone by {SAVE}."
            ) from None
        raise SourceError(f"{path.name} is no file of torch.save. Expected a .safetensors, .pth or .pt file.") from None
    except (EOFError, OSError, RuntimeError, ValueError, KeyError) as error:
        said = str(error).splitlines()[0] if str(error) else "it ends early"
        said = "it is of another kind" if "weights_only" in said else said  # torch's advice would run the file's code
        raise SourceError(
            f"{path.name} cannot be read as a file of torch.save ({said}). Copy or download it again."
        ) from None


def _is_head(key: str) -> bool:
    """Whether a tensor stands behind the pooled features."""
    return bool(re.search(r"head|classif|aux|pre_logits", key.partition(".")[0]))


def _join(state: dict[str, Tensor], name: str) -> None:
    """Make the joined `name` of queries, keys and values, if the file holds the three apart in its place."""
    named = re.fullmatch(r"(.*\.)(?:qkv\.|in_proj_)(weight|bias)", name)
    if named is None:
        return
    place, kind = named[1], f".{named[2]}"
    for style in SPLIT:
        ending = "" if style[0].endswith("_weight") else kind
        keys = [f"{place}{part}{ending}" for part in style]
        if (ending or kind == ".weight") and all(key in state for key in keys):
            thirds = [state[key] for key in keys]
            if len({third.shape for third in thirds}) == 1:
                state[name] = torch.cat(thirds)
                for key in keys:
                    del state[key]
            return
