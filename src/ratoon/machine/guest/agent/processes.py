"""What the host may do with processes, and all of those that it has started."""

from __future__ import annotations

import os

from . import spawn
from .defaults import Defaults
from .namespaces import CONTAINER, mount_proc
from .process import Process
from .spawn import StartError
from .stream import Refusal, Stream, operation
from .users import look_up

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Protocol

    from .groups import Groups
    from .loop import Loop
    from .namespaces import Namespaces
    from .stream import Request, Speaker
    from .victims import Victims

    class HasProcesses(Speaker, Protocol):
        """The agent, as the streams here see it."""

        processes: Processes


#: Processes in the background whose end is remembered.
REMEMBERED = 32
#: Characters of a command line that are listed.
LISTED = 1000
#: Seconds between looks at a command that is to end.
LEISURE = 0.05
#: What a program on a terminal is told that the terminal is, unless the request says it.
TERM = "xterm"
NOTHING: dict[str, str] = {}


class Command(Process):
    """A process that the host has asked for, and may find again by its pid.

    In the background it is nobody's but its own: whoever listens may leave. A process gets there
    if it is started so, or if who started it is gone.
    """

    def __init__(self, loop: Loop, started: spawn.Started, request: Request, user: str) -> None:
        super().__init__(loop, started)
        self.background = bool(request.get("background"))
        self._argv = request["argv"]
        self._user = user

    def describe(self) -> dict[str, Any]:
        argv, room = [], LISTED
        for word in self._argv:
            if room <= 0:
                break
            argv.append(word[:room])
            room -= len(word)
        return {
            "pid": self.pid,
            "argv": argv,
            "user": self._user,
            "started_at": self.started_at,
            "background": self.background,
            "terminal": self.terminal,
            "attached": self.listener is not None,
            "exit_code": None if self.status is None else self.outcome()["exit_code"],
        }


class Processes:
    """Those that run, and the last ones in the background that have ended."""

    def __init__(
        self,
        loop: Loop,
        groups: Groups,
        victims: Victims,
        namespaces: Namespaces,
        tell: Callable[[dict[str, Any]], None],
    ) -> None:
        """`tell` is called with how the main command is, whenever that has changed."""
        self._tell = tell
        self._loop = loop
        self._namespaces = namespaces
        self._victims = victims
        self._groups = groups
        self._commands: dict[int, Command] = {}
        #: What is not in a request.
        self.defaults = Defaults()
        #: The command that the sandbox was made for; its end is remembered, and its group kept.
        self.main: Command | None = None

    def start(self, request: Request) -> Process:
        """Start a program that the host will not find among its commands; raises StartError."""
        process = Process(self._loop, self._spawn(request))
        process.group = self._groups.admit(process.pid)
        self._loop.on_exit(process.pid, lambda status: self._exited(process, status))
        return process

    def run(self, request: Request) -> Command:
        """Start what an `exec` asks for; raises StartError, or Refusal."""
        timeout = None if request.get("timeout") is None else float(request["timeout"])
        user = request.get("user") or self.defaults.user or "root"
        if request.get("own_pids"):
            started = self._namespaces.begin(lambda: self._spawn(request, CONTAINER, mount_proc))
        else:
            started = self._namespaces.beside(lambda: self._spawn(request))
        command = Command(self._loop, started, request, user)
        command.is_first = bool(request.get("own_pids"))
        if not request.get("rehearsed"):  # else it is to run while the sandbox stands still
            command.group = self._groups.admit(command.pid)
        self._loop.on_exit(command.pid, lambda status: self._ended(command, status))
        self._commands[command.pid] = command
        if request.get("main"):
            self._make_main(command)
        if timeout is not None:
            command.limit(timeout)
        return command

    def _make_main(self, command: Command) -> None:
        def end() -> None:
            command.reply()
            self.tell()

        command.on_end = end
        self._replace_main(command)
        self.tell()

    def _replace_main(self, command: Command | None) -> None:
        before, self.main = self.main, command
        if before is not None and before.status is not None and before.group is not None:
            self._groups.give_back(before.group)

    def tell(self) -> None:
        """How the main command is, if there is one: it has ended once its output is delivered."""
        if self.main is not None:
            how = self.main.outcome() if self.main.settled else {}
            self._tell({"pid": self.main.pid, **how})

    def reborn(self, resumed: bool) -> None:
        """Another sandbox than before has the main command of its source only if that runs."""
        if not resumed and self.main is not None and self.main.status is not None:
            self._replace_main(None)
        self.tell()

    def _spawn(
        self,
        request: Request,
        unless_said: dict[str, str] = NOTHING,
        first: Callable[[], None] | None = None,
    ) -> spawn.Started:
        size = request.get("terminal")
        name = request.get("user") or self.defaults.user
        user = look_up(name) if name else None
        env = {**unless_said, **(user.environment if user else {})}
        if size:
            env["TERM"] = TERM
        env.update(self.defaults.env)
        env.update(request.get("env") or {})
        return spawn.start(
            request["argv"],
            env=env,
            cwd=request.get("cwd") or self.defaults.cwd,
            user=user,
            with_stdin=bool(request.get("stdin")),
            terminal=(int(size[0]), int(size[1])) if size else None,
            first=first,
        )

    def _ended(self, command: Command, status: int) -> None:
        self._exited(command, status)
        self.tidy(command)

    def _exited(self, process: Process, status: int) -> None:
        if process.group is not None and process is not self.main:
            self._groups.give_back(process.group)
        if process.is_first:
            self._namespaces.end()
        process.reason = self._victims.reason(process, status)
        process.exited(status)

    def find(self, pid: int) -> Command:
        try:
            return self._commands[pid]
        except KeyError:
            raise Refusal(f"no process {pid} was started here", "no-process") from None

    def tidy(self, command: Command) -> None:
        """Forget it if nobody can want it any more, and the oldest of too many that have ended."""
        if command.settled and not command.background:
            if self._commands.get(command.pid) is command:
                del self._commands[command.pid]
            return
        ended = [c for c in self._commands.values() if c.settled and c.listener is None]
        for old in ended[:-REMEMBERED]:
            if old is not self.main:
                del self._commands[old.pid]

    def describe(self) -> list[dict[str, Any]]:
        return [command.describe() for command in self._commands.values()]


