"""QEMU's own ways to bring a guest back, to compare with: boot, savevm/loadvm, migrate to a file.

The machine, the kernel, the agent and the root disk are those of Ratoon's guests; the RAM is plain
memory of the process, as where nobody thinks of forking. What comes back goes on as it was and gets
no new identity: so a peer does a little less than a fork.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import subprocess
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qemu.qmp import QMPClient, QMPError

from ratoon.engine.sandbox.boot import boot_from
from ratoon.engine.sandbox.engine import DISK_BYTES
from ratoon.errors import MachineDied, RatoonError
from ratoon.machine.guest import commands
from ratoon.machine.guest.build import build_guest
from ratoon.machine.guest.channel import Channel
from ratoon.machine.guest.practice import practise
from ratoon.machine.vmm import command
from ratoon.machine.vmm.driver import Boot, Hardware, Launch
from ratoon.machine.vmm.given_files import ByPath
from ratoon.store.disk.qcow2 import OverlayTemplates

#: Seconds that a guest may take to boot, or to come back, and that a save may take.
TIMEOUT = 180.0
_SNAPSHOT = "saved"
#: Name and machine-id.
_NAMES = "peer", "0" * 32


class Guest:
    """A guest whose agent can be asked."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel

    async def greet(self) -> None:
        """Once it has booted: it answers, and has got its identity."""
        await self.channel.request("hello", timeout=TIMEOUT)
        await self.channel.rebirth(*_NAMES, timeout=TIMEOUT)

    async def practise(self) -> None:
        """As Ratoon's bases do before they are taken, so that what is saved is the same guest."""
        await practise(self.channel, *_NAMES)

    async def exec(self, argv: list[str]) -> str:
        """What `argv` prints. RatoonError: it did not exit with 0."""
        result = await commands.exec(self.channel, argv, timeout=TIMEOUT)
        if result.exit_code:
            raise RatoonError(f"{argv[0]} failed in a peer: {result.explain()}")
        return result.stdout.decode()


class Peer(Guest):
    """A guest in a running QEMU."""

    def __init__(self, qmp: QMPClient, channel: Channel) -> None:
        super().__init__(channel)
        self._qmp = qmp

    async def save_inside(self) -> None:
        """`savevm`: RAM and devices become a snapshot inside the qcow2 of its disk."""
        line = f"savevm {_SNAPSHOT}"
        said = await self._qmp.execute("human-monitor-command", {"command-line": line})
        if said:
            raise RatoonError(f"savevm: {said}")

    async def save_to(self, path: Path) -> None:
        """Migrate to a file: what `virsh save` does. The guest stands still afterwards."""
        await self._qmp.execute("stop")
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            self._qmp.send_fd_scm(fd)
            await self._qmp.execute("getfd", {"fdname": "file"})
        finally:
            os.close(fd)
        await self._qmp.execute("migrate-set-parameters", {"max-bandwidth": 1 << 40})
        await self._qmp.execute("migrate", {"uri": "fd:file"})
        while True:
            told: Any = await self._qmp.execute("query-migrate")
            if told["status"] == "completed":
                return
            if told["status"] in {"failed", "cancelled"}:
                raise RatoonError(f"the migration to a file: {told}")
            await asyncio.sleep(0.02)

    async def go_on(self) -> None:
        """Once its state is in: it stood still when it was saved, and so it does now."""
        while True:
            told: Any = await self._qmp.execute("query-status")
            if told["status"] != "inmigrate":
                break
            await asyncio.sleep(0.002)
        await self._qmp.execute("cont")


