"""Commands on a terminal of their own: control keys, sizes, ends of all kinds."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import AsyncIterator

import pytest
from agent_on_host import is_alive
from channel_on_host import Guest, guest_on_host, read_all, read_until, until

from ratoon.errors import InvalidInput
from ratoon.machine.guest import commands
from ratoon.machine.guest.agent.stream import CHUNK
from ratoon.machine.guest.commands import Ended
from ratoon.machine.guest.shared import wire

SIZE = (24, 80)


@pytest.fixture
async def guest() -> AsyncIterator[Guest]:
    async with guest_on_host() as guest:
        before = guest.agent.descriptors
        yield guest
        await until(lambda: guest.agent.descriptors == before)


async def test_it_is_the_controlling_terminal(guest: Guest) -> None:
    script = "test -t 0 && test -t 1 && test -t 2 && stty size && echo $TERM >/dev/tty"
    async with commands.start(guest.channel, ["sh", "-c", script], terminal=SIZE) as command:
        assert await read_all(command) == b"24 80\r\nxterm\r\n"
        assert await command.wait() == Ended(0)


async def test_the_terminals_name_may_be_another(guest: Guest) -> None:
    argv, env = ["sh", "-c", "echo $TERM"], {"TERM": "dumb"}
    async with commands.start(guest.channel, argv, terminal=SIZE, env=env) as command:
        assert await read_all(command) == b"dumb\r\n"


async def test_what_is_typed_is_echoed_and_read_by_lines(guest: Guest) -> None:
    script = "read line; echo got $line"
    async with commands.start(guest.channel, ["sh", "-c", script], terminal=SIZE) as command:
        await command.write(b"typo\x7f\x7fed\r")
        assert (await read_all(command)).endswith(b"\r\ngot tyed\r\n")


async def test_control_c_interrupts_what_is_in_the_foreground(guest: Guest) -> None:
    async with commands.start(guest.channel, ["cat"], terminal=SIZE) as command:
        await command.write(b"a\r")
        await read_until(command, b"a\r\na\r\n")
        await command.write(b"\x03")
        assert await command.wait() == Ended(128 + signal.SIGINT)


async def test_the_end_of_input_is_control_d(guest: Guest) -> None:
    async with commands.start(guest.channel, ["cat"], terminal=SIZE) as command:
        await command.write(b"line\n")
        await read_until(command, b"line\r\nline\r\n")
        command.end_input()
        assert await command.wait() == Ended(0)


async def test_a_resize_is_told_to_the_foreground(guest: Guest) -> None:
    script = "trap 'stty size; exit 3' WINCH; echo ready; while :; do sleep 0.02; done"
    async with commands.start(guest.channel, ["sh", "-c", script], terminal=SIZE) as command:
        await read_until(command, b"ready\r\n")
        command.resize(50, 132)
        assert await read_all(command) == b"50 132\r\n"
        assert await command.wait() == Ended(3)
        command.resize(1, 1)  # too late for it


@pytest.mark.parametrize("size", [(0, 80), (24, 0), (65536, 80), (-1, 80)])
async def test_sizes_that_cannot_be(guest: Guest, size: tuple[int, int]) -> None:
    with pytest.raises(InvalidInput, match=f"{size[0]} rows and {size[1]} columns"):
        async with commands.start(guest.channel, ["true"], terminal=size):
            pass


async def test_all_of_the_output_is_delivered(guest: Guest) -> None:
    for _ in range(5):
        async with commands.start(guest.channel, ["seq", "30000"], terminal=SIZE) as command:
            expected = b"".join(b"%d\r\n" % n for n in range(1, 30001))
            assert await read_all(command) == expected
            assert await command.wait() == Ended(0)


async def test_one_that_does_not_read_its_terminal(guest: Guest) -> None:
    script = "stty -icanon; echo ready; sleep 60"
    async with commands.start(guest.channel, ["sh", "-c", script], terminal=SIZE) as command:
        await read_until(command, b"ready\r\n")
        await command.write(b"x" * wire.STDIN_WINDOW)
        command.signal(signal.SIGTERM)
        assert await command.wait() == Ended(128 + signal.SIGTERM)


#: Prints a child's pid, and much after it; the child, in a session of its own, keeps the terminal.
KEEPER = """
import os, sys, time
read, write = os.pipe()
keeper = os.fork()
if not keeper:
    os.setsid()
    os.write(write, b"x")
    time.sleep(60)
os.read(read, 1)
sys.stdout.write(f"{keeper}\\n" + "x" * int(sys.argv[1]))
"""


@pytest.mark.parametrize("size", [0, 100_000, wire.OUTPUT_WINDOW - CHUNK + 6000])
async def test_a_child_that_keeps_the_terminal_does_not_hold_up_the_end(
    guest: Guest, size: int
) -> None:
    argv = [sys.executable, "-c", KEEPER, str(size)]
    async with commands.start(guest.channel, argv, terminal=SIZE) as command:
        await until(lambda: not is_alive(command.pid or 0))  # with output unread
        keeper, rest = (await read_all(command)).split(b"\r\n")
        assert rest == b"x" * size
        assert await command.wait() == Ended(0)
    assert is_alive(int(keeper))
    os.kill(int(keeper), signal.SIGKILL)


async def test_one_that_closes_its_terminal_runs_on(guest: Guest) -> None:
    """Were the other end closed too, it would be hung up."""
    script = "echo before; exec <&- >&- 2>&-; sleep 0.5; exec >/dev/tty; echo after; exit 5"
    async with commands.start(guest.channel, ["sh", "-c", script], terminal=SIZE) as command:
        await read_until(command, b"before\r\n")
        assert guest.agent.busy_seconds(during=0.3) < 0.1
        assert await read_all(command) == b"after\r\n"
        assert await command.wait() == Ended(5)


async def test_leaving_hangs_up(guest: Guest) -> None:
    script = "sh -c 'echo $$; exec sleep 60'; true"
    async with commands.start(guest.channel, ["sh", "-c", script], terminal=SIZE) as command:
        child = int(await read_until(command, b"\r\n"))
    await until(lambda: not is_alive(child))


async def test_a_terminal_is_kept_drained_and_found_again(guest: Guest) -> None:
    script = "stty -echo; echo ready; read line; seq 100000; echo $line; read line; exit 6"
    async with commands.start(guest.channel, ["sh", "-c", script], terminal=SIZE) as old:
        await read_until(old, b"ready\r\n")
        await old.write(b"first\r")
        await guest.channel.request("hello", timeout=20)
        await guest.again()
        async with commands.attach(guest.channel, old.pid or 0) as command:
            assert (await read_until(command, b"first\r\n")).endswith(b"\r\n100000\r\nfirst\r\n")
            await command.write(b"second\r")
            assert await command.wait() == Ended(6)


async def test_a_program_that_does_not_exist_has_no_terminal(guest: Guest) -> None:
    async with commands.start(guest.channel, ["/no/such"], terminal=SIZE) as command:
        assert (await command.wait()).exit_code == 127
