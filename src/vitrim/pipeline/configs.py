"""How a compressed network is recovered, judged and timed."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from vitrim.config import checked
from vitrim.errors import ConfigError
from vitrim.spec import ProductName
from vitrim.training.config import TrainConfig


@checked
class RecoverConfig(TrainConfig):
    """How a compressed network learns again what it lost: `TrainConfig` with gentler defaults, and what to learn from."""

    epochs: float = Field(default=10.0, gt=0)
    lr: float = Field(default=1e-4, gt=0)
    """A cut by closed forms starts near its goal, and a higher rate first takes it away from there."""
    min_lr: float = Field(default=1e-6, ge=0)
    objective: Literal["auto", "distilled", "supervised", "label_free"] = "auto"
    """distilled: labels and the dense model's answers. label_free: the dense model's tokens, no labels. auto: distilled
    where there are labels and a classifier and tokens are not the product, else label_free."""
    product: ProductName | None = None
    """What label_free makes as the dense model has it: `output`, what `model(x)` gives, or `tokens`, all behind the final norm,
    merged ones restored. None: the tokens of an encoder, the output of a classifier. `vitrim.run` takes the method's."""
    distillation: Literal["soft", "hard"] = "soft"
    """soft: the teacher's probabilities; hard: its choice."""
    alpha: float = Field(default=0.5, ge=0, le=1)
    """Weight of the teacher against the labels."""
    tau: float = Field(default=2.0, gt=0)
    """Temperature of soft distillation."""
    features: tuple[int, ...] = ()
    """Blocks whose outputs are matched too, with objective distilled."""
    freeze: tuple[str, ...] = ()
    """Parts whose weights stay, such as `blocks.0-2` or `blocks.11.attention`. `vitrim.run` adds those that the method froze."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.product == "tokens" and self.objective in ("distilled", "supervised"):
            raise ConfigError(
                f"product='tokens' with objective={self.objective!r}, which learns answers; expected objective='label_free' "
                "(or auto), or no product."
            )


@checked
class EvaluateConfig:
    """How the dense, the cut and the recovered model are compared, on the validation split."""

    limit: int | None = Field(default=None, ge=1)
    """Score at most so many images, balanced over the classes; None: all."""
    batch_size: int = Field(default=64, ge=1)
    """Images at a time."""
    samples: int = Field(default=12, ge=0)
    """Images shown in the report."""
    check_dense: bool = True
    """Score the dense model on 200 images first, and stop where it does no better than chance."""
    seed: int = Field(default=0, ge=0)
    """Of the validation split where the data has none, and of the images drawn."""
    workers: int = Field(default=0, ge=0)
    """Processes that decode images; 0: this one."""
    device: str = "cpu"
    """Where to compute, such as cuda."""
    amp: Literal["no", "bf16", "fp16"] = "no"
    """Precision of the products."""
    product: ProductName | None = None
    """What is compared with the dense model's: `output`, what `model(x)` gives, or `tokens`, all behind the final norm. None: the
    tokens of an encoder, the output of a classifier. `vitrim.run` takes the method's."""

    @property
    def how(self) -> dict[str, Any]:
        """What a task's `evaluate` is told."""
        return {name: getattr(self, name) for name in ("batch_size", "device", "amp", "workers")}


@checked
class MeasureConfig:
    """How latency is measured. The device is the target: what it does with the smaller network is what counts."""

    batch_sizes: tuple[int, ...] = (1, 8)
    """Images of one pass, each timed."""
    runs: int = Field(default=20, ge=1)
    """Samples of each network."""
    runtimes: tuple[Literal["eager", "compile"], ...] | None = None
    """What runs the networks; None: eager alone. Compiling takes a minute or two for each batch size, and a C++ compiler."""
    threads: int | None = Field(default=None, ge=1)
    """Of torch on the CPU; None: as they stand."""
    device: str = "cpu"
    """The target, such as cuda."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of parameters and images."""

    def __post_init__(self) -> None:
        if not self.batch_sizes or min(self.batch_sizes) < 1:
            raise ConfigError(f"batch_sizes={self.batch_sizes!r}; expected numbers of at least 1, such as (1, 8).")
        if self.runtimes is not None and not self.runtimes:
            raise ConfigError(
                "runtimes=(); expected at least one of 'eager', 'compile'. To skip it, pass measure=None."
            )

    @property
    def kinds(self) -> tuple[str, ...]:
        """The runtimes, settled."""
        return self.runtimes or ("eager",)
