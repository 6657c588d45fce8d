"""Classes are matched by name."""

from __future__ import annotations

import pytest

from vitrim import data
from vitrim.errors import DataError


def test_classes_are_matched_by_name_and_not_by_position():
    assert data.match_labels(["cat", "dog", "ant"], ["ant", "cat"]).tolist() == [2, 0]
    assert data.match_labels(["Sign symbol", "tench, Tinca tinca"], ["tench", "sign_symbol"]).tolist() == [1, 0]


def test_wordnet_folders_match_a_model_with_imagenets_names():
    from timm.data import ImageNetInfo

    info = ImageNetInfo()
    data_classes = sorted(info.label_names())[::-1]
    for names in (info.label_descriptions(), info.label_descriptions(detailed=True), info.label_names()):
        assert data.match_labels(names, data_classes).tolist() == list(range(1000))[::-1]
    assert data.match_labels(info.label_descriptions(), ["n01443537", "n01440764"]).tolist() == [1, 0]


def test_a_mismatch_names_both_lists_and_the_way_out():
    with pytest.raises(
        DataError, match=r"'fox'.*Model: 'cat', 'dog' \(2 in all\)\. Data: 'cat', 'fox'.*train --new-head"
    ):
        data.match_labels(["cat", "dog"], ["cat", "fox"])


def test_numbers_are_no_names() -> None:
    with pytest.raises(
        DataError, match=r"the data numbers its classes \(0 to 1\).*Write the names into the label column"
    ):
        data.match_labels(["cat", "dog"], ["0", "1"])
    assert data.match_labels(["1", "0"], ["0", "1"]).tolist() == [1, 0]


def test_equal_lists_match_even_where_a_name_stands_twice() -> None:
    assert data.match_labels(["crane", "owl", "crane"], ["crane", "owl", "crane"]).tolist() == [0, 1, 2]


def test_an_ambiguous_first_name_is_no_match():
    with pytest.raises(DataError, match="are not the model's"):
        data.match_labels(["crane, bird", "crane, machine"], ["crane"])


def test_wordnet_ids_are_read_out_as_words_and_other_names_as_they_are():
    assert data.readable(["n01440764", "n02123045"]) == ("tench", "tabby")
    assert data.readable(["cat", "n01440764"]) == ("cat", "n01440764")
    assert data.readable([]) == ()


def test_any_name_of_a_class_is_enough_where_no_other_has_it_however_accents_are_encoded() -> None:
    model = ["tench, Tinca tinca", "goldfish", "crane, bird", "crane, machine", "caf\u00e9"]
    assert data.match_labels(model, ["Tinca_tinca", "cafe\u0301", "machine"]).tolist() == [0, 4, 3]
    with pytest.raises(DataError, match=r"'crane' \(1 in all\) of the data is"):
        data.match_labels(model, ["crane"])
    assert data.match_labels(["owl", "owl", "cat"], ["cat"]).tolist() == [2]
    with pytest.raises(DataError, match="is not told apart by name"):
        data.match_labels(["owl", "owl", "cat"], ["owl"])
