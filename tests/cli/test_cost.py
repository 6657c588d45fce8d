"""`vitrim cost`: fast without torch, and the same numbers in the table and the JSON."""

import json
from pathlib import Path

import pytest

import vitrim
from tests.cli.kit import DEIT_S, RUN_AND_TELL, fresh, run
from vitrim.budget import Budget
from vitrim.counting import cost
from vitrim.methods.comcat import ComcatConfig
from vitrim.sources import load


def test_cost_of_a_timm_name_takes_under_two_seconds_and_no_torch() -> None:
    out, seconds = fresh(RUN_AND_TELL.format(words=["cost", DEIT_S]))
    assert "4,598,882,304" in out
    assert "heavy: []" in out
    assert seconds < 2


@pytest.mark.parametrize(
    ("name", "macs", "params"),
    [
        ("tiny", 1_253_683_200, 5_717_416),
        ("small", 4_598_882_304, 22_050_664),
        ("base", 17_563_828_224, 86_567_656),
    ],
)
def test_cost_as_json_has_the_exact_counts_at_the_top(name: str, macs: int, params: int) -> None:
    done = run("cost", f"timm:deit_{name}_patch16_224", "--json")
    values = json.loads(done.stdout)
    assert (values["macs"], values["params"]) == (macs, params)
    assert values["flops"] == 2 * macs
    assert sum(block["macs"] for block in values["blocks"]) + values["stem_macs"] + values["head_macs"] == macs


def test_cost_prints_a_row_for_each_block_and_the_share_of_another_model() -> None:
    done = run("cost", "timm:deit_tiny_patch16_224", "--against", DEIT_S)
    assert done.exit_code == 0
    assert sum(line.split()[:2] == [str(i), "197"] for i in range(12) for line in done.stdout.splitlines()) == 12
    assert "27.3 % of its MACs" in done.stdout


def test_a_built_in_model_is_a_name_and_no_path(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    for name in (str(tmp_path), ".", "../models/cifar10-vit-micro", ""):
        done = run("cost", f"builtin:{name}")
        assert done.exit_code == 1
        assert "no built-in model" in done.stderr


def test_a_network_that_was_cut_is_compared_with_what_it_was_cut_from(tmp_path: Path) -> None:
    dense = load("builtin:cifar10-vit-micro")
    folder = vitrim.compress(dense, ComcatConfig(budget=Budget(keep_macs=0.5), variant="svd")).save(tmp_path / "small")
    done = run("cost", folder)
    assert "builtin:cifar10-vit-micro, which it was first cut from: 50.0 % of its MACs" in done.stdout
    assert json.loads(run("cost", folder, "--json").stdout)["against"]["macs"] == cost(dense.spec).macs


def test_the_zeros_of_padded_heads_are_said_where_there_are_any(tmp_path: Path) -> None:
    dense = load("builtin:cifar10-vit-micro")
    ranks = tuple({"qk": 8, "vo": 16} for _ in dense.spec.blocks)
    folder = vitrim.compress(dense, ComcatConfig(ranks=ranks, variant="svd")).save(tmp_path / "small")
    extra = json.loads(run("cost", folder, "--json").stdout)["padding_macs"]
    assert 0 < extra < 0.05 * cost(dense.spec).macs
    assert f"padding      {extra:,} more" in run("cost", folder).stdout
    assert "padding" not in run("cost", "builtin:cifar10-vit-micro").stdout


def test_cost_at_another_image_size_counts_there_without_torch() -> None:
    done = run("cost", DEIT_S, "--image-px", "448", "--json")
    values = json.loads(done.stdout)
    assert values["image_px"] == [448, 448]
    assert values["blocks"][0]["tokens_in"] == 785
    oblong = run("cost", DEIT_S, "--image-px", "112,448", "--against", DEIT_S)
    assert "112 x 448 px" in oblong.stdout
    assert "100.0 % of its MACs" in oblong.stdout
    for wrong in ("0", "1,2,3", "large", "-16"):
        assert run("cost", DEIT_S, f"--image-px={wrong}").exit_code == 2
    assert run("cost", DEIT_S, "--image-px", "8").exit_code == 1


def test_cost_says_what_of_an_image_no_patch_covers() -> None:
    done = run("cost", "timm:vit_so400m_patch14_siglip_384")
    assert "729" in done.stdout
    assert "6 px at the bottom and 6 px at the right" in done.stdout
