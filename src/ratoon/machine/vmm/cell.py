"""QEMU's cell: what it needs of its package, and what it may use of the host."""

from __future__ import annotations

import os
import shutil
from functools import cache
from pathlib import Path

from ratoon.artifacts import run
from ratoon.errors import HostError
from ratoon.jail.cell import Cell
from ratoon.jail.tree import tree
from ratoon.machine.vmm import command
from ratoon.machine.vmm.given_files import PLACES

#: What it loads for the one kind of machine that it is: firmware, and how a kernel is booted.
_ROMS = (
    *("bios-microvm.bin", "qboot.rom"),
    *("kvmvapic.bin", "linuxboot.bin", "linuxboot_dma.bin", "pvh.bin"),
)
#: Where distributions put accelerators that are not linked into it, and where they are in the cell.
_MODULES = [f"usr/lib*/{below}qemu/accel-*-x86_64.so" for below in ("", "*/")]
_MODULES_WITHIN = "/lib/qemu"
ENVIRONMENT = {"QEMU_MODULE_DIR": _MODULES_WITHIN}


@cache
def binary() -> str:
    """QEMU's path, here and in the cell. HostError: it is not installed."""
    found = shutil.which(command.BINARY)
    if found is None:
        raise HostError(f"{command.BINARY} is not installed; `ratoon setup` says how to have it")
    return os.path.realpath(found)


@cache
def qemu_cell() -> Cell:
    """The cell that all QEMUs of this process are started in; made when it is first asked for.

    An upgrade of QEMU's package changes nothing for it. HostError.
    """
    program = Path(binary())
    directories = [Path(line) for line in run([program, "-L", "help"]).decode().splitlines()]
    data = {}
    for name in _ROMS:
        for directory in directories:
            if (directory / name).exists():
                data[str(directory / name)[1:]] = directory / name
    for module in sorted(path for place in _MODULES for path in Path("/").glob(place)):
        data[f"{_MODULES_WITHIN[1:]}/{module.name}"] = module
    return Cell(tree([program], data, PLACES))
