"""The terminal, for what needs more than lines: tables, colours, progress bars."""

from __future__ import annotations

from rich.console import Console

#: Progress and errors go to stderr, so that stdout is the answer alone.
notes = Console(stderr=True)
answers = Console()
