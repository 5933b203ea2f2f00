"""The agent's loop, run on the host: streams side by side, back-pressure, ends of all kinds."""

from __future__ import annotations

import base64
import random
import re
import sys
import time
from collections.abc import Iterator

import pytest
from agent_on_host import AgentOnHost, agent_on_host, is_alive, wait_for

from ratoon.machine.guest.shared import wire
from ratoon.units import MIB

#: The agent's threshold (256 KiB) and what is read at once on top of it, with room to spare.
HELD_AT_MOST = 8 * MIB


@pytest.fixture
def agent() -> Iterator[AgentOnHost]:
    with agent_on_host() as running:
        yield running


# One command ----------------------------------------------------------------------------------


def test_output_and_exit_code(agent: AgentOnHost) -> None:
    stream = agent.shell("echo out; echo err >&2; exit 3")
    assert agent.reply(stream) == {"exit_code": 3}
    assert (agent.stdout(stream), agent.stderr(stream)) == (b"out\n", b"err\n")
    assert agent.frames[-1][1] == wire.REPLY


def test_environment_and_directory(agent: AgentOnHost) -> None:
    stream = agent.shell("echo $RATOON $HOME; pwd", env={"RATOON": "ü"}, cwd="/proc")
    agent.reply(stream)
    assert agent.stdout(stream).decode() == "ü /root\n/proc\n"


def test_killed_by_a_signal(agent: AgentOnHost) -> None:
    assert agent.reply(agent.shell("kill -TERM $$")) == {"exit_code": 143, "signal": 15}


@pytest.mark.parametrize(
    ("argv", "cwd", "exit_code", "error"),
    [
        (["no-such-program"], None, 127, "cannot execute no-such-program: No such file"),
        (["/etc/passwd"], None, 126, "cannot execute /etc/passwd: Permission denied"),
        (["/etc"], None, 126, "cannot execute /etc: Permission denied"),
        (["true"], "/no/such", 127, "cannot enter the directory /no/such: No such file"),
        (["true"], "/etc/passwd", 126, "cannot enter the directory /etc/passwd: Not a directory"),
        (["\udcff\udc80"], None, 127, "cannot execute \udcff\udc80: No such file"),
    ],
)
def test_what_cannot_be_started(
    agent: AgentOnHost, argv: list[str], cwd: str | None, exit_code: int, error: str
) -> None:
    reply = agent.reply(agent.run(*argv, cwd=cwd))
    assert reply["exit_code"] == exit_code
    assert reply["reason"].startswith(error)


@pytest.mark.parametrize(
    "fields",
    [
        {"argv": []},
        {"argv": ["echo", "a\0b"]},
        {"argv": ["echo", "\ud800"]},
        {"argv": ["true"], "env": {"A": 1}},
        {"argv": ["true"], "env": {"A=B": "c\0"}},
        {"argv": ["true"], "cwd": "\0"},
        {"argv": [1, 2]},
        {"argv": None},
        {},
    ],
    ids=repr,
)
def test_a_request_that_makes_no_sense_is_refused_and_leaks_nothing(
    agent: AgentOnHost, fields: dict[str, object]
) -> None:
    before = agent.descriptors
    for stdin in (False, True):
        reply = agent.reply(agent.request("exec", **fields, stdin=stdin))
        assert "error" in reply
        assert "exit_code" not in reply
    wait_for(lambda: agent.descriptors == before)


@pytest.mark.parametrize(
    "payload", [b"", b"{", b"[]", b"null", b"{}", b'{"op": "dance"}', b"\xff", b"[" * 100_000]
)
def test_an_operation_that_does_not_exist_is_refused(agent: AgentOnHost, payload: bytes) -> None:
    agent.send(9, wire.REQUEST, payload)
    assert "error" in agent.reply(9)


