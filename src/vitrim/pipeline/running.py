"""`run`: one call from a dense model to a folder with a smaller one and a report about it."""

from __future__ import annotations

import dataclasses
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

from vitrim import __version__, artifact, reporting, surgery, timing
from vitrim import data as rooms
from vitrim.budget import Budget, exceeded
from vitrim.checkpoints import replace_text
from vitrim.codec import plain
from vitrim.config import keys
from vitrim.counting import Cost, cost
from vitrim.data import Images
from vitrim.errors import ArtifactError, ConfigError, DataError, MeasureError
from vitrim.freezing import frozen
from vitrim.methods import METHODS, configure, method_named, method_of
from vitrim.methods import compress as compress_by
from vitrim.methods import plan as plan_of
from vitrim.methods.method import MethodConfig
from vitrim.model import Vit
from vitrim.pipeline.comparison import compare, refuse_chance
from vitrim.pipeline.configs import EvaluateConfig, MeasureConfig, RecoverConfig
from vitrim.pipeline.folder import STAGES, Folder, written_or_said
from vitrim.pipeline.recovery import objective_named, train_again, training_speeds
from vitrim.progress import Progress
from vitrim.result import Compressed
from vitrim.sources import load
from vitrim.spec import ModelSpec, spec_hash
from vitrim.tasks.classification import class_index
from vitrim.training import ready

LEAST_GAIN = 1.05
"""An ideal speed-up below this does not pay: launches and memory traffic eat it."""

STEPS_PER_SPEED_ROUND = 50
"""A recovery of so many steps is followed by one round that times its step against the dense model's; at most three rounds."""

