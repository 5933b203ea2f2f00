"""The terminal, for what needs more than lines: tables, colours, progress bars."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

#: Progress and errors go to stderr, so that stdout is the answer alone.
notes = Console(stderr=True)
answers = Console()

#: Columns where no terminal says how many there are: rows stay whole for the next program.
_WIDE = 1000


def columns(*names: str) -> Table:
    """A table that is to be filled, and shown."""
    table = Table(box=None, pad_edge=False)
    for name in names:
        table.add_column(name, overflow="fold")
    return table


def show(table: Table) -> None:
    (answers if answers.is_terminal else Console(width=_WIDE)).print(table)
