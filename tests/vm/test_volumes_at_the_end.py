"""What a guest has written to a volume, and not closed, is with the host when its machine ends."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from vm_helpers import FOR_EVER, no_space, sh, until
from volume_writer import Writer, volumes

from ratoon.api.answers import Event
from ratoon.engine.sandbox.engine import Engine
from ratoon.engine.sandbox.incarnation import SYNC_SECONDS
from ratoon.engine.sandbox.mounts import Mounts
from ratoon.engine.sandbox.options import SandboxOptions, Volume
from ratoon.engine.sandbox.sandbox import Sandbox
from ratoon.errors import GuestTimeout
from ratoon.machine.guest.channel import Channel
from ratoon.machine.volumes.export import Export

#: Holds a file open that it has written to.
HOLD = """
import time
file = open("/mnt/shared/file", "w")
file.write("old")
file.flush()
open("/dev/shm/written", "w").close()
time.sleep(1000)
"""


async def hold(sandbox: Sandbox) -> None:
    await sandbox.files.write("/root/hold.py", HOLD.encode())
    await sh(sandbox, "setsid python3 /root/hold.py </dev/null >/dev/null 2>&1 &")
    await sh(sandbox, "until [ -e /dev/shm/written ]; do sleep 0.05; done")


async def killed(engine: Engine, sandbox: Sandbox) -> None:
    await sandbox.kill()


async def block_left(engine: Engine, sandbox: Sandbox) -> None:
    async with sandbox:
        pass


async def block_cancelled(engine: Engine, sandbox: Sandbox) -> None:
    """As Ctrl-C does."""

    async def body() -> None:
        async with sandbox:
            await asyncio.sleep(FOR_EVER)

    task = asyncio.create_task(body())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def time_over(engine: Engine, sandbox: Sandbox) -> None:
    sandbox.options = sandbox.options.model_copy(update={"ttl_seconds": 1})
    await until(lambda: sandbox.state == "killed", "its end")
    await sandbox.kill()


async def reset(engine: Engine, sandbox: Sandbox) -> None:
    await engine.reset(sandbox)


async def stood_by(engine: Engine, sandbox: Sandbox) -> None:
    await engine.standby(sandbox)


#: How a machine ends on purpose.
ENDS = [killed, block_left, block_cancelled, time_over, reset, stood_by]


@pytest.mark.parametrize("end", ENDS)
async def test_what_was_written_is_there(
    engine: Engine, tmp_path: Path, end: Callable[[Engine, Sandbox], Awaitable[None]]
) -> None:
    sandbox = await engine.fork_one("base", volumes(tmp_path))
    try:
        writer = await Writer.begin(sandbox, tmp_path)
        written = await writer.written()
        await end(engine, sandbox)
        print(f"{end.__name__}: of {written} lines, lost {writer.lost(written)}")
        assert sandbox.unsynced is None
        assert writer.lost(written) == (0, 0)
    finally:
        await sandbox.kill()


async def test_an_engine_that_keeps_none_ends_them_all(engine: Engine, tmp_path: Path) -> None:
    async with Engine.open(engine.store.home) as other:
        writers = []
        for name in ("one", "two"):
            shared = tmp_path / name
            shared.mkdir()
            sandbox = await other.fork_one("base", volumes(shared))
            writers.append(await Writer.begin(sandbox, shared))
        written = [await each.written() for each in writers]
    lost = [each.lost(count) for each, count in zip(writers, written, strict=True)]
    print(f"engine: of {written} lines, lost {lost}")
    assert lost == [(0, 0), (0, 0)]


async def test_an_engine_that_keeps_them_leaves_all_with_the_host(
    engine: Engine, tmp_path: Path
) -> None:
    async with Engine.open(engine.store.home, keep=True) as keeping:
        sandbox = await keeping.fork_one("base", volumes(tmp_path))
        writer = await Writer.begin(sandbox, tmp_path)
        written = await writer.written()
    lost = writer.lost(written)
    async with Engine.open(engine.store.home, keep=True) as following:
        (sandbox,) = following.sandboxes
        async with sandbox:
            more = await Writer(sandbox, tmp_path).written()
    print(f"engine that keeps: of {written} lines, lost {lost}; of {more} in the end, ", end="")
    print(writer.lost(more))
    assert (lost, writer.lost(more)) == ((0, 0), (0, 0))


async def test_the_next_sandbox_has_what_the_former_wrote(engine: Engine, tmp_path: Path) -> None:
    options = SandboxOptions(volumes=(Volume(source="handed", target="/mnt/shared"),))
    async with await engine.fork_one("base", options) as former:
        written = await (await Writer.begin(former, tmp_path)).written()
    async with await engine.fork_one("base", options) as following:
        assert int(await sh(following, "wc -l </mnt/shared/lines")) >= written


async def test_while_it_runs_the_host_sees_it_within_a_second(
    engine: Engine, tmp_path: Path
) -> None:
    """And so a machine that dies loses no more; ten times as much is granted to a busy host."""
    async with await engine.fork_one("base", volumes(tmp_path)) as sandbox:
        writer = await Writer.begin(sandbox, tmp_path)
        began = time.monotonic()
        delays = []
        for _ in range(3):
            written = await writer.written()
            asked = time.monotonic()
            while max(writer.lost(written)) and time.monotonic() < asked + 10:
                await asyncio.sleep(0.05)
            assert writer.lost(written) == (0, 0)
            delays.append(round(time.monotonic() - asked, 2))
        print(f"seen by the host after {delays} s")

        while time.monotonic() < began + 12:
            await asyncio.sleep(0.1)
        written = await writer.written()
        seconds = time.monotonic() - began
        os.kill(sandbox.pid, signal.SIGKILL)
        await until(lambda: sandbox.state == "dead", "its death")
        print(f"SIGKILL of QEMU: of {written} lines, lost {writer.lost(written)}")
        assert max(writer.lost(written)) < 10 * written / seconds


async def test_the_kernel_hurries_only_for_volumes_that_are_written(
    engine: Engine, tmp_path: Path
) -> None:
    pace = "cat /proc/sys/vm/dirty_expire_centisecs /proc/sys/vm/dirty_writeback_centisecs"
    given = Volume(source=str(tmp_path), target="/mnt/given", read_only=True)
    async with await engine.fork_one("base", SandboxOptions(volumes=(given,))) as reader:
        unhurried = await sh(reader, pace)
    async with await engine.fork_one("base", volumes(tmp_path)) as sandbox:
        assert await sh(sandbox, pace) != unhurried
        await engine.branch(sandbox, "hurried")
        async with await engine.fork_one("hurried") as fork:
            assert await sh(fork, pace) == unhurried


# Where it cannot be had --------------------------------------------------------------------------


async def stopped(sandbox: Sandbox) -> None:
    """QEMU answers nobody."""
    os.kill(sandbox.pid, signal.SIGSTOP)


async def agent_stopped(sandbox: Sandbox) -> None:
    """The guest runs, but its agent does not."""
    script = "mount -t cgroup2 none /mnt; echo 1 >/mnt/agent/cgroup.freeze"
    task = asyncio.create_task(sandbox.exec(["sh", "-c", script]))
    answers = True
    while answers:
        try:
            await sandbox.request("hello", timeout=1)
        except GuestTimeout:
            answers = False
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def died(sandbox: Sandbox) -> None:
    os.kill(sandbox.pid, signal.SIGKILL)
    await until(lambda: sandbox.state == "dead", "its death")


HUNG = [(stopped, "did not answer"), (agent_stopped, "did not answer"), (died, "died")]


@pytest.mark.parametrize(("hang", "reason"), HUNG)
async def test_an_end_waits_no_longer_than_it_may(
    engine: Engine, tmp_path: Path, hang: Callable[[Sandbox], Awaitable[None]], reason: str
) -> None:
    sandbox = await engine.fork_one("base", volumes(tmp_path))
    await hang(sandbox)
    with engine.events.listen() as listener:
        began = time.monotonic()
        await sandbox.kill()
        took = time.monotonic() - began
        heard = [await listener.next()]
        while heard[-1] and heard[-1].kind != "killed":
            heard.append(await listener.next())
    print(f"{hang.__name__}: killed after {took:.2f} s, {sandbox.unsynced}")
    assert took < SYNC_SECONDS + 10
    assert reason in (sandbox.unsynced or "")
    assert [each and each.kind for each in heard] == ["unsynced", "killed"]
    assert isinstance(heard[0], Event)
    assert (heard[0].sandbox, heard[0].reason) == (sandbox.id, sandbox.unsynced)


async def test_at_once_or_with_nothing_to_write_to_nobody_is_asked(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    request = Channel.request

    async def listening(channel: Channel, op: str, **fields: Any) -> dict[str, Any]:
        asked.append(op)
        return await request(channel, op, **fields)

    monkeypatch.setattr(Channel, "request", listening)
    given = Volume(source=str(tmp_path), target="/mnt/given", read_only=True)
    for options, now in (
        (SandboxOptions(), False),
        (SandboxOptions(volumes=(given,)), False),
        (volumes(tmp_path), True),
    ):
        sandbox = await engine.fork_one("base", options)
        asked.clear()
        if now:
            await stopped(sandbox)
        await sandbox.kill(now=now)
        assert (asked, sandbox.unsynced) == ([], None)


async def test_a_volume_that_cannot_take_it(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor could it be written while the sandbox ran, and nobody who could be told has closed it."""
    async with await engine.fork_one("base", volumes(tmp_path)) as sandbox:
        monkeypatch.setattr(Export, "write", no_space)
        await hold(sandbox)
    assert sandbox.unsynced == "No space left on device"
    assert (tmp_path / "file").read_text() == ""


