"""A running interpreter of the sandbox's own, as the agent sees it; see `interpreter.py`."""

from __future__ import annotations

import json
import os
import select
import signal
import socket

from ..shared import wire
from ..shared.outcome import read_outcome
from .spawn import StartError
from .stream import Refusal, Stream

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from .loop import Loop, Timer
    from .process import Process
    from .processes import Processes

with open(os.path.join(os.path.dirname(__file__), "interpreter.py"), "rb") as _file:
    PROGRAM = _file.read()
#: What `python3 -c` executes: the program in a pipe. It leaves no names in `__main__`, which is the
#: code's, and imports nothing that lies in the current directory.
BOOTSTRAP = """\
(lambda os, sys, names: (
    '' in sys.path and sys.path.remove(''),
    exec(compile(os.read({program}, {size}), '<ratoon>', 'exec'), names),
    names['main']({program}, {control}),
))(__import__('os'), __import__('sys'), {{'__name__': 'ratoon'}})
"""
#: Seconds from the interrupt of code whose time is over to that of its process group: `os.system`
#: is deaf while it waits for a child. And from there to the end of the interpreter.
PATIENCE = 5.0
GRACE = 5.0
#: As in `interpreter.py`.
RESEED = signal.SIGRTMAX
CHUNK = 64 * 1024


class Code(Stream):
    """What an interpreter is given, and who hears what comes of it."""

    code = ""

    def conclude(self, outcome: dict[str, Any]) -> None:
        """Reply with how it ended."""
        raise NotImplementedError

    def lift_limit(self) -> None:
        """It has ended: its time no longer matters."""
        raise NotImplementedError


class Python:
    """A running interpreter."""

    def __init__(self, loop: Loop, processes: Processes, on_idle: Callable[[], None]) -> None:
        """Start `python3`; Refusal of kind `no-python` where the sandbox has none."""
        #: What it evaluates, also once nobody listens to that.
        self.evaluation: Code | None = None
        #: Somebody was told that it has ended.
        self.mourned = False
        self._loop = loop
        self._on_idle = on_idle
        self._outcome: dict[str, Any] | None = None
        self._fault = ""
        self._said = b""
        self._unsent = b""
        self._timer: Timer | None = None
        control, theirs = socket.socketpair()
        with theirs:
            try:
                self.process = _start(processes, theirs.fileno())
            except BaseException:
                control.close()
                raise
        self.process.on_end = self._deliver
        self._control: socket.socket | None = control
        control.setblocking(False)
        loop.watch(control.fileno(), self._ready)

    @property
    def alive(self) -> bool:
        return self.process.status is None

    def evaluate(self, evaluation: Code, *, reseed: bool) -> None:
        """Give it code, while it has none."""
        self.evaluation = evaluation
        self.process.hear(evaluation)
        self._unsent = json.dumps({"code": evaluation.code, "reseed": reseed}).encode() + b"\n"
        self._watch(select.EPOLLIN | select.EPOLLOUT)

    def interrupt(self) -> None:
        """End the code that runs; where that does not help, the interpreter."""
        if self._timer is None and self._outcome is None:
            self.tell(signal.SIGINT)
            self._timer = self._loop.after(PATIENCE, self._interrupt_all)

    def _interrupt_all(self) -> None:
        self.process.kill(signal.SIGINT)
        fault = f"did not heed an interrupt for {PATIENCE + GRACE:g} s"
        self._timer = self._loop.after(GRACE, lambda: self._kill(fault))

    def tell(self, number: int) -> None:
        """Send a signal to the interpreter alone; its children are in its process group."""
        if self.alive:
            os.kill(self.process.pid, number)

    def loss(self) -> dict[str, Any]:
        """The outcome of an evaluation, once the interpreter has ended or been killed."""
        self.mourned = True
        ended = self.process.outcome()
        how = f"ended with exit code {ended['exit_code']}"
        if "signal" in ended:
            how = f"was killed by signal {ended['signal']}"
            if "reason" in ended:
                how = f"was killed: {ended['reason']}"
            if self._fault and ended["signal"] == signal.SIGKILL:
                how = f"{self._fault} and was killed"
        reason = f"the interpreter {how}: its state is lost, and the next evaluation starts anew"
        exit_code = ended["exit_code"] or 1
        return read_outcome({"reason": reason, "exit_code": exit_code, "state_lost": True})

    def _deliver(self) -> None:
        """What was written has been delivered: the evaluation is over, or the interpreter is."""
        self._lift_limits()
        if not self.alive:
            self._hang_up()
        evaluation, outcome = self.evaluation, self._outcome
        self.evaluation = self._outcome = self.process.listener = None
        if evaluation is not None and not evaluation.ended:
            evaluation.conclude(outcome or self.loss())
        self._on_idle()

    def _lift_limits(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self.evaluation is not None:
            self.evaluation.lift_limit()

    def _kill(self, fault: str) -> None:
        self._fault = fault
        self.process.kill()

    # The socket ---------------------------------------------------------------------------------

    def _watch(self, events: int) -> None:
        if self._control is not None:  # else it is about to end
            self._loop.unwatch(self._control.fileno())
            self._loop.watch(self._control.fileno(), self._ready, events)

    def _hang_up(self) -> None:
        if self._control is not None:
            self._loop.unwatch(self._control.fileno())
            self._control.close()
            self._control = None

    def _ready(self) -> None:
        assert self._control is not None
        try:
            if self._unsent:
                self._unsent = self._unsent[self._control.send(self._unsent) :]
                if not self._unsent:
                    self._watch(select.EPOLLIN)
            data = self._control.recv(CHUNK)
        except BlockingIOError:
            return
        except OSError:  # it has ended, or closed what it does not know, with code unread
            data = b""
        if not data:
            self._hang_up()
            fault = "closed its connection with the agent"
            self._loop.after(1, lambda: self._kill(fault))  # unless it ends by itself
            return
        self._said += data
        if not data.endswith(b"\n") and len(self._said) <= wire.MAX_MESSAGE:
            return
        try:
            if self.evaluation is None or self._outcome is not None:
                raise ValueError
            said = json.loads(self._said)
            self._outcome = {**read_outcome(said), "timed_out": False, "state_lost": False}
        except Exception:  # the code has found the socket
            self._kill("sent nonsense to the agent")
            self._hang_up()
            return
        self._said = b""
        self._lift_limits()
        self.process.settle(self._deliver)


def _start(processes: Processes, control: int) -> Process:
    program, write = os.pipe2(os.O_CLOEXEC)
    try:
        os.write(write, PROGRAM)
        fds = {"program": program, "size": len(PROGRAM), "control": control}
        for fd in (program, control):
            os.set_inheritable(fd, True)
        # Ignored until it can handle it: an interrupt may come while it starts.
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            return processes.start({"argv": ["python3", "-c", BOOTSTRAP.format(**fds)]})
        finally:
            signal.signal(signal.SIGINT, before)
    except StartError as error:
        why = f"the sandbox has no Python: {error}"
        if error.nowhere:
            user = processes.defaults.user or "root"
            way_out = "as root, make that directory, or let that user in"
            why = f"Python cannot be started as {user}: {error}; {way_out}"
        raise Refusal(why, "no-python") from None
    finally:
        for fd in (program, write):
            os.close(fd)
