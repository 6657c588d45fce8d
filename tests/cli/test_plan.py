"""`vitrim plan`."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from tests.cli.kit import run
from tests.specs import vit
from vitrim import artifact, methods, pipeline
from vitrim.cli import main
from vitrim.errors import BudgetError
from vitrim.methods import METHODS
from vitrim.model import build


def test_predictions_name_the_tokens_and_the_budgets_that_are_out_of_reach() -> None:
    words = (
        "plan --model builtin:cifar10-vit-micro --keep-macs 0.5,0.0001 --data sample --images 8 --axes qk,vo,mlp,tail"
    )
    done = CliRunner().invoke(main, [*words.split(), "--quiet", "--json"])
    assert done.exit_code == 0, done.output
    near, far = json.loads(done.stdout)["predictions"]
    assert near["exact_tail"]
    assert near["predicted_kl"] > 0
    assert "out of reach" in far["refused"]
    table = CliRunner().invoke(main, [*words.split(), "--quiet"], env={"COLUMNS": "250"})
    assert "exact tail" in table.output
    assert "out of reach" in table.output
    alone = CliRunner().invoke(
        main, ["plan", "--model", "builtin:cifar10-vit-micro", "--keep-macs", "0.5", "--axes", "mlp"]
    )
    assert alone.exit_code == 2
    assert "--axes" in alone.output


def test_without_method_those_are_planned_that_have_what_is_set() -> None:
    model = ["plan", "--model", "builtin:cifar10-vit-micro", "--keep-macs", "0.9", "--json"]
    rows = json.loads(run(*model, "--set", "preset=clean").stdout)["plans"]
    assert [row["method"] for row in rows] == ["dcvit", "uvc"]
    rows = json.loads(run(*model, "--variant", "svd").stdout)["plans"]
    assert [(row["method"], row["variant"]) for row in rows] == [("comcat", "svd")]
    done = run(*model, "--method", "comcat,auto", "--set", "axes=qk")
    assert done.exit_code == 2
    assert "comcat has no setting 'axes'; auto has it" in done.stderr


def test_a_setting_changes_the_range() -> None:
    model = ["plan", "--model", "builtin:cifar10-vit-micro", "--keep-macs", "0.9", "--method", "auto", "--json"]
    free, held = (json.loads(run(*model, *words).stdout)["plans"][0] for words in ([], ["--set", "axes=qk"]))
    assert held["range"]["macs"][0] > free["range"]["macs"][0]


def test_a_plan_counts_at_the_image_size_asked_for_and_says_so() -> None:
    words = ["plan", "--model", "timm:deit_tiny_patch16_224", "--method", "comcat", "--keep-macs", "0.5"]
    values = json.loads(run(*words, "--image-px", "112", "--json").stdout)
    cost = json.loads(run("cost", "timm:deit_tiny_patch16_224", "--image-px", "112", "--json").stdout)
    assert values["image_px"] == [112, 112]
    assert values["macs"] == cost["macs"]
    assert values["plans"][0]["limits"]["macs"] == cost["macs"] // 2
    assert "112 x 112 px" in run(*words, "--image-px", "112").stdout


def named_share(sentence: str) -> float:
    found = re.search(r"shares (\S+) to 1", sentence)
    assert found is not None, sentence
    return float(found[1])


@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("limit", ["keep_macs", "keep_params"])
def test_the_share_that_a_refusal_names_works_and_a_hair_less_does_not(method: str, limit: str, tmp_path: Path) -> None:
    """Of the model given, though an exact tail comes before the method: by the command, by `run`, and from Python alone."""

    def refused(share: float) -> str | None:
        flag = f"--{limit.replace('_', '-')}"
        done = run("plan", "--model", folder, "--method", method, flag, f"{share:.9g}", "--json")
        (row,) = json.loads(done.stdout)["plans"]
        return None if row["refused"] is None else str(row["refused"])

    dense = build(vit(blocks=3, width=32, heads=2, head_dim=16, hidden=64))
    folder = artifact.save(dense, tmp_path / "dense")
    less = 1e-4
    least = named_share(refused(less) or "")
    assert refused(least) is None
    hair = 0.989 * least  # three digits: a hundredth at most
    assert named_share(refused(hair) or "") == least

    def config(share: float) -> Any:
        return methods.configure(method, {"budget": {limit: share}})

    with pytest.raises(BudgetError) as said:
        pipeline.run(dense, config(less), data="sample", out=tmp_path / "small")
    assert named_share(str(said.value)) == least
    with pytest.raises(BudgetError) as said:
        methods.plan(method, dense.spec, config(less))
    alone = named_share(str(said.value))
    methods.plan(method, dense.spec, config(alone))
    with pytest.raises(BudgetError):
        methods.plan(method, dense.spec, config(0.989 * alone))
