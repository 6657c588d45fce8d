"""The report: one page that loads nothing, is well formed, and whose every figure is the result's own."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.reporting.reading import Page
from vitrim import reporting
from vitrim.errors import ArtifactError
from vitrim.reporting import figures, page


def test_the_page_is_balanced_and_has_every_section(result: dict[str, Any]) -> None:
    seen = Page(page.render(result))
    headings = "".join(seen.text)
    for heading in (
        "Before and after",
        "What was cut",
        "How it <went>",
        "Another",
        "Cost by block",
        "Speed",
        "Recovery",
        "Predictions",
        "To go on",
    ):
        assert heading in headings


def test_a_narrower_stream_and_a_faster_step_are_said(result: dict[str, Any]) -> None:
    said = "".join(Page(page.render(result)).text)
    assert "1.50 times as fast" in said
    assert "keeps 24 of 32 channels" not in said  # the specs have one width
    result["specs"]["compressed"]["width"] = 24
    assert "keeps 24 of 32 channels" in "".join(Page(page.render(result)).text)


def test_the_page_loads_nothing(result: dict[str, Any]) -> None:
    text = page.render(result)
    seen = Page(text)
    assert not re.search(r"https?://|//[a-z]", re.sub(r'xmlns="[^"]*"', "", text))
    assert "@import" not in text
    assert "url(" not in text
    assert not seen.of("script")
    sources = [
        value for _, attributes in seen.tags for key, value in attributes.items() if key in ("src", "href", "srcset")
    ]
    assert sources
    assert all(source and source.startswith("data:") for source in sources)


def test_reports_are_imported_without_torch_and_without_templates() -> None:
    code = "import vitrim.reporting, sys; print({'torch', 'jinja2'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def test_every_figure_is_the_results_own(result: dict[str, Any]) -> None:
    shown = Page(page.render(result)).of("data")
    assert len(shown) > 60
    for attributes in shown:
        path = attributes["data-path"]
        assert path is not None
        value = figures.lookup(result, path)
        assert value is not None, path
        assert attributes["value"] == repr(value), path


def test_the_figures_that_matter_are_there(result: dict[str, Any]) -> None:
    paths = {attributes["data-path"] for attributes in Page(page.render(result)).of("data")}
    for state in ("dense", "compressed", "recovered"):
        assert f"metrics/{state}/top1" in paths
    for name in ("dense", "compressed"):
        assert {f"costs/{name}/macs", f"costs/{name}/params", f"file_bytes/{name}"} <= paths
    assert {"timing/speedups/0/ideal", "timing/speedups/0/measured", "timing/speedups/0/realised"} <= paths
    assert {"specs/compressed/blocks/0/attention/qk_dim", "specs/compressed/blocks/0/mlp/fc1_rank"} <= paths


def test_labels_paths_and_warnings_are_escaped(result: dict[str, Any]) -> None:
    seen = Page(page.render(result))
    assert not {"cat", "teacher", "b", "x", "it", "small", "at"} & {tag for tag, _ in seen.tags}
    assert not re.search(r"&amp;(lt|gt|amp|#)", page.render(result)), "escaped twice"
    text = "".join(seen.text)
    for said in ("<cat>", "runs/<teacher> & co", "It may <b>not</b> pay.", "timm:<x>", 'vitrim.load("<small>")'):
        assert said in text


def test_every_image_has_words_for_it_and_every_table_its_heads(result: dict[str, Any]) -> None:
    seen = Page(page.render(result))
    assert all(attributes.get("alt") for attributes in seen.of("img"))
    ids = {attributes.get("id") for _, attributes in seen.tags}
    for attributes in seen.of("svg"):
        assert attributes["role"] == "img"
        assert set((attributes["aria-labelledby"] or "").split()) <= ids
    assert all(attributes.get("scope") for attributes in seen.of("th"))


def test_ids_are_unique(result: dict[str, Any]) -> None:
    ids = [attributes["id"] for _, attributes in Page(page.render(result)).tags if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_a_changed_answer_is_marked_in_words(result: dict[str, Any]) -> None:
    text = page.render(result)
    assert text.count('class="badge">differs') == 1


def test_samples_need_no_label_no_name_and_no_recovery(result: dict[str, Any]) -> None:
    (bare, _) = result["samples"]
    del bare["label"], bare["name"], bare["predictions"]["recovered"]
    seen = Page(page.render({**result, "samples": [bare]}))
    assert [image["alt"] for image in seen.of("img")] == ["sample 1"]


@pytest.mark.parametrize(
    ("gap", "said"),
    [
        ({"points": -1.5, "low": -2.5, "high": -0.5}, "1.5 points of accuracy lost"),
        ({"points": 1.5, "low": 0.5, "high": 2.5}, "1.5 points of accuracy gained"),
        ({"points": -0.2, "low": -0.9, "high": 0.4}, "no difference in accuracy seen"),
        (
            {"points": 0.0, "low": -11.9, "high": 11.9},
            "too few images to tell: on 1200, less than 12 points cannot be seen",
        ),
    ],
)
def test_the_headline_claims_no_more_than_the_interval_shows(
    result: dict[str, Any], gap: dict[str, float], said: str
) -> None:
    assert said in page.headline({**result, "difference": {**gap, "count": 1200}})


def test_a_model_that_is_not_faster_is_not_called_faster(result: dict[str, Any]) -> None:
    gain = {**result["timing"]["speedups"][0], "low": 0.97, "measured": 1.02}
    said = page.headline({**result, "timing": {**result["timing"], "speedups": [gain]}})
    assert "no speed-up seen (PyTorch, batch 1)" in said


def test_the_headline_names_the_least_flattering_speed_and_the_tile_shows_its_times(result: dict[str, Any]) -> None:
    rows, gains = result["timing"]["rows"], result["timing"]["speedups"]
    slower = [{**row, "batch": 8, "median_ms": 10.0 - index} for index, row in enumerate(rows)]
    timing = {"notes": [], "rows": rows + slower, "speedups": [*gains, {**gains[0], "batch": 8, "measured": 1.11}]}
    assert "1.11 times as fast (PyTorch, batch 8, the least of those measured)" in page.headline(
        {**result, "timing": timing}
    )
    shown = [tile for tile in page.tiles({**result, "timing": timing}) if "Latency" in tile.what]
    assert [(tile.what, tile.now, tile.was) for tile in shown] == [
        ("Latency, PyTorch, batch 8", "timing/rows/3/median_ms", "timing/rows/2/median_ms")
    ]


def test_the_load_stands_beside_the_timings(result: dict[str, Any]) -> None:
    assert "Load of the machine" not in page.render(result)  # of a result from before it was noted
    rows = [{**row, "load": 3.25, "cores": 2} for row in result["timing"]["rows"]]
    timing = {**result["timing"], "rows": rows, "notes": ["The machine was busy."]}
    said = "".join(Page(page.render({**result, "timing": timing})).text)
    assert "Load of the machine before it: 3.25 on 2 cores." in said
    assert "The machine was busy." in said


def test_on_a_narrow_screen_wide_tables_stand_as_lists_whose_cells_say_their_column(result: dict[str, Any]) -> None:
    seen = Page(page.render(result))
    wide = [at for at in seen.of("table") if "stack" in str(at.get("class"))]
    assert len(wide) == 3  # what was cut, the method's own, the cost of each block
    labels = {at.get("data-label") for at in seen.of("td")}
    assert {"part", "q/k dims", "MLP units", "parameters, now"} <= labels
    css = page.render(result).split("</style>")[0]
    assert "min-width: 5" not in css
    assert "min-width: 6" not in css


def test_a_network_that_was_kept_as_cut_is_not_called_recovered(result: dict[str, Any]) -> None:
    text = page.render({**result, "recovery": {**result["recovery"], "kept": "cut"}})
    assert "kept: as cut" in text
    assert "after recovery" not in text
    assert "after recovery" in page.render(result)


def test_shares_stand_beside_the_number_of_images_that_they_count(result: dict[str, Any]) -> None:
    said = " ".join(Page(page.render(result)).text)
    assert "1\u202f065" in said  # 88.75 % after recovery
    assert re.search(r"1\u202f065 of\s+1\u202f200", said)


@pytest.mark.parametrize(
    "part",
    [
        "timing",
        "recovery",
        "difference",
        "samples",
        "warnings",
        "seconds",
        "commands",
        "provenance",
        "sections",
    ],
)
def test_a_part_that_was_left_out_leaves_a_whole_page(result: dict[str, Any], part: str) -> None:
    metrics = {**result["metrics"], "recovered": None} if part == "recovery" else result["metrics"]
    headings = {  # what goes with the part; the other parts have none of their own
        "timing": "Speed: ideal and measured",
        "recovery": "training steps",
        "samples": "Drawn <at random>",
        "commands": "To go on",
        "sections": "How it <went>",
    }
    whole, less = (Page(page.render({**result, **change})) for change in ({}, {part: None, "metrics": metrics}))
    said = ["".join(seen.text) for seen in (whole, less)]
    absent = {key: value for key, value in {**result, "metrics": metrics}.items() if key != part}
    assert Page(page.render(absent)).text == less.text
    assert said[0] != said[1]
    assert "What was cut" in said[1]
    if part in headings:
        assert [headings[part] in text for text in said] == [True, False]


def test_without_labels_the_page_speaks_of_agreement(result: dict[str, Any]) -> None:
    metrics = {"dense": {"top1": None, "count": 9}, "compressed": {"top1": None, "agreement": 0.87}, "recovered": None}
    text = page.render({**result, "metrics": metrics, "difference": None, "recovery": None, "samples": []})
    Page(text)
    assert "87.0 % of the predictions as before" in text
    assert "Accuracy" not in text


def test_writing_leaves_one_whole_file(result: dict[str, Any], tmp_path: Path) -> None:
    place = reporting.write(result, tmp_path / "deep" / "report.html")
    assert [path.name for path in place.parent.iterdir()] == ["report.html"]
    Page(place.read_text(encoding="utf-8"))


def test_a_folder_gives_the_same_page_as_its_result(result: dict[str, Any], tmp_path: Path) -> None:
    shown = {key: result.pop(key) for key in ("samples", "samples_note")}
    (tmp_path / "stages").mkdir()
    (tmp_path / "summary.json").write_text(reporting.as_text(result), encoding="utf-8")
    (tmp_path / "stages" / "samples.json").write_text(reporting.as_text(shown), encoding="utf-8")
    from_folder = reporting.write(tmp_path, tmp_path / "a.html").read_text(encoding="utf-8")
    whole = json.loads(json.dumps({**result, **shown}, sort_keys=True))  # JSON sorts the stages by name
    assert from_folder == reporting.write(whole, tmp_path / "b.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "no summary.json"), ("{", "damaged"), ("[]", "expected a JSON object"), ('{"schema": 9}', "schema 9")],
)
def test_a_folder_without_a_whole_run_is_refused(tmp_path: Path, content: str | None, said: str) -> None:
    if content is not None:
        (tmp_path / "summary.json").write_text(content, encoding="utf-8")
    with pytest.raises(ArtifactError, match=said):
        reporting.write(tmp_path, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


OUTSIDE = [
    "http://x.invalid/a.png",
    "//x.invalid/a",
    "data:image/svg+xml;base64,AAAA",
    'data:image/png;base64,AA" x=',
    3,
    None,
]


@pytest.mark.parametrize("uri", OUTSIDE, ids=str)
def test_a_forged_picture_makes_the_page_load_nothing(result: dict[str, Any], tmp_path: Path, uri: object) -> None:
    result["samples"][1]["image"] = uri
    shown = {"samples": result.pop("samples")}
    (tmp_path / "stages").mkdir()
    (tmp_path / "summary.json").write_text(reporting.as_text(result), encoding="utf-8")
    (tmp_path / "stages" / "samples.json").write_text(reporting.as_text(shown), encoding="utf-8")
    with pytest.raises(ArtifactError, match="image 1 is no picture in the file itself"):
        reporting.write(tmp_path, tmp_path / "report.html")


def test_the_page_itself_forbids_scripts_and_whatever_is_not_in_it(result: dict[str, Any], tmp_path: Path) -> None:
    page = Page(reporting.write(result, tmp_path / "a.html").read_text(encoding="utf-8"))
    (policy,) = [at["content"] for at in page.of("meta") if at.get("http-equiv") == "Content-Security-Policy"]
    rules = dict((part.strip() + " ").split(" ", 1) for part in str(policy).split(";"))
    assert rules["default-src"].strip() == "'none'"
    assert rules["img-src"].strip() == "data:"
    assert not {"script-src", "connect-src", "font-src"} & set(rules)


@pytest.mark.parametrize(
    "change",
    [
        {"method": None},
        {"method": []},
        {"costs": {"dense": {"macs": 0}, "compressed": {"macs": 0}}},
        {"sections": [{"kind": "no such"}]},
        {"sections": {"a": 1}},
        {"specs": {"dense": {"blocks": [1]}, "compressed": {"blocks": [None]}}},
        {"timing": {"rows": [{}], "speedups": [{}]}},
        {"commands": 7},
        {"recovery": {"curve": [{"step": "x", "loss": "y"}] * 2}},
    ],
    ids=str,
)
def test_a_forged_summary_is_refused_in_one_sentence(
    result: dict[str, Any], tmp_path: Path, change: dict[str, Any]
) -> None:
    del result["samples"]
    (tmp_path / "summary.json").write_text(reporting.as_text(result | change), encoding="utf-8")
    with pytest.raises(ArtifactError, match=r"no summary that a run wrote"):
        reporting.write(tmp_path, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_a_curve_of_one_point_is_left_out_and_validation_has_its_interval(result: dict[str, Any]) -> None:
    whole = page.training(result)
    assert [curve["title"] for curve in whole] == ["Training loss", "Validation accuracy"]
    assert whole[1]["series"][0]["spread"] == []  # of how many images is not known
    counted = [{**row, "count": 400.0} for row in result["recovery"]["validation"]]
    sure = page.training({**result, "recovery": {**result["recovery"], "validation": counted}})[1]["series"][0]
    assert len(sure["spread"]) == 2
    assert all(low < value < high for (_, value), (low, high) in zip(sure["points"], sure["spread"], strict=True))
    short = {**result["recovery"], "curve": [{"step": 20, "loss": 1.0}], "validation": counted[:1]}
    assert page.training({**result, "recovery": short}) == []
    assert "Training loss" not in page.render({**result, "recovery": short})
