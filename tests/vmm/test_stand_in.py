"""A program in QEMU's place, started by the same code, gets nothing but what the documents list."""

from __future__ import annotations

import asyncio
import json
import os
import re
import resource
import socket
import sys
import sysconfig
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from ratoon.jail.cell import Cell, Inmate, limit_process
from ratoon.jail.tree import tree
from ratoon.machine.vmm import cell, qemu
from ratoon.machine.vmm.cpu import EMULATED
from ratoon.machine.vmm.driver import Hardware, Launch
from ratoon.machine.vmm.given_files import PLACES
from ratoon.machine.vmm.qemu import QemuMachine
from ratoon.store.disk.qcow2 import OverlayTemplates

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can make cells")

RAM, DISK = 16 << 20, 1 << 20
STAND_IN = Path(__file__).with_name("stand_in.py")
SECURITY = Path(__file__).parents[2] / "docs" / "security.md"
PYTHON = Path(sys.executable).resolve()
#: Seconds: each of its attempts may take five, and nearly all take none.
PATIENCE = 600


@pytest.fixture(scope="module")
def python() -> Iterator[Cell]:
    """A cell that has Python and its library instead of QEMU."""
    library = Path(sysconfig.get_path("stdlib"))
    unused = {"test", "site-packages", "dist-packages", "__pycache__", "idlelib", "lib2to3"}
    files = [path for path in library.rglob("*") if path.is_file() and not unused & {*path.parts}]
    loaded = [path for path in files if path.suffix == ".so"]
    data = {str(path)[1:]: path for path in files}
    with Cell(tree([PYTHON, *loaded], {**data, "stand_in.py": STAND_IN}, PLACES)) as cell:
        yield cell


@pytest.fixture
async def neighbour(launch: Launch) -> AsyncIterator[QemuMachine]:
    place = launch.runtime.parent / "neighbour"
    place.mkdir()
    OverlayTemplates(place).create(place / "disk.qcow2", DISK)
    there = replace(launch, overlay=place / "disk.qcow2", log=place / "log", runtime=place / "run")
    machine = await QemuMachine.start(there)
    yield machine
    await machine.kill()


@pytest.fixture
def launch(tmp_path: Path) -> Launch:
    (tmp_path / "memory").touch(0o444)
    os.truncate(tmp_path / "memory", RAM)
    templates = OverlayTemplates(tmp_path)
    for name in ("layer.qcow2", "disk.qcow2"):
        templates.create(tmp_path / name, DISK)
    (tmp_path / "layer.qcow2").chmod(0o444)
    return Launch(
        name="sb-test",
        hardware=Hardware(RAM, 1, "tcg", EMULATED),
        memory=tmp_path / "memory",
        disks=(tmp_path / "layer.qcow2",),
        overlay=tmp_path / "disk.qcow2",
        log=tmp_path / "log",
        runtime=tmp_path / "run",
        file_limit=64 << 20,
    )


def given(words: list[str], launch: Launch) -> dict[str, Any]:
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


async def attempts(
    launch: Launch, python: Cell, others: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> list[dict[str, str]]:
    """What it tries, and gets."""

    def start(_: Cell, inmate: Inmate) -> Any:
        targets = json.dumps({**others, "own": given([*inmate.words], launch)})
        words = [str(PYTHON), "-I", "-S", "-B", "/stand_in.py", targets]
        home = {"PYTHONHOME": sys.base_prefix}
        return Cell.start(python, replace(inmate, words=words, environment=home))

    launch.runtime.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(cell, "qemu_cell", type("StandIn", (), {"start": start}))
        process = await asyncio.to_thread(qemu._start, launch)
    assert launch.file_limit
    await asyncio.to_thread(limit_process, process.pid, resource.RLIMIT_FSIZE, launch.file_limit)
    try:
        assert await asyncio.to_thread(process.wait, PATIENCE) == 0, launch.log.read_text()
    finally:
        process.kill()
        process.wait()
    # It writes a byte into its log, too.
    lines = [json.loads(line.strip("\0")) for line in launch.log.read_text().splitlines()]
    assert lines.pop() == {"done": True}
    return lines


async def test_what_it_gets(
    launch: Launch,
    neighbour: QemuMachine,
    python: Cell,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of others and of the host; what its work takes it has."""
    with ExitStack() as stack:
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        listeners = [stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(2)]
        for listener, name in zip(listeners, [str(tmp_path / "daemon.sock"), "\0r"], strict=True):
            listener.bind(name)
            listener.listen()
        place = tmp_path / "neighbour"
        others = {
            "host_paths": [
                *("/etc/shadow", "/etc/passwd", "/boot", "/var/lib", "/run", str(tmp_path)),
                *(str(place / name) for name in ("disk.qcow2", "log", "run/qmp", "run/agent")),
            ],
            "unix_sockets": [str(tmp_path / "daemon.sock"), str(place / "run/agent")],
            "abstract": ["r"],
            "pids": [os.getpid(), neighbour.pid, 1],
            "tcp": [["127.0.0.1", server.getsockname()[1]], ["192.0.2.1", 80]],
            "udp": [["127.0.0.1", 53], ["192.0.2.1", 53]],
            "uid_of_neighbour": Path(f"/proc/{neighbour.pid}").stat().st_uid,
        }
        found = await attempts(launch, python, others, monkeypatch)
    assert not [each for each in found if each["how"].startswith(("not tried", "fault"))]
    got = {each["name"]: each["how"] for each in found if each["got"] == "allowed"}
    own = {each["name"] for each in found if each["group"] == "own"}
    assert len(found) - len(own) > 300
    assert {name: got[name] for name in got if name not in own | documented()} == {}
    assert documented() <= {*got}, "the documents list what it does not get"
    assert {"read its layers", "write its overlay", "read the memory image by its path"} <= {*got}
    assert (tmp_path / "layer.qcow2").stat().st_mode & 0o777 == 0o444


def documented() -> set[str]:
    """What the documents list, by its name."""
    table = SECURITY.read_text().partition("| what the stand-in is allowed |")[2]
    rows = table.partition("\n\n")[0].splitlines()[2:]
    return {row.split("|")[1].strip() for row in rows}
