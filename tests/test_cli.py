"""The command: fast where it needs no network, quiet where it is told, and the same numbers in the table and the JSON."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from vitrim.cli import main, progress, tables

DEIT_S = "timm:deit_small_patch16_224"


def run(*words: str | Path, env: dict[str, str] | None = None) -> Result:
    """One command in this process."""
    return CliRunner().invoke(main, [str(word) for word in words], env=env)


def spent_by_children() -> float:
    """Processor seconds, which another program on the machine does not lengthen as it does the clock's."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def fresh(code: str) -> tuple[str, float]:
    """Output of a fresh process, and the processor seconds it took (the better of two: the first may fill caches)."""
    seconds = []
    for _ in range(2):
        start = spent_by_children()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        seconds.append(spent_by_children() - start)
    return done.stdout, min(seconds)


RUN_AND_TELL = """
import sys
from vitrim.cli import main
try:
    main({words!r})
except SystemExit as done:
    assert not done.code, done.code
print("heavy:", sorted({{"torch", "timm", "numpy", "torchvision", "pydantic"}} & set(sys.modules)))
"""


def test_help_takes_under_half_a_second() -> None:
    out, seconds = fresh(RUN_AND_TELL.format(words=["--help"]))
    assert "compress" in out
    assert "heavy: []" in out
    assert seconds < 0.5


def test_import_alone_imports_nothing_heavy() -> None:
    out, _ = fresh("import vitrim, sys; print(vitrim.__version__, 'torch' in sys.modules, 'timm' in sys.modules)")
    assert out.split()[1:] == ["False", "False"]


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


def test_every_verb_has_help_with_an_example_or_a_sentence() -> None:
    verbs = list(main.commands)
    assert verbs == [
        "cost",
        "plan",
        "compress",
        "recover",
        "train",
        "evaluate",
        "predict",
        "measure",
        "report",
        "export",
        "push",
        "doctor",
        "demo",
    ]
    for verb in verbs:
        done = run(verb, "--help")
        assert done.exit_code == 0
        assert "--quiet" in done.stdout
        assert "--json" in done.stdout


def test_usage_errors_import_no_torch() -> None:
    code = (
        "import sys\nfrom click.testing import CliRunner\nfrom vitrim.cli import main\n"
        "for words in (['cots'], ['compress', '--keep-mcas', '1'], ['compress', '--model', 'x', '--method', 'commcat', '--keep-macs', '0.5', '--out', 'x']):\n"
        "    done = CliRunner().invoke(main, words)\n    assert done.exit_code == 2, done.output\n"
        "print('torch' in sys.modules)"
    )
    out, _ = fresh(code)
    assert out.split() == ["False"]


def test_doctor_names_versions_and_extras_and_no_folder() -> None:
    done = run("doctor", "--json")
    values = json.loads(done.stdout)
    assert values["packages"]["torch"]
    assert set(values["extras"]) >= {"data", "track"}
    assert isinstance(values["processor"]["features"], list)
    assert str(Path.home()) not in done.stdout
    assert run("doctor").exit_code == 0


def test_no_color_is_honoured() -> None:
    assert "\x1b[" not in run("cost", DEIT_S, env={"NO_COLOR": "1", "FORCE_COLOR": "1"}).stdout.replace(
        "\x1b[1m", ""
    ).replace("\x1b[0m", "")


def test_lines_come_at_the_start_and_the_end_of_a_stage(capsys: pytest.CaptureFixture[str]) -> None:
    show = progress.Lines()
    for done in range(1, 101):
        show("train", done, 100, loss=0.25)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("train: 1/100")
    assert "loss 0.25" in lines[0]
    assert "100/100" in lines[1]


def test_quiet_gives_no_progress_at_all() -> None:
    with progress.progress_on_stderr(quiet=True) as show:
        assert show is None


def test_counts_are_scaled_for_people() -> None:
    assert tables.count_text(4_598_882_304) == "4.599 G"
    assert tables.count_text(22_050_664) == "22.05 M"
    assert tables.share_text(1, 2) == "50.0 %"
    assert progress.duration_text(3661) == "1:01:01"


def test_no_verify_skips_the_comparison_with_the_source(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from vitrim.sources import parity

    asked = []
    monkeypatch.setattr(parity, "verify", lambda *args, **rest: asked.append(rest["what"]))
    words = ["export", "timm:test_vit", "--no-pretrained", "--format", "timm"]
    assert run(*words, "--out", tmp_path / "a", "--no-verify").exit_code == 0
    assert asked == []
    assert run(*words, "--out", tmp_path / "b").exit_code == 0
    assert len(asked) == 1


def test_export_writes_a_folder_that_timm_loads_and_refuses_one_that_is_there(tmp_path: Path) -> None:
    words = ["export", "timm:test_vit", "--no-pretrained", "--format", "timm", "--out", tmp_path / "a", "--json"]
    done = run(*words)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == {"format": "timm", "out": str(tmp_path / "a")}
    assert (tmp_path / "a" / "config.json").is_file()
    again = run(*words)
    assert again.exit_code == 2
    assert "--force" in again.stderr
    assert run(*words, "--force").exit_code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_stage_that_starts_over_is_timed_from_its_new_beginning(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two builds of three blocks, ten seconds each: the first line of either says twenty seconds left."""
    clock = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    show = progress.Lines()
    for _ in range(2):
        for done in (1, 2, 3):
            clock[0] += 10
            show("build", done, 3)
    said = capsys.readouterr().err.splitlines()
    assert said == ["build: 1/3  0:20 left", "build: 2/3  0:10 left", "build: 3/3  done in 0:30"] * 2


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
