"""`vitrim doctor`."""

import json
from pathlib import Path

import pytest

from tests.cli.kit import run


def test_doctor_names_versions_and_extras_and_no_folder() -> None:
    done = run("doctor", "--json")
    values = json.loads(done.stdout)
    assert values["packages"]["torch"]
    assert set(values["extras"]) >= {"data", "track"}
    assert isinstance(values["processor"]["features"], list)
    assert str(Path.home()) not in done.stdout
    assert run("doctor").exit_code == 0


@pytest.mark.parametrize(
    ("gpus", "said"),
    [
        (0, "on the CPU, by gloo; the first writes"),
        (1, "is refused, since there is one GPU"),
        (4, "on one GPU each, of 4, by nccl"),
    ],
)
def test_it_says_what_two_processes_will_do(gpus: int, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    done = run("doctor")
    assert done.exit_code == 0, done.output
    assert said in " ".join(done.stdout.split())