def test_a_rebirth_that_fails_does_not_take_the_agent_down(agent: AgentOnHost) -> None:
    agent.send(5, wire.REBIRTH, b"a name of which the kernel will not hear")
    assert agent.reply(5) == {"error": "OSError: no such name"}
    agent.hello()


def test_bytes_pass_unchanged_however_many(agent: AgentOnHost) -> None:
    data = random.Random(7).randbytes(3 * MIB) + wire.MARKER * 1000
    source = "import random, sys; sys.stdout.buffer.write(random.Random(7).randbytes(3 << 20)"
    stream = agent.python(f"{source} + bytes.fromhex({wire.MARKER.hex()!r}) * 1000)")
    agent.reply(stream)
    assert agent.stdout(stream) == data


def test_all_of_an_enlarged_pipe_is_delivered(agent: AgentOnHost) -> None:
    script = (
        "import fcntl, os; fcntl.fcntl(1, fcntl.F_SETPIPE_SZ, 1 << 20); os.write(1, bytes(1 << 20))"
    )
    stream = agent.python(script)
    assert agent.reply(stream) == {"exit_code": 0}
    assert len(agent.stdout(stream)) == MIB


# Standard input -------------------------------------------------------------------------------


def feed(agent: AgentOnHost, stream: int, data: bytes) -> None:
    """Send stdin as a host does: never more than the window under way."""
    sent = 0
    while sent < len(data):
        agent.receive_until(
            lambda: sent - agent.stdin_taken(stream) < wire.STDIN_WINDOW  # noqa: B023
        )
        room = wire.STDIN_WINDOW - (sent - agent.stdin_taken(stream))
        agent.send(stream, wire.STDIN, data[sent : sent + room])
        sent += min(room, len(data) - sent)


def test_stdin_comes_back(agent: AgentOnHost) -> None:
    data = random.Random(3).randbytes(2 * MIB)
    stream = agent.run("cat", stdin=True)
    feed(agent, stream, data)
    agent.send(stream, wire.STDIN_END)
    assert agent.reply(stream) == {"exit_code": 0}
    assert agent.stdout(stream) == data
    assert agent.stdin_taken(stream) == len(data)


def test_without_stdin_there_is_an_end_at_once(agent: AgentOnHost) -> None:
    stream = agent.run("cat")
    assert agent.reply(stream) == {"exit_code": 0}
    assert agent.payloads(stream, wire.STDIN_TAKEN) == []


def test_the_end_of_stdin_waits_for_what_is_queued(agent: AgentOnHost) -> None:
    stream = agent.shell("sleep 0.3; wc -c", stdin=True)
    agent.send(stream, wire.STDIN, bytes(wire.STDIN_WINDOW))
    agent.send(stream, wire.STDIN_END)
    agent.reply(stream)
    assert int(agent.stdout(stream)) == wire.STDIN_WINDOW


def test_no_window_is_returned_for_what_nobody_has_read(agent: AgentOnHost) -> None:
    stream = agent.run("sleep", "60", stdin=True)
    agent.send(stream, wire.STDIN, bytes(wire.STDIN_WINDOW))
    agent.hello()
    assert agent.stdin_taken(stream) <= 64 * 1024
    assert agent.busy_seconds(during=0.5) < 0.1


def test_a_reader_that_closes_its_stdin_gives_the_window_back(agent: AgentOnHost) -> None:
    stream = agent.shell("exec 0<&-; echo closed; sleep 60", stdin=True)
    assert agent.line(stream) == "closed"
    feed(agent, stream, bytes(3 * wire.STDIN_WINDOW))
    agent.send(stream, wire.STDIN_END)
    agent.receive_until(lambda: agent.stdin_taken(stream) == 3 * wire.STDIN_WINDOW)
    assert agent.busy_seconds(during=0.3) < 0.1


