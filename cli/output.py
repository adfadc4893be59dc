"""Results on stdout: one JSON document, or text and tables that neither cut names nor colour a pipe."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import click

from .. import canonical
from ..errors import escape


def print_json(record: object) -> None:
    """The one document of a command with ``--json``."""
    click.echo(canonical.dumps(record), nl=False)


def print_line(text: str) -> None:
    """One line of text, with the control characters of a checkpoint's names escaped and nothing cut."""
    click.echo(escape(text, limit=len(text) * 10))


def print_table(head: Sequence[str], cells: Sequence[Sequence[str]]) -> None:
    """A table: rich at a terminal, aligned columns elsewhere."""
    rows = [[escape(cell, limit=len(cell) * 10) for cell in row] for row in cells]
    if sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb":
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
        for name in head:
            table.add_column(name, overflow="fold")
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        Console().print(table)
        return
    widths = [max(len(line[column]) for line in (head, *rows)) for column in range(len(head))]
    for line in (head, *rows):
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
