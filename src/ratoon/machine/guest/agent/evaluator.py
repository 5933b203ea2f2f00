"""The warm interpreter: a Python of the sandbox's own that keeps its state from call to call.

It is given one piece of code at a time.
"""

from __future__ import annotations

import os
from collections import deque

from .process import TIMED_OUT
from .python import RESEED, Code, Python
from .stream import Refusal, operation

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Protocol

    from .loop import Loop, Timer
    from .processes import Processes
    from .stream import Request, Speaker

    class HasEvaluator(Speaker, Protocol):
        """The agent, as an evaluation sees it."""

        evaluator: Evaluator


#: More than /proc/PID/status has.
STATUS_BYTES = 16 * 1024


class Evaluator:
    """Lets one evaluation after the other have the interpreter, in the order they were asked for.

    Made before the agent enters the sandbox's root.
    """

    def __init__(self, loop: Loop, processes: Processes) -> None:
        self._loop = loop
        self._processes = processes
        self._python: Python | None = None
        self._waiting: deque[Evaluation] = deque()
        #: The machine was reborn, and the interpreter has not been told.
        self._reseed = False
        self._proc = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    @property
    def pid(self) -> int:
        """Of the interpreter; 0: there is none."""
        return self._python.process.pid if self._python else 0

    def submit(self, evaluation: Evaluation) -> None:
        self._waiting.append(evaluation)
        self._next()

    def stop(self, evaluation: Evaluation) -> bool:
        """Interrupt it; False if it has not begun."""
        if self._python is None or self._python.evaluation is not evaluation:
            return False
        self._python.interrupt()
        return True

    def resume(self) -> None:
        """There is room for output again."""
        if self._python is not None:
            self._python.process.resume()

    def leave(self, evaluation: Evaluation) -> None:
        """Nobody listens to it any more. If it runs, it goes on."""
        if evaluation in self._waiting:
            self._waiting.remove(evaluation)
        elif self._python is not None:
            self._python.process.leave(evaluation)

    def _next(self) -> None:
        while self._waiting and (self._python is None or self._python.evaluation is None):
            evaluation = self._waiting.popleft()
            if self._python is not None and not self._python.alive:
                lost, self._python = self._python, None
                if not lost.mourned:
                    evaluation.conclude(lost.loss())
                    continue
            try:
                if self._python is None:
                    self._python = Python(self._loop, self._processes, self._next)
                    self._reseed = False
                self._python.evaluate(evaluation, reseed=self._reseed)
                self._reseed = False
            except Exception as error:
                evaluation.fail(error)

    # Rebirth ------------------------------------------------------------------------------------

    def look(self) -> tuple[bool, bool]:
        """Whether the interpreter has several threads, and whether it has a handler for RESEED."""
        if self._python is None or not self._python.alive:
            return False, False
        try:
            fd = os.open(f"{self._python.process.pid}/status", os.O_RDONLY, dir_fd=self._proc)
        except OSError:  # it has ended just now
            return False, False
        try:
            lines = os.read(fd, STATUS_BYTES).splitlines()
        finally:
            os.close(fd)
        fields = dict(line.split(b":\t", 1) for line in lines if b":\t" in line)
        several = int(fields[b"Threads"]) > 1
        return several, bool(int(fields[b"SigCgt"], 16) >> (RESEED - 1) & 1)

    def reborn(self, several_threads: bool, handles_signal: bool) -> None:
        """Have the interpreter reseed: by the signal if code may run in it, else when code comes.

        What `look` has found is passed in: a fork has no time for it.
        """
        if self._python is None:
            return
        told = handles_signal and (several_threads or self._python.evaluation is not None)
        if told:
            self._python.tell(RESEED)
        self._reseed = not told


@operation("eval")
class Evaluation(Code):
    """Evaluate code in the interpreter, which is started where there is none."""

    agent: HasEvaluator
    _seconds: float | None = None
    _overdue = False
    _timer: Timer | None = None

    def start(self, request: Request) -> None:
        self.code = request["code"]
        if not isinstance(self.code, str):
            raise Refusal("the code must be text", "invalid")
        self._seconds = request.get("timeout")
        if self._seconds is not None:
            self._timer = self.agent.after(self._seconds, self._expire)
        self.agent.evaluator.submit(self)

    def _expire(self) -> None:
        if self.agent.evaluator.stop(self):
            self._overdue = True
            return
        pid = self.agent.evaluator.pid
        reason = f"timed out after {self._seconds:g} s without having begun: an earlier evaluation "
        reason += f"goes on, which `kill -INT {pid}` in the sandbox interrupts"
        self.reply(result=None, reason=reason, exit_code=TIMED_OUT, timed_out=True)

    def conclude(self, outcome: dict[str, Any]) -> None:
        if self._overdue:
            reason, late = outcome["reason"] or "", f"timed out after {self._seconds:g} s"
            if outcome["state_lost"]:
                reason = f"{late}: {reason}"
            else:
                reason += f"{late} and was interrupted; the interpreter's state is kept"
            outcome = {**outcome, "reason": reason, "exit_code": TIMED_OUT, "timed_out": True}
        self.reply(**outcome)

    def lift_limit(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def on_cancel(self) -> None:
        self.agent.evaluator.stop(self)
        super().on_cancel()

    def on_room(self) -> None:
        self.agent.evaluator.resume()

    def on_end(self) -> None:
        self.lift_limit()
        self.agent.evaluator.leave(self)
