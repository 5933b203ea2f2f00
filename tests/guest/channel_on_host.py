"""The guest's agent as a process of this host, with a real channel to it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from agent_on_host import AgentOnHost

from ratoon.machine.guest.channel import Channel
from ratoon.machine.guest.commands import Command
from ratoon.machine.guest.shared import wire


@dataclass
class Guest:
    """An agent, and the channel to it; `again` is what a new owner of the sandbox has."""

    agent: AgentOnHost
    channel: Channel

    async def again(self) -> None:
        """Begin a new session: the streams of the old one are nobody's."""
        self.channel.begin()
        await self.channel.request("hello", timeout=20)


@asynccontextmanager
async def guest_on_host(**options: Any) -> AsyncIterator[Guest]:
    agent = AgentOnHost(**options)
    try:
        agent.socket.setblocking(False)
        loop = asyncio.get_running_loop()
        _, channel = await loop.create_unix_connection(
            lambda: Channel("sb-test"), sock=agent.socket
        )
        guest = Guest(agent, channel)
        try:
            await guest.again()
            yield guest
            assert agent.process.poll() is None, "the agent must outlive all that is asked of it"
        finally:
            channel.close()
    finally:
        agent.close()


async def until(met: Callable[[], bool], seconds: float = 60) -> None:
    async with asyncio.timeout(seconds):
        while not met():
            await asyncio.sleep(0.01)


async def read_until(command: Command, end: bytes) -> bytes:
    """What it writes to stdout or its terminal, until that ends so."""
    data = b""
    async with asyncio.timeout(20):
        while not data.endswith(end):
            piece = await command.read()
            assert piece is not None, f"it ended after {data!r}"
            if piece[0] == wire.STDOUT:
                data += piece[1]
    return data


async def read_all(command: Command) -> bytes:
    """What it writes to stdout or its terminal from here on."""
    data = b""
    async with asyncio.timeout(60):
        while (piece := await command.read()) is not None:
            data += piece[1] if piece[0] == wire.STDOUT else b""
    return data
