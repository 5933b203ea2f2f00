"""How commands end: by themselves, by signals, in time or not, and with children left behind."""

from __future__ import annotations

import asyncio
import re
from asyncio import Task
from contextlib import suppress

import pytest
from vm_helpers import FOR_EVER, sh, until_gone

from ratoon.engine.sandbox.sandbox import Sandbox
from ratoon.machine.guest import commands
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


#: Starts one process in a session of its own and one that is nobody's child, and says who they are.
SCATTER = """
setsid sleep 1000 & echo $!
(setsid sh -c 'echo $$; exec sleep 1000' &)
sleep 1000
"""


async def test_who_left_the_group_is_killed_with_it(sandbox: Sandbox) -> None:
    result = await sandbox.exec(["sh", "-c", SCATTER], timeout=2)
    assert (result.exit_code, result.timed_out) == (124, True)
    scattered = result.stdout.decode().split()
    assert len(scattered) == 2
    for pid in scattered:
        await until_gone(sandbox, pid)


async def test_who_left_the_group_is_killed_with_a_cancelled_command(sandbox: Sandbox) -> None:
    task, pid = await started(sandbox, f"exec >/tmp/scattered; {SCATTER}")
    await sh(sandbox, "until [ $(wc -l </tmp/scattered) = 2 ]; do sleep 0.02; done")
    await cancel(task)
    for each in (pid, *(await sh(sandbox, "cat /tmp/scattered")).split()):
        await until_gone(sandbox, each)


async def test_what_a_killed_command_has_left_to_the_background_goes_on(sandbox: Sandbox) -> None:
    async with commands.start(sandbox, ["sleep", "1000"], background=True) as apart:
        pass
    assert (await sandbox.exec(["sh", "-c", SCATTER], timeout=1)).timed_out
    assert await sh(sandbox, f"cat /proc/{apart.pid}/comm") == "sleep\n"
    assert apart.pid is not None
    await commands.signal(sandbox, apart.pid, 9)
    await until_gone(sandbox, str(apart.pid))


#: Has more than a gibibyte, piece by piece, which the guest has not.
GREED = "x = [b'x' * 2**24 for _ in range(99)]"


@pytest.mark.parametrize(
    "argv", [["python3", "-c", GREED], ["sh", "-c", f'python3 -c "{GREED}"; exit $?']]
)
async def test_who_has_all_memory_is_told_so(sandbox: Sandbox, argv: list[str]) -> None:
    greedy = await sandbox.exec(argv, timeout=FOR_EVER)
    assert greedy.exit_code == 137
    assert greedy.error is not None
    told = re.fullmatch(
        r"out of memory: of the sandbox's (\d+) MiB, python3 \(process \d+\) had (\d+) MiB, "
        "and the kernel killed it",
        greedy.error,
    )
    assert told, greedy.error
    assert 256 < int(told[2]) < int(told[1]) <= 512
    for other in ("kill -9 $$", "exit 137"):
        assert (await sandbox.exec(["sh", "-c", f"sleep 1; {other}"])).error is None


async def test_an_interpreter_that_has_all_memory_is_told_so(sandbox: Sandbox) -> None:
    done = await sandbox.eval(GREED, timeout=FOR_EVER)
    assert done.exit_code == 137
    assert done.error is not None
    assert "was killed: out of memory: of the sandbox's" in done.error


#: Each process starts two in sessions of their own, for ever.
BOMB = """
f() { while :; do setsid bash -c "$BODY" & done; }
export BODY="$(declare -f f); f"
f
"""


async def test_a_fork_bomb_ends_with_its_command(sandbox: Sandbox) -> None:
    bomb = asyncio.create_task(sandbox.exec(["bash", "-c", BOMB], timeout=15))
    await asyncio.sleep(5)
    during = await sandbox.exec(["cat", "/proc/self/cgroup"], timeout=FOR_EVER)
    assert during.exit_code == 0, during
    assert (await bomb).timed_out
    await sh(sandbox, "until [ $(grep -l bash /proc/[0-9]*/comm | wc -l) = 0 ]; do sleep 0.1; done")


async def test_the_sandbox_leaves_room_for_the_agent(sandbox: Sandbox) -> None:
    group = "cd /sys/fs/cgroup/sandbox"
    limits = await sh(sandbox, f"{group}; cat /proc/sys/kernel/threads-max pids.max")
    kernels, sandboxes = map(int, limits.split())
    assert sandboxes == kernels * 7 // 8
    await sh(sandbox, f"{group}; echo 1 >pids.max")
    # It forks nothing before it is where that counts.
    there = 'until read group </proc/$$/cgroup; [ "${group#*sandbox}" != "$group" ]; do :; done'
    try:
        full = await sandbox.exec(["sh", "-c", f"{there}; true & true"], timeout=FOR_EVER)
        assert b"fork" in full.stderr
        assert (await sandbox.exec(["true"], timeout=FOR_EVER)).exit_code == 0
    finally:
        await sh(sandbox, f"{group}; echo {sandboxes} >pids.max")


async def test_a_group_is_used_again(sandbox: Sandbox) -> None:
    """Once it is empty, which on a busy host takes longer than the next command."""
    groups = {await sh(sandbox, "cat /proc/self/cgroup") for _ in range(10)}
    assert len(groups) <= 5


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