def test_a_reader_that_closes_while_the_pipe_is_full(agent: AgentOnHost) -> None:
    stream = agent.shell("read go; exec 0<&-; echo closed; sleep 60", stdin=True)
    agent.send(stream, wire.STDIN, b"go\n" + bytes(wire.STDIN_WINDOW - 3))
    agent.receive_until(lambda: agent.stdin_taken(stream) == wire.STDIN_WINDOW)
    assert agent.line(stream) == "closed"
    assert agent.busy_seconds(during=0.3) < 0.1


def test_exit_with_stdin_unread(agent: AgentOnHost) -> None:
    before = agent.descriptors
    stream = agent.shell("sleep 0.1; exit 5", stdin=True)
    agent.send(stream, wire.STDIN, bytes(wire.STDIN_WINDOW))
    assert agent.reply(stream) == {"exit_code": 5}
    agent.send(stream, wire.STDIN, b"too late")
    agent.send(stream, wire.STDIN_END)
    agent.hello()
    wait_for(lambda: agent.descriptors == before)


# Many at once ---------------------------------------------------------------------------------


def test_fifty_at_once(agent: AgentOnHost) -> None:
    before = agent.descriptors
    streams = [
        agent.shell(f"sleep 0.1; cat; echo {i} >&2; exit {i}", stdin=True) for i in range(50)
    ]
    for i, stream in reversed(list(enumerate(streams))):
        agent.send(stream, wire.STDIN, b"%d," % i * 100)
        agent.send(stream, wire.STDIN_END)
    for i, stream in enumerate(streams):
        assert agent.reply(stream) == {"exit_code": i}
        assert agent.stdout(stream) == b"%d," % i * 100
        assert agent.stderr(stream) == b"%d\n" % i
    wait_for(lambda: agent.descriptors == before)
    assert agent.busy_seconds(during=0.3) < 0.1


def test_a_slow_one_holds_nobody_up(agent: AgentOnHost) -> None:
    agent.run("sleep", "60")
    agent.run("sleep", "60", stdin=True)
    started = time.monotonic()
    for _ in range(20):
        assert agent.reply(agent.run("true")) == {"exit_code": 0}
    assert time.monotonic() - started < 5


def test_descriptors_are_used_again_and_again(agent: AgentOnHost) -> None:
    before = agent.descriptors
    draw = random.Random(1)
    running: list[int] = []
    for number in range(150):
        stdin = draw.random() < 0.5
        script = draw.choice(["echo hi", "exec >&-; sleep 0.01", "sleep 0.02; echo hi", "cat"])
        stream = agent.shell(script, stdin=stdin)
        if stdin:
            agent.send(stream, wire.STDIN, b"x" * draw.choice([1, 70_000]))
            agent.send(stream, wire.STDIN_END)
        running.append(stream)
        if number % 10 == 9:
            for stream in running:
                assert agent.reply(stream) == {"exit_code": 0}
            running.clear()
    wait_for(lambda: agent.descriptors == before)


def test_too_many_for_its_descriptors_are_refused_and_the_others_go_on() -> None:
    with agent_on_host(descriptors=40) as agent:
        before = agent.descriptors
        streams = [agent.run("sleep", "0.5", stdin=True) for _ in range(30)]
        replies = [agent.reply(stream) for stream in streams]
        assert {"exit_code": 0} in replies
        refused = [reply for reply in replies if reply != {"exit_code": 0}]
        assert refused
        assert all("Too many open files" in reply["reason"] for reply in refused)
        wait_for(lambda: agent.descriptors == before)
        assert agent.reply(agent.run("true")) == {"exit_code": 0}


# Back-pressure --------------------------------------------------------------------------------


def test_a_host_that_does_not_read(agent: AgentOnHost) -> None:
    """All is held in the pipes meanwhile, and arrives once the host reads again."""
    agent.hello()
    resident = agent.resident_bytes
    count = 30 * MIB
    streams = [agent.shell(f"head -c {count // 3} /dev/zero") for _ in range(3)]
    wait_for(lambda: agent.busy_seconds(during=0.2) == 0)
    assert agent.busy_seconds(during=0.5) < 0.05
    assert agent.resident_bytes - resident < HELD_AT_MOST
    for stream in streams:
        assert agent.reply(stream) == {"exit_code": 0}
        assert len(agent.stdout(stream)) == count // 3
    assert agent.busy_seconds(during=0.3) < 0.1


