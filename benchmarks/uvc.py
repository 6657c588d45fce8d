"""UVC's learned widths and skipping against its parts left out, and against peers, after equal recovery.

    python benchmarks/uvc.py --data PATH/TO/cifar10          two CPU cores, about an hour and a half; ablations at one budget
    python benchmarks/uvc.py --data PATH/TO/cifar10 --short  half of all steps
    python benchmarks/uvc.py --data PATH/TO/cifar10 --full   the larger built-in model, on an accelerator
    python benchmarks/uvc.py --data PATH/TO/cifar10 --resume --recipe FOLDER   afterwards: each size by the built-in model's own recipe,
        on all of --data's training images, from random weights, UVC's and auto's; 15 to 45 minutes each on a core, kept in FOLDER

Search, recovery and calibration use the built-in sample (with --full: --data's training split). Test rows are all of --data's.
Needs the extra `bench` (Torch-Pruning). Writes benchmarks/results/uvc-MODEL.jsonl and docs/benchmarks/uvc-MODEL.md; `--table` only
the latter. Rows are kept as they come: a stopped run goes on with `--resume`. `--keep 0.25` makes the rows of that budget alone.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import protocol
import pruned

import vitrim
from vitrim import data as opened
from vitrim import recipes
from vitrim.config import read
from vitrim.counting import cost
from vitrim.model import Vit
from vitrim.pipeline import RecoverConfig
from vitrim.spec import spec_hash
from vitrim.training import TrainConfig
from vitrim.training.objectives import train

STEP = "a search step against a plain distilled step"
STEP_AIM = 1.3
CONTROL = "control (dense, same recovery)"
RECIPE = "from scratch, UVC's shape, full recipe"
RECIPE_AFTER = "UVC's network, full recipe"
RECIPE_AUTO = "auto's network, full recipe"
RECIPE_CONTROL = "dense, full recipe once more"
RECIPES = {RECIPE: "scratch", RECIPE_AFTER: "uvc", RECIPE_AUTO: "auto", RECIPE_CONTROL: "dense"}
"""Rows that the built-in model's recipe trains, and the names of their folders."""
IN_FULL = {
    RECIPE: "from random weights in UVC's shape",
    RECIPE_AFTER: "from UVC's own weights",
    RECIPE_AUTO: "from auto's network",
    RECIPE_CONTROL: "for the dense model trained once more",
}
RIVALS = {
    CONTROL: "the control",
    "Torch-Pruning (group Taylor)": "Torch-Pruning",
    "Torch-Pruning, whole heads": "Torch-Pruning with whole heads",
    "from scratch, UVC's shape, same steps": "its shape from scratch",
    RECIPE: "its shape from scratch by the recipe in full",
    "UVC's widths, units at random": "its widths with units at random (so much is the choice of units)",
    "magnitude, equal shares": "magnitude",
    "COMCAT whitened, recovered for UVC's search too": "COMCAT with as many steps in all",
    "UVC, q and k tied to v": "itself with q and k tied to v",
    "UVC without gates": "itself without gates",
    "UVC without widths": "itself without widths",
    "UVC without distillation": "itself without distillation",
}
ABLATIONS: dict[str, dict[str, Any]] = {
    "UVC, q and k tied to v": {"tie_qk": True},
    "UVC without gates": {"gates": "none"},
    "UVC without widths": {"widths": False},
    "UVC without distillation": {"distill": False},
}


def main() -> None:
    options = protocol.arguments(
        "uvc",
        __doc__,
        short={"action": "store_true", "help": "half the protocol's steps, in search and recovery"},
        recipe={"type": Path, "metavar": "FOLDER", "help": "also train networks by the model's own recipe, kept here"},
        keep={"type": float, "action": "append", "help": "only this share of the MACs; may be repeated"},
    )
    if not options.table:
        Run(options).all()
    protocol.publish(options.place.stem, table(options.name, protocol.read(options.place)))


