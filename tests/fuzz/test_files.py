"""Mutated headers, configs, specs, summaries and Parquet files: the same invariants."""

from __future__ import annotations

import json
import struct
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from tests.fuzz.arena import VALUES, Arena, damaged, examples, mutated
from tests.reporting.conftest import whole_result
from tests.sources.test_bounds import PLAIN, TIMM, VIT
from vitrim import methods, reporting
from vitrim.config import keys
from vitrim.pipeline import RecoverConfig
from vitrim.training import TrainConfig


def text_of(value: Any) -> bytes:
    return json.dumps(value).encode("utf-8", "surrogatepass")


WEIGHTS = save({"w": torch.zeros(250)})
READERS = (
    ("cost", "model"),
    ("predict", "model", "photos/cat/0.png"),
    ("predict", "model", "photos/cat/0.png", "--json"),
    ("evaluate", "model", "--data", "photos", "--limit", "2"),
    ("plan", "--model", "model", "--keep-macs", "0.9"),
)


@given(st.data(), st.sampled_from(READERS))
@examples(150)
def test_a_mutated_config_is_answered_or_refused(arena: Arena, data: st.DataObject, words: tuple[str, ...]) -> None:
    whole = json.loads((arena.root / "model/config.json").read_text())
    with arena.changed("model/config.json", text_of(data.draw(mutated(whole)))):
        arena.play(*words)


@given(st.data(), st.sampled_from(["config.json", "selection.json", "provenance.json"]))
@examples(60)
def test_damaged_json_beside_the_weights_is_answered_or_refused(arena: Arena, data: st.DataObject, name: str) -> None:
    whole = (arena.root / "model" / name).read_bytes()
    with arena.changed(f"model/{name}", data.draw(damaged(whole))):
        arena.play("predict", "model", "photos/cat/0.png")


@given(st.data())
@examples(80)
def test_a_mutated_header_is_refused(arena: Arena, data: st.DataObject) -> None:
    whole = (arena.root / "model/model.safetensors").read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    header = text_of(data.draw(mutated(json.loads(whole[8 : 8 + length]))))
    with arena.changed("model/model.safetensors", struct.pack("<Q", len(header)) + header + whole[8 + length :]):
        assert arena.play("predict", "model", "photos/cat/0.png").exit_code == 1


@given(st.data())
@examples(60)
def test_damaged_weights_are_refused(arena: Arena, data: st.DataObject) -> None:
    whole = (arena.root / "model/model.safetensors").read_bytes()
    changed = data.draw(damaged(whole, within=2000))
    with arena.changed("model/model.safetensors", changed):
        done = arena.play("predict", "model", "photos/cat/0.png")
        assert done.exit_code == (0 if changed == whole else 1)


@given(st.data())
@examples(150)
def test_a_forged_summary_gives_a_page_or_is_refused(arena: Arena, data: st.DataObject) -> None:
    finished = whole_result()
    shown = {key: finished[key] for key in ("samples", "samples_note")}
    whole = {key: value for key, value in finished.items() if key not in shown}
    summary = json.loads(reporting.as_text(whole))
    which = data.draw(st.sampled_from(["summary", "summary", "samples"]))
    if which == "summary":
        summary = data.draw(mutated(summary))
    else:
        shown = data.draw(mutated(shown))
    with arena.changed("model/summary.json", text_of(summary)), arena.changed("samples.json", text_of(shown)):
        (arena.root / "model/stages").mkdir(exist_ok=True)
        (arena.root / "samples.json").rename(arena.root / "model/stages/samples.json")
        try:
            arena.play("report", "model", "--out", "out.html", asked="out.html")
        finally:
            (arena.root / "model/stages/samples.json").rename(arena.root / "samples.json")
            (arena.root / "model/stages").rmdir()


SETTINGS = [(name, key) for name, method in methods.METHODS.items() for key in keys(method.config)]


@given(st.sampled_from(SETTINGS), VALUES)
@examples(120)
def test_any_value_of_any_setting_is_taken_or_refused(arena: Arena, at: tuple[str, str], value: Any) -> None:
    name, key = at
    config = {"method": name, "settings": {"budget": {"keep_macs": 0.9}} | {key: value}}
    words = ("--config", "c.json", "--model", "model", "--data", "nowhere", "--out", "out")
    with arena.changed("c.json", text_of(config)):
        arena.play("compress", *words, asked="out")


TRAINED = [("train", key) for key in keys(TrainConfig)] + [("recover", key) for key in keys(RecoverConfig)]


@given(st.sampled_from(TRAINED), VALUES)
@examples(100)
def test_any_value_in_a_training_config_is_taken_or_refused(arena: Arena, at: tuple[str, str], value: Any) -> None:
    verb, key = at
    model = ("--model", "model") if verb == "train" else ("model", "--objective", "supervised")
    with arena.changed("c.json", text_of({key: value})):
        arena.play(verb, *model, "--config", "c.json", "--data", "nowhere", "--out", "out", asked="out")


@given(st.data())
@examples(60)
def test_a_damaged_parquet_file_is_answered_or_refused(arena: Arena, data: st.DataObject) -> None:
    whole = (arena.root / "p.parquet").read_bytes()
    with arena.changed("p.parquet", data.draw(damaged(whole))):
        arena.play("evaluate", "model", "--data", "p.parquet", "--split", "all")


@given(st.data())
@examples(40)
def test_a_damaged_picture_is_answered_or_refused(arena: Arena, data: st.DataObject) -> None:
    whole = (arena.root / "photos/cat/0.png").read_bytes()
    with arena.changed("photos/cat/0.png", data.draw(damaged(whole))):
        arena.play("predict", "model", "photos/cat/0.png")
        arena.play("evaluate", "model", "--data", "photos", "--split", "all")


FOLDERS = {
    "hf": VIT | {"id2label": {"0": "a", "1": "b"}, "hidden_act": "gelu", "layer_norm_eps": 1e-12},
    "timm:local-dir": TIMM,
    "torchvision": {"kwargs": PLAIN, "labels": None, "preprocess": None},
}


@given(st.data(), st.sampled_from(sorted(FOLDERS)))
@examples(90)
def test_a_mutated_config_of_another_library_is_answered_or_refused(
    arena: Arena, data: st.DataObject, family: str
) -> None:
    """Beside a kilobyte of weights, so that nothing large is built whatever the config says."""
    config = data.draw(mutated(FOLDERS[family]))
    with arena.changed("theirs/config.json", text_of(config)), arena.changed("theirs/model.safetensors", WEIGHTS):
        arena.play("cost", f"{family}:theirs")
        arena.play("predict", f"{family}:theirs", "photos/cat/0.png")
    (arena.root / "theirs").rmdir()