@dataclass(frozen=True)
class Peers:
    """Starts them, in the directory of one RAM size."""

    directory: Path
    hardware: Hardware
    #: The root disk that all guests boot from.
    root_disk: Path

    @property
    def own_disk(self) -> Path:
        """The disk of the guest that was booted and saved."""
        return self.directory / "disk.qcow2"

    @property
    def state(self) -> Path:
        """What it was migrated to."""
        return self.directory / "state"

    @asynccontextmanager
    async def booted(self, disk: Path) -> AsyncIterator[Peer]:
        """Booted cold, on a copy of the root disk at `disk`."""
        async with self._running(self.boot(disk), ()) as peer:
            await peer.greet()
            yield peer

    @asynccontextmanager
    async def loaded(self) -> AsyncIterator[Peer]:
        """`-loadvm`."""
        launch = self._launch(self.own_disk)
        async with self._running(launch, ("-loadvm", _SNAPSHOT)) as peer:
            yield peer

    @asynccontextmanager
    async def migrated(self) -> AsyncIterator[Peer]:
        """From the file, on a new overlay of the disk."""
        overlay = self.directory / "overlay.qcow2"
        overlay.unlink(missing_ok=True)
        OverlayTemplates(self.directory).create(overlay, DISK_BYTES)
        launch = replace(self._launch(overlay), disks=(self.own_disk,))
        fd = os.open(self.state, os.O_RDONLY | os.O_CLOEXEC)
        try:
            incoming = ("-incoming", f"fd:{fd}")
            async with self._running(launch, incoming, fd) as peer:
                await peer.go_on()
                yield peer
        finally:
            os.close(fd)

    def boot(self, disk: Path) -> Launch:
        """What boots, on the copy of the root disk that is made as `disk`."""
        shutil.copyfile(self.root_disk, disk)
        return self._launch(disk, boot=boot_from(build_guest(), self.hardware.accelerator))

    def _launch(self, disk: Path, *, boot: Boot | None = None) -> Launch:
        return Launch(
            name="peer",
            hardware=self.hardware,
            memory=Path("none"),
            disks=(),
            overlay=disk,
            log=self.directory / "log",
            runtime=self.directory,
            boot=boot,
        )

    @asynccontextmanager
    async def _running(
        self, launch: Launch, more: tuple[str, ...], *descriptors: int
    ) -> AsyncIterator[Peer]:
        with _listening() as (qmp_socket, qmp_path), _listening() as (agent_socket, agent_path):
            fds = (qmp_socket.fileno(), agent_socket.fileno())
            words = _arguments(launch, *fds)
            with launch.log.open("ab") as log:
                process = subprocess.Popen(
                    ["setpriv", "--pdeathsig", "KILL", "--", command.BINARY, *words, *more],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=(*fds, *descriptors),
                )
            qmp = QMPClient("peer")
            channel = None
            try:
                async with asyncio.timeout(TIMEOUT):
                    channel = await Channel.connect(agent_path, "peer")
                    channel.begin()
                    await qmp.connect(str(qmp_path))
                yield Peer(qmp, channel)
            except (QMPError, EOFError, OSError, TimeoutError) as error:
                tail = launch.log.read_bytes()[-1000:].decode(errors="replace")
                raise MachineDied(f"a peer failed: {error}", tail) from error
            finally:
                if channel:
                    channel.close()
                process.kill()
                process.wait()
                with suppress(QMPError, EOFError, OSError):
                    await qmp.disconnect()


def _arguments(launch: Launch, qmp_fd: int, agent_fd: int) -> list[str]:
    """As for Ratoon's machines, but with plain RAM, no lean format of states, and not waiting."""
    words = command.arguments(launch, ByPath(), qmp_fd=qmp_fd, agent_fd=agent_fd)
    words[words.index("-object") + 1] = (
        f"memory-backend-ram,id=ram,size={launch.hardware.ram_bytes}"
    )
    for unwanted in (("-global", "migration.send-configuration=off"), ("-incoming", "defer")):
        if unwanted[1] in words:
            at = words.index(unwanted[1])
            del words[at - 1 : at + 1]
    return [word for word in words if word != "-S"]


class _listening:
    """A listening unix socket with a short path, which goes with the block."""

    def __enter__(self) -> tuple[socket.socket, Path]:
        self._path = Path(f"/tmp/ratoon-peer-{os.getpid()}-{time.monotonic_ns()}")
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(str(self._path))
        self._socket.listen(1)
        return self._socket, self._path

    def __exit__(self, *_: object) -> None:
        self._socket.close()
        self._path.unlink()
