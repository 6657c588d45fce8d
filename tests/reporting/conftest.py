"""A made-up result of a made-up method, with everything that a page can show."""

from typing import Any

import pytest

from vitrim import counting
from vitrim.result import Axis, Column, Curve, Section, Series, Table
from vitrim.spec import AttentionSpec, BlockSpec, MlpSpec, ModelSpec, Output, Position, Prefix
from vitrim.timing import quartiles, speedups

PIXEL = "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="

SECTIONS: tuple[Section, ...] = (
    Curve(
        title="How it <went>",
        lead="It took & <gave>.",
        caption="Weight of a <thought>",
        x=Axis(label="turn", format="whole"),
        y=Axis(label="<kg>", format="percent"),
        series=(
            Series(name="<one>", points=((20, 0.75), (40, 0.5))),
            Series(name="two", points=((20, 0.25), (40, 0.125)), style="marked"),
            Series(name="aim", points=((0, 0.5), (40, 0.5)), style="dashed", named=True),
        ),
    ),
    Table(
        title="How it <went>",
        caption="What of it stayed",
        columns=(
            Column(heading="<thing>"),
            Column(heading="part", format="percent"),
            Column(heading="number", format="count"),
            Column(heading=""),
        ),
        rows=(("<first>", 0.25, 1_200_000, "<taken>"), ("second", None, 7, "")),
    ),
    Table(title="Another", columns=(Column(heading="gap", format="signed"),), rows=((-1.5,),)),
)


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
    return whole_result()


def whole_result() -> dict[str, Any]:
    """What a run found, with every part that a page shows."""
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
        "sections": [section.to_dict() for section in SECTIONS],
        "warnings": ["It may <b>not</b> pay."],
        "seconds": {"plan": 0.5, "compress": 100.0},
        "provenance": {"source": "timm:<x>"},
        "commands": [{"does": "Use <it>", "command": 'vitrim.load("<small>")'}],
    }