class Run(protocol.Run):
    """All rows, each written when it is done."""

    def __init__(self, options: Any) -> None:
        super().__init__(options)
        self.recipe: Path | None = options.recipe
        self.keeps = options.keep or [*((0.7, 0.5, 0.35, 0.2) if self.full else (0.5, 0.25, 0.15)), 1.0]
        self.scale = 2 if options.short else 1
        """What the protocol's steps are divided by."""
        self.search: dict[str, Any] = (
            {"epochs": 30.0, "batch_size": 512} if self.full else {"steps": 600 // self.scale, "batch_size": 64}
        )
        self.search |= {"amp": "bf16", "device": "auto" if self.full else "cpu"}
        self.base, self.right = protocol.accuracy(self.dense, self.test)
        self.control_right = self.right

    def all(self) -> None:
        """Dense and control, then each budget and seed; last what the recipe makes of the dense model when run again."""
        self.add("dense", 1.0, 0, None, self.dense)
        self.step_cost()
        for seed in (0, 1, 2) if self.full else (0,):
            self.control(seed)
            for keep in self.keeps:
                if keep < 1:
                    self.budget(keep, seed, ablate=self.full or keep == 0.25)
                else:
                    self.by_recipe(RECIPE_CONTROL, self.dense, keep, seed)
            self.compare_in_full(seed)

    def recovery(self, seed: int, *, long: bool = False, lr: float | None = None) -> RecoverConfig:
        """The protocol's; long: as many steps as search and recovery have together. lr: instead of the protocol's."""
        if self.full:
            how: dict[str, Any] = {"epochs": 50.0 if long else 20.0, "batch_size": 512, "device": "auto"}
        else:
            how = {"steps": (1000 if long else 400) // self.scale, "batch_size": 64, "device": "cpu"}
        if lr is not None:
            how["lr"] = lr
        return RecoverConfig(**how, seed=seed, amp="bf16")

    def step_cost(self) -> None:
        """Seconds of a search step over those of a training step of the dense model with the same distillation, in turns."""
        if self.there(STEP, 1.0, 0):
            return
        amount, rounds = {key: self.search[key] for key in ("batch_size", "amp", "device")}, 5
        rates: dict[str, list[float]] = {"search": [], "plain": []}

        def hear(kind: str, phase: str) -> Any:
            def told(_: str, done: int, __: int, **facts: Any) -> None:
                if done > 2 and facts.get("phase") == phase and "images_per_s" in facts:
                    rates[kind].append(facts["images_per_s"])

            return told

        config = vitrim.UvcConfig(budget=vitrim.Budget(keep_macs=0.5), steps=20, warmup=0.1, settle=0.1, **amount)
        plain = RecoverConfig(steps=20, **amount)
        for _ in range(rounds):
            vitrim.compress(self.dense, config, data=self.source, progress=hear("search", "search"))
            vitrim.recover(
                self.dense, teacher=self.dense, data=self.source, config=plain, progress=hear("plain", "train")
            )
        median = {kind: statistics.median(found) for kind, found in rates.items()}
        facts = {
            "row": STEP,
            "keep": 1.0,
            "seed": 0,
            "ratio": median["plain"] / median["search"],
            "images_per_s": median,
        }
        self.rows.append({**facts, "steps": len(rates["search"]), **self.facts, **protocol.conditions()})
        protocol.write(self.place, self.rows)
        protocol.say(f"{STEP}: {facts['ratio']:.2f}")

    def control(self, seed: int) -> None:
        """The dense model with the same recovery; what rows are compared with."""
        how = self.recovery(seed)
        model, seconds = protocol.recovered(self.dense, self.dense, self.source, how)
        self.add(CONTROL, 1.0, seed, seconds, model, before=self.base, recovery=amount_of(how))
        self.control_right = protocol.accuracy(model, self.test)[1]

    def budget(self, keep: float, seed: int, *, ablate: bool) -> None:
        """Every row of one budget."""
        limit = int(keep * cost(self.dense).macs)
        budget = vitrim.Budget(keep_macs=keep)
        found = self.one("UVC", keep, seed, lambda: self.uvc(budget, seed))
        later = ["UVC's widths, units at random", "from scratch, UVC's shape, same steps"]
        if self.recipe is not None:
            later += [RECIPE, RECIPE_AFTER]
        if found is None and not self.refused("UVC", keep, seed) and not all(self.there(r, keep, seed) for r in later):
            found = self.uvc(budget, seed)[0]  # a stopped run goes on: the same seed gives the same network
            row = self.made("UVC", keep, seed)
            if row is None or row["spec"] != spec_hash(found.spec):
                raise RuntimeError(
                    f"UVC at {keep:.0%} came out with another shape than its row has; make that row anew."
                )
        if found is not None:
            self.one(
                "UVC's widths, units at random", keep, seed, lambda: (pruned.random_like(self.dense, found, seed), {})
            )
            self.one(
                "from scratch, UVC's shape, same steps",
                keep,
                seed,
                lambda: (pruned.from_scratch(found, seed), {}),
                long=True,
                lr=5e-4,
            )
            self.by_recipe(RECIPE, pruned.from_scratch(found, seed), keep, seed)
            self.by_recipe(RECIPE_AFTER, found, keep, seed)
        self.one(
            "magnitude, equal shares",
            keep,
            seed,
            lambda: (pruned.nearest(lambda s: pruned.by_magnitude(self.dense, s), limit), {}),
        )
        self.one("Torch-Pruning (group Taylor)", keep, seed, lambda: (self.torch_pruning(limit, seed), {}))
        self.one(
            "Torch-Pruning, whole heads", keep, seed, lambda: (self.torch_pruning(limit, seed, whole_heads=True), {})
        )
        for label, method in (("DC-ViT closed", "dcvit"), ("COMCAT whitened", "comcat")):
            small = self.one(label, keep, seed, lambda method=method: (self.closed(method, budget, seed), {}))
            if method == "comcat" and small is None and not self.refused(label, keep, seed):
                small = self.closed(method, budget, seed)
            if method == "comcat" and small is not None:
                self.one(
                    f"{label}, recovered for UVC's search too", keep, seed, lambda small=small: (small, {}), long=True
                )
        if self.recipe is not None and not self.there(RECIPE_AUTO, keep, seed):
            auto = vitrim.AutoConfig(budget=budget, seed=seed)
            self.by_recipe(RECIPE_AUTO, vitrim.compress(self.dense, auto, data=self.source).model, keep, seed)
        if ablate:
            for label, changes in ABLATIONS.items():
                self.one(label, keep, seed, lambda changes=changes: self.uvc(budget, seed, **changes))

    def made(self, row: str, keep: float, seed: int) -> dict[str, Any] | None:
        """The row, if it was made."""
        return next((r for r in self.rows if (r["row"], r["keep"], r["seed"]) == (row, keep, seed)), None)

    def there(self, row: str, keep: float, seed: int) -> bool:
        """Whether the row was made."""
        return self.made(row, keep, seed) is not None

    def refused(self, row: str, keep: float, seed: int) -> bool:
        """Whether the row says that its budget is out of reach."""
        return "refused" in (self.made(row, keep, seed) or {})

    def uvc(self, budget: vitrim.Budget, seed: int, **changes: Any) -> tuple[Vit, dict[str, Any]]:
        config = vitrim.UvcConfig(budget=budget, seed=seed, **self.search, **changes)
        made = vitrim.compress(self.dense, config, data=self.source)
        report = {key: value for key, value in made.report.items() if not isinstance(value, (dict, list))}
        shares = {key: value for key, value in made.report.items() if key in ("saving", "finaliser", "warnings")}
        ended = {"ended": made.report["search"]["ended"], "judged": made.report["search"]["judged"]}
        return made.model, {"search": self.search, "told": report | shares | ended}

    def closed(self, method: str, budget: vitrim.Budget, seed: int) -> Vit:
        """From a thousand of the images that the others train on: more than these methods ask for."""
        config = vitrim.methods.configure(method, {"budget": budget, "seed": seed, "images": 1000})
        return vitrim.compress(self.dense, config, data=self.source).model

    def torch_pruning(self, limit: int, seed: int, *, whole_heads: bool = False) -> Vit:
        how = self.dense.config.preprocess
        assert how is not None
        images = opened.open(self.source, split="train", labelled=True).take(256, seed)
        x, y = next(iter(opened.batches(images, opened.evaluation(how), 256)))
        return pruned.torch_pruning(self.dense, x, y, limit, whole_heads=whole_heads)

    def by_recipe(self, row: str, start: Vit, keep: float, seed: int) -> None:
        """Train as the built-in model was trained, on its images; a stopped run goes on from its checkpoint."""
        if self.recipe is None or self.there(row, keep, seed):
            return
        config = read(TrainConfig, recipes.read(self.name)["train"] | {"seed": seed}, where="recipe")
        out = self.kept(row, keep, seed)
        made = train(start, self.data, config, out=out, resume=out.is_dir())
        learned = {"steps": made.steps, "epochs": config.epochs, "batch_size": config.batch_size, "lr": config.lr}
        images = len(opened.open(self.data, split="train", labelled=True))
        before = protocol.accuracy(start, self.test)[0]
        self.add(row, keep, seed, made.seconds, made.model, before=before, recovery=learned | {"images": images})

    def kept(self, row: str, keep: float, seed: int) -> Path:
        """Where a network that the recipe trained is kept."""
        assert self.recipe is not None
        return self.recipe / f"{RECIPES[row]}-{keep:g}-{seed}"

    def compare_in_full(self, seed: int) -> None:
        """Rows by the recipe have the dense model by the recipe as their control."""
        if self.recipe is None or not self.there(RECIPE_CONTROL, 1.0, seed):
            return
        right = protocol.accuracy(vitrim.load(self.kept(RECIPE_CONTROL, 1.0, seed)), self.test)[1]
        for row in self.rows:
            if row["row"] in RECIPES and row["seed"] == seed:
                own = protocol.accuracy(vitrim.load(self.kept(row["row"], row["keep"], seed)), self.test)[1]
                row["against_control"] = protocol.difference(right, own)
        protocol.write(self.place, self.rows)

    def one(
        self,
        row: str,
        keep: float,
        seed: int,
        make: Any,
        *,
        long: bool = False,
        lr: float | None = None,
    ) -> Vit | None:
        """Cut, score, recover, score, time; gives the network before recovery, or None where the budget is out of reach."""
        if self.there(row, keep, seed):
            return None
        began = time.monotonic()
        try:
            small, told = make()
        except vitrim.errors.VitrimError as error:  # a row that says so
            self.add(row, keep, seed, None, None, refused=str(error))
            return None
        spent = time.monotonic() - began
        before = protocol.accuracy(small, self.test)[0]
        how = self.recovery(seed, long=long, lr=lr)
        final, seconds = protocol.recovered(small, self.dense, self.source, how)
        self.add(row, keep, seed, seconds, final, before=before, search_s=spent, recovery=amount_of(how), **told)
        return small

    def add(self, row: str, keep: float, seed: int, seconds: float | None, model: Vit | None, **told: Any) -> None:
        if self.there(row, keep, seed):
            return
        facts: dict[str, Any] = {"row": row, "keep": keep, "seed": seed, "recovery_s": seconds, **told}
        if model is not None:
            top1, right = protocol.accuracy(model, self.test)
            facts |= {"top1": top1, **protocol.described(model, self.dense)}
            facts["against_dense"] = protocol.difference(self.right, right)
            facts["against_control"] = protocol.difference(self.control_right, right)
            if model is not self.dense:
                facts["speed"] = protocol.latency({"dense": self.dense, "small": model}, batches=(1, 8, 64), runs=15)
        self.rows.append({**facts, **self.facts, **protocol.conditions()})
        protocol.write(self.place, self.rows)
        said = "refused" if model is None else f"{told.get('before', facts['top1']):.2f} -> {facts['top1']:.2f}"
        protocol.say(f"{row:>45} keep {keep:.2f} seed {seed}: {said}")


def amount_of(how: RecoverConfig) -> dict[str, Any]:
    """What a row says of its recovery."""
    return {"steps": how.steps, "epochs": how.epochs, "batch_size": how.batch_size, "lr": how.lr}


def table(name: str, found: list[dict[str, Any]]) -> str:
    """Markdown of the rows, the mean over seeds."""
    first, step = found[0], next((row for row in found if row["row"] == STEP), None)
    found = [row for row in found if row["row"] != STEP]
    timed = next(row for row in found if "speed" in row)
    batches = [speed["batch"] for speed in timed["speed"]]
    searched = next((row["search"] for row in found if "search" in row), {})
    length = f"{searched.get('steps')} steps" if searched.get("steps") else f"{searched.get('epochs')} epochs"
    seeds = len({row["seed"] for row in found})
    lines = [
        f"# UVC on `builtin:{name}`",
        "",
        f"Made by `benchmarks/uvc.py` from `benchmarks/results/uvc-{name}.jsonl`. Top-1 on {first['test_images']:,} CIFAR-10 test images, {seeds} "
        f"seed{'s' if seeds > 1 else ''}; UVC's search: {length} of {searched.get('batch_size')} images; recovery: distilled from the dense model, its steps and learning rate in "
        "the column. UVC and the from-scratch rows learn from all of the sample's training images, DC-ViT and COMCAT from 1,000 of them; "
        "rows by the full recipe are trained as the built-in model was, with labels alone, on the images that their column names, and their control is the dense model trained so once more. Differences in points with their paired bootstrap interval (95 %). Speed: PyTorch "
        f"eager, one thread, float32, {timed['speed'][0]['device_name']}, interleaved with the dense model, median of 15.",
        "",
        "| row | asked | MACs kept | parameters kept | before recovery | recovery | after | after, against control | seconds to find it | "
        + " | ".join(f"speed at {batch}" for batch in batches)
        + " | ideal |",
        "| --- |" + " --- |" * (9 + len(batches)),
    ]
    for row in found:
        if "refused" in row:
            lines.append(f"| {row['row']} | {row['keep']:.0%} | {row['refused']} |" + " |" * (7 + len(batches)))
            continue
        speed = [f"{s['measured']:.2f}" for s in row.get("speed", [])] or [""] * len(batches)
        ideal = f"{row['speed'][0]['ideal']:.2f}" if "speed" in row else ""
        before = f"{row['before']:.2f}" if "before" in row else ""
        spent = f"{row['search_s']:.0f}" if row.get("search_s") is not None else ""
        against = "" if row["row"] == "dense" else protocol.points(row["against_control"])
        cells = [row["row"], f"{row['keep']:.0%}", f"{row['kept_macs']:.1%}", f"{row['kept_params']:.1%}", before]
        cells.append(recovery_words(row.get("recovery")))
        cells += [f"{row['top1']:.2f}", against, spent, *speed, ideal]
        lines.append("| " + " | ".join(cells) + " |")
    told = [row for row in found if row["row"].startswith("UVC") and row.get("told")]
    if told:
        lines += ["", "What the searches say of themselves:", ""]
        lines += [f"- {row['row']} at {row['keep']:.0%}: {told_words(row['told'])}" for row in told]
    lines += ["", "## What came of the hypotheses", ""]
    if step is not None:
        holds = "as hoped for" if step["ratio"] <= STEP_AIM else "more than hoped for"
        lines.append(
            f"- A search step costs {step['ratio']:.2f} times a training step of the dense model with the same distillation (median of {step['steps']} in turns; "
            f"aim {STEP_AIM}): {holds}."
        )
    lines += [f"- {text}" for text in verdicts(found)]
    lines += ["", f"Conditions: { ({key: first[key] for key in ('versions', 'processor', 'threads')}) }."]
    return "\n".join(lines) + "\n"


def recovery_words(how: dict[str, Any] | None) -> str:
    """Steps and learning rate, and images where a row has its own."""
    if how is None:
        return ""
    length = f"{how['steps']:,} steps" if how["steps"] else f"{how['epochs']:g} epochs"
    return f"{length}, {how['lr']:g}" + (f", {how['images']:,} images" if "images" in how else "")


def verdicts(found: list[dict[str, Any]]) -> list[str]:
    """UVC beside the rows that the hypotheses name, budget by budget, in points of the mean over seeds."""

    def mean(row: str, keep: float) -> float | None:
        values = [r["top1"] for r in found if (r["row"], r["keep"]) == (row, keep) and "top1" in r]
        return sum(values) / len(values) if values else None

    said = []
    for keep in sorted({row["keep"] for row in found if row["row"] == "UVC"}, reverse=True):
        own = mean("UVC", keep)
        if own is None:
            said.append(f"{keep:.0%}: out of UVC's reach: by default queries and keys stay whole.")
            continue
        words = []
        for row, called in RIVALS.items():
            other = mean(row, 1.0 if row == CONTROL else keep)
            if other is not None:
                words.append(f"{own - other:+.2f} against {called}")
        said.append(f"UVC at {keep:.0%} in points: {', '.join(words)}.")
        long = {called: mean(row, 1.0 if row == RECIPE_CONTROL else keep) for row, called in IN_FULL.items()}
        if long[IN_FULL[RECIPE]] is not None:
            given = ", ".join(f"{top1:.2f} {called}" for called, top1 in long.items() if top1 is not None)
            said.append(
                f"By the built-in model's recipe in full, with its time and its images, at {keep:.0%}: {given}."
            )
        tied = mean("UVC, q and k tied to v", keep)
        if tied is not None:
            said.append(
                f"Queries and keys stay whole by default, as in the paper, and what is left of the budget pays for them: letting them go too (`tie_qk`) changes "
                f"{tied - own:+.2f} points at {keep:.0%}."
            )
    return said


def told_words(told: dict[str, Any]) -> str:
    """Where the saving came from, and what the finaliser had to cut."""
    saving, finaliser = told["saving"]["macs"], told["finaliser"]["macs"]
    ended = f" ({told['ended']})" if "ended" in told else ""
    return (
        f"{saving['widths']:.0%} of the saved MACs by widths, {saving['skipping']:.0%} by skipping; the search ended at {finaliser['searched']:.1%} of dense{ended}, "
        f"the finaliser cut {finaliser['cut']:.1%}."
    )


if __name__ == "__main__":
    main()
