"""`vitrim plan`."""

import json

from click.testing import CliRunner

from tests.cli.kit import run
from vitrim.cli import main


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
