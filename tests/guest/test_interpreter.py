"""What the warm interpreter does with code, of whatever kind: its program, run on the host."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
from agent_on_host import wait_for

from ratoon.machine.guest.agent import interpreter
from ratoon.machine.guest.agent.python import BOOTSTRAP, PROGRAM, RESEED


class Interpreter:
    """The program as the agent starts it, with files in place of its pipes for output."""

    def __init__(self) -> None:
        self.socket, theirs = socket.socketpair()
        program, write = os.pipe()
        os.write(write, PROGRAM)
        self.outputs = [os.memfd_create(name) for name in ("stdout", "stderr")]
        self._read = [0, 0]
        fds = {"program": program, "size": len(PROGRAM), "control": theirs.fileno()}
        self.process = subprocess.Popen(
            [sys.executable, "-c", BOOTSTRAP.format(**fds)],
            stdin=subprocess.DEVNULL,
            stdout=self.outputs[0],
            stderr=self.outputs[1],
            pass_fds=(program, theirs.fileno()),
            start_new_session=True,
        )
        for fd in (program, write):
            os.close(fd)
        theirs.close()
        self.socket.settimeout(60)
        self._lines = self.socket.makefile()

    def send(self, code: str, *, reseed: bool = False) -> None:
        self.socket.sendall(json.dumps({"code": code, "reseed": reseed}).encode() + b"\n")

    def outcome(self) -> dict[str, Any]:
        line = self._lines.readline()
        assert line, "the interpreter is gone"
        outcome = json.loads(line)
        assert isinstance(outcome, dict)
        return outcome

    def evaluate(self, code: str, **options: bool) -> dict[str, Any]:
        self.send(code, **options)
        return self.outcome()

    def result(self, code: str, **options: bool) -> str | None:
        """Of code that must succeed."""
        outcome = self.evaluate(code, **options)
        assert (outcome["reason"], outcome["exit_code"]) == (None, 0)
        result = outcome["result"]
        assert result is None or isinstance(result, str)
        return result

    def error(self, code: str) -> str:
        """Of code that must fail."""
        outcome = self.evaluate(code)
        assert (outcome["result"], outcome["exit_code"]) == (None, 1)
        error = outcome["reason"]
        assert isinstance(error, str)
        return error

    def output(self, number: int = 0) -> str:
        """What has been written to stdout (0) or stderr (1) since this was asked last."""
        data = os.pread(self.outputs[number], 1 << 30, self._read[number])
        self._read[number] += len(data)
        return data.decode()

    def close(self) -> None:
        self._lines.close()
        self.socket.close()
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for fd in self.outputs:
            os.close(fd)


@pytest.fixture
def python() -> Iterator[Interpreter]:
    running = Interpreter()
    try:
        yield running
    finally:
        running.close()


def test_the_value_of_the_last_statement_if_it_is_an_expression(python: Interpreter) -> None:
    assert python.result("") is None
    assert python.result("x = 6") is None
    assert python.result("y = 7\nx * y") == "42"
    assert python.result("None") is None
    assert python.result("'a' 'b'") == "'ab'"
    assert python.result("for x in range(3): x") is None
    assert python.result("def double(x):\n    return 2 * x\n\ndouble(x)") == "4"
    assert python.result("print(x); x") == "2"
    assert python.output() == "2\n"


def test_state_is_kept(python: Interpreter) -> None:
    python.result("import math\ndef area(r): return math.pi * r * r\nhistory = []")
    python.error("history.append(1); 1 / 0")
    assert python.result("history.append(int(area(2))); history") == "[1, 12]"


def test_the_namespace_is_that_of_main_and_has_nothing_else_in_it(python: Interpreter) -> None:
    own = "__annotations__ __builtins__ __doc__ __loader__ __name__ __package__ __spec__"
    assert python.result("' '.join(sorted(globals()))") == f"'{own}'"
    assert python.result("__name__") == "'__main__'"
    assert python.result("import sys; sys.argv, sys.path[0]") == "([''], '')"
    python.result("import pickle\nclass Point:\n    def __eq__(self, other): return True")
    assert python.result("pickle.loads(pickle.dumps(Point())) == Point()") == "True"


def test_a_traceback_has_the_lines_of_the_code_and_no_others(python: Interpreter) -> None:
    python.result("def fail(x):\n    return x / 0")
    error = python.error("try:\n    fail(1)\nexcept ZeroDivisionError:\n    int('one')")
    frames = [line.strip() for line in error.splitlines() if "File" in line]
    assert frames == [
        'File "<eval-2>", line 2, in <module>',
        'File "<eval-1>", line 2, in fail',
        'File "<eval-2>", line 4, in <module>',
    ]
    assert "    return x / 0\n" in error
    assert error.endswith("ValueError: invalid literal for int() with base 10: 'one'\n")


def test_code_that_cannot_be_compiled(python: Interpreter) -> None:
    error = python.error("x = = 1")
    assert error.startswith('  File "<eval-1>", line 1\n    x = = 1\n')
    assert error.endswith("SyntaxError: invalid syntax\n")
    assert "SyntaxError" in python.error("a\0b") or "ValueError" in python.error("a\0b")
    assert "UnicodeEncodeError" in python.error("'\ud800'")
    assert python.result("1") == "1"


def test_a_traceback_of_code_that_is_not_the_caller_s(python: Interpreter) -> None:
    error = python.error("class Shy:\n    def __repr__(self): raise OSError('no')\nShy()")
    assert 'File "<eval-1>", line 2, in __repr__' in error
    assert "<ratoon>" not in error
    assert "<ratoon>" not in python.error("import json; json.loads('{')")
    assert "asyncio" not in python.error("import asyncio\nawait asyncio.sleep(0)\n1 / 0")


@pytest.mark.parametrize(
    ("code", "exit_code", "error"),
    [
        ("exit", 0, None),
        ("exit()", 0, None),
        ("import sys; sys.exit(0)", 0, None),
        ("import sys; sys.exit(3)", 3, "SystemExit: 3"),
        ("import sys; sys.exit('so long')", 1, "SystemExit: so long"),
        ("raise SystemExit(-1)", 255, "SystemExit: -1"),
    ],
)
def test_sys_exit_ends_the_code_and_not_the_interpreter(
    python: Interpreter, code: str, exit_code: int, error: str | None
) -> None:
    outcome = python.evaluate(code)
    assert (outcome["exit_code"], outcome["reason"]) == (exit_code, error)
    assert python.result("1") == "1"


def test_output_is_there_when_the_code_has_ended(python: Interpreter) -> None:
    python.result("import sys; print('a', end=''); sys.stderr.write('b')")
    assert (python.output(0), python.output(1)) == ("a", "b")


def test_lines_are_there_at_once(python: Interpreter) -> None:
    python.send("import time; print('now'); print('later', end=''); time.sleep(60)")
    wait_for(lambda: bool(python.output()))


@pytest.mark.parametrize(
    "code",
    [
        "import sys; sys.stdout.close(); sys.stderr.close(); sys.stdin.close()",
        "import os; os.close(0); os.close(1); os.close(2)",
        "import os; os.closerange(0, 200)",
        "import sys; sys.stdout = sys.stderr = None",
        "import sys; del sys.stdout, sys.stderr, sys.stdin",
        "import sys; sys.stdout.detach(); sys.stdout = sys.__stdout__ = None; sys.stderr.detach()",
    ],
)
def test_closed_streams_are_opened_again(python: Interpreter, code: str) -> None:
    python.evaluate(code)
    python.result("import sys, os; print('out'); print('err', file=sys.stderr)")
    assert (python.output(0), python.output(1)) == ("out\n", "err\n")
    assert python.result("os.read(0, 1)") == "b''"


def test_a_stream_that_was_put_in_place_stays(python: Interpreter) -> None:
    python.result("import io, sys; sys.stdout = mine = io.StringIO(); print('one')")
    assert python.result("print('two'); mine.getvalue()") == r"'one\ntwo\n'"
    assert python.output() == ""


def test_there_is_no_input(python: Interpreter) -> None:
    assert python.result("import sys; sys.stdin.read()") == "''"
    assert "EOFError" in python.error("input()")


def test_a_result_and_an_error_are_cut(python: Interpreter) -> None:
    outcome = python.evaluate("'x' * 1000000")
    assert (len(outcome["result"]), outcome["truncated"]) == (interpreter.TEXT_LIMIT, True)
    outcome = python.evaluate("raise ValueError('x' * 1000000 + 'the end')")
    assert (len(outcome["reason"]), outcome["truncated"]) == (interpreter.TEXT_LIMIT, True)
    assert outcome["reason"].endswith("the end\n")
    assert not python.evaluate("'x' * 1000")["truncated"]


@pytest.mark.parametrize(
    "code",
    [
        "def f(): return f()\nf()",
        "class Bad(Exception):\n    def __str__(self): raise self\nraise Bad",
        "class Text(str):\n    def __getitem__(self, key): raise OSError\n"
        "class Odd:\n    def __repr__(self): return Text('odd')\nOdd()",
        "raise BaseException",
        "raise KeyboardInterrupt",
        "raise GeneratorExit",
        "import asyncio; raise asyncio.CancelledError",
        "x = ()\nfor _ in range(100000): x = (x,)\nx",
        "e = None\nfor _ in range(5000):\n    n = ValueError(); n.__cause__ = e; e = n\nraise e",
    ],
)
def test_no_exception_ends_it(python: Interpreter, code: str) -> None:
    python.result("kept = 1")
    assert python.error(code)
    assert python.result("kept") == "1"


def test_await_at_the_top_level_in_one_event_loop(python: Interpreter) -> None:
    python.result("import asyncio; queue = asyncio.Queue()")
    python.result("task = asyncio.ensure_future(queue.get()) if await asyncio.sleep(0) else None")
    python.result(
        "async def later(): await queue.put(5)\ntask = asyncio.create_task(later())\nawait task"
    )
    assert python.result("await queue.get()") == "5"
    assert python.result("asyncio.run(asyncio.sleep(0, 6))") == "6"
    assert python.result("await asyncio.sleep(0, 7)") == "7"


# Interrupts -----------------------------------------------------------------------------------


def interrupt(python: Interpreter, code: str) -> dict[str, Any]:
    """Interrupt `code` once it has said so by a line."""
    python.output()
    python.send(f"print('running')\n{code}")
    wait_for(lambda: "running" in python.output())
    os.kill(python.process.pid, signal.SIGINT)
    return python.outcome()


@pytest.mark.parametrize(
    "code",
    [
        "while True: pass",
        "import time; time.sleep(60)",
        "import threading; threading.Event().wait()",
        "import os; r, w = os.pipe(); os.read(r, 1)",
        "import asyncio; await asyncio.sleep(60)",
        "import asyncio; asyncio.run(asyncio.sleep(60))",
        "import subprocess; subprocess.run(['sleep', '60'])",
        "class Slow:\n    def __repr__(self):\n        while True: pass\nSlow()",
    ],
)
def test_an_interrupt_ends_the_code_and_keeps_the_state(python: Interpreter, code: str) -> None:
    python.result("kept = 1")
    outcome = interrupt(python, code)
    assert outcome["exit_code"] == 1
    assert "KeyboardInterrupt" in outcome["reason"]
    assert python.result("kept") == "1"


def test_code_may_take_care_of_an_interrupt(python: Interpreter) -> None:
    code = "print('running')\n    time.sleep(60)\nexcept KeyboardInterrupt: pass\n'saved'"
    python.send(f"import time\ntry:\n    {code}")
    wait_for(lambda: "running" in python.output())
    os.kill(python.process.pid, signal.SIGINT)
    assert python.outcome()["result"] == "'saved'"
    python.result("import signal; seen = []")
    python.result("signal.signal(signal.SIGINT, lambda *_: seen.append(1))")
    assert interrupt(python, "while not seen: pass\nseen")["result"] == "[1]"


def test_an_interrupt_with_nothing_to_interrupt(python: Interpreter) -> None:
    python.result("kept = 1")
    for _ in range(20):
        os.kill(python.process.pid, signal.SIGINT)
    assert python.result("kept") == "1"


def test_interrupts_at_any_moment_lose_no_outcome(python: Interpreter) -> None:
    python.result("")
    for _ in range(300):
        python.send("x = [n for n in range(100)]")
        os.kill(python.process.pid, signal.SIGINT)
        assert python.outcome()["exit_code"] in (0, 1)
    assert python.result("1") == "1"


# Processes and threads ------------------------------------------------------------------------


def test_a_forked_child_that_comes_back_ends_there(python: Interpreter) -> None:
    code = "import os, atexit\natexit.register(print, 'bye')\npid = os.fork()\n"
    python.result(f"{code}print('here' if pid else 'there')\nif pid: os.waitpid(pid, 0)")
    assert sorted(python.output().split()) == ["bye", "here", "there"]
    status = "os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])"
    assert python.result(f"pid = os.fork()\nif not pid: 1 / 0\n{status}") == "1"
    assert "ZeroDivisionError" in python.output(1)
    assert python.result(f"pid = os.fork()\nif not pid: raise SystemExit(7)\n{status}") == "7"
    assert python.result("pid > 0") == "True"


def test_children_have_no_descriptors_of_the_interpreter_s_own(python: Interpreter) -> None:
    listing = "import os; print([fd for fd in os.listdir('/proc/self/fd') if len(fd) > 2])"
    python.result(f"import subprocess, sys; listing = {listing!r}\nexec(listing)")
    assert python.output() != "[]\n"
    python.result("subprocess.run([sys.executable, '-c', listing], close_fds=False, check=True)")
    python.result("pid = os.fork()\nif pid: os.waitpid(pid, 0)\nelse: exec(listing)")
    assert python.output() == "[]\n[]\n"


def test_processes_of_multiprocessing(python: Interpreter) -> None:
    code = """
