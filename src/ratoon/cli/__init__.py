"""The command line: one module for each group of verbs. `main` is the program `ratoon`."""

from ratoon.cli.app import main

__all__ = ["main"]
