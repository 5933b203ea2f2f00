"""Guests under KVM: a small one of our own, as KVM may open and still not boot a stock kernel.

See `mini_guest.c`. All that is between a machine and its forks is what sandboxes have: QemuMachine,
the pages that were changed, and a copy of them.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from ratoon.engine.sandbox.accelerator import settle_here
from ratoon.engine.sandbox.memory_images import MappedMemory
from ratoon.errors import Incompatible, MachineDied
from ratoon.machine.vmm import command, kvm
from ratoon.machine.vmm.cpu import NATIVE, Settled
from ratoon.machine.vmm.driver import Boot, Hardware, Launch
from ratoon.machine.vmm.given_files import Files
from ratoon.machine.vmm.qemu import QemuMachine
from ratoon.store.disk.qcow2 import OverlayTemplates
from ratoon.store.memory.dirty import dirty_pages
from ratoon.store.memory.page import PAGE_SIZE
from ratoon.store.memory.process import read_into

pytestmark = pytest.mark.skipif(not kvm.opens(), reason=f"{kvm.DEVICE} does not open")

RAM = 16 * 1024 * 1024
DISK = 1024 * 1024
SOURCE = Path(__file__).with_name("mini_guest.c")
#: Seconds after which something has hung.
FOR_EVER = 60
#: That of the guest's clock, which KVM itself writes when it is given one's state.
CLOCK_PAGE = 0x403
#: A feature that no processor has had for a decade.
LACKING = "3dnow"


@pytest.fixture(scope="session")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mini") / "mini.elf"
    segments = "-Wl,-Ttext-segment=0x400000,-z,noseparate-code,-e,start,--build-id=none"
    words = ("-nostdlib", "-ffreestanding", "-fno-pic", "-no-pie", "-static", "-O1", "-Wall")
    subprocess.run(["gcc", "-m32", *words, "-Werror", segments, "-o", path, SOURCE], check=True)
    return path


@pytest.fixture(scope="module")
async def settled() -> Settled:
    return await settle_here(NATIVE)


@pytest.fixture(autouse=True)
def quick_firmware(monkeypatch: pytest.MonkeyPatch) -> None:
    """The usual one takes seconds where KVM emulates most of it."""
    arguments = command.arguments

    def changed(launch: Launch, files: Files, **fds: int) -> list[str]:
        words = arguments(launch, files, **fds)
        return [*words, "-bios", "qboot.rom"] if launch.boot else words

    monkeypatch.setattr(command, "arguments", changed)


@dataclass(frozen=True)
class Line:
    """What the guest tells of a round; see `mini_guest.c`."""

    round: int
    errors: int
    clock: int
    flags: int
    armed: int
    features: int
    other_round: int
    other_errors: int
    other_armed: int


@dataclass(frozen=True)
class Capture:
    """A machine as it was at a moment, all of its memory, and the last line that it had told."""

    state: bytes
    ram: NDArray[np.uint8]
    last: Line


@dataclass(frozen=True)
class Guest:
    """A machine that runs the guest; `below` is what the file has that it maps."""

    machine: QemuMachine
    launch: Launch
    below: NDArray[np.uint8]

    def lines(self) -> list[Line]:
        """All that are whole; of a fork's, the first began elsewhere."""
        text = command.console_log(self.launch.log).read_text()
        whole = text.split("\n")[0 if self.launch.boot else 1 : -1]
        return [Line(*(int(word, 16) for word in line.split())) for line in whole]

    async def tell(self, count: int, after: int = 0) -> list[Line]:
        """Wait for so many lines of rounds later than `after`; all of those."""
        async with asyncio.timeout(FOR_EVER):
            while len(found := [line for line in self.lines() if line.round > after]) < count:
                assert not self.machine.has_died, await self.machine.wait_died()
                await asyncio.sleep(0.01)
        return found

    async def other_armed(self) -> None:
        """Wait for the second processor, which runs when the host lets it."""
        while not (last := self.lines()[-1]).other_armed:
            await self.tell(1, last.round)

    async def capture(self) -> Capture:
        """As it is; it stands still afterwards."""
        await self.machine.pause()
        state = await self.machine.save_state()
        return Capture(state, self._ram(), self.lines()[-1])

    def _ram(self) -> NDArray[np.uint8]:
        pid, memory = self.machine.pid, MappedMemory.of(self.launch.memory)
        start = memory.address_in(pid)
        numbers = dirty_pages(pid, start, memory.length)
        pages = np.empty((len(numbers), PAGE_SIZE), np.uint8)
        read_into(pid, start, numbers, pages)
        ram = self.below.copy()
        ram[numbers] = pages
        return ram


