"""`run`: one call from a dense model to a folder with a smaller one and a report about it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vitrim import artifact, processes, reporting
from vitrim import data as opened
from vitrim.checkpoints import replace_text
from vitrim.errors import ConfigError, VitrimError
from vitrim.files import locked
from vitrim.methods import compress as compress_by
from vitrim.methods.method import MethodConfig
from vitrim.model import Vit
from vitrim.pipeline.configs import EvaluateConfig, MeasureConfig, RecoverConfig
from vitrim.pipeline.folder import Folder, check_place, written_or_said
from vitrim.pipeline.forecast import forecast, later
from vitrim.pipeline.job import Asked, Job, name_of
from vitrim.pipeline.reference import dense_of
from vitrim.pipeline.stages import STAGES, final
from vitrim.pipeline.summary import summary
from vitrim.progress import Progress
from vitrim.result import Compressed
from vitrim.spec import ModelSpec, sides

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
    image_px: int | tuple[int, int] | None = None,
    on_broken: str = "raise",
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
    image_px: size of the images that the network is for, as in `vitrim.load`: the budget counts there. None: the model's own.
    on_broken: "raise" stops at an image that cannot be read, "skip" leaves it out and says so.
    resume: go on at the first stage that has no result.  force: replace the run in `out`.
    compressor: called as `vitrim.compress`; a family's has done the work for all members.
    A bad input, an unreachable budget or a dense model that guesses is refused before anything is written.
    """
    if relative_to not in ("given", "original"):
        raise ConfigError(f"relative_to={relative_to!r}; expected 'given' or 'original'.")
    if processes.count() > 1:
        raise ConfigError(
            "run: the whole job runs in one process, and torchrun started several. Start it without torchrun, or call "
            "vitrim.compress and vitrim.recover, whose training shares its batches over the processes."
        )
    place = Path(out)
    check_place(place, resume=resume, force=force)
    with locked(place):
        folder = Folder(place, resume=resume, force=force)
        asked = Asked(
            name=name_of(model),
            dense=dense_of(model, image_px),
            image_px=None if image_px is None else sides(image_px),
            config=method_config,
            data=opened.skipping(data, on_broken),
            recovery=recover,
            target=measure,
            judging=evaluate,
            relative_to=relative_to,
            tail=exact_tail,
            init=init,
            compressor=compressor,
        )
        job = Job(asked, folder, progress)
        try:
            with written_or_said(folder.out):
                return _through_all_stages(job)
        except VitrimError:
            if folder.forget_what_is_worth_nothing():
                log.warning(
                    "What was done is kept in %s: once mended, the same command with resume (--resume) goes on from there; "
                    "with force (--force) it starts anew.",
                    folder.out.name,
                )
            raise


def _through_all_stages(job: Job) -> RunResult:
    """Each stage whose result is not there yet, in order."""
    folder, redone = job.folder, []
    found: dict[str, dict[str, Any]] = {}
    foretold = {} if job.progress is None else forecast(job)  # first: a broken image leaves nothing behind
    folder.begin(job.record())
    for index, (name, stage) in enumerate(STAGES.items()):
        if job.progress is not None:
            job.progress("stages", index, len(STAGES), now=name, **later(foretold, name))
        found[name], done = folder.stage(name, lambda stage=stage: stage(job, found))  # type: ignore[misc]
        redone += [name] if done else []
    told = summary(job, found, final(job).spec)
    replace_text(folder.out / reporting.SUMMARY, reporting.as_text(told))
    if job.progress is not None:
        job.progress("stages", len(STAGES), len(STAGES))
    return RunResult(
        model=artifact.load(folder.out),
        folder=folder.out,
        report=folder.out / "report.html",
        summary=told,
        redone=tuple(redone),
    )
