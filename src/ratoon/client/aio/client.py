"""One daemon, or one engine in this process, and its sandboxes, as their user has them.

Each of the two classes makes the other one.
"""

from __future__ import annotations

import json
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from functools import cached_property
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, Unpack

from ratoon.api.answers import (
    Changed,
    CommandEnd,
    EvalResult,
    Event,
    IdleCounts,
    ListedState,
    MainCommand,
    PoolInfo,
    RunInfo,
    SandboxInfo,
    Stopped,
    read,
)
from ratoon.api.defaults import STOP_SECONDS
from ratoon.client.address import Known, Source, parse, token_of_environment, url_of_environment
from ratoon.client.aio.commands import AsyncCommands
from ratoon.client.aio.concurrency import Listener
from ratoon.client.aio.connection import AsyncConnection, segment
from ratoon.client.aio.evaluation import evaluate
from ratoon.client.aio.ports import AsyncPorts
from ratoon.client.aio.pty import AsyncPty
from ratoon.client.options import Options, request_for
from ratoon.client.problems import error_from
from ratoon.client.runs import RunOptions, run_request
from ratoon.errors import NotFound, RatoonError, Unreachable

if TYPE_CHECKING:
    from pathlib import Path

    from ratoon.api.snapshots import SnapshotInfo
    from ratoon.client.aio.files import AsyncFiles
    from ratoon.client.aio.snapshots import AsyncSnapshots
    from ratoon.client.aio.starts import AsyncStarts
    from ratoon.client.aio.volumes import AsyncVolumes

#: Seconds after which one who waits asks again: a daemon gives requests an hour.
WAIT_SECONDS = 1800
Infos = list[SandboxInfo]
Forks = list["AsyncSandbox | RatoonError"]


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
        from ratoon.client.embedded import Embedded

        return cls.of(Embedded(home))

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
        self, *, metadata: Mapping[str, str] | None = None, state: ListedState | None = None
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

    async def __aexit__(self, *_: object) -> None:
        await self.close()


