"""The QEMU driver with a real QEMU that never runs a guest: it waits for a device state."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from qemu.qmp import QMPClient, Runstate

from ratoon.errors import HostError, MachineDied, MachineError
from ratoon.jail.inmates import inmates, name_for
from ratoon.machine.network.netns import inside, new_namespace
from ratoon.machine.vmm import command, logs, process, qemu
from ratoon.machine.vmm.command import BINARY
from ratoon.machine.vmm.cpu import EMULATED
from ratoon.machine.vmm.driver import Boot, Hardware, Launch
from ratoon.machine.vmm.qemu import QemuMachine, qemu_version
from ratoon.store.disk.qcow2 import OverlayTemplates, check_header

RAM = 16 * 1024 * 1024
DISK = 1024 * 1024
OWN_NAMESPACE = Path("/proc/thread-self/ns/net")


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory with a path short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="ratoon-") as name:
        yield Path(name)


@pytest.fixture
def launch(place: Path) -> Launch:
    memory = place / "memory"
    memory.touch(0o444)
    os.truncate(memory, RAM)
    templates = OverlayTemplates(place)
    templates.create(place / "base.qcow2", DISK)
    templates.create(place / "disk.qcow2", DISK)
    return Launch(
        name="sb-test",
        hardware=Hardware(RAM, 1, "tcg", EMULATED),
        memory=memory,
        disks=(place / "base.qcow2",),
        overlay=place / "disk.qcow2",
        log=place / "log",
        runtime=place / "run",
    )


@pytest.fixture
def booting(launch: Launch, place: Path) -> Launch:
    """A cold start of a kernel that halts at its first instruction, for ever.

    The header is that of Documentation/arch/x86/boot.rst: one sector of set-up, loaded high.
    """
    kernel = bytearray(2048)
    kernel[0x1F1] = 1
    kernel[0x1FE:0x200] = b"\x55\xaa"
    kernel[0x202:0x208] = b"HdrS\x03\x02"
    kernel[0x211] = 1
    kernel[0x22C:0x230] = (RAM - 1).to_bytes(4, "little")
    kernel[1024:1027] = b"\xf4\xeb\xfd"  # hlt, and again
    (place / "vmlinuz").write_bytes(kernel)
    (place / "initramfs").write_bytes(bytes(512))
    return replace(launch, boot=Boot(place / "vmlinuz", place / "initramfs", "quiet"))


@asynccontextmanager
async def started(launch: Launch) -> AsyncIterator[QemuMachine]:
    machine = await QemuMachine.start(launch)
    try:
        yield machine
    finally:
        await machine.kill()


def is_alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def descriptors() -> list[str]:
    found = []
    for fd in Path("/proc/self/fd").iterdir():
        try:
            found.append(str(fd.readlink()))
        except FileNotFoundError:  # the one that reads the directory
            continue
    return sorted(found)


async def nodes(machine: QemuMachine) -> set[str]:
    """The names of the qcow2 nodes that QEMU has open, of use or not."""
    answer: Any = await machine._execute("query-named-block-nodes", flat=True)
    return {node["node-name"] for node in answer if node["drv"] == "qcow2"}


async def disk_files(machine: QemuMachine) -> list[str]:
    """The files of the guest's disk: the one that is written to, then what lies below it."""
    answer: Any = await machine._execute("query-block")
    (filename,) = (device["inserted"]["file"] for device in answer if "inserted" in device)
    sets: Any = await machine._execute("query-fdsets")
    told = {f"/dev/fdset/{each['fdset-id']}": each["fds"][0]["opaque"] for each in sets}
    node = json.loads(filename.removeprefix("json:"))
    files = []
    while node:
        files.append(Path(told[node["file"]["filename"]]).name)
        node = node.get("backing")
    return files


# Life and death -------------------------------------------------------------------------------


