"""Inside the warm interpreter: code is evaluated in one lasting namespace, as in a notebook.

It runs in the image's own Python, from 3.7 on. The agent hands its source to `python3 -c`, and a
socket. Messages there are JSON, one a line:

- to it: `code`, and `reseed` if this is the first since the machine was reborn;
- from it, when the code has ended: `result`, `reason`, `exit_code`, `truncated`.

SIGINT interrupts the code that runs, and nothing else. RESEED reseeds at once.
"""

from __future__ import annotations

import ast
import fcntl
import json
import linecache
import os
import signal
import sys
import traceback
from types import CodeType

TYPE_CHECKING = False
if TYPE_CHECKING:
    import asyncio
    from collections.abc import Coroutine
    from typing import Any

#: Characters of a result, and of an error, that are passed on.
TEXT_LIMIT = 256 * 1024
#: How many past pieces of code keep their lines, for tracebacks.
LINES_KEPT = 1000
#: Above what programs use, and out of the way of code that closes descriptors by number.
FIRST_DESCRIPTOR = 200
CHUNK = 64 * 1024
RESEED = signal.SIGRTMAX

AWAIT = getattr(ast, "PyCF_ALLOW_TOP_LEVEL_AWAIT", 0)  # from 3.8 on
CO_COROUTINE = 0x80


class Interpreter:
    def __init__(self, control: int) -> None:
        self._control = fcntl.fcntl(control, fcntl.F_DUPFD_CLOEXEC, FIRST_DESCRIPTOR)
        os.close(control)
        #: Copies of stdin, stdout and stderr, for when the code has closed them.
        self._spares = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, FIRST_DESCRIPTOR) for fd in range(3)]
        self._pid = os.getpid()
        self._namespace = sys.modules["__main__"].__dict__
        self._count = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        #: What SIGINT does while code runs; the code may set it.
        self._on_interrupt: Any = signal.default_int_handler
        signal.signal(signal.SIGINT, _ignore)
        signal.signal(RESEED, reseed)
        os.register_at_fork(after_in_child=self._leave_behind)
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]

    def serve(self) -> None:
        """Evaluate what comes until the agent closes the socket, or in a forked child only once."""
        while True:
            request = self._receive()
            if request is None:
                return
            self._restore_streams()
            if request["reseed"]:
                reseed()
            outcome = self._evaluate(request["code"])
            if os.getpid() != self._pid:  # the code has forked, and the child came back too
                if outcome["reason"]:
                    print(outcome["reason"], file=sys.stderr)
                raise SystemExit(outcome["exit_code"])
            self._send(outcome)

    # Evaluating ---------------------------------------------------------------------------------

    def _evaluate(self, code: str) -> dict[str, Any]:
        try:
            signal.signal(signal.SIGINT, self._on_interrupt)
            outcome = self._outcome(code)
            # None, if not from Python, and SIG_DFL would end all of this.
            self._on_interrupt = signal.signal(signal.SIGINT, _ignore) or signal.default_int_handler
        except BaseException as error:  # interrupted when the code had ended already
            signal.signal(signal.SIGINT, _ignore)
            outcome = _ended(None, type(error).__name__, 1)
        return outcome

    def _outcome(self, code: str) -> dict[str, Any]:
        try:
            value = self._run(code)
            return _ended(None if value is None else repr(value), None, 0)
        except SystemExit as end:
            return _exited(end.code)
        except BaseException as error:
            return _ended(None, _describe(error), 1)
        finally:
            _flush()

    def _run(self, code: str) -> object:
        """Execute `code`; the value of its last statement, where that is an expression."""
        self._count += 1
        name = f"<eval-{self._count}>"
        linecache.cache[name] = (len(code), None, code.splitlines(True), name)
        linecache.cache.pop(f"<eval-{self._count - LINES_KEPT}>", None)
        tree = compile(code, name, "exec", ast.PyCF_ONLY_AST | AWAIT, True)
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        parts = [compile(tree, name, "exec", AWAIT, True)]
        if last is not None:
            parts.append(compile(ast.Expression(last.value), name, "eval", AWAIT, True))
        if any(part.co_flags & CO_COROUTINE for part in parts):
            return self._await(self._execute_within_loop(parts))
        for part in parts:
            value = eval(part, self._namespace)
        return value

    async def _execute_within_loop(self, parts: list[CodeType]) -> object:
        for part in parts:
            value = eval(part, self._namespace)
            if part.co_flags & CO_COROUTINE:
                value = await value
        return value

    def _await(self, coroutine: Coroutine[Any, Any, object]) -> object:
        """Run code with an `await` at its top level, in one event loop for all such code."""
        import asyncio

        if self._loop is None or self._loop.is_closed():
            self._loop = asyncio.new_event_loop()
        task = self._loop.create_task(coroutine)
        try:
            return self._loop.run_until_complete(task)
        finally:
            if not task.done():  # interrupted
                task.cancel()
                self._loop.run_until_complete(asyncio.wait([task]))

    # The process --------------------------------------------------------------------------------

    def _restore_streams(self) -> None:
        """Open stdin, stdout and stderr again where code has closed them."""
        for fd, spare in enumerate(self._spares):
            try:
                os.fstat(fd)
            except OSError:
                os.dup2(spare, fd)
        for fd, name in ((1, "stdout"), (2, "stderr")):
            if _is_closed(getattr(sys, name, None)):
                again = os.fdopen(fd, "w", 1, "utf-8", "backslashreplace", closefd=False)
                setattr(sys, name, again)

    def _leave_behind(self) -> None:
        """A forked child has no business with the agent."""
        for fd in (self._control, *self._spares):
            try:
                os.close(fd)
            except OSError:
                pass

    def _receive(self) -> dict[str, Any] | None:
        """The next request; None: there is no agent any more."""
        line = b""
        while not line.endswith(b"\n"):
            piece = os.read(self._control, CHUNK)
            if not piece:
                return None
            line += piece
        request = json.loads(line)
        assert isinstance(request, dict)
        return request

    def _send(self, outcome: dict[str, Any]) -> None:
        line = json.dumps(outcome).encode() + b"\n"
        while line:
            line = line[os.write(self._control, line) :]


