"""One plan over all axes on a real encoder, against single methods and peers: DINOv2-small on street photographs.

    python benchmarks/real.py --model PATH/TO/dinov2-small --data PATH/TO/camvid --enlarged PATH/TO/cifar10 --recover

About an hour on two cores. Fitting photographs come from DATA's training split; lattice depths are chosen on its validation
split; all of its test split is scored, and nothing is chosen there. Each way at each number of images runs in a process of its own;
all are timed together at the end, when nothing else runs. Rows are kept as they come: a stopped run goes on with `--resume`.
Torch-Pruning is found where it is installed (`pip install --no-deps --target FOLDER torch-pruning`, then PYTHONPATH=FOLDER); else its row says so.
Writes benchmarks/results/real-dinov2-small.jsonl and docs/benchmarks/real-dinov2-small.md; `--table` only the latter.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import oneshot
import photographs
import protocol
import pruned
import realpage
import torch
from torch import Tensor, nn

import vitrim
from vitrim import methods, surgery
from vitrim.counting import cost
from vitrim.data import Images
from vitrim.errors import BudgetError, VitrimError
from vitrim.model import Vit
from vitrim.pipeline import RecoverConfig
from vitrim.sources.timm import to_module
from vitrim.spec import BlockSpec, Merge, ModelSpec, Similarity, token_walk
from vitrim.training import fit
from vitrim.training.objective import Batch, Step
from vitrim.training.objectives import LabelFree

PLACE = protocol.RESULTS / "real-dinov2-small.jsonl"
WIDTHS = ("qk", "vo", "mlp", "attention", "block")
"""All axes of `auto` but tokens; where the tokens are the product there is no exact tail and no narrower stream."""
RECOVERED = {"auto": (0.65, 0.5), "comcat-whitened": (0.65, 0.5), "similarity": (0.65, 0.5)}
BATCH = 4
"""Photographs of a step of recovery."""
DOMAIN = (0.65, 0.5)
LR = 3e-6
"""Of recovery, chosen on validation photographs: ten steps improve a network there, and leave the dense control at a cosine of 0.999.
At 1e-5 they harm both, and at the library's own 1e-4 four steps take 0.28 from the control, from bf16's rounding alone."""
JUDGES = 8
"""Validation photographs on which the depths of lattice merges are compared."""
NEAR = 0.03
"""How far below a share the depths of lattice merges that are compared may end."""
KEY = ("row", "fitting", "images", "keep", "steps")
"""What tells rows apart. fitting: where the images came from. steps: of recovery, 0 before it."""


@dataclass(frozen=True)
class Setting:
    """What every process is told. test: photographs scored, None: all."""

    model: Path
    data: str
    enlarged: str | None
    test: int | None
    networks: Path
    threads: int
    steps: int


@dataclass(frozen=True)
class Job:
    """What one process makes: a way at one number of fitting images (0: it needs none), or a recovery of its network."""

    row: str
    fitting: str
    images: int
    keeps: tuple[float, ...]
    steps: int = 0

    def key(self, keep: float) -> dict[str, Any]:
        return {**{name: getattr(self, name) for name in KEY if name != "keep"}, "keep": keep}


def network(setting: Setting, key: dict[str, Any]) -> Path:
    """Where a row's network is kept for timing and recovery."""
    return setting.networks / "-".join(str(key[name]) for name in KEY)


class Bench:
    """What a way works with.  count: of fitting images."""

    def __init__(self, setting: Setting, job: Job) -> None:
        torch.set_num_threads(setting.threads)
        self.setting, self.job = setting, job
        self.dense = photographs.dense_model(setting.model)
        self.decoder = photographs.decoder(setting.model)
        self.whole = cost(self.dense).macs

    @cached_property
    def fitting(self) -> Images:
        source = {"photographs": self.setting.data, "enlarged": self.setting.enlarged}[self.job.fitting]
        return photographs.prepared(photographs.photographs(source, "train", self.job.images))

    def batches(self, size: int) -> Iterator[Tensor]:
        """The fitting images as the model takes them."""
        return photographs.Fidelity(self.dense, self.decoder, self.fitting, batch_size=size).batches()

    def fidelity(self, split: str, count: int | None) -> photographs.Fidelity:
        found = photographs.photographs(self.setting.data, split, count)
        held = self.setting.networks / f"{self.setting.model.name}-{found.fingerprint()['sha256'][:16]}.pt"
        held.parent.mkdir(parents=True, exist_ok=True)
        return photographs.Fidelity(self.dense, self.decoder, photographs.prepared(found), held=held)


