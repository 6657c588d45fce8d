"""The report: one page that loads nothing, is well formed, and whose every figure is the result's own."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from vitrim import counting, reporting
from vitrim.errors import ArtifactError
from vitrim.reporting import charts, figures, page
from vitrim.spec import AttentionSpec, BlockSpec, MlpSpec, ModelSpec, Output, Position, Prefix
from vitrim.timing import quartiles, speedups

PIXEL = "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
VOID = {"meta", "link", "img", "br", "hr", "input"}
SVG_LEAVES = {"rect", "line", "circle", "polyline"}


def network(*, cut: bool) -> ModelSpec:
    whole = BlockSpec(attention=AttentionSpec(heads=2, qk_dim=16, v_dim=16, scale=0.25), mlp=MlpSpec(hidden=64))
    small = BlockSpec(
        attention=AttentionSpec(heads=1, qk_dim=8, v_dim=12, scale=0.25), mlp=MlpSpec(hidden=64, fc1_rank=8)
    )
    last = BlockSpec(attention=AttentionSpec(heads=2, qk_dim=16, v_dim=16, scale=0.25), mlp=None, steps=(Prefix(),))
    blocks = (small, BlockSpec(attention=None, mlp=MlpSpec(hidden=24)), last) if cut else (whole, whole, whole)
    return ModelSpec(
        image_px=(16, 16),
        patch_px=(4, 4),
        width=32,
        position=Position(grid=(4, 4)),
        blocks=blocks,
        outputs=(Output(classes=3),),
    )


def rows_of(model: str, base: float) -> dict[str, Any]:
    samples = [base, base * 1.1, base * 1.25, base * 1.3]
    low, median, high = quartiles(samples)
    facts = {"runtime": "eager", "batch": 1, "threads": 1, "dtype": "float32", "device": "cpu", "device_name": "a CPU"}
    return facts | {
        "model": model,
        "median_ms": median,
        "low_ms": low,
        "high_ms": high,
        "samples_ms": samples,
        "images_per_s": 1e3 / median,
        "runs": 4,
    }


@pytest.fixture
def result() -> dict[str, Any]:
    specs = {"dense": network(cut=False), "compressed": network(cut=True)}
    costs = {name: counting.cost(spec) for name, spec in specs.items()}
    rows = [rows_of("dense", 2.0), rows_of("compressed", 1.5)]
    said = {"label": "<cat>", "probability": 0.75}
    return {
        "schema": 1,
        "name": "small",
        "model": "runs/<teacher> & co",
        "method": {"name": "comcat", "variant": "whitened"},
        "data": {"name": "photos", "split": "validation", "count": 1200},
        "budget": {"keep_macs": 0.5},
        "specs": {name: spec.to_dict() for name, spec in specs.items()},
        "costs": {name: cost.to_dict() for name, cost in costs.items()},
        "file_bytes": {"dense": 123456, "compressed": 65432},
        "metrics": {
            "dense": {"top1": 0.9025, "top5": 0.99, "loss": 0.31, "count": 1200},
            "compressed": {"top1": 0.711, "top5": 0.97, "loss": 0.84, "agreement": 0.72},
            "recovered": {"top1": 0.8875, "top5": 0.985, "loss": 0.35, "agreement": 0.91},
        },
        "difference": {"points": -1.5, "low": -2.5, "high": -0.5, "count": 1200},
        "timing": {
            "rows": rows,
            "speedups": speedups(rows, "dense", {name: cost.macs for name, cost in costs.items()}),
            "notes": ["Compiled PyTorch was not timed."],
        },
        "recovery": {
            "objective": "distilled",
            "steps": 40,
            "seconds": 12.5,
            "images_per_s": {"dense": 200.0, "compressed": 300.0},
            "curve": [{"step": step, "loss": 2 / step} for step in range(1, 41)],
            "validation": [{"step": 20, "top1": 0.85}, {"step": 40, "top1": 0.8875}],
        },
        "samples": [
            {
                "image": PIXEL,
                "name": "a",
                "label": "<cat>",
                "predictions": {"dense": said, "compressed": said, "recovered": said},
            },
            {
                "image": PIXEL,
                "name": "b",
                "label": None,
                "predictions": {"dense": said, "compressed": said, "recovered": {"label": "dog", "probability": 0.5}},
            },
        ],
        "samples_note": "Drawn <at random>.",
        "search": {
            "history": [
                {
                    "step": step,
                    "cost": {"macs": 1 - step / 80},
                    "budget": {"macs": 0.5},
                    "z": {"macs": step / 40},
                    "removed": {
                        "heads": {"block 1": 0.1, "block 3": 0.2},
                        "v": {"block 1 head 0": 0.0, "block 1 head 1": step / 50},
                        "hidden": {"block 0": 0.5, "block 1": 0.5},
                    },
                    "y": {"heads": {"block 1": 1.0, "block 3": 3.0}, "v": {}, "hidden": {"block 0": 0.5}},
                    "gates": {"block 1": 0.9, "block 3 mlp": 0.98},
                }
                for step in (20, 40)
            ],
            "ended": "<converged>",
            "judged": "2 changes of side",
            "saving": {"macs": {"share": 0.5, "widths": 0.75, "skipping": 0.25}},
            "finaliser": {"macs": {"cut": 0.0125}},
        },
        "prediction": {
            "metric": "KL <nats>",
            "predicted_kl": 0.001,
            "reached_kl": 0.0012,
            "candidates": [
                {
                    "width": [24, 32],
                    "steps": [],
                    "macs": 5000,
                    "params": 400,
                    "predicted_kl": 0.001,
                    "reached_kl": 0.0012,
                },
                {
                    "width": [32, 32],
                    "steps": [{"kind": "merge"}],
                    "macs": 5100,
                    "params": 410,
                    "predicted_kl": 0.002,
                    "reached_kl": 0.002,
                },
            ],
        },
        "warnings": ["It may <b>not</b> pay."],
        "seconds": {"plan": 0.5, "compress": 100.0},
        "provenance": {"source": "timm:<x>"},
        "commands": [{"does": "Use <it>", "command": 'vitrim.load("<small>")'}],
    }


class Page(HTMLParser):
    """Checks that tags balance, and gathers what the tests look at."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in VOID | SVG_LEAVES, f"<{tag}/> is not closed in HTML"
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def test_the_page_is_balanced_and_has_every_section(result: dict[str, Any]) -> None:
    seen = Page(page.render(result))
    headings = "".join(seen.text)
    for heading in (
        "Before and after",
        "What was cut",
        "How the search went",
        "Predicted and reached",
        "Cost by block",
        "Speed",
        "Recovery",
        "Predictions",
        "To go on",
    ):
        assert heading in headings


