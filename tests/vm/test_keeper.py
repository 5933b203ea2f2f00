"""Sandboxes whose time is over, or that nobody uses."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from vm_helpers import CHECK, FOR_EVER, WRITE, Counter, leaves_nothing, no_space, sh, until

from ratoon.engine.sandbox import layer
from ratoon.engine.sandbox.engine import Engine
from ratoon.engine.sandbox.options import SandboxOptions
from ratoon.engine.sandbox.sandbox import Sandbox
from ratoon.errors import Conflict
from ratoon.machine.guest import commands
from ratoon.machine.network.policy import NetworkPolicy
from ratoon.store.memory.writing import writing_page_set


async def forked(engine: Engine, **options: Any) -> Sandbox:
    """By default its own doings do not count, so that a test says when it is used."""
    return await engine.fork_one("base", SandboxOptions(**{"idle_counts": "calls", **options}))


def over(sandbox: Sandbox) -> None:
    """As if nobody had used it for as long as it may be idle."""
    assert sandbox.options.idle_seconds
    sandbox._last_used -= sandbox.options.idle_seconds


async def dozing(sandbox: Sandbox) -> None:
    over(sandbox)
    await until(lambda: sandbox.state == "standby", "its standby")


async def test_its_time_is_over(engine: Engine) -> None:
    with leaves_nothing(engine):
        running, standing_by, dead = [await forked(engine, ttl_seconds=3600) for _ in range(3)]
        async with await forked(engine) as other:
            await engine.standby(standing_by)
            os.kill(dead.pid, signal.SIGKILL)
            for each in (running, standing_by, dead):
                older = {"created_at_unix": each.record.created_at_unix - 3600}
                each.record = each.record.model_copy(update=older)
            await until(lambda: engine.sandboxes == (other,), "the end of the others")
            for each in (running, standing_by, dead):
                await each.kill()  # to its end
                assert each.state == "killed"
                assert not each.directory.path.exists()
            assert await sh(other, "echo spared") == "spared\n"


async def test_it_dozes_when_nobody_uses_it_and_wakes_when_somebody_does(engine: Engine) -> None:
    async with await forked(engine, idle_seconds=600) as sandbox:
        await sh(sandbox, WRITE.format("before"))
        counter = await Counter.begin(sandbox)
        for use in (
            lambda: sh(sandbox, "true"),
            lambda: engine.branch(sandbox, "woken"),
            lambda: engine.reset(sandbox),
            lambda: sandbox.files.read("/root/before"),
        ):
            pid = sandbox.pid
            await dozing(sandbox)
            assert not Path(f"/proc/{pid}").exists() or sandbox.changing.locked()
            await use()
            assert sandbox.state == "running"
            await sh(sandbox, CHECK)
        await counter.assert_counts(sandbox)


async def test_many_wake_it_at_once(engine: Engine) -> None:
    async with await forked(engine, idle_seconds=600) as sandbox:
        await dozing(sandbox)
        answers = await asyncio.gather(*(sh(sandbox, f"echo {n}") for n in range(4)))
        assert answers == [f"{n}\n" for n in range(4)]


async def test_used_while_it_goes_to_standby(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever comes too late to prevent it waits, and then has it woken: nobody is refused."""
    async with await forked(engine, idle_seconds=600) as sandbox:
        await sh(sandbox, WRITE.format("before"))
        loop = asyncio.get_running_loop()
        uses: list[asyncio.Task[str]] = []
        write = writing_page_set

        def use_first(*arguments: Any) -> Any:
            started = asyncio.run_coroutine_threadsafe(begin_use(), loop)
            started.result()
            return write(*arguments)

        async def begin_use() -> None:
            uses.append(asyncio.create_task(sh(sandbox, f"{CHECK}; echo used")))
            await asyncio.sleep(0)

        with monkeypatch.context() as patch:
            patch.setattr(layer, "writing_page_set", use_first)
            over(sandbox)
            await until(lambda: bool(uses), "the use")
            assert await uses[0] == "used\n"
        assert sandbox.state == "running"


async def test_what_is_used_is_not_idle(engine: Engine) -> None:
    async with await forked(engine, idle_seconds=0.6) as sandbox:
        pid = sandbox.pid
        assert await sh(sandbox, "sleep 3; echo done") == "done\n"
        assert sandbox.pid == pid
        async with sandbox.in_use():
            over(sandbox)
            assert sandbox.idle_seconds == 0
            await asyncio.sleep(1.5)
            assert (sandbox.pid, sandbox.state) == (pid, "running")


