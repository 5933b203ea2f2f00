"""Cold starts, watched: what hangs is tried again, what dies says so, and nothing is left."""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest

from ratoon.engine.sandbox import boot as boot_module
from ratoon.engine.sandbox.boot import boot, boot_from
from ratoon.errors import BootTimeout, GuestError, MachineDied
from ratoon.machine.guest.build import Guest
from ratoon.machine.guest.shared import wire
from ratoon.machine.vmm import command
from ratoon.machine.vmm.driver import Hardware, Launch

Script = Callable[["Machine", asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Machine:
    """A machine without a VM: a socket where the agent would be, and a script for the agent."""

    cause_of_death = "it was the script"
    while_moving = staticmethod(nullcontext)

    def __init__(self, launch: Launch, script: Script) -> None:
        self.agent_socket = launch.runtime / "agent"
        self.console = command.console_log(launch.log)
        self.killed = False
        self._script = script
        self._died: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._writers: list[asyncio.StreamWriter] = []

    async def start(self) -> None:
        self.agent_socket.unlink(missing_ok=True)
        self.console.write_bytes(b"")
        self._server = await asyncio.start_unix_server(self._serve, self.agent_socket)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.append(writer)
        await self._script(self, reader, writer)

    def hang_up(self) -> None:
        for writer in self._writers:
            writer.close()

    def die(self) -> None:
        if not self._died.done():
            self._died.set_result("the log's end")

    async def packets(self) -> int:
        raise AssertionError

    async def wait_died(self) -> str:
        return await asyncio.shield(self._died)

    async def kill(self) -> None:
        self.killed = True
        self.die()
        self.hang_up()
        self._server.close()


async def silent(machine: Machine, *_: object) -> None:
    """Hangs before the kernel's first line."""


async def stuck(machine: Machine, *_: object) -> None:
    machine.console.write_text("Linux version 6.1\n")


async def dies(machine: Machine, *_: object) -> None:
    machine.die()


async def hangs_up_and_dies(machine: Machine, *_: object) -> None:
    """As a process that is killed: its sockets close a moment before it can be waited for."""
    machine.hang_up()
    await asyncio.sleep(0.05)
    machine.die()


async def hangs_up(machine: Machine, *_: object) -> None:
    machine.hang_up()


async def answers(
    machine: Machine, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    greeting = await reader.readexactly(wire.SYNC_BYTES)
    length, stream, _ = wire.HEADER.unpack(await reader.readexactly(wire.HEADER.size))
    assert json.loads(await reader.readexactly(length)) == {"op": "hello"}
    writer.write(greeting + wire.encode(stream, wire.REPLY, b'{"version": 7}'))


@pytest.fixture
def launch() -> Iterator[Launch]:
    with tempfile.TemporaryDirectory(prefix="ratoon-") as name:
        place = Path(name)
        hardware = Hardware(1 << 20, 1, "tcg", "max")
        yield Launch("base", hardware, place / "m", (), place / "d", place / "log", place)


@pytest.fixture
def machines(monkeypatch: pytest.MonkeyPatch) -> list[Machine]:
    """Those that were started; time passes quickly here."""
    monkeypatch.setattr(boot_module, "FIRST_LINE_TIMEOUT", 0.1)
    monkeypatch.setattr(boot_module, "AGENT_TIMEOUT", 0.3)
    return []


def starting(monkeypatch: pytest.MonkeyPatch, machines: list[Machine], *scripts: Script) -> None:
    class Driver:
        @staticmethod
        async def start(launch: Launch) -> Machine:
            machine = Machine(launch, scripts[len(machines)])
            machines.append(machine)
            await machine.start()
            return machine

    monkeypatch.setattr(boot_module, "QemuMachine", Driver)


async def test_it_boots(
    launch: Launch, machines: list[Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    starting(monkeypatch, machines, answers)
    booted = await boot(launch)
    assert booted.agent_version == 7
    assert not machines[0].killed
    booted.channel.close()
    await machines[0].kill()


async def test_one_that_hangs_is_tried_again(
    launch: Launch,
    machines: list[Machine],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    starting(monkeypatch, machines, silent, stuck, answers)
    booted = await boot(launch)
    assert [machine.killed for machine in machines] == [True, True, False]
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        "attempt 1",
        "attempt 2",
    ]
    booted.channel.close()
    await machines[2].kill()


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (silent, r"base did not boot within 0\.1 s; its console's end:\n\(nothing\)"),
        (stuck, r"base did not boot within 0\.3 s; its console's end:\nLinux version 6\.1"),
    ],
)
async def test_one_that_always_hangs(
    launch: Launch,
    machines: list[Machine],
    monkeypatch: pytest.MonkeyPatch,
    script: Script,
    message: str,
) -> None:
    starting(monkeypatch, machines, script, script)
    with pytest.raises(BootTimeout, match=message):
        await boot(launch, attempts=2)
    assert [machine.killed for machine in machines] == [True, True]


@pytest.mark.parametrize("script", [dies, hangs_up_and_dies])
async def test_one_that_dies_is_not_tried_again(
    launch: Launch, machines: list[Machine], monkeypatch: pytest.MonkeyPatch, script: Script
) -> None:
    starting(monkeypatch, machines, script)
    with pytest.raises(MachineDied, match="base died while booting: it was the script") as failure:
        await boot(launch)
    assert failure.value.log_tail == "the log's end"
    assert machines[0].killed


async def test_an_agent_that_hangs_up_alone(
    launch: Launch, machines: list[Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    starting(monkeypatch, machines, hangs_up)
    with pytest.raises(GuestError, match="the agent of base is closed"):
        await boot(launch)
    assert machines[0].killed


async def test_a_boot_that_is_cancelled(
    launch: Launch, machines: list[Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    starting(monkeypatch, machines, stuck)
    booting = asyncio.create_task(boot(launch))
    await asyncio.sleep(0.05)
    booting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await booting
    assert machines[0].killed


def test_the_counter_s_rate_is_told_where_a_guest_would_have_to_measure_it() -> None:
    """Under KVM its clock tells it."""
    guest = Guest(Path("/vmlinuz"), "0a" * 32, Path("/initramfs"), "0b" * 32)
    assert "tsc_early_khz=" in boot_from(guest, "tcg").command_line
    assert "tsc_early_khz=" not in boot_from(guest, "kvm").command_line