def test_a_search_is_plotted_with_its_budget_and_where_the_saving_came_from(result: dict[str, Any]) -> None:
    seen = Page(page.render(result))
    said = "".join(seen.text)
    assert "MACs of the search ends at 50.0 %; budget ends at 50.0 %" in said
    assert "1.50 times as fast" in said
    assert "75.0 % by widths, 25.0 % by skipping; the last step cut 1.2 %" in said
    assert "block 3 mlp ends at 98.0 %" in said
    assert "block 1 head 1 ends at" in said
    assert "heads ends at 2" in said  # the mean of the dual variables of two blocks
    result["search"]["saving"]["macs"]["before"] = 0.125
    assert "by skipping, 12.5 % before the search began" in "".join(Page(page.render(result)).text)
    result["search"]["history"] = result["search"]["history"][:1]
    text = page.render(result)  # too short to draw, not to say
    assert "How the search went" in text
    assert "search-macs" not in text
    del result["search"]
    assert "How the search went" not in page.render(result)


def test_a_plan_shows_what_it_expected_beside_what_it_reached(result: dict[str, Any]) -> None:
    said = "".join(Page(page.render(result)).text)
    assert "stream of 24 of 32 channels" in said
    assert "1 token steps" in said
    assert said.count("taken") == 1
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


