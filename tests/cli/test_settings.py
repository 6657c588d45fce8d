"""Settings of a method: `--set key=value`, and the flags that are short for one."""

import json
from typing import Any

import pytest

from tests.cli.kit import run
from vitrim.cli import settings
from vitrim.config import default, keys, read
from vitrim.errors import ConfigError
from vitrim.methods import METHODS

VALUES: dict[str, Any] = {
    "variant": ("dcvit", "finetune", "finetune"),
    "axes": ("auto", "qk,mlp", ("qk", "mlp")),
    "score": ("auto", "measured", "measured"),
    "preset": ("dcvit", "clean", "clean"),
    "epochs": ("uvc", "2.5", 2.5),
    "steps": ("uvc", "12", 12),
    "tie_qk": ("uvc", "true", True),
    "images": ("auto", "9", 9),
    "freeze": ("comcat", "blocks.0, blocks.1.mlp", ("blocks.0", "blocks.1.mlp")),
    "seed": ("auto", "3", 3),
    "product": ("auto", "tokens", "tokens"),
}
"""For each flag a method that has its setting, a value as typed, and what it becomes."""


def made(method: str, *assigned: str, base: dict[str, Any] | None = None, **flags: Any) -> Any:
    record = METHODS[method]
    found = settings.applied(record, settings.asked(assigned, flags), base or {})
    return read(record.config, {"budget": {"keep_macs": 0.5}, **found})


@pytest.mark.parametrize("flag", settings.ALIASES)
def test_a_flag_is_short_for_its_setting(flag: str) -> None:
    method, text, value = VALUES[flag]
    key = settings.ALIASES[flag]
    by_flag = made(method, **{flag: value if isinstance(value, bool | int | float) else text})
    assert getattr(by_flag, key) == value
    assert by_flag == made(method, f"{key}={text}")


@pytest.mark.parametrize(
    ("method", "text", "key", "value"),
    [
        ("auto", 'axes=["qk"]', "axes", ("qk",)),
        ("auto", "axes=qk", "axes", ("qk",)),
        ("auto", "axes=null", "axes", None),
        ("auto", "exact_tail=false", "exact_tail", False),
        ("auto", "device=cuda", "device", "cuda"),
        ("comcat", 'ranks=[{"qk": 4}, null]', "ranks", ({"qk": 4}, None)),
        ("uvc", "cold=0.5", "cold", 0.5),
    ],
)
def test_a_value_is_json_or_text(method: str, text: str, key: str, value: Any) -> None:
    assert getattr(made(method, text), key) == value


def test_a_part_of_a_setting_leaves_the_others_as_they_are() -> None:
    augment = made("dcvit", "augment.flip=0", "augment.pad=2").augment
    assert (augment.flip, augment.pad, augment.randaugment) == (0, 2, "rand-m9-mstd0.5-inc1")
    assert made("dcvit", "augment.flip=0", base={"augment": {"pad": 9}}).augment.pad == 9


@pytest.mark.parametrize("method", METHODS)
def test_every_setting_can_be_set_to_its_default(method: str) -> None:
    plain = made(method)
    for key in keys(METHODS[method].config):
        value = default(METHODS[method].config, key)
        if isinstance(value, bool | int | float | str):
            assert made(method, f"{key}={str(value).lower() if isinstance(value, bool) else value}") == plain


@pytest.mark.parametrize(
    ("assigned", "flags", "says"),
    [
        (("imagse=3",), {}, "comcat has no setting 'imagse'; did you mean 'images'? Known: budget, freeze"),
        ((), {"axes": "qk"}, "--axes: comcat has no setting 'axes'; auto has it. Known: "),
        (("images=0",), {}, "images=0; expected 1 or more, such as 256"),
        (("images=x",), {}, "images='x'; expected a whole number"),
        (("variant=svdd",), {}, "variant='svdd'; expected 'whitened' or 'svd'; did you mean 'svd'?"),
        (("budget.keep_mac=1",), {}, "unknown key 'budget.keep_mac'; did you mean 'keep_macs'?"),
    ],
)
def test_what_is_no_setting_is_refused(assigned: tuple[str, ...], flags: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        made("comcat", *assigned, **flags)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--images 8 --set images=9", "--set images=9 and --images contradict each other"),
        ("--set images=8 --set images=9", "--set images=8 and --set images=9 contradict each other"),
        ("--set images", "expected KEY=VALUE"),
        ("--set budget.keep_macs=0.3", "--set budget and the flags of a budget contradict each other"),
    ],
)
def test_contradictions_are_misuse_and_leave_nothing(words: str, says: str, tmp_path: Any) -> None:
    model = ["--model", "builtin:cifar10-vit-micro", "--keep-macs", "0.5", "--out", tmp_path / "out"]
    done = run("compress", *model, *words.split())
    assert done.exit_code == 2
    assert says in done.stderr
    assert not list(tmp_path.iterdir())


def test_the_same_value_twice_is_no_contradiction() -> None:
    assert made("auto", "images=8", images=8).images == 8


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("method", 5, "method=5; expected the name of one"),
        ("init", True, "method=True; expected the name of one"),
        ("init", {}, "method={}; expected the name of one"),
        ("exact_tail", "no", "exact_tail='no'; expected true or false"),
        ("recover", {"augment": {"pad": 10**9}}, "augment.pad=1000000000; expected 1024 or less"),
    ],
)
def test_a_config_of_another_kind_is_a_misuse(key: str, value: Any, says: str, tmp_path: Any) -> None:
    (tmp_path / "c.json").write_text(json.dumps({key: value}))
    model = ["--model", "builtin:cifar10-vit-micro", "--keep-macs", "0.5", "--out", tmp_path / "out"]
    done = run("compress", *model, "--config", tmp_path / "c.json")
    assert done.exit_code == 2
    assert says in done.stderr
