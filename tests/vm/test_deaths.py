"""A machine that dies: whoever waits for it hears so at once, and nobody else notices."""

from __future__ import annotations

import asyncio
import os
import signal
import time

import pytest
from vm_helpers import FOR_EVER, leaves_nothing, sh

from ratoon.engine.sandbox.engine import Engine
from ratoon.engine.sandbox.sandbox import Sandbox
from ratoon.errors import Conflict, MachineDied, NotFound


async def test_death_during_a_command(engine: Engine, sandbox: Sandbox) -> None:
    with leaves_nothing(engine):
        async with await engine.fork_one("base") as doomed:
            await sh(doomed, "echo last words >/dev/console")
            other = asyncio.create_task(sh(sandbox, "sleep 0.5; echo unharmed"))
            commands = [asyncio.create_task(doomed.exec(["sleep", "1000"])) for _ in range(3)]
            await sh(doomed, "true")
            began = time.perf_counter()
            os.kill(doomed.pid, signal.SIGKILL)
            for command in commands:
                with pytest.raises(MachineDied, match=doomed.id) as death:
                    await command
                assert "last words" in death.value.log_tail
                assert str(doomed.pid) in str(death.value)
            dying = time.perf_counter() - began
            assert await other == "unharmed\n"
            # The other command slept for half a second; the death was not waited for that long.
            assert dying < time.perf_counter() - began

            for attempt in (doomed.exec(["true"]), engine.branch(doomed, "late")):
                with pytest.raises(MachineDied):
                    await attempt


@pytest.mark.parametrize(
    ("key", "words"), [("b", "Resetting"), ("o", "Power Off"), ("c", "Kernel panic")]
)
async def test_a_guest_that_reboots_or_panics_dies(engine: Engine, key: str, words: str) -> None:
    async with await engine.fork_one("base") as doomed:
        command = doomed.exec(["sh", "-c", f"echo {key} >/proc/sysrq-trigger; sleep 1000"])
        with pytest.raises(MachineDied) as death:
            await asyncio.wait_for(command, FOR_EVER)
        console = doomed.directory.log.with_name("log.console").read_text()
        assert words in console
        assert death.value.log_tail


async def test_killed_on_purpose(engine: Engine) -> None:
    with leaves_nothing(engine):
        sandbox = await engine.fork_one("base")
        command = asyncio.create_task(sandbox.exec(["sleep", "1000"]))
        await sh(sandbox, "true")
        await sandbox.kill()
        with pytest.raises(Conflict, match=f"{sandbox.id} was killed while it was being used"):
            await command
        await sandbox.kill()
        with pytest.raises(Conflict, match="was killed"):
            await sandbox.exec(["true"])
        with pytest.raises(NotFound, match=sandbox.id):
            engine.get(sandbox.id)


async def test_killed_twice_at_once(engine: Engine) -> None:
    with leaves_nothing(engine):
        sandbox = await engine.fork_one("base")
        await asyncio.gather(sandbox.kill(), sandbox.kill())
