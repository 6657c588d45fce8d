"""Sections: tables and curves of a method that the page has never heard of."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.reporting.conftest import SECTIONS
from tests.reporting.reading import Page
from vitrim import methods, reporting
from vitrim.errors import ConfigError
from vitrim.reporting import figures, page
from vitrim.result import Axis, Column, Curve, Series, Table

KEYS = [
    "predicted_kl",
    "reached_kl",
    "candidates",
    "search",
    "prediction",
    "saving",
    "finaliser",
    "removed",
    "gates",
    "skipping",
    "duals",
    "energy",
    "mismatch",
    "z",
]
"""Of the methods' reports and histories."""


def test_an_unknown_methods_sections_are_drawn_and_every_figure_is_found_by_its_path(result: dict[str, Any]) -> None:
    seen = Page(page.render(result))
    shown = {at["data-path"]: at["value"] for at in seen.of("data") if (at["data-path"] or "").startswith("sections/")}
    assert shown == {
        "sections/1/rows/0/1": "0.25",
        "sections/1/rows/0/2": "1200000",
        "sections/1/rows/1/2": "7",
        "sections/2/rows/0/0": "-1.5",
    }
    assert all(value == repr(figures.lookup(result, path or "")) for path, value in shown.items())
    said = "".join(seen.text)
    for words in ("25.0 %", "1.20 M", "\u22121.5", "<one> from 75.0 % to 50.0 %; two from 25.0 % to 12.5 %", "aim"):
        assert words in said


def test_neighbours_of_one_title_share_a_heading_and_each_has_its_caption(result: dict[str, Any]) -> None:
    text = page.render(result)
    assert text.count("<h2>How it &lt;went&gt;</h2>") == 1
    assert text.count("<h2>Another</h2>") == 1
    assert text.index("It took &amp; &lt;gave&gt;.") < text.index("Weight of a") < text.index("What of it stayed")


def test_markup_in_a_section_is_escaped(result: dict[str, Any]) -> None:
    seen = Page(page.render(result))
    assert not {"went", "gave", "thought", "kg", "one", "thing", "first", "taken"} & {tag for tag, _ in seen.tags}
    said = "".join(seen.text)
    for words in (
        "How it <went>",
        "It took & <gave>.",
        "Weight of a <thought>",
        "<kg>",
        "<thing>",
        "<first>",
        "<taken>",
    ):
        assert words in said


def test_a_summary_of_before_there_were_sections_gives_a_whole_page(result: dict[str, Any]) -> None:
    del result["sections"]
    result |= {"search": {"history": [{"step": 1}]}, "prediction": {"candidates": [{"width": [1, 2]}]}}
    assert "What was cut" in "".join(Page(page.render(result)).text)


def test_reporting_knows_no_method() -> None:
    room = Path(reporting.__file__).parent
    for path in [path for path in room.rglob("*") if path.suffix in (".py", ".html", ".css")]:
        words = set(re.findall(r"\w+", path.read_text(encoding="utf-8")))
        assert not words & {*KEYS, *methods.METHODS} - {"auto"}, path  # auto is a word of style sheets too


def test_sections_are_plain_json() -> None:
    for section in SECTIONS:
        told = section.to_dict()
        assert json.loads(json.dumps(told)) == told
        assert told["kind"] == type(section).__name__.lower()


def test_what_cannot_be_shown_is_refused() -> None:
    with pytest.raises(ConfigError, match="row 1 has 2 cells; expected 1"):
        Table(title="t", columns=(Column(heading="a"),), rows=((1,), (1, 2)))
    with pytest.raises(ConfigError, match="has no points"):
        Series(name="s", points=())
    with pytest.raises(ConfigError, match="has no series"):
        Curve(title="t", x=Axis(), y=Axis(), series=())
