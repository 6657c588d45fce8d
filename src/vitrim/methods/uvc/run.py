"""UVC: heads, dims in a head, MLP units and whole blocks chosen together under one budget while the weights learn.

Source   Yu et al., ICLR 2022, arXiv:2203.08243: primal-dual search over counts s, r and block gates with duals y, p, z
         (Algorithm 1), distilled from the uncompressed model; details that the paper leaves open from the authors' code.
Takes    a ViT, a budget on MACs or parameters or both, labelled images (an encoder: any images), and training steps.
Gives    an ordinary smaller ViT, exactly cut, whose weights were trained for a while in that form; recovery comes after.
Departs  The released code prunes almost by skipping alone, lets its budget dual wind up and never meets its budget. Here
         counts are shares of their range; each decision moves by what it saves at the budget's price z against what it
         costs: the measured slope of the loss under soft masks, plus y times the paper's norm penalty. The budget falls
         along a ramp, z has a ceiling and a proportional part, gates enter the cost without noise and are drawn for each
         image. The exact cost of the materialised network is differentiated. A finaliser meets the budget before the last
         part of the run, which trains under the final masks. `preset="paper"` has the released command's values and its
         rule of motion (no masks in the forward pass), without the faults of that code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from vitrim import data as opened
from vitrim import search, surgery
from vitrim.budget import Budget, exceeded
from vitrim.counting import ADDITIVE, Cost, cost
from vitrim.data import Images
from vitrim.errors import ConfigError, DataError
from vitrim.freezing import HALVES
from vitrim.methods.uvc.config import UvcConfig
from vitrim.methods.uvc.decisions import decisions_of
from vitrim.methods.uvc.objective import Search, rows_of
from vitrim.model import Vit
from vitrim.progress import Progress
from vitrim.result import Compressed
from vitrim.space import outlook
from vitrim.spec import ModelSpec, spec_hash
from vitrim.tasks.classification import class_index
from vitrim.training import Objective, fit, ready
from vitrim.training.config import batch_that_fits, fewer
from vitrim.training.objectives import Distilled, LabelFree, Supervised

ANY = Budget(keep_macs=1.0)


def floor(spec: ModelSpec, config: UvcConfig | None = None) -> Cost:
    """The cheapest network within reach: every width at one unit, every gate closed but the cheapest."""
    config = config or UvcConfig(budget=ANY)
    return decisions_of(spec, config).floor(_counted(config))


def tolerance(spec: ModelSpec, config: UvcConfig | None = None) -> dict[str, int]:
    """How far below a budget the result may end, by resource: one unit of a width, or a block at its narrowest (law 7)."""
    config = config or UvcConfig(budget=ANY)
    return decisions_of(spec, config).tolerance(_counted(config))


def _counted(config: UvcConfig) -> str:
    """The resource by which the cheapest gate is chosen."""
    return "params" if config.bounds.keep_macs is None and config.bounds.max_macs is None else "macs"


def plan(spec: ModelSpec, config: UvcConfig | None = None) -> dict[str, Any]:
    """What can be said from the spec alone: the range of each resource, the step, the needs, what stays as it is.

    Raises BudgetError when the config's budget is out of reach.
    """
    chosen = config or UvcConfig(budget=ANY)
    decisions = decisions_of(spec, chosen)
    return outlook(
        "uvc",
        chosen.preset,
        None if config is None else config.budget,
        floor=decisions.floor(_counted(chosen)),
        reference=decisions.space.reference,
        tolerance=decisions.tolerance(_counted(chosen)),
        needs={"images": chosen.rules.batch_size, "labels": needs_labels(spec, chosen), "training": True},
        dense=decisions.space.dense,
    )


def compress(
    model: Vit,
    config: UvcConfig,
    *,
    data: Any = None,
    progress: Progress | None = None,
    folder: Path | None = None,
    resume: bool = False,
    teacher: Vit | None = None,
) -> Compressed:
    """Search and train, then cut; no recovery. `model` is left as it was, and is the teacher if no other is given.

    data: whatever `vitrim.data.open` takes; its train split is learned. folder: for metrics.jsonl and checkpoints, from
    which `resume` goes on. A model within its budget comes back as it is, untrained. The report says where the saving came
    from, what the finaliser had to change, and whether the search converged.
    Raises BudgetError, before anything is read, when the budget is out of reach; DataError without images or labels;
    TrainingError as `vitrim.training.fit` does.
    """
    decisions = decisions_of(model.spec, config)
    fixed, reference = decisions.space.fixed, decisions.space.reference
    config.bounds.refuse_unreachable(floor=decisions.floor(_counted(config)), reference=reference, method="uvc")
    limits = config.bounds.limits(reference)
    if not exceeded(reference, limits):
        every = [(i, half) for i in range(len(model.spec.blocks)) for half in HALVES]
        whole = surgery.cut(model, [None] * len(model.spec.blocks), method="uvc", variant=config.preset, skip=every)
        told = {"within_budget": True, "warnings": []}
        return Compressed(model=whole, method="uvc", variant=config.preset, report=told)
    base = config.bounds.whole(reference)
    shares = {name: getattr(reference, name) / getattr(base, name) for name in ("macs", "params")}
    if data is None:
        raise DataError("uvc: the search trains on images; none were given. Pass data=.")
    _refuse_untaught(model.spec, config)
    labelled = None if model.spec.outputs else False  # an encoder looks at none
    images = opened.open(data, split="train", labelled=needs_labels(model.spec, config) or labelled)
    config, said = _filled(config, len(images))
    inner = _inner(teacher or model, config, images)
    objective = Search(decisions, inner, config, limits)
    label_map = None
    if images.labelled and model.spec.outputs:
        label_map = class_index(model.config.labels, images.classes, classes=model.spec.classes)
    fitted = fit(
        surgery.fold_layer_scale(model, skip=fixed),
        objective,
        images,
        config.training,
        out=folder,
        resume=resume,
        label_map=label_map,
        progress=_named(progress, shares),
    )
    small = surgery.cut(fitted.model, objective.keeps(), method="uvc", variant=config.preset, skip=fixed)
    last = replace(small.selection.steps[-1], parent=spec_hash(model.spec), refit=True)
    small.selection = model.selection.then(last)
    report = _report(objective, small.spec) | {
        "steps": fitted.steps,
        "seconds": round(fitted.seconds, 1),
        "images_per_s": fitted.images_per_s,
        "objective": NAMES[type(inner)],
    }
    report["warnings"] = [*said, *report["warnings"]]
    history = [_row(line) for line in fitted.history if line["kind"] == "train"]
    return Compressed(model=small, method="uvc", variant=config.preset, history=history, report=report)


def needs_labels(spec: ModelSpec, config: UvcConfig) -> bool:
    """Whether the search cannot do without."""
    return bool(spec.outputs) and not (config.distill and config.rules.alpha == 1)


def _refuse_untaught(spec: ModelSpec, config: UvcConfig) -> None:
    if not spec.outputs and not config.distill:
        raise ConfigError("uvc: distill=False on an encoder, which has no classifier to train; leave distill on.")


def check(spec: ModelSpec, config: UvcConfig, images: Images) -> None:
    """Raise what `compress` would raise about these training images or this machine, before any work is done."""
    _refuse_untaught(spec, config)
    if needs_labels(spec, config):
        opened.open(images, labelled=True)
    ready(_filled(config, len(images))[0].training, images)


def _filled(config: UvcConfig, count: int) -> tuple[UvcConfig, list[str]]:
    """With a batch that so many images fill, where nobody chose one, and what is to be said of it."""
    few = batch_that_fits(config.training, count)
    if config.batch_size is not None or few == config.rules.batch_size:
        return config, []
    return replace(config, batch_size=few), [fewer(count, few)]


NAMES: dict[type, str] = {LabelFree: "label_free", Supervised: "supervised", Distilled: "distilled"}


def _inner(model: Vit, config: UvcConfig, images: Images) -> Objective:
    """What the weights learn."""
    rules = config.rules
    if not model.spec.outputs:
        return LabelFree(model)
    how: Any = {"smoothing": rules.smoothing, "multi_label": images.several or model.config.multi_label}
    return Distilled(model, alpha=rules.alpha, tau=rules.tau, **how) if config.distill else Supervised(**how)


SHOWN = ("loss", "lr", "grad_norm", "epoch", "phase", "seconds_left", "images_per_s")


def _named(progress: Progress | None, shares: Mapping[str, float]) -> Progress | None:
    """The loop's progress under the method's name, with the distance from the budget instead of every decision.

    shares: what the network that is searched takes of the one that the budget's shares are of.
    """
    if progress is None:
        return None

    def told(stage: str, done: int, total: int, **facts: Any) -> None:
        shown = {key: value for key, value in facts.items() if key in SHOWN}
        for name in ("macs", "params"):
            if f"budget/{name}" in facts:
                shown[f"keep_{name}"] = facts[f"cost/{name}"] * shares[name]
        progress("uvc" if stage == "train" else stage, done, total, **shown)

    return told


def _row(line: Mapping[str, Any]) -> dict[str, Any]:
    """A line of metrics.jsonl with the decisions by what they are about: `block 3`, `block 3 head 1`, `block 3 mlp`."""

    def within(*path: str) -> dict[str, Any]:
        start = "/".join((*path, ""))
        return {key.removeprefix(start): value for key, value in line.items() if key.startswith(start)}

    def by_block(found: Mapping[str, Any], word: str) -> dict[str, Any]:
        return {f"block {place}".replace("/", word): value for place, value in found.items()}

    row = {key: line[key] for key in ("step", "phase", "loss", "lr") if key in line}
    row |= {key: value for key, value in line.items() if key.endswith("_loss")}
    row |= {name: within(name) for name in ("cost", "budget", "z")}
    for name in ("removed", "y"):
        row[name] = {part: by_block(within(name, part), " head ") for part in ("heads", "v", "hidden")}
    return row | {"gates": by_block(within("gate"), " ")}


def _report(objective: Search, spec: ModelSpec) -> dict[str, Any]:
    """Where the saving came from, what the finaliser changed, how the search ended, and what is left of each block."""
    space, layout = objective.decisions.space, objective.layout
    assert layout is not None
    after = cost(spec)
    gone = [
        space.price(i, search.half_of(whole, half))
        for i, (whole, choice) in enumerate(zip(space.whole, layout.choices, strict=True))
        for half in HALVES
        if not getattr(choice, half)
    ]
    saving: dict[str, Any] = {}
    finaliser: dict[str, Any] = {}
    for k, name in enumerate(ADDITIVE):
        whole = getattr(space.reference, name)
        saved = whole - getattr(after, name)
        skipped = sum(price[k] for price in gone)
        skipping = min(1.0, skipped / saved) if saved else 0.0
        saving[name] = {"share": saved / whole, "skipping": skipping, "widths": 1 - skipping if saved else 0.0}
        searched = float(objective.controller.cost[k])
        rounded, final = objective.rounded[name] / whole, getattr(after, name) / whole
        cut = max(0.0, max(searched, rounded) - final)
        finaliser[name] = {"searched": searched, "rounded": rounded, "final": final, "cut": cut}
    verdict, why = judged(objective.trace)
    bound = [name for k, name in enumerate(ADDITIVE) if objective.controller.bound[k]]
    cut = max(finaliser[name]["cut"] for name in bound)
    warnings = []
    if cut > 0.05:
        warnings.append(
            f"the search had not reached its budget: the finaliser itself cut {100 * cut:.1f} % of the cost of the network that was searched. "
            "Give it more steps, or a larger budget."
        )
    return {
        "saving": saving,
        "finaliser": finaliser,
        "search": {"ended": verdict, "judged": why, "columns": ["step", "cost", "budget"], "trace": objective.trace},
        "blocks": rows_of(layout.sizes, layout.choices),
        "warnings": warnings,
    }


def judged(trace: Sequence[Sequence[float]]) -> tuple[str, str]:
    """How a search ended, from rows of (step, cost, budget), and by what rule.

    Looks at the last quarter of the search: "converged" where cost and budget stay within 4 % of dense of each other (a
    head or eight dims come and go in whole levels there); "oscillated" where the difference changes sign twice and spans
    over 8 %; "short of the budget" or "below the budget" else.
    """
    tail = np.array([row[1] - row[2] for row in trace[-max(1, len(trace) // 4) :]])
    worst, span = float(np.abs(tail).max()), float(tail.max() - tail.min())
    turns = int((np.diff(np.sign(tail[np.abs(tail) > 0.005])) != 0).sum())
    what = (
        f"last quarter of the search: cost within {100 * worst:.1f} % of dense of the budget, {turns} changes of side"
    )
    if worst <= 0.04:
        return "converged", what
    if turns >= 2 and span > 0.08:
        return "oscillated", what
    return ("short of the budget" if tail[-1] > 0 else "below the budget"), what
