"""Configs: one voice for what is wrong, from Python and from plain values; their words where `help` shows them."""

import dataclasses
import pydoc
from typing import Any, Literal

import pytest
from pydantic import Field

from vitrim.budget import Budget
from vitrim.config import Augment, checked, default, docs, keys, read
from vitrim.errors import ConfigError
from vitrim.methods import METHODS
from vitrim.pipeline.configs import EvaluateConfig, MeasureConfig, RecoverConfig
from vitrim.training.config import TrainConfig


@checked
class Base:
    """What is told."""

    images: int = Field(default=8, ge=2)
    """How many
    images."""
    score: Literal["fisher", "measured"] = "fisher"
    share: float | None = Field(default=None, gt=0, lt=1)
    names: tuple[str, ...] = ()
    augment: Augment = Augment(flip=0.25)
    budget: Budget | None = None

    def __post_init__(self) -> None:
        if self.images == 7:
            raise ConfigError("images=7; expected another number.")


@checked
class More(Base):
    """And this."""

    images: int = Field(default=9, ge=3)
    depth: int = 1
    """How deep."""


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"imagse": 3}, "unknown key 'imagse'; did you mean 'images'? Known: images, score, share, names, augment, budget."),
        ({"zzz": 3}, "unknown key 'zzz'. Known: images, "),
        ({"images": 1}, "images=1; expected 2 or more, such as 8."),
        ({"images": "many"}, "images='many'; expected a whole number, such as 8."),
        ({"images": 7}, "images=7; expected another number."),
        ({"share": 1.5}, "share=1.5; expected a number below 1."),
        ({"score": "fishr"}, "score='fishr'; expected 'fisher' or 'measured'; did you mean 'fisher'?"),
        ({"score": "zzz"}, "score='zzz'; expected 'fisher' or 'measured'."),
        ({"names": "a"}, "names='a'; expected a list."),
        ({"names": [1]}, "names[0]=1; expected text."),
        ({"augment": {"flipp": 1}}, "unknown key 'augment.flipp'; did you mean 'flip'? Known: crop, pad, "),
        ({"augment": {"flip": 2}}, "augment.flip=2; expected 1 or less."),
        ({"augment": 3}, "augment=3; expected a Augment."),
        ({"budget": {"keep_macs": 3.0}}, "keep_macs=3.0; expected a share in (0, 1]. To keep half, pass 0.5."),
        ({"images": 1, "share": 0}, "images=1; expected 2 or more, such as 8. {where}: share=0; expected a number above 0."),
    ],
    ids=str,
)  # fmt: skip
def test_a_wrong_key_or_value_is_told_alike_from_python_and_from_plain_values(
    values: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        read(Base, values, where="auto")
    assert str(caught.value).startswith("auto: " + says.format(where="auto"))
    with pytest.raises(ValueError, match=r"^Base: ") as made:
        Base(**values)
    assert isinstance(made.value, ConfigError)
    assert str(made.value).startswith("Base: " + says.format(where="Base"))


def test_a_key_that_a_plain_dataclass_does_not_know_is_refused_too() -> None:
    with pytest.raises(ConfigError, match=r"^run: unknown key 'budget.keep_mac'; did you mean 'keep_macs'"):
        read(Base, {"budget": {"keep_mac": 0.5}}, where="run")
    with pytest.raises(ConfigError, match=r"^budget: max_macs='few'; expected a whole number"):
        read(Budget, {"max_macs": "few"}, where="budget")


def test_values_are_read_into_what_python_would_make() -> None:
    values = {"images": 4, "names": ["a", "b"], "augment": {"pad": 2}, "budget": {"keep_macs": 0.5}}
    made = Base(images=4, names=("a", "b"), augment=Augment(pad=2), budget=Budget(keep_macs=0.5))
    assert read(Base, values) == made
    assert dataclasses.replace(made, images=5).images == 5


def test_a_subclass_has_its_parents_settings_and_words() -> None:
    assert keys(More) == [*keys(Base), "depth"]
    assert (default(More, "images"), default(More, "augment").flip) == (9, 0.25)
    assert (docs(More)["images"], docs(More)["depth"]) == ("How many images.", "How deep.")
    assert "images: How many images." in str(More.__doc__)
    with pytest.raises(ConfigError, match=r"^More: images=2; expected 3 or more, such as 9\.$"):
        More(images=2)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"images": 2**63}, "images is a number beyond 64 bits"),
        ({"images": 10**400}, "images is a number beyond 64 bits"),
        ({"augment": {"pad": 2**70}}, "augment.pad is a number beyond 64 bits"),
        ({"share": float("nan")}, "share=nan"),
        ({"augment": {"jitter": float("inf")}}, "augment.jitter=inf; expected a finite number"),
        ({"budget": {"max_memory_mb": 1e308}}, "max_memory_mb=1e.308; expected a number above 0 and at most"),
    ],
    ids=str,
)
def test_numbers_that_no_computation_takes_are_refused(values: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        read(Base, values)


def test_a_seed_beyond_64_bits_is_refused_from_python_too() -> None:
    with pytest.raises(ConfigError, match="More: depth is a number beyond 64 bits"):
        More(depth=2**64)


def test_every_field_of_every_config_has_words_in_help() -> None:
    configs = [method.config for method in METHODS.values()]
    for kind in (Augment, TrainConfig, RecoverConfig, EvaluateConfig, MeasureConfig, *configs):
        shown = pydoc.plain(pydoc.render_doc(kind))
        for name, words in docs(kind).items():
            assert words, f"{kind.__name__}.{name}"
            assert f"{name}: {words}" in shown
