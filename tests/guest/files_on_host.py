"""The guest's agent as a process of this host, and the host's view of its files."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from agent_on_host import AgentOnHost

from ratoon.machine.guest.channel import Channel
from ratoon.machine.guest.files import GuestFiles


class FilesOnHost(GuestFiles):
    """`GuestFiles` with what tests look at besides: the agent's process, and the channel to it."""

    def __init__(self, process: AgentOnHost, channel: Channel) -> None:
        super().__init__(channel)
        self.process = process
        self.channel = channel

    async def idle(self, descriptors: int) -> None:
        """Wait until the agent has no more descriptors than it had."""
        await until(lambda: self.process.descriptors == descriptors)


@asynccontextmanager
async def files_on_host(**options: Any) -> AsyncIterator[FilesOnHost]:
    process = AgentOnHost(**options)
    try:
        process.socket.setblocking(False)
        loop = asyncio.get_running_loop()
        _, channel = await loop.create_unix_connection(
            lambda: Channel("sb-test"), sock=process.socket
        )
        try:
            channel.begin()
            await channel.request("hello", timeout=20)
            yield FilesOnHost(process, channel)
            assert process.process.poll() is None, "the agent must outlive all that is asked of it"
        finally:
            channel.close()
    finally:
        process.close()


async def until(met: Callable[[], bool], seconds: float = 60) -> None:
    async with asyncio.timeout(seconds):
        while not met():
            await asyncio.sleep(0.01)
