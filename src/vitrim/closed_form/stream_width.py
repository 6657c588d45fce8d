"""The width of the residual stream: a basis of its leading directions, and the network that lives in it.

Whatever reads the stream reads it through a LayerNorm, hence only its centred tokens c(x) = x - mean over channels. With Q the
k = D' - 1 leading eigenvectors of their uncentred Gram matrix, E an orthonormal basis of the D'-vectors of mean 0 and
kappa = sqrt(D'/D), the narrow token is t = kappa E Q^T c(x). Its mean is 0 and its variance |Q^T c(x)|^2 / D, so a plain
LayerNorm of width D' reads it, and the network stays an ordinary ViT. What is lost is c(x) outside Q, and with it the length
that the norm divides by; a regression of the dense normalised token on the narrow one, one for each reader, gives the
correctable part back. At D' = D nothing is lost and the correction is the identity.

Source   ours, on the idea of SliceGPT (arXiv 2401.15024: rotate the stream, drop directions), which needs RMSNorm.
Shapes   D width, D' narrow width, k directions, N tokens, P prefix tokens, L blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from vitrim.closed_form.factors import fold_value_bias
from vitrim.closed_form.regression import Regression, refit
from vitrim.errors import DataError, SpecError
from vitrim.model import Vit
from vitrim.spec import BlockSpec, Merge, ModelSpec, Similarity, Step
from vitrim.surgery import with_spec

RIDGE = 1e-3
"""Pull of a reader's correction towards the bare projection, relative to the variance of the narrow token."""
BALANCE = 0.3
"""Power of the outputs' metric in the choice of directions: 0 keeps the most energy, 1/2 weighs energy and effect alike."""
FLAT = 1e-3
"""Share of the identity in that metric."""
Weights = Callable[[str, int], Tensor | None]
"""Token weights [N] of a reader by its name and the number of tokens; None: all alike."""


def compared(metric: Tensor) -> Tensor:
    """Directions [D', R] with at most D' of them that give the same distances."""
    if metric.shape[1] <= metric.shape[0]:
        return metric
    values, vectors = torch.linalg.eigh(metric @ metric.mT)
    return vectors * values.clamp_min(0).sqrt()


def refusal(spec: ModelSpec) -> str | None:
    """Why the stream of this network has to keep its width; None if it may become narrower."""
    if not spec.outputs:
        return "the stream is what an encoder gives"
    if spec.pre_norm:
        return "a norm between stem and blocks, whose result cannot be folded into a narrower stream (pre_norm)"
    if spec.pool.kind == "map":
        return "attention pooling works in the width of the stream (pool map)"
    if spec.final_norm and spec.pool_norm:
        return "a norm behind the final norm, which cannot be folded into the classifier (pool_norm)"
    if not spec.final_norm and not (spec.pool_norm and all(o.reads == ("pool",) for o in spec.outputs)):
        return "a classifier that reads the stream without a norm"
    if any(isinstance(step, Merge) and step.weight == "learned" for block in spec.blocks for step in block.steps):
        return "a learned merge, which weighs the channels of the stream one by one"
    return None


def narrowed_spec(spec: ModelSpec, width: int) -> ModelSpec:
    """The spec that `narrow` leaves.  spec: LayerScale folded. Raises SpecError where the width cannot change."""
    if (why := refusal(spec)) is not None:
        raise SpecError(f"stream width {width}: {why}. Keep width={spec.width}.")
    blocks = tuple(_narrowed_block(block, width) for block in spec.blocks)
    position = spec.position
    if position.kind != "none" and position.resize == "rebuild_1d":
        position = replace(position, resize="bicubic")  # a table of another width cannot be made anew from its formula
    outputs = tuple(replace(output, bias=True) for output in spec.outputs)
    return replace(spec, width=width, blocks=blocks, position=position, outputs=outputs)


