"""What a QEMU has open: what it was given, and nothing else."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import pytest
from vm_helpers import CHECK, WRITE, sh

from ratoon.engine.sandbox.engine import Engine
from ratoon.engine.sandbox.sandbox import Sandbox
from ratoon.errors import AlreadyExists

#: How often a sandbox is branched, and its QEMU given another overlay.
BRANCHES = 50
#: What has no name, and is QEMU's own: sockets it was given or has accepted, and its event loop's.
NAMELESS = {"socket", "anon_inode"}


#: What is open: a file by its name as it was opened, a nameless thing by its kind; access mode.
Opened = set[tuple[str, int]]


def opened(pid: int, names: dict[int, str]) -> Opened:
    """What a process has open; files have the `names` of their inodes, links come and go."""
    found = set()
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        try:
            name, inode = str(fd.readlink()), fd.stat().st_ino
            info = Path(f"/proc/{pid}/fdinfo/{fd.name}").read_text()
        except FileNotFoundError:  # it was closed meanwhile
            continue
        flags = next(line for line in info.splitlines() if line.startswith("flags:"))
        mode = int(flags.split()[1], 8) & os.O_ACCMODE
        kind, colon, _ = name.partition(":")
        found.add((kind, -1) if colon else (names.get(inode, name), mode))
    return found


def given(sandbox: Sandbox, layers: Iterable[Path]) -> Opened:
    """What it must have: its image, its layers, its overlay and its logs."""
    log, overlay = sandbox.directory.log, sandbox.incarnation.overlay
    return {
        *((kind, -1) for kind in NAMELESS),
        ("/dev/null", os.O_RDWR),
        (str(sandbox.memory.path), os.O_RDONLY),
        *((str(layer), os.O_RDONLY) for layer in layers),
        *((str(overlay), mode) for mode in (os.O_RDONLY, os.O_RDWR)),
        (str(log), os.O_WRONLY),
        (f"{log}.console", os.O_WRONLY),
    }


async def test_nothing_but_what_it_was_given(engine: Engine) -> None:
    """Also after many branches, after one that failed, and after a take-over."""
    async with Engine.open(engine.store.home, keep=True) as owner:
        sandbox = await owner.fork_one("base")
        layers = [*sandbox.directory.path.glob("parent/disk.qcow2")]
        files = [*layers, sandbox.memory.path]
        names = {path.stat().st_ino: str(path) for path in files}
        assert opened(sandbox.pid, names) == given(sandbox, layers)
        for number in range(BRANCHES):
            layers.append(sandbox.incarnation.overlay)
            names[layers[-1].stat().st_ino] = str(layers[-1])
            await owner.branch(sandbox, f"branch{number}")
            assert opened(sandbox.pid, names) == given(sandbox, layers)
        with pytest.raises(AlreadyExists):
            await owner.branch(sandbox, "branch0")
        await sh(sandbox, WRITE.format("here"))
        pid = sandbox.pid
    async with Engine.open(engine.store.home, keep=True) as following:
        (sandbox,) = following.sandboxes
        async with sandbox:
            assert sandbox.pid == pid
            await sh(sandbox, CHECK)
            assert opened(pid, names) == given(sandbox, layers)
            layers.append(sandbox.incarnation.overlay)
            names[layers[-1].stat().st_ino] = str(layers[-1])
            await following.branch(sandbox, "after")
            assert opened(pid, names) == given(sandbox, layers)