class Place:
    """Where machines are started."""

    def __init__(self, path: Path, kernel: Path, cpu: str) -> None:
        self._path = path
        self._kernel = kernel
        self._cpu = cpu
        self._count = 0

    def launch(self, ram: NDArray[np.uint8] | None = None, vcpus: int = 1) -> Launch:
        self._count += 1
        place = self._path / str(self._count)
        place.mkdir()
        memory, initramfs = place / "memory", place / "initramfs"
        memory.touch()
        os.truncate(memory, RAM)
        if ram is not None:
            ram.tofile(memory)
        initramfs.write_bytes(bytes(512))
        OverlayTemplates(place).create(place / "disk", DISK)
        return Launch(
            name=f"mini-{self._count}",
            hardware=Hardware(RAM, vcpus, "kvm", self._cpu),
            memory=memory,
            disks=(),
            overlay=place / "disk",
            log=place / "log",
            runtime=place / "run",
            boot=None if ram is not None else Boot(self._kernel, initramfs, str(vcpus)),
        )

    def crashing(self) -> Launch:
        """What boots a guest that jumps, in its third round, to where there is no memory."""
        launch = self.launch()
        assert launch.boot
        return replace(launch, boot=replace(launch.boot, command_line="crash"))

    @asynccontextmanager
    async def booted(self, vcpus: int) -> AsyncIterator[Guest]:
        launch = self.launch(vcpus=vcpus)
        zero = np.zeros((RAM // PAGE_SIZE, PAGE_SIZE), np.uint8)
        async with _started(launch) as machine:
            yield Guest(machine, launch, zero)

    @asynccontextmanager
    async def forked(self, source: Capture, vcpus: int) -> AsyncIterator[Guest]:
        """A fork that runs; before it does, its memory is that of its source to the byte."""
        launch = self.launch(source.ram, vcpus)
        async with _started(launch) as machine:
            await machine.load_state(source.state)
            guest = Guest(machine, launch, source.ram)
            changed = np.flatnonzero((guest._ram() != source.ram).any(axis=1))
            assert set(changed) <= {CLOCK_PAGE}
            await machine.resume()
            yield guest


@asynccontextmanager
async def _started(launch: Launch) -> AsyncIterator[QemuMachine]:
    machine = await QemuMachine.start(launch)
    try:
        yield machine
    finally:
        await machine.kill()


@pytest.fixture
def place(tmp_path_factory: pytest.TempPathFactory, kernel: Path, settled: Settled) -> Place:
    """A directory with a path short enough for sockets."""
    return Place(tmp_path_factory.mktemp("k"), kernel, settled.model)


async def assert_goes_on(before: Line, guest: Guest) -> None:
    """The guest, or a fork of it, goes on where it was, and has lost nothing."""
    after = await guest.tell(3, before.round)
    rounds = [line.round for line in after]
    assert rounds == [*range(rounds[0], rounds[0] + len(rounds))]
    assert before.round < rounds[0] <= before.round + 2
    clocks = [before.clock, *(line.clock for line in after)]
    assert clocks == sorted(clocks)
    for line in after:
        assert (line.errors, line.other_errors) == (0, 0)
        assert line.flags & 1 == before.flags & 1
        assert (line.armed, line.other_armed) == (before.armed, before.other_armed)
        assert line.features == before.features
        assert line.other_round >= before.other_round
    assert after[-1].other_round > before.other_round or not before.other_round


@pytest.mark.parametrize("vcpus", [1, 2])
async def test_forks_of_a_guest_that_writes(place: Place, vcpus: int) -> None:
    """It is captured in the middle of a round, goes on, and so do a fork and a fork of that."""
    async with place.booted(vcpus) as source:
        await source.tell(3)
        if vcpus == 2:
            await source.other_armed()
        before = source.lines()[-1]
        assert before.armed
        assert bool(before.other_armed) == (vcpus == 2)
        first = await source.capture()
        await source.machine.resume()
        await assert_goes_on(first.last, source)
        second = await source.capture()
        assert not np.array_equal(first.ram, second.ram)
    for capture in (first, second):
        async with place.forked(capture, vcpus) as fork:
            await assert_goes_on(capture.last, fork)
            third = await fork.capture()
    async with place.forked(third, vcpus) as fork, place.forked(third, vcpus) as twin:
        for each in (fork, twin):
            await assert_goes_on(third.last, each)


async def test_what_was_settled_is_all_there_is(settled: Settled) -> None:
    """The list says all of the model: asked again, there is nothing more, or less."""
    assert await settle_here(settled.model) == Settled(settled.model)
    assert "vmx=on" not in settled.model
    assert "svm=on" not in settled.model


async def test_a_processor_that_this_host_does_not_have(place: Place) -> None:
    """QEMU alone would load the state, and drop what the processor lacks."""
    launch = place.launch()
    hardware = replace(launch.hardware, cpu=f"{launch.hardware.cpu},{LACKING}=on")
    for each in (replace(launch, boot=None), launch):
        with pytest.raises(Incompatible, match=f"KVM cannot give mini-1 .* lacks {LACKING};"):
            await QemuMachine.start(replace(each, hardware=hardware))


async def test_a_guest_that_kvm_cannot_run_on_has_died(place: Place) -> None:
    """It stops as one does whose disk is full; nobody is told to make room."""
    launch = place.crashing()
    async with _started(launch) as machine:
        async with asyncio.timeout(FOR_EVER), machine.while_moving():
            assert "Code=" in await machine.wait_died()
        assert machine.cause_of_death is not None
        for words in ("its guest has ended (internal-error)", "KVM internal error", "Code="):
            assert words in machine.cause_of_death


async def test_one_that_ended_while_nobody_looked(place: Place) -> None:
    launch = replace(place.crashing(), survives=True)
    machine = await QemuMachine.start(launch)
    pid = machine.pid
    await machine.let_go()
    async with asyncio.timeout(FOR_EVER):
        while "KVM internal error" not in launch.log.read_text():
            await asyncio.sleep(0.01)
    with pytest.raises(MachineDied, match=r"its guest has ended \(internal-error\): KVM internal"):
        await QemuMachine.attach(launch.name, pid, launch.log, launch.runtime)
    assert await asyncio.to_thread(os.waitpid, pid, 0) == (pid, signal.SIGKILL)