async def test_it_starts_waits_and_is_killed(launch: Launch) -> None:
    machine = await QemuMachine.start(launch)
    assert is_alive(machine.pid)
    status: Any = await machine._execute("query-status")
    assert status["status"] == "inmigrate"
    assert machine.agent_socket.is_socket()
    await machine.kill()
    assert not is_alive(machine.pid)


async def test_kill_is_idempotent(launch: Launch) -> None:
    machine = await QemuMachine.start(launch)
    await machine.kill()
    await machine.kill()
    await asyncio.gather(machine.kill(), machine.kill())
    await machine.wait_died()


async def test_killed_twice_at_once(launch: Launch) -> None:
    machine = await QemuMachine.start(launch)
    await asyncio.gather(machine.kill(), machine.kill(), machine.wait_died())
    assert not is_alive(machine.pid)


async def test_a_cancelled_kill_can_be_repeated(launch: Launch) -> None:
    machine = await QemuMachine.start(launch)
    killing = asyncio.create_task(machine.kill())
    await asyncio.sleep(0)
    killing.cancel()
    await asyncio.gather(killing, return_exceptions=True)
    await machine.kill()
    assert not is_alive(machine.pid)


async def test_it_dies_and_the_next_command_says_so(launch: Launch) -> None:
    async with started(launch) as machine:
        command.console_log(launch.log).write_text("Kernel panic - not syncing\n")
        os.kill(machine.pid, signal.SIGKILL)
        began = time.monotonic()
        with pytest.raises(MachineDied, match=r"sb-test \(process \d+\) died at query-status") as e:
            await machine._execute("query-status")
        assert time.monotonic() - began < 1
        assert "Kernel panic" in e.value.log_tail
        for action in (machine.pause(), machine.resume(), machine.save_state()):
            with pytest.raises(MachineDied):
                await action
        with pytest.raises(MachineDied):
            await machine.load_state(b"state")


async def test_it_dies_as_the_conversation_begins(
    launch: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = QMPClient._establish_session

    async def begin_and_lose_it(client: QMPClient) -> None:
        await begin(client)
        for pid in processes_of(launch):
            os.kill(pid, signal.SIGKILL)
        while client.runstate is Runstate.RUNNING:
            await asyncio.sleep(0)

    monkeypatch.setattr(QMPClient, "_establish_session", begin_and_lose_it)
    with pytest.raises(MachineDied, match="died at start"):
        await QemuMachine.start(launch)
    assert processes_of(launch) == []


async def test_it_dies_while_a_command_is_under_way(launch: Launch) -> None:
    async with started(launch) as machine:
        os.kill(machine.pid, signal.SIGSTOP)
        asking = asyncio.create_task(machine._execute("query-status"))
        await asyncio.sleep(0.05)
        os.kill(machine.pid, signal.SIGKILL)
        began = time.monotonic()
        with pytest.raises(MachineDied):
            await asking
        assert time.monotonic() - began < 1


async def test_a_command_that_does_not_end(launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qemu, "COMMAND_TIMEOUT", 0.1)
    async with started(launch) as machine:
        os.kill(machine.pid, signal.SIGSTOP)
        with pytest.raises(MachineError, match=r"did not finish stop within 0\.1 s; kill"):
            await machine.pause()


async def test_death_is_noticed_by_whoever_waits(launch: Launch) -> None:
    async with started(launch) as machine:
        waiting = [asyncio.create_task(machine.wait_died()) for _ in range(3)]
        impatient = asyncio.create_task(machine.wait_died())
        await asyncio.sleep(0.02)
        impatient.cancel()
        assert not any(task.done() for task in waiting)
        launch.log.write_text("the last words")
        os.kill(machine.pid, signal.SIGKILL)
        async with asyncio.timeout(1):
            assert await asyncio.gather(*waiting) == ["the last words"] * 3


async def test_nothing_is_left_after_ten_machines(launch: Launch) -> None:
    async with started(launch):
        pass  # what is opened once and for all
    before = descriptors()
    for number in range(10):
        async with started(launch) as machine:
            if number % 2:
                os.kill(machine.pid, signal.SIGKILL)
                with pytest.raises(MachineDied):
                    await machine.pause()
    await asyncio.sleep(0)
    assert descriptors() == before


# Starts that fail -----------------------------------------------------------------------------


GONE = Path("/nowhere/file")


@pytest.mark.parametrize(
    "change",
    [
        {"memory": GONE},
        {"overlay": GONE},
        {"disks": (GONE,)},
        {"boot": Boot(GONE, Path("/dev/null"), "")},
    ],
)
async def test_a_file_that_is_not_there_is_named(launch: Launch, change: dict[str, Any]) -> None:
    before = descriptors()
    with pytest.raises(FileNotFoundError) as failure:
        await QemuMachine.start(replace(launch, **change))
    assert str(failure.value.filename) == str(GONE)
    assert descriptors() == before
    assert processes_of(launch) == []


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"memory": Path(__file__)}, "backing store size"),
        ({"overlay": Path("/dev/zero")}, "to be a regular file"),
        ({"disks": (Path(__file__),)}, "Image is not in qcow2 format"),
        ({"boot": Boot(Path("/dev/null"), Path("/dev/null"), "")}, "kernel"),
    ],
)
async def test_what_qemu_complains_of_is_told(
    launch: Launch, change: dict[str, Any], complaint: str
) -> None:
    before = descriptors()
    began = time.monotonic()
    with pytest.raises(MachineDied, match="died at start") as failure:
        await QemuMachine.start(replace(launch, **change))
    assert time.monotonic() - began < 3
    assert complaint in str(failure.value)
    assert complaint in failure.value.log_tail
    await asyncio.sleep(0)
    assert descriptors() == before


