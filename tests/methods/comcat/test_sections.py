"""What COMCAT's report shows of its ranks."""

from vitrim.methods.comcat.sections import sections
from vitrim.result import Table


def test_a_row_for_each_block_has_the_lost_energy_of_each_part_that_was_cut() -> None:
    groups = [
        {"block": 0, "part": "qk", "rank": 8, "energy_kept": 0.75},
        {"block": 0, "part": "fc1", "rank": None, "energy_kept": 1.0},
        {"block": 2, "part": "qk", "rank": None, "energy_kept": 1.0},
        {"block": 2, "part": "vo", "rank": 4, "energy_kept": 0.5},
    ]
    (table,) = sections({"report": {"groups": groups}})
    assert isinstance(table, Table)
    assert [column.heading for column in table.columns] == ["block", "queries and keys", "values and out"]
    assert table.rows == (("0", 0.25, None), ("2", None, 0.5))


def test_nothing_cut_is_nothing_shown() -> None:
    assert sections({"report": {"groups": [{"block": 0, "part": "qk", "rank": None, "energy_kept": 1.0}]}}) == ()
