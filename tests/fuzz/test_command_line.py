"""Every verb's numbers and names: exit 0, 1 or 2, no traceback, nothing left behind, no control bytes."""

from __future__ import annotations

from pathlib import Path

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz.arena import NAMES, NO_NUMBERS, Arena, examples
from vitrim.cli import VERBS, options
from vitrim.cli import main as group

WHOLE = {
    "cost": ["model"],
    "methods": ["auto"],
    "plan": ["--model", "model", "--keep-macs", "0.9"],
    "compress": ["--model", "model", "--keep-macs", "0.9", "--data", "photos", "--out", "out", "--no-measure"],
    "recover": ["model", "--objective", "supervised", "--data", "photos", "--out", "out"],
    "train": ["--model", "model", "--data", "photos", "--out", "out"],
    "evaluate": ["model", "--data", "photos"],
    "predict": ["model", "photos/cat/0.png"],
    "measure": ["model", "--batch", "1", "--runs", "1"],
    "report": ["model"],
    "export": ["model", "--format", "timm", "--out", "out"],
    "push": ["model", "a/b"],
    "doctor": [],
    "demo": ["--out", "out"],
}
"""A command of each verb that is right but for what an example puts in."""


def verb_named(name: str) -> click.Command:
    found = group.get_command(click.Context(group), name)
    assert found is not None
    return found


def flags(kind: type) -> list[tuple[str, str]]:
    """Verbs and flags whose values are of a type."""
    return [
        (verb, option.opts[0])
        for verb in VERBS
        for option in verb_named(verb).params
        if isinstance(option, click.Option) and isinstance(option.type, kind)
    ]


NUMBERS = flags(options.Number) + flags(options.Listed)
TEXTS = [
    (verb, flag)
    for verb, flag in flags(click.types.StringParamType) + flags(click.Path) + flags(options.Named)
    if flag != "--out"
]


@pytest.mark.parametrize(("verb", "flag"), NUMBERS)
@given(st.data())
@examples(6)
def test_what_is_no_number_is_a_misuse(arena: Arena, verb: str, flag: str, data: st.DataObject) -> None:
    value = data.draw(st.sampled_from(NO_NUMBERS))
    done = arena.play(verb, *WHOLE[verb], flag, value, asked="out")
    assert done.exit_code == 2
    assert flag in done.stderr


BELOW = [(verb, flag) for verb, flag in NUMBERS if flag != "--batch"]


@pytest.mark.parametrize(("verb", "flag"), BELOW)
@pytest.mark.parametrize("value", ["-1", str(-(2**62))])
def test_a_number_below_its_bound_is_a_misuse(arena: Arena, verb: str, flag: str, value: str) -> None:
    done = arena.play(verb, *WHOLE[verb], flag, value, asked="out")
    assert done.exit_code == 2
    assert flag in done.stderr


LARGE = [
    ("evaluate", "--limit"), ("evaluate", "--seed"), ("evaluate", "--batch"), ("predict", "--top"), ("plan", "--max-macs"),
    ("plan", "--max-params"), ("plan", "--max-memory-mb"), ("plan", "--max-file-mb"),
]  # fmt: skip
"""Flags for which a number of any size is soon answered."""


@pytest.mark.parametrize(("verb", "flag"), LARGE)
@pytest.mark.parametrize("value", ["1", "1000000000", str(2**62), str(2**63 - 1)])
def test_a_large_number_is_answered_or_refused(arena: Arena, verb: str, flag: str, value: str) -> None:
    arena.play(verb, *WHOLE[verb], flag, value)


@given(st.sampled_from(TEXTS), NAMES)
@examples(150)
def test_any_name_behind_any_flag_is_answered_or_refused(arena: Arena, at: tuple[str, str], name: str) -> None:
    verb, flag = at
    if verb in ("compress", "train", "recover") and flag == "--data" and Path(name).exists():
        return  # names alone are tried here, and no training
    words = [*WHOLE[verb]]
    if flag in words:
        words[words.index(flag) + 1] = name
    else:
        words += [flag, name]
    if verb in ("compress", "train", "recover") and flag not in ("--data", "--model", "--teacher"):
        words[words.index("--data") + 1] = "nowhere"
    arena.play(verb, *words, asked="out")


PLACED = ("cost", "methods", "recover", "evaluate", "predict", "measure", "report", "export", "push")


@given(st.sampled_from(PLACED), NAMES)
@examples(120)
def test_any_name_as_an_argument_is_answered_or_refused(arena: Arena, verb: str, name: str) -> None:
    arena.play(verb, name, *WHOLE[verb][1:], asked="out")


@given(NAMES, NAMES)
@examples(60)
def test_any_verb_flag_or_setting_is_answered_or_refused(arena: Arena, name: str, value: str) -> None:
    arena.play(name)
    arena.play("cost", "model", f"--{name}", value)
    arena.play("plan", *WHOLE["plan"], "--set", f"{name}={value}")