Made = Vit | VitrimError
Way = Callable[[Bench, Sequence[float]], list[Made]]
"""A network, or why there is none, for each share of the MACs."""

# ------------------------------------------------------------------------------------------------------------------ ways


def by_method(name: str, **settings: Any) -> Way:
    """A method of vitrim, which scores once for all shares."""

    def make(bench: Bench, keeps: Sequence[float]) -> list[Made]:
        config = methods.configure(
            name, {"images": bench.job.images, "budget": vitrim.Budget(keep_macs=1.0), **settings}
        )
        budgets = [vitrim.Budget(keep_macs=keep) for keep in keeps]
        refused: dict[int, VitrimError] = {}
        for n, budget in enumerate(budgets):
            try:
                methods.plan(name, bench.dense.spec, replace(config, budget=budget))
            except BudgetError as error:
                refused[n] = error
        asked = [budget for n, budget in enumerate(budgets) if n not in refused]
        found = iter(methods.compress_family(bench.dense, config, asked, data=bench.fitting) if asked else ())
        return [refused[n] if n in refused else next(found).model for n in range(len(budgets))]

    return make


def each(make: Callable[[Bench], Callable[[int], Vit]]) -> Way:
    """A way that looks at the images once and then makes networks of so many MACs."""

    def all_of(bench: Bench, keeps: Sequence[float]) -> list[Made]:
        one, found = make(bench), []
        for keep in keeps:
            try:
                found.append(one(int(keep * bench.whole)))
            except VitrimError as error:
                found.append(error)
        return found

    return all_of


def by_magnitude(bench: Bench) -> Callable[[int], Vit]:
    base = surgery.fold_layer_scale(bench.dense)
    return lambda limit: pruned.nearest(lambda share: pruned.by_magnitude(base, share), limit)


def by_torch_pruning(bench: Bench) -> Callable[[int], Vit]:
    """Its Taylor scores need a loss; without labels it is the curvature's (`oneshot.signed_tokens`)."""
    if find_spec("torch_pruning") is None:
        raise VitrimError("Torch-Pruning is not installed here.")
    module: Any = to_module(bench.dense)
    generator = torch.Generator().manual_seed(0)
    for x in bench.batches(8):
        oneshot.signed_tokens(module.forward_features(x), generator).backward()
    found = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    first = next(bench.batches(1))
    return lambda limit: pruned.torch_pruning(bench.dense, first, None, limit, gradients=found)