async def test_used_when_it_was_about_to_be_suspended(engine: Engine) -> None:
    """It was idle when the keeper looked, and waits for somebody else to be done with it."""
    async with await forked(engine, idle_seconds=600) as sandbox:
        pid = sandbox.pid
        async with sandbox.changing:
            over(sandbox)
            await asyncio.sleep(1.5)  # the keeper has seen it by then, or sees no idle one later
            assert await sh(sandbox, "echo used") == "used\n"
        await asyncio.sleep(1.5)
        assert (sandbox.state, sandbox.pid) == ("running", pid)


async def test_who_was_put_to_standby_does_not_wake(engine: Engine) -> None:
    async with await forked(engine, idle_seconds=600) as sandbox:
        await dozing(sandbox)
        await sh(sandbox, "true")
        await engine.standby(sandbox)
        with pytest.raises(Conflict, match="is in standby; resume it first"):
            await sh(sandbox, "true")
        await engine.resume(sandbox)
        await dozing(sandbox)
        await sh(sandbox, "true")


async def test_a_disk_that_is_full_does_not_end_the_keeper(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with await forked(engine, idle_seconds=600) as sandbox:
        with monkeypatch.context() as patch:
            patch.setattr(layer, "writing_page_set", no_space)
            over(sandbox)
            await until(lambda: "No space left" in caplog.text, "the failure")
            assert sandbox.idle_seconds < 600, "it is not tried again at once"
        assert await sh(sandbox, "echo alive") == "alive\n"
        await dozing(sandbox)
        assert await sh(sandbox, "echo alive") == "alive\n"


async def test_forks_and_resumes_of_one_that_dozes(engine: Engine) -> None:
    async with await forked(engine, idle_seconds=600) as sandbox:
        await dozing(sandbox)
        (fork,) = await engine.fork_sandbox(sandbox)
        assert isinstance(fork, Sandbox)
        async with fork:
            assert sandbox.state == "standby", "to be forked it need not wake"
            assert fork.options == sandbox.options
        await engine.resume(sandbox)
        await sh(sandbox, "true")


# What counts as use ------------------------------------------------------------------------------

BUSY = ["sh", "-c", "while :; do :; done"]
#: Some ten packets a second, for which it does next to nothing.
SENDS = """
import socket, time
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
    while True:
        sender.sendto(b"x", ("198.51.100.7", 9))
        time.sleep(0.1)
"""
SERVES = "python3 -m http.server 8000 >/dev/null 2>&1"


async def in_background(sandbox: Sandbox, argv: list[str]) -> int:
    async with commands.start(sandbox, argv, background=True) as started:
        assert started.pid is not None
        return started.pid


@pytest.mark.parametrize(
    ("counts", "network", "argv"),
    [
        ("activity", None, BUSY),
        ("activity", "allow:198.51.100.7:9", ["python3", "-c", SENDS]),
        ("commands", None, ["sleep", "100000"]),
    ],
    ids=["processor", "network", "command"],
)
async def test_what_goes_on_in_the_background_is_use(
    engine: Engine, counts: str, network: str | None, argv: list[str]
) -> None:
    policy = NetworkPolicy.parse(network) if network else None
    options = {"idle_seconds": 6, "idle_counts": counts, "network": policy}
    async with await forked(engine, **options) as sandbox:
        running, pid = sandbox.pid, await in_background(sandbox, argv)
        await asyncio.sleep(16)
        assert (sandbox.state, sandbox.pid) == ("running", running)
        await commands.signal(sandbox, pid, signal.SIGKILL)
        await until(lambda: sandbox.state == "standby", "its standby")


@pytest.mark.parametrize(
    ("counts", "argv"), [("activity", ["sleep", "100000"]), ("calls", BUSY)], ids=["waits", "calls"]
)
async def test_what_does_not_count_does_not_keep_it_awake(
    engine: Engine, counts: str, argv: list[str]
) -> None:
    async with await forked(engine, idle_seconds=6, idle_counts=counts) as sandbox:
        await in_background(sandbox, argv)
        await until(lambda: sandbox.state == "standby", "its standby")


async def test_a_server_that_waits_sleeps_and_a_connection_wakes_it(engine: Engine) -> None:
    async with await forked(engine, idle_seconds=3, idle_counts="activity") as sandbox:
        await in_background(sandbox, ["sh", "-c", SERVES])
        await sh(sandbox, "until grep -q ':1F40 ' /proc/net/tcp; do sleep 0.1; done")
        port = sandbox.publish(8000)
        with engine.events.listen() as listener:
            for _ in range(2):
                await until(lambda: sandbox.state == "standby", "its standby")
                reader, writer = await asyncio.open_connection("127.0.0.1", port.host_port)
                writer.write(b"GET /etc/ HTTP/1.0\r\n\r\n")
                assert b"hostname" in await asyncio.wait_for(reader.read(), FOR_EVER)
                writer.close()
            told = [await listener.next() for _ in range(4)]
        said = [(event.kind, event.reason) for event in told if event]
        assert said == [("standby", "it idled"), ("resumed", None)] * 2
