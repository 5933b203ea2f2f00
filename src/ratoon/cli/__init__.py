"""The command line: one module for each group of verbs. `program` is `ratoon`."""

from ratoon.cli.app import main, program

__all__ = ["main", "program"]
