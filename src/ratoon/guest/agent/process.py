"""One process of the sandbox, in a session and process group of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections import deque

from . import wire

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

TIMED_OUT, NOT_EXECUTABLE, NOT_FOUND = 124, 126, 127
ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "LANG": "C.UTF-8",
}


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


class Process:
    def __init__(self, pid: int, stdin: int | None, outputs: dict[int, int]) -> None:
        self.pid = pid
        self.stdin = stdin
        #: Descriptor of each output pipe still open, and the kind of frame it feeds.
        self.outputs = outputs
        self.stream = 0
        self.detached = False
        self.deadline: float | None = None
        self.on_output: Callable[[int, bytes], None] = _unheard
        self.on_stdin_taken: Callable[[int], None] = lambda count: None
        self.on_stdin_blocked: Callable[[Process], None] = lambda process: None
        self._timed_out = False
        self._stdin_queue: deque[bytes] = deque()
        self._stdin_ended = False

    @classmethod
    def start(
        cls,
        argv: list[str],
        *,
        env: dict[str, str],
        cwd: str,
        with_stdin: bool,
        timeout: float | None,
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
        started.returncode = 0  # it is the agent that waits for it, as for all children
        for fd in ours:
            os.set_blocking(fd, False)
        outputs = {ours[0]: wire.STDOUT, ours[1]: wire.STDERR}
        process = cls(started.pid, ours[2] if with_stdin else None, outputs)
        if timeout is not None:
            process.deadline = time.monotonic() + timeout
        return process

    def detach(self) -> None:
        """Nobody listens any more: the process goes on, its output is drained."""
        self.detached = True
        self.deadline = None
        self.on_output = _unheard
        self.on_stdin_taken = lambda count: None
        self.end_stdin()

    def expire(self) -> None:
        """Its time is over: kill it, and say so in the outcome."""
        self._timed_out = True
        self.deadline = None
        self.kill()

    def kill(self) -> None:
        """Kill its process group."""
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass

    def outcome(self, status: int) -> dict[str, Any]:
        """The fields of the final reply, from `waitpid`'s status."""
        if self._timed_out:
            return {"exit_code": TIMED_OUT, "timed_out": True}
        code = os.waitstatus_to_exitcode(status)
        if code < 0:
            return {"exit_code": 128 - code, "signal": -code}
        return {"exit_code": code}

    def write_stdin(self, data: bytes) -> None:
        if self.stdin is None or self._stdin_ended:
            self.on_stdin_taken(len(data))
            return
        self._stdin_queue.append(data)
        if len(self._stdin_queue) == 1:  # else the pipe is full, and being waited for
            self.pump_stdin()

    def end_stdin(self) -> None:
        self._stdin_ended = True
        if self.stdin is not None and not self._stdin_queue:
            self.close_stdin()

    def pump_stdin(self) -> None:
        """Write what the pipe takes; asks to be called again when it is full."""
        while self.stdin is not None and self._stdin_queue:
            data = self._stdin_queue.popleft()
            try:
                written = os.write(self.stdin, data)
            except BlockingIOError:
                self._stdin_queue.appendleft(data)
                self.on_stdin_blocked(self)
                return
            except BrokenPipeError:
                self.close_stdin()
                self.on_stdin_taken(len(data))
                return
            if written < len(data):
                self._stdin_queue.appendleft(data[written:])
            self.on_stdin_taken(written)
        if self._stdin_ended:
            self.close_stdin()

    def close_stdin(self) -> None:
        if self.stdin is not None:
            os.close(self.stdin)
            self.stdin = None
        if self._stdin_queue:
            self.on_stdin_taken(sum(map(len, self._stdin_queue)))
            self._stdin_queue.clear()


def _unheard(kind: int, data: bytes) -> None:
    pass