def _narrowed_block(block: BlockSpec, width: int) -> BlockSpec:
    a, m = block.attention, block.mlp
    if a is not None:
        assert not a.layer_scale
        a = replace(a, q_bias=True, k_bias=a.qk_norm != "none", v_bias=False, out_bias=True)
    if m is not None:
        assert not m.layer_scale
        rows = 2 * m.hidden if m.kind == "swiglu" else m.hidden
        m = replace(
            m,
            fc1_bias=True,
            fc1_rank=_worth(m.fc1_rank, width, rows),
            fc2_rank=_worth(m.fc2_rank, m.hidden, width),
        )
    return replace(block, attention=a, mlp=m, steps=tuple(_narrowed_step(step, width) for step in block.steps))


def _narrowed_step(step: Step, width: int) -> Step:
    if not isinstance(step, Similarity):
        return step
    metric, carry = (None if rank is None else min(rank, width) for rank in (step.metric, step.carry))
    return replace(step, metric=metric, carry=carry)


def _worth(rank: int | None, inputs: int, outputs: int) -> int | None:
    """The rank, or None where two factors of it are no cheaper than their product."""
    return rank if rank is not None and rank * (inputs + outputs) < inputs * outputs else None


# ------------------------------------------------------------------------------------------------------------- statistics


def helmert(size: int) -> Tensor:
    """[size, size - 1] orthonormal columns, orthogonal to the vector of ones; float64."""
    columns = torch.arange(1, size, dtype=torch.float64)  # column j: j + 1 entries that sum to 0
    rows = torch.arange(size, dtype=torch.float64)[:, None]
    values = torch.where(rows < columns, torch.ones(()).double(), torch.where(rows == columns, -columns, 0.0))
    return values / (columns * (columns + 1)).sqrt()


@dataclass
class Stream:
    """Sums of x^T x over centred tokens at every reader: `prefix` and `patch` tokens apart, [D, D] float64 on the CPU."""

    prefix: Tensor
    patch: Tensor

    @classmethod
    def empty(cls, width: int) -> Stream:
        return cls(*(torch.zeros(width, width, dtype=torch.float64) for _ in range(2)))

    def add(self, x: Tensor, prefix: int) -> None:
        """x: B N D, prefix tokens first."""
        centred = x - x.mean(-1, keepdim=True)
        for total, part in ((self.prefix, centred[:, :prefix]), (self.patch, centred[:, prefix:])):
            rows = part.flatten(0, 1)
            if len(rows):
                total += (rows.mT @ rows).to("cpu", torch.float64)

    @property
    def gram(self) -> Tensor:
        """[D, D]: both kinds with trace 1. Raises DataError where every token is constant."""
        total = torch.zeros_like(self.patch)
        for part in (self.prefix, self.patch):
            if float(trace := part.diagonal().sum()) > 0:
                total += part / trace
        if not float(total.diagonal().sum()) > 0 or not torch.isfinite(total).all():
            raise DataError(
                "the residual stream is constant or not finite. Check the weights and the images' normalisation."
            )
        return total


@dataclass(frozen=True)
class Basis:
    """k directions of a stream.  q: [D, k], orthonormal and orthogonal to ones; float64."""

    q: Tensor

    @property
    def width(self) -> int:
        """D', of the narrow stream."""
        return self.q.shape[1] + 1

    @property
    def kappa(self) -> float:
        return math.sqrt(self.width / self.q.shape[0])

    @property
    def down(self) -> Tensor:
        """[D, D'] wide rows to narrow ones: x @ down."""
        return self.kappa * self.q @ helmert(self.width).to(self.q).mT

    @property
    def up(self) -> Tensor:
        """[D, D'] by which an error of the narrow stream is one of the wide: dx = up @ dt."""
        return self.q @ helmert(self.width).to(self.q).mT / self.kappa


