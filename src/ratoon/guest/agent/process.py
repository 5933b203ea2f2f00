"""One process of the sandbox, in a session and process group of its own."""

from __future__ import annotations

import fcntl
import os
import select
import signal
import subprocess
from collections import deque

from . import wire

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from .loop import Loop, Timer
    from .stream import Stream

CHUNK = 32 * 1024
TIMED_OUT, NOT_EXECUTABLE, NOT_FOUND = 124, 126, 127
ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "LANG": "C.UTF-8",
}
#: include/uapi/asm-generic/ioctls.h; the module `termios` would be loaded for it alone.
FIONREAD = 0x541B


class StartError(Exception):
    """The program could not be started; `exit_code` is a shell's for this case, 126 or 127."""

    def __init__(self, program: str, cwd: str, error: OSError) -> None:
        self.exit_code = NOT_FOUND if isinstance(error, FileNotFoundError) else NOT_EXECUTABLE
        what = (
            f"cannot enter the directory {cwd}"
            if error.filename == cwd
            else f"cannot execute {program}"
        )
        super().__init__(f"{what}: {error.strerror}")


class Output:
    """A pipe that a process writes to, and the kind of frame it feeds."""

    def __init__(self, fd: int, kind: int) -> None:
        self.fd = fd
        self.kind = kind
        self.watched = False
        #: Where the process has ended or is to settle: how much is still to be delivered.
        self.left: int | None = None


