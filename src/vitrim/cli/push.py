"""`vitrim push`: a saved folder to the Hub."""

from __future__ import annotations

from pathlib import Path

import click

from vitrim.cli import options


@click.command()
@click.argument("folder", type=options.PLACE)
@click.argument("repo", metavar="USER/NAME")
@click.option("--include-report", is_flag=True, help="Send report.html too.")
@options.OUTPUT
def push(folder: Path, repo: str, include_report: bool, output: options.Output) -> None:
    """Send a saved FOLDER to the Hugging Face Hub.

    Uses the login of `hf auth login`. vitrim push small/ me/deit-small-half
    """
    from vitrim.hub import push as send

    url = send(folder, repo, include_report=include_report)
    output.tell({"repo": repo, "url": str(url)}, f"pushed {folder} to {url}")
