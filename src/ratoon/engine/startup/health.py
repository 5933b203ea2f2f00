"""Waiting until a command is up: an answer over HTTP, an exit code, or a line that it writes."""

from __future__ import annotations

import asyncio
from typing import NoReturn

from ratoon.concurrency import run_alongside
from ratoon.engine.startup.spec import CommandHealth, Health, HttpHealth, LogHealth
from ratoon.errors import GuestError, GuestTimeout, NotHealthy
from ratoon.machine.guest import commands
from ratoon.machine.guest.channel import Agent, printable
from ratoon.machine.guest.commands import Command
from ratoon.machine.guest.shared import wire

#: Characters of the command's output that an error shows.
TAIL = 4000
#: Characters of a line that are searched.
LINE_LIMIT = 4096
#: Bytes of an answer that are read.
ANSWER_LIMIT = 256 * 1024


class Output:
    """What a command writes: the end of it, and whether a line was as it was to be."""

    def __init__(self, wanted: LogHealth | None) -> None:
        self._wanted = wanted
        self._tail = ""
        self._lines = {wire.STDOUT: "", wire.STDERR: ""}
        self.found = asyncio.Event()

    def add(self, kind: int, data: bytes) -> None:
        text = data.decode(errors="replace")
        self._tail = (self._tail + text)[-TAIL:]
        if self._wanted is None or self.found.is_set():
            return
        *whole, last = (self._lines[kind] + text).split("\n")
        # The last one too: a prompt has no end.
        if any(self._wanted.is_in(line[:LINE_LIMIT]) for line in (*whole, last)):
            self.found.set()
        self._lines[kind] = last[:LINE_LIMIT]

    @property
    def shown(self) -> str:
        """The end of it, as an error ends."""
        text = "".join(
            char if char.isprintable() or char in "\n\t" else "\ufffd"
            for char in self._tail.strip()
        )
        return f"\n--- what it wrote last ---\n{text}" if text else "; it wrote nothing"


class Wait:
    """For the command `name` to pass its health check."""

    def __init__(self, agent: Agent, name: str, health: Health) -> None:
        self._agent = agent
        self._name = name
        self._health = health
        self._output = Output(health if isinstance(health, LogHealth) else None)
        #: What the last attempt came to.
        self._last = "the first attempt had not ended"

    async def until_healthy(self, running: Command) -> None:
        """Return once the command has passed. NotHealthy: it ended before, or took too long."""
        limit = self._health.within_seconds
        try:
            async with asyncio.timeout(limit):
                await run_alongside(self._passes(), self._ends(running))
        except TimeoutError:
            raise NotHealthy(
                f"{self._name} was not healthy within {limit:g} s: {self._last}{self._output.shown}"
            ) from None

    async def _ends(self, running: Command) -> NoReturn:
        while (piece := await running.read()) is not None:
            self._output.add(*piece)
        ended = await running.wait()
        how = ended.error or f"it exited with {ended.exit_code}"
        raise NotHealthy(
            f"{self._name} ended before it was healthy: {how}{self._output.shown}",
            status=ended.exit_code,
        )

    async def _passes(self) -> None:
        health = self._health
        if isinstance(health, LogHealth):
            self._last = f"no line of its output had {health.pattern!r} in it"
            await self._output.found.wait()
            return
        while True:
            try:
                async with asyncio.timeout(health.timeout_seconds):
                    if await self._attempt(health):
                        return
            except TimeoutError:
                self._last = f"an attempt took longer than {health.timeout_seconds:g} s"
            await asyncio.sleep(health.interval_seconds)

    async def _attempt(self, health: HttpHealth | CommandHealth) -> bool:
        if isinstance(health, HttpHealth):
            return await self._answers(health)
        result = await commands.exec(
            self._agent,
            [*health.argv],
            timeout=health.timeout_seconds,
            output_limit=TAIL,
        )
        self._last = result.explain()
        return result.exit_code == 0

    async def _answers(self, health: HttpHealth) -> bool:
        """Whether a request is answered well. It is heard out: what it took is over then."""
        request = (
            f"GET {health.target} HTTP/1.0\r\nHost: localhost:{health.port}\r\n"
            "User-Agent: ratoon\r\nAccept: */*\r\nConnection: close\r\n\r\n"
        )
        answer = b""
        try:
            async with commands.dial(self._agent, health.port) as stream:
                await stream.write(request.encode())
                while (piece := await stream.read()) is not None and piece[1]:
                    answer += piece[1]
                    if len(answer) > ANSWER_LIMIT:
                        break
        except GuestTimeout as error:
            self._last = str(error)
            return False
        except GuestError as error:
            if not error.kind:  # it is not the connection that failed
                raise
            self._last = str(error)
            return False
        status = status_of(answer)
        if status is None:
            self._last = f"{health.url} answered with what is not HTTP: {printable(answer[:80])}"
            return False
        self._last = f"{health.url} answered with status {status}"
        return status < 400


def status_of(answer: bytes) -> int | None:
    """The status of an answer that begins so; None: it is no answer of HTTP."""
    words = answer.partition(b"\n")[0].split()
    if len(words) < 2 or not words[0].startswith(b"HTTP/") or not words[1].isdigit():
        return None
    return int(words[1]) if len(words[1]) == 3 else None