def directions(gram: Tensor, width: int, metric: Tensor | None = None) -> Basis:
    """The basis for a narrow stream of this width.

    gram: [D, D] of centred tokens, not centred over tokens: that would lose the stream's large constant part, which the norms
    divide by. metric: [D, D] how much the outputs mind the stream, up to a factor; the leading directions are then those of
    F^a G F^a, a = `BALANCE`, within the directions that the stream has at all. None: F is the identity.
    """
    free = helmert(len(gram))
    values, vectors = torch.linalg.eigh(free.mT @ gram @ free)
    values, vectors = values.flip(-1), free @ vectors.flip(-1)
    count = width - 1
    live = int((values > 1e-12 * values[0]).sum())
    if metric is not None and live > count:
        there = vectors[:, :live]
        f = there.mT @ metric @ there
        squares, turn = torch.linalg.eigh(f)
        squares = squares.clamp_min(0) / squares.mean().clamp_min(1e-300) + FLAT
        root = (turn * squares**BALANCE) @ turn.mT
        _, chosen = torch.linalg.eigh((root * values[:live]) @ root.mT)
        vectors = there @ chosen.flip(-1)
    return Basis(vectors[:, :count])


def readers(model: Vit) -> dict[str, nn.LayerNorm]:
    """The norms through which the stream is read, by name: `norm1:i`, `norm2:i`, and `norm` in front of the classifier."""
    found: dict[str, nn.LayerNorm] = {}
    for i, block in enumerate(model.blocks):
        if block.spec.attention is not None:
            found[f"norm1:{i}"] = block.norm1
        if block.spec.mlp is not None:
            found[f"norm2:{i}"] = block.norm2
    last = model.norm if model.spec.final_norm else model.pool_norm
    assert isinstance(last, nn.LayerNorm)
    return found | {"norm": last}


