"""Programs in a sandbox: run to their end, or in the background, and found again."""

from __future__ import annotations

import signal as signals
from collections.abc import AsyncIterable, AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from typing import Any, Literal, Self, overload

from ratoon.api.answers import ProcessInfo, read
from ratoon.client.aio.concurrency import Listener, run_alongside, tell
from ratoon.client.aio.connection import AsyncConnection, begun
from ratoon.client.aio.conversations import AsyncConversation
from ratoon.client.output import (
    CommandResult,
    Output,
    OutputCollector,
    command_of,
    output_of,
    require_success,
)
from ratoon.errors import Unreachable

Processes = list[ProcessInfo]

#: Bytes of input in one message.
_CHUNK = 64 * 1024


class AsyncCommand:
    """A program as it runs. Comes from `start` and its like, such as `run(…, background=True)`.

    Its output is to be taken: by `wait`, by `read`, or by iterating over it. While nobody takes it,
    the program stands still as soon as it has written some hundred kilobytes.
    """

    def __init__(
        self,
        connection: AsyncConnection,
        path: str,
        held: AsyncExitStack,
        talk: AsyncConversation,
        pid: int | None,
        shown: str,
    ) -> None:
        #: In the guest; None: it could not be started, and `wait` says why.
        self.pid = pid
        self._connection = connection
        self._path = path
        self._held = held
        self._talk = talk
        self._shown = shown
        self._ended: dict[str, Any] | None = None

    async def read(self) -> Output | None:
        """What it writes next; None: it has ended. Conflict: somebody else listens now."""
        while self._ended is None:
            message = await self._talk.receive()
            if isinstance(message, bytes):
                return output_of(message)
            if message is None:
                raise Unreachable(f"the daemon closed before it had told how {self._shown} ended")
            self._ended = message.get("exit")
        return None

    async def __aiter__(self) -> AsyncIterator[Output]:
        while (output := await self.read()) is not None:
            yield output

    async def wait(
        self,
        *,
        on_stdout: Listener[str] | None = None,
        on_stderr: Listener[str] | None = None,
        check: bool = True,
    ) -> CommandResult:
        """How it ended, with all of its output that was not read before.

        Each listener is given text as it comes. CommandFailed: its exit code is not 0, and `check`.
        """
        try:
            gathering = await gather(self, on_stdout, on_stderr)
        finally:
            await self.disconnect()
        assert self._ended is not None
        result = gathering.result(self._ended)
        return require_success(result, self._shown) if check else result

    async def send_stdin(self, data: str | bytes) -> None:
        """Input for it; waits until the guest takes it. It needs `stdin=True`, or a terminal."""
        sent = data.encode() if isinstance(data, str) else data
        for start in range(0, len(sent), _CHUNK):
            await self._talk.send(sent[start : start + _CHUNK])

    async def close_stdin(self) -> None:
        """No more input will come; on a terminal it gets what control-D sends."""
        await self._talk.send_json(eof=True)

    async def resize(self, rows: int, columns: int) -> None:
        """Set the size of its terminal."""
        await self._talk.send_json(resize={"rows": rows, "columns": columns})

    async def signal(self, number: int) -> None:
        """Send a signal to its process group; SIGKILL is for all that it has started.

        Conflict: it has ended.
        """
        path = f"{self._path}/processes/{self.pid}/signal"
        await self._connection.ask("POST", path, body={"signal": int(number)})

    async def kill(self) -> None:
        """Kill it and all that it has started."""
        await self.signal(signals.SIGKILL)

    async def disconnect(self) -> None:
        """Listen no more. In the background it goes on, and can be connected to again."""
        await self._held.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.disconnect()