class _Listener(Stream):
    """Hears a command, and has its input. It is there from `start` on, if that did not refuse."""

    agent: HasProcesses
    command: Command | None = None

    def listen(self, command: Command) -> None:
        self.command = command
        command.hear(self)

    def on_input(self, data: bytes) -> None:
        if self.command is not None:
            self.command.write(data)

    def on_input_end(self) -> None:
        if self.command is not None:
            self.command.end_input()

    def on_resize(self, rows: int, columns: int) -> None:
        if self.command is not None:
            self.command.resize(rows, columns)

    def on_signal(self, number: int) -> None:
        if self.command is not None:
            self.command.kill(number)

    def on_room(self) -> None:
        if self.command is not None:
            self.command.resume()

    def on_cancel(self) -> None:
        """Whoever started a program in the foreground has no use for it alone."""
        if self.command is None or self.command.background:
            self.reply(left=True)
        else:
            self.command.mute()
            self.command.kill()

    def on_end(self) -> None:
        command = self.command
        if command is None or command.listener is not self:
            return
        if not command.settled and not command.background:  # a new session has begun
            command.background = True
            command.lift_limit()
        command.leave(self)
        self.agent.processes.tidy(command)


@operation("exec")
class Exec(_Listener):
    """Run a program until it ends; in the foreground, it is killed if it is cancelled."""

    def start(self, request: Request) -> None:
        try:
            command = self.agent.processes.run(request)
        except StartError as error:
            self.reply(exit_code=error.exit_code, reason=str(error))
            return
        if request.get("announce"):
            self.started(pid=command.pid)
        self.listen(command)


@operation("attach")
class Attach(_Listener):
    """Hear the end of what a command has written, then go on as its listener.

    Whoever listened is turned away: a connection that has died may not know it yet.
    """

    def start(self, request: Request) -> None:
        command = self.agent.processes.find(request["pid"])
        if command.listener is not None:
            command.background = True
            command.listener.refuse(f"somebody else has attached to process {command.pid}", "taken")
        self.started(**command.describe())
        for kind, data in command.tail:
            self.send(kind, data)
        if command.settled:
            self.reply(**command.outcome())
        else:
            self.listen(command)


@operation("processes")
class List(Stream):
    agent: HasProcesses

    def start(self, request: Request) -> None:
        self.reply(processes=self.agent.processes.describe())


@operation("signal")
class Signal(Stream):
    """Send a signal to a command's process group."""

    agent: HasProcesses

    def start(self, request: Request) -> None:
        command = self.agent.processes.find(request["pid"])
        if command.status is not None:
            raise Refusal(f"process {command.pid} has ended", "ended")
        command.kill(request["signal"])
        self.reply()


@operation("stop")
class Stop(Stream):
    """Have the main command end, as its signal asks it to; then what it has left behind.

    The reply comes once nothing of it is left and its output is delivered, or `seconds` are over.
    """

    agent: HasProcesses

    def start(self, request: Request) -> None:
        main = self.agent.processes.main
        if main is None:
            self.reply()
            return
        self._number = int(request["signal"])
        self._asked = False
        if main.status is None:
            os.kill(main.pid, self._number)
        self.agent.after(float(request["seconds"]), lambda: self._give_up(main))
        self._look(main)

    def _look(self, main: Command) -> None:
        """Again and again, until there is nothing to be waited for any more."""
        if self.ended:
            return
        if main.status is not None:
            left = None if main.group is None or main.group.is_gone() else main.group
            if left is None and main.settled:
                self.reply()
                return
            if left is not None and not self._asked:
                left.signal(self._number)
                self._asked = True
        self.agent.after(LEISURE, lambda: self._look(main))

    def _give_up(self, main: Command) -> None:
        if not self.ended and main.status is not None:
            main.mute()  # it has ended, and whoever listens does not take what it wrote
        self.reply()


@operation("defaults")
class ChangeDefaults(Stream):
    """For all that is started from here on; the directory is made if need be."""

    agent: HasProcesses

    def start(self, request: Request) -> None:
        before = self.agent.processes.defaults
        defaults = before.changed(request["env"], request["user"], request["cwd"])
        if defaults.user is not None:
            look_up(defaults.user)
        try:
            os.makedirs(defaults.cwd, exist_ok=True)
        except OSError as error:
            reason = f"the directory {defaults.cwd} cannot be made: {error.strerror}"
            raise Refusal(reason, "no-directory") from None
        self.agent.processes.defaults = defaults
        self.reply()