async def test_a_reset_of_one_that_hangs_goes_on(engine: Engine, tmp_path: Path) -> None:
    async with await engine.fork_one("base", volumes(tmp_path)) as sandbox:
        await stopped(sandbox)
        await engine.reset(sandbox)
        assert "did not answer" in (sandbox.unsynced or "")
        await sh(sandbox, "echo again >/mnt/shared/again")
        await engine.reset(sandbox)
        assert sandbox.unsynced is None
        assert (tmp_path / "again").read_text() == "again\n"


async def test_a_reset_that_fails_lets_the_sandbox_go_on(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with await engine.fork_one("base", volumes(tmp_path)) as sandbox:
        writer = await Writer.begin(sandbox, tmp_path)
        with monkeypatch.context() as patch:
            patch.setattr(Mounts, "serve", no_space)
            with pytest.raises(OSError, match="No space"):
                await engine.reset(sandbox)
        written = await writer.written()
        await sh(sandbox, f"until [ $(cat /dev/shm/count) -gt {written + 5} ]; do sleep 0.05; done")


async def test_a_fork_never_writes_what_its_source_had_yet_to_write(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even one that has the same volume, of a snapshot whose sync failed."""
    let, write = threading.Event(), Export.write

    def late(*arguments: Any, **options: Any) -> None:
        let.wait()
        write(*arguments, **options)

    async with await engine.fork_one("base", volumes(tmp_path)) as source:
        monkeypatch.setattr(Export, "write", late)
        await hold(source)
        branched = await engine.branch(source, "late")
        let.set()
        warning = branched.snapshot.manifest.warning
        await sh(source, "sync")
        assert (tmp_path / "file").read_text() == "old"
        assert "not all that it had written was in its volumes" in (warning or "")
    (tmp_path / "file").write_text("new")
    async with await engine.fork_one("late", volumes(tmp_path)) as fork:
        await sh(fork, "sync; echo here >/mnt/shared/here; sync")
        assert (tmp_path / "file").read_text() == "new"
        assert await sh(fork, "cat /mnt/shared/file") == "new"
    assert (tmp_path / "here").read_text() == "here\n"
