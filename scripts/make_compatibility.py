"""Write docs/compatibility.md from what the contract test of all families ran.

    python scripts/make_compatibility.py

Runs tests/sources/test_contract.py and puts each outcome where it belongs; a check that fails is shown as failing.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
TEST = "tests/sources/test_contract.py"
CHECKS = {
    "test_logits_and_features_are_the_familys_own": "same logits and features",
    "test_cut_equals_masked": "cut equals masked",
    "test_a_cut_model_goes_back_into_its_family": "back, cut evenly",
    "test_what_the_family_cannot_say_is_refused_with_the_block_in_the_way": "back, cut unevenly",
}
"""Columns that every variant has, by test; the last is a refusal that names the block."""
METHOD_TEST = "test_every_method_cuts_it_and_the_folder_gives_the_same_answers"
FORMATS = {
    "timm": "`--format timm`: a folder for `timm.create_model('local-dir:...')`",
    "transformers": "`--format hf`: a folder for `from_pretrained`",
    "torchvision": "`--format torchvision`: a state dict with the arguments of `VisionTransformer`",
    "T2T-ViT": "`--format t2t`: a state dict with the authors' keys",
}
Outcomes = dict[str, dict[str, dict[str, bool]]]
"""Check or method -> family -> variant -> passed."""


def outcomes() -> Outcomes:
    """Every case of the contract test with its outcome."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "results.xml"
        command = [sys.executable, "-m", "pytest", TEST, f"--junitxml={place}", "-q", "-p", "no:cacheprovider"]
        subprocess.run(command, cwd=ROOT, check=False, stdout=sys.stderr)
        cases = ElementTree.parse(place).getroot().iter("testcase")
        found: Outcomes = defaultdict(lambda: defaultdict(dict))
        for case in cases:
            test, _, inside = case.get("name", "").partition("[")
            passed = case.find("failure") is None and case.find("error") is None
            name = inside.removesuffix("]")
            if test in CHECKS:
                family, _, variant = name.partition("/")
                found[CHECKS[test]][family][variant] = passed
            elif test == METHOD_TEST:
                method, _, rest = name.partition("-")
                family, _, variant = rest.partition("/")
                found[f"`{method}`"][family][variant] = passed
    return found


def cell(ran: dict[str, bool]) -> str:
    """`all 8`, or which of them fail; a dash where nothing ran."""
    if not ran:
        return "-"
    failing = sorted(name for name, passed in ran.items() if not passed)
    return f"all {len(ran)}" if not failing else f"fails: {', '.join(failing)}"


def table(found: Outcomes) -> str:
    """The page."""
    checks = [*CHECKS.values(), *sorted(name for name in found if name.startswith("`"))]
    families = list(found[checks[0]])
    lines = [
        "# What works with which family",
        "",
        f"Made by `scripts/make_compatibility.py` from the outcomes of `{TEST}`; figures are numbers of variants tried, small, with every "
        f"number random, in float64 to 1e-10 of the largest. timm {version('timm')}, transformers {version('transformers')}, torchvision "
        f"{version('torchvision')}, torch {version('torch')}.",
        "",
        "| family | " + " | ".join(checks) + " |",
        "| --- |" + " --- |" * len(checks),
    ]
    for family in families:
        lines.append(f"| {family} | " + " | ".join(cell(found[check].get(family, {})) for check in checks) + " |")
    lines += [
        "",
        "*Back, cut evenly*: a block fewer and all MLPs of half the width, as the family's own module, with equal logits. *Back, cut unevenly*: "
        "refused in one sentence that names the block. Methods are tried on one variant of each kind: the result meets its budget and its "
        "folder loads to the same network.",
        "",
        "| family | written by `vitrim export` as | variants |",
        "| --- | --- | --- |",
    ]
    for family in families:
        names = ", ".join(f"`{name}`" for name in found[checks[0]][family])
        lines.append(f"| {family} | {FORMATS[family]} | {names} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    (ROOT / "docs" / "compatibility.md").write_text(table(outcomes()), encoding="utf-8")
