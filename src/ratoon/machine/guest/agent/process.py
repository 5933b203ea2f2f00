"""One process of the sandbox, in a session and process group of its own."""

from __future__ import annotations

import fcntl
import os
import signal
import time

from . import spawn
from .sink import Sink
from .stream import CHUNK
from .tail import Tail

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from .groups import Group
    from .loop import Loop, Timer
    from .spawn import Started
    from .stream import Stream

TIMED_OUT = 124
#: What ends the input of a terminal, where a line begins.
END_OF_TRANSMISSION = b"\x04"
#: More than a terminal holds when its process ends. It cannot be asked.
TERMINAL_BUFFER = 64 * 1024
# include/uapi/asm-generic/ioctls.h
FIONREAD = 0x541B


class Output:
    """A pipe or terminal that a process writes to, and the kind of frame it feeds."""

    def __init__(self, fd: int, kind: int) -> None:
        self.fd = fd
        self.kind = kind
        self.watched = False
        #: Where the process has ended or is to settle: how much is still to be delivered.
        self.left: int | None = None


class Process:
    """A program that runs, or has run. Its output goes to `listener`; without one it is drained."""

    def __init__(self, loop: Loop, started: Started) -> None:
        self.pid = started.pid
        #: The control group with all that it has started; None: it has none of its own.
        self.group: Group | None = None
        #: It is process 1 in namespaces of its own.
        self.is_first = False
        self.listener: Stream | None = None
        #: Nobody wants to hear the rest of its output, although there is a listener.
        self.muted = False
        #: The end of its output.
        self.tail = Tail()
        #: As of `waitpid`, once it has ended.
        self.status: int | None = None
        self.timed_out = False
        #: Why it was killed, if that is known.
        self.reason: str | None = None
        self.started_at = time.time()
        #: Called when it has ended and its output is delivered, in place of a reply to `listener`.
        self.on_end: Callable[[], None] | None = None
        self.terminal = started.slave is not None
        self._slave = started.slave
        self._loop = loop
        self._outputs = [Output(fd, kind) for fd, kind in started.outputs]
        self._stdin: Sink | None = None
        # Of what is queued for its input: how much an earlier listener has sent.
        self._foreign = 0
        self._timer: Timer | None = None
        self._then: Callable[[], None] | None = None
        if started.stdin is not None:
            fd = started.stdin
            self._stdin = Sink(loop, fd, self._taken, lambda: os.close(fd))
        for output in self._outputs:
            self._watch(output)

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
        """Send a signal to its process group; SIGKILL is for all of its control group.

        Process 1 is sent it alone: what is to become of the others is its affair.
        """
        if self.status is None:
            if number == signal.SIGKILL and self.group is not None:
                self.group.kill()
            try:
                (os.kill if self.is_first else os.killpg)(self.pid, number)
            except ProcessLookupError:
                pass

    def exited(self, status: int) -> None:
        """It has ended. What it wrote before is delivered, then `listener` is told.

        A pipe that a child of it still holds open is drained from here on, unheard.
        """
        self.status = status
        self.lift_limit()
        if self._stdin is not None:
            self._stdin.close()
        if self._slave is not None:
            os.close(self._slave)
            self._slave = None
        self.settle(self.on_end or self.reply)

    def settle(self, then: Callable[[], None]) -> None:
        """Deliver what has been written until now, then call `then`; what comes later is dropped.

        That may be much, and go on for ever, where a child of it holds the pipe.
        """
        self._then = then
        for output in list(self._outputs):
            output.left = TERMINAL_BUFFER if self.terminal else _unread(output.fd)
            while output.left and self._move(output):
                pass
        self._check_settled()

    @property
    def settled(self) -> bool:
        """Whether it has ended, and nothing of its output is still to be delivered."""
        return self.status is not None and self._then is None

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
        why = {} if self.reason is None else {"reason": self.reason}
        if code < 0:
            return {"exit_code": 128 - code, "signal": -code, **why}
        return {"exit_code": code, **why}

    def reply(self) -> None:
        """Tell `listener` how it ended."""
        if self.listener is not None:
            self.listener.reply(**self.outcome())

    # Its output ---------------------------------------------------------------------------------

    def hear(self, listener: Stream) -> None:
        """Give `listener` what it writes from here on; also after it has settled."""
        self.listener = listener
        self.muted = False
        if self._stdin is not None:
            self._foreign = self._stdin.queued
        if self.status is None:
            for output in self._outputs:
                output.left = None
        self.resume()

    def leave(self, listener: Stream) -> None:
        """Nobody listens any more, if `listener` did: what it writes is drained."""
        if self.listener is listener:
            self.listener = None
            self.resume()

    def mute(self) -> None:
        """Drop what is still to come, although somebody waits for the end."""
        self.muted = True
        self.resume()

    def resume(self) -> None:
        """There is room again, or none is needed."""
        for output in list(self._outputs):
            if not output.watched:
                self._watch(output)
                if output.left:  # which may be too much for a terminal: it has nothing more
                    self._ready(output)

    def _watch(self, output: Output) -> None:
        output.watched = True
        self._loop.watch(output.fd, lambda: self._ready(output))

    def _unwatch(self, output: Output) -> None:
        if output.watched:
            output.watched = False
            self._loop.unwatch(output.fd)

    def _ready(self, output: Output) -> None:
        while self._move(output) and output.left:
            pass
        if output.left == 0:
            self._check_settled()

    def _move(self, output: Output) -> bool:
        """Read once, and pass on what is read; False if there was nothing, or no room for it."""
        left = output.left
        listener = None if left == 0 or self.muted else self.listener
        room = CHUNK if listener is None else listener.room
        if not room:
            assert listener is not None
            self._unwatch(output)
            listener.wait_for_room()
            return False
        try:
            data = os.read(output.fd, min(room, left) if left else room)
        except BlockingIOError:
            if left and self.terminal:
                output.left = 0
            return False
        except OSError:  # EIO: nobody has the terminal open any more
            data = b""
        if not data:
            self._unwatch(output)
            self._outputs.remove(output)
            os.close(output.fd)
            output.left = 0
            return False
        if left != 0:
            self.tail.add(output.kind, data)
        if left:
            output.left = left - len(data)
        if listener is not None:
            listener.send(output.kind, data)
        return True

    # Its input ----------------------------------------------------------------------------------

    def write(self, data: bytes) -> None:
        if self._stdin is None:
            self._taken(len(data))
        else:
            self._stdin.write(data)

    def end_input(self) -> None:
        """Close its stdin, after what is queued."""
        if self._stdin is not None:
            if self.terminal:
                self._stdin.write(END_OF_TRANSMISSION)
            self._stdin.end()

    def resize(self, rows: int, columns: int) -> None:
        if self.terminal and self._outputs:
            try:
                spawn.resize(self._outputs[0].fd, rows, columns)
            except OSError:  # nobody has it open any more
                pass

    def _taken(self, count: int) -> None:
        foreign = min(count, self._foreign)
        self._foreign -= foreign
        if self.listener is not None and count > foreign:
            self.listener.taken(count - foreign)


def _unread(fd: int) -> int:
    """How much can be read from a pipe; a child that still holds it may write for ever."""
    return int.from_bytes(fcntl.ioctl(fd, FIONREAD, bytes(4)), "little")
