"""Verbs that look at a model or hand it over, and train nothing: cost, plan, export, push, doctor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vitrim.cli import options, tables
from vitrim.errors import ArtifactError, BudgetError, ConfigError

if TYPE_CHECKING:
    from vitrim.budget import Budget
    from vitrim.model import Vit
    from vitrim.spec import ModelSpec

TABLES = ("timm", "torchvision", "t2t")
"""Families whose named models stand in tables, so that nothing else is imported for them."""
BUILT_IN = Path(__file__).parents[1] / "assets" / "models"


def spec_named(name: str) -> ModelSpec:
    """The spec of a model by name or folder; torch is imported only where no table and no file says it."""
    family, _, rest = name.partition(":")
    if family in TABLES:
        from vitrim import architectures

        known = architectures.spec(rest, family=family)
        if known is not None:
            return known
    if family == "hf":
        from vitrim.sources import describe

        return describe(rest)
    folder = BUILT_IN / rest if family == "builtin" else Path(name)
    if (folder / "config.json").is_file():
        return spec_in(folder / "config.json")
    from vitrim.sources import load

    return load(name, pretrained=False).spec


def spec_in(file: Path) -> ModelSpec:
    """The spec in an artifact's config.json."""
    from vitrim.spec import Config

    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ArtifactError(
            f"{str(file)!r} is not JSON ({error}). Expected the config.json of a folder that vitrim saved."
        ) from error
    if not isinstance(values, dict) or "spec" not in values:
        raise ArtifactError(
            f"{str(file)!r} holds no spec, so {file.parent.name!r} was not saved by vitrim. "
            "Expected such a folder; a checkpoint of timm is read with timm:NAME and --checkpoint PATH."
        )
    return Config.from_dict(values).spec


@click.command()
@click.argument("model")
@click.option("--against", metavar="MODEL", help="Give shares of this model's cost too.")
@options.OUTPUT
def cost(model: str, against: str | None, as_json: bool, quiet: bool) -> None:
    """Count MODEL's operations and parameters, per block.

    Needs no weights: vitrim cost timm:deit_small_patch16_224
    """
    from vitrim.counting import cost as count

    spec = spec_named(model)
    counted = count(spec)
    dense = None if against is None else (against, count(spec_named(against)))
    if as_json:
        values = {"model": model, **counted.to_dict()}
        if dense is not None:
            values["against"] = {"model": dense[0], "macs": dense[1].macs, "params": dense[1].params}
        tables.show_json(values)
    else:
        tables.show_cost(model, spec, counted, against=dense)


@click.command()
@click.option("--model", required=True, metavar="MODEL", help="What to cut; only its shape is needed.")
@click.option("--method", metavar="NAME[,NAME...]", help="Only these methods; all that exist by default.")
@options.VARIANT
@options.BUDGET
@click.option("--freeze", metavar="PARTS", help="Parts to keep as they are: blocks.0-2,blocks.11.attention.")
@click.option("--data", metavar="DATA", help="Images: say what auto would cut at each budget, and at what loss.")
@click.option("--images", type=click.IntRange(min=1), help="How many of them; 256 by default.")
@options.PLANNED_BY
@options.SOURCE
@options.DEVICE
@options.SEED
@options.OUTPUT
def plan(
    model: str,
    method: str | None,
    variant: str | None,
    freeze: str | None,
    data: str | None,
    images: int | None,
    axes: str | None,
    score: str | None,
    checkpoint: Path | None,
    no_pretrained: bool,
    no_verify: bool,
    device: str | None,
    seed: int | None,
    as_json: bool,
    quiet: bool,
    **limits: Any,
) -> None:
    """Say what each method would reach, cost and need; train nothing.

    With --data, also what the method auto expects of each budget, from the images, before anything is built.

    vitrim plan --model timm:deit_small_patch16_224 --keep-macs 0.9,0.7,0.5
    """
    names = options.METHODS if method is None else tuple(name.strip() for name in method.split(","))
    for name in names:
        options.check_method(name)
    if variant is not None:
        names = names if method is not None else tuple(name for name in names if variant in options.VARIANTS[name])
        for name in names or options.METHODS[:1]:
            options.check_variant(variant, name)
    budgets = options.Limits(**limits).budgets()
    if data is not None:
        network = options.load_model(model, checkpoint=checkpoint, no_pretrained=no_pretrained, no_verify=no_verify)
        wanted = options.given(
            {
                "freeze": options.parts(freeze),
                "images": images,
                "axes": options.parts(axes),
                "score": score,
                "device": options.device_named(device),
                "seed": seed,
            }
        )
        show_predictions(
            model, method or "auto", predicted(network, method or "auto", budgets, data, wanted, quiet), as_json
        )
        return
    if no_pretrained or any(value is not None for value in (checkpoint, images, axes, score, device, seed)):
        raise click.UsageError(
            "--checkpoint, --no-pretrained, --images, --axes, --score, --device and --seed go with --data; without it only the shape counts."
        )
    spec = spec_named(model)
    given = options.given({"variant": variant, "freeze": options.parts(freeze)})
    rows = [planned(name, spec, budget, given) for budget in budgets for name in names]
    if as_json:
        from vitrim.counting import cost as count

        whole = count(spec)
        tables.show_json({"model": model, "macs": whole.macs, "params": whole.params, "plans": rows})
        return
    heads = ["method", "budget", "asks MACs", "asks params", "reaches MACs", "reaches params", "needs", "within reach"]
    tables.show_table(f"{model}: what each method would reach", heads, [plan_row(row) for row in rows])
    for row in rows:
        if row["refused"]:
            tables.note(row["refused"])