@pytest.mark.parametrize(
    ("gap", "said"),
    [
        ({"points": -1.5, "low": -2.5, "high": -0.5}, "1.5 points of accuracy lost"),
        ({"points": 1.5, "low": 0.5, "high": 2.5}, "1.5 points of accuracy gained"),
        ({"points": -0.2, "low": -0.9, "high": 0.4}, "no difference in accuracy seen"),
    ],
)
def test_the_headline_claims_no_more_than_the_interval_shows(
    result: dict[str, Any], gap: dict[str, float], said: str
) -> None:
    assert said in page.headline({**result, "difference": {**gap, "count": 1200}})


def test_a_model_that_is_not_faster_is_not_called_faster(result: dict[str, Any]) -> None:
    gain = {**result["timing"]["speedups"][0], "low": 0.97, "measured": 1.02}
    said = page.headline({**result, "timing": {**result["timing"], "speedups": [gain]}})
    assert "no speed-up seen at batch 1" in said


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
        "search",
        "prediction",
    ],
)
def test_a_part_that_was_left_out_leaves_a_whole_page(result: dict[str, Any], part: str) -> None:
    metrics = {**result["metrics"], "recovered": None} if part == "recovery" else result["metrics"]
    headings = {  # what goes with the part; the other parts have none of their own
        "timing": "Speed: ideal and measured",
        "recovery": "training steps",
        "samples": "Drawn <at random>",
        "commands": "To go on",
        "search": "How the search went",
        "prediction": "Predicted and reached",
    }
    whole, less = (Page(page.render({**result, **change})) for change in ({}, {part: None, "metrics": metrics}))
    said = ["".join(seen.text) for seen in (whole, less)]
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
    [(None, "no summary.json"), ("{", "damaged"), ("[]", "no JSON object"), ('{"schema": 9}', "schema 9")],
)
def test_a_folder_without_a_whole_run_is_refused(tmp_path: Path, content: str | None, said: str) -> None:
    if content is not None:
        (tmp_path / "summary.json").write_text(content, encoding="utf-8")
    with pytest.raises(ArtifactError, match=said):
        reporting.write(tmp_path, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.6512, 0.6533), (3, 3), (0, 0), (-5, 17)])
def test_ticks_enclose_their_range(low: float, high: float) -> None:
    ticks = charts.nice_ticks(low, high)
    assert ticks[0] <= low <= high <= ticks[-1]
    assert 2 <= len(ticks) <= 8
    assert ticks == sorted(set(ticks))


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.0, 0.0149), (0.6512, 0.6533), (0, 3e-5), (1200, 4700)])
@pytest.mark.parametrize("kind", [charts.number_tick, charts.percent_tick])
def test_ticks_are_told_apart(low: float, high: float, kind: Any) -> None:
    ticks = charts.nice_ticks(low, high)
    words = [kind(ticks)(tick) for tick in ticks]
    assert len(set(words)) == len(ticks)
    values = [float(word.removesuffix(" %").replace(",", "")) for word in words]
    assert values == pytest.approx([tick * (100 if words[0].endswith("%") else 1) for tick in ticks])


def test_smoothing_keeps_the_last_step_and_the_range() -> None:
    points = [(float(step), float(step % 7)) for step in range(1, 1000)]
    means = charts.smooth(points)
    assert len(means) <= 160
    assert means[-1][0] == 999
    assert all(0 <= value <= 6 for _, value in means)


@pytest.mark.parametrize(
    ("value", "said"), [(1_205_898, "1.21 M"), (83_600_000, "83.6 M"), (4_598_882_304, "4.60 G"), (12, "12")]
)
def test_counts_are_short(value: int, said: str) -> None:
    assert figures.count(value) == said
