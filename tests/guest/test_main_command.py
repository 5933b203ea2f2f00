"""The command that a sandbox was made for: what is told of it unasked, and how it is stopped."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from shlex import quote
from typing import Any

import pytest
from agent_on_host import is_alive
from channel_on_host import Guest, guest_on_host, read_all, until
from channel_peer import connected

from ratoon.api.answers import CommandEnd, MainCommand
from ratoon.errors import GuestError
from ratoon.machine.guest import commands
from ratoon.machine.guest.agent.processes import REMEMBERED
from ratoon.machine.guest.channel import Channel
from ratoon.machine.guest.shared import wire


@pytest.fixture
async def guest() -> AsyncIterator[Guest]:
    async with guest_on_host() as guest:
        yield guest


async def begin(guest: Guest, script: str) -> int:
    """Start it as the main command; its pid."""
    argv = ["sh", "-c", script]
    async with commands.start(guest.channel, argv, background=True, main=True) as command:
        assert command.pid is not None
        return command.pid


async def ended(channel: Channel) -> CommandEnd:
    await until(lambda: channel.command is not None and channel.command.ended is not None)
    assert channel.command is not None
    assert channel.command.ended is not None
    return channel.command.ended


async def stop(guest: Guest, seconds: float, number: int = signal.SIGTERM) -> None:
    await guest.channel.request("stop", timeout=60, signal=number, seconds=seconds)


# What is told -----------------------------------------------------------------------------------


async def test_its_beginning_and_its_end_are_told_unasked(guest: Guest) -> None:
    heard: list[MainCommand] = []
    guest.channel.on_command = heard.append
    await commands.exec(guest.channel, ["true"])
    assert guest.channel.command is None, "another one is not the main one"
    pid = await begin(guest, "read line; exit 42")
    assert await ended(guest.channel) == CommandEnd(42)
    assert heard == [MainCommand(pid), MainCommand(pid, CommandEnd(42))]


async def test_the_end_is_told_in_every_session_and_however_much_ended_since(guest: Guest) -> None:
    pid = await begin(guest, "echo said; kill -9 $$")
    await ended(guest.channel)
    for _ in range(REMEMBERED + 1):
        async with commands.start(guest.channel, ["true"], background=True) as command:
            await command.wait()
    heard: list[MainCommand] = []
    guest.channel.on_command = heard.append
    await guest.again()
    assert heard == [], "it is no news"
    guest.channel.command = None
    await guest.again()
    assert guest.channel.command == MainCommand(pid, CommandEnd(137))
    async with commands.attach(guest.channel, pid) as command:
        assert await command.read() == (wire.STDOUT, b"said\n"), "its output is kept with it"


async def test_the_last_one_is_the_main_one(guest: Guest) -> None:
    first = await begin(guest, "sleep 60")
    second = await begin(guest, "exit 3")
    assert await ended(guest.channel) == CommandEnd(3)
    await commands.signal(guest.channel, first, signal.SIGKILL)
    await until(lambda: not is_alive(first))
    await guest.channel.request("hello", timeout=20)
    assert guest.channel.command == MainCommand(second, CommandEnd(3))


async def test_one_whose_time_was_over(guest: Guest) -> None:
    started = commands.start(guest.channel, ["sleep", "60"], timeout=0.2, main=True)
    async with started as command:
        await command.wait()
    assert await ended(guest.channel) == CommandEnd(124, "its time was over")


async def test_it_has_ended_once_its_output_is_delivered(guest: Guest) -> None:
    """Or what ends the sandbox then would cut it off."""
    size = wire.OUTPUT_WINDOW + 10_000  # more than is on its way, and what a pipe holds
    argv = ["head", "-c", str(size), "/dev/zero"]
    async with commands.start(guest.channel, argv, main=True) as command:
        await until(lambda: not is_alive(command.pid or 0))
        await guest.channel.request("hello", timeout=20)
        assert guest.channel.command == MainCommand(command.pid or 0)
        assert len(await read_all(command)) == size
    assert await ended(guest.channel) == CommandEnd(0)


async def test_who_does_not_listen_does_not_hold_up_a_stop(guest: Guest) -> None:
    argv = ["head", "-c", str(wire.OUTPUT_WINDOW + 10_000), "/dev/zero"]
    async with commands.start(guest.channel, argv, main=True) as command:
        await until(lambda: not is_alive(command.pid or 0))
        await stop(guest, 0.2)
        assert await ended(guest.channel) == CommandEnd(0)


@pytest.mark.parametrize("told", [{}, {"pid": True}, {"pid": 1, "exit_code": 256}, []])
async def test_nonsense_closes_the_channel(told: Any) -> None:
    async with connected() as (channel, peer):
        asking = asyncio.create_task(channel.request("hello", timeout=20))
        await peer.request()
        peer.send(0, wire.COMMAND, json.dumps(told).encode())
        with pytest.raises(GuestError, match="nonsense"):
            await asking
        assert channel.command is None


# How it is stopped ------------------------------------------------------------------------------


async def test_the_signal_is_for_itself_and_it_may_take_its_time(
    guest: Guest, tmp_path: Path
) -> None:
    """Its children are its own to ask, in the order that they need."""
    child = "trap 'touch asked' USR1; touch heeds; while :; do sleep 0.05; done"
    main = """trap 'sleep 0.5; kill -9 $!; exit 7' USR1
    until [ -e heeds ]; do sleep 0.01; done; touch ready; while :; do wait; done"""
    pid = await begin(guest, f"cd {tmp_path}; sh -c {quote(child)} & {main}")
    await until((tmp_path / "ready").exists)
    await stop(guest, 60, signal.SIGUSR1)
    assert guest.channel.command == MainCommand(pid, CommandEnd(7))
    assert not (tmp_path / "asked").exists()


async def begin_deaf(guest: Guest, place: Path) -> int:
    """One that does not heed SIGTERM, as soon as it can be asked."""
    pid = await begin(guest, f"trap '' TERM; touch {place}/ready; exec sleep 60")
    await until((place / "ready").exists)
    return pid


async def test_one_that_does_not_heed_it_has_its_time(guest: Guest, tmp_path: Path) -> None:
    pid = await begin_deaf(guest, tmp_path)
    await stop(guest, 0.2)
    assert guest.channel.command == MainCommand(pid)
    assert is_alive(pid), "the sandbox ends, and with it the command"


async def test_there_may_be_none_or_it_has_ended(guest: Guest) -> None:
    await stop(guest, 60)
    await begin(guest, "exit 5")
    await ended(guest.channel)
    await stop(guest, 60)


async def test_who_asked_is_gone(guest: Guest, tmp_path: Path) -> None:
    """What was asked of the command is not taken back, and it has no deadline any more."""
    pid = await begin_deaf(guest, tmp_path)
    stopping = asyncio.create_task(stop(guest, 60))
    await guest.channel.request("hello", timeout=20)
    stopping.cancel()
    await asyncio.gather(stopping, return_exceptions=True)
    await guest.channel.request("hello", timeout=20)
    assert is_alive(pid)
