"""`vitrim methods`."""

import json

import pytest

from tests.cli.kit import RUN_AND_TELL, fresh, run
from vitrim.config import keys
from vitrim.methods import METHODS


def test_every_method_is_listed_with_what_it_needs() -> None:
    rows = {row["name"]: row for row in json.loads(run("methods", "--json").stdout)["methods"]}
    assert list(rows) == list(METHODS)
    assert rows["comcat"]["needs"]["svd"]["images"] == 0
    assert rows["uvc"]["needs"][""]["labels"]
    assert [name for name, row in rows.items() if row["family"]] == ["auto", "dcvit"]
    table = run("methods")
    assert all(name in table.stdout for name in METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_every_setting_of_a_method_is_listed_with_its_words(name: str) -> None:
    found = json.loads(run("methods", name, "--json").stdout)["settings"]
    assert {key.split(".")[0] for key in found} == set(keys(METHODS[name].config))
    assert all(row["doc"] and row["type"] for row in found.values())
    assert run("methods", name).exit_code == 0


def test_the_settings_are_shown_without_torch() -> None:
    assert "'torch'" not in fresh(RUN_AND_TELL.format(words=["methods", "auto"]))[0]


def test_an_unknown_method_is_refused_with_the_near_miss() -> None:
    done = run("methods", "atuo")
    assert done.exit_code == 2
    assert "did you mean 'auto'?" in done.stderr
