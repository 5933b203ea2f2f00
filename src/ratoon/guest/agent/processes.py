"""What the host may do with processes, and all of those that it has started."""

from __future__ import annotations

from .process import Process, StartError
from .stream import Stream, operation

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .__main__ import Agent
    from .stream import Request


class Processes:
    """Those that run; the ones of an older session have no listener."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self.running: dict[int, Process] = {}

    def start(self, request: Request) -> Process:
        """Start what an `exec` asks for; raises StartError."""
        process = Process.start(
            self._agent,
            request["argv"],
            env=request.get("env") or {},
            cwd=request.get("cwd") or "/",
            with_stdin=bool(request.get("stdin")),
        )
        self._agent.identity.admit(process.pid)
        self.running[process.pid] = process
        self._agent.on_exit(process.pid, lambda status: self._exited(process, status))
        timeout = request.get("timeout")
        if timeout is not None:
            process.limit(timeout)
        return process

    def _exited(self, process: Process, status: int) -> None:
        del self.running[process.pid]
        process.exited(status)


@operation("exec")
class Exec(Stream):
    """Run a program until it ends. Where the session ends first, it goes on, unheard."""

    _process: Process | None = None

    def start(self, request: Request) -> None:
        try:
            self._process = self.agent.processes.start(request)
        except StartError as error:
            self.reply(exit_code=error.exit_code, reason=str(error))
            return
        self._process.listener = self

    def on_input(self, data: bytes) -> None:
        assert self._process is not None
        self._process.write(data)

    def on_input_end(self) -> None:
        assert self._process is not None
        self._process.end_input()

    def on_cancel(self) -> None:
        assert self._process is not None
        self._process.kill()

    def on_signal(self, number: int) -> None:
        assert self._process is not None
        self._process.kill(number)

    def on_room(self) -> None:
        assert self._process is not None
        self._process.resume()

    def on_end(self) -> None:
        process = self._process
        if process is None:
            return
        process.listener = None
        process.lift_limit()
        process.resume()
        process.end_input()