def test_requests_are_heard_while_output_is_held_back(agent: AgentOnHost) -> None:
    noisy = agent.run("yes")
    wait_for(lambda: agent.busy_seconds(during=0.2) == 0)
    quiet = agent.shell("echo heard")
    assert agent.reply(quiet) == {"exit_code": 0}
    assert agent.stdout(quiet) == b"heard\n"
    agent.send(noisy, wire.CANCEL)
    assert agent.reply(noisy) == {"exit_code": 137, "signal": 9}


def test_an_exit_while_its_output_is_held_back(agent: AgentOnHost) -> None:
    before = agent.descriptors
    noisy = agent.run("yes")
    wait_for(lambda: agent.busy_seconds(during=0.2) == 0)
    short = agent.shell("head -c 50000 /dev/zero; head -c 50000 /dev/zero >&2; exit 4")
    wait_for(lambda: agent.busy_seconds(during=0.2) == 0)
    agent.send(noisy, wire.CANCEL)
    assert agent.reply(short) == {"exit_code": 4}
    assert (len(agent.stdout(short)), len(agent.stderr(short))) == (50_000, 50_000)
    agent.reply(noisy)
    wait_for(lambda: agent.descriptors == before)


def test_one_that_writes_for_ever(agent: AgentOnHost) -> None:
    stream = agent.run("yes", timeout=0.5)
    assert agent.reply(stream) == {"exit_code": 124, "timed_out": True}
    assert set(agent.stdout(stream)) == set(b"y\n")
    assert agent.frames[-1][:2] == (stream, wire.REPLY)
    agent.hello()
    assert agent.busy_seconds(during=0.3) < 0.1


# Ends -----------------------------------------------------------------------------------------


def test_timeout_kills_the_group(agent: AgentOnHost) -> None:
    stream = agent.shell("sleep 60 & echo $!; wait", timeout=0.3)
    child = int(agent.line(stream))
    assert agent.reply(stream) == {"exit_code": 124, "timed_out": True}
    wait_for(lambda: not is_alive(child))


def test_the_nearest_of_many_timeouts(agent: AgentOnHost) -> None:
    seconds = [0.6, 0.2, 5, 0.4]
    streams = [agent.run("sleep", "60", timeout=timeout) for timeout in seconds]
    agent.receive_until(lambda: sum(kind == wire.REPLY for _, kind, _ in agent.frames) == 3)
    order = [stream for stream, kind, _ in agent.frames if kind == wire.REPLY]
    assert order == [streams[1], streams[3], streams[0]]
    assert agent.busy_seconds(during=0.3) < 0.1


def test_cancel_kills_the_group(agent: AgentOnHost) -> None:
    stream = agent.shell("trap '' TERM INT HUP; sleep 60 & echo $!; wait")
    child = int(agent.line(stream))
    agent.send(stream, wire.CANCEL)
    assert agent.reply(stream) == {"exit_code": 137, "signal": 9}
    wait_for(lambda: not is_alive(child))


def test_cancel_in_the_same_breath(agent: AgentOnHost) -> None:
    for _ in range(20):
        stream = agent.run("sleep", "60")
        agent.send(stream, wire.CANCEL)
        assert agent.reply(stream) == {"exit_code": 137, "signal": 9}


def test_cancel_comes_too_late(agent: AgentOnHost) -> None:
    stream = agent.run("true")
    agent.reply(stream)
    agent.send(stream, wire.CANCEL)
    agent.send(77, wire.CANCEL)
    agent.hello()


