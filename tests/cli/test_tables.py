"""Tables and numbers for people."""

from tests.cli.kit import DEIT_S, run
from vitrim.cli import progress, tables


def test_no_color_is_honoured() -> None:
    assert "\x1b[" not in run("cost", DEIT_S, env={"NO_COLOR": "1", "FORCE_COLOR": "1"}).stdout.replace(
        "\x1b[1m", ""
    ).replace("\x1b[0m", "")


def test_counts_are_scaled_for_people() -> None:
    assert tables.count_text(4_598_882_304) == "4.599 G"
    assert tables.count_text(22_050_664) == "22.05 M"
    assert tables.share_text(1, 2) == "50.0 %"
    assert progress.duration_text(3661) == "1:01:01"
