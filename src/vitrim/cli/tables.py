"""Results on stdout: tables for people, JSON for programs. Counts are scaled to G and M only here."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TextIO

import click

from vitrim.foreign import printable

if TYPE_CHECKING:
    from rich.console import Console

    from vitrim.counting import Cost
    from vitrim.methods.method import Needs
    from vitrim.spec import ModelSpec
    from vitrim.tasks.task import Metric

PLAIN_WIDTH = 120
"""Columns of a table that goes to a file or a pipe."""
LEAST_WIDTH = 40
"""Columns of a table on a terminal of fewer."""
LONG_WORD = 24
"""Columns beyond which a word may be taken apart: a file name."""


def say(text: str = "") -> None:
    """One line of result."""
    click.echo(shown(text, sys.stdout))


def note(text: str) -> None:
    """One line of log, on stderr."""
    click.echo(shown(text, sys.stderr), err=True)


def shown(text: str, stream: TextIO | None) -> str:
    """A text for a stream: without control bytes, and with escapes for what the stream's encoding has not.

    None: a stream that was closed, as Python has it, to which nothing is written.
    """
    return printable(text, ascii_only=stream is not None and not str(stream.encoding).lower().startswith("utf"))


def show_json(value: Any) -> None:
    """The whole result, keys sorted, on stdout; what a terminal would obey is escaped as JSON does it."""
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    lines = text.split("\n")  # JSON has line ends only between its values
    narrow = [line if shown(line, sys.stdout) == line else "".join(map(_in_json, line)) for line in lines]
    click.echo("\n".join(narrow))


def _in_json(char: str) -> str:
    return char if shown(char, sys.stdout) == char else json.dumps(char)[1:-1]


def console(*, stderr: bool = False, **settings: Any) -> Console:
    """Where rich draws: it reads neither markup nor emoji codes, since names come from outside."""
    from rich.console import Console

    return Console(stderr=stderr, markup=False, emoji=False, **settings)


def show_table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]], *, text: bool = False) -> None:
    """A table; the first column to the left, the others to the right unless they are text. NO_COLOR is honoured by rich.

    Words and numbers are never taken apart, nor left out: on a terminal that is too narrow, it is the terminal that breaks lines.
    """
    from rich.box import SIMPLE_HEAD
    from rich.cells import cell_len
    from rich.table import Table

    place = console()
    if not place.is_terminal:
        place = console(width=PLAIN_WIDTH)
    cells = [[shown(cell, sys.stdout) for cell in row] + [""] * (len(heads) - len(row)) for row in rows]
    columns = [(head, index == 0 or text, [row[index] for row in cells]) for index, head in enumerate(heads)]
    whole = sum(max(map(cell_len, [head, *held])) + 3 for head, _, held in columns) + 1
    narrow = not text and whole > place.width
    place.print(shown(title, sys.stdout), style="bold", soft_wrap=True)  # a table's own title is broken to its width
    table = Table(box=SIMPLE_HEAD, padding=(0, 0 if narrow else 1))
    needed = (1 if narrow else 3) * len(heads) + 1  # what stands between the columns
    for head, left, held in columns:
        words = head.split() + [part for cell in held for part in (cell.split() if left else [cell])]
        least = max(map(cell_len, words), default=1)
        needed += min(least, LONG_WORD) if left else least
        head = head.replace(" ", "\n") if narrow and not left else head
        table.add_column(head, justify="left" if left else "right", overflow="fold", no_wrap=not left)
    for row in cells:
        table.add_row(*row)
    if place.width < max(needed, LEAST_WIDTH):
        place = console(width=max(needed, LEAST_WIDTH))
    place.print(table)


def count_text(number: float) -> str:
    """A count for people: 4598882304 -> "4.599 G"."""
    for scale, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= scale:
            return f"{number / scale:.4g}{unit}"
    return f"{number:g}"


def share_text(part: float, whole: float) -> str:
    """A share in percent: (1, 2) -> "50.0 %"."""
    return f"{100 * part / whole:.1f} %" if whole else "-"


def percent_text(share: float | None) -> str:
    """An accuracy in percent; a dash where it is not known."""
    return "-" if share is None else f"{100 * share:.2f} %"


def counted_text(metric: Metric, value: float | None, count: int | None) -> str:
    """A figure as its metric is shown, with the number of images that it counts: "74.00 % (740/1000)"; a dash where it is not known."""
    if value is None:
        return "-"
    if metric.form != "percent":
        return f"{value:.4f}"
    share = percent_text(value)
    return f"{share} ({round(value * count)}/{count})" if metric.counted and count else share


def show_cost(name: str, spec: ModelSpec, cost: Cost, *, against: tuple[str, Cost] | None) -> None:
    """Cost per block and in total, with shares of the model it is compared with."""
    heads = ["block", "tokens", "heads", "q/k", "v", "MLP", "attention MACs", "MLP MACs", "MACs", "params"]
    rows = [["stem", "", "", "", "", "", "", "", count_text(cost.stem_macs), count_text(cost.stem_params)]]
    for block, part in zip(spec.blocks, cost.blocks, strict=True):
        attention, mlp = block.attention, block.mlp
        dims = [str(attention.heads), str(attention.qk_dim), str(attention.v_dim)] if attention else ["-", "-", "-"]
        tokens = str(part.tokens_in)
        if part.tokens_out != part.tokens_in:
            tokens += f" to {part.tokens_out}"
        rows.append(
            [str(part.index), tokens, *dims, mlp_text(mlp)]
            + [count_text(n) for n in (part.attention_macs, part.mlp_macs, part.macs, part.params)]
        )
    rows.append(["head", "", "", "", "", "", "", "", count_text(cost.head_macs), count_text(cost.head_params)])
    show_table(f"{name}, {size_text(spec)}", heads, rows)
    say(f"MACs         {cost.macs:,} ({count_text(cost.macs)}; the papers' FLOPs)")
    if cost.padding_macs:
        say(
            f"padding      {cost.padding_macs:,} more ({share_text(cost.padding_macs, cost.macs)}): the zeros that fill the narrower of query/key and value "
            "heads, which torch's counter counts and a budget does not"
        )
    say(f"parameters   {cost.params:,} ({count_text(cost.params)})")
    say(f"memory       {cost.memory_bytes / 1e6:.1f} MB (weights and peak activations at batch 1, estimated)")
    say(f"file         {cost.file_bytes / 1e6:.1f} MB (float32)")
    if any(spec.unread_px):
        down, right = spec.unread_px
        say(f"not read     {down} px at the bottom and {right} px at the right, which no patch covers")
    if against is not None:
        other, dense = against
        say(
            f"against      {other}: {share_text(cost.macs, dense.macs)} of its MACs, {share_text(cost.params, dense.params)} of its parameters"
        )


def size_text(spec: ModelSpec) -> str:
    """At which image size a network runs: "224 x 224 px"."""
    return f"{spec.image_px[0]} x {spec.image_px[1]} px"


def number_of(count: int, what: str) -> str:
    """A count and its word: "1 step", "20 steps"."""
    return f"{count} {what}{'' if count == 1 else 's'}"


def needs_text(needs: Needs) -> str:
    """What a method needs: "256 images, labels, training"."""
    found = {f"{needs['images']} images": needs["images"], "labels": needs["labels"], "training": needs["training"]}
    return ", ".join(word for word, needed in found.items() if needed) or "nothing"


def value_text(value: Any) -> str:
    """A default as one would type it."""
    if isinstance(value, list):
        return ",".join(map(str, value))
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def mlp_text(mlp: Any) -> str:
    """Hidden units and the ranks of both linears: "1536", or "1536 (r 96/64)"."""
    if mlp is None:
        return "-"
    if mlp.fc1_rank is None and mlp.fc2_rank is None:
        return str(mlp.hidden)
    return f"{mlp.hidden} (r {mlp.fc1_rank or '-'}/{mlp.fc2_rank or '-'})"


def flat(values: Mapping[str, Any]) -> list[list[str]]:
    """Rows of name and value; lists become comma-separated, None a dash."""
    rows = []
    for key, value in values.items():
        text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else "-" if value is None else str(value)
        rows.append([key.replace("_", " "), text or "none"])
    return rows