class AsyncSandbox:
    """A virtual machine of its own, forked from a snapshot.

    ::

        async with await AsyncSandbox.create("base") as sandbox:
            print((await sandbox.commands.run("uname -a")).stdout)

    Leaving its block kills it. Without a block it lives until `kill`, or its `timeout`, also when
    this process ends.

    Whatever is asked of it raises the errors of `ratoon.errors`: NotFound once it was killed,
    MachineDied with the end of its log if its machine has died, Conflict while it is in standby and
    does not wake by itself, Unreachable if the daemon is not there.
    """

    def __init__(self, client: AsyncClient, info: SandboxInfo, run: RunInfo | None = None) -> None:
        self._client = client
        self._connection = client.lend()
        self._given_back = False
        #: As it was when the daemon last told of it.
        self.info = info
        #: How it was started, if that was by `run_image`.
        self.run = run
        #: After `stop`, `kill`, `standby` and `reset`: why its volumes may lack what its guest had
        #: written before; None: they have all of it.
        self.unsynced: str | None = None
        path = self._path = f"/v1/sandboxes/{segment(info.id)}"
        self.commands = AsyncCommands(self._connection, path)
        self.pty = AsyncPty(self.commands)
        self.ports = AsyncPorts(self._connection, path)

    @cached_property
    def files(self) -> AsyncFiles:
        from ratoon.client.aio.files import AsyncFiles  # with all that unpacks archives

        return AsyncFiles(self._connection, self._path)

    @property
    def id(self) -> str:
        return self.info.id

    # Where one comes from -------------------------------------------------------------------------

    @classmethod
    async def create(
        cls, tag: str, *, client: AsyncClient | None = None, **options: Unpack[Options]
    ) -> AsyncSandbox:
        """A fork of snapshot `tag`, whose agent has answered; see `Options`.

        Without a `client`, of the daemon that the environment says. NotFound: there is no such
        snapshot. Conflict: it cannot be forked. Overloaded: the host has no room for it.
        """
        async with _using(client) as chosen:
            (made,) = await chosen.fork(tag, **options)
        if isinstance(made, RatoonError):
            raise made
        return made

    @classmethod
    async def run_image(
        cls,
        image: str,
        command: str | Sequence[str] | None = None,
        *,
        client: AsyncClient | None = None,
        **options: Unpack[RunOptions],
    ) -> AsyncSandbox:
        """A sandbox in which the command of an image runs in the background; see `RunOptions`.

        `command` takes the place of the image's own, after its entrypoint: text for `sh -c`, or a
        list. With a health check this returns once that has passed, and keeps what there is then:
        the next equal run is a fork of it, with the command running. `run` says what it came to;
        `commands.connect(sandbox.run.pid)` listens to the command.

        NotHealthy: the command ended, or was not up in time, with the end of its output. NotFound,
        InvalidInput: there is no such image or command.
        """
        async with _using(client) as chosen:
            return await chosen.run_image(image, command, **options)
        raise AssertionError

    @classmethod
    async def connect(cls, sandbox_id: str, *, client: AsyncClient | None = None) -> AsyncSandbox:
        """The sandbox of this id; NotFound."""
        async with _using(client) as chosen:
            return await chosen.sandbox(sandbox_id)
        raise AssertionError

    @classmethod
    async def list(
        cls,
        *,
        metadata: Mapping[str, str] | None = None,
        state: ListedState | None = None,
        client: AsyncClient | None = None,
    ) -> Infos:
        """All sandboxes, or those that have this metadata, and are in this state."""
        async with _using(client) as chosen:
            return await chosen.sandboxes(metadata=metadata, state=state)
        raise AssertionError

    # What it does ---------------------------------------------------------------------------------

    async def eval(
        self,
        code: str,
        *,
        timeout: float | None = None,
        on_stdout: Listener[str] | None = None,
        on_stderr: Listener[str] | None = None,
    ) -> EvalResult:
        """Run Python in the sandbox's warm interpreter, which keeps its state from call to call.

        An exception is a result too: `error` has its traceback. After `timeout` seconds the code is
        interrupted. The listeners are given text as it comes. NoPython: the guest has none.
        """
        return await evaluate(
            self._connection,
            self._path,
            code,
            timeout=timeout,
            on_stdout=on_stdout,
            on_stderr=on_stderr,
        )

    run_code = eval

    async def refresh(self) -> SandboxInfo:
        """Ask the daemon how it is now."""
        self.info = read(SandboxInfo, await self._connection.ask("GET", self._path))
        return self.info

    async def set_timeout(self, timeout: float | None) -> None:
        """Have it killed so many seconds after its fork; None: never."""
        await self._change(ttl_seconds=timeout)

    async def set_idle(self, idle: float | None, counts: IdleCounts | None = None) -> None:
        """Have it go to standby after so many seconds without use; None: never.

        `counts`: what is use from now on, as `idle_counts` of `Options`; None: as before.
        """
        given = {} if counts is None else {"idle_counts": counts}
        await self._change(idle_seconds=idle, **given)

    async def set_metadata(self, metadata: Mapping[str, str]) -> None:
        """Give it this metadata, and no other."""
        await self._change(metadata=dict(metadata))

    async def _change(self, **options: object) -> None:
        answer = await self._connection.ask("PATCH", self._path, body=options)
        self.info = read(SandboxInfo, answer)

    # What becomes of it ---------------------------------------------------------------------------

    async def fork(self, n: int = 1, **options: Unpack[Options]) -> Forks:
        """`n` forks of it as it is now; it goes on. For each, the sandbox, or what went wrong.

        Options that are not given are its own. If none could be made, that is raised.
        """
        body = {"n": n, **request_for(options, self.info.limits)}
        return await self._client.forked(f"{self._path}/fork", body, self.info.snapshot_tag)

    async def branch(
        self,
        tag: str | None = None,
        *,
        mode: Literal["diff", "full", "live"] = "diff",
        wait: bool = True,
    ) -> SnapshotInfo:
        """Publish its state as a snapshot, named `tag` or by the daemon; it goes on running.

        `diff`: what changed since its last branch or its fork, on top of that. `full`: all of it,
        standing on no other. `live`: as diff, and it hardly stands still; without `wait` the answer
        comes when it runs again, while the snapshot is being written.

        AlreadyExists; Overloaded: too many branches are under way.
        """
        from ratoon.api.snapshots import SnapshotInfo

        body = {"tag": tag, "mode": mode, "wait": wait}
        answer = await self._connection.ask("POST", f"{self._path}/branch", body=body)
        return read(SnapshotInfo, answer)

    async def standby(self) -> dict[str, float]:
        """Put it to standby: its state is on disk, its memory free. How long each stage took, ms.

        Conflict: it is in standby already.
        """
        return await self._become("standby")

    async def resume(self) -> dict[str, float]:
        """Let it go on where it was. Conflict: it is running."""
        return await self._become("resume")

    async def reset(self) -> dict[str, float]:
        """Take it back to its last branch, or to what it was forked from."""
        return await self._become("reset")

    async def _become(self, what: str) -> dict[str, float]:
        answer = await self._connection.ask("POST", f"{self._path}/{what}")
        changed = read(Changed, answer)
        self.info, self.unsynced = changed.sandbox, changed.unsynced
        return changed.stages_ms

    async def wait(self) -> CommandEnd:
        """How the command ended that it was made for, once it has; that is no use of the sandbox.

        That is the one of `run_image`, or what was started as `main`. Conflict: it has none.
        """
        body = {"timeout_secs": WAIT_SECONDS}
        while True:
            answer = await self._connection.ask("POST", f"{self._path}/wait", body=body)
            if (ended := read(MainCommand, answer).ended) is not None:
                return ended

    async def stop(self, timeout: float = STOP_SECONDS) -> CommandEnd | None:
        """End it as `kill` does, once its command has ended, as its stop signal asks it to.

        The command has `timeout` seconds for that, and what it leaves behind has the rest of them.
        How it ended; None: it had to be killed, or there was none. In standby a sandbox is killed
        as it is, unless it wakes when it is used.
        """
        body = {"timeout_secs": timeout}
        answer = await self._connection.ask("POST", f"{self._path}/stop", body=body)
        await self.close()
        stopped = read(Stopped, answer)
        self.unsynced = stopped.unsynced
        return stopped.ended

    async def kill(self, *, now: bool = False) -> bool:
        """End it, and remove all it had; False if there is no such sandbox any more.

        What its guest has written to its volumes is there then, or `unsynced` says why it may not
        be. `now`: without waiting for that.
        """
        try:
            query = {"now": True} if now else None
            _, headers = await self._connection.send("DELETE", self._path, query=query)
            self.unsynced = headers.get("ratoon-unsynced")
        except NotFound:
            return False
        finally:
            await self.close()
        return True

    async def close(self) -> None:
        """Have no more to do with it; it goes on."""
        if not self._given_back:
            self._given_back = True
            await self._client.give_back()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            await self.kill()
        except Unreachable:
            if error is None:
                raise


@asynccontextmanager
async def _using(given: AsyncClient | None) -> AsyncIterator[AsyncClient]:
    """The client that was given, or one that is closed with the last sandbox that uses it."""
    client = given or AsyncClient.of_sandboxes()
    client.lend()
    try:
        yield client
    finally:
        await client.give_back()


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
    if url:
        return Known(parse(url, token, tls))
    from ratoon.client.local import LocalDaemon  # with all that starts one

    return LocalDaemon(token)