class Process:
    """A program that runs, or has run. Its output goes to `listener`; without one it is drained."""

    def __init__(self, loop: Loop, pid: int, stdin: int | None, outputs: list[Output]) -> None:
        self.pid = pid
        self.listener: Stream | None = None
        #: As of `waitpid`, once it has ended.
        self.status: int | None = None
        self.timed_out = False
        #: Called when it has ended and its output is delivered, in place of a reply to `listener`.
        self.on_end: Callable[[], None] | None = None
        self._loop = loop
        self._stdin = stdin
        self._stdin_queue: deque[bytes] = deque()
        self._stdin_ended = False
        self._stdin_watched = False
        self._outputs = outputs
        self._timer: Timer | None = None
        self._then: Callable[[], None] | None = None
        for output in outputs:
            self._watch(output)

    @classmethod
    def start(
        cls, loop: Loop, argv: list[str], *, env: dict[str, str], cwd: str, with_stdin: bool
    ) -> Process:
        """Start `argv`; raises StartError if the program is missing or cannot be executed."""
        ours: list[int] = []
        theirs: list[int] = []
        try:
            for _ in ("stdout", "stderr"):
                read, write = os.pipe2(os.O_CLOEXEC)
                ours.append(read)
                theirs.append(write)
            stdin = subprocess.DEVNULL
            if with_stdin:
                stdin, write = os.pipe2(os.O_CLOEXEC)
                ours.append(write)
                theirs.append(stdin)
            # Nothing is inherited that is not meant to be, and so vfork will do: a fork would make
            # every page of the agent copied on write, here and then in each fork of the sandbox.
            started = subprocess.Popen(
                argv,
                stdin=stdin,
                stdout=theirs[0],
                stderr=theirs[1],
                cwd=cwd,
                env={**ENVIRONMENT, **env},
                start_new_session=True,
                close_fds=False,
            )
        except BaseException as error:
            for fd in ours:
                os.close(fd)
            if isinstance(error, OSError):
                raise StartError(argv[0], cwd, error) from None
            raise
        finally:
            for fd in theirs:
                os.close(fd)
        started.returncode = 0  # it is the loop that waits for it, as for all children
        for fd in ours:
            os.set_blocking(fd, False)
        outputs = [Output(ours[0], wire.STDOUT), Output(ours[1], wire.STDERR)]
        return cls(loop, started.pid, ours[2] if with_stdin else None, outputs)

    # Its end ------------------------------------------------------------------------------------

    def limit(self, seconds: float) -> None:
        """Kill it after `seconds`, and say so in the outcome."""

        def expire() -> None:
            self.timed_out = True
            self.kill()

        self._timer = self._loop.after(seconds, expire)

    def lift_limit(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal to its process group."""
        if self.status is None:
            try:
                os.killpg(self.pid, number)
            except ProcessLookupError:
                pass

    def exited(self, status: int) -> None:
        """It has ended. What it wrote before is delivered, then `listener` is told.

        A pipe that a child of it still holds open is drained from here on, unheard.
        """
        self.status = status
        self.lift_limit()
        self._close_stdin()
        self.settle(self.on_end or self._reply)

    def settle(self, then: Callable[[], None]) -> None:
        """Deliver what has been written until now, then call `then`; what comes later is dropped.

        That may be much, and go on for ever, where a child of it holds the pipe.
        """
        self._then = then
        for output in list(self._outputs):
            output.left = _unread(output.fd)
            while output.left and self._move(output):
                pass
        self._check_settled()

    def hear(self, listener: Stream) -> None:
        """After it has settled: give `listener` what it writes from here on."""
        self.listener = listener
        for output in self._outputs:
            output.left = None

    def _check_settled(self) -> None:
        if self._then is not None and not any(output.left for output in self._outputs):
            then, self._then = self._then, None
            then()

    def outcome(self) -> dict[str, Any]:
        """The fields of the final reply."""
        assert self.status is not None
        if self.timed_out:
            return {"exit_code": TIMED_OUT, "timed_out": True}
        code = os.waitstatus_to_exitcode(self.status)
        if code < 0:
            return {"exit_code": 128 - code, "signal": -code}
        return {"exit_code": code}

    def _reply(self) -> None:
        if self.listener is not None:
            self.listener.reply(**self.outcome())

    # Its output ---------------------------------------------------------------------------------

    def resume(self) -> None:
        """There is room again, or nobody listens any more."""
        for output in self._outputs:
            if not output.watched:
                self._watch(output)

    def _watch(self, output: Output) -> None:
        output.watched = True
        self._loop.watch(output.fd, lambda: self._ready(output))

    def _unwatch(self, output: Output) -> None:
        if output.watched:
            output.watched = False
            self._loop.unwatch(output.fd)

    def _ready(self, output: Output) -> None:
        self._move(output)
        if output.left == 0:
            self._check_settled()

    def _move(self, output: Output) -> bool:
        """Read once, and pass on what is read; False if there was nothing, or no room for it."""
        listener = self.listener if output.left != 0 else None
        room = CHUNK if listener is None else min(listener.room, CHUNK)
        if output.left:
            room = min(room, output.left)
        if listener is not None and not room:
            self._unwatch(output)
            listener.wait_for_room()
            return False
        try:
            data = os.read(output.fd, room)
        except BlockingIOError:
            return False
        if not data:
            self._unwatch(output)
            self._outputs.remove(output)
            os.close(output.fd)
            output.left = 0
            return False
        if output.left:
            output.left -= len(data)
        if listener is not None:
            listener.send(output.kind, data)
        return True

    # Its input ----------------------------------------------------------------------------------

    def write(self, data: bytes) -> None:
        if self._stdin is None or self._stdin_ended:
            self._taken(len(data))
            return
        self._stdin_queue.append(data)
        if not self._stdin_watched:  # else the pipe is full
            self._pump()

    def end_input(self) -> None:
        """Close its stdin, after what is queued."""
        self._stdin_ended = True
        if not self._stdin_queue:
            self._close_stdin()

    def _pump(self) -> None:
        """Write what the pipe takes, and go on when it takes more."""
        while self._stdin is not None and self._stdin_queue:
            data = self._stdin_queue.popleft()
            try:
                written = os.write(self._stdin, data)
            except BlockingIOError:
                self._stdin_queue.appendleft(data)
                if not self._stdin_watched:
                    self._stdin_watched = True
                    self._loop.watch(self._stdin, self._pump, select.EPOLLOUT)
                return
            except OSError:  # nobody reads
                self._stdin_queue.appendleft(data)
                self._close_stdin()
                return
            if written < len(data):
                self._stdin_queue.appendleft(data[written:])
            self._taken(written)
        if self._stdin_watched and self._stdin is not None:
            self._stdin_watched = False
            self._loop.unwatch(self._stdin)
        if self._stdin_ended:
            self._close_stdin()

    def _close_stdin(self) -> None:
        if self._stdin is not None:
            if self._stdin_watched:
                self._stdin_watched = False
                self._loop.unwatch(self._stdin)
            os.close(self._stdin)
            self._stdin = None
        if self._stdin_queue:
            self._taken(sum(map(len, self._stdin_queue)))
            self._stdin_queue.clear()

    def _taken(self, count: int) -> None:
        if self.listener is not None:
            self.listener.taken(count)


def _unread(fd: int) -> int:
    """How much can be read from a pipe; a child that still holds it may write for ever."""
    return int.from_bytes(fcntl.ioctl(fd, FIONREAD, bytes(4)), "little")
