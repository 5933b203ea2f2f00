"""The command line: one module for each group of verbs. `main` is the program `ratoon`."""

from ratoon.cli import chains, check, packs, serve, snapshots, system
from ratoon.cli.app import main

__all__ = ["chains", "check", "main", "packs", "serve", "snapshots", "system"]
