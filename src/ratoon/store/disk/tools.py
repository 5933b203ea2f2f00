"""The programs that read and write disks, in a cell: a broken QEMU may have made what they read."""

from __future__ import annotations

import os
import shutil
from functools import cache
from pathlib import Path

from ratoon.errors import HostError
from ratoon.jail.cell import Cell
from ratoon.jail.errand import Errand
from ratoon.jail.steps import FILES
from ratoon.jail.tree import tree

PROGRAMS = ("qemu-img", "mke2fs", "e2fsck", "debugfs")
#: What mke2fs loads to read tarballs, and what it takes for names that are not ASCII.
_LIBRARIES = [f"usr/lib*/{below}libarchive.so.13" for below in ("", "*/")]
_FILES = (Path("/etc/mke2fs.conf"), Path("/usr/lib/locale/C.utf8/LC_CTYPE"))
_ENVIRONMENT = {"LC_ALL": "C.UTF-8"}


def tool(name: str, longest: int) -> Errand:
    """One run of one of PROGRAMS; no file gets longer by it than `longest` bytes.

    HostError: it is not installed, or this host can make no cell.
    """
    return Errand(disk_cell(), _path(name), longest, _ENVIRONMENT)


@cache
def _path(name: str) -> str:
    """Here, and in the cell."""
    found = shutil.which(name)
    if found is None:
        raise HostError(f"{name} is not installed; `ratoon setup` says how to have it")
    return os.path.realpath(found)


@cache
def disk_cell() -> Cell:
    """Made when it is first asked for; an upgrade of a package changes nothing for it."""
    libraries = [path for place in _LIBRARIES for path in Path("/").glob(place)]
    data = {str(path)[1:]: path for path in _FILES if path.exists()}
    return Cell(tree([*(Path(_path(name)) for name in PROGRAMS), *libraries], data, [f"{FILES}/"]))
