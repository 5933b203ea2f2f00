"""How commands end: by themselves, by signals, in time or not, and with children left behind."""

from __future__ import annotations

import asyncio
from asyncio import Task
from contextlib import suppress

import pytest
from vm_helpers import FOR_EVER, sh, until_gone

from ratoon.engine.sandbox.sandbox import Sandbox
from ratoon.machine.guest.commands import ExecResult
from ratoon.units import MIB


@pytest.mark.parametrize("signal", [9, 15, 11])
async def test_killed_by_a_signal(sandbox: Sandbox, signal: int) -> None:
    result = await sandbox.exec(["sh", "-c", f"echo said; kill -{signal} $$"])
    assert (result.exit_code, result.stdout, result.timed_out) == (128 + signal, b"said\n", False)


async def test_a_timeout_kills_the_whole_group(sandbox: Sandbox) -> None:
    script = "sleep 1000 & echo $$ $!; trap '' TERM; sleep 1000; echo never"
    result = await sandbox.exec(["sh", "-c", script], timeout=0.5)
    assert (result.exit_code, result.timed_out) == (124, True)
    leader, child = result.stdout.decode().split()
    await until_gone(sandbox, leader)
    await until_gone(sandbox, child)


async def test_a_timeout_of_one_command_spares_the_others(sandbox: Sandbox) -> None:
    other = asyncio.create_task(sh(sandbox, "sleep 1; echo done"))
    assert (await sandbox.exec(["sleep", "1000"], timeout=0.2)).timed_out
    assert await other == "done\n"


async def test_a_command_within_its_time(sandbox: Sandbox) -> None:
    result = await sandbox.exec(["true"], timeout=FOR_EVER)
    assert (result.exit_code, result.timed_out) == (0, False)


async def test_a_daemon_that_keeps_the_pipe_does_not_hold_up_the_command(sandbox: Sandbox) -> None:
    result = await sandbox.exec(["sh", "-c", "setsid sleep 1000 & echo $!"], timeout=FOR_EVER)
    pid = result.stdout.decode().strip()
    assert (result.exit_code, result.timed_out) == (0, False)
    assert await sh(sandbox, f"cat /proc/{pid}/comm") == "sleep\n"
    await sh(sandbox, f"kill {pid}")
    await until_gone(sandbox, pid)


async def test_a_daemon_that_writes_for_ever_does_not_either(sandbox: Sandbox) -> None:
    script = "setsid yes & echo $! >&2"
    result = await sandbox.exec(["sh", "-c", script], timeout=FOR_EVER)
    pid = result.stderr.decode().strip()
    assert (result.exit_code, result.timed_out) == (0, False)
    assert result.stdout.strip(b"y\n") == b""
    # It is drained, so it runs on and is not blocked; it may not have come to `yes` yet.
    await sh(sandbox, f"until grep -q yes /proc/{pid}/comm; do sleep 0.02; done")
    await sh(sandbox, f"kill {pid}")
    await until_gone(sandbox, pid)


async def started(
    sandbox: Sandbox, script: str, stdin: bytes = b""
) -> tuple[Task[ExecResult], str]:
    """A command under way, and its process id in the guest."""
    await sh(sandbox, "rm -f /tmp/pid")
    command = ["sh", "-c", f"echo $$ >/tmp/pid.new; mv /tmp/pid.new /tmp/pid; {script}"]
    task = asyncio.create_task(sandbox.exec(command, stdin=stdin))
    await sh(sandbox, "until [ -e /tmp/pid ]; do sleep 0.02; done")
    return task, (await sh(sandbox, "cat /tmp/pid")).strip()


async def cancel(task: Task[ExecResult]) -> None:
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    assert task.cancelled()


@pytest.mark.parametrize("script", ["sleep 1000", "sleep 1000 & wait", "yes"])
async def test_cancelling_kills_the_command(sandbox: Sandbox, script: str) -> None:
    task, pid = await started(sandbox, script)
    await cancel(task)
    await until_gone(sandbox, pid)


async def test_cancelling_while_stdin_is_fed(sandbox: Sandbox) -> None:
    task, pid = await started(sandbox, "sleep 1000", stdin=bytes(2 * MIB))
    await cancel(task)
    await until_gone(sandbox, pid)
    assert await sh(sandbox, "cat", stdin=b"next") == "next"


async def test_the_dead_are_buried(sandbox: Sandbox) -> None:
    # The last one's child outlives it, so that process 1 inherits it.
    await asyncio.gather(*(sh(sandbox, "true") for _ in range(10)))
    await sh(sandbox, "(sleep 0.1 &)")
    await sh(sandbox, "sleep 0.5")
    defunct = await sh(sandbox, "cat /proc/[0-9]*/status 2>/dev/null | grep -c '^State:.Z' || true")
    assert defunct == "0\n"