@pytest.mark.parametrize("closing", ["exec >&-", "exec 2>&-", "exec >&- 2>&-"])
def test_outputs_closed_before_the_end(agent: AgentOnHost, closing: str) -> None:
    started = time.monotonic()
    stream = agent.shell(f"echo before; {closing}; sleep 0.7; exit 6")
    agent.line(stream)
    time.sleep(0.1)
    assert agent.busy_seconds(during=0.3) < 0.1
    assert agent.reply(stream) == {"exit_code": 6}
    assert time.monotonic() - started > 0.7


def test_a_daemon_does_not_hold_up_the_reply(agent: AgentOnHost) -> None:
    """A child keeps the pipe; what it writes later is drained, and does not block it."""
    before = agent.descriptors
    script = "(trap '' HUP; sleep 0.3; head -c 300000 /dev/zero; exec sleep 0.3) & echo $!; exit 7"
    stream = agent.shell(script)
    assert agent.reply(stream) == {"exit_code": 7}
    daemon = int(agent.line(stream))
    assert is_alive(daemon)
    assert agent.busy_seconds(during=0.1) < 0.05
    wait_for(lambda: not is_alive(daemon))
    wait_for(lambda: agent.descriptors == before)
    agent.hello()
    assert len(agent.stdout(stream)) < 20
    assert agent.busy_seconds(during=0.2) < 0.1


def test_a_daemon_that_writes_for_ever_does_not_hold_up_the_reply(agent: AgentOnHost) -> None:
    stream = agent.shell("yes & echo $! >&2; sleep 0.1; exit 8")
    assert agent.reply(stream) == {"exit_code": 8}
    (daemon,) = map(int, agent.stderr(stream).split())
    agent.hello()
    assert agent.frames[-1][1] == wire.REPLY
    assert agent.reply(agent.run("kill", "-9", str(daemon))) == {"exit_code": 0}
    wait_for(lambda: not is_alive(daemon))
    wait_for(lambda: agent.busy_seconds(during=0.2) < 0.05)


def test_orphans_are_reaped(agent: AgentOnHost) -> None:
    stream = agent.shell("(sleep 0.2 & echo $!) ; exit 0")
    orphan = int(agent.line(stream))
    agent.reply(stream)
    wait_for(lambda: not re.search(rf"\b{orphan}\b", children(agent)))


def children(agent: AgentOnHost) -> str:
    with open(f"/proc/{agent.pid}/task/{agent.pid}/children") as file:  # noqa: PTH123
        return file.read()


# Sessions -------------------------------------------------------------------------------------


def test_a_new_session_forgets_the_old_one(agent: AgentOnHost) -> None:
    """The old streams' processes go on, unheard; nothing of them comes after the greeting."""
    before = agent.descriptors
    script = "trap 'exit 0' TERM; echo $$; while :; do echo noise; sleep 0.01; done"
    stream = agent.shell(script, stdin=True)
    pid = int(agent.line(stream))
    agent.begin(b"second-session--")
    assert agent.reply(agent.run("sleep", "0.3")) == {"exit_code": 0}
    assert is_alive(pid)
    assert agent.reply(agent.run("kill", str(pid))) == {"exit_code": 0}
    wait_for(lambda: agent.descriptors == before)
    agent.hello()
    assert not any(kind in (wire.STDOUT, wire.STDERR) for _, kind, _ in agent.frames)


def test_a_new_session_with_output_held_back(agent: AgentOnHost) -> None:
    """The old session's writer is drained from now on; half a frame of it may come before."""
    stream = agent.shell("echo $$; exec head -c 20000000 /dev/zero")
    pid = int(agent.line(stream))
    wait_for(lambda: agent.busy_seconds(during=0.2) == 0)
    assert is_alive(pid)
    old = agent.begin(b"second-session--")
    wait_for(lambda: not is_alive(pid))
    agent.hello()
    assert len(old) < MIB
    assert [kind for _, kind, _ in agent.frames] == [wire.REPLY]
    assert agent.reply(agent.shell("echo again")) == {"exit_code": 0}


