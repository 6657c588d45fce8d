"""`vitrim doctor`."""

import json
from pathlib import Path

from tests.cli.kit import run


def test_doctor_names_versions_and_extras_and_no_folder() -> None:
    done = run("doctor", "--json")
    values = json.loads(done.stdout)
    assert values["packages"]["torch"]
    assert set(values["extras"]) >= {"data", "track"}
    assert isinstance(values["processor"]["features"], list)
    assert str(Path.home()) not in done.stdout
    assert run("doctor").exit_code == 0
