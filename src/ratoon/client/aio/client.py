"""One daemon, or one engine in this process, and what it has."""

from __future__ import annotations

import json
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, Unpack

from ratoon.api.answers import Event, PoolInfo, RunInfo, SandboxInfo, read
from ratoon.client.address import Known, Source, parse, token_of_environment, url_of_environment
from ratoon.client.aio.connection import AsyncConnection, segment
from ratoon.client.aio.sandbox import AsyncSandbox, Forks, State
from ratoon.client.embedded import Embedded
from ratoon.client.local import LocalDaemon
from ratoon.client.options import Options, request_for
from ratoon.client.problems import error_from
from ratoon.client.runs import RunOptions, run_request
from ratoon.errors import RatoonError

if TYPE_CHECKING:
    from ratoon.client.aio.snapshots import AsyncSnapshots
    from ratoon.client.aio.starts import AsyncStarts
    from ratoon.client.aio.volumes import AsyncVolumes


class AsyncClient:
    """The daemon at `url`: `unix:///PATH`, `http://HOST:PORT` or `https://HOST:PORT`.

    Without one, what RATOON_URL says; without that, this host's own daemon, which is started if it
    is not running. `token`: what the daemon wants to see, by default that in RATOON_TOKEN. `tls`:
    how to verify an https daemon, where the system's authorities are not the right ones.

    Use it as a context manager, or close it; sandboxes are not affected by that. A sandbox that was
    made without a client has one, which it shares with its forks.
    """

    def __init__(
        self, url: str | None = None, *, token: str | None = None, tls: ssl.SSLContext | None = None
    ) -> None:
        self._set_up(_source(url, token, tls))

    def _set_up(self, source: Source) -> None:
        self._connection = AsyncConnection(source)
        #: The sandboxes that use it; None if it is closed by whoever made it.
        self._borrowers: int | None = None

    @classmethod
    def embedded(cls, home: Path | str | None = None) -> Self:
        """No daemon, but an engine in this process, on the store in `home`.

        By default that of the environment. Its sandboxes end with it. Other processes may use the
        store meanwhile.
        """
        return cls.of(Embedded(Path(home) if home else None))

    @classmethod
    def of(cls, source: Source) -> Self:
        """The daemon that `source` finds."""
        client = cls.__new__(cls)
        client._set_up(source)
        return client

    @classmethod
    def of_sandboxes(cls) -> Self:
        """The daemon of the environment, closed with the last sandbox that uses this."""
        client = cls()
        client._borrowers = 0
        return client

    # Loaded when they are used, as few programs use them all.

    @cached_property
    def snapshots(self) -> AsyncSnapshots:
        from ratoon.client.aio.snapshots import AsyncSnapshots

        return AsyncSnapshots(self._connection)

    @cached_property
    def volumes(self) -> AsyncVolumes:
        from ratoon.client.aio.volumes import AsyncVolumes

        return AsyncVolumes(self._connection)

    @cached_property
    def starts(self) -> AsyncStarts:
        from ratoon.client.aio.starts import AsyncStarts

        return AsyncStarts(self._connection)

    # Sandboxes ------------------------------------------------------------------------------------

    async def fork(self, tag: str, n: int = 1, **options: Unpack[Options]) -> Forks:
        """`n` sandboxes forked from snapshot `tag`: for each, the sandbox, or what went wrong.

        If none could be made, that is raised. See `AsyncSandbox.create`.
        """
        body = {"snapshot_tag": tag, "n": n, **request_for(options)}
        return await self.forked("/v1/sandboxes", body, tag)

    async def run_image(
        self,
        image: str,
        command: str | Sequence[str] | None = None,
        **options: Unpack[RunOptions],
    ) -> AsyncSandbox:
        """A sandbox in which the command of an image runs. See `AsyncSandbox.run_image`."""
        body = run_request(image, command, options)
        answer = await self._connection.ask("POST", "/v1/runs", body=body)
        return AsyncSandbox(self, read(SandboxInfo, answer["sandbox"]), read(RunInfo, answer))

    async def sandbox(self, sandbox_id: str) -> AsyncSandbox:
        """The sandbox of this id; NotFound."""
        path = f"/v1/sandboxes/{segment(sandbox_id)}"
        return AsyncSandbox(self, read(SandboxInfo, await self._connection.ask("GET", path)))

    async def sandboxes(
        self, *, metadata: Mapping[str, str] | None = None, state: State | None = None
    ) -> list[SandboxInfo]:
        """All sandboxes, or those that have this metadata, and are in this state."""
        pairs = [f"{key}:{value}" for key, value in (metadata or {}).items()]
        query = {"metadata": pairs, "state": state}
        found = await self._connection.ask("GET", "/v1/sandboxes", query=query)
        return read(list[SandboxInfo], found)

    async def forked(self, path: str, body: Mapping[str, Any], tag: str) -> Forks:
        """What a request that forks has made, and the errors of what it has not."""
        answer, headers = await self._connection.send("POST", path, body=body)
        made: Forks = [AsyncSandbox(self, each) for each in read(list[SandboxInfo], answer)]
        if count := int(headers.get("ratoon-failed", 0)):
            made += await self._failures(count, tag)
        return made

    async def _failures(self, count: int, tag: str) -> list[RatoonError]:
        told = await self._connection.ask("GET", "/v1/sandboxes/failures")
        errors = [error_from(500, each) for each in told["errors"]]
        if told["snapshot_tag"] == tag and len(errors) == count:
            return errors
        return [RatoonError(f"a fork of {tag} failed, and why is not known any more")] * count

    # The daemon -----------------------------------------------------------------------------------

    async def version(self) -> str:
        """Of Ratoon, as the daemon has it."""
        return str((await self._connection.ask("GET", "/version"))["version"])

    @asynccontextmanager
    async def events(self) -> AsyncIterator[AsyncIterator[Event]]:
        """What happens to sandboxes and snapshots from now on; within the block, iterate over it.

        First comes the last progress of each thing that is being made. Who takes them too slowly
        gets one of kind `overflow` in place of those that were lost.
        """
        async with (
            self._connection.pieces("/v1/events") as pieces,
            aclosing(_events(pieces)) as events,
        ):
            yield events

    async def pool(self) -> list[PoolInfo]:
        """The machines that wait to become sandboxes."""
        return read(list[PoolInfo], await self._connection.ask("GET", "/v1/pool"))

    async def keep(self, tag: str, size: int) -> list[PoolInfo]:
        """Have `size` machines of a snapshot wait, from soon on: forks that take one are quicker.

        Each holds memory. NotFound; Overloaded: the host has no room for them.
        """
        path = f"/v1/pool/{segment(tag)}"
        answer = await self._connection.ask("PUT", path, body={"size": size})
        return read(list[PoolInfo], answer)

    # The end --------------------------------------------------------------------------------------

    async def close(self) -> None:
        """Let go of the daemon; an embedded engine ends, with its sandboxes."""
        await self._connection.close()

    def lend(self) -> AsyncConnection:
        """For a sandbox, until it gives it back."""
        if self._borrowers is not None:
            self._borrowers += 1
        return self._connection

    async def give_back(self) -> None:
        if self._borrowers is None:
            return
        self._borrowers -= 1
        if not self._borrowers:
            await self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()


async def _events(pieces: AsyncIterator[bytes]) -> AsyncGenerator[Event, None]:
    left = b""
    async for piece in pieces:
        *lines, left = (left + piece).split(b"\n")
        for line in lines:
            if line:
                yield read(Event, json.loads(line))


def _source(url: str | None, token: str | None, tls: ssl.SSLContext | None) -> Source:
    url = url or url_of_environment()
    token = token or token_of_environment()
    return Known(parse(url, token, tls)) if url else LocalDaemon(token)
