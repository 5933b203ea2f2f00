"""Evaluations, from the request to the reply: the agent and an interpreter, run on the host."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from agent_on_host import AgentOnHost, agent_on_host, is_alive, wait_for

from ratoon.machine.guest.agent.stream import CHUNK
from ratoon.machine.guest.shared import wire
from ratoon.units import MIB

KEPT = {"timed_out": False, "truncated": False, "state_lost": False}
FOR_EVER = "while True: pass"


@pytest.fixture
def agent() -> Iterator[AgentOnHost]:
    with agent_on_host() as running:
        yield running


@contextmanager
def impatient(patience: float, grace: float) -> Iterator[AgentOnHost]:
    """An agent that gives code so many seconds to heed an interrupt."""
    before = f"from guest.agent import python; python.PATIENCE, python.GRACE = {patience}, {grace}"
    with agent_on_host(before=before) as running:
        yield running


def evaluate(agent: AgentOnHost, code: str, **fields: Any) -> dict[str, Any]:
    return agent.reply(agent.request("eval", code=code, **fields))


def result(agent: AgentOnHost, code: str) -> str | None:
    """Of code that must succeed."""
    reply = evaluate(agent, code)
    assert (reply["exit_code"], reply["reason"]) == (0, None)
    value = reply["result"]
    assert value is None or isinstance(value, str)
    return value


def pid_of(agent: AgentOnHost) -> int:
    return int(result(agent, "import os; os.getpid()") or 0)


def started(agent: AgentOnHost, code: str, **fields: Any) -> int:
    """Begin to evaluate code; it has said so by a line."""
    stream = agent.request("eval", code=f"print('running')\n{code}", **fields)
    assert agent.line(stream) == "running"
    return stream


# Where it starts ------------------------------------------------------------------------------


def test_a_directory_that_cannot_be_entered(agent: AgentOnHost, tmp_path: Path) -> None:
    """There is a Python, and it is not said that there is none."""
    place = tmp_path / "place"
    for user in (None, "0", "65534:100"):
        agent.reply(agent.request("defaults", env={}, user=user, cwd=str(place)))
        place.rmdir()
        told = evaluate(agent, "1")
        assert told["kind"] == "no-python"
        assert told["error"] == (
            f"Python cannot be started as {user or 'root'}: cannot enter the directory {place}: "
            "No such file or directory; as root, make that directory, or let that user in"
        )
    place.mkdir()
    agent.reply(agent.request("defaults", env={}, user=None, cwd=str(place)))
    assert result(agent, "import os; os.getcwd()") == repr(str(place))


# What comes back ------------------------------------------------------------------------------


def test_a_result(agent: AgentOnHost) -> None:
    assert evaluate(agent, "x = 6") == {"result": None, "reason": None, "exit_code": 0, **KEPT}
    assert evaluate(agent, "7 * x") == {"result": "42", "reason": None, "exit_code": 0, **KEPT}


def test_an_exception(agent: AgentOnHost) -> None:
    reply = evaluate(agent, "kept = 1\n1 / 0")
    assert reply["reason"].startswith('Traceback (most recent call last):\n  File "<eval-1>", line')
    assert {**reply, "reason": ""} == {"result": None, "reason": "", "exit_code": 1, **KEPT}
    assert result(agent, "kept") == "1"


def test_output_belongs_to_the_evaluation_that_it_was_written_in(agent: AgentOnHost) -> None:
    streams = [
        agent.request("eval", code=f"import os; print({n}); os.write(2, b'{n}')") for n in range(5)
    ]
    for n, stream in enumerate(streams):
        assert agent.reply(stream)["exit_code"] == 0
        assert (agent.stdout(stream), agent.stderr(stream)) == (b"%d\n" % n, b"%d" % n)
        assert agent.frames[-1][1] == wire.REPLY or n < 4


def test_what_is_written_between_evaluations_is_dropped_and_blocks_nobody(
    agent: AgentOnHost, tmp_path: Path
) -> None:
    go, gone = tmp_path / "go", tmp_path / "gone"
    flood = f"""
import os, threading, time
def flood():
    while not os.path.exists('{go}'): time.sleep(0.01)
    for _ in range(100): os.write(1, bytes(65536))
    open('{gone}', 'w')
