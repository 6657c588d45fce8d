"""How many processes there are, and which this is."""

import pytest

from vitrim import processes
from vitrim.errors import ConfigError


def test_without_a_launcher_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.delenv("RANK", raising=False)
    assert (processes.count(), processes.index(), processes.is_first()) == (1, 0, True)


def test_a_rank_alone_makes_nobody_a_second_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("RANK", "1")
    assert processes.is_first()


def test_they_are_counted_as_torchrun_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "3")
    assert (processes.count(), processes.index(), processes.is_first()) == (4, 3, False)


@pytest.mark.parametrize(
    ("name", "text"), [("WORLD_SIZE", "0"), ("WORLD_SIZE", ""), ("WORLD_SIZE", "two"), ("RANK", "-1")]
)
def test_nonsense_in_the_environment_is_refused(name: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv(name, text)
    with pytest.raises(ConfigError, match=f"{name}='{text}'"):
        (processes.count if name == "WORLD_SIZE" else processes.index)()