def main(program: int, control: int) -> None:
    os.close(program)
    sys.argv = [""]
    if not getattr(sys.flags, "safe_path", False):  # as PYTHONSAFEPATH has it, from 3.11 on
        sys.path.insert(0, "")
    Interpreter(control).serve()


def reseed(*_: object) -> None:
    """Make what is drawn from here on another than any other fork's, as far as Python knows it.

    `random` and numpy's old global generator seed themselves from the kernel's; OpenSSL reseeds
    itself from there, whatever it is given. Also a signal handler: it imports nothing.
    """
    for name in ("random", "numpy.random"):
        try:
            sys.modules[name].seed()
        except Exception:  # not loaded, half loaded, or not what it was
            pass
    try:
        sys.modules["_ssl"].RAND_add(os.urandom(32), 32.0)
    except Exception:
        pass


def _ignore(*_: object) -> None:
    """A handler, not SIG_IGN, which programs started meanwhile would inherit."""


def _ended(result: str | None, error: str | None, exit_code: int) -> dict[str, Any]:
    shown, reason = result, error
    if result is not None:
        shown = result[:TEXT_LIMIT]
    if error is not None:
        reason = error[-TEXT_LIMIT:]  # what went wrong stands at the end
    truncated = (shown, reason) != (result, error)
    return {"result": shown, "reason": reason, "exit_code": exit_code, "truncated": truncated}


def _exited(code: object) -> dict[str, Any]:
    """The code has called `sys.exit`: its end, but not the interpreter's."""
    exit_code = code & 0xFF if isinstance(code, int) else int(code is not None)
    return _ended(None, f"SystemExit: {code}" if exit_code else None, exit_code)


def _describe(error: BaseException) -> str:
    """The traceback, without the frames through which the code was called."""
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename == main.__code__.co_filename:
        trace = trace.tb_next
    own = trace
    while own is not None and not own.tb_frame.f_code.co_filename.startswith("<eval-"):
        own = own.tb_next
    return "".join(traceback.format_exception(type(error), error, own or trace))


def _is_closed(stream: Any) -> bool:
    if stream is None:
        return True
    try:
        return bool(stream.closed)
    except AttributeError:  # something of the code's own that can be written to
        return False
    except Exception:  # detached
        return True


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__):
        try:
            stream.flush()  # type: ignore[union-attr]
        except Exception:  # closed, or something else by now
            pass
