"""A machine of no sandbox: what is needed to start one, in a directory that goes again."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ratoon.machine.vmm.driver import Hardware, Launch
from ratoon.store.disk.qcow2 import OverlayTemplates
from ratoon.units import MIB

DISK = 64 * MIB


@contextmanager
def bare_launch(hardware: Hardware) -> Iterator[Launch]:
    """With empty memory and an empty disk, all in the directory of that disk; blocks."""
    with tempfile.TemporaryDirectory(prefix="ratoon-bare-") as name:
        directory = Path(name)
        memory, disk = directory / "memory", directory / "disk"
        memory.touch()
        memory.chmod(0o444)
        os.truncate(memory, hardware.ram_bytes)
        OverlayTemplates(directory).create(disk, DISK)
        yield Launch(
            name="a guest",
            hardware=hardware,
            memory=memory,
            disks=(),
            overlay=disk,
            log=directory / "log",
            runtime=directory / "run",
        )