import multiprocessing
def double(x): return 2 * x
with multiprocessing.get_context('fork').Pool(2) as pool: doubles = pool.map(double, range(4))
doubles
"""
    assert python.result(code) == "[0, 2, 4, 6]"


def test_threads_go_on_between_calls(python: Interpreter) -> None:
    python.result("import threading, time\nstop = False; count = 0")
    python.result(
        "def work():\n    global count\n    while not stop: count += 1; time.sleep(0.001)"
    )
    python.result("thread = threading.Thread(target=work); thread.start()")
    python.result("before = count")
    python.result("while count < before + 5: time.sleep(0.001)")
    python.result("stop = True; thread.join()")


def test_it_ends_with_the_agent(python: Interpreter) -> None:
    python.result("1")
    python.socket.shutdown(socket.SHUT_WR)
    assert python.process.wait(30) == 0


def test_modules_in_the_current_directory_are_the_code_s(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "json.py").write_text("raise OSError('the wrong one')")
    (tmp_path / "mine.py").write_text("x = 5")
    monkeypatch.chdir(tmp_path)
    python = Interpreter()
    try:
        assert python.result("import mine; mine.x") == "5"
    finally:
        python.close()


def test_an_image_may_want_no_modules_of_the_current_directory(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.py").write_text("x = 5")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONSAFEPATH", "1")
    python = Interpreter()
    try:
        assert "No module named 'mine'" in python.evaluate("import mine")["reason"]
        assert python.result("6 * 7") == "42"
    finally:
        python.close()


# Randomness -----------------------------------------------------------------------------------

SEEDED = """
import random, numpy.random
random.seed(1); numpy.random.seed(1)
def draw(): return random.random(), random.gauss(0, 1), float(numpy.random.rand())
draw()
"""


def test_generators_are_reseeded(python: Interpreter) -> None:
    assert RESEED == interpreter.RESEED
    python.result(SEEDED)
    expected = python.result("draw()")
    python.result(SEEDED)
    drawn = {expected, python.result("draw()", reseed=True)}
    python.result(SEEDED)
    os.kill(python.process.pid, RESEED)
    drawn.add(python.result("draw()"))
    assert len(drawn) == 3
    each = [eval(text or "") for text in drawn]
    assert all(len(set(kind)) == 3 for kind in zip(*each, strict=True))


def test_code_that_runs_is_reseeded_too(python: Interpreter) -> None:
    python.result(SEEDED)
    python.send(
        "state = random.getstate()\nprint('seeded')\nwhile random.getstate() == state: pass"
    )
    wait_for(lambda: "seeded" in python.output())
    os.kill(python.process.pid, RESEED)
    assert python.outcome()["reason"] is None


def test_openssl_is_told_to_reseed(python: Interpreter) -> None:
    python.result("import ssl, _ssl; told = []; _ssl.RAND_add = lambda *seed: told.append(seed)")
    python.result("", reseed=True)
    os.kill(python.process.pid, RESEED)
    assert python.result("[(len(set(data)) > 20, bits) for data, bits in told]") == str(
        [(True, 32.0), (True, 32.0)]
    )


def test_what_cannot_be_reseeded_is_left_alone(python: Interpreter) -> None:
    python.result("import sys; sys.modules['random'] = None; sys.modules['numpy.random'] = 5")
    python.result("import types; sys.modules['_ssl'] = types.ModuleType('half')")
    assert python.result("1", reseed=True) == "1"
