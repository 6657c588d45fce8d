"""Golden networks: what every method made of two tiny networks before the package was rearranged.

`python -m tests.golden.cases` writes `networks.json` anew; that is right only where a change of results is meant, and the
changelog then says so. Weights are compared bit for bit on a processor and a torch that are those of the file, and tensor by
tensor to `TOLERANCE` elsewhere: kernels differ in their last bits, and factors in their signs.
"""

from __future__ import annotations

import hashlib
import json
import platform
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tests.specs import make, vit
from vitrim import methods
from vitrim.budget import Budget
from vitrim.counting import cost
from vitrim.model import Vit
from vitrim.result import Compressed
from vitrim.spec import BlockSpec, Merge, ModelSpec, Pool, Preprocess, Similarity, spec_hash

FILE = Path(__file__).with_name("networks.json")
TOLERANCE = 2e-3
"""Of a tensor's norm, where kernels are not those of the file."""


def plain_spec() -> ModelSpec:
    """A classifier that reads its class token, with LayerScale."""
    spec = vit(blocks=3, width=32, heads=2, head_dim=16, hidden=64)
    return replace(spec, blocks=tuple(_scaled(block) for block in spec.blocks))


def mixed_spec() -> ModelSpec:
    """Registers, mean pooling, token steps, a gated MLP, norms between queries and keys, a block without attention."""
    spec = vit(blocks=5, width=32, heads=4, head_dim=8, hidden=48, prefix=("cls", "reg", "reg"), pool=Pool(kind="mean"))
    first, second, third, fourth, last = spec.blocks
    assert second.mlp is not None
    assert third.attention is not None
    blocks = (
        _scaled(first),
        replace(second, mlp=replace(second.mlp, kind="swiglu"), steps=(Merge(at="end", axis="h", keep=3),)),
        replace(
            third, attention=replace(third.attention, qk_norm="layer"), steps=(Similarity(keep=9, proportional=True),)
        ),
        replace(fourth, attention=None),
        last,
    )
    return replace(spec, blocks=blocks)


def _scaled(block: BlockSpec) -> BlockSpec:
    assert block.attention is not None
    assert block.mlp is not None
    return replace(
        block, attention=replace(block.attention, layer_scale=True), mlp=replace(block.mlp, layer_scale=True)
    )


SPECS = {"plain": plain_spec, "mixed": mixed_spec}
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "auto": ("auto", {"images": 8, "batch_size": 4, "builds": 2}),
    "auto-measured": ("auto", {"images": 8, "batch_size": 4, "builds": 1, "score": "measured", "exact_tail": False}),
    "comcat-whitened": ("comcat", {"images": 6, "probe_images": 2, "batch_size": 4}),
    "comcat-svd": ("comcat", {"variant": "svd", "images": 6, "probe_images": 2, "batch_size": 4, "align": 2}),
    "dcvit-closed": ("dcvit", {"images": 8, "probe_images": 2, "batch_size": 4}),
    "dcvit-handed": ("dcvit", {"images": 8, "probe_images": 4, "batch_size": 4, "hand_over": True, "weighted": False}),
    "dcvit-finetune": (
        "dcvit",
        {"variant": "finetune", "images": 8, "batch_size": 4, "steps": 2, "metric_images": 4, "metric_steps": 3},
    ),
    "uvc-clean": ("uvc", {"steps": 12, "batch_size": 4, "device": "cpu", "align": 4}),
    "uvc-tied": ("uvc", {"steps": 12, "batch_size": 4, "device": "cpu", "tie_qk": True, "gates": "halves"}),
    "uvc-paper": ("uvc", {"preset": "paper", "steps": 12, "batch_size": 4, "device": "cpu", "count_per_head": True}),
}
BUDGETS = {
    "macs": {"keep_macs": 0.55},
    "both": {"keep_macs": 0.75, "keep_params": 0.6},
    "gentle": {"keep_macs": 0.71},
    "gentle both": {"keep_macs": 0.72, "keep_params": 0.78},
}
BYTES = ("auto", "comcat-whitened", "dcvit-closed", "uvc-clean")
"""Settings that meet limits on memory and file too."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One network to make."""

    setting: str
    spec: str
    budget: str

    @property
    def name(self) -> str:
        return f"{self.setting}, {self.spec}, {self.budget}"


