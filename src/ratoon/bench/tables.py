"""What a bench says: tables, and targets with what was measured for each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

from rich.console import Console
from rich.table import Table as RichTable


@dataclass(frozen=True)
class Table:
    """Cells are text; all columns but the first `names` are figures."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    #: The CSV files that it is made from, without `.csv`.
    sources: tuple[str, ...]
    names: int = 1


@dataclass(frozen=True)
class Target:
    """A figure that should hold, mostly a ratio within one run; from the CSV file `source`."""

    what: str
    measured: float
    sense: Literal["≤", "≥"]
    limit: float
    source: str

    @property
    def met(self) -> bool:
        return self.measured <= self.limit if self.sense == "≤" else self.measured >= self.limit

    @property
    def cells(self) -> tuple[str, str, str, str]:
        """What, target, measured, met."""
        met = "yes" if self.met else "**no**"
        return self.what, f"{self.sense} {self.limit:g}", f"{self.measured:.4g}", met


def spread(values: Iterable[float], digits: int = 1) -> str:
    """The median, and the least and the most: `71.0 (68.2…90.3)`."""
    found = sorted(values)
    if len(found) == 1:
        return f"{found[0]:,.{digits}f}"
    return f"{median(found):,.{digits}f} ({found[0]:,.{digits}f}…{found[-1]:,.{digits}f})"


def markdown(table: Table) -> str:
    """As a table of Markdown, without its title."""
    rule = ["---" if number < table.names else "---:" for number in range(len(table.columns))]
    return "\n".join(_line(cells) for cells in (table.columns, rule, *table.rows)) + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def show(console: Console, tables: Sequence[Table], targets: Sequence[Target]) -> None:
    """Print them."""
    for table in tables:
        drawn = RichTable(title=table.title, title_justify="left", box=None, pad_edge=False)
        for number, name in enumerate(table.columns):
            drawn.add_column(name, justify="left" if number < table.names else "right")
        for row in table.rows:
            drawn.add_row(*row)
        console.print(drawn, highlight=False)
        console.print()
    if targets:
        drawn = RichTable(box=None, pad_edge=False)
        for name in ("what", "target", "measured", "met"):
            drawn.add_column(name, justify="left" if name == "what" else "right")
        for target in targets:
            what, limit, measured, _ = target.cells
            style = "green" if target.met else "red"
            met = "yes" if target.met else "no"
            drawn.add_row(what, limit, f"[{style}]{measured}[/]", f"[{style}]{met}[/]")
        console.print(drawn, highlight=False)
