"""The parts of a foreign module, known by what they are: halves of a spec, or a refusal that names the part."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..architectures import dense_attention
from ..errors import SourceError, SpecError
from ..spec import AttentionSpec, ConvStem, MlpKind, MlpSpec, Output
from .files import advice
from .states import listed

ACTIVATIONS: dict[str, MlpKind] = {
    "GELU": "gelu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "QuickGELU": "quick_gelu",
    "QuickGELUActivation": "quick_gelu",
    "ReLU": "relu",
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "Swish": "silu",
}
"""Classes of timm, transformers and torch; torch's GELU says itself which it is."""


@dataclass(frozen=True, slots=True)
class Reader:
    """Reads the parts of one module. Everything raises SourceError for what the spec cannot say.

    advice: which models the family reads, the end of a refusal.  eps: of the norms read so far.
    """

    advice: str
    eps: set[float] = field(default_factory=set)

    def refused(self, what: str) -> SourceError:
        """The error that names what the spec cannot say."""
        return SourceError(f"this model has {what}, which vitrim cannot take in. {self.advice}")

    def stem(self, conv: Any, patch: tuple[int, ...]) -> ConvStem:
        """Patches side by side through one convolution."""
        kernel, stride = tuple(conv.kernel_size), tuple(conv.stride)  # lists, where a JSON file told them to timm
        padded = conv.padding not in ("valid", (0, 0), 0)
        if (kernel, stride, conv.dilation, conv.groups) != (patch, patch, (1, 1), 1) or padded:
            raise self.refused(f"patches that overlap or leave gaps (kernel {kernel}, stride {stride})")
        return ConvStem(bias=conv.bias is not None)

    def norm(self, part: Any, where: str) -> bool:
        """Whether there is a layer norm with weight and bias; its eps is remembered."""
        if isinstance(part, nn.Identity):
            return False
        if not isinstance(part, nn.LayerNorm):
            kind = "root-mean-square norm" if "rms" in type(part).__name__.lower() else "part"
            raise self.refused(f"a {kind} ({type(part).__name__}) in place of a layer norm at {where}")
        if part.weight is None or part.bias is None:
            raise self.refused(f"a norm without weight or bias at {where}")
        self.eps.add(part.eps)
        return True

    def norms(self, parts: Mapping[str, Any], where: str) -> None:
        """Layer norms by their names, none of which may be left out."""
        for name, part in parts.items():
            if not self.norm(part, f"{where}, {name}"):
                raise self.refused(f"no {name} ({where})")

    def one_eps(self, default: float) -> float:
        """The eps of all norms; the default where there is no norm."""
        if len(self.eps) > 1:
            raise self.refused(f"norms with different eps {sorted(self.eps)!r}")
        return next(iter(self.eps), default)

    def linears(self, parts: Mapping[str, Any], where: str) -> None:
        """Plain linears by their names: no adapters, no quantised ones."""
        for name, part in parts.items():
            if type(part) is not nn.Linear:
                raise self.refused(
                    f"a {type(part).__name__} as {name} in {where} (merge adapters and undo quantisation first)"
                )

    def activation(self, act: Any, where: str) -> MlpKind:
        """Its kind, by its class."""
        if isinstance(act, nn.GELU):
            return "gelu_tanh" if act.approximate == "tanh" else "gelu"
        name = getattr(act, "__name__", type(act).__name__)
        if name not in ACTIVATIONS:
            raise self.refused(f"the activation {name} ({where})")
        return ACTIVATIONS[name]

    def without(self, faults: Mapping[str, bool], said: str = "{}") -> None:
        """Refuse the first of these that is there. said: what stands around its words."""
        for what in (what for what, there in faults.items() if there):
            raise self.refused(said.format(what))

    def attention(self, attn: Any, heads: int, dim: int, where: str, **more: Any) -> AttentionSpec:
        """Attention whose queries, keys and values are one linear `qkv`, before `proj`. more: as of `dense_attention`."""
        qkv, out = attn.qkv, attn.proj
        self.linears({"qkv": qkv, "proj": out}, where)
        if qkv.out_features != 3 * heads * dim or out.in_features != heads * dim:
            raise self.refused(f"attention whose linears do not fit {heads} heads of {dim} ({where})")
        return dense_attention(heads, dim, bias=qkv.bias is not None, out_bias=out.bias is not None, **more)

    def mlp(
        self, linears: Mapping[str, Any], act: Any, where: str, *, layer_scale: bool = False, gated: bool = False
    ) -> MlpSpec:
        """An MLP by its linears, of which the last is the second. gated: the first, or those before it, are gate and value."""
        self.linears(linears, where)
        *first, second = linears.values()
        kind, biases = self.activation(act, where), {part.bias is not None for part in first}
        if gated and kind != "silu":
            raise self.refused(f"an MLP gated by {kind} ({where})")
        if len(biases) != 1:
            raise self.refused(f"a bias on one of the gated MLP's two first linears ({where})")
        return MlpSpec(
            kind="swiglu" if gated else kind,
            hidden=second.in_features,
            fc1_bias=biases.pop(),
            fc2_bias=second.bias is not None,
            layer_scale=layer_scale,
        )

    def outputs(
        self, head: Any, attribute: str, name: str = "head", reads: tuple[str, ...] = ("pool",)
    ) -> list[Output]:
        """The classifier that is one linear; none for an identity."""
        if isinstance(head, nn.Identity):
            return []
        if type(head) is not nn.Linear:
            raise self.refused(f"a classifier that is more than one linear ({attribute}: {type(head).__name__})")
        return [Output(name=name, reads=reads, classes=head.out_features, bias=head.bias is not None)]

    def table_rows(self, rows: int, expected: int) -> None:
        """Check the size of the position table."""
        if rows != expected:
            raise self.refused(f"a position table of {rows} rows where {expected} were expected")

    def all_placed(self, module: nn.Module, places: Collection[str]) -> None:
        """Check that every number of the module has found its place."""
        if left := sorted(set(module.state_dict()) - set(places)):
            hint = f" ({hint.strip().removesuffix('.')})" if (hint := advice(left)) else ""
            raise self.refused(f"numbers that a plain one does not have: {listed(left)}{hint}")


@contextmanager
def valid(module: nn.Module, family: str) -> Iterator[None]:
    """Turn what an impossible spec raises into the error of a source."""
    try:
        yield
    except SpecError as error:
        raise SourceError(f"{family} module {type(module).__name__}: {error}") from None


def by_name(designs: Mapping[str, str]) -> dict[str, str]:
    """What sets a design apart, by name, from the names (apart by spaces) by what sets them apart."""
    return {name: what for what, names in designs.items() for name in names.split()}
