"""Programs in the guest: run to the end, talked to while they run, found again; and dialled."""

from __future__ import annotations

import asyncio
import signal as signals
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError

from ratoon.api.answers import ProcessInfo
from ratoon.concurrency import run_alongside
from ratoon.errors import Conflict, GuestError, GuestTimeout, InvalidInput, NotFound, RatoonError
from ratoon.machine.guest.channel import Agent, GuestStream, is_exit_code, printable
from ratoon.machine.guest.shared import wire

#: Bytes of output that `exec` keeps, of stdout and stderr each, unless told otherwise.
OUTPUT_LIMIT = 64 * 1024 * 1024
#: Seconds for the agent to report a command whose time is over; a loaded host is slow.
TIMEOUT_GRACE = 60.0
#: Seconds that something short may take.
TIMEOUT = 60.0

#: What the agent tells of processes has to be so.
_PROCESSES = TypeAdapter(list[ProcessInfo])

#: What the agent says no with, and what it is to whoever asked.
_REFUSALS: dict[str, type[RatoonError]] = {
    "no-user": InvalidInput,
    "no-process": NotFound,
    "ended": Conflict,
    "taken": Conflict,
}


@dataclass(frozen=True)
class Ended:
    """How a command ended; see ExecResult."""

    exit_code: int
    timed_out: bool = False
    error: str | None = None


@dataclass(frozen=True)
class ExecResult:
    """How a command ended.

    `exit_code` is a shell's: 124 timed out, 126 not executable, 127 not found, 128 + n killed by
    signal n. `error` says why a program could not be started. `truncated`: it wrote more than
    was to be kept; what came after was dropped.
    """

    exit_code: int
    stdout: bytes
    stderr: bytes
    timed_out: bool = False
    error: str | None = None
    truncated: bool = False

    def explain(self) -> str:
        """How a command that failed ended, with the end of its stderr."""
        ended = "timed out" if self.timed_out else f"exited with {self.exit_code}"
        reason = self.error or self.stderr.decode(errors="replace").strip()[-2000:]
        return f"the command {ended}" + (f": {reason}" if reason else "")


class Command:
    """A program in the guest, as it runs. Comes from `start` or `attach`.

    Every method raises GuestError once the guest cannot be reached any more.
    """

    def __init__(self, stream: GuestStream, pid: int | None) -> None:
        #: In the guest; None: the program could not be started, `wait` says why.
        self.pid = pid
        self._stream = stream

    async def read(self) -> tuple[int, bytes] | None:
        """The next output: wire.STDOUT or STDERR, and its bytes. None: it has ended.

        A terminal's output is all STDOUT. A command whose output is not read stands still.
        """
        return await self._stream.read()

    async def write(self, data: bytes) -> None:
        """Input for it; waits until the guest takes it. After its end it is dropped."""
        await self._stream.write(data)

    def end_input(self) -> None:
        """No more input will come; on a terminal it gets what control-D sends."""
        self._stream.end_input()

    def resize(self, rows: int, columns: int) -> None:
        """Set the size of its terminal."""
        self._stream.resize(*_size((rows, columns)))

    def signal(self, number: int) -> None:
        """Send a signal to its process group; SIGKILL is for all that it has started."""
        self._stream.signal(_signal(number))

    async def wait(self) -> Ended:
        """How it ended; output that was not read is dropped."""
        with _refusals():
            return _ended(self._stream, await self._stream.result())


@asynccontextmanager
async def start(
    agent: Agent,
    argv: list[str],
    *,
    env: dict[str, str] | None = None,
    cwd: str | None = None,
    user: str | None = None,
    stdin: bool = False,
    terminal: tuple[int, int] | None = None,
    background: bool = False,
    timeout: float | None = None,
    main: bool = False,
    own_pids: bool = False,
) -> AsyncIterator[Command]:
    """Start `argv` in the guest; leaving the block kills it, unless it is in the background.

    `user`: NAME or UID, or either with `:GROUP`, of the guest's own; InvalidInput if there is none.
    `terminal`: rows and columns of one that it runs on. `timeout`: seconds after which it is
    killed with all that it has started. `main`: it is what the sandbox is made for, whose end is
    told. `own_pids`: it is process 1 in a namespace of pids, where later commands are as well;
    Conflict: there is such a one already.
    """
    fields = _request(argv, env=env, cwd=cwd, user=user, timeout=timeout)
    fields |= {"stdin": stdin, "background": background, "announce": True}
    fields |= {"main": True} if main else {}
    fields |= {"own_pids": True} if own_pids else {}
    if terminal is not None:
        fields["terminal"] = _size(terminal)
    with _refusals():
        async with agent.open("exec", **fields) as stream:
            yield Command(stream, _pid(await _begun(stream, argv[0], TIMEOUT)))


@asynccontextmanager
async def attach(agent: Agent, pid: int) -> AsyncIterator[Command]:
    """Hear the end of what a command has written, then what it writes, and have its input.

    It goes on when the block is left. Whoever listened before does so no longer: a Conflict, there.
    NotFound: no such process was started, or its end is forgotten.
    """
    with _refusals():
        async with agent.open("attach", pid=pid) as stream:
            yield Command(stream, _pid(await _begun(stream, f"process {pid}", TIMEOUT)))


