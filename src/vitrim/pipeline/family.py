"""`run_family`: one dense model, several budgets, one folder for each, and a page that compares them.

OUT/keep_macs-0.7/, OUT/keep_macs-0.5/, ...   an ordinary run each, an artifact with its own report
OUT/family.json                               the members' figures, for programs
OUT/report.html                               accuracy against operations and against measured time
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vitrim import checkpoints, methods, reporting
from vitrim.budget import Budget
from vitrim.checkpoints import replace_text
from vitrim.errors import ConfigError
from vitrim.files import is_marked, locked, names_in, refuse_foreign
from vitrim.methods.method import MethodConfig
from vitrim.model import Vit
from vitrim.pipeline.folder import check_place, written_or_said
from vitrim.pipeline.reference import dense_of, given_spec, reference_of
from vitrim.pipeline.running import RunResult, run
from vitrim.progress import Progress
from vitrim.result import Compressed


@dataclass(frozen=True, kw_only=True)
class FamilyResult:
    """What a family run made. summary: as `vitrim.reporting.family` describes it."""

    folder: Path
    report: Path
    members: tuple[RunResult, ...]
    summary: dict[str, Any]


def run_family(
    model: str | Path | Vit,
    method_config: MethodConfig,
    budgets: Sequence[Budget],
    *,
    data: Any,
    out: str | Path,
    resume: bool = False,
    force: bool = False,
    progress: Progress | None = None,
    **settings: Any,
) -> FamilyResult:
    """One `run` for each budget, in OUT/NAME; what the method can score once for all of them is scored once.

    method_config: its own budget does not count.  settings: as for `run`.  resume: members that are whole stay.
    Raises as `run` does, before anything is written where one of the budgets is out of reach.
    """
    if strange := [budget for budget in budgets if not isinstance(budget, Budget)]:
        raise ConfigError(f"budgets: {strange[0]!r}; expected each a Budget, such as Budget(keep_macs=0.5).")
    if len(budgets) < 2 or len({member_name(budget) for budget in budgets}) < len(budgets):
        raise ConfigError(f"budgets={tuple(b.to_dict() for b in budgets)!r}; expected two or more different ones.")
    folder = Path(out)
    check_place(folder, resume=resume, force=force)
    with locked(folder):
        check_place(folder, resume=resume, force=force)
        return _run_family(
            model,
            method_config,
            budgets,
            data=data,
            folder=folder,
            resume=resume,
            force=force,
            progress=progress,
            **settings,
        )


def _run_family(
    model: str | Path | Vit,
    method_config: MethodConfig,
    budgets: Sequence[Budget],
    *,
    data: Any,
    folder: Path,
    resume: bool,
    force: bool,
    progress: Progress | None,
    **settings: Any,
) -> FamilyResult:
    scoring = folder / "scoring"
    made = [name for name in (reporting.family.SUMMARY, "report.html") if (folder / name).exists()]
    refuse_foreign(folder, ours=is_marked(folder / reporting.family.SUMMARY), taken=made)
    refuse_foreign(scoring, ours=checkpoints.are_in(scoring), taken=names_in(scoring))
    dense = dense_of(model, settings.get("image_px"))
    reference = reference_of(dense, settings.get("relative_to", "given"))
    asked = [budget.of(reference) for budget in budgets]
    method = methods.method_of(method_config)
    wanted = settings.get("exact_tail", True)
    method_config = method_config if wanted else method_config.without_tail()
    spec = given_spec(dense.spec, method_config, wanted=wanted)
    for limit in asked:
        methods.plan(method, spec, replace(method_config, budget=limit))
    # with an init each member has a start of its own
    together = methods.METHODS[method].family is not None and settings.get("init") is None
    compressor = _for_all(tuple(asked), scoring) if together else methods.compress
    if not resume:
        shutil.rmtree(scoring, ignore_errors=True)  # of a killed run that this one replaces
    members = []
    for index, budget in enumerate(budgets):
        place = folder / member_name(budget)
        begun = (place / "stages" / "config.json").is_file()
        if progress is not None:
            progress("family", index, len(budgets), now=place.name)
        how: dict[str, Any] = {
            "out": place,
            "resume": resume and begun,
            "force": force and place.is_dir(),
            "compressor": compressor,
        }
        own = replace(method_config, budget=budget)
        members.append(run(model, own, data=data, progress=progress, **how, **settings))
    summary = reporting.family.summary({m.folder.name: m.summary for m in members}, name=folder.resolve().name)
    with written_or_said(folder):
        shutil.rmtree(scoring, ignore_errors=True)
        replace_text(folder / reporting.family.SUMMARY, reporting.as_text(summary))
        reporting.write_page(reporting.family.render(summary), folder / "report.html")
    return FamilyResult(folder=folder, report=folder / "report.html", members=tuple(members), summary=summary)


def member_name(budget: Budget) -> str:
    """The folder of one member: its limits and their values."""
    return "_".join(f"{limit}-{value:g}" for limit, value in budget.to_dict().items())


def _for_all(budgets: tuple[Budget, ...], folder: Path) -> Callable[..., Compressed]:
    """`vitrim.compress` for members of one family: the method runs for all budgets when the first is asked for."""
    made: dict[Budget | None, Compressed] = {}

    def compressor(model: Vit, config: MethodConfig, **how: Any) -> Compressed:
        if not made:
            how |= {"folder": folder, "resume": folder.is_dir()}
            made.update(zip(budgets, methods.compress_family(model, config, budgets, **how), strict=True))
        return made[config.budget]

    return compressor