def cases() -> list[Case]:
    """All of them; `finetune` can lose the blocks in the middle alone, so its budgets are gentle."""
    found = []
    for setting in SETTINGS:
        names = ("gentle", "gentle both") if setting == "dcvit-finetune" else ("macs", "both")
        for spec in SPECS:
            for budget in (*names, *(("bytes",) if setting in BYTES else ())):
                found.append(Case(setting=setting, spec=spec, budget=budget))
    return found


def budget_of(case: Case, spec: ModelSpec) -> Budget:
    if case.budget != "bytes":
        return Budget(**BUDGETS[case.budget])
    whole = cost(spec)
    return Budget(max_memory_mb=0.8 * whole.memory_bytes / 1e6, max_file_mb=0.75 * whole.file_bytes / 1e6)


def config_of(case: Case) -> Any:
    method, settings = SETTINGS[case.setting]
    return methods.configure(method, {"budget": budget_of(case, SPECS[case.spec]()), **settings})


def dense(spec: ModelSpec) -> Vit:
    """Random float32 weights, and how its images are normalised."""
    model = make(spec, dtype=torch.float32)
    how = Preprocess(mean=(0.5,) * 3, std=(0.25,) * 3, size_px=spec.image_px)
    model.config = replace(model.config, preprocess=how)
    return model


def made(case: Case) -> Compressed:
    """The network of a case, from 16 pictures with labels."""
    spec = SPECS[case.spec]()
    generator = torch.Generator().manual_seed(5)
    x = torch.randint(0, 256, (16, 3, *spec.image_px), generator=generator, dtype=torch.uint8)
    data = (x, torch.arange(16) % 5) if case.setting.startswith("uvc") else x
    return methods.compress(dense(spec), config_of(case), data=data)


def digest(model: Vit) -> str:
    """Of the bits of all weights."""
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        found.update(name.encode())
        found.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def norms(model: Vit) -> dict[str, float]:
    """Of each tensor."""
    return {name: float(f"{float(tensor.double().norm()):.5g}") for name, tensor in sorted(model.state_dict().items())}


def keys(value: Any) -> Any:
    """The names in a report, without what stands under them."""
    if isinstance(value, dict):
        return {str(name): keys(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [keys(value[0])] if value else []
    return None


def described(case: Case) -> dict[str, Any]:
    """What is kept of a case."""
    small = made(case)
    method, _ = SETTINGS[case.setting]
    planned = methods.plan(method, SPECS[case.spec](), config_of(case))
    return {
        "spec": spec_hash(small.spec),
        "macs": cost(small.spec).macs,
        "params": cost(small.spec).params,
        "weights": digest(small.model),
        "norms": norms(small.model),
        "selection": small.selection.to_dict(),
        "plan": json.loads(json.dumps(planned)),
        "report": keys(small.report),
        "history": keys(small.history),
    }


def machine() -> dict[str, str]:
    """What the last bits depend on."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        named = [line for line in info.read_text(encoding="utf-8").splitlines() if line.startswith("model name")]
        model = named[0].partition(":")[2].strip() if named else model
    return {
        "torch": str(torch.__version__),
        "processor": model,
        "kernels": torch.backends.cpu.get_cpu_capability(),
    }


def main() -> None:
    """Write the file."""
    torch.set_num_threads(1)
    found: dict[str, Any] = {"machine": machine(), "networks": {case.name: described(case) for case in cases()}}
    rows = [f"{json.dumps(name)}: {json.dumps(one, sort_keys=True)}" for name, one in found["networks"].items()]
    text = f'{{"machine": {json.dumps(found["machine"])}, "networks": {{\n' + ",\n".join(rows) + "\n}}\n"
    FILE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
