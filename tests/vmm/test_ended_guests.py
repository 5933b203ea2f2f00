"""A guest that stops unasked stands still, or has ended: QEMU, a fake one here, is asked which."""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from ratoon.errors import MachineDied, OutOfDisk
from ratoon.machine.vmm.qemu import QemuMachine

#: Seconds after which something has hung.
FOR_EVER = 60
ENDED = ["internal-error", "guest-panicked", "shutdown"]
VERSION = {"qemu": {"major": 10, "minor": 0, "micro": 2}, "package": ""}
LOG = "KVM internal error. Suberror: 1\nemulation failure\nEIP=d0000000\nCode=?? <??> ??\n"


class Monitor:
    """Speaks QMP for a machine that is in this `status`."""

    def __init__(self) -> None:
        self.status = "running"
        self._writers: list[asyncio.StreamWriter] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.append(writer)
        self._send({"QMP": {"version": VERSION, "capabilities": []}})
        text = ""
        while more := await reader.read(1 << 16):
            text += more.decode()
            while text:  # one after the other, with nothing in between; each is sent at once
                request, end = json.JSONDecoder().raw_decode(text)
                text = text[end:]
                self._answer(request)
        writer.close()

    def _answer(self, request: dict[str, Any]) -> None:
        named = {"id": request["id"]} if "id" in request else {}
        status = {"status": self.status, "running": self.status == "running"}
        if request["execute"] == "cont" and self.status in ENDED:
            what = {"class": "GenericError", "desc": "Resetting the Virtual Machine is required"}
            self._send({"error": what, **named})
        else:
            self._send({"return": status if request["execute"] == "query-status" else {}, **named})

    def stop(self, status: str) -> None:
        """Stop unasked."""
        self.status = status
        self._send({"event": "STOP", "timestamp": {"seconds": 1, "microseconds": 0}})

    def _send(self, message: object) -> None:
        self._writers[-1].write(json.dumps(message).encode() + b"\r\n")


@pytest.fixture
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a path short enough for sockets."""
    return tmp_path_factory.mktemp("e")


@pytest.fixture
async def monitor(place: Path) -> AsyncIterator[Monitor]:
    (place / "run").mkdir()
    (place / "log").write_text(LOG)
    monitor = Monitor()
    async with await asyncio.start_unix_server(monitor.serve, place / "run" / "qmp"):
        yield monitor


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    """In place of QEMU itself."""
    with subprocess.Popen(["sleep", "600"]) as process:
        yield process
        process.kill()


async def attach(place: Path, process: subprocess.Popen[bytes]) -> QemuMachine:
    async with asyncio.timeout(FOR_EVER):
        return await QemuMachine.attach("sb-1", process.pid, place / "log", place / "run")


async def wait_in_vain(machine: QemuMachine) -> None:
    async with asyncio.timeout(FOR_EVER), machine.while_moving():
        await machine.wait_died()


@pytest.mark.parametrize("status", ENDED)
async def test_one_that_has_ended_is_no_full_disk(
    place: Path, monitor: Monitor, process: subprocess.Popen[bytes], status: str
) -> None:
    machine = await attach(place, process)
    monitor.stop(status)
    await wait_in_vain(machine)
    assert machine.has_died
    assert machine.cause_of_death == (
        f"its guest has ended ({status}): KVM internal error. Suberror: 1; Code=?? <??> ??"
    )
    await machine.kill()


async def test_one_that_stands_still_waits_for_room(
    place: Path, monitor: Monitor, process: subprocess.Popen[bytes]
) -> None:
    machine = await attach(place, process)
    monitor.stop("io-error")
    with pytest.raises(OutOfDisk, match="sb-1 stands still"):
        await wait_in_vain(machine)
    assert not machine.has_died
    await machine.kill()


async def test_one_that_goes_on_meanwhile_does_not_stand_still(
    place: Path, monitor: Monitor, process: subprocess.Popen[bytes]
) -> None:
    machine = await attach(place, process)
    monitor.stop("running")
    for _ in range(3):
        await machine.is_running()  # so what was asked before this is answered
    async with machine.while_moving():
        pass
    await machine.kill()


@pytest.mark.parametrize("status", ENDED)
async def test_one_that_ended_before_it_was_found(
    place: Path, monitor: Monitor, process: subprocess.Popen[bytes], status: str
) -> None:
    monitor.status = status
    with pytest.raises(MachineDied, match=rf"its guest has ended \({status}\)") as failure:
        await attach(place, process)
    assert "Code=" in failure.value.log_tail


@pytest.mark.parametrize("status", ENDED)
async def test_one_that_ended_as_it_was_paused(
    place: Path, monitor: Monitor, process: subprocess.Popen[bytes], status: str
) -> None:
    """It stopped as it was asked to, so far as anybody can tell; but it does not go on."""
    machine = await attach(place, process)
    await machine.pause()
    monitor.status = status
    with pytest.raises(MachineDied, match=rf"its guest has ended \({status}\)"):
        await machine.resume()
    await machine.kill()