class AsyncCommands:
    """The programs of one sandbox: `sandbox.commands`."""

    def __init__(self, connection: AsyncConnection, path: str) -> None:
        self._connection = connection
        self._path = path

    @overload
    async def run(
        self,
        command: str | Sequence[str],
        *,
        stdin: str | bytes | None = None,
        on_stdout: Listener[str] | None = None,
        on_stderr: Listener[str] | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        user: str | None = None,
        timeout: float | None = None,
        check: bool = True,
        background: Literal[False] = False,
    ) -> CommandResult: ...

    @overload
    async def run(
        self,
        command: str | Sequence[str],
        *,
        stdin: bool = False,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        user: str | None = None,
        timeout: float | None = None,
        background: Literal[True],
    ) -> AsyncCommand: ...

    async def run(
        self,
        command: str | Sequence[str],
        *,
        stdin: str | bytes | bool | None = None,
        on_stdout: Listener[str] | None = None,
        on_stderr: Listener[str] | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        user: str | None = None,
        timeout: float | None = None,
        check: bool = True,
        background: bool = False,
    ) -> CommandResult | AsyncCommand:
        """Run a program to its end: text by `sh -c`, or a list of the program and its arguments.

        `env` is added to what it has anyway. `user`: NAME or UID of the guest's, also with
        `:GROUP`. After `timeout` seconds (None: never) it is killed with all that it has started.
        The listeners are given text as it comes; the result has all of it as well.

        CommandFailed: its exit code is not 0; with `check=False` that is a result as any other.

        `background`: return at once, with the program as it runs. It goes on when nobody listens.
        With `stdin=True` it can be given input later.
        """
        options: dict[str, Any] = {
            "env": env,
            "cwd": cwd,
            "user": user,
            "timeout": timeout,
            "stdin": bool(stdin),
            "background": background,
        }
        running = await self.start(command, **options)
        if background:
            return running
        given = stdin.encode() if isinstance(stdin, str) else stdin
        async with running:

            async def feed() -> None:
                with suppress(Unreachable):  # it has ended, or will say itself what is wrong
                    assert isinstance(given, bytes)
                    await running.send_stdin(given)
                    await running.close_stdin()

            async def collect() -> CommandResult:
                return await running.wait(on_stdout=on_stdout, on_stderr=on_stderr, check=check)

            if not given:
                return await collect()
            return await run_alongside(collect, feed, running.disconnect)
        raise AssertionError

    async def start(
        self,
        command: str | Sequence[str],
        *,
        stdin: bool = False,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        user: str | None = None,
        timeout: float | None = None,
        terminal: tuple[int, int] | None = None,
        background: bool = False,
        main: bool = False,
        own_pids: bool = False,
    ) -> AsyncCommand:
        """Start a program, and return it as it runs; `run` tells of the arguments.

        `main`: the sandbox is made for it, and `wait` and `stop` of that are about it. `own_pids`:
        it is process 1, as in a container of its own, which commands that follow are in as well,
        and which ends with it. Conflict: there is such a one.

        `terminal`: rows and columns of one that it runs on. It is killed when its block is left, or
        it is disconnected from, unless it is in the `background`.
        """
        argv, shown = command_of(command)
        size = terminal and {"rows": terminal[0], "columns": terminal[1]}
        opening: dict[str, Any] = {
            "argv": argv,
            "env": None if env is None else dict(env),
            "cwd": cwd,
            "user": user,
            "timeout": timeout,
            "stdin": stdin,
            "pty": size,
            "background": background,
            "main": main,
            "own_pids": own_pids,
        }
        return await self._open(opening, shown)

    async def list(self) -> Processes:
        """The commands that run, and those in the background of whose end the guest still knows."""
        return read(Processes, await self._connection.ask("GET", f"{self._path}/processes"))

    async def connect(self, pid: int) -> AsyncCommand:
        """A command that runs, or that ran in the background, with the end of what it has written.

        Who listened before does so no longer: a Conflict, there. NotFound: there is no such one.
        """
        return await self._open({"attach": pid}, f"command {pid}")

    async def kill(self, pid: int) -> None:
        """Kill a command and all that it has started. NotFound; Conflict: it has ended."""
        await self.signal(pid, signals.SIGKILL)

    async def signal(self, pid: int, number: int) -> None:
        """Send a signal to a command's process group; SIGKILL is for all that it has started.

        NotFound; Conflict: it has ended.
        """
        path = f"{self._path}/processes/{pid}/signal"
        await self._connection.ask("POST", path, body={"signal": int(number)})

    async def _open(self, opening: Mapping[str, Any], shown: str) -> AsyncCommand:
        async with AsyncExitStack() as held:
            path = f"{self._path}/exec/stream"
            talk = await held.enter_async_context(self._connection.converse(path))
            await talk.send_json(**opening)
            pid = (await begun(talk))["pid"]
            return AsyncCommand(self._connection, self._path, held.pop_all(), talk, pid, shown)
        raise AssertionError


async def gather(
    outputs: AsyncIterable[Output],
    on_stdout: Listener[str] | None,
    on_stderr: Listener[str] | None,
) -> OutputCollector:
    """Take all of the output, and tell it to the listeners as text."""
    listeners = {"stdout": on_stdout, "stderr": on_stderr}
    gathering = OutputCollector()
    async for output in outputs:
        text = gathering.add(output)
        if text and (listener := listeners[output.stream]):
            await tell(listener, text)
    for stream, listener in listeners.items():
        if (text := gathering.rest(stream)) and listener:
            await tell(listener, text)
    return gathering
