"""A method's own settings, by `--set key=value` and by the flags that are short for one. No flag and no key is known to be a method's."""

from __future__ import annotations

import json
import typing
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from vitrim.cli import options
from vitrim.errors import ConfigError, did_you_mean
from vitrim.foreign import parse_json
from vitrim.methods import METHODS

if TYPE_CHECKING:
    from vitrim.methods.method import Method

ALIASES = {
    "variant": "variant",
    "axes": "axes",
    "score": "score",
    "preset": "preset",
    "epochs": "epochs",
    "steps": "steps",
    "tie_qk": "tie_qk",
    "images": "images",
    "freeze": "freeze",
    "product": "product",
    "seed": "seed",
}
"""Flags that are short for a setting, of whichever method has it."""

SET = click.option(
    "--set",
    "assigned",
    multiple=True,
    metavar="KEY=VALUE",
    help="A setting of the method; `vitrim methods NAME` lists them. Once for each.",
)
VARIANT = click.option("--variant", metavar="NAME", help="Short for --set variant=NAME.")
PRODUCT = options.product("Short for --set product=NAME: what it is for, the output or all its tokens.")
FREEZE = click.option("--freeze", metavar="PARTS", help="Parts to keep as they are: blocks.0-2,blocks.11.attention.")
IMAGES = click.option("--images", type=options.COUNT, help="Unlabelled images that the method looks at.")
PLANNED_BY = options.stack(
    click.option("--axes", metavar="NAMES", help="Short for --set axes=NAMES."),
    click.option("--score", metavar="NAME", help="Short for --set score=NAME."),
)
SPENT = options.stack(
    SET,
    VARIANT,
    PLANNED_BY,
    click.option("--preset", metavar="NAME", help="Short for --set preset=NAME."),
    click.option("--epochs", "--search-epochs", "epochs", type=options.POSITIVE, help="Short for --set epochs=N."),
    click.option(
        "--steps", "--search-steps", "steps", type=options.COUNT, help="Of its search; short for --set steps=N."
    ),
    click.option("--tie-qk", is_flag=True, help="Short for --set tie_qk=true."),
    FREEZE,
    IMAGES,
    PRODUCT,
)


def asked(assigned: Sequence[str], flags: Mapping[str, Any]) -> list[tuple[str, str, Any]]:
    """What was typed, its key and its value, as text where it is to be read: of each --set, then of each flag that was passed."""
    found: list[tuple[str, str, Any]] = []
    for text in assigned:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise click.UsageError(f"--set {text!r}; expected KEY=VALUE, such as --set images=64.")
        found.append((f"--set {text}", key.strip(), value.strip()))
    for flag, key in ALIASES.items():
        if flags.get(flag) not in (None, False):
            found.append((f"--{flag.replace('_', '-')}", key, flags[flag]))
    return found


def applied(method: Method, typed: Sequence[tuple[str, str, Any]], base: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of `base`, with what was typed in their place. Raises for a key that is not the method's, and for two that differ."""
    from vitrim.config import keys

    settings, seen = dict(base), dict[str, tuple[str, Any]]()
    for origin, key, text in typed:
        root, _, inner = key.partition(".")
        if root not in keys(method.config):
            raise ConfigError(_not_of(method, origin, root))
        value = value_of(method.config, key, text) if isinstance(text, str) else text
        before, other = seen.setdefault(key, (origin, value))
        if other != value:
            raise click.UsageError(f"{before} and {origin} contradict each other; pass one of them.")
        settings[root] = {**_within(method.config, root, settings), inner: value} if inner else value
    return settings


def has(method: Method, typed: Sequence[tuple[str, str, Any]]) -> bool:
    """Whether the method has every setting that was typed, and the variant, if one was."""
    from vitrim.config import keys

    known = keys(method.config)
    return all(
        key.partition(".")[0] in known and (key != "variant" or value in method.variants) for _, key, value in typed
    )


def value_of(kind: type, key: str, text: str) -> Any:
    """A value as it was typed: JSON where it is that, else text. A list may be typed with commas, without brackets."""
    from vitrim.config import members, nested

    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = text
    else:
        value = parse_json(text, named=f"--set {key}: its value", error=ConfigError, mend="Expected finite numbers.")
    root, _, inner = key.partition(".")
    holder, name = (nested(kind, root), inner) if inner else (kind, key)
    if holder is None or name not in typing.get_type_hints(holder):
        return value  # told when the config is read
    hints = members(holder, name)
    if value is None or isinstance(value, list) or not any(typing.get_origin(hint) is tuple for hint in hints):
        return text if str in hints and not isinstance(value, str) and value is not None else value
    return [part.strip() for part in text.split(",") if part.strip()]


def _within(kind: type, root: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a setting with parts of its own has so far."""
    from vitrim.codec import plain
    from vitrim.config import default

    now = settings[root] if root in settings else plain(default(kind, root))
    return dict(now) if isinstance(now, Mapping) else {}


def _not_of(method: Method, origin: str, key: str) -> str:
    from vitrim.config import keys

    known = keys(method.config)
    others = [name for name, other in METHODS.items() if key in keys(other.config)]
    hint = (
        f"; {', '.join(others)} {'has' if len(others) == 1 else 'have'} it."
        if others
        else did_you_mean(key, known) or "."
    )
    return f"{origin}: {method.name} has no setting {key!r}{hint} Known: {', '.join(known)}."