log = logging.getLogger("vitrim.pipeline")


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What a run made. summary: the result as `vitrim.reporting` describes it, without the sample images.

    redone: the stages that this call did itself; the others were found.
    """

    model: Vit
    folder: Path
    report: Path
    summary: dict[str, Any]
    redone: tuple[str, ...]

    @property
    def spec(self) -> ModelSpec:
        return self.model.spec


def run(
    model: str | Path | Vit,
    method_config: MethodConfig,
    *,
    data: Any,
    out: str | Path,
    recover: RecoverConfig | None = None,
    measure: MeasureConfig | None = MeasureConfig(),  # noqa: B008  (frozen)
    evaluate: EvaluateConfig = EvaluateConfig(),  # noqa: B008  (frozen)
    resume: bool = False,
    force: bool = False,
    relative_to: Literal["given", "original"] = "given",
    exact_tail: bool = True,
    init: str | None = None,
    progress: Progress | None = None,
    compressor: Callable[..., Compressed] = compress_by,
) -> RunResult:
    """Plan, compress, recover, evaluate, measure, save and report; `model` is left as it was.

    model: a name or folder for `vitrim.load`, or a model.  data: whatever `vitrim.data.open` takes; trained on its train
    split, judged on its validation split, never on test.  out: a new folder, which becomes the artifact.
    recover, measure: None leaves that stage out.  relative_to: what the shares of a budget refer to: this model, or the first
    one that it descends from.  exact_tail: let only the prefix tokens through the last block where the classifier reads no
    other: the same outputs for fewer operations, which the method may then spend elsewhere.
    init: a method of closed forms, such as auto, that first cuts to twice the budget; the other then starts from there.
    resume: go on at the first stage that has no result.  force: replace the run in `out`.
    compressor: called as `vitrim.compress`; a family's has done the work for all members.
    A bad input, an unreachable budget or a dense model that guesses is refused before anything is written.
    """
    if relative_to not in ("given", "original"):
        raise ConfigError(f"relative_to={relative_to!r}; expected 'given' or 'original'.")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "run: the whole job runs in one process, and torchrun started several. Start it without torchrun, or call "
            "vitrim.compress and vitrim.recover, whose training shares its batches over the processes."
        )
    method = method_of(method_config)
    folder = Folder(Path(out), resume=resume, force=force)
    work = _Work(
        folder=folder,
        name=_name_of(model),
        dense=load(model) if isinstance(model, str | Path) else model,
        method=method,
        config=method_config,
        data=data,
        recovery=recover,
        target=measure,
        judging=evaluate,
        relative_to=relative_to,
        tail=exact_tail,
        init=init,
        progress=progress,
        compressor=compressor,
    )
    work.check()
    with written_or_said(folder.out):
        return work.through_all_stages()


@dataclass(kw_only=True)
class _Work:
    """The state of one `run`: what was asked, and what the stages found so far."""

    folder: Folder
    name: str
    dense: Vit
    method: str
    config: MethodConfig
    data: Any
    recovery: RecoverConfig | None
    target: MeasureConfig | None
    judging: EvaluateConfig
    relative_to: str
    tail: bool
    init: str | None
    progress: Progress | None
    compressor: Callable[..., Compressed]

    def __post_init__(self) -> None:
        self.config = with_tail(self.config, wanted=self.tail)
        self.tail = self.tail and may_have_tail(self.dense.spec, self.config)
        self.given = surgery.exact_tail(self.dense) if self.tail else self.dense
        self.asked = self.config
        self.found: dict[str, dict[str, Any]] = {}
        self.redone: list[str] = []
        self.warnings: list[str] = []
        self.small: Vit | None = None
        self.final: Vit | None = None

    # ------------------------------------------------------------------------------------------- before anything is written

    def check(self) -> None:
        """Everything that can be refused before the first stage."""
        self.config = limited(self.config, reference_of(self.dense, self.relative_to))
        self.planned = plan_of(self.method, self.given.spec, self.config)
        self.first = None if self.init is None else self._first_config()
        self.train, self.held = self._images()
        if (check := METHODS[self.method].check) is not None:
            check(self.given.spec, self.config, self.train)
        if self.recovery is not None:
            held = tuple(dict.fromkeys((*self.recovery.freeze, *self.config.freeze)))
            frozen(self.dense.spec, held)
            self.recovery = dataclasses.replace(self.recovery, freeze=held)
            if len(self.train) < self.recovery.batch_size == RecoverConfig().batch_size:  # nobody chose it
                few = max(1, len(self.train) // 8 * 8 or len(self.train))
                self._warn(f"The recovery takes batches of {few}, since there are {len(self.train)} training images.")
                self.recovery = dataclasses.replace(self.recovery, batch_size=few)
            self.objective = objective_named(self.recovery, self.dense, labelled=self.train.labelled)
            ready(self.recovery, self.train)
        self.dense_top1: float | None = None
        if self.judging.check_dense and not self.folder.resume:
            self.dense_top1 = refuse_chance(self.dense, self.held, self.judging)

    def _first_config(self) -> MethodConfig:
        """The config of `init`, at twice the limits. Raises ConfigError where it does not go with the method or its budget."""
        assert self.init is not None
        budget = self.config.budget
        if self.init == self.method or budget is None:
            raise ConfigError(f"init={self.init!r}: expected another method than {self.method!r}, and a budget.")
        twice = {key: 2 * value for key, value in budget.to_dict().items()}
        twice = {key: min(1.0, value) if key.startswith("keep_") else value for key, value in twice.items()}
        both = (
            {"seed", "freeze", "device", "images"}
            & {*keys(type(self.config))}
            & {*keys(method_named(self.init).config)}
        )
        shared = {key: value for key in both if (value := getattr(self.config, key)) not in (None, "auto")}
        loose, whole = Budget(**twice), cost(self.given)
        first = with_tail(configure(self.init, {"budget": loose, **shared}), wanted=self.tail)
        if not exceeded(whole, loose.limits(whole)):
            self._warn(f"init={self.init!r} changes nothing here: the network meets twice the budget as it is.")
        if plan_of(self.init, self.given.spec, first)["needs"]["training"]:
            raise ConfigError(f"init={self.init!r} trains; expected a method of closed forms, such as auto.")
        return first

    def _images(self) -> tuple[Images, Images]:
        """Train and validation; without labels where nothing needs them and they are of other classes."""
        seed = self.judging.seed
        train, held = (rooms.open(self.data, split=split, seed=seed) for split in ("train", "validation"))
        needs_labels = bool(self.planned["needs"]["labels"]) or (
            self.recovery is not None and self.recovery.objective in ("distilled", "supervised")
        )
        if not (train.labelled or held.labelled) or not self.dense.spec.outputs:
            return train, held
        try:
            for images in (train, held):
                class_index(self.dense.config.labels, images.classes, classes=self.dense.spec.classes)
        except DataError as error:
            if needs_labels:
                raise
            self._warn(f"Judged without labels, by agreement with the dense model: {error}")
            return tuple(  # type: ignore[return-value]
                rooms.open(self.data, split=split, seed=seed, labelled=False) for split in ("train", "validation")
            )
        return train, held

    # ---------------------------------------------------------------------------------------------------------- the stages

    def through_all_stages(self) -> RunResult:
        """Each stage whose result is not there yet, in order."""
        self.folder.begin(self._asked())
        stages: Mapping[str, Callable[[], dict[str, Any]]] = {
            "plan": self._plan,
            "compress": self._compress,
            "recover": self._recover,
            "evaluate": self._evaluate,
            "measure": self._measure,
            "save": self._save,
            "report": self._report,
        }
        for index, stage in enumerate(STAGES):
            if self.progress is not None:
                self.progress("stages", index, len(STAGES), now=stage)
            self.found[stage], done = self.folder.stage(stage, stages[stage])
            if done:
                self.redone.append(stage)
        summary = self._result()
        place = self.folder.out / reporting.SUMMARY
        replace_text(place, reporting.as_text(summary))
        if self.progress is not None:
            self.progress("stages", len(STAGES), len(STAGES))
        return RunResult(
            model=artifact.load(self.folder.out),
            folder=self.folder.out,
            report=self.folder.out / "report.html",
            summary=summary,
            redone=tuple(self.redone),
        )

    def _plan(self) -> dict[str, Any]:
        dense = cost(self.dense)
        limits = {} if self.config.budget is None else self.config.budget.limits(dense)
        if "macs" in limits and dense.macs / limits["macs"] < LEAST_GAIN:
            self._warn(
                f"The budget asks for {limits['macs'] / dense.macs:.1%} of the MACs: at best {dense.macs / limits['macs']:.2f} times as "
                "fast, which rarely shows in measured time."
            )
        return {
            **self.planned,
            "limits": limits,
            "dense": dense.to_dict(),
            "dense_top1": self.dense_top1,
            "warnings": list(self.warnings),
        }

    def _compress(self) -> dict[str, Any]:
        search = self.folder.stages / "search"
        start = self.given if self.init is None else self._started(search / "init")
        search = search if self.init is None else search / "after"
        taught = {"teacher": self.dense} if self.init is not None and METHODS[self.method].takes_teacher else {}
        made = self.compressor(
            start, self.config, data=self.train, progress=self.progress, folder=search, resume=search.is_dir(), **taught
        )
        before, after = cost(self.dense), cost(made.spec)
        warnings = list(made.report.get("warnings", ()))  # logged by `vitrim.compress`
        if blind(made.spec) and not blind(self.dense.spec):
            warnings.append(
                self._warn(
                    "No attention is left, and the classifier reads prefix tokens alone: they see no image, and every answer is the "
                    "same. Keep more, or choose another method."
                )
            )
        warnings += self._warnings_before_training(made.model, before, after)
        made.save(self.folder.stages / "compressed", provenance=self._origin(), force=True)
        shutil.rmtree(self.folder.stages / "search", ignore_errors=True)  # what a killed search would have gone on from
        return {
            "method": made.method,
            "variant": made.variant,
            "spec": spec_hash(made.spec),
            "start": cost(start).to_dict(),
            "cost": after.to_dict(),
            "report": made.report,
            "history": made.history,
            "warnings": warnings,
        }

    def _started(self, folder: Path) -> Vit:
        """The network at twice the budget, by the method `init`."""
        assert self.first is not None
        made = compress_by(
            self.given, self.first, data=self.train, progress=self.progress, folder=folder, resume=folder.is_dir()
        )
        return made.model

    def _warnings_before_training(self, small: Vit, before: Cost, after: Cost) -> list[str]:
        """What would make a recovery pointless on the target; said before it begins."""
        ideal = before.macs / after.macs
        if ideal < LEAST_GAIN:
            return [
                self._warn(
                    f"The cut can make it at most {ideal:.2f} times as fast (the ratio of MACs): on this target it will not pay."
                )
            ]
        if self.target is None:
            return []
        batch = self.target.batch_sizes[0]
        rows = timing.measure(
            {"dense": self.dense, "compressed": small},
            batch_sizes=(batch,),
            runs=min(7, self.target.runs),
            threads=self.target.threads,
            device=self.target.device,
            dtype=self.target.dtype,
        )
        (gain,) = timing.speedups(rows, "dense", {"dense": before.macs, "compressed": after.macs})
        if gain["high"] >= LEAST_GAIN:
            return []
        return [
            self._warn(
                f"A first timing at batch {batch} on {rows[0]['device_name']} shows {gain['measured']:.2f} times the speed where the MACs "
                f"promise {ideal:.2f}: on this target the cut may not pay."
            )
        ]

    def _recover(self) -> dict[str, Any]:
        if self.recovery is None:
            return {"skipped": True}
        fitted, objective = train_again(
            self._small,
            self.dense,
            self.train,
            self.held,
            self.recovery,
            out=self.folder.stages / "recover",
            resume=self.folder.partial_recovery,
            progress=self.progress,
        )
        artifact.save(fitted.model, self.folder.stages / "recovered", force=True)
        lines, rounds = fitted.history, min(3, fitted.steps // STEPS_PER_SPEED_ROUND)
        both = {"dense": self.dense, "compressed": self._small}
        return {
            "objective": objective,
            "steps": fitted.steps,
            "train_seconds": round(fitted.seconds, 2),
            "images_per_s": training_speeds(both, self.dense, self.train, self.recovery, rounds=rounds)
            if rounds
            else None,
            "curve": [{"step": line["step"], "loss": line["loss"]} for line in lines if line["kind"] == "train"],
            "validation": [
                {key: value for key, value in line.items() if key not in ("kind", "seconds")}
                for line in lines
                if line["kind"] == "validate"
            ],
        }

    def _evaluate(self) -> dict[str, Any]:
        models = {"dense": self.dense, "compressed": self._small}
        if self.recovery is not None:
            models["recovered"] = self._final
        metrics, gap, gained, shown = compare(models, self.held, self.judging, self.progress)
        replace_text(self.folder.stages / "samples.json", reporting.as_text(shown))
        return {"metrics": metrics, "difference": gap, "warnings": self._lost_in_recovery(metrics, gained)}

    def _lost_in_recovery(self, metrics: Mapping[str, Any], gained: Mapping[str, Any] | None) -> list[str]:
        """Said only where the paired interval excludes no change: on few images the figures differ by chance."""
        cut, final = metrics["compressed"], metrics.get("recovered")
        if final is None or gained is None or gained["high"] >= 0:
            return []
        key = "top1" if cut.get("top1") is not None else "agreement"
        what = {"top1": "accuracy", "agreement": "agreement with the dense model"}[key]
        return [
            self._warn(
                f"The recovery lowered the {what} from {cut[key]:.1%} to {final[key]:.1%}. Train longer or with a lower lr, or leave "
                "the recovery out."
            )
        ]

    def _measure(self) -> dict[str, Any]:
        if self.target is None:
            return {"skipped": True}
        here, notes = timing.runtimes_here()
        asked, rows, said = self.target.runtimes or here, [], list(notes) if self.target.runtimes is None else []
        for runtime in asked:
            try:
                rows += timing.measure(
                    {"dense": self.dense, "compressed": self._final},
                    batch_sizes=self.target.batch_sizes,
                    threads=self.target.threads,
                    runs=self.target.runs,
                    runtime=runtime,
                    device=self.target.device,
                    dtype=self.target.dtype,
                    progress=self.progress,
                )
            except MeasureError as error:
                if self.target.runtimes is not None or runtime == "eager":
                    raise
                said.append(f"Compiled PyTorch was not timed: {error}")
        macs = {"dense": cost(self.dense).macs, "compressed": cost(self._final).macs}
        return {"rows": rows, "speedups": timing.speedups(rows, "dense", macs), "notes": said}

    def _save(self) -> dict[str, Any]:
        metrics = self.found["evaluate"]["metrics"]
        compressed = self.found["compress"]
        provenance = self._origin() | {
            "method": self.method,
            "variant": compressed["variant"],
            "config": plain(self.asked) | {"exact_tail": self.tail, "init": self.init},
            "data": self.held.fingerprint() | {"train": self.train.fingerprint()},
            "seed": self.config.seed,
            "metrics": {"before": metrics["dense"], "after": metrics.get("recovered") or metrics["compressed"]},
            "recovery": None if self.recovery is None else plain(self.recovery),
        }
        artifact.save(self._final, self.folder.out, provenance=provenance, force=True)
        shutil.rmtree(self.folder.stages / "recover" / "checkpoints", ignore_errors=True)  # the recovered model is kept
        return {"file_bytes": (self.folder.out / artifact.WEIGHTS).stat().st_size}

    def _report(self) -> dict[str, Any]:
        shown = reporting.read_samples(self.folder.out)
        reporting.write({**self._result(), **shown}, self.folder.out / "report.html")
        return {"file": "report.html"}

    # ---------------------------------------------------------------------------------------------- models between stages
    # Always read back from their folders, never handed on in memory: the layout of a tensor changes the last bits of its
    # products, and a resumed run must end as an undisturbed one.

    @property
    def _small(self) -> Vit:
        if self.small is None:
            self.small = self._kept("compressed")
        return self.small

    @property
    def _final(self) -> Vit:
        if self.recovery is None:
            return self._small
        if self.final is None:
            self.final = self._kept("recovered")
        return self.final

    def _kept(self, name: str) -> Vit:
        try:
            return artifact.load(self.folder.stages / name)
        except ArtifactError as error:
            stage = {"compressed": "compress", "recovered": "recover"}[name]
            raise ArtifactError(
                f"{error} To make it again, remove stages/{stage}.json from the run's folder and resume."
            ) from error

    # ------------------------------------------------------------------------------------------------------------- records

    def _asked(self) -> dict[str, Any]:
        """The resolved config: what a resumed run must agree with. No absolute path."""
        return {
            "schema": 1,
            "vitrim": __version__,
            "model": self.name,
            "weights": self._weights,
            "method": self.method,
            "settings": plain(self.asked),
            "data": {"train": self.train.fingerprint(), "validation": self.held.fingerprint()},
            "recover": None if self.recovery is None else plain(self.recovery),
            "evaluate": plain(self.judging),
            "measure": None if self.target is None else plain(self.target),
            "relative_to": self.relative_to,
            "exact_tail": self.tail,
            "init": self.init,
        }

    @cached_property
    def _weights(self) -> str:
        """Of the dense model: a folder can hold others under the same name."""
        return surgery.fingerprint(self.dense)

    def _origin(self) -> dict[str, Any]:
        """Source and first ancestor, handed down from run to run."""
        told = self.dense.provenance
        first = told.get("original") or {"source": self.name, "spec": self.dense.spec.to_dict()}
        named = (
            self.name if ":" in self.name else None
        )  # a name that others can load says more than where that came from
        return {"source": named or told.get("source") or self.name, "original": first}

    def _result(self) -> dict[str, Any]:
        """The result that `vitrim.reporting` describes, from what the stages found."""
        found, compressed = self.found, self.found["compress"]
        dense = cost(self.dense)
        recovery = None if found["recover"].get("skipped") else found["recover"]
        measured = None if found["measure"].get("skipped") else found["measure"]
        metrics = {"recovered": None, **found["evaluate"]["metrics"]}
        name = self.folder.out.resolve().name
        judged = metrics["dense"]["count"]
        return {
            "schema": 1,
            "name": name,
            "model": self.name,
            "method": {"name": compressed["method"], "variant": compressed["variant"]},
            "data": {"name": self.held.name, "split": "validation", "count": judged},
            "budget": {} if self.asked.budget is None else self.asked.budget.to_dict(),
            "limits": found["plan"]["limits"],
            "specs": {"dense": self.dense.spec.to_dict(), "compressed": self._final.spec.to_dict()},
            "costs": {"dense": dense.to_dict(), "compressed": compressed["cost"]},
            "file_bytes": {"dense": dense.file_bytes, "compressed": found["save"]["file_bytes"]},
            "metrics": metrics,
            "difference": found["evaluate"]["difference"],
            "timing": None if measured is None else {key: measured[key] for key in ("rows", "speedups", "notes")},
            "recovery": None
            if recovery is None
            else {key: recovery[key] for key in ("objective", "steps", "curve", "validation")}
            | {
                "seconds": recovery["train_seconds"],
                "images_per_s": recovery["images_per_s"],
            },
            "sections": _sections(compressed, dense),
            "warnings": [*found["plan"]["warnings"], *compressed["warnings"], *found["evaluate"]["warnings"]],
            "seconds": {stage: found[stage]["seconds"] for stage in STAGES if stage in found},
            "provenance": {
                "source": self._origin()["source"],
                "weights (hash)": self._weights,
                "spec (hash)": spec_hash(self._final.spec),
                "data": f"{self.train.name}: {len(self.train)} training, {len(self.held)} validation images",
                "data (hash)": self.held.fingerprint()["sha256"][:16],
                "seed": self.config.seed,
                "vitrim": __version__,
                "torch": str(torch.__version__),
            },
            "commands": _next_commands(
                name, self.train.name if isinstance(self.data, str | Path) else "DATA", bool(self.dense.spec.outputs)
            ),
        }

    def _warn(self, text: str) -> str:
        log.warning(text)
        self.warnings.append(text)
        return text


def _sections(compressed: Mapping[str, Any], dense: Cost) -> list[dict[str, Any]]:
    """What the method shows of its own choice, for the report."""
    facts = {"dense": dense.to_dict(), **{key: compressed[key] for key in ("report", "history", "start")}}
    return [section.to_dict() for section in METHODS[compressed["method"]].sections(facts)]


def reference_of(dense: Vit, relative_to: str) -> Cost:
    """What the shares of a budget refer to: this model, or the first one that it descends from. Raises ConfigError."""
    if relative_to == "given" or not dense.selection.steps:
        return cost(dense)  # a model that was never cut is its own original
    original = dense.provenance.get("original")
    if not original:
        raise ConfigError(
            "relative_to='original': the model does not say what it was cut from. Pass relative_to='given', or absolute limits "
            "(max_macs, max_params)."
        )
    return cost(ModelSpec.from_dict(original["spec"]))


def blind(spec: ModelSpec) -> bool:
    """Whether what is read can depend on no patch: only prefix tokens are, and no attention is left."""
    return spec.pool.kind == "cls" and all(block.attention is None for block in spec.blocks)


def may_have_tail(spec: ModelSpec, config: MethodConfig) -> bool:
    """Whether the exact tail applies, the last block is not frozen, and the method's axes, if it has some, do not leave it out."""
    if "tail" not in (getattr(config, "axes", None) or ("tail",)):
        return False
    held = {block for block, _ in frozen(spec, config.freeze)}
    return surgery.allows_exact_tail(spec) and len(spec.blocks) - 1 not in held


