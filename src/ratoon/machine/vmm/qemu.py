"""The QEMU driver: one process a machine, spoken to over QMP."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import resource
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import (
    AbstractAsyncContextManager,
    ExitStack,
    asynccontextmanager,
    contextmanager,
    suppress,
)
from functools import cache, partial
from pathlib import Path
from typing import Any

from qemu.qmp import EventListener, ExecuteError, QMPClient, QMPError

from ratoon.concurrency import uncancelled
from ratoon.errors import HostError, Incompatible, MachineDied, MachineError
from ratoon.jail.cell import Inmate, limit_process
from ratoon.jail.inmates import name_for
from ratoon.machine.vmm import cell, command, cpu
from ratoon.machine.vmm.driver import PACKETS_WRAP, Cgroup, Launch
from ratoon.machine.vmm.given_files import READ_AND_WRITE, RESOLVER, GivenFiles
from ratoon.machine.vmm.logs import bound_logs, log_since, log_tail
from ratoon.machine.vmm.process import MachineProcess, prefer_to_kill
from ratoon.machine.vmm.standstill import EVENTS, Standstill
from ratoon.store.snapshot.manifest import OLDEST_QEMU, qemu_series
from ratoon.units import MIB

# What goes wrong in a conversation is raised as an error of ours; it need not be logged as well.
logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL)

#: Seconds that QEMU may take for one command; the longest by far is loading a device state.
COMMAND_TIMEOUT = 60
#: Seconds between looks at the length of the logs.
LOGS_INTERVAL = 10.0
#: A device state takes some hundred KiB; what a machine gives for one is not taken on trust.
LONGEST_STATE = 64 * MIB
#: States of a machine that its guest never leaves: QEMU lives, but there is nothing to wait for.
_DEAD = ("internal-error", "guest-panicked", "shutdown")
#: What QEMU's log says of that: with which error KVM gave up, and at which instruction.
_LAST_WORDS = re.compile(r"KVM internal error|KVM: entry failed|Code=")
#: Who could not give a guest its processor.
_PROVIDERS = {"kvm": "this host's KVM", "tcg": "QEMU's emulator"}


@cache
def qemu_version() -> str:
    """QEMU's version, as `10.0.2`. HostError: it is not there, or too old."""
    try:
        output = subprocess.run(
            [command.BINARY, "--version"], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise HostError(
            f"{command.BINARY} does not run ({error}); `ratoon setup` says how to have it"
        ) from None
    match = re.search(r"version (\d+\.\d+\.\d+)", output)
    if match is None:
        raise HostError(f"{command.BINARY} states no version: {output[:100]}")
    if qemu_series(match[1]) < OLDEST_QEMU:
        raise HostError(
            f"{command.BINARY} {match[1]} is too old: Ratoon needs "
            f"{'.'.join(map(str, OLDEST_QEMU))} or later; on Debian 12, `ratoon setup` "
            "has it from its backports"
        )
    return match[1]


class QemuMachine:
    """A QEMU process. Made by `start` or `attach`; implements `driver.Machine`.

    Unless its launch says otherwise, the process dies with the thread that started it
    (PR_SET_PDEATHSIG), whatever way that goes.
    """

    def __init__(self, name: str, process: MachineProcess, log: Path, runtime: Path) -> None:
        self._name = name
        self._process = process
        self._log = log
        self._runtime = runtime
        self._qmp = QMPClient(name)
        self._disconnecting = asyncio.Lock()  # QMPClient cannot be asked twice at once
        self._overlays = 1
        self._active: str | None = command.FIRST_OVERLAY
        self._below: str | None = None
        self._added: str | None = None
        #: The sets of descriptors that they were opened from.
        self._sets: dict[str, int] = {}
        #: What QEMU calls the network card, once that was asked.
        self._card: str | None = None
        self._cgroup: Cgroup | None = None
        self._standstill = Standstill(name, log.parent, self._look_into_stop)
        self._looking: asyncio.Task[None] | None = None
        self._killing = False
        self._cause_of_death: str | None = None
        self._qmp.register_listener(EventListener(EVENTS, self._standstill.hear))
        self._watch()

    @classmethod
    async def start(cls, launch: Launch) -> QemuMachine:
        """Start QEMU and wait until it listens to commands.

        If this fails, the process is gone. Whoever asked removes `launch.runtime`, which is made.
        Incompatible: the host cannot give the guest the processor that it is to have.
        """
        launch.runtime.mkdir(parents=True, exist_ok=True, mode=0o700)
        begin = launch.log.stat().st_size if launch.log.exists() else 0
        process = await _started(launch)
        machine = cls(launch.name, MachineProcess(process.pid, process), launch.log, launch.runtime)
        try:
            prefer_to_kill(process.pid)
            await machine.confine(launch.cgroup, launch.file_limit)
            await machine._connect("start")
        except BaseException as error:
            await machine.kill()
            if isinstance(error, MachineDied):
                _check_processor(launch, log_since(launch.log, begin))
            raise
        return machine

    @classmethod
    async def attach(cls, name: str, pid: int, log: Path, runtime: Path) -> QemuMachine:
        """Speak to a QEMU that another process started with a launch that `survives`.

        MachineDied, MachineError: nobody speaks there; it is left as it is then.
        """
        try:
            process = MachineProcess(pid)
        except ProcessLookupError:
            raise MachineDied(f"QEMU of {name} (process {pid}) has died", log_tail(log)) from None
        machine = cls(name, process, log, runtime)
        try:
            await machine._connect("attach")
            if await machine._status() == "io-error":
                machine._standstill.begin()
        except BaseException:
            await machine.let_go()
            raise
        return machine

    @property
    def has_died(self) -> bool:
        return self._process.died.done()

    async def active_overlay(self, among: Iterable[Path]) -> Path:
        """Which of these files the guest's disk writes go to; after `attach`.

        An overlay that was added and not switched to is forgotten, as by `drop_overlay`.
        MachineError: none of them, says QEMU.
        """
        nodes = await self._execute("query-named-block-nodes", flat=True)
        names = {node["node-name"] for node in nodes}
        numbers = sorted(_number(name) for name in names if name.startswith(command.OVERLAY))
        (drive,) = await self._execute("query-block")
        active = _number(drive["inserted"]["node-name"])
        self._overlays = numbers[-1] + 1
        self._active = command.OVERLAY + str(active)
        below = [number for number in numbers if number < active]
        self._below = command.OVERLAY + str(below[-1]) if below else None
        for number in numbers:
            if number > active:
                self._added = command.OVERLAY + str(number)
                await self.drop_overlay()
        given = await self._set_of(self._active)
        for fdset in await self._execute("query-fdsets"):
            if fdset["fdset-id"] == given:
                told = {Path(each["opaque"]).name for each in fdset["fds"]}
                for path in among:
                    if path.name in told:
                        return path
        raise MachineError(f"QEMU of {self._name} writes to a disk that it was not given")

    async def is_running(self) -> bool:
        """Whether the guest runs; not when it is paused, or stands still."""
        return bool((await self._execute("query-status"))["running"])

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def agent_socket(self) -> Path:
        return self._runtime / "agent"

    @property
    def volumes_socket(self) -> Path:
        return self._runtime / "volumes"

    @property
    def cause_of_death(self) -> str | None:
        return self._cause_of_death

    async def confine(self, cgroup: Cgroup | None, file_limit: int | None) -> None:
        if file_limit is not None:
            with suppress(ProcessLookupError):  # whoever speaks to it next will say so
                await asyncio.to_thread(limit_process, self.pid, resource.RLIMIT_FSIZE, file_limit)
            self._standstill.file_limit = file_limit
        if cgroup is not None:
            # The kernel waits for all of its processors to have taken notice.
            await asyncio.to_thread(cgroup.add, self.pid)
            self._cgroup = cgroup

    def while_moving(self) -> AbstractAsyncContextManager[None]:
        return self._standstill.interrupts()

    async def load_state(self, state: bytes) -> None:
        # The guest's address has not moved: it need not tell its neighbours, in each fork anew.
        await self._execute("migrate-set-parameters", **{"announce-rounds": 0})
        with _memory_file(state) as fd:
            async with self._lent(fd, os.O_RDONLY) as path:
                await self._execute("migrate-incoming", uri=f"file:{path}")
                # Success is silent without -global; failure ends the process.
                while (await self._execute("query-status"))["status"] == "inmigrate":
                    await asyncio.sleep(0)

    async def expand(self, model: str) -> dict[str, object]:
        """All features of a processor's model, as this machine's accelerator has them here."""
        name, changed = cpu.as_properties(model)
        asked = {"type": "static", "model": {"name": name, "props": changed}}
        properties: dict[str, object] = (await self._execute("query-cpu-model-expansion", **asked))[
            "model"
        ]["props"]
        return properties

    async def resume(self) -> None:
        try:
            await self._execute("cont")
        except MachineError:
            await self._status()  # of one that ended just as it was paused, no event told
            raise

    async def pause(self) -> None:
        with self._standstill.pausing():
            await self._execute("stop")

    async def save_state(self) -> bytes:
        with _memory_file(b"") as fd:
            async with self._lent(fd, os.O_WRONLY) as path:
                # Device state alone, in spite of the name. live=True would deactivate the disks.
                await self._execute("xen-save-devices-state", filename=path, live=False)
            if (size := os.fstat(fd).st_size) > LONGEST_STATE:
                raise MachineError(f"QEMU of {self._name} gave {size} bytes for a device state")
            return os.pread(fd, size, 0)

    async def add_overlay(self, overlay: Path) -> None:
        name = command.OVERLAY + str(self._overlays)
        fdset = await self._give(overlay)
        try:
            node = command.overlay_node(f"/dev/fdset/{fdset}", name)
            await self._execute("blockdev-add", **node, backing=None)
        except MachineError:
            with suppress(MachineError):
                await self._execute("remove-fd", **{"fdset-id": fdset})
            raise
        self._added, self._sets[name] = name, fdset
        self._overlays += 1

    async def switch_overlay(self) -> None:
        await self._execute("blockdev-snapshot", node=self._active, overlay=self._added)
        self._below, self._active, self._added = self._active, self._added, None

    async def settle_overlay(self) -> None:
        if self._below is not None:
            await self._execute("remove-fd", **{"fdset-id": await self._set_of(self._below)})

    async def drop_overlay(self) -> None:
        if self._added is not None:
            await self._remove_overlay(self._added)
            self._added = None

    async def undo_overlay(self) -> None:
        job = "undo"
        options = {"job-id": job, "device": self._active, "base-node": self._below}
        await self._execute("block-commit", **options)
        while jobs := await self._execute("query-block-jobs"):
            if jobs[0]["ready"]:  # all is copied and kept equal: switch over
                await self._execute("block-job-complete", device=job)
                break
            await asyncio.sleep(0.01)
        while await self._execute("query-block-jobs"):
            await asyncio.sleep(0.01)
        assert self._active
        await self._remove_overlay(self._active)
        self._active, self._below = self._below, None

    async def packets(self) -> int:
        if self._card is None:
            devices = await self._execute("x-query-virtio")
            self._card = next(each["path"] for each in devices if each["name"] == "virtio-net")
        ask = partial(self._execute, "x-query-virtio-queue-status", path=self._card)
        counts = [(await ask(queue=queue))["used-idx"] for queue in (0, 1)]  # received, sent
        return int(sum(counts)) % PACKETS_WRAP

    async def wait_died(self) -> str:
        await self._process.wait()
        return log_tail(self._log)

    async def kill(self) -> None:
        self._killing = True
        self._process.kill()
        await self._process.wait()
        await self._disconnect()

    async def let_go(self) -> None:
        """Speak to it no more; it goes on if its launch `survives`."""
        self._stop_watching()
        self._process.let_go()
        await self._disconnect()

    async def _disconnect(self) -> None:
        async with self._disconnecting:
            with suppress(QMPError, EOFError, OSError):
                await self._qmp.disconnect()

    def _watch(self) -> None:
        """Find out why it dies; until then, bound its logs."""
        loop = asyncio.get_running_loop()

        def look_at_logs() -> None:
            bound_logs(self._log)
            self._next_look = loop.call_later(LOGS_INTERVAL, look_at_logs)

        def died(status: int | None) -> None:
            self._stop_watching()
            if not self._killing and self._cause_of_death is None:
                self._cause_of_death = self._find_cause(status)

        self._next_look = loop.call_later(LOGS_INTERVAL, look_at_logs)
        self._process.on_death = died

    def _stop_watching(self) -> None:
        self._next_look.cancel()
        if self._looking:
            self._looking.cancel()

    def _look_into_stop(self) -> None:
        """It has stopped unasked: because its disk is full, or for ever?"""

        async def look() -> None:
            with suppress(MachineError):  # whoever waits for it hears of that as well
                if await self._status() != "running":
                    self._standstill.begin()

        self._looking = asyncio.create_task(look())

    async def _status(self) -> str:
        """What QEMU says of the guest. MachineDied: it can never go on, and is ended."""
        status: str = (await self._execute("query-status"))["status"]
        if status in _DEAD:
            said = [
                line for line in log_since(self._log, 0).splitlines() if _LAST_WORDS.match(line)
            ]
            self._cause_of_death = f"its guest has ended ({status}): {'; '.join(said[-2:])}"
            self._process.kill()
            await self._process.wait()
            raise MachineDied(
                f"QEMU of {self._name} (process {self.pid}) was of no use any more",
                log_tail(self._log),
                self._cause_of_death,
            )
        return status

    def _find_cause(self, status: int | None) -> str | None:
        """Why the process ended with `status`, if known; a negative one is a signal's number."""
        if self._cgroup is not None and (cause := self._cgroup.cause_of_death()):
            return cause
        if status == -signal.SIGKILL:
            return "it was killed, by somebody or by the kernel for want of memory (see dmesg)"
        return f"it got {signal.Signals(-status).name}" if status and status < 0 else None

    async def _give(self, overlay: Path) -> int:
        """Give QEMU a set of descriptors of `overlay`, see `given_files`; its number."""
        fdset = await self._add(overlay, READ_AND_WRITE[0])
        for flags in READ_AND_WRITE[1:]:
            await self._add(overlay, flags, **{"fdset-id": fdset})
        return fdset

    @asynccontextmanager
    async def _lent(self, fd: int, access: int) -> AsyncIterator[str]:
        """What QEMU calls an open file of ours, in the block; it is matched by its `access`."""
        fdset = await self._add(Path(f"/proc/self/fd/{fd}"), access)
        yield f"/dev/fdset/{fdset}"
        await self._execute("remove-fd", **{"fdset-id": fdset})

    async def _add(self, path: Path, flags: int, **fdset: int) -> int:
        """Open a file for QEMU, into that set or a new one; its number."""
        fd = os.open(path, flags | os.O_CLOEXEC)
        try:
            given = await self._hand_over(fd, "add-fd", opaque=str(path), **fdset)
        finally:
            os.close(fd)
        number: int = given["fdset-id"]
        return number

    async def _set_of(self, overlay: str) -> int:
        """The number of the set that a node's file was opened from."""
        if overlay not in self._sets:
            nodes = await self._execute("query-named-block-nodes", flat=True)
            files = {node["node-name"]: node["file"] for node in nodes}
            self._sets[overlay] = int(Path(files[command.file_node(overlay)]).name)
        return self._sets[overlay]

    async def _remove_overlay(self, overlay: str) -> None:
        fdset = await self._set_of(overlay)
        await self._execute("blockdev-del", **{"node-name": overlay})
        await self._execute("remove-fd", **{"fdset-id": fdset})
        del self._sets[overlay]

    async def _hand_over(self, fd: int, name: str, **arguments: Any) -> Any:
        """Execute a command that takes a descriptor."""
        async with self._explained(name):
            self._qmp.send_fd_scm(fd)
        return await self._execute(name, **arguments)

    async def _connect(self, what: str) -> None:
        async with self._explained(what):
            try:
                await self._qmp.connect(str(self._runtime / "qmp"))
            except AssertionError:  # the library's own: the session was lost as it began
                raise EOFError("the connection was closed at once") from None

    async def _execute(self, name: str, **arguments: Any) -> Any:
        async with self._explained(name), asyncio.timeout(COMMAND_TIMEOUT):
            return await self._qmp.execute(name, arguments)

    @asynccontextmanager
    async def _explained(self, what: str) -> AsyncIterator[None]:
        """Turn the failures of a conversation with QEMU into errors that say what happened."""
        name = self._name
        try:
            yield
        except ExecuteError as error:
            raise MachineError(f"QEMU of {name} refused {what}: {error}") from error
        except TimeoutError:
            raise MachineError(
                f"QEMU of {name} did not finish {what} within {COMMAND_TIMEOUT} s; kill the sandbox"
            ) from None
        except (QMPError, EOFError, OSError) as error:
            # The socket closes a moment before the process can be waited for.
            with suppress(TimeoutError):
                async with asyncio.timeout(1):
                    await self._process.wait()
            if not self.has_died:
                raise MachineError(f"QEMU of {name} failed at {what}: {error}") from error
            raise MachineDied(
                f"QEMU of {name} (process {self.pid}) died at {what}",
                log_tail(self._log),
                self._cause_of_death,
            ) from error


def _check_processor(launch: Launch, log: str) -> None:
    """Incompatible if QEMU ended because of the processor that it should have made."""
    if lacks := cpu.lacking(log):
        raise Incompatible(
            f"{_PROVIDERS[launch.hardware.accelerator]} cannot give {launch.name} its processor: "
            f"it lacks {', '.join(lacks)}; use a host that has that, or a base made with --cpu and "
            "a model that all of your hosts have"
        )


def _number(overlay: str) -> int:
    return int(overlay.removeprefix(command.OVERLAY))


async def _started(launch: Launch) -> subprocess.Popen[bytes]:
    """A QEMU in a cell. Once begun it is waited for, and ended if nobody wants it any more."""
    starting = asyncio.create_task(asyncio.to_thread(_start, launch))
    try:
        return await asyncio.shield(starting)
    except asyncio.CancelledError:
        with suppress(HostError, OSError):
            await uncancelled(_ended(starting))
        raise


async def _ended(starting: asyncio.Task[subprocess.Popen[bytes]]) -> None:
    process = await starting
    process.kill()
    await asyncio.to_thread(process.wait)


def _start(launch: Launch) -> subprocess.Popen[bytes]:
    """Start QEMU in a cell; blocks."""
    ours = cell.qemu_cell()  # before all else, for who cannot have one
    with inmate(launch) as there:
        return ours.start(there)


@contextmanager
def inmate(launch: Launch) -> Iterator[Inmate]:
    """QEMU, as it is to be started; what it is given is held open until the block ends."""
    with ExitStack() as held:
        sockets = [launch.runtime / name for name in ("qmp", "agent", "volumes")]
        qmp, agent, volumes = (held.enter_context(_listener(path)).fileno() for path in sockets)
        given = held.enter_context(GivenFiles())
        arguments = command.arguments(launch, given, qmp_fd=qmp, agent_fd=agent, volumes_fd=volumes)
        if launch.resolver:
            given.mounted(launch.resolver, RESOLVER)
        log = held.enter_context(launch.log.open("ab"))
        yield Inmate(
            [cell.binary(), *(word for option in given.options for word in option), *arguments],
            output=log.fileno(),
            mounts=given.mounts,
            descriptors=(qmp, agent, volumes, *given.descriptors),
            network=launch.netns,
            environment=cell.ENVIRONMENT,
            survives=launch.survives,
            name=name_for(launch.log.parent),
        )


@contextmanager
def _memory_file(content: bytes) -> Iterator[int]:
    """A descriptor of an anonymous file that holds `content`, positioned at its start."""
    fd = os.memfd_create("ratoon-state", os.MFD_CLOEXEC)
    try:
        os.pwrite(fd, content, 0)
        yield fd
    finally:
        os.close(fd)


@contextmanager
def _listener(path: Path) -> Iterator[socket.socket]:
    """A listening socket to be inherited: who connects need not wait until QEMU has made it."""
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(1)
        yield listener