async def processes(agent: Agent) -> list[ProcessInfo]:
    """The commands that run, and those in the background of whose end the guest still knows."""
    reply = await agent.request("processes", timeout=TIMEOUT)
    try:
        return _PROCESSES.validate_python(reply["processes"])
    except (KeyError, ValidationError) as error:
        raise GuestError(f"the agent gave no list of processes: {printable(error)}") from None


async def signal(agent: Agent, pid: int, number: int) -> None:
    """Send a signal to a command's process group; SIGKILL is for all that it has started.

    NotFound; Conflict: it has ended.
    """
    with _refusals():
        await agent.request("signal", timeout=TIMEOUT, pid=pid, signal=_signal(number))


@asynccontextmanager
async def dial(
    agent: Agent, port: int, *, host: str | None = None, timeout: float = TIMEOUT
) -> AsyncIterator[GuestStream]:
    """A TCP connection made within the guest, to an address of digits.

    Without `host` to the loopback: 127.0.0.1, or ::1 if nobody listens there. What is written goes
    there, and `end_input` ends that half; what comes from there is STDOUT, empty at its end. A
    GuestError's kind is `refused`, `unreachable` or `timed-out`, or `reset` later. GuestTimeout:
    neither happens within `timeout` seconds.
    """
    if not 0 < port < 1 << 16:
        raise InvalidInput(f"there is no port {port}")
    where = {} if host is None else {"host": host}
    async with agent.open("dial", port=port, **where) as stream:
        await _begun(stream, f"a connection to port {port}", timeout)
        yield stream


async def exec(
    agent: Agent,
    argv: list[str],
    *,
    env: dict[str, str] | None = None,
    cwd: str | None = None,
    user: str | None = None,
    stdin: bytes = b"",
    timeout: float | None = None,
    output_limit: int = OUTPUT_LIMIT,
) -> ExecResult:
    """Run `argv` in the guest until it exits; after `timeout` seconds it is killed.

    `user` is as for `start`. If the caller is cancelled, so is the command. `output_limit` bytes of
    stdout and of stderr are kept. GuestTimeout: the time is over, and the agent does not say what
    became of the command.
    """
    fields = _request(argv, env=env, cwd=cwd, user=user, timeout=timeout)
    fields["stdin"] = bool(stdin)
    deadline = None if timeout is None else timeout + TIMEOUT_GRACE
    with _refusals():
        async with agent.open("exec", **fields) as stream:
            try:
                async with asyncio.timeout(deadline):
                    if not stdin:
                        return await _collect(stream, output_limit)
                    return await run_alongside(_collect(stream, output_limit), _feed(stream, stdin))
            except TimeoutError:
                raise GuestTimeout(
                    f"the agent of {stream.name} did not report the end of {argv[0]} within "
                    f"{deadline:g} s, although its time is {timeout:g} s"
                ) from None


async def _feed(stream: GuestStream, stdin: bytes) -> None:
    await stream.write(stdin)
    stream.end_input()


async def _collect(stream: GuestStream, limit: int) -> ExecResult:
    output = {wire.STDOUT: bytearray(), wire.STDERR: bytearray()}
    truncated = False
    while (piece := await stream.read()) is not None:
        kind, data = piece
        room = limit - len(output[kind])
        output[kind] += data[:room]
        truncated = truncated or len(data) > room
    ended = _ended(stream, await stream.result())
    return ExecResult(
        ended.exit_code,
        bytes(output[wire.STDOUT]),
        bytes(output[wire.STDERR]),
        timed_out=ended.timed_out,
        error=ended.error,
        truncated=truncated,
    )


# What goes out, and what comes back ---------------------------------------------------------------


def _request(argv: list[str], **fields: Any) -> dict[str, Any]:
    return {"argv": argv, **{name: value for name, value in fields.items() if value is not None}}


def _size(size: tuple[int, int]) -> tuple[int, int]:
    if not all(0 < count < 1 << 16 for count in size):
        raise InvalidInput(f"a terminal of {size[0]} rows and {size[1]} columns cannot be")
    return size


def _signal(number: int) -> int:
    if number not in signals.valid_signals():
        raise InvalidInput(f"there is no signal {number}")
    return int(number)


@contextmanager
def _refusals() -> Iterator[None]:
    """Turn what the agent says no with into the error that it is to whoever asked."""
    try:
        yield
    except GuestError as error:
        if error.kind not in _REFUSALS:
            raise
        raise _REFUSALS[error.kind](str(error)) from None


async def _begun(stream: GuestStream, what: str, timeout: float) -> dict[str, Any]:
    """What the agent says of what it has begun; GuestTimeout if it says nothing."""
    try:
        async with asyncio.timeout(timeout):
            return await stream.started()
    except TimeoutError:
        raise GuestTimeout(
            f"the agent of {stream.name} did not report {what} within {timeout:g} s"
        ) from None


def _pid(begun: dict[str, Any]) -> int | None:
    pid = begun.get("pid")
    return pid if type(pid) is int else None


def _ended(stream: GuestStream, reply: dict[str, Any]) -> Ended:
    exit_code: Any = reply.get("exit_code")
    if not is_exit_code(exit_code):
        raise GuestError(f"the agent of {stream.name} gave no exit code: {printable(reply)}")
    reason = reply.get("reason")
    return Ended(
        exit_code,
        timed_out=reply.get("timed_out") is True,
        error=None if reason is None else printable(reason),
    )