def test_stdin_stays_open_for_the_next_session_after_what_was_sent(agent: AgentOnHost) -> None:
    stream = agent.shell("echo $$; sleep 0.3; wc -c", stdin=True)
    pid = int(agent.line(stream))
    agent.send(stream, wire.STDIN, bytes(wire.STDIN_WINDOW))
    agent.hello()
    agent.begin(b"second-session--")
    stream = agent.request("attach", pid=pid)
    agent.send(stream, wire.STDIN, b"more")
    agent.send(stream, wire.STDIN_END)
    assert agent.reply(stream) == {"exit_code": 0}
    assert agent.stdout(stream).decode().split() == [str(pid), str(wire.STDIN_WINDOW + 4)]
    assert agent.stdin_taken(stream) == 4


def test_an_old_timeout_does_not_reach_into_the_new_session(agent: AgentOnHost) -> None:
    stream = agent.shell("echo $$; exec sleep 60", timeout=0.3)
    pid = int(agent.line(stream))
    agent.begin(b"second-session--")
    agent.reply(agent.run("sleep", "0.5"))
    assert is_alive(pid)


def test_a_stream_number_is_used_again_in_the_new_session(agent: AgentOnHost) -> None:
    old = agent.shell("echo old; sleep 0.2; echo old; exit 1")
    agent.line(old)
    agent.begin(b"second-session--")
    new = agent.shell("sleep 0.4; echo new; exit 2")
    assert new == old
    assert agent.reply(new) == {"exit_code": 2}
    assert agent.stdout(new) == b"new\n"


def test_a_session_cut_off_within_a_frame(agent: AgentOnHost) -> None:
    frame = wire.encode(1, wire.REQUEST, b'{"op": "exec", "argv": ["yes"]}')
    for length in (1, 8, 9, 20, len(frame) - 1):
        agent.socket.sendall(frame[:length])
        agent.begin(random.Random(length).randbytes(wire.NONCE_BYTES))
        agent.hello()
        assert [kind for _, kind, _ in agent.frames] == [wire.REPLY]


def test_noise_then_a_session(agent: AgentOnHost) -> None:
    agent.socket.sendall(random.Random(5).randbytes(200_000))
    agent.begin(b"after the noise-")
    agent.hello()


def test_a_byte_at_a_time(agent: AgentOnHost) -> None:
    text = base64.b64encode(random.Random(9).randbytes(30)).decode()
    message = f'{{"op": "exec", "argv": ["echo", "{text}"]}}'.encode()
    for byte in wire.encode(3, wire.REQUEST, message):
        agent.socket.sendall(bytes([byte]))
    assert agent.reply(3) == {"exit_code": 0}
    assert agent.stdout(3).decode() == f"{text}\n"


def test_idle_is_idle(agent: AgentOnHost) -> None:
    agent.run("sleep", "60")
    agent.run(sys.executable, "-c", "import time; time.sleep(60)", stdin=True, timeout=50)
    agent.hello()
    time.sleep(0.2)
    assert agent.busy_seconds(during=1) < 0.05


@pytest.mark.parametrize("seconds", [1e300, float("inf"), 10**9])
def test_times_that_are_never_over(agent: AgentOnHost, seconds: float) -> None:
    never = agent.run("sleep", "60", timeout=seconds)
    assert agent.reply(agent.run("sleep", "60", timeout=0.1))["timed_out"]
    agent.send(never, wire.CANCEL)
    assert agent.reply(never) == {"exit_code": 137, "signal": 9}
    assert agent.busy_seconds(during=0.3) < 0.1


def test_a_time_that_is_none_does_not_hold_up_the_others(agent: AgentOnHost) -> None:
    assert agent.reply(agent.run("sleep", "60", timeout=float("nan")))["timed_out"]
    assert agent.reply(agent.run("sleep", "60", timeout=0.1))["timed_out"]
