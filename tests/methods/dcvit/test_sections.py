"""What DC-ViT's report shows of its blocks."""

from vitrim.methods.dcvit.sections import sections
from vitrim.result import Table


def test_the_closed_form_shows_what_each_cut_was_expected_to_cost() -> None:
    blocks = [{"block": 0, "predicted": 0.0}, {"block": 1, "predicted": 0.25}]
    (table,) = sections({"report": {"metric": "KL", "blocks": blocks}, "history": [{"stage": "allocate"}]})
    assert isinstance(table, Table)
    assert "(KL)" in table.lead
    assert table.rows == (("1", 0.25),)


def test_fine_tuning_shows_its_trials_and_which_were_taken() -> None:
    history = [{"stage": "trial", "block": i, "mismatch": i / 10} for i in range(3)]
    report = {"metric": "synthetic images", "order": [2, 0], "blocks": []}
    (table,) = sections({"report": report, "history": history})
    assert isinstance(table, Table)
    assert table.rows == (("0", 0.0, 2), ("1", 0.1, None), ("2", 0.2, 1))


def test_nothing_cut_is_nothing_shown() -> None:
    assert sections({"report": {"blocks": [{"block": 0}]}, "history": []}) == ()
