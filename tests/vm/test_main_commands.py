"""The command that a sandbox was made for: how it ends, who hears of it, and what ends with it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from vm_helpers import FOR_EVER, sh, until, until_gone

from ratoon.api.answers import CommandEnd
from ratoon.engine.sandbox.engine import Engine
from ratoon.engine.sandbox.keeper import INTERVAL
from ratoon.engine.sandbox.options import SandboxOptions
from ratoon.engine.sandbox.sandbox import Sandbox
from ratoon.errors import Conflict, MachineDied
from ratoon.machine.guest import commands
from ratoon.machine.guest.shared import wire


async def made_for(engine: Engine, script: str, **options: Any) -> Sandbox:
    """A sandbox that was made for a script."""
    sandbox = await engine.fork_one("base", SandboxOptions(**options))
    try:
        await begin(sandbox, script)
    except BaseException:
        await sandbox.kill()
        raise
    return sandbox


async def begin(sandbox: Sandbox, script: str) -> int:
    argv = ["sh", "-c", script]
    async with commands.start(sandbox, argv, background=True, main=True) as command:
        assert command.pid is not None
        return command.pid


async def exit_code(sandbox: Sandbox) -> int:
    async with asyncio.timeout(FOR_EVER):
        ended = (await sandbox.wait()).ended
    assert ended is not None
    return ended.exit_code


#: Ends when it is told so, by a file.
ON_DEMAND = "until [ -e /tmp/end ]; do sleep 0.05; done; exit 42"


# What is heard of it --------------------------------------------------------------------------


async def test_its_end_is_told_and_waited_for(engine: Engine) -> None:
    async with await made_for(engine, ON_DEMAND) as sandbox:
        with engine.events.listen() as listener:
            assert sandbox.command is not None
            assert (await sandbox.wait(0.01)).ended is None
            waiting = asyncio.create_task(exit_code(sandbox))
            await sh(sandbox, "touch /tmp/end")
            assert await waiting == 42
            event = await listener.next()
            assert event is not None
            assert (event.kind, event.sandbox, event.exit_code) == ("exited", sandbox.id, 42)
        assert sandbox.state == "running"


async def test_through_standby_reset_and_forks(engine: Engine) -> None:
    async with await made_for(engine, ON_DEMAND) as sandbox:
        await engine.branch(sandbox, "runs")
        (fork,) = await engine.fork_sandbox(sandbox)
        assert isinstance(fork, Sandbox)
        async with fork:
            assert fork.command == sandbox.command, "it has one of its own, which runs"
            await engine.standby(fork)
            waiting = asyncio.create_task(exit_code(fork))
            await engine.resume(fork)
            await sh(fork, "touch /tmp/end")
            assert await waiting == 42
            await engine.standby(fork)
            assert await exit_code(fork) == 42, "it is known while it sleeps"
            await engine.resume(fork)
            assert await exit_code(fork) == 42
            (second,) = await engine.fork_sandbox(fork)
            assert isinstance(second, Sandbox)
            async with second:
                assert second.command is None, "what has ended is no fork's"
        assert sandbox.command is not None
        assert sandbox.command.ended is None
        await sh(sandbox, "touch /tmp/end")
        assert await exit_code(sandbox) == 42
        await engine.reset(sandbox)
        assert sandbox.command.ended is None, "it runs in the branch"


async def test_waiting_is_no_use_and_wakes_nobody(engine: Engine) -> None:
    async with await made_for(engine, ON_DEMAND, idle_seconds=600, idle_counts="calls") as sandbox:
        waiting = asyncio.create_task(exit_code(sandbox))
        sandbox._last_used -= 600
        await until(lambda: sandbox.state == "standby", "its standby")
        await asyncio.sleep(1)
        assert sandbox.state == "standby"
        await sh(sandbox, "touch /tmp/end")
        assert await waiting == 42


async def test_nothing_to_be_waited_for(engine: Engine) -> None:
    async with await engine.fork_one("base") as sandbox:
        await sh(sandbox, "true")
        with pytest.raises(Conflict, match="has no command that it was made for"):
            await sandbox.wait()
        await begin(sandbox, "sleep 1000")
        waiting = asyncio.create_task(sandbox.wait())
        await engine.reset(sandbox)
        with pytest.raises(Conflict, match="a reset may lead to where there was none"):
            await waiting


async def test_it_ends_with_its_sandbox(engine: Engine) -> None:
    async with await made_for(engine, "sleep 1000") as sandbox:
        waiting = [asyncio.create_task(sandbox.wait()) for _ in range(2)]
        await asyncio.sleep(0)
        await sandbox.kill()
        killed = CommandEnd(137, f"sandbox {sandbox.id} was killed")
        assert [(await each).ended for each in waiting] == [killed] * 2
    async with await made_for(engine, "sleep 1000") as sandbox:
        waiting = [asyncio.create_task(sandbox.wait())]
        await sandbox.machine.kill()
        with pytest.raises(MachineDied, match=sandbox.id):
            await waiting[0]


async def test_why_it_was_killed(engine: Engine) -> None:
    greed = "python3 -c \"x = [b'x' * 2**24 for _ in range(99)]\""
    async with await made_for(engine, greed) as sandbox:
        ended = (await sandbox.wait()).ended
        assert ended is not None
        assert ended.exit_code == 137
        assert ended.reason is not None
        assert "out of memory" in ended.reason


# What ends with it ----------------------------------------------------------------------------


async def test_auto_remove(engine: Engine) -> None:
    sandbox = await made_for(engine, ON_DEMAND, auto_remove=True)
    await engine.branch(sandbox, "runs")
    waiting = asyncio.create_task(exit_code(sandbox))
    await sh(sandbox, "touch /tmp/end")
    assert await waiting == 42
    await until(lambda: sandbox not in engine.sandboxes, "its end")


async def test_what_it_wrote_is_heard_before_its_sandbox_goes(engine: Engine) -> None:
    sandbox = await engine.fork_one("base", SandboxOptions(auto_remove=True))
    size = wire.OUTPUT_WINDOW + 10_000  # more than is on its way, and what a pipe holds
    argv = ["head", "-c", str(size), "/dev/zero"]
    async with commands.start(sandbox, argv, main=True) as command:
        await until_gone(sandbox, str(command.pid))
        await asyncio.sleep(3 * INTERVAL)
        heard = 0
        while (piece := await command.read()) is not None:
            heard += len(piece[1])
        assert heard == size
    await until(lambda: sandbox not in engine.sandboxes, "its end")


#: Is asked to end, and takes its time; its child as well, which hears of it afterwards.
SERVER = """
sh -c 'trap "sleep 3; echo child >>/mnt/told; exit" USR1; touch /tmp/child
while :; do sleep 0.05; done' &
setsid sh -c 'trap "" USR1; touch /tmp/deaf; while :; do sleep 0.05; done' &
trap 'sleep 0.5; echo main >>/mnt/told; exit 7' USR1
until [ -e /tmp/child ] && [ -e /tmp/deaf ]; do sleep 0.05; done; touch /tmp/ready
while :; do sleep 0.05; done
"""


@pytest.mark.parametrize("auto_remove", [False, True])
async def test_stop(engine: Engine, tmp_path: Path, auto_remove: bool) -> None:
    """What `auto_remove` would end at once has its time as well."""
    volume = {"source": str(tmp_path), "target": "/mnt"}
    options = {"stop_signal": "USR1", "volumes": [volume], "auto_remove": auto_remove}
    sandbox = await made_for(engine, SERVER, **options)
    await sh(sandbox, "until [ -e /tmp/ready ]; do sleep 0.05; done")
    waiting = asyncio.create_task(exit_code(sandbox))
    assert await sandbox.stop(20) == CommandEnd(7)
    assert await waiting == 7
    assert (tmp_path / "told").read_text() == "main\nchild\n"
    assert sandbox not in engine.sandboxes


async def test_stop_of_one_that_does_not_heed_it(engine: Engine) -> None:
    sandbox = await made_for(engine, "trap '' TERM; touch /tmp/ready; exec sleep 1000")
    await sh(sandbox, "until [ -e /tmp/ready ]; do sleep 0.05; done")
    waiting = asyncio.create_task(exit_code(sandbox))
    assert await sandbox.stop(0.5) is None
    assert await waiting == 137
    assert sandbox not in engine.sandboxes


async def test_what_becomes_of_a_sandbox_that_is_being_stopped(engine: Engine) -> None:
    for what in (Sandbox.kill, engine.standby, engine.reset):
        sandbox = await made_for(engine, "trap '' TERM; touch /tmp/ready; exec sleep 1000")
        await sh(sandbox, "until [ -e /tmp/ready ]; do sleep 0.05; done")
        stopping = asyncio.create_task(sandbox.stop(FOR_EVER))
        await asyncio.sleep(0)  # it has asked
        await what(sandbox)
        assert await stopping is None
        assert sandbox not in engine.sandboxes


async def test_stop_of_one_that_sleeps(engine: Engine, tmp_path: Path) -> None:
    """What dozes is woken; what was put to standby ends as it is."""
    script = (
        "trap 'echo asked >/mnt/told; exit 3' TERM; touch /tmp/ready; while :; do sleep 0.05; done"
    )
    volume = {"source": str(tmp_path), "target": "/mnt"}
    sandbox = await made_for(
        engine, script, volumes=[volume], idle_seconds=600, idle_counts="calls"
    )
    await sh(sandbox, "until [ -e /tmp/ready ]; do sleep 0.05; done")
    (fork,) = await engine.fork_sandbox(sandbox, options=SandboxOptions())
    assert isinstance(fork, Sandbox)
    await engine.standby(fork)
    assert await fork.stop() is None
    sandbox._last_used -= 600
    await until(lambda: sandbox.state == "standby", "its standby")
    assert await sandbox.stop() == CommandEnd(3)
    assert (tmp_path / "told").read_text() == "asked\n"


async def test_stop_where_there_is_nothing_to_be_asked(engine: Engine) -> None:
    sandbox = await engine.fork_one("base")
    assert await sandbox.stop() is None
    assert sandbox not in engine.sandboxes