threading.Thread(target=flood).start()
"""
    result(agent, flood)
    go.touch()
    wait_for(gone.exists, 60)
    for _ in range(5):  # what the pipe still holds is read meanwhile
        agent.hello()
    stream = agent.request("eval", code="print('clean')")
    assert agent.reply(stream)["exit_code"] == 0
    assert agent.stdout(stream) == b"clean\n"


def test_bytes_pass_unchanged_however_many(agent: AgentOnHost) -> None:
    stream = agent.request("eval", code="import os; print('ü' * 5_000_000); os.write(1, b'\\xff')")
    assert agent.reply(stream)["exit_code"] == 0
    assert agent.stdout(stream) == "ü".encode() * 5_000_000 + b"\n\xff"


def test_output_stops_at_a_host_that_takes_none(agent: AgentOnHost) -> None:
    stream = started(agent, "", timeout=60)
    agent.no_credit.add(stream + 1)
    flood = agent.request("eval", code=f"print('x' * {4 * MIB})")
    behind = agent.request("eval", code="5")
    agent.receive_until(lambda: len(agent.stdout(flood)) > wire.OUTPUT_WINDOW - CHUNK)
    agent.hello()
    held = len(agent.stdout(flood))
    assert agent.reply(agent.shell("echo the rest is not held up")) == {"exit_code": 0}
    assert len(agent.stdout(flood)) == held <= wire.OUTPUT_WINDOW
    assert not agent.payloads(behind, wire.REPLY)
    agent.no_credit.clear()
    agent.send(flood, wire.OUTPUT_TAKEN, wire.CREDIT.pack(held))
    assert agent.reply(flood)["exit_code"] == 0
    assert agent.stdout(flood) == b"x" * 4 * MIB + b"\n"
    assert agent.reply(behind)["result"] == "5"


def test_code_and_results_of_megabytes(agent: AgentOnHost) -> None:
    code = "x = '" + "y" * 2 * MIB + "'; len(x)"
    assert result(agent, code) == str(2 * MIB)
    reply = evaluate(agent, "chr(0x1f600) * 1_000_000")
    assert reply["truncated"]
    assert len(reply["result"]) == 256 * 1024


@pytest.mark.parametrize("fields", [{}, {"code": None}, {"code": 5}, {"code": "", "timeout": "1"}])
def test_a_request_that_makes_no_sense_is_refused(
    agent: AgentOnHost, fields: dict[str, object]
) -> None:
    assert "error" in agent.reply(agent.request("eval", **fields))
    assert result(agent, "1") == "1"


def test_without_python_there_is_none() -> None:
    nowhere = "from guest.agent import spawn; spawn.ENVIRONMENT['PATH'] = '/no/such'"
    with agent_on_host(before=nowhere) as agent:
        for _ in range(2):
            reply = evaluate(agent, "1")
            assert reply["kind"] == "no-python"
            assert reply["error"] == (
                "the sandbox has no Python: cannot execute python3: No such file or directory"
            )
        assert agent.reply(agent.run("/bin/true")) == {"exit_code": 0}


def test_a_python_that_cannot_start(tmp_path: Path) -> None:
    (tmp_path / "python3").write_text("#!/bin/sh\necho broken >&2\nexit 3\n")
    (tmp_path / "python3").chmod(0o755)
    path = f"from guest.agent import spawn; spawn.ENVIRONMENT['PATH'] = '{tmp_path}'"
    with agent_on_host(before=path) as agent:
        for _ in range(2):
            stream = agent.request("eval", code="1")
            reply = agent.reply(stream)
            assert (reply["exit_code"], reply["state_lost"]) == (3, True)
            assert reply["reason"].startswith("the interpreter ended with exit code 3")
            assert agent.stderr(stream) == b"broken\n"


# Ends -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "exit_code", "how"),
    [
        ("import os; os._exit(3)", 3, "ended with exit code 3"),
        ("import os; os._exit(0)", 1, "ended with exit code 0"),
        ("import os; os.kill(os.getpid(), 9)", 137, "was killed by signal 9"),
        ("import os; os.kill(os.getpid(), 11)", 139, "was killed by signal 11"),
        ("import os; os.closerange(3, 10000)", 1, "ended with exit code 1"),
        (
            "import os; os.closerange(3, 10000)\nwhile True: pass",
            137,
            "closed its connection with the agent and",
        ),
        ("import os; os.write(200, b'{}\\n')", 137, "sent nonsense to the agent and was killed"),
    ],
)
def test_an_interpreter_that_ends_says_so_and_the_next_one_is_new(
    agent: AgentOnHost, code: str, exit_code: int, how: str
) -> None:
    result(agent, "")
    stream = agent.request("eval", code=f"print('said before')\n{code}")
    reply = agent.reply(stream)
    assert reply["reason"].startswith(f"the interpreter {how}")
    assert "its state is lost" in reply["reason"]
    assert {**reply, "reason": None} == {
        **KEPT,
        "result": None,
        "reason": None,
        "exit_code": exit_code,
        "state_lost": True,
    }
    assert agent.stdout(stream) == b"said before\n"
    assert result(agent, "'exit_code' in globals()") == "False"


def test_an_interpreter_that_ends_between_evaluations_is_told_of(agent: AgentOnHost) -> None:
    before = agent.descriptors
    pid = pid_of(agent)
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not is_alive(pid))
    reply = evaluate(agent, "1")
    assert reply["reason"].startswith("the interpreter was killed by signal 9: its state is lost")
    assert reply["state_lost"]
    assert result(agent, "1") == "1"
    os.kill(pid_of(agent), signal.SIGKILL)
    assert evaluate(agent, "1")["state_lost"]
    wait_for(lambda: agent.descriptors == before)


def test_children_outlive_an_interpreter_that_ends(agent: AgentOnHost) -> None:
    code = "import os, subprocess; sleep = subprocess.Popen(['sleep', '60']); print(sleep.pid)"
    stream = agent.request("eval", code=f"{code}\nos._exit(0)")
    assert agent.reply(stream)["state_lost"]
    assert is_alive(int(agent.line(stream)))


# Timeouts and cancellation --------------------------------------------------------------------


def test_code_whose_time_is_over_is_interrupted(agent: AgentOnHost) -> None:
    result(agent, "kept = 1")
    reply = evaluate(agent, FOR_EVER, timeout=0.2)
    lines = reply["reason"].splitlines()
    assert lines[-2] == "KeyboardInterrupt"
    assert lines[-1] == (
        "timed out after 0.2 s and was interrupted; the interpreter's state is kept"
    )
    assert {**reply, "reason": ""} == {
        **KEPT,
        "result": None,
        "reason": "",
        "exit_code": 124,
        "timed_out": True,
    }
    assert result(agent, "kept") == "1"


def test_code_that_is_deaf_while_it_waits_for_a_child() -> None:
    with impatient(0.2, 60) as agent:
        result(agent, "kept = 1")
        reply = evaluate(agent, "import os; os.system('sleep 60')", timeout=0.2)
        assert (reply["exit_code"], reply["timed_out"], reply["state_lost"]) == (124, True, False)
        assert result(agent, "kept") == "1"


IGNORE = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)"


def test_code_that_heeds_no_interrupt_is_killed() -> None:
    with impatient(0.2, 0.2) as agent:
        result(agent, f"{IGNORE}\nlost = 1")
        reply = evaluate(agent, FOR_EVER, timeout=0.2)
        assert reply["reason"].startswith(
            "timed out after 0.2 s: the interpreter did not heed an interrupt for 0.4 s "
            "and was killed: its state is lost"
        )
        assert (reply["exit_code"], reply["timed_out"], reply["state_lost"]) == (124, True, True)
        reason = evaluate(agent, "lost")["reason"]
        assert reason.endswith("NameError: name 'lost' is not defined\n")


def test_a_timeout_while_it_starts(agent: AgentOnHost) -> None:
    reply = evaluate(agent, "1", timeout=0)
    assert reply["exit_code"] == 124
    assert not reply["state_lost"]


def test_one_after_the_other(agent: AgentOnHost) -> None:
    result(agent, "import time; order = []")
    streams = [
        agent.request("eval", code=f"order.append({n}); time.sleep(0.01); order.append({n}); order")
        for n in range(3)
    ]
    assert agent.reply(streams[-1])["result"] == "[0, 0, 1, 1, 2, 2]"


def test_time_passes_in_the_queue_too(agent: AgentOnHost) -> None:
    pid = pid_of(agent)
    running = started(agent, FOR_EVER)
    waiting = agent.request("eval", code="1", timeout=0.2)
    last = agent.request("eval", code="2")
    reply = agent.reply(waiting)
    assert (reply["exit_code"], reply["timed_out"]) == (124, True)
    assert f"goes on, which `kill -INT {pid}` in the sandbox interrupts" in reply["reason"]
    os.kill(pid, signal.SIGINT)
    assert "KeyboardInterrupt" in agent.reply(running)["reason"]
    assert agent.reply(last)["result"] == "2"


def test_cancelled_code_is_interrupted(agent: AgentOnHost) -> None:
    result(agent, "kept = 1")
    running = started(agent, FOR_EVER)
    waiting = agent.request("eval", code="kept = 2")
    behind = agent.request("eval", code="kept")
    for stream in (waiting, running):
        agent.send(stream, wire.CANCEL)
        assert agent.reply(stream)["kind"] == "cancelled"
    assert agent.reply(behind)["result"] == "1"


def test_cancelled_code_that_heeds_no_interrupt_is_killed() -> None:
    with impatient(0.2, 0.2) as agent:
        result(agent, IGNORE)
        running = started(agent, FOR_EVER)
        behind = agent.request("eval", code="1")
        agent.send(running, wire.CANCEL)
        assert agent.reply(behind)["state_lost"]
        assert result(agent, "1") == "1"


# Sessions -------------------------------------------------------------------------------------


def test_a_new_session_finds_the_state_and_what_still_runs(agent: AgentOnHost) -> None:
    result(agent, "import threading; go = threading.Event(); kept = []")
    started(agent, "kept.append('old'); print('x' * 10_000_000); go.wait()", timeout=0.3)
    agent.request("eval", code="kept.append('never')")
    agent.begin(b"second-session--")
    late = agent.request("eval", code="1", timeout=1)
    assert "an earlier evaluation goes on" in agent.reply(late)["reason"]
    behind = agent.request("eval", code="kept")
    os.kill(_interpreter(agent), signal.SIGINT)
    assert agent.reply(behind)["result"] == "['old']"
    assert agent.stdout(behind) == b""


def _interpreter(agent: AgentOnHost) -> int:
    (pid,) = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    return int(pid)


def test_the_interpreter_is_idle_when_it_has_nothing_to_do(agent: AgentOnHost) -> None:
    result(agent, "x = 1")
    assert agent.busy_seconds(during=0.5) < 0.05
