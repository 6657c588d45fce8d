"""Which foreign tensor is which of ours, and the numbers along those names: in, out, and into our model."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypedDict, Unpack, get_args

import torch
from torch import Tensor

from ..model import Vit
from ..spec import BlockSpec, Config, ModelSpec, Preprocess, ProblemType

QKV = ("q_bias", "k_bias", "v_bias")


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockNames:
    """What a family with joint queries, keys and values calls the parts of a block.

    qkv: up to `weight` and `bias`.  fc1: one linear, or several that are one of ours.
    """

    norm1: str = "norm1"
    qkv: str = "attn.qkv."
    out: str = "attn.proj"
    norm2: str = "norm2"
    fc1: tuple[str, ...] = ("mlp.fc1",)
    fc2: str = "mlp.fc2"


class Places(dict[str, tuple[str, int]]):
    """Foreign name -> (our name, order among the tensors that are joined under it along their first axis).

    `...attention.qkv_bias` stands for the biases of queries, keys and values, one behind the other.
    """

    def add(self, theirs: str, ours: str, order: int = 0) -> None:
        """One tensor."""
        self[theirs] = (ours, order)

    def pair(self, theirs: str, ours: str, bias: bool = True, order: int = 0) -> None:
        """The weight of a norm or linear, and its bias if it has one."""
        self.add(f"{theirs}.weight", f"{ours}.weight", order)
        if bias:
            self.add(f"{theirs}.bias", f"{ours}.bias", order)

    def block(self, theirs: str, i: int, block: BlockSpec, names: BlockNames) -> None:
        """The norms and linears of the halves that our block `i` has. theirs: what their names begin with."""
        ours = f"blocks.{i}"
        if (a := block.attention) is not None:
            self.pair(f"{theirs}.{names.norm1}", f"{ours}.norm1")
            self.add(f"{theirs}.{names.qkv}weight", f"{ours}.attention.qkv")
            if a.q_bias or a.k_bias or a.v_bias:
                self.add(f"{theirs}.{names.qkv}bias", f"{ours}.attention.qkv_bias")
            self.pair(f"{theirs}.{names.out}", f"{ours}.attention.out", a.out_bias)
        if (m := block.mlp) is not None:
            self.pair(f"{theirs}.{names.norm2}", f"{ours}.norm2")
            for order, name in enumerate(names.fc1):
                self.pair(f"{theirs}.{name}", f"{ours}.mlp.fc1", m.fc1_bias, order)
            self.pair(f"{theirs}.{names.fc2}", f"{ours}.mlp.fc2", m.fc2_bias)


def taken(state: Mapping[str, Tensor], places: Places, width: int) -> dict[str, Tensor]:
    """A foreign module's numbers under our names: float32 copies on the CPU. width: of the stream."""
    pieces: dict[str, dict[int, Tensor]] = defaultdict(dict)
    for theirs, (ours, order) in places.items():
        value = state[theirs].detach().to(device="cpu", dtype=torch.float32, copy=True)
        shapes = {"prefix": (-1, width), "position": (-1, width), "pool.latent": (width,)}  # 1 P D -> P D
        pieces[ours][order] = value.reshape(shapes.get(ours, value.shape))
    weights: dict[str, Tensor] = {}
    for ours, found in pieces.items():
        parts = [found[order] for order in sorted(found)]
        value = torch.cat(parts) if len(parts) > 1 else parts[0]
        place, _, leaf = ours.rpartition(".")
        if leaf == "qkv_bias":
            weights.update({f"{place}.{key}": third.clone() for key, third in zip(QKV, value.chunk(3), strict=True)})
        else:
            weights[ours] = value
    return weights


def numbers_of(model: Vit, foreign: ModelSpec) -> dict[str, Tensor]:
    """Our model's numbers, on the CPU, under the names that a spec read off a foreign module has for them.

    Classifiers are called as there, in their order; a last norm of the pooled vector is one of all tokens too.
    """
    heads = {ours.name: theirs.name for ours, theirs in zip(model.spec.outputs, foreign.outputs, strict=True)}
    numbers: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        if name.startswith("heads."):
            _, head, leaf = name.split(".", 2)
            name = f"heads.{heads[head]}.{leaf}"
        numbers[name] = value.detach().cpu()
    for leaf in ("weight", "bias"):
        for one, other in (("norm", "pool_norm"), ("pool_norm", "norm")):
            if f"{one}.{leaf}" in numbers:
                numbers.setdefault(f"{other}.{leaf}", numbers[f"{one}.{leaf}"])
    return numbers


def given(numbers: Mapping[str, Tensor], places: Places, shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """Our numbers under a foreign module's names, in its shapes; a bias or table that we have not is zeros, a LayerScale ones."""
    joined: dict[str, dict[int, str]] = defaultdict(dict)
    for theirs, (ours, order) in places.items():
        joined[ours][order] = theirs
    state: dict[str, Tensor] = {}
    for ours, members in joined.items():
        names = [members[order] for order in sorted(members)]
        sizes = [math.prod(shapes[theirs]) for theirs in names]
        for theirs, piece in zip(names, _whole(numbers, ours, sum(sizes)).split(sizes), strict=True):
            state[theirs] = piece.reshape(tuple(shapes[theirs])).clone()
    return state


def _whole(numbers: Mapping[str, Tensor], name: str, count: int) -> Tensor:
    """All numbers of one of our tensors in a row."""
    if name in numbers:
        return numbers[name].flatten()
    like = next(iter(numbers.values()))
    place, _, leaf = name.rpartition(".")
    if leaf == "qkv_bias":
        return torch.cat([numbers.get(f"{place}.{key}", like.new_zeros(count // 3)) for key in QKV])
    assert leaf == "gamma" or name.endswith(("bias", "position")), name
    return like.new_ones(count) if leaf == "gamma" else like.new_zeros(count)


class Told(TypedDict, total=False):
    """What comes along with a module: None and what is not there are taken from the module itself, if it says so.

    labels: class names in the order of the logits.  problem_type: one class an image (None), or several labels.
    """

    preprocess: Preprocess | None
    labels: tuple[str, ...] | None
    provenance: dict[str, Any] | None
    problem_type: ProblemType | None


def problem_type_in(config: Mapping[str, Any]) -> ProblemType | None:
    """What a folder's config.json says that its classifier answers; None where it says nothing known."""
    said = config.get("problem_type")
    return said if said in get_args(ProblemType) else None


def filled(
    spec: ModelSpec,
    weights: Mapping[str, Tensor],
    *,
    task: Literal["classification", "features"] | None = None,
    **told: Unpack[Told],
) -> Vit:
    """Our model with these numbers, in eval mode; the random state stays as it is. task: None is told by the classifiers."""
    task = task or ("classification" if spec.outputs else "features")
    config = Config(spec=spec, task=task, preprocess=told.get("preprocess"), labels=told.get("labels"))
    if (problem := told.get("problem_type")) is not None:
        config = replace(config, problem_type=problem)
    with torch.device("meta"):  # no memory and no random numbers for values that are replaced at once
        model = Vit(config, provenance=told.get("provenance"))
    model.load_state_dict(weights, strict=True, assign=True)
    return model.eval()
