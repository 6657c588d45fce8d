"""Shared settings: deterministic property tests, no network, and `--quick`: a minute of the suite while one works."""

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

settings.register_profile(
    "vitrim",
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.register_profile("quick", settings.get_profile("vitrim"), max_examples=4)
settings.load_profile("vitrim")
torch.set_num_threads(1)

QUICK = (
    "cli/",
    "fuzz/",
    "methods/test_contract.py",
    "methods/test_methods.py",
    "reporting/",
    "test_allocation.py",
    "test_budget.py",
    "test_codec.py",
    "test_config.py",
    "test_counting.py",
    "test_freezing.py",
    "test_laws.py",
    "test_layout.py",
    "test_lazy.py",
    "test_model.py",
    "test_readme.py",
    "test_search.py",
    "test_space.py",
    "test_tokens.py",
)
"""What `--quick` runs, with few examples a law, one method in the contract, and nothing that is marked slow."""
FAMILY = "comcat"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="laws, contract of one method, command and README texts")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--quick"):
        settings.load_profile("quick")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--quick"):
        return
    kept, left = [], []
    for item in items:
        inside = item.path.relative_to(config.rootpath / "tests").as_posix()
        chosen = inside.startswith(QUICK) and item.get_closest_marker("slow") is None
        if inside.endswith("test_contract.py"):
            chosen = chosen and f"[{FAMILY}" in item.nodeid
        (kept if chosen else left).append(item)
    config.hook.pytest_deselected(items=left)
    items[:] = kept
