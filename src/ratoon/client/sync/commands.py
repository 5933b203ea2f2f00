# Made from ../aio/commands.py by scripts/make_sync.py: change it there.
"""Programs in a sandbox: run to their end, or in the background, and found again."""

from __future__ import annotations

import signal as signals
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import Any, Literal, Self, overload

from ratoon.api.answers import ProcessInfo, read
from ratoon.client.output import (
    CommandResult,
    Output,
    OutputCollector,
    command_of,
    output_of,
    require_success,
)
from ratoon.client.sync.concurrency import Listener, run_alongside, tell
from ratoon.client.sync.connection import Connection, begun
from ratoon.client.sync.conversations import Conversation
from ratoon.errors import Unreachable

Processes = list[ProcessInfo]

#: Bytes of input in one message.
_CHUNK = 64 * 1024


class Command:
    """A program as it runs. Comes from `start` and its like, such as `run(…, background=True)`.

    Its output is to be taken: by `wait`, by `read`, or by iterating over it. While nobody takes it,
    the program stands still as soon as it has written some hundred kilobytes.
    """

    def __init__(
        self,
        connection: Connection,
        path: str,
        held: ExitStack,
        talk: Conversation,
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

    def read(self) -> Output | None:
        """What it writes next; None: it has ended. Conflict: somebody else listens now."""
        while self._ended is None:
            message = self._talk.receive()
            if isinstance(message, bytes):
                return output_of(message)
            if message is None:
                raise Unreachable(f"the daemon closed before it had told how {self._shown} ended")
            self._ended = message.get("exit")
        return None

    def __iter__(self) -> Iterator[Output]:
        while (output := self.read()) is not None:
            yield output

    def wait(
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
            gathering = gather(self, on_stdout, on_stderr)
        finally:
            self.disconnect()
        assert self._ended is not None
        result = gathering.result(self._ended)
        return require_success(result, self._shown) if check else result

    def send_stdin(self, data: str | bytes) -> None:
        """Input for it; waits until the guest takes it. It needs `stdin=True`, or a terminal."""
        sent = data.encode() if isinstance(data, str) else data
        for start in range(0, len(sent), _CHUNK):
            self._talk.send(sent[start : start + _CHUNK])

    def close_stdin(self) -> None:
        """No more input will come; on a terminal it gets what control-D sends."""
        self._talk.send_json(eof=True)

    def resize(self, rows: int, columns: int) -> None:
        """Set the size of its terminal."""
        self._talk.send_json(resize={"rows": rows, "columns": columns})

    def signal(self, number: int) -> None:
        """Send a signal to its process group; SIGKILL is for all that it has started.

        Conflict: it has ended.
        """
        path = f"{self._path}/processes/{self.pid}/signal"
        self._connection.ask("POST", path, body={"signal": int(number)})

    def kill(self) -> None:
        """Kill it and all that it has started."""
        self.signal(signals.SIGKILL)

    def disconnect(self) -> None:
        """Listen no more. In the background it goes on, and can be connected to again."""
        self._held.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.disconnect()


class Commands:
    """The programs of one sandbox: `sandbox.commands`."""

    def __init__(self, connection: Connection, path: str) -> None:
        self._connection = connection
        self._path = path

    @overload
    def run(
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
    def run(
        self,
        command: str | Sequence[str],
        *,
        stdin: bool = False,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        user: str | None = None,
        timeout: float | None = None,
        background: Literal[True],
    ) -> Command: ...

    def run(
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
    ) -> CommandResult | Command:
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
        running = self.start(command, **options)
        if background:
            return running
        given = stdin.encode() if isinstance(stdin, str) else stdin
        with running:

            def feed() -> None:
                with suppress(Unreachable):  # it has ended, or will say itself what is wrong
                    assert isinstance(given, bytes)
                    running.send_stdin(given)
                    running.close_stdin()

            def collect() -> CommandResult:
                return running.wait(on_stdout=on_stdout, on_stderr=on_stderr, check=check)

            if not given:
                return collect()
            return run_alongside(collect, feed, running.disconnect)
        raise AssertionError

    def start(
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
    ) -> Command:
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
        return self._open(opening, shown)

    def list(self) -> Processes:
        """The commands that run, and those in the background of whose end the guest still knows."""
        return read(Processes, self._connection.ask("GET", f"{self._path}/processes"))

    def connect(self, pid: int) -> Command:
        """A command that runs, or that ran in the background, with the end of what it has written.

        Who listened before does so no longer: a Conflict, there. NotFound: there is no such one.
        """
        return self._open({"attach": pid}, f"command {pid}")

    def kill(self, pid: int) -> None:
        """Kill a command and all that it has started. NotFound; Conflict: it has ended."""
        self.signal(pid, signals.SIGKILL)

    def signal(self, pid: int, number: int) -> None:
        """Send a signal to a command's process group; SIGKILL is for all that it has started.

        NotFound; Conflict: it has ended.
        """
        path = f"{self._path}/processes/{pid}/signal"
        self._connection.ask("POST", path, body={"signal": int(number)})

    def _open(self, opening: Mapping[str, Any], shown: str) -> Command:
        with ExitStack() as held:
            path = f"{self._path}/exec/stream"
            talk = held.enter_context(self._connection.converse(path))
            talk.send_json(**opening)
            pid = (begun(talk))["pid"]
            return Command(self._connection, self._path, held.pop_all(), talk, pid, shown)
        raise AssertionError


def gather(
    outputs: Iterable[Output],
    on_stdout: Listener[str] | None,
    on_stderr: Listener[str] | None,
) -> OutputCollector:
    """Take all of the output, and tell it to the listeners as text."""
    listeners = {"stdout": on_stdout, "stderr": on_stderr}
    gathering = OutputCollector()
    for output in outputs:
        text = gathering.add(output)
        if text and (listener := listeners[output.stream]):
            tell(listener, text)
    for stream, listener in listeners.items():
        if (text := gathering.rest(stream)) and listener:
            tell(listener, text)
    return gathering