def predicted(
    network: Vit, method: str, budgets: list[Budget], data: str, settings: dict[str, Any], quiet: bool
) -> list[dict[str, Any]]:
    """What the method expects of each budget, from images."""
    from vitrim.cli.progress import progress_on_stderr
    from vitrim.methods import METHODS, configure

    predict = METHODS[method].predict
    if predict is None:
        known = ", ".join(name for name, other in METHODS.items() if other.predict is not None)
        raise click.UsageError(f"--data: method {method!r} cannot say it before building; expected {known}.")
    config = configure(method, settings)
    refused = {budget: out_of_reach(network.spec, method, config, budget) for budget in budgets}
    open_ = [budget for budget in budgets if refused[budget] is None]
    if not open_:
        raise BudgetError(str(refused[budgets[0]]))
    with progress_on_stderr(quiet) as progress:
        rows = iter(predict(network, config, open_, data=data, progress=progress))
    return [
        next(rows) if refused[budget] is None else {"budget": budget.to_dict(), "refused": refused[budget]}
        for budget in budgets
    ]


def out_of_reach(spec: ModelSpec, method: str, config: Any, budget: Budget) -> str | None:
    """Why the method cannot meet the budget; None where it can."""
    from dataclasses import replace

    from vitrim.methods import plan as plan_of

    try:
        plan_of(method, spec, replace(config, budget=budget))
    except BudgetError as error:
        return str(error)
    return None


def show_predictions(model: str, method: str, rows: list[dict[str, Any]], as_json: bool) -> None:
    """A row for each budget: predicted divergence, stream, and what each block would keep."""
    if as_json:
        tables.show_json({"model": model, "method": method, "predictions": rows})
        return
    body = []
    for row in rows:
        budget = ", ".join(f"{name} {value:g}" for name, value in row["budget"].items())
        if "refused" in row:
            body.append([budget, "out of reach", *[""] * 5])
            continue
        now, was = row["width"]
        tokens = [f"{step['kind']} in block {step['block']}" for step in row["steps"]]
        tokens += ["exact tail"] if row["exact_tail"] else []
        blocks = "  ".join(f"{b['qk'][0]}/{b['v'][0]}/{b['hidden'][0]}" for b in row["blocks"])
        body.append(
            [
                budget,
                tables.count_text(row["macs"]),
                tables.count_text(row["params"]),
                f"{row['predicted_kl']:.2g}",
                f"{now} of {was}",
                ", ".join(tokens) or "all kept",
                blocks,
            ]
        )
    heads = ["budget", "MACs", "params", "predicted loss", "stream", "tokens", "blocks: q/k rank / v rank / MLP units"]
    tables.show_table(f"{model}: what {method} expects (divergence of the outputs from the dense ones)", heads, body)
    for row in rows:
        if "refused" in row:
            tables.note(row["refused"])


