"""Budgets: what a compressed model may cost, in any combination, and the refusal of one that cannot be met. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import wraps
from typing import Any, TypeVar

from .counting import ADDITIVE, FLOAT_BYTES, Cost
from .errors import BudgetError, did_you_mean
from .foreign import MOST, is_finite

B = TypeVar("B")

MEGABYTES = {"memory_bytes": "max_memory_mb", "file_bytes": "max_file_mb"}
"""Resources in bytes whose limits are given in megabytes, and the names of these."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Constraints:
    """Limits as an allocation takes them. additive: by the names of `counting.ADDITIVE`, a file's bytes among its parameters.

    memory_bytes: of the parameters and the widest moment together; None: no such limit.
    """

    additive: Mapping[str, int]
    memory_bytes: int | None = None

    @staticmethod
    def of(limits: Mapping[str, int]) -> Constraints:
        """From `Budget.limits`."""
        additive = {name: limits[name] for name in ADDITIVE if name in limits}
        if "file_bytes" in limits:
            most = limits["file_bytes"] // FLOAT_BYTES
            additive["params"] = min(most, additive.get("params", most))
        return Constraints(additive=additive, memory_bytes=limits.get("memory_bytes"))

    def beside(self, peak_bytes: int) -> dict[str, int]:
        """The additive limits where the activations of the widest moment take so much."""
        found = dict(self.additive)
        if self.memory_bytes is not None:
            most = (self.memory_bytes - peak_bytes) // FLOAT_BYTES
            found["params"] = min(most, found.get("params", most))
        return found


def _known_keys(kind: type[B]) -> type[B]:
    """The dataclass, which tells an unknown key as a config does."""
    check, known = kind.__init__, [field.name for field in fields(kind)]  # type: ignore[arg-type]

    @wraps(check)
    def init(self: Any, **values: Any) -> None:
        for key in values:
            if key not in known:
                raise BudgetError(
                    f"budget: unknown key {key!r}{did_you_mean(key, known) or '.'} Known: {', '.join(known)}."
                )
        check(self, **values)

    kind.__init__ = init  # type: ignore[method-assign]
    return kind


@_known_keys
@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """Upper bounds on the compressed model; None: no such limit. At least one is needed.

    MACs are those of `vitrim.counting`: the zeros that fill unequal heads (`Cost.padding_macs`) are not among them.
    keep_*: shares, in (0, 1], of the model that is passed in. max_memory_mb: weights plus peak activations at batch 1.
    Megabytes are 10**6 bytes. Raises BudgetError when a value is out of range.
    """

    keep_macs: float | None = None
    keep_params: float | None = None
    keep_expected_macs: float | None = None
    max_macs: int | None = None
    max_params: int | None = None
    max_memory_mb: float | None = None
    max_file_mb: float | None = None
    max_latency_ms: float | None = None
    table: str | None = None

    def __post_init__(self) -> None:
        given = {field.name: getattr(self, field.name) for field in fields(Budget)}
        if all(value is None for value in given.values()):
            raise BudgetError("budget: no limit given. To halve the operations, pass keep_macs=0.5.")
        for name, value in given.items():
            if value is None or name == "table":
                continue
            number = is_finite(value)
            if name.startswith("keep_") and not (number and 0 < value <= 1):
                raise BudgetError(f"{name}={value!r}; expected a share in (0, 1]. To keep half, pass 0.5.")
            most = MOST // 10**6 if name.endswith("_mb") else MOST
            if name.startswith("max_") and not (number and 0 < value <= most):
                raise BudgetError(f"{name}={value!r}; expected a number above 0 and at most {most:.0e}.")
        for name in ("keep_expected_macs", "max_latency_ms", "table"):
            if given[name] is not None:
                raise BudgetError(
                    f"{name}={given[name]!r}: no method here meets this kind of limit yet. Use keep_macs, keep_params, "
                    "max_macs, max_params, max_memory_mb or max_file_mb."
                )

    def whole(self, given: Cost) -> Cost:
        """What shares refer to, where a method is given a network of this cost: that one, unless `of` named another."""
        return given

    def of(self, reference: Cost) -> Budget:
        """The same budget with its shares of `reference`, whatever a method is given: an exact tail, say, comes before it."""
        return _BudgetOf(**self.to_dict(), reference=reference)

    def limits(self, reference: Cost) -> dict[str, int]:
        """The bound on each limited resource, in its own unit. reference: what a method is given; shares are of its `whole`."""
        found: dict[str, int] = {}
        reference = self.whole(reference)

        def bound(resource: str, value: float | None) -> None:
            if value is not None:
                found[resource] = min(math.floor(value), found.get(resource, math.floor(value)))

        bound("macs", None if self.keep_macs is None else self.keep_macs * reference.macs)
        bound("macs", self.max_macs)
        bound("params", None if self.keep_params is None else self.keep_params * reference.params)
        bound("params", self.max_params)
        bound("memory_bytes", _bytes(self.max_memory_mb))
        bound("file_bytes", _bytes(self.max_file_mb))
        return found

    def met_by(self, cost: Cost, reference: Cost) -> bool:
        """Whether a model of this cost is within every limit."""
        return not exceeded(cost, self.limits(reference))

    def refuse_unreachable(self, *, floor: Cost, reference: Cost, method: str) -> None:
        """Raise BudgetError, with the range that can be reached, unless the cheapest network (`floor`) is within.

        reference: what the method is given. The shares of the message are those that `keep_*` take.
        """
        limits, whole = self.limits(reference), self.whole(reference)
        if over := exceeded(floor, limits):
            said = "; ".join(
                _range_text(name, limits[name], getattr(floor, name), getattr(whole, name), method) for name in over
            )
            raise BudgetError(f"budget out of reach: {said}. Choose a limit in that range, or another method.")

    def to_dict(self) -> dict[str, Any]:
        """The limits that are set."""
        return {f.name: getattr(self, f.name) for f in fields(Budget) if getattr(self, f.name) is not None}


@dataclass(frozen=True, kw_only=True, slots=True)
class _BudgetOf(Budget):
    """A budget whose shares are of one network while a method is given another."""

    reference: Cost

    def whole(self, given: Cost) -> Cost:
        return self.reference


def exceeded(cost: Cost, limits: Mapping[str, int]) -> list[str]:
    """Names of the limited resources of which `cost` takes more than its limit."""
    return [name for name, limit in limits.items() if getattr(cost, name) > limit]


def _bytes(megabytes: float | None) -> float | None:
    """Megabytes of six decimals are whole bytes, though a product of floats may fall a hair below."""
    return None if megabytes is None else round(megabytes * 1e6, 3)


def _range_text(name: str, asked: int, floor: int, whole: int, method: str) -> str:
    """What was asked of a resource and what can be reached, in the unit in which a limit of it is given."""
    if name in MEGABYTES:
        low, high = (f"{count / 1e6:.6f}".rstrip("0").rstrip(".") for count in (floor, whole))
        return f"{MEGABYTES[name]} {asked / 1e6:g} asked, {method} reaches {low} to {high}"
    return f"{name} at most {asked:,} asked, {method} reaches {floor:,} to {whole:,} (shares {least_share(floor, whole):g} to 1)"


def least_share(part: int, whole: int) -> float:
    """The least share of three digits that allows `part` of `whole`."""
    unit = 10.0 ** (math.floor(math.log10(max(part, 1) / whole)) - 2)
    count = math.ceil(part / whole / unit)
    while math.floor(float(f"{count * unit:.3g}") * whole) < part:
        count += 1
    return float(f"{count * unit:.3g}")
