"""`vitrim doctor`: what is installed here."""

from __future__ import annotations

import click

from vitrim.cli import options, tables


@click.command()
@options.OUTPUT
def doctor(output: options.Output) -> None:
    """Show versions, processor features, compiler and extras."""
    from vitrim.doctor import examine

    found = examine()
    if output.as_json:
        tables.show_json(found)
        return
    tables.say(f"vitrim {found['vitrim']}, Python {found['python']}, {found['system']}")
    tables.show_table("packages", ["package", "version"], tables.flat(found["packages"]))
    tables.show_table("processor", ["", "found"], tables.flat(found["processor"]))
    tables.say(f"accelerators  {', '.join(found['accelerators']) or 'none'}")
    tables.say(f"compiler      {found['compiler'] or 'none found'}")
    tables.say(f"2 processes   {found['processes']}")
    for name, extra in found["extras"].items():
        state = "found" if extra["found"] else f"missing {', '.join(extra['missing'])}"
        tables.say(f"extra {name:<8}{state} ({extra['for']})")
    for line in found["advice"]:
        tables.note(line)
