"""`vitrim methods`: what there is, and the settings of each."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from vitrim import methods as known
from vitrim.cli import options, tables
from vitrim.cli.cost import spec_named

if TYPE_CHECKING:
    from vitrim.methods.method import Method

EXAMPLE = "builtin:cifar10-vit-micro"
"""The model of which each method's needs are asked."""


@click.command()
@click.argument("name", required=False)
@options.OUTPUT
def methods(name: str | None, output: options.Output) -> None:
    """List the methods; with NAME, the settings that --set takes.

    vitrim methods auto
    """
    if name is not None:
        show_settings(known.method_named(name), output.as_json)
        return
    rows = [described(method) for method in known.METHODS.values()]
    if output.as_json:
        tables.show_json({"methods": rows})
        return
    body = [
        [
            row["name"],
            row["cuts"],
            "; ".join(
                f"{variant}: {tables.needs_text(needs)}" if variant else tables.needs_text(needs)
                for variant, needs in row["needs"].items()
            ),
            "one scoring" if row["family"] else "one by one",
        ]
        for row in rows
    ]
    tables.show_table("methods", ["method", "what it cuts", "needs, by variant", "several budgets"], body, text=True)


def described(method: Method) -> dict[str, Any]:
    """A method, and what each of its variants needs for the example; "" where it has no variants."""
    spec, needs = spec_named(EXAMPLE), {}
    for variant in method.variants or ("",):
        whole: dict[str, Any] = {"budget": {"keep_macs": 1.0}} | ({"variant": variant} if variant else {})
        needs[variant] = method.plan(spec, known.configure(method.name, whole))["needs"]
    return {
        "name": method.name,
        "cuts": method.cuts,
        "variants": list(method.variants),
        "needs": needs,
        "family": method.family is not None,
    }


def show_settings(method: Method, as_json: bool) -> None:
    """Key, type, default and words of each setting."""
    rows = list(settings_of(method.config))
    if as_json:
        tables.show_json({"name": method.name, "cuts": method.cuts, "settings": {row.pop("key"): row for row in rows}})
        return
    body = [[row["key"], row["type"], tables.value_text(row["default"]), row["doc"]] for row in rows]
    tables.show_table(f"{method.name}: {method.cuts}", ["setting", "type", "default", "what it is"], body, text=True)


def settings_of(kind: type, within: str = "", default: Any = None) -> Iterator[dict[str, Any]]:
    """A row for each setting; one with parts of its own gives a row for each part."""
    from vitrim.codec import plain
    from vitrim.config import default as usual
    from vitrim.config import docs, members, nested

    for key, doc in docs(kind).items():
        value = usual(kind, key) if default is None else getattr(default, key)
        inner = nested(kind, key)
        if inner is not None and value is not None:
            yield from settings_of(inner, f"{within}{key}.", value)
            continue
        text = " | ".join(type_text(hint) for hint in members(kind, key))
        yield {"key": within + key, "type": text, "default": plain(value), "doc": doc}


def type_text(hint: Any) -> str:
    """A type as one types its values: `fisher | measured`, `int,...`."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return " | ".join(map(str, arguments))
    if origin in (typing.Union, types.UnionType):
        return " | ".join(map(type_text, arguments))
    if origin is tuple:
        return f"{type_text(arguments[0])},..."
    if origin is dict:
        return "object"
    return "none" if hint is type(None) else str(hint.__name__)