async def test_an_earlier_start_has_left_its_sockets(launch: Launch) -> None:
    for _ in range(2):
        async with started(launch):
            pass


@pytest.mark.parametrize("times", [1, 2])
async def test_a_start_that_is_cancelled_leaves_no_process(launch: Launch, times: int) -> None:
    for delay in (0, 0.005, 0.02):
        starting = asyncio.create_task(QemuMachine.start(launch))
        await asyncio.sleep(delay)
        for _ in range(times):
            starting.cancel()
            await asyncio.sleep(0)
        (outcome,) = await asyncio.gather(starting, return_exceptions=True)
        if isinstance(outcome, QemuMachine):
            await outcome.kill()
        assert processes_of(launch) == []


def processes_of(launch: Launch) -> list[int]:
    """Every process that was given the launch's overlay."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if f"opaque={launch.overlay}\0".encode() in entry.read_bytes():
                found.append(int(entry.parent.name))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


async def test_the_owner_dies_and_so_does_its_machine(launch: Launch, place: Path) -> None:
    script = """
import asyncio, json, sys
from pathlib import Path
from ratoon.machine.vmm.cpu import EMULATED
from ratoon.machine.vmm.driver import Hardware, Launch
from ratoon.machine.vmm.qemu import QemuMachine

async def main():
    place = Path(sys.argv[1])
    hardware = Hardware(int(sys.argv[2]), 1, "tcg", "max")
    disks = (place / "base.qcow2",)
    machine = await QemuMachine.start(
        Launch("sb-test", hardware, place / "memory", disks, place / "disk.qcow2",
               place / "log", place / "run")
    )
    print(machine.pid, flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""
    owner = subprocess.Popen(
        [sys.executable, "-c", script, str(place), str(RAM)], stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout
    pid = int(owner.stdout.readline())
    assert processes_of(launch) == [pid]
    owner.kill()
    owner.communicate()
    async with asyncio.timeout(5):
        while processes_of(launch):
            await asyncio.sleep(0.01)


# Confinement ----------------------------------------------------------------------------------


async def test_it_has_no_privileges(launch: Launch) -> None:
    async with started(launch) as machine:
        lines = Path(f"/proc/{machine.pid}/status").read_text().splitlines()
        status = dict(line.split(":\t", 1) for line in lines)
        for kind in ("CapPrm", "CapEff", "CapBnd", "CapInh", "CapAmb"):
            assert int(status[kind], 16) == 0, kind
        assert status["NoNewPrivs"] == "1"


async def test_it_is_known_by_its_directory(launch: Launch) -> None:
    name = name_for(launch.log.parent)
    async with started(launch) as machine:
        assert inmates(name) == [machine.pid]
    assert inmates(name) == []


async def test_it_runs_in_the_namespace_that_it_is_given(launch: Launch) -> None:
    own = OWN_NAMESPACE.stat().st_ino
    async with started(launch) as machine:
        theirs = os.open(f"/proc/{machine.pid}/ns/net", os.O_RDONLY)
        assert inside(theirs, socket.if_nameindex) == [(1, "lo")]
        with pytest.raises(OSError, match="unreachable"):  # the loopback is down
            inside(theirs, lambda: socket.create_connection(("127.0.0.1", 1)))
        os.close(theirs)
    namespace = new_namespace()
    try:
        async with started(replace(launch, netns=namespace)) as machine:
            assert Path(f"/proc/{machine.pid}/ns/net").stat().st_ino == os.fstat(namespace).st_ino
        assert OWN_NAMESPACE.stat().st_ino == own
    finally:
        os.close(namespace)


# Limits ---------------------------------------------------------------------------------------


class FakeCgroup:
    def __init__(self, cause: str | None = None) -> None:
        self.added: list[int] = []
        self.cause = cause

    def add(self, pid: int) -> None:
        self.added.append(pid)

    def cause_of_death(self) -> str | None:
        return self.cause


async def test_no_file_that_it_writes_grows_beyond_the_limit(launch: Launch) -> None:
    async with started(replace(launch, file_limit=123 * 4096)) as machine:
        assert limit_of_files(machine) == [str(123 * 4096)] * 2
        await machine.confine(None, 100 * 4096)
        assert limit_of_files(machine) == [str(100 * 4096)] * 2
        await machine.confine(None, None)
        assert limit_of_files(machine) == [str(100 * 4096)] * 2


def limit_of_files(machine: QemuMachine) -> list[str]:
    """Soft and hard."""
    limits = Path(f"/proc/{machine.pid}/limits").read_text()
    return limits.partition("Max file size")[2].split()[:2]


async def test_a_write_beyond_the_limit_does_not_end_it(launch: Launch) -> None:
    async with started(launch) as machine:
        status = Path(f"/proc/{machine.pid}/status").read_text()
        (ignored,) = re.findall(r"^SigIgn:\s*([0-9a-f]+)$", status, re.MULTILINE)
        assert int(ignored, 16) & 1 << (signal.SIGXFSZ - 1)


async def test_the_kernel_chooses_it_before_its_owner(launch: Launch) -> None:
    own = int(Path("/proc/self/oom_score_adj").read_text())
    async with started(launch) as machine:
        score = int(Path(f"/proc/{machine.pid}/oom_score_adj").read_text())
    assert score == min(own + process.OOM_SCORE, 1000)


async def test_it_lives_in_the_cgroup_that_it_is_given(launch: Launch) -> None:
    first, second = FakeCgroup(), FakeCgroup()
    async with started(replace(launch, cgroup=first)) as machine:
        assert first.added == [machine.pid]
        await machine.confine(second, None)
        assert second.added == [machine.pid]


async def test_a_cgroup_that_does_not_take_it_fails_the_start(launch: Launch) -> None:
    class Refusing(FakeCgroup):
        def add(self, pid: int) -> None:
            raise HostError("no room in the cgroup")

    with pytest.raises(HostError, match="no room in the cgroup"):
        await QemuMachine.start(replace(launch, cgroup=Refusing()))
    assert processes_of(launch) == []


@pytest.mark.parametrize(
    ("cause", "number", "said"),
    [
        ("its memory limit was reached", signal.SIGKILL, "its memory limit was reached"),
        (None, signal.SIGKILL, "by the kernel for want of memory"),
    ],
)
async def test_why_it_died_is_told(
    launch: Launch, cause: str | None, number: signal.Signals, said: str
) -> None:
    async with started(replace(launch, cgroup=FakeCgroup(cause))) as machine:
        os.kill(machine.pid, number)
        with pytest.raises(MachineDied, match=rf"\(process \d+\) died at stop: .*{said}") as death:
            await machine.pause()
        assert death.value.cause == machine.cause_of_death


async def test_what_it_crashed_of_is_told(launch: Launch) -> None:
    """No signal that is sent ends it, but for one: it is process 1 where it is."""
    async with started(launch) as machine:
        os.kill(machine.pid, signal.SIGSEGV)
        await machine._execute("query-status")
        spoil_code(machine)
        with pytest.raises(MachineDied, match="it got SIGSEGV"):
            await machine.pause()


def spoil_code(machine: QemuMachine) -> None:
    code = next(line for line in maps_of(machine) if " r-xp " in line and BINARY in line)
    first, last = (int(address, 16) for address in code.split()[0].split("-"))
    with Path(f"/proc/{machine.pid}/mem").open("r+b", buffering=0) as memory:
        memory.seek(first)
        memory.write(b"\xf4" * (last - first))  # hlt, which a kernel alone may use


def maps_of(machine: QemuMachine) -> list[str]:
    return Path(f"/proc/{machine.pid}/maps").read_text().splitlines()


async def test_a_death_on_request_needs_no_reason(launch: Launch) -> None:
    machine = await QemuMachine.start(replace(launch, cgroup=FakeCgroup("its memory limit")))
    await machine.kill()
    assert machine.cause_of_death is None


async def test_its_logs_stay_small(launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qemu, "LOGS_INTERVAL", 0.01)
    async with started(launch):
        for path in (launch.log, command.console_log(launch.log)):
            path.write_bytes(bytes(2 * logs.LIMIT_BYTES))
            async with asyncio.timeout(30):
                while path.stat().st_size > logs.LIMIT_BYTES:
                    await asyncio.sleep(0.01)


# Commands -------------------------------------------------------------------------------------


async def test_a_refusal_is_explained(launch: Launch) -> None:
    async with started(launch) as machine:
        with pytest.raises(MachineError, match="QEMU of sb-test refused device_del: ") as failure:
            await machine._execute("device_del", id="no-such-device")
        assert not isinstance(failure.value, MachineDied)
        assert is_alive(machine.pid)


async def test_a_device_state_that_is_none_ends_the_machine(launch: Launch) -> None:
    async with started(launch) as machine:
        with pytest.raises(MachineDied, match="died at"):
            await machine.load_state(b"this is no device state at all" * 10)


async def test_memory_is_mapped_privately_and_not_written(launch: Launch) -> None:
    async with started(launch) as machine:
        (line,) = (line for line in maps_of(machine) if line.endswith("/memory"))
        assert line.split()[1] == "rw-p"
    assert launch.memory.read_bytes() == bytes(RAM)


async def test_a_state_is_saved_and_loaded(booting: Launch, launch: Launch, place: Path) -> None:
    async with started(booting) as first:
        await first.pause()
        state = await first.save_state()
        assert await first.save_state() == state
        await first.resume()
    OverlayTemplates(place).create(place / "second.qcow2", DISK)
    async with started(replace(launch, overlay=place / "second.qcow2")) as second:
        await second.load_state(state)
        assert (await second._execute("query-status"))["status"] == "paused"
        await second.resume()
        assert (await second._execute("query-status"))["status"] == "running"


# Overlays -------------------------------------------------------------------------------------


@pytest.fixture
async def machine(booting: Launch) -> AsyncIterator[QemuMachine]:
    """A machine that runs: one that waits for its state has its disks shut."""
    async with started(booting) as running:
        yield running


async def test_an_overlay_is_added_and_switched_to(machine: QemuMachine, place: Path) -> None:
    assert await nodes(machine) == {"layer0", "overlay0"}
    OverlayTemplates(place).create(place / "next.qcow2", DISK)
    await machine.add_overlay(place / "next.qcow2")
    assert await nodes(machine) == {"layer0", "overlay0", "overlay1"}
    assert await disk_files(machine) == ["disk.qcow2", "base.qcow2"]
    await machine.switch_overlay()
    assert await disk_files(machine) == ["next.qcow2", "disk.qcow2", "base.qcow2"]


async def test_an_overlay_is_dropped_and_its_file_can_be_used_again(
    machine: QemuMachine, place: Path
) -> None:
    await machine.drop_overlay()  # there is none: nothing to do
    for name in ("one", "two"):
        OverlayTemplates(place).create(place / name, DISK)
        await machine.add_overlay(place / name)
        await machine.drop_overlay()
        await machine.drop_overlay()
        assert await nodes(machine) == {"layer0", "overlay0"}
    await machine.add_overlay(place / "one")
    await machine.switch_overlay()
    assert await disk_files(machine) == ["one", "disk.qcow2", "base.qcow2"]


async def test_a_switch_is_undone(machine: QemuMachine, place: Path) -> None:
    for name in ("one", "two"):
        OverlayTemplates(place).create(place / name, DISK)
        await machine.add_overlay(place / name)
        await machine.switch_overlay()
        await machine.undo_overlay()
        assert await disk_files(machine) == ["disk.qcow2", "base.qcow2"]
        assert await nodes(machine) == {"layer0", "overlay0"}
    OverlayTemplates(place).create(place / "three", DISK)
    await machine.add_overlay(place / "three")
    await machine.switch_overlay()
    assert await disk_files(machine) == ["three", "disk.qcow2", "base.qcow2"]


async def test_many_switches_one_after_another(machine: QemuMachine, place: Path) -> None:
    for number in range(5):
        OverlayTemplates(place).create(place / f"o{number}", DISK)
        await machine.add_overlay(place / f"o{number}")
        await machine.switch_overlay()
    assert await disk_files(machine) == ["o4", "o3", "o2", "o1", "o0", "disk.qcow2", "base.qcow2"]
    assert check_header(place / "o4", label="o4").virtual_size == DISK  # it refuses a backing file


async def test_a_bad_overlay_is_refused_and_changes_nothing(
    machine: QemuMachine, place: Path
) -> None:
    (place / "bad").write_bytes(b"no qcow2" * 100)
    with pytest.raises(MachineError, match="refused blockdev-add"):
        await machine.add_overlay(place / "bad")
    await machine.drop_overlay()
    OverlayTemplates(place).create(place / "good", DISK)
    await machine.add_overlay(place / "good")
    await machine.switch_overlay()
    assert await disk_files(machine) == ["good", "disk.qcow2", "base.qcow2"]


# Around it ------------------------------------------------------------------------------------


def test_the_version() -> None:
    assert qemu_version().count(".") == 2
    assert qemu_version() in subprocess.run(
        [BINARY, "--version"], capture_output=True, text=True, check=True
    ).stdout.replace("\n", " ")


@pytest.fixture
def no_cache() -> Iterator[None]:
    qemu_version.cache_clear()
    yield
    qemu_version.cache_clear()


@pytest.mark.usefixtures("no_cache")
@pytest.mark.parametrize(
    ("script", "complaint"),
    [
        (None, "does not run"),
        ("exit 1", "does not run"),
        ("echo QEMU emulator version 7.2.22", r"7\.2\.22 is too old: Ratoon needs 8\.2 or later"),
        ("echo QEMU emulator version unknown", "states no version: QEMU emulator version unknown"),
    ],
)
def test_a_qemu_that_does_not_say_its_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str | None, complaint: str
) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin" if script else str(tmp_path))
    if script:
        program = tmp_path / BINARY
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
    with pytest.raises(HostError, match=complaint):
        qemu_version()