def with_tail(config: MethodConfig, *, wanted: bool) -> MethodConfig:
    """A method's config that adds no exact tail of its own where none is wanted."""
    if wanted or not hasattr(config, "exact_tail"):
        return config
    without: dict[str, Any] = {"exact_tail": False}
    return dataclasses.replace(config, **without)


def limited(config: MethodConfig, reference: Cost) -> MethodConfig:
    """A method's config with its shares turned into absolute limits: an exact tail comes before the method and changes
    what a share would mean.
    """
    return config if config.budget is None else dataclasses.replace(config, budget=config.budget.absolute(reference))


def _next_commands(name: str, data: str, classifies: bool) -> list[dict[str, str]]:
    rows = [
        {"does": "Use it in Python", "command": f'import vitrim\nmodel = vitrim.load("{name}")'},
        {"does": "Look at the cost of each block", "command": f"vitrim cost {name}"},
    ]
    if classifies:
        rows += [
            {
                "does": "Score it on images that no choice was made on",
                "command": f"vitrim evaluate {name} --data {data} --split test",
            },
            {"does": "Try it on a picture of your own", "command": f"vitrim predict {name} cat.jpg"},
        ]
    return rows


def _name_of(model: str | Path | Vit) -> str:
    """What was asked for, without the folders that it lies in."""
    if isinstance(model, Vit):
        return str(model.provenance.get("source") or "a model in memory")
    text = str(model)
    return Path(text).resolve().name if Path(text).exists() else text
