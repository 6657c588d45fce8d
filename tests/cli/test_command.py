"""The command as a whole: fast where it needs no network, and its verbs."""

import logging

import pytest

from tests.cli.kit import RUN_AND_TELL, fresh, run
from vitrim.cli import VERBS
from vitrim.errors import SourceError
from vitrim.spec import ModelSpec


def test_help_takes_under_half_a_second() -> None:
    out, seconds = fresh(RUN_AND_TELL.format(words=["--help"]))
    assert "compress" in out
    assert "heavy: []" in out
    assert seconds < 0.5


def test_import_alone_imports_nothing_heavy() -> None:
    out, _ = fresh("import vitrim, sys; print(vitrim.__version__, 'torch' in sys.modules, 'timm' in sys.modules)")
    assert out.split()[1:] == ["False", "False"]


def test_every_verb_has_help_with_an_example_or_a_sentence() -> None:
    verbs = list(VERBS)
    assert verbs == [
        "cost",
        "methods",
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


COMPRESS = ["compress", "--model", "x", "--data", "y", "--keep-macs", "0.5", "--out", "x", "--method"]


@pytest.mark.parametrize(
    "words",
    [
        ["cots"],
        ["compress", "--keep-mcas", "1"],
        [*COMPRESS, "commcat"],
        [*COMPRESS, "comcat", "--variant", "whitend"],
        [*COMPRESS, "comcat", "--set", "imagse=3"],
        [*COMPRESS, "comcat", "--set", "images=none"],
        ["plan", "--model", "x", "--keep-macs", "0.5", "--set", "augment.flip=2"],
    ],
    ids=" ".join,
)
def test_usage_errors_import_no_torch(words: list[str]) -> None:
    code = (
        "import sys\nfrom click.testing import CliRunner\nfrom vitrim.cli import VERBS, main\n"
        f"done = CliRunner().invoke(main, {words!r})\nassert done.exit_code == 2, done.output\nprint('torch' in sys.modules)"
    )
    out, _ = fresh(code)
    assert out.split() == ["False"]


@pytest.mark.parametrize(
    "words",
    [
        ["cost", "[/]\x1b[31m"],
        ["predict", "builtin:cifar10-vit-micro", "[/]\x1b[31m.jpg"],
        ["report", "[/]\x1b[31m"],
        ["push", "[/]\x1b[31m", "a/b"],
        ["\x1b[31m[/]"],
        ["--\x1b[31m[/]"],
        ["cost", "x", "--\x1b[31m[/]"],
        ["evaluate", "\x1b[31m[/]", "--data", "sample"],
        ["plan", "--model", "\x1b[31m[/]", "--keep-macs", "0.5"],
    ],
    ids=ascii,
)
def test_a_hostile_name_is_refused_in_one_line_that_no_terminal_obeys(words: list[str]) -> None:
    done = run(*words)
    assert done.exit_code in (1, 2)
    assert isinstance(done.exception, SystemExit)
    assert "\\x1b[31m" in done.stderr
    assert "\x1b" not in done.output


def test_what_the_package_logs_reaches_no_terminal_unescaped(monkeypatch: pytest.MonkeyPatch) -> None:
    def named(name: str, _: None) -> ModelSpec:
        logging.getLogger("vitrim.sources").info("kept [/]%s", "\x1b[31m")
        raise SourceError(f"no {name}\nno line of its own")

    monkeypatch.setattr("vitrim.cli.cost.spec_named", named)
    done = run("cost", "x")
    assert done.stderr.splitlines() == ["kept [/]\\x1b[31m", "Error: no x no line of its own"]
