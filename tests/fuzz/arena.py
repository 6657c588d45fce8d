"""Where the fuzz lane plays: a small model, photographs, a Parquet file and a finished run; and the three invariants."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from click.testing import CliRunner, Result
from hypothesis import settings
from hypothesis import strategies as st
from PIL import Image

from tests.data.pictures import encoded, parquet
from tests.specs import make, vit
from vitrim import artifact
from vitrim.cli import main
from vitrim.foreign import printable
from vitrim.spec import Config, Preprocess

CLASSES = ("cat", "dog", "owl")
QUICK = settings.default is not None and settings.default.max_examples < 10


def examples(count: int) -> settings:
    """So many examples of a property, always the same ones; a few under `--quick`."""
    return settings(max_examples=3 if QUICK else count)


class Arena:
    """A folder that each example finds as it was made, and whose files may be changed for one command."""

    def __init__(self, root: Path) -> None:
        self.root = root
        spec = vit(classes=len(CLASSES))
        model = make(spec, dtype=torch.float32)
        view = Preprocess(mean=(0.5,) * 3, std=(0.5,) * 3, size_px=spec.image_px)
        model.config = Config(spec=spec, preprocess=view, labels=CLASSES)
        artifact.save(model, root / "model")
        generator = np.random.default_rng(0)
        pictures = [Image.fromarray(generator.integers(0, 255, (16, 16, 3), dtype=np.uint8)) for _ in range(12)]
        for index, picture in enumerate(pictures):
            place = root / "photos" / CLASSES[index % 3] / f"{index}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            picture.save(place)
        parquet(root / "p.parquet", [encoded(picture) for picture in pictures], [index % 3 for index in range(12)])
        self.before = self.contents()

    def contents(self) -> dict[str, bytes]:
        found = sorted(path for path in self.root.rglob("*"))
        return {os.fsencode(path).hex(): path.read_bytes() if path.is_file() else b"" for path in found}

    @contextmanager
    def changed(self, name: str, text: bytes) -> Iterator[None]:
        """With other bytes in a file, which is then as it was, or gone if it was not there."""
        place = self.root / name
        whole = place.read_bytes() if place.is_file() else None
        place.parent.mkdir(exist_ok=True)
        place.write_bytes(text)
        try:
            yield
        finally:
            place.unlink() if whole is None else place.write_bytes(whole)

    def play(self, *words: str, asked: str | None = None) -> Result:
        """One command in this process, held to the invariants.  asked: the file or folder that it was told to make."""
        before, home = self.contents(), Path.cwd()
        os.chdir(self.root)
        try:
            done = CliRunner().invoke(main, list(words))
        finally:
            os.chdir(home)
        if asked is not None and (place := self.root / asked).exists():
            shutil.rmtree(place) if place.is_dir() else place.unlink()
        assert done.exception is None or isinstance(done.exception, SystemExit), (words, repr(done.exception))
        assert done.exit_code in (0, 1, 2), words
        assert "Traceback" not in done.output
        assert all(printable(line) == line for line in done.output.split("\n")), (words, done.output)
        if done.exit_code:
            assert [line for line in done.stderr.splitlines() if line.startswith("Error: ")], (words, done.output)
        assert self.contents() == before, words
        return done


# ------------------------------------------------------------------------------------------------------ what is hostile

NO_NUMBERS = (
    "", " ", "x", "nan", "NaN", "inf", "-inf", "Infinity", "1e999", "-1e999", "9" * 400, "-" + "9" * 400, "9" * 5000,
    str(2**63), str(-(2**63) - 1), str(2**64), "0x10", "1_000", "٣", "1,,2", "1;2", "[1]", "null", "true", "--", "\x1b[31m",
)  # fmt: skip
"""What no flag takes for a number."""

ODD_NAMES = (
    "", " ", ".", "..", "/", "~", "-", "--", "[/]", "[bold]x", "\x1b[31mred", "a\nb", "gpj\u202e.exe", "\udcff.jpg", "a" * 300,
    "a" * 5000, "timm:", "timm:[/]", "timm:..", "torchvision:", "torchvision:\x1b", "t2t:", "t2t:x",
    "builtin:", "builtin:..", "builtin:../..", "builtin:/etc", "builtin:\x1b[31m", "model/config.json", "model/", "photos/..",
    "p.parquet", "%s%n", "{0}", "${HOME}", "$(id)", "hub:", "file:///etc/passwd", "http://x.invalid/a", "C:\\a",
)  # fmt: skip
"""No process is ever given a zero byte in a word."""
NAMES = st.sampled_from(ODD_NAMES) | st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8
)

ODD_VALUES = (
    None, True, False, "", "x", "nan", [], {}, [None], [[]], {"a": 1}, 0, -1, 1, 1.5, -0.0, 2**31, 10**6, 10**9, 2**53, 2**63 - 1,
    2**63, 10**30, 10**400, 1e-300, 1e300, float("nan"), float("inf"), "\x1b[31m", "\udcff", "[/]", "a" * 1000, ["a"] * 50,
)  # fmt: skip
VALUES = st.sampled_from(ODD_VALUES) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3), st.lists, max_leaves=4
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to each value of a JSON tree, and to the tree."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


@st.composite
def mutated(draw: Callable[[Any], Any], tree: Any) -> Any:
    """A JSON tree in which one or two values are others, gone, or have one beside them."""
    tree = json.loads(json.dumps(tree))
    for _ in range(draw(st.integers(1, 2))):
        way = draw(st.sampled_from([path for path in places(tree) if path]))
        holder = tree
        for key in way[:-1]:
            holder = holder[key]
        how = draw(st.sampled_from(["other", "other", "other", "gone", "twice"]))
        if how == "other":
            holder[way[-1]] = deepcopy(draw(VALUES))
        elif how == "gone":
            del holder[way[-1]]
        elif isinstance(holder, list):
            holder.extend([deepcopy(holder[way[-1]])] * draw(st.sampled_from([1, 3, 2000])))
        else:
            holder[draw(st.sampled_from(["x", "", "\x1b[31m", "kind", "schema"]))] = deepcopy(holder[way[-1]])
        if not isinstance(tree, dict) or not tree:
            break
    return tree


@st.composite
def damaged(draw: Callable[[Any], Any], whole: bytes, *, within: int | None = None) -> bytes:
    """Bytes of which some are others, left out, or come twice.  within: only among the first so many."""
    text = bytearray(whole)
    for _ in range(draw(st.integers(1, 3))):
        size = min(within or len(text), len(text))
        at = draw(st.integers(0, max(size - 1, 0)))
        how = draw(st.sampled_from(["set", "cut", "insert", "truncate", "number"]))
        if how == "set" and text:
            text[at] = draw(st.integers(0, 255))
        elif how == "cut":
            del text[at : at + draw(st.integers(1, 16))]
        elif how == "insert":
            text[at:at] = draw(st.binary(min_size=1, max_size=8))
        elif how == "truncate":
            del text[at:]
        else:
            text[at : at + 1] = draw(st.sampled_from([b"9" * 30, b"-1", b"1e9", b"NaN", b"[" * 300]))
    return bytes(text)