def planned(name: str, spec: ModelSpec, budget: Budget, given: dict[str, Any]) -> dict[str, Any]:
    """One method at one budget; out of reach is an answer here, not a failure."""
    from vitrim.counting import cost as count
    from vitrim.methods import configure
    from vitrim.methods import plan as plan_of
    from vitrim.pipeline.running import may_have_tail
    from vitrim.surgery import with_exact_tail

    row: dict[str, Any] = {
        "method": name,
        "budget": budget.to_dict(),
        "limits": budget.limits(count(spec)),
        "refused": None,
    }
    loose = configure(name, {"budget": type(budget)(keep_macs=1.0), **given})
    if may_have_tail(spec, loose):  # as `compress` does; shares refer to the model as it is
        budget, spec = budget.absolute(count(spec)), with_exact_tail(spec)
    try:
        return row | plan_of(name, spec, configure(name, {"budget": budget, **given}))
    except BudgetError as error:
        return row | plan_of(name, spec, loose) | {"refused": str(error)}


def plan_row(row: dict[str, Any]) -> list[str]:
    """A plan as a row of the table."""

    def reach(name: str) -> str:
        low, high = row["range"][name]
        return f"{tables.count_text(low)} to {tables.count_text(high)}"

    asks = [tables.count_text(row["limits"][name]) if name in row["limits"] else "-" for name in ("macs", "params")]
    needs = row["needs"]
    wanted = [f"{needs['images']} images"] if needs["images"] else []
    wanted += [word for word in ("labels", "training") if needs[word]]
    budget = ", ".join(f"{name} {value:g}" for name, value in row["budget"].items())
    return [
        f"{row['method']} ({row['variant']})",
        budget,
        *asks,
        reach("macs"),
        reach("params"),
        ", ".join(wanted) or "nothing",
        "no" if row["refused"] else "yes",
    ]


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("repo", metavar="USER/NAME")
@click.option("--include-report", is_flag=True, help="Send report.html too.")
@options.OUTPUT
def push(folder: Path, repo: str, include_report: bool, as_json: bool, quiet: bool) -> None:
    """Send a saved FOLDER to the Hugging Face Hub.

    Uses the login of `hf auth login`. vitrim push small/ me/deit-small-half
    """
    from vitrim.hub import push as send

    url = send(folder, repo, include_report=include_report)
    if as_json:
        tables.show_json({"repo": repo, "url": str(url)})
    else:
        tables.say(f"pushed {folder} to {url}")


@click.command()
@click.argument("model")
@click.option(
    "--format",
    "kind",
    type=options.Named("timm", "hf", "torchvision", "t2t"),
    required=True,
    help="Whose checkpoint: timm (local-dir:), hf (from_pretrained), torchvision or t2t (a state dict).",
)
@click.option("--out", type=click.Path(path_type=Path), required=True, metavar="PLACE", help="Folder or file to make.")
@options.FORCE
@options.SOURCE
@options.OUTPUT
def export(
    model: str,
    kind: str,
    out: Path,
    force: bool,
    checkpoint: Path | None,
    no_pretrained: bool,
    no_verify: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Write MODEL as another library's own checkpoint, with the same answers.

    Where that library cannot say the model, the block in the way is named. vitrim export small/ --format timm --out for-timm/
    """
    from vitrim.sources import write

    if out.exists() and not force:
        raise ConfigError(f"--out {str(out)!r} is there already. Pass --force to replace it, or choose another name.")
    options.check_place(out)
    place = write(
        options.load_model(model, checkpoint=checkpoint, no_pretrained=no_pretrained, no_verify=no_verify),
        kind,
        out,
        force=force,
    )
    if as_json:
        tables.show_json({"format": kind, "out": str(place)})
    else:
        tables.say(f"wrote {place} for {kind}")


@click.command()
@options.OUTPUT
def doctor(as_json: bool, quiet: bool) -> None:
    """Show versions, processor features, compiler and extras."""
    from vitrim.doctor import examine

    found = examine()
    if as_json:
        tables.show_json(found)
        return
    tables.say(f"vitrim {found['vitrim']}, Python {found['python']}, {found['system']}")
    tables.show_table("packages", ["package", "version"], tables.flat(found["packages"]))
    tables.show_table("processor", ["", "found"], tables.flat(found["processor"]))
    tables.say(f"accelerators  {', '.join(found['accelerators']) or 'none'}")
    tables.say(f"compiler      {found['compiler'] or 'none found'}")
    for name, extra in found["extras"].items():
        state = "found" if extra["found"] else f"missing {', '.join(extra['missing'])}"
        tables.say(f"extra {name:<8}{state} ({extra['for']})")
    for line in found["advice"]:
        tables.note(line)
