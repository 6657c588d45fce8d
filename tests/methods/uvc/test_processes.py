"""UVC on two processes: every rank takes the same decisions, and the weights stay one network."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.training.kit import on_two_processes
from vitrim.counting import cost

TWO = """
import os, sys, torch
from pathlib import Path
torch.set_num_threads(1)
from tests.methods.uvc.kit import WIDE, quick
from tests.training.kit import pictures, tiny, weights
from vitrim.budget import Budget
from vitrim.methods.uvc import compress
from vitrim.spec import to_json
rank, out = os.environ["RANK"], Path(sys.argv[1])
seen = []
def watch(stage, done, total, **facts):
    seen.append(done)
for name, options in (("block", {"warmup": 0.1}), ("halves", {"gates": "halves", "tie_qk": True, "accumulate": 2})):
    config = quick(Budget(keep_macs=0.4), steps=12, world_size=2, checkpoint_seconds=0, **options)
    found = compress(tiny(WIDE), config, data=pictures(), folder=out / name, progress=watch)
    trace = torch.tensor(found.report["search"]["trace"], dtype=torch.float64)
    torch.save({"spec": to_json(found.spec), "weights": weights(found.model), "trace": trace,
                "selection": str(found.selection)}, out / f"{name}-{rank}.pt")
assert bool(seen) == (rank == "0")
"""


@pytest.mark.slow
def test_both_ranks_decide_alike_and_hold_one_network(tmp_path: Path) -> None:
    on_two_processes(TWO, tmp_path)
    from tests.methods.uvc.kit import WIDE
    from vitrim.spec import from_json

    for name in ("block", "halves"):
        first, second = (torch.load(tmp_path / f"{name}-{rank}.pt", weights_only=True) for rank in (0, 1))
        assert first["spec"] == second["spec"]
        assert first["selection"] == second["selection"]
        assert torch.equal(first["trace"], second["trace"])
        assert torch.equal(first["weights"], second["weights"])
        assert cost(from_json(first["spec"])).macs <= 0.4 * cost(WIDE).macs
        assert (tmp_path / name / "metrics.jsonl").is_file()
