"""File systems in files: made by mke2fs from a directory, changed by debugfs. Needs no root."""

from __future__ import annotations

import subprocess
from pathlib import Path

from ratoon.store.disk.ext4 import Ext4
from ratoon.store.disk.tree import Tree, read_tree
from ratoon.units import MIB


def make_file_system(path: Path, root: Path, *options: str, size: int = 16 * MIB) -> Path:
    with path.open("xb") as file:
        file.truncate(size)
    kind = [] if "-t" in options else ["-t", "ext4"]
    _run("mke2fs", "-q", "-F", *kind, *options, "-d", str(root), str(path))
    return path


def debugfs(path: Path, *requests: str) -> str:
    """What debugfs answers to requests, which may write."""
    lines = "\n".join([*requests, "quit", ""])
    return _run("debugfs", "-w", "-f", "-", str(path), stdin=lines)


def tree_of(path: Path) -> Tree:
    with Ext4(path, "the disk") as system:
        return read_tree(system)


def _run(*command: str, stdin: str = "") -> str:
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, check=True)
    return done.stdout
