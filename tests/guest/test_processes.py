"""Commands as they run, in the background, and found again."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator

import pytest
from agent_on_host import is_alive
from channel_on_host import Guest, guest_on_host, read_all, read_until, until

from ratoon.api.answers import ProcessInfo
from ratoon.errors import Conflict, GuestError, InvalidInput, NotFound
from ratoon.machine.guest import commands
from ratoon.machine.guest.agent.processes import LISTED, REMEMBERED
from ratoon.machine.guest.agent.tail import LIMIT, PIECE_COST, SMALL
from ratoon.machine.guest.commands import Ended
from ratoon.machine.guest.shared import wire
from ratoon.units import MIB


@pytest.fixture
async def guest() -> AsyncIterator[Guest]:
    async with guest_on_host() as guest:
        yield guest


async def listed(guest: Guest, pid: int | None) -> ProcessInfo | None:
    found = [info for info in await commands.processes(guest.channel) if info.pid == pid]
    return found[0] if found else None


async def ended(guest: Guest, pid: int) -> int:
    """Wait until a process in the background has ended; its exit code."""
    async with asyncio.timeout(20):
        while (info := await listed(guest, pid)) is None or info.exit_code is None:
            await asyncio.sleep(0.02)
    return info.exit_code


async def start_in_background(guest: Guest, script: str, *, stdin: bool = False) -> int:
    argv = ["sh", "-c", script]
    async with commands.start(guest.channel, argv, background=True, stdin=stdin) as command:
        assert command.pid is not None
        return command.pid


# As it runs -----------------------------------------------------------------------------------


async def test_a_conversation(guest: Guest) -> None:
    async with commands.start(guest.channel, ["cat"], stdin=True) as command:
        for line in (b"one\n", b"two\n"):
            await command.write(line)
            assert await read_until(command, b"\n") == line
        command.end_input()
        assert await command.read() is None
        assert await command.wait() == Ended(0)


async def test_both_outputs_and_the_exit_code(guest: Guest) -> None:
    script = "printf out; printf err >&2; exit 7"
    async with commands.start(guest.channel, ["sh", "-c", script]) as command:
        pieces = []
        while (piece := await command.read()) is not None:
            pieces.append(piece)
        assert sorted(pieces) == [(wire.STDOUT, b"out"), (wire.STDERR, b"err")]
        assert await command.wait() == Ended(7)
    assert await commands.processes(guest.channel) == []


async def test_output_that_nobody_reads_does_not_hold_up_the_end(guest: Guest) -> None:
    async with commands.start(guest.channel, ["head", "-c", "3000000", "/dev/zero"]) as command:
        assert await command.wait() == Ended(0)


async def test_a_signal_goes_to_the_process_group(guest: Guest) -> None:
    script = "trap 'exit 7' USR1; sh -c 'echo $$; exec sleep 60' & while :; do wait; done"
    async with commands.start(guest.channel, ["sh", "-c", script]) as command:
        child = int(await read_until(command, b"\n"))
        command.signal(signal.SIGUSR1)
        assert await command.wait() == Ended(7)
        await until(lambda: not is_alive(child))


@pytest.mark.parametrize("number", [0, -1, 65, 1000])
async def test_there_are_signals_that_do_not_exist(guest: Guest, number: int) -> None:
    async with commands.start(guest.channel, ["sleep", "60"]) as command:
        with pytest.raises(InvalidInput, match=f"no signal {number}"):
            command.signal(number)
        with pytest.raises(InvalidInput, match=f"no signal {number}"):
            await commands.signal(guest.channel, command.pid or 0, number)


async def test_a_program_that_does_not_exist(guest: Guest) -> None:
    async with commands.start(guest.channel, ["no-such-program"], stdin=True) as command:
        assert command.pid is None
        await command.write(b"for nobody")
        command.end_input()
        assert await command.read() is None
        end = await command.wait()
        assert end.exit_code == 127
        assert end.error == "cannot execute no-such-program: No such file or directory"


async def test_a_timeout(guest: Guest) -> None:
    async with commands.start(guest.channel, ["sleep", "60"], timeout=0.2) as command:
        assert await command.wait() == Ended(124, timed_out=True)


async def test_leaving_early_kills_it_with_its_group(guest: Guest) -> None:
    script = "trap '' TERM INT HUP; sleep 60 & echo $!; wait"
    async with commands.start(guest.channel, ["sh", "-c", script]) as command:
        child = int(await read_until(command, b"\n"))
    await until(lambda: not is_alive(child))
    assert command.pid
    await until(lambda: not is_alive(command.pid or 0))
    with pytest.raises(GuestError, match="conversation is over"):
        await command.read()


async def test_leaving_a_flood_early(guest: Guest) -> None:
    before = guest.agent.descriptors
    for _ in range(5):
        async with commands.start(guest.channel, ["yes"]) as command:
            assert await command.read() is not None
    await until(lambda: guest.agent.descriptors == before)
    assert await commands.processes(guest.channel) == []


# In the background ----------------------------------------------------------------------------


async def test_it_goes_on_when_who_started_it_leaves(guest: Guest) -> None:
    pid = await start_in_background(guest, "echo begun; read line; echo $line; exit 3", stdin=True)
    async with commands.attach(guest.channel, pid) as command:
        assert command.pid == pid
        assert await read_until(command, b"\n") == b"begun\n"
    async with commands.attach(guest.channel, pid) as command:
        await command.write(b"hello\n")
        assert await read_all(command) == b"begun\nhello\n"
        assert await command.wait() == Ended(3)


async def test_its_end_is_remembered(guest: Guest) -> None:
    pid = await start_in_background(guest, "echo said; echo complained >&2; exit 5")
    assert await ended(guest, pid) == 5
    for _ in range(2):
        async with commands.attach(guest.channel, pid) as command:
            pieces = [await command.read(), await command.read()]
            expected = [(wire.STDOUT, b"said\n"), (wire.STDERR, b"complained\n")]
            assert sorted(filter(None, pieces)) == expected
            assert await command.wait() == Ended(5)


async def test_what_is_listed(guest: Guest) -> None:
    words = ["sh", "-c", "sleep 60", "ü\udcff", "x" * 3 * LISTED, "cut off"]
    async with commands.start(guest.channel, words) as command:
        info = await listed(guest, command.pid)
        assert info is not None
        assert info.argv[:4] == words[:4]
        assert len(info.argv) == 5
        assert sum(map(len, info.argv)) == LISTED
        assert (info.user, info.background, info.terminal, info.attached) == (
            "root",
            False,
            False,
            True,
        )
        assert info.exit_code is None
    pid = await start_in_background(guest, "exit 4")
    assert await ended(guest, pid) == 4
    info = await listed(guest, pid)
    assert info is not None
    assert (info.background, info.attached, info.exit_code) == (True, False, 4)


async def test_a_timeout_in_the_background(guest: Guest) -> None:
    argv = ["sleep", "60"]
    async with commands.start(guest.channel, argv, background=True, timeout=0.2) as command:
        pid = command.pid
    await guest.again()
    assert await ended(guest, pid or 0) == 124


async def test_a_signal_to_one_in_the_background(guest: Guest) -> None:
    pid = await start_in_background(guest, "trap 'exit 9' TERM; echo; while :; do sleep 0.02; done")
    async with commands.attach(guest.channel, pid) as command:
        await read_until(command, b"\n")
    await commands.signal(guest.channel, pid, signal.SIGTERM)
    assert await ended(guest, pid) == 9
    with pytest.raises(Conflict, match=f"process {pid} has ended"):
        await commands.signal(guest.channel, pid, signal.SIGTERM)


async def test_there_is_no_such_process(guest: Guest) -> None:
    for pid in (1, guest.agent.pid, os.getpid(), 2**31, -1):
        with pytest.raises(NotFound, match=f"no process {pid} was started"):
            await commands.signal(guest.channel, pid, signal.SIGTERM)
        with pytest.raises(NotFound, match=f"no process {pid} was started"):
            async with commands.attach(guest.channel, pid):
                pass


async def test_the_newer_listener_wins(guest: Guest) -> None:
    script = "echo $$; read line; echo $line"
    async with commands.start(guest.channel, ["sh", "-c", script], stdin=True) as first:
        pid = int(await read_until(first, b"\n"))
        async with commands.attach(guest.channel, pid) as second:
            with pytest.raises(Conflict, match=f"somebody else has attached to process {pid}"):
                await first.wait()
            await second.write(b"to the second\n")
            assert await read_all(second) == b"%d\nto the second\n" % pid
            assert await second.wait() == Ended(0)


async def test_nobody_listens_and_its_pipes_do_not_fill_up(guest: Guest) -> None:
    script = f"{sys.executable} -c 'print(\"x\" * 20_000_000)'; echo; echo last; exit 6"
    pid = await start_in_background(guest, script)
    assert await ended(guest, pid) == 6
    async with commands.attach(guest.channel, pid) as command:
        data = await read_all(command)
    assert data.endswith(b"x\n\nlast\n")
    # Any two pieces are SMALL together, and each costs PIECE_COST, which counts for the limit.
    assert LIMIT * SMALL // (SMALL + 2 * PIECE_COST) <= len(data) < 2 * LIMIT


async def test_of_many_that_have_ended_the_last_are_remembered(guest: Guest) -> None:
    resident = guest.agent.resident_bytes
    pids = []
    for _ in range(REMEMBERED + 20):
        pids.append(await start_in_background(guest, "head -c 200000 /dev/zero"))
        await ended(guest, pids[-1])
    assert [info.pid for info in await commands.processes(guest.channel)] == pids[-REMEMBERED:]
    assert guest.agent.resident_bytes - resident < 16 * MIB


# Across sessions ------------------------------------------------------------------------------


async def test_what_a_session_leaves_behind_is_found_by_the_next(guest: Guest) -> None:
    script = "echo before; while read line; do echo $line; done; exit 5"
    async with commands.start(guest.channel, ["sh", "-c", script], stdin=True) as old:
        await read_until(old, b"before\n")
        assert old.pid
        await guest.again()
        info = await listed(guest, old.pid)
        assert info is not None
        assert (info.attached, info.background, info.exit_code) == (False, True, None)
        async with commands.attach(guest.channel, old.pid) as command:
            await command.write(b"after\n")
            assert await read_until(command, b"after\n") == b"before\nafter\n"
            command.end_input()
            assert await command.wait() == Ended(5)


async def test_the_end_of_what_was_left_behind_is_remembered(guest: Guest) -> None:
    async with commands.start(guest.channel, ["sh", "-c", "read line; exit 8"], stdin=True) as old:
        assert old.pid
        await guest.again()
        async with commands.attach(guest.channel, old.pid) as command:
            await command.write(b"\n")
        assert await ended(guest, old.pid) == 8


async def test_what_ended_unheard_before_the_session_did(guest: Guest) -> None:
    """It has exited, but its listener has not read all of it: the next one gets the exit code."""
    size = 2 * wire.OUTPUT_WINDOW
    script = (
        f"import fcntl, os; fcntl.fcntl(1, 1031, {MIB}); os.write(1, bytes({size})); os._exit(4)"
    )
    async with commands.start(guest.channel, [sys.executable, "-c", script]) as old:
        await until(lambda: not is_alive(old.pid or 0))
        await guest.again()
        async with commands.attach(guest.channel, old.pid or 0) as command:
            assert await command.wait() == Ended(4)


async def test_input_of_an_earlier_listener_comes_first(guest: Guest) -> None:
    script = "trap 'wc -c; exit' USR1; echo; while :; do sleep 0.02; done"
    async with commands.start(guest.channel, ["sh", "-c", script], stdin=True) as old:
        await read_until(old, b"\n")
        await old.write(bytes(wire.STDIN_WINDOW))
        await guest.channel.request("hello", timeout=20)  # what was sent before, it has
        await guest.again()
        async with commands.attach(guest.channel, old.pid or 0) as command:
            command.signal(signal.SIGUSR1)
            more = 3 * wire.STDIN_WINDOW
            await command.write(bytes(more))
            command.end_input()
            assert (await read_all(command)).split() == [b"%d" % (wire.STDIN_WINDOW + more)]
