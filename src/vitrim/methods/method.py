"""What a method is: a frozen record of its functions, and the settings that all methods have. No torch.

The functions of a record are given as `lazy.later("module:name")`, so that a record can be read without importing torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, Self, TypedDict, Unpack

from pydantic import Field

from vitrim.budget import Budget
from vitrim.config import checked
from vitrim.spec import ProductName

if TYPE_CHECKING:
    from pathlib import Path

    from vitrim.data import Images
    from vitrim.model import Vit
    from vitrim.progress import Progress
    from vitrim.result import Compressed, Section
    from vitrim.spec import ModelSpec


@checked
class MethodConfig:
    """What every method is told."""

    budget: Budget | None = None
    """Bounds on the result; None only where the method is given several, or explicit ranks in their place."""
    freeze: tuple[str, ...] = ()
    """Parts that stay as they are, weights too, such as `blocks.0-2` or `blocks.11.attention`."""
    seed: int = Field(default=0, ge=0)
    """Of every random draw, the choice of images among them."""
    device: str | None = None
    """Where to compute, such as cuda; None: where the model is."""

    @property
    def takes_tail(self) -> bool:
        """Whether a job may put an exact tail in front of the method."""
        return True

    def without_tail(self) -> Self:
        """The same for a method that would add one of its own."""
        return self


@checked
class FittedConfig(MethodConfig):
    """What a method of closed forms is told besides."""

    product: ProductName | None = None
    """What the network is for, and errors are measured in. `output`: what `model(x)` gives; `tokens`: every token behind the final
    norm, merged ones restored. What is not the product may be lost. None: the tokens of an encoder, the output of a classifier."""

    @property
    def takes_tail(self) -> bool:
        return self.product != "tokens"


class Needs(TypedDict):
    """images: how many are looked at, 0: none. labels: whether they are read. training: whether weights learn by steps."""

    images: int
    labels: bool
    training: bool


class Plan(TypedDict):
    """What can be said from the spec alone.

    range: least and most of each resource. step: how far below a budget the result may end. dense: what stays, and why.
    """

    method: str
    variant: str
    range: dict[str, list[int]]
    step: dict[str, int]
    needs: Needs
    dense: dict[str, str]


class How(TypedDict, total=False):
    """What a compression goes by beside its config; all may be left out.

    data: whatever `vitrim.data.open` takes. folder: where a long run leaves what it goes on from, with `resume`.
    """

    data: Any
    progress: Progress | None
    folder: Path | None
    resume: bool


class Compress(Protocol):
    """A smaller model; `model` is left as it was. teacher: only for a method that takes one."""

    def __call__(self, model: Vit, config: Any, *, teacher: Vit = ..., **how: Unpack[How]) -> Compressed: ...


class CompressFamily(Protocol):
    """A smaller model for each budget, in their order, from one scoring. As `Compress` otherwise."""

    def __call__(self, model: Vit, config: Any, budgets: Sequence[Budget], **how: Unpack[How]) -> list[Compressed]: ...


class PlanOf(Protocol):
    """Reads nothing. Raises BudgetError where the config's budget is out of reach."""

    def __call__(self, spec: ModelSpec, config: Any = None) -> Plan: ...


class Predict(Protocol):
    """What each budget would cut and lose, from images, before anything is built: a row each."""

    def __call__(
        self, model: Vit, config: Any, budgets: Sequence[Budget], *, data: Any, progress: Progress | None = None
    ) -> list[dict[str, Any]]: ...


Check = Callable[["ModelSpec", Any, "Images"], None]
"""Refuses, from the images at hand and before any work, what would not do."""

Sections = Callable[[Mapping[str, Any]], "tuple[Section, ...]"]
"""Tables and curves for the report page. Of {report, history}: the method's own, and {start, dense}: costs of the network that it
was given, and of the dense one."""


def no_sections(facts: Mapping[str, Any]) -> tuple[Section, ...]:
    """Of a method with nothing of its own to show."""
    return ()


@dataclass(frozen=True, kw_only=True)
class Method:
    """One method. Packages beside vitrim offer theirs as an entry point of the group `vitrim.methods`.

    cuts: what it cuts, in one line.  variants: the values of `variant` in its config, the default first.
    takes_teacher: it distils, and may learn from another network than the one it cuts.
    """

    name: str
    cuts: str
    config: type[MethodConfig]
    compress: Compress
    plan: PlanOf
    variants: tuple[str, ...] = ()
    family: CompressFamily | None = None
    predict: Predict | None = None
    check: Check | None = None
    takes_teacher: bool = False
    sections: Sections = no_sections