@torch.no_grad()
def readings(model: Vit, x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """What each reader is given, in order, gates open: its name, and B N D; a pooled vector comes as B 1 D.  x: B C h w."""
    stream = model.embed(x)
    for i, block in enumerate(model.blocks):
        stream = block.start(stream)
        if block.spec.attention is not None:
            yield f"norm1:{i}", stream.x
        stream = block.mid(block.attend(stream).stream)
        if block.spec.mlp is not None:
            yield f"norm2:{i}", stream.x
        stream = block.end(block.transform(stream).stream)
    last = stream.x if model.spec.final_norm else model.pool_of(stream, stream.x)
    yield "norm", last if last.dim() == 3 else last[:, None]


@dataclass(frozen=True)
class Reader:
    """What a reader takes the dense normalised token for: narrow @ matrix^T + shift.  matrix: [D, k]; shift: [D]."""

    matrix: Tensor
    shift: Tensor

    @classmethod
    def bare(cls, basis: Basis) -> Reader:
        """The projection as it is."""
        return cls(basis.q, torch.zeros(len(basis.q), dtype=torch.float64))


def corrections(
    model: Vit, basis: Basis, batches: Iterable[Tensor], *, weights: Weights | None = None, ridge: float = RIDGE
) -> dict[str, Reader]:
    """The regression of the dense normalised token on the narrow one, for each reader within the blocks.

    weights: of the tokens. The classifier is left with the bare projection: its tokens are one or two an image.
    """
    sums: dict[str, Regression] = {}
    norms = readers(model)
    size = basis.q.shape[1]
    like = next(model.parameters())
    for images in batches:
        for name, x in readings(model, images.to(like)):
            if name == "norm":
                continue
            if name not in sums:
                sums[name] = Regression.empty(size, x.shape[-1], device=x.device)
            narrow, wide = normalised(x, basis, norms[name].eps)
            chosen = None if weights is None else weights(name, x.shape[1])
            sums[name].add(narrow, wide, None if chosen is None else chosen.to(x))
    found = {name: Reader.bare(basis) for name in norms}
    for name, total in sums.items():
        w, b = refit(total, basis.q.mT, ridge=ridge)
        assert b is not None
        found[name] = Reader(w.mT.cpu(), b.cpu())
    return found


def normalised(x: Tensor, basis: Basis, eps: float) -> tuple[Tensor, Tensor]:
    """Narrow [..., k] and wide [..., D] tokens, each divided by its own length as LayerNorm does."""
    centred = x - x.mean(-1, keepdim=True)
    inner = centred @ basis.q.to(x)
    size = x.shape[-1]
    wide = centred / (centred.square().sum(-1, keepdim=True) / size + eps).sqrt()
    return inner / (inner.square().sum(-1, keepdim=True) / size + eps).sqrt(), wide


# ---------------------------------------------------------------------------------------------------------------- the edit


def narrow(model: Vit, basis: Basis, corrected: Mapping[str, Reader] | None = None) -> Vit:
    """The network whose stream is `basis.width` wide.  model: LayerScale folded.

    corrected: by the names of `readers`; None: the bare projections. Norms become plain (weight 1, bias 0): their affine parts
    move into what reads them. All products in float64. Raises SpecError where the width cannot change.
    """
    new = narrowed_spec(model.spec, basis.width)
    state = {name: value.detach() for name, value in model.state_dict().items()}
    edit = _Edit(state, basis, dict(corrected or {}))
    for name in ("stem.proj", "stem.project"):
        if f"{name}.weight" in state:
            edit.writes(name)
    for name in ("prefix", "position"):
        if name in state:
            state[name] = edit.rows(state[name])
    for i, (block, after) in enumerate(zip(model.spec.blocks, new.blocks, strict=True)):
        if block.attention is not None:
            edit.attention(i, block)
        if block.mlp is not None:
            edit.mlp(i, block, after)
        for j in range(len(block.steps)):
            edit.step(f"blocks.{i}.steps.{j}")
    for output in new.outputs:
        edit.classifier(output.name, len(output.reads), "norm" if model.spec.final_norm else "pool_norm")
    edit.plain("norm" if model.spec.final_norm else "pool_norm")
    return with_spec(model, new, state)


class _Edit:
    """The narrowing of one state dict, in place."""

    def __init__(self, state: dict[str, Tensor], basis: Basis, corrected: dict[str, Reader]) -> None:
        self.state, self.basis, self.corrected, self.like = state, basis, corrected, next(iter(state.values()))

    def get(self, name: str) -> Tensor:
        return self.state[name].to("cpu", torch.float64)

    def put(self, name: str, value: Tensor) -> None:
        self.state[name] = value.to(self.like)

    def rows(self, value: Tensor) -> Tensor:
        """Rows of the wide stream, [..., D], as rows of the narrow."""
        return (value.to("cpu", torch.float64) @ self.basis.down).to(value)

    def writes(self, linear: str) -> None:
        """A linear or convolution that writes into the stream.  weight [D, ...], bias [D]."""
        weight = self.state[f"{linear}.weight"]
        self.state[f"{linear}.weight"] = self.rows(weight.movedim(0, -1)).movedim(-1, 0).contiguous()
        if f"{linear}.bias" in self.state:
            self.state[f"{linear}.bias"] = self.rows(self.state[f"{linear}.bias"])

    def read(self, weight: Tensor, norm: str, site: str) -> tuple[Tensor, Tensor]:
        """A matrix [rows, D] on normalised tokens: on narrow ones [rows, D'], and the constant [rows] that it adds."""
        reader = self.corrected.get(site) or Reader.bare(self.basis)
        gamma, beta = self.get(f"{norm}.weight"), self.get(f"{norm}.bias")
        up = reader.matrix @ helmert(self.basis.width).mT / self.basis.kappa  # D D'
        return (weight * gamma) @ up, weight @ (beta + gamma * reader.shift)

    def plain(self, norm: str) -> None:
        self.state[f"{norm}.weight"] = self.like.new_ones(self.basis.width)
        self.state[f"{norm}.bias"] = self.like.new_zeros(self.basis.width)

    def gate(self, half: str, norm: str, site: str) -> None:
        if f"{half}.gate.weight" in self.state:
            weight, constant = self.read(self.get(f"{half}.gate.weight"), norm, site)
            self.put(f"{half}.gate.weight", weight)
            self.put(f"{half}.gate.bias", self.get(f"{half}.gate.bias") + constant)

    def attention(self, i: int, block: BlockSpec) -> None:
        a = block.attention
        assert a is not None
        here, norm, site = f"blocks.{i}.attention", f"blocks.{i}.norm1", f"norm1:{i}"
        inner = a.heads * a.qk_dim
        weight, constant = self.read(self.get(f"{here}.qkv"), norm, site)
        q, k, v = constant.split([inner, inner, a.heads * a.v_dim])
        for name, value in (("q_bias", q), ("k_bias", k), ("v_bias", v)):
            if f"{here}.{name}" in self.state:
                value += self.get(f"{here}.{name}")
                del self.state[f"{here}.{name}"]
        out = self.get(f"{here}.out.weight")
        bias = self.get(f"{here}.out.bias") if f"{here}.out.bias" in self.state else None
        folded = fold_value_bias(v.unflatten(0, (a.heads, -1)), out.mT.unflatten(0, (a.heads, -1)), bias)
        assert folded is not None
        self.put(f"{here}.qkv", weight)
        self.put(f"{here}.q_bias", q)
        if a.qk_norm != "none":  # without a norm a constant of all keys is invisible to the softmax
            self.put(f"{here}.k_bias", k)
        self.put(f"{here}.out.bias", folded)
        self.writes(f"{here}.out")
        self.gate(here, norm, site)
        self.plain(norm)

    def mlp(self, i: int, block: BlockSpec, after: BlockSpec) -> None:
        m, new = block.mlp, after.mlp
        assert m is not None
        assert new is not None
        here, norm, site = f"blocks.{i}.mlp", f"blocks.{i}.norm2", f"norm2:{i}"
        if m.fc1_rank is None:
            weight, constant = self.read(self.get(f"{here}.fc1.weight"), norm, site)
        else:
            first, inner = self.read(self.get(f"{here}.fc1a.weight"), norm, site)
            weight, constant = self.get(f"{here}.fc1.weight"), self.get(f"{here}.fc1.weight") @ inner
            if new.fc1_rank is None:
                weight = weight @ first
                del self.state[f"{here}.fc1a.weight"]
            else:
                self.put(f"{here}.fc1a.weight", first)
        if m.fc1_bias:
            constant = constant + self.get(f"{here}.fc1.bias")
        self.put(f"{here}.fc1.weight", weight)
        self.put(f"{here}.fc1.bias", constant)
        if m.fc2_rank is not None and new.fc2_rank is None:
            self.put(f"{here}.fc2.weight", self.get(f"{here}.fc2.weight") @ self.get(f"{here}.fc2a.weight"))
            del self.state[f"{here}.fc2a.weight"]
        self.writes(f"{here}.fc2")
        self.gate(here, norm, site)
        self.plain(norm)

    def step(self, here: str) -> None:
        """What compares and weighs tokens, and what carries their differences along: in a narrow stream, at ranks of its width at the most."""
        if f"{here}.metric" in self.state:
            self.put(f"{here}.metric", compared(self.basis.up.mT @ self.get(f"{here}.metric")))
        if f"{here}.importance" in self.state:
            self.put(f"{here}.importance", self.basis.up.mT @ self.get(f"{here}.importance"))
        if f"{here}.carry_a" in self.state:
            a, b = self.basis.up.mT @ self.get(f"{here}.carry_a"), self.get(f"{here}.carry_b") @ self.basis.down
            if b.shape[0] > self.basis.width:
                left, strength, b = torch.linalg.svd(a @ b)
                a = left * strength
            self.put(f"{here}.carry_a", a)
            self.put(f"{here}.carry_b", b)

    def classifier(self, name: str, reads: int, norm: str) -> None:
        first = f"heads.{name}_a" if f"heads.{name}_a.weight" in self.state else f"heads.{name}"
        parts = [self.read(part, norm, "norm") for part in self.get(f"{first}.weight").chunk(reads, dim=1)]
        constant = torch.stack([shift for _, shift in parts]).sum(0)
        if first != f"heads.{name}":
            constant = self.get(f"heads.{name}.weight") @ constant
        bias = f"heads.{name}.bias"
        if bias in self.state:
            constant = constant + self.get(bias)
        self.put(f"{first}.weight", torch.cat([weight for weight, _ in parts], dim=1))
        self.put(bias, constant)
