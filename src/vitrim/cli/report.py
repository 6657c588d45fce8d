"""`vitrim report`: the page about a run."""

from __future__ import annotations

from pathlib import Path

import click

from vitrim.cli import options
from vitrim.errors import ConfigError
from vitrim.files import is_marked, refuse_foreign


@click.command()
@click.argument("folder", type=options.PLACE)
@click.option("--out", type=options.PLACE, metavar="FILE", help="Instead of report.html in FOLDER.")
@options.OUTPUT
def report(folder: Path, out: Path | None, output: options.Output) -> None:
    """Write the page about a finished run: one file, no network.

    vitrim report small/
    """
    place = out or folder / "report.html"
    if place.is_dir():
        raise ConfigError(f"--out {str(place)!r} is a folder; expected a file, such as report.html.")
    from vitrim.reporting import is_page, write

    records = ("provenance.json", "family.json", "stages/config.json")
    run = out is None and any(is_marked(folder / name) for name in records)  # pages of before say nothing of themselves
    refuse_foreign(place, ours=run or is_page(place))
    written = write(folder, place)
    output.tell({"report": str(written)}, f"wrote {written}; open it in a browser")
