"""Trying the jail: a program takes QEMU's place beside another QEMU, and tells what it gets.

It is started by the code that starts QEMU, in a cell that has Python in QEMU's stead. What it aims
at is made for it: files, sockets and a process that are not its own, and some of the host's.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import resource
import secrets
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from ratoon.errors import HostError
from ratoon.jail import attack as attack_package
from ratoon.jail.attack.expected import EXPECTED, EXPECTED_OF_OWN_ID
from ratoon.jail.cell import Cell, limit_process
from ratoon.jail.tree import tree
from ratoon.jail.user_namespace import free_ids
from ratoon.machine.vmm.bare import bare_launch
from ratoon.machine.vmm.cpu import EMULATED
from ratoon.machine.vmm.driver import Hardware, Launch
from ratoon.machine.vmm.given_files import PLACES
from ratoon.machine.vmm.logs import log_tail
from ratoon.machine.vmm.qemu import QemuMachine, inmate
from ratoon.store.disk.qcow2 import OverlayTemplates
from ratoon.units import MIB

HARDWARE = Hardware(16 * MIB, 1, "tcg", EMULATED)
LAYER, FILE_LIMIT = 1 * MIB, 64 * MIB
#: Seconds: each attempt may take five, and nearly all take none.
PATIENCE = 600
#: The group of what it is meant to get, which shows that attempts can succeed.
OWN = "own"
_PYTHON = Path(sys.executable).resolve()
_PLACE = "attack"
_RUN = f"import sys; sys.path.insert(0, '/{_PLACE}'); from ratoon.jail.attack.running import main"
#: Of Python's library: the largest parts, and not used.
_UNUSED = {"test", "site-packages", "dist-packages", "__pycache__", "idlelib", "lib2to3"}
#: A unix socket that listens, beside the files.
_SOCKET = "daemon.sock"
_NOWHERE = "192.0.2.1"


@dataclass(frozen=True)
class Attempted:
    """What was tried, and `how` it was refused, or what it got."""

    group: str
    name: str
    got: Literal["allowed", "denied"]
    how: str

    @property
    def is_surprise(self) -> bool:
        """Whether it got what is not its own and not listed, or could not be tried at all."""
        expected = EXPECTED if free_ids() else {**EXPECTED, **EXPECTED_OF_OWN_ID}
        listed = self.group == OWN or self.name in expected
        return (self.got == "allowed" and not listed) or self.how.startswith("fault")


async def attack() -> list[Attempted]:
    """All attempts, on this host; takes half a minute. HostError: it did not come to its end."""
    with bare_launch(HARDWARE) as near, bare_launch(HARDWARE) as launch, _python() as python:
        neighbour = await QemuMachine.start(near)
        try:
            with _others(near, neighbour.pid) as others:
                return await _attempts(python, _with_layer(launch), others)
        finally:
            await neighbour.kill()


async def _attempts(python: Cell, launch: Launch, others: dict[str, Any]) -> list[Attempted]:
    process = await asyncio.to_thread(_start, python, launch, others)
    try:
        limit_process(process.pid, resource.RLIMIT_FSIZE, FILE_LIMIT)
        status = await asyncio.to_thread(process.wait, PATIENCE)
    except (ProcessLookupError, subprocess.TimeoutExpired):
        status = None
    finally:
        process.kill()
        process.wait()
    # It writes a byte into its log, too.
    lines = [line.strip("\0") for line in launch.log.read_text().splitlines()]
    if status != 0 or not lines or json.loads(lines.pop()) != {"done": True}:
        raise HostError(f"the attempts did not come to their end:\n{log_tail(launch.log)}")
    return [Attempted(**json.loads(line)) for line in lines]


def _start(python: Cell, launch: Launch, others: dict[str, Any]) -> subprocess.Popen[bytes]:
    """The stand-in, with all that QEMU would be started with."""
    launch.runtime.mkdir()
    with inmate(launch) as there:
        targets = json.dumps({**others, "own": _own(there.words, launch)})
        words = [str(_PYTHON), "-I", "-S", "-B", "-c", f"{_RUN}; main()", targets]
        home = {"PYTHONHOME": sys.base_prefix}
        return python.start(replace(there, words=words, environment=home))


def _own(words: Iterable[str], launch: Launch) -> dict[str, Any]:
    """Which descriptors QEMU is told of, by what they are."""
    own: dict[str, Any] = {"memory": "/memory", "layers": [], "overlay": [], "log": 1}
    names = {str(launch.overlay): "overlay", str(launch.disks[0]): "layers"}
    for option, value in pairwise(words):
        if option == "-add-fd":
            fd, _, path = (each.partition("=")[2] for each in value.split(","))
            if path in names:
                own[names[path]].append(int(fd))
            else:
                own["console"] = int(fd)
    text = " ".join(words)
    own["sockets"] = {name: int(fd) for name, fd in re.findall(r"socket,id=(\w+),fd=(\d+)", text)}
    return own


@contextmanager
def _others(near: Launch, pid: int) -> Iterator[dict[str, Any]]:
    """What is not its own: the neighbour's, this process's, and the host's."""
    place = near.overlay.parent
    with ExitStack() as held:
        server = held.enter_context(socket.create_server(("127.0.0.1", 0)))
        abstract = f"ratoon-attack-{secrets.token_hex(8)}"  # the host's, where others attack too
        for name in (str(place / _SOCKET), f"\0{abstract}"):
            listener = held.enter_context(socket.socket(socket.AF_UNIX))
            listener.bind(name)
            listener.listen()
        theirs = [near.overlay, near.log, near.runtime / "qmp", near.runtime / "agent"]
        yield {
            "host_paths": [
                *("/etc/shadow", "/etc/passwd", "/boot", "/var/lib", "/run", str(place)),
                *map(str, theirs),
            ],
            "unix_sockets": [str(place / _SOCKET), str(near.runtime / "agent")],
            "abstract": [abstract],
            "pids": [os.getpid(), pid, 1],
            "tcp": [["127.0.0.1", server.getsockname()[1]], [_NOWHERE, 80]],
            "udp": [["127.0.0.1", 53], [_NOWHERE, 53]],
            "uid_of_neighbour": Path(f"/proc/{pid}").stat().st_uid,
        }


def _with_layer(launch: Launch) -> Launch:
    layer = launch.overlay.with_name("layer.qcow2")
    OverlayTemplates(layer.parent).create(layer, LAYER)
    layer.chmod(0o444)
    return replace(launch, disks=(layer,), file_limit=FILE_LIMIT)


@contextmanager
def _python() -> Iterator[Cell]:
    """A cell that has Python and its library instead of QEMU, and the attempts."""
    library = Path(sysconfig.get_path("stdlib"))
    files = [path for path in library.rglob("*") if path.is_file() and not _UNUSED & {*path.parts}]
    data = {str(path)[1:]: path for path in files}
    package = Path(attack_package.__file__).parent
    below = f"{_PLACE}/{attack_package.__name__.replace('.', '/')}"
    data |= {f"{below}/{path.name}": path for path in package.glob("*.py")}
    loaded = [path for path in files if path.suffix == ".so"]
    with Cell(tree([_PYTHON, *loaded], data, PLACES)) as cell:
        yield cell