def by_similarity(bench: Bench) -> Callable[[int], Vit]:
    """The same number merges in every block, by the cosine of the stream; nothing is fitted."""

    def spec_of(rate: float) -> ModelSpec:
        spec, left, blocks = bench.dense.spec, token_walk(bench.dense.spec)[0].enter.patches, []
        for i, block in enumerate(spec.blocks):
            removed = min(round(rate * (i + 1)) - round(rate * i), left // 2)
            left -= removed
            step = (Similarity(at="mid", keep=left, proportional=True),) if removed else ()
            blocks.append(replace(block, steps=step))
        return replace(spec, blocks=tuple(blocks), restore=True)

    def make(limit: int) -> Vit:
        low, high = 0.0, float(token_walk(bench.dense.spec)[0].enter.patches)
        if cost(spec_of(high)).macs > limit:
            raise BudgetError(f"merging half of the tokens in every block leaves {cost(spec_of(high)).macs:,} MACs.")
        for _ in range(20):
            middle = (low + high) / 2
            low, high = (low, middle) if cost(spec_of(middle)).macs <= limit else (middle, high)
        return surgery.with_spec(bench.dense, spec_of(high), bench.dense.state_dict())

    return make


def by_lattice(bench: Bench) -> Callable[[int], Vit]:
    """Columns halved behind one block and rows behind another, no earlier one; of depths that meet the budget the best on validation."""
    judge = bench.fidelity("validation", min(JUDGES, bench.setting.test or JUDGES))
    spec = bench.dense.spec
    rows, cols = spec.grid

    def spec_of(first: int, second: int) -> ModelSpec:
        def block_of(i: int, block: BlockSpec) -> BlockSpec:
            steps = [Merge(at="end", axis="h", keep=-(-cols // 2), proportional=True)] if i == first else []
            steps += [Merge(at="end", axis="v", keep=-(-rows // 2), proportional=True)] if i == second else []
            return replace(block, steps=tuple(steps))

        return replace(spec, blocks=tuple(block_of(i, b) for i, b in enumerate(spec.blocks)), restore=True)

    inner = range(len(spec.blocks) - 1)
    specs = [spec_of(first, second) for first in inner for second in (*inner, -1) if second == -1 or second >= first]

    def make(limit: int) -> Vit:
        within = [one for one in specs if cost(one).macs <= limit]
        if not within:
            raise BudgetError(
                f"halving both sides behind the first block leaves {min(cost(s).macs for s in specs):,} MACs."
            )
        near = [one for one in within if cost(one).macs >= limit - NEAR * bench.whole]
        near = near or [max(within, key=lambda one: cost(one).macs)]
        models = [surgery.with_spec(bench.dense, one, bench.dense.state_dict()) for one in near]
        return max(models, key=lambda model: judge.score(model)["cosine"])

    return make


FITTED: dict[str, Way] = {
    "auto": by_method("auto"),
    "auto-without-tokens": by_method("auto", axes=WIDTHS),
    "auto-tokens-alone": by_method("auto", axes=("tokens",)),
    "dcvit-closed": by_method("dcvit"),
    "comcat-whitened": by_method("comcat"),
    "comcat-svd": by_method("comcat", variant="svd"),
    "corp": each(lambda bench: oneshot.corp(bench.dense, bench.batches(8))),
    "snapvit": each(lambda bench: oneshot.snapvit(bench.dense, bench.batches)),
    "torch-pruning": each(by_torch_pruning),
}
UNFITTED: dict[str, Way] = {
    "magnitude": each(by_magnitude),
    "lattice": each(by_lattice),
    "similarity": each(by_similarity),
}
WAYS = FITTED | UNFITTED

# ------------------------------------------------------------------------------------------------------------- processes


def made(setting: Setting, job: Job) -> list[dict[str, Any]]:
    """The rows of a job: each network made, saved, and scored; memory is the process's peak before anything is scored."""
    bench = Bench(setting, job)
    if job.images:
        _ = bench.fitting  # decoding is no part of a method's seconds
    load, began, spent = os.getloadavg()[0], time.monotonic(), time.process_time()
    try:
        networks = WAYS[job.row](bench, job.keeps)
    except VitrimError as error:
        networks = [error] * len(job.keeps)
    facts = {
        "family_s": time.monotonic() - began,
        "family_cpu_s": time.process_time() - spent,
        "family": len(job.keeps),
        "peak_mb": peak_mb(),
    }
    judge = bench.fidelity("test", setting.test)
    rows = []
    for keep, model in zip(job.keeps, networks, strict=True):
        key = job.key(keep)
        if isinstance(model, VitrimError):
            rows.append({**key, "refused": str(model), **told(bench, judge, load)})
            continue
        vitrim.save(model, network(setting, key), force=True)
        left = [walked.leave.count for walked in token_walk(model.spec)]
        own = {"width": model.spec.width, "tokens": left, **protocol.described(model, bench.dense)}
        rows.append({**key, **facts, **judge.score(model), **own, **told(bench, judge, load)})
    return rows


def told(bench: Bench, judge: photographs.Fidelity, load: float) -> dict[str, Any]:
    """What a row is to be read with.  load: before the work began."""
    job, setting = bench.job, bench.setting
    tested = photographs.photographs(setting.data, "test", setting.test)
    source = {"photographs": setting.data, "enlarged": setting.enlarged}.get(job.fitting)
    fitted = None if source is None else photographs.photographs(source, "train", job.images or None)
    facts = protocol.conditions() | {"load": load}
    if job.row == "torch-pruning" and find_spec("torch_pruning") is not None:
        facts["versions"] |= {"torch-pruning": version("torch-pruning")}
    return {
        "model": setting.model.name,
        "data": None if fitted is None else fitted.fingerprint(),
        "test": tested.fingerprint(),
        "test_images": len(judge.images),
        **facts,
    }


def peak_mb() -> float:
    """The largest resident memory of this process so far, in MB (10**6 bytes): what `getrusage` says counts its parent's too."""
    line = next(line for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines() if "VmHWM" in line)
    return int(line.split()[1]) * 1024 / 1e6


class Mapped(LabelFree):
    """The dense model's tokens and its saliency map, each as a share of its mean square."""

    def __init__(self, teacher: Vit, decoder: nn.Module) -> None:
        super().__init__(teacher, taps=("tokens",))
        self.decoder = decoder

    def loss(self, model: nn.Module, batch: Batch, step: Step) -> Tensor:
        ours, theirs = (found["tokens"] for found in (model(batch.images, want=("tokens",)), self.ask(batch.images)))
        pairs = {
            "token_loss": (ours, theirs),
            "map_loss": (self.decoder.of_tokens(ours), self.decoder.of_tokens(theirs)),
        }
        losses = {name: (a - b).square().mean() / b.square().mean() for name, (a, b) in pairs.items()}
        self.parts = {name: loss.detach() for name, loss in losses.items()}
        return torch.stack(list(losses.values())).sum()


def recovered(setting: Setting, job: Job) -> list[dict[str, Any]]:
    """The same after some steps on all training photographs; the dense model is the control."""
    bench = Bench(setting, job)
    images = photographs.prepared(photographs.photographs(setting.data, "train"))
    config = RecoverConfig(
        steps=job.steps,
        batch_size=BATCH,
        amp="bf16",
        device="cpu",
        augment=vitrim.data.Augment(crop="none"),
        log_every=10,
        lr=LR,
    )
    judge = bench.fidelity("test", setting.test)
    rows = []
    for keep in job.keeps:
        key = job.key(keep)
        small = surgery.copy(bench.dense) if job.row == "dense" else vitrim.load(network(setting, {**key, "steps": 0}))
        load, began = os.getloadavg()[0], time.monotonic()
        done = fit(small, Mapped(bench.dense, bench.decoder), images, config)
        spent = time.monotonic() - began
        losses = [line["loss"] for line in done.history if line["kind"] == "train"]
        facts = {"recovery_s": spent, "lr": config.lr, "batch": BATCH, "first_loss": losses[0], "last_loss": losses[-1]}
        own = protocol.described(done.model, bench.dense)
        rows.append({**key, **facts, **judge.score(done.model), **own, **told(bench, judge, load)})
    return rows


# ------------------------------------------------------------------------------------------------------------------- run


class Run:
    """All rows, each kept when its process is done."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.setting = Setting(
            model=options.model,
            data=options.data,
            enlarged=options.enlarged,
            test=options.test,
            networks=options.networks,
            threads=options.threads,
            steps=options.steps,
        )
        there = protocol.read(options.out) if options.resume and options.out.is_file() else []
        self.rows = [row for row in there if self.usable(row)]
        self.failed: list[str] = []

    def usable(self, row: dict[str, Any]) -> bool:
        """Whether a row that is there is whole, or can be made so: its network is kept, where that is still to be timed."""
        kept = row["steps"] or "refused" in row or "speed" in row or network(self.setting, row).is_dir()
        return bool(kept or not self.timed(row))

    def timed(self, row: dict[str, Any]) -> bool:
        """Whether this row is timed: of several numbers of images the most, since shapes are nearly the same."""
        alone = not row["steps"] and row["fitting"] != "enlarged" and "refused" not in row
        return alone and row["images"] in (0, max(self.options.images))

    def lacking(self, jobs: list[Job]) -> list[Job]:
        """Those with what is not there yet."""
        there = {tuple(row[name] for name in KEY) for row in self.rows}
        left = []
        for job in jobs:
            keeps = tuple(k for k in job.keeps if tuple(job.key(k)[name] for name in KEY) not in there)
            left += [replace(job, keeps=keeps)] if keeps else []
        return left

    def all(self) -> None:
        """Cut, then time while nothing else runs, then recover."""
        options, most = self.options, max(self.options.images)
        jobs = [
            Job(row, "photographs", count, options.keep)
            for count in sorted(options.images, reverse=True)
            for row in FITTED
            if row in options.rows
        ]
        if options.enlarged and "auto" in options.rows:
            few = min(options.images)
            jobs.append(Job("auto", "enlarged", few, tuple(k for k in DOMAIN if k in options.keep)))
        jobs += [Job(row, "", 0, options.keep) for row in UNFITTED if row in options.rows]
        self.run(made, self.lacking(jobs))
        self.time()
        if options.recover:
            self.run(recovered, self.lacking(self.recoveries(most)))
        if self.failed:
            raise SystemExit("failed: " + "; ".join(self.failed))

    def recoveries(self, most: int) -> list[Job]:
        jobs = [Job("dense", "", 0, (1.0,), self.setting.steps)]
        for row, shares in RECOVERED.items():
            fitting, count = ("photographs", most) if row in FITTED else ("", 0)
            for share in shares:
                key = Job(row, fitting, count, (share,)).key(share)
                if network(self.setting, key).is_dir():
                    jobs.append(Job(row, fitting, count, (share,), self.setting.steps))
                elif row in self.options.rows and share in self.options.keep:
                    self.failed.append(f"{row} at {share} has no network to recover")
        return jobs

    def run(self, function: Callable[[Setting, Job], list[dict[str, Any]]], jobs: list[Job]) -> None:
        """Each job in a process of its own, some at a time."""

        def alone(job: Job) -> list[dict[str, Any]]:
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
                return process.submit(function, self.setting, job).result()

        with ThreadPoolExecutor(self.options.jobs) as pool:
            futures = {pool.submit(alone, job): job for job in jobs}
            for future in as_completed(futures):
                job = futures[future]
                try:
                    for row in future.result():
                        self.keep(row)
                except Exception as error:  # the other rows are made all the same; the run ends with this
                    self.failed.append(f"{job.row} with {job.images} images: {type(error).__name__}: {error}")
                    protocol.say(self.failed[-1])

    def time(self) -> None:
        """All networks of a share in turns with the dense one, on one thread."""
        torch.set_num_threads(1)
        dense = photographs.dense_model(self.options.model)
        for share in self.options.keep:
            rows = [row for row in self.rows if row["keep"] == share and self.timed(row) and "speed" not in row]
            if not rows:
                continue
            load = os.getloadavg()[0]
            models = {row["row"]: vitrim.load(network(self.setting, row)) for row in rows}
            gains = protocol.latency({"dense": dense, **models}, batches=(1, 8), runs=self.options.runs)
            for row in rows:
                speed = [gain for gain in gains if gain["model"] == row["row"]]
                self.keep({**row, "speed": speed, "speed_load": load})

    def keep(self, row: dict[str, Any]) -> None:
        key = {name: row[name] for name in KEY}
        place = next((n for n, other in enumerate(self.rows) if key.items() <= other.items()), len(self.rows))
        self.rows[place : place + 1] = [row]
        protocol.write(self.options.out, self.rows)
        said = "refused" if "refused" in row else f"cosine {row['cosine']:.4f}, map {row['map_iou']:.3f}"
        timed = f", {row['speed'][-1]['measured']:.2f} times at batch 8" if "speed" in row else ""
        spent = row.get("recovery_s", row.get("family_s", 0.0))
        protocol.say(
            f"{row['row']:>20} {row['images']:>4} images, keep {row['keep']:.2f}: {said}{timed} ({spent:.0f} s)"
        )


def main() -> None:
    def numbers(kind: type) -> Callable[[str], tuple[Any, ...]]:
        return lambda text: tuple(kind(part) for part in text.split(","))

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a folder with backbone/ and decoder.safetensors")
    parser.add_argument("--data", help="CamVid as a folder of Parquet files")
    parser.add_argument("--enlarged", help="CIFAR-10 as a folder of Parquet files: fitting images of another domain")
    parser.add_argument("--images", type=numbers(int), default=(64, 256), help="numbers of fitting images")
    parser.add_argument("--keep", type=numbers(float), default=(0.8, 0.65, 0.5, 0.35), help="shares of the MACs")
    parser.add_argument("--rows", type=numbers(str), default=tuple(WAYS), help=f"of {', '.join(WAYS)}; default all")
    parser.add_argument("--recover", action="store_true", help="train at some shares, without labels")
    parser.add_argument("--steps", type=int, default=300, help="of recovery")
    parser.add_argument("--test", type=int, help="score so many test photographs; default all")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--runs", type=int, default=10, help="samples of each network's time")
    parser.add_argument(
        "--networks", type=Path, default=Path(tempfile.gettempdir()) / "vitrim-real", help="where they are kept"
    )
    parser.add_argument("--out", type=Path, default=PLACE, help="the file of rows")
    parser.add_argument("--resume", action="store_true", help="keep the rows that are there")
    parser.add_argument("--table", action="store_true", help="only make the page from the rows that are there")
    options = parser.parse_args()
    if unknown := sorted({*options.rows} - {*WAYS}):
        parser.error(f"unknown rows: {', '.join(unknown)}; known: {', '.join(WAYS)}")
    if not options.table:
        if options.model is None or options.data is None:
            parser.error("--model and --data are needed, but for --table")
        Run(options).all()
    text = realpage.page(protocol.read(options.out))
    if options.out == PLACE:
        protocol.publish(PLACE.stem, text)
    else:
        print(text)


if __name__ == "__main__":
    main()
