"""The spec: what a compressed Vision Transformer is, as frozen values. Standard library only.

`ModelSpec` says which network it is, `Config` adds what a saved model carries beside it (task, preprocessing, labels),
`Selection` says how the weights were cut. All three go to JSON and back without loss; unknown keys are refused.

Shapes in this package: `B` batch, `N` tokens with prefix, `D` width, `H` heads, `Q` query/key dims of a head, `V` value
dims of a head, `M` MLP hidden units, `R` rank, `K` kept.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

from .codec import Codec
from .errors import ConfigError, SpecError, did_you_mean
from .foreign import parse_json

SCHEMA = 1
"""Version of the JSON layout; files of a newer one are refused."""


MOST_BLOCKS, MOST_OUTPUTS, MOST_SIDE_PX = 1000, 100, 16_384
"""Bounds that no Vision Transformer comes near: what a file says beyond them is not built, counted or drawn."""
MOST_PATCHES = 1 << 16
"""Of an image size that a network is resized to: its positions alone take gigabytes beyond that."""


class Written:
    """What is kept as JSON under a name of its own."""

    __slots__ = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, with the schema number at the top; `from_dict` is the inverse."""
        return _JSON.write(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Read what `to_dict` wrote. Raises SpecError on an unknown key, a missing one or a newer schema."""
        return _JSON.read(cls, data, cls.__name__.removeprefix("Model").lower())


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvStem:
    """Non-overlapping patches through one convolution."""

    bias: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class T2TTransformer:
    """Tokens-to-token stem: three soft splits (overlapping unfolds), a full-attention stage after each of the first two.

    token_dim: width of the tokens that a stage leaves. kernels, strides: of the soft splits, in pixels or tokens; the
    strides multiply to the patch.
    """

    token_dim: int = 64
    kernels: tuple[int, int, int] = (7, 3, 3)
    strides: tuple[int, int, int] = (4, 2, 2)


@dataclass(frozen=True, kw_only=True, slots=True)
class T2TPerformer:
    """The tokens-to-token stem with linear attention by random features. features: how many of them."""

    token_dim: int = 64
    features: int = 32
    kernels: tuple[int, int, int] = (7, 3, 3)
    strides: tuple[int, int, int] = (4, 2, 2)


Stem = ConvStem | T2TTransformer | T2TPerformer


@dataclass(frozen=True, kw_only=True, slots=True)
class Position:
    """The table added to the tokens once, before the blocks.

    grid: rows and columns of patches that the table was made for; at another size it is resized.
    prefix_rows: the table has a row for each prefix token too, in front.
    """

    kind: Literal["none", "learned", "fixed"] = "learned"
    grid: tuple[int, int]
    prefix_rows: bool = True
    resize: Literal["rebuild_1d", "bicubic", "bicubic_antialias"] = "bicubic_antialias"


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionSpec:
    """Multi-head attention whose query/key and value widths are free.

    scale: of the scores; the dense model's `head_dim ** -0.5`, whatever `qk_dim` became.
    layer_scale: the half's update is multiplied by a learned vector.
    gate: an input-dependent switch of this half.
    """

    heads: int
    qk_dim: int
    v_dim: int
    scale: float
    q_bias: bool = True
    k_bias: bool = True
    v_bias: bool = True
    out_bias: bool = True
    qk_norm: Literal["none", "layer", "rms"] = "none"
    layer_scale: bool = False
    gate: bool = False

    def factored(self, *, qk: int | None = None, v: int | None = None) -> AttentionSpec:
        """With products in factors of these ranks; None: as it is. Key biases go, value biases move into the output's."""
        found = self if qk is None else replace(self, qk_dim=qk, k_bias=False)
        return found if v is None else replace(found, v_dim=v, v_bias=False, out_bias=True)


MlpKind = Literal["gelu", "gelu_tanh", "quick_gelu", "relu", "silu", "swiglu"]


@dataclass(frozen=True, kw_only=True, slots=True)
class MlpSpec:
    """Two linears and an activation. hidden: units after the activation (or, for `swiglu`, after the product)."""

    kind: MlpKind = "gelu"
    hidden: int
    fc1_rank: int | None = None
    fc2_rank: int | None = None
    fc1_bias: bool = True
    fc2_bias: bool = True
    layer_scale: bool = False
    gate: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Merge:
    """Merge neighbouring columns (`h`) or rows (`v`) of the lattice. keep: columns or rows that remain."""

    at: Literal["start", "mid", "end"] = "end"
    axis: Literal["h", "v"]
    weight: Literal["mean", "learned", "similarity"] = "mean"
    tau: float | None = None
    keep: int
    proportional: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Similarity:
    """Merge the most similar patch tokens, wherever they are. keep: patch tokens that remain.

    match: what is most similar: by the cosine, or by the least squared distance weighted by sizes (Ward's criterion): `ward`, tokens
    of even index into ones of odd index as by the cosine; `heavier`, any into heavier ones.
    metric: distances are taken in so many learned directions of the stream, and with `heavier` a learned one weighs each token beside
    its size; None: in the stream, by size alone. For `ward` and `heavier`.
    carry: what sets each merged token apart comes back where tokens are restored, through a learned linear: the identity and two
    factors of this rank. None: it is lost.
    """

    at: Literal["start", "mid", "end"] = "mid"
    keep: int
    proportional: bool = False
    match: Literal["cosine", "ward", "heavier"] = "cosine"
    metric: int | None = None
    carry: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Prefix:
    """Only the prefix tokens go on; they query the keys and values of all. Start of the last block only."""

    at: Literal["start"] = "start"


Step = Merge | Similarity | Prefix


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockSpec:
    """A pre-norm block. A half that is gone is None. steps: token steps, in order within each place."""

    attention: AttentionSpec | None
    mlp: MlpSpec | None
    steps: tuple[Step, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Pool:
    """How tokens become one vector. heads, hidden, act (of its MLP): of the attention pooling (`map`) only."""

    kind: Literal["cls", "mean", "map", "none"] = "cls"
    heads: int | None = None
    hidden: int | None = None
    act: Literal["gelu", "gelu_tanh"] = "gelu"


@dataclass(frozen=True, kw_only=True, slots=True)
class Output:
    """A classifier. reads: `pool`, a prefix token by name, or `mean`; several are concatenated."""

    name: str = "head"
    kind: Literal["classify"] = "classify"
    reads: tuple[str, ...] = ("pool",)
    classes: int
    rank: int | None = None
    bias: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSpec(Written):
    """One Vision Transformer. Checked when made: an impossible one raises `SpecError` with the place and the mend.

    restore: merged patch tokens are all given back behind the last block, before the final norm.
    """

    schema: int = SCHEMA
    image_px: tuple[int, int]
    patch_px: tuple[int, int]
    channels: int = 3
    stem: Stem = ConvStem()
    width: int
    prefix: tuple[Literal["cls", "dist", "reg"], ...] = ("cls",)
    position: Position
    pre_norm: bool = False
    final_norm: bool = True
    pool_norm: bool = False
    norm_eps: float = 1e-6
    blocks: tuple[BlockSpec, ...]
    pool: Pool = Pool()
    outputs: tuple[Output, ...] = ()
    restore: bool = False

    def __post_init__(self) -> None:
        _JSON.check(self, "spec")
        _check(self)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches at the spec's own image size."""
        return self.image_px[0] // self.patch_px[0], self.image_px[1] // self.patch_px[1]

    @property
    def unread_px(self) -> tuple[int, int]:
        """Pixels at the bottom and at the right that no patch covers, as in timm: nothing of them is read."""
        return self.image_px[0] % self.patch_px[0], self.image_px[1] % self.patch_px[1]

    @property
    def classes(self) -> int | None:
        """Classes of the classifier; None for an encoder."""
        return self.outputs[0].classes if self.outputs else None

    @property
    def position_rows(self) -> int:
        """Rows of the position table."""
        if self.position.kind == "none":
            return 0
        return math.prod(self.position.grid) + (len(self.prefix) if self.position.prefix_rows else 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Preprocess:
    """How an image becomes the model's input: resized, cropped, scaled to [0, 1], then `(x - mean) / std`.

    crop: share of the resized side that the centre crop keeps.  crop_rounding: where the crop begins if an odd number of pixels
    is left over: at the half rounded to even (torchvision, timm), or rounded down (transformers).
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    size_px: tuple[int, int]
    crop: float = 1.0
    crop_mode: Literal["center", "squash", "border"] = "center"
    interpolation: str = "bicubic"
    crop_rounding: Literal["even", "down"] = "even"

    def __post_init__(self) -> None:
        _JSON.check(self, "preprocess")
        if len(self.mean) != len(self.std) or any(s <= 0 for s in self.std):
            raise SpecError(
                f"preprocess: mean={self.mean!r} and std={self.std!r}; expected one of each for every channel, std above 0."
            )
        if not 0 < self.crop <= 1:
            raise SpecError(f"preprocess: crop={self.crop!r}; expected a share in (0, 1].")
        if not all(
            0 < side <= MOST_SIDE_PX * self.crop for side in self.size_px
        ):  # the image is resized to side / crop
            raise SpecError(
                f"preprocess: size_px={self.size_px!r} with crop={self.crop!r}; expected sides from 1 to {MOST_SIDE_PX} px, "
                "before the crop too."
            )


ProblemType = Literal["single_label_classification", "multi_label_classification"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Config(Written):
    """What a saved model says of itself: the artifact's `config.json`.

    labels: class names in the order of the logits; None when the source did not say.
    problem_type: as transformers has it: one class an image (softmax), or several labels, each of which applies or not (sigmoid).
    gate_policy: default grouping of gate decisions at inference.
    """

    spec: ModelSpec
    task: Literal["classification", "features"] = "classification"
    preprocess: Preprocess | None = None
    labels: tuple[str, ...] | None = None
    problem_type: ProblemType = "single_label_classification"
    gate_policy: Literal["image", "group", "batch", "open"] = "image"

    def __post_init__(self) -> None:
        _JSON.check(self, "config")
        if self.labels is not None and self.spec.classes != len(self.labels):
            raise SpecError(
                f"config: {len(self.labels)} labels for {self.spec.classes} classes; expected one name for each class."
            )

    @property
    def multi_label(self) -> bool:
        """Whether an image has several labels."""
        return self.problem_type == "multi_label_classification"


@dataclass(frozen=True, kw_only=True, slots=True)
class SelectionStep:
    """How one compression cut the weights.

    parent: hash of the spec that was cut. refit: whether weights were changed beyond the cut.
    blocks: per block of the parent, None (untouched) or `{"attention": ..., "mlp": ...}` with "kept", "gone", "rotated",
    or the kept indices by head and unit.
    """

    method: str
    variant: str = ""
    parent: str
    refit: bool = False
    blocks: tuple[dict[str, Any] | None, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection(Written):
    """The compressions that led to a model, oldest first. Empty for a dense one."""

    steps: tuple[SelectionStep, ...] = ()

    def then(self, step: SelectionStep) -> Selection:
        """This selection with one more step."""
        return Selection(steps=(*self.steps, step))


# ---------------------------------------------------------------------------------------------- tokens along the blocks


@dataclass(frozen=True, kw_only=True, slots=True)
class Tokens:
    """Tokens at one place. grid: the lattice of the patch tokens, None once it is lost."""

    prefix: int
    patches: int
    grid: tuple[int, int] | None

    @property
    def count(self) -> int:
        return self.prefix + self.patches


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockTokens:
    """Tokens of one block: at its entry, as attention's keys and queries, in its MLP, at its exit.

    width: of the stream there. before: the tokens that each step finds, in the order of `BlockSpec.steps`.
    carried: patch tokens of which something is kept beside the stream, until they are restored; once for each step so far that carries.
    """

    width: int
    enter: Tokens
    keys: Tokens
    queries: Tokens
    mlp: Tokens
    leave: Tokens
    before: tuple[Tokens, ...]
    carried: int


def token_walk(spec: ModelSpec) -> tuple[BlockTokens, ...]:
    """Tokens along the blocks at the spec's image size. Raises SpecError where a step cannot be done."""
    rows, cols = spec.grid
    tokens = Tokens(prefix=len(spec.prefix), patches=rows * cols, grid=(rows, cols))
    walk, carried = [], 0
    for i, block in enumerate(spec.blocks):
        enter = tokens
        before: dict[int, Tokens] = {}
        keys = tokens
        places: dict[str, Tokens] = {}
        for at in ("start", "mid", "end"):
            for j, step in enumerate(block.steps):
                if step.at == at:
                    before[j] = tokens
                    carried += tokens.patches if isinstance(step, Similarity) and step.carry else 0
                    tokens = _after(step, tokens, f"block {i}, step {j}")
                    if not isinstance(step, Prefix) and at == "start":
                        keys = tokens
            places[at] = tokens
        walk.append(
            BlockTokens(
                width=spec.width,
                enter=enter,
                keys=keys,
                queries=places["start"],
                mlp=places["mid"],
                leave=places["end"],
                before=tuple(before[j] for j in range(len(block.steps))),
                carried=carried,
            )
        )
    return tuple(walk)


def kept(keep: int, length: int, found: int) -> int:
    """What a merge that leaves `keep` of `length` leaves of `found`, at another image size: the same share goes.

    At most half goes in one step, and exactly half where it was half.
    """
    if found == length:
        return keep
    removed = length - keep
    return found - (found // 2 if removed == length // 2 else min(found // 2, round(removed * found / length)))


def at_size(spec: ModelSpec, image_px: tuple[int, int]) -> ModelSpec:
    """The same network for images of another size: positions for its grid, and the same share of tokens merged.

    A merge that is left nothing to do goes. A spec whose positions are for its own grid is itself at its own size.
    Raises SpecError for a size that the stem cannot take, or of more than `MOST_PATCHES`.
    """
    rows, cols = (side // patch for side, patch in zip(image_px, spec.patch_px, strict=True))
    if rows * cols > max(MOST_PATCHES, math.prod(spec.grid)):
        raise SpecError(
            f"image_px={image_px!r} makes {rows * cols} patches of {spec.patch_px!r}; expected at most {MOST_PATCHES}."
        )
    bare = replace(spec, image_px=image_px, blocks=tuple(replace(block, steps=()) for block in spec.blocks))
    position = spec.position if spec.position.kind == "none" else replace(spec.position, grid=bare.grid)
    steps = steps_at(spec, bare.grid)
    blocks = (replace(block, steps=tuple(own.values())) for block, own in zip(spec.blocks, steps, strict=True))
    return replace(bare, position=position, blocks=tuple(blocks))


def steps_at(spec: ModelSpec, grid: tuple[int, int]) -> list[dict[int, Step]]:
    """Each block's token steps on another grid of patches, by their number; those that are left nothing to do are not there."""
    tokens, found = Tokens(prefix=len(spec.prefix), patches=math.prod(grid), grid=grid), []
    for block, walked in zip(spec.blocks, token_walk(spec), strict=True):
        steps: dict[int, Step] = {}
        for at in ("start", "mid", "end"):
            for j, step in enumerate(block.steps):
                if step.at != at:
                    continue
                own: Step = step
                if not isinstance(step, Prefix):
                    before, count = walked.before[j], mergeable(step, tokens.patches, tokens.grid)
                    keep = kept(step.keep, mergeable(step, before.patches, before.grid), count)
                    if keep == count:
                        continue
                    own = replace(step, keep=keep)
                steps[j], tokens = own, _after(own, tokens, "")
        found.append(dict(sorted(steps.items())))
    return found


def has_own_positions(spec: ModelSpec) -> bool:
    """Whether no position is resized in a forward pass at the spec's own image size."""
    return spec.position.kind == "none" or spec.position.grid == spec.grid


def sides(image_px: int | tuple[int, int]) -> tuple[int, int]:
    """Height and width in pixels, from both or from one number for both. Raises ConfigError."""
    both = tuple(image_px) if isinstance(image_px, Sequence) and not isinstance(image_px, str) else (image_px, image_px)
    if len(both) != 2 or any(isinstance(side, bool) or not isinstance(side, int) or side < 1 for side in both):
        raise ConfigError(f"image_px={image_px!r}; expected a number of pixels above 0, or (height, width).")
    return both


def mergeable(step: Step, patches: int, grid: tuple[int, int] | None) -> int:
    """What a step makes fewer of: columns or rows of the lattice, or patch tokens."""
    if not isinstance(step, Merge):
        return patches
    assert grid is not None
    return grid[1] if step.axis == "h" else grid[0]


def multiple(image_px: tuple[int, int], patch_px: tuple[int, int]) -> tuple[int, int]:
    """The image size nearest to one that is a whole number of patches."""
    rows, cols = (max(1, round(side / patch)) for side, patch in zip(image_px, patch_px, strict=True))
    return rows * patch_px[0], cols * patch_px[1]


def _after(step: Step, tokens: Tokens, where: str) -> Tokens:
    if isinstance(step, Prefix):
        return Tokens(prefix=tokens.prefix, patches=0, grid=None)
    if isinstance(step, Similarity):
        least = tokens.patches - tokens.patches // 2
        if not least <= step.keep < tokens.patches:
            raise SpecError(
                f"{where}: keep={step.keep!r} of {tokens.patches} patch tokens; expected {least} to {tokens.patches - 1}: "
                "at most half of them merge in one step."
            )
        return Tokens(prefix=tokens.prefix, patches=step.keep, grid=None)
    if tokens.grid is None:
        raise SpecError(
            f"{where}: a lattice merge after the lattice is gone; put it before similarity and prefix steps."
        )
    rows, cols = tokens.grid
    length = cols if step.axis == "h" else rows
    if not length - length // 2 <= step.keep < length:
        raise SpecError(
            f"{where}: keep={step.keep!r} of {length} {'columns' if step.axis == 'h' else 'rows'}; "
            f"expected {length - length // 2} to {length - 1}."
        )
    grid = (rows, step.keep) if step.axis == "h" else (step.keep, cols)
    return Tokens(prefix=tokens.prefix, patches=grid[0] * grid[1], grid=grid)


# ---------------------------------------------------------------------------------------------------------------- checks


_HINTS = {
    **dict.fromkeys(("heads", "qk_dim", "v_dim"), " To drop the attention, set attention=None."),
    "hidden": " To drop the MLP, set mlp=None.",
}


def _positive(where: str, **values: int | float | None) -> None:
    for name, value in values.items():
        if value is not None and value <= 0:
            raise SpecError(f"{where}: {name}={value!r}; expected a number above 0.{_HINTS.get(name, '')}")


def _check(spec: ModelSpec) -> None:
    if spec.schema != SCHEMA:
        raise SpecError(f"spec: schema {spec.schema!r}; this vitrim reads schema {SCHEMA}. Install a newer vitrim.")
    _positive("spec", width=spec.width, channels=spec.channels, norm_eps=spec.norm_eps)
    places = {"image_px": spec.image_px, "patch_px": spec.patch_px, "position.grid": spec.position.grid}
    for name, sides in places.items():
        _positive("spec", **{f"{name}[{axis}]": side for axis, side in enumerate(sides)})
    if max(*spec.image_px, *spec.position.grid) > MOST_SIDE_PX:
        raise SpecError(
            f"spec: image_px={spec.image_px!r}, position.grid={spec.position.grid!r}; expected sides of at most {MOST_SIDE_PX}."
        )
    if any(image < patch for image, patch in zip(spec.image_px, spec.patch_px, strict=True)):
        raise SpecError(
            f"spec: image_px={spec.image_px!r} is smaller than a patch, patch_px={spec.patch_px!r}; choose a larger image size."
        )
    if not isinstance(spec.stem, ConvStem):
        if any(spec.unread_px):
            raise SpecError(
                f"spec: image_px={spec.image_px!r} is no multiple of patch_px={spec.patch_px!r}, as the tokens-to-token stem asks; "
                f"the nearest is {multiple(spec.image_px, spec.patch_px)!r}."
            )
        _check_splits(spec.stem, spec.patch_px)
    if len(set(spec.prefix) - {"reg"}) != len([t for t in spec.prefix if t != "reg"]):
        raise SpecError(f"spec: prefix={spec.prefix!r}; expected at most one 'cls' and one 'dist'.")
    for i, block in enumerate(spec.blocks):
        where = f"block {i}"
        if (a := block.attention) is not None:
            _positive(where, heads=a.heads, qk_dim=a.qk_dim, v_dim=a.v_dim)
            if not (math.isfinite(a.scale) and a.scale > 0):
                raise SpecError(f"{where}: scale={a.scale!r}; expected the dense model's head_dim ** -0.5.")
        if (m := block.mlp) is not None:
            _positive(where, hidden=m.hidden, fc1_rank=m.fc1_rank, fc2_rank=m.fc2_rank)
        for j, step in enumerate(block.steps):
            _check_step(spec, i, j, step)
    _check_outputs(spec)
    token_walk(spec)


def _check_splits(stem: T2TTransformer | T2TPerformer, patch_px: tuple[int, int]) -> None:
    _positive("stem", token_dim=stem.token_dim, features=getattr(stem, "features", None))
    for kernel, stride in zip(stem.kernels, stem.strides, strict=True):
        _positive("stem", kernel=kernel, stride=stride)
        if kernel % 2 == 0 or kernel < stride:
            raise SpecError(
                f"stem: kernels={stem.kernels!r} with strides={stem.strides!r}; expected odd kernels, none below its stride."
            )
    side = math.prod(stem.strides)
    if patch_px != (side, side):
        raise SpecError(
            f"spec: patch_px={patch_px!r} with a tokens-to-token stem of strides {stem.strides!r}; expected {(side, side)!r}."
        )


def _check_step(spec: ModelSpec, i: int, j: int, step: Step) -> None:
    where = f"block {i}, step {j}"
    if isinstance(step, Merge):
        if (step.weight == "similarity") != (step.tau is not None) or (step.tau is not None and step.tau <= 0):
            raise SpecError(
                f"{where}: weight={step.weight!r} with tau={step.tau!r}; expected tau above 0 with weight='similarity', else none."
            )
    elif isinstance(step, Similarity):
        _positive(where, metric=step.metric, carry=step.carry)
        if step.metric is not None and (step.match == "cosine" or step.metric > spec.width):
            raise SpecError(
                f"{where}: metric={step.metric!r} with match={step.match!r}; expected match='ward' or 'heavier' and at most the stream's width, "
                f"{spec.width}, or none."
            )
        if step.carry is not None and step.carry > spec.width:
            raise SpecError(
                f"{where}: carry={step.carry!r}; expected a rank of at most the stream's width, {spec.width}, or none."
            )
        if step.carry is not None and not spec.restore:
            raise SpecError(
                f"{where}: carry={step.carry!r}, but nothing restores the tokens; set restore=True on the spec."
            )
    elif isinstance(step, Prefix):
        if spec.restore:
            raise SpecError(
                f"{where}: a prefix step leaves no patch tokens to restore; remove it, or set restore=False."
            )
        if i != len(spec.blocks) - 1:
            raise SpecError(f"{where}: a prefix step in block {i} of {len(spec.blocks)}; expected the last block.")
        if not spec.prefix:
            raise SpecError(f"{where}: a prefix step without prefix tokens; remove the step.")
        if spec.pool.kind != "cls" or any("mean" in output.reads for output in spec.outputs):
            raise SpecError(
                f"{where}: a prefix step, but the network reads more than prefix tokens (pool {spec.pool.kind!r}); remove the step."
            )
        steps = spec.blocks[i].steps
        if any(other.at != "start" for other in steps) or any(isinstance(later, Prefix) for later in steps[j + 1 :]):
            raise SpecError(f"{where}: token steps beside a prefix step have no patch tokens left; remove them.")


def _check_outputs(spec: ModelSpec) -> None:
    if spec.pool.kind == "cls" and "cls" not in spec.prefix:
        raise SpecError("spec: pool 'cls' without a 'cls' token in prefix; use pool 'mean' or add the token.")
    if (spec.pool.kind == "map") != (spec.pool.heads is not None and spec.pool.hidden is not None):
        raise SpecError(f"spec: pool={spec.pool!r}; heads and hidden belong to kind 'map', and only there.")
    if spec.pool.kind != "map" and spec.pool.act != "gelu":
        raise SpecError(f"spec: pool={spec.pool!r}; act belongs to kind 'map', and only there.")
    if spec.pool.kind == "map":
        _positive("pool", heads=spec.pool.heads, hidden=spec.pool.hidden)
        assert spec.pool.heads is not None
        if spec.width % spec.pool.heads:
            raise SpecError(f"pool: heads={spec.pool.heads} does not divide width={spec.width}.")
    names = [output.name for output in spec.outputs]
    if len(set(names)) != len(names):
        raise SpecError(f"spec: outputs named {names!r}; expected different names.")
    for output in spec.outputs:
        where = f"output {output.name!r}"
        _positive(where, classes=output.classes, rank=output.rank)
        if not output.name.isidentifier():
            raise SpecError(f"{where}: expected a name of letters, digits and underscores.")
        if not output.reads:
            raise SpecError(f"{where}: reads nothing; expected 'pool', 'mean' or a prefix token.")
        for read in output.reads:
            if read == "pool" and spec.pool.kind == "none":
                raise SpecError(f"{where}: reads 'pool', but pool is 'none'.")
            if read == spec.pool.kind and read in ("cls", "mean"):
                raise SpecError(f"{where}: reads {read!r}, which the pool gives already; write 'pool'.")
            if read not in ("pool", "mean", "cls", "dist") or (read in ("cls", "dist") and read not in spec.prefix):
                known = ("pool", "mean", *[t for t in spec.prefix if t != "reg"])
                raise SpecError(f"{where}: reads {read!r}{did_you_mean(read, known)}; known: {', '.join(known)}.")
        if output.classes != spec.outputs[0].classes:
            raise SpecError(
                f"{where}: {output.classes} classes beside {spec.outputs[0].classes}; expected equal numbers."
            )


# ------------------------------------------------------------------------------------------------------------------ JSON

_JSON = Codec(
    error=SpecError,
    schema=SCHEMA,
    kinds={
        ConvStem: "conv",
        T2TTransformer: "t2t_transformer",
        T2TPerformer: "t2t_performer",
        Merge: "merge",
        Similarity: "similarity",
        Prefix: "prefix",
    },
    most={ModelSpec: {"blocks": MOST_BLOCKS, "outputs": MOST_OUTPUTS}},
    later={
        ModelSpec: {"restore": False},
        Similarity: {"match": "cosine", "metric": None, "carry": None},
        Pool: {"act": "gelu"},
        Preprocess: {"crop_rounding": "even"},
        Config: {"problem_type": "single_label_classification"},
    },
)


def to_json(spec: ModelSpec) -> str:
    """Canonical JSON: sorted keys, no spaces."""
    return json.dumps(spec.to_dict(), sort_keys=True, separators=(",", ":"))


def from_json(text: str) -> ModelSpec:
    """The inverse of `to_json`. Raises SpecError."""
    return ModelSpec.from_dict(parse_json(text, named="spec:", error=SpecError, mend="Expected what `to_json` writes."))


ProductName = Literal["output", "tokens"]
"""What a network is for: what `model(x)` gives, or every token behind the final norm, merged ones restored."""


def tokens_given(spec: ModelSpec) -> tuple[int, int]:
    """How many tokens are there behind the final norm, prefix tokens among them, and of what width."""
    if spec.restore or not spec.blocks:
        return len(spec.prefix) + math.prod(spec.grid), spec.width
    return token_walk(spec)[-1].leave.count, spec.width


def product_of(spec: ModelSpec, named: ProductName | None = None, *, beside: ModelSpec | None = None) -> ProductName:
    """What a network is for: as named, or the tokens of an encoder that gives one for each patch, the output of others.

    beside: of a network that it is compared with on the same images, whose tokens have to be as many, of one width.
    Raises ConfigError where tokens are named that are not there.
    """
    found = tokens_given(spec)
    if beside is not None and beside.image_px != spec.image_px:
        beside = at_size(beside, spec.image_px)
    lacking = None
    if any(isinstance(step, Prefix) for block in spec.blocks for step in block.steps):
        lacking = "the last block lets only prefix tokens through (an exact tail), so that no patch tokens are left"
    elif beside is not None and tokens_given(beside) != found:
        ours, theirs = (f"{count} tokens of width {width}" for count, width in (found, tokens_given(beside)))
        lacking = f"the network gives {ours}, the dense one {theirs}"
    if named == "tokens" and lacking is not None:
        raise ConfigError(
            f"product='tokens': {lacking}; expected a token for each patch. Take product='output' (--product output), or cut the dense "
            "network with product='tokens'."
        )
    whole = lacking is None and found[0] == len(spec.prefix) + math.prod(spec.grid)
    return named or ("output" if spec.outputs or not whole else "tokens")


def reads_prefix_alone(spec: ModelSpec) -> bool:
    """Whether what the network gives is read from prefix tokens only, which see the image through attention alone."""
    reads = [read for output in spec.outputs for read in output.reads] or ["pool"]
    return all(spec.pool.kind == "cls" if read == "pool" else read != "mean" for read in reads)


def blind(spec: ModelSpec) -> bool:
    """Whether what the network gives can depend on no image: prefix tokens alone are read, and no attention is there."""
    return reads_prefix_alone(spec) and all(block.attention is None for block in spec.blocks)


def spec_hash(spec: ModelSpec) -> str:
    """First 16 hex digits of the SHA-256 of the canonical JSON."""
    return hashlib.sha256(to_json(spec).encode()).hexdigest()[:16]


Attention, Mlp, Block = AttentionSpec, MlpSpec, BlockSpec  # their names until 0.2
