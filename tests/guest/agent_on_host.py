"""The guest's agent as a process of this host, at the other end of a socket pair."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ratoon.machine.guest.shared import wire

PACKAGE = Path(wire.__file__).parent.parent.parent

#: What runs instead of `main`: no port to be found, no cgroups, no clock to be set, no chroot. As
#: in the guest, orphans become the agent's children (PR_SET_CHILD_SUBREAPER).
_DRIVER = """
import ctypes, resource, sys
port, package, descriptors = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
sys.path.insert(0, package)
import guest.agent.__main__ as main
exec(sys.argv[4])

class Freezer:
    spared = set()

class Groups:
    def __init__(self, freezer):
        pass
    def admit(self, pid):
        return None

class Victims:
    def reason(self, process, status):
        return None

class Identity:
    def __init__(self, evaluator, freezer, groups):
        pass
    def rebirth(self, message):
        raise OSError("no such name")
    def freeze(self, timeout):
        return True
    def set_clock(self, unix_ns):
        pass
    def thaw(self):
        pass

main.Freezer = Freezer
main.Groups = Groups
main.Victims = Victims
main.Identity = Identity
ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)
resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, descriptors))
main.Agent(port).run()
"""

Frame = tuple[int, int, bytes]


class AgentOnHost:
    """Speaks to the agent with its own hand: frames are sent and received one by one."""

    def __init__(self, descriptors: int = 1024, before: str = "") -> None:
        """`before` is run in the agent's process before it starts."""
        self.socket, theirs = socket.socketpair()
        with theirs:
            theirs.setblocking(False)
            arguments = [str(theirs.fileno()), str(PACKAGE), str(descriptors), before]
            self.process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-B", "-c", _DRIVER, *arguments],
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        self.socket.settimeout(20)
        self._decoder = wire.Decoder()
        self._streams = 0
        #: Everything that has been received, in order.
        self.frames: list[Frame] = []
        #: Streams whose output is received, but not taken: they run out of their window.
        self.no_credit: set[int] = set()

    # Sending ----------------------------------------------------------------------------------

    def send(self, stream: int, kind: int, payload: bytes = b"") -> None:
        self.socket.sendall(wire.encode(stream, kind, payload))

    def request(self, op: str, **fields: Any) -> int:
        """Send a request on a stream of its own; the number of the stream."""
        self._streams += 1
        self.send(self._streams, wire.REQUEST, json.dumps({"op": op, **fields}).encode())
        return self._streams

    def run(self, *argv: str, **fields: Any) -> int:
        return self.request("exec", argv=argv, **fields)

    def shell(self, script: str, **fields: Any) -> int:
        return self.run("sh", "-c", script, **fields)

    def python(self, script: str, **fields: Any) -> int:
        return self.run(sys.executable, "-c", script, **fields)

    def begin(self, nonce: bytes = b"n" * wire.NONCE_BYTES) -> bytes:
        """Begin a session; what was still on its way from the one before."""
        self.socket.sendall(wire.MARKER + nonce)
        self._streams = 0
        greeting, before = wire.MARKER + nonce, bytearray()
        while greeting not in before:
            before += self._hear()
        old, _, new = bytes(before).partition(greeting)
        self._decoder, self.frames = wire.Decoder(), []
        self._decode(new)
        return old

    # Receiving --------------------------------------------------------------------------------

    def receive_until(self, met: Callable[[], bool]) -> None:
        while not met():
            self._decode(self._hear())

    def reply(self, stream: int) -> dict[str, Any]:
        """Receive until `stream` has its reply."""
        self.receive_until(lambda: bool(self.payloads(stream, wire.REPLY)))
        (payload,) = self.payloads(stream, wire.REPLY)
        reply = json.loads(payload)
        assert isinstance(reply, dict)
        return reply

    def payloads(self, stream: int, kind: int) -> list[bytes]:
        return [payload for s, k, payload in self.frames if (s, k) == (stream, kind)]

    def stdout(self, stream: int) -> bytes:
        return b"".join(self.payloads(stream, wire.STDOUT))

    def stderr(self, stream: int) -> bytes:
        return b"".join(self.payloads(stream, wire.STDERR))

    def line(self, stream: int) -> str:
        """The first line that `stream` writes."""
        self.receive_until(lambda: b"\n" in self.stdout(stream))
        return self.stdout(stream).decode().partition("\n")[0]

    def stdin_taken(self, stream: int) -> int:
        return sum(int.from_bytes(p, "big") for p in self.payloads(stream, wire.STDIN_TAKEN))

    def hello(self) -> None:
        """Ask something, to know that all before it was dealt with."""
        assert self.reply(self.request("hello"))["version"] == wire.VERSION

    def _hear(self) -> bytes:
        data = self.socket.recv(1 << 20)
        assert data, "the agent is gone"
        return data

    def _decode(self, data: bytes) -> None:
        self._decoder.feed(data)
        for stream, kind, payload in self._decoder.frames():
            self.frames.append((stream, kind, payload))
            if kind in wire.OUTPUTS and payload and stream not in self.no_credit:
                self.send(stream, wire.OUTPUT_TAKEN, wire.CREDIT.pack(len(payload)))

    # The process ------------------------------------------------------------------------------

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def descriptors(self) -> int:
        return sum(1 for _ in Path(f"/proc/{self.pid}/fd").iterdir())

    @property
    def resident_bytes(self) -> int:
        pages = Path(f"/proc/{self.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    def busy_seconds(self, *, during: float) -> float:
        """How much CPU time the agent takes within `during` seconds."""
        before = _cpu_seconds(self.pid)
        time.sleep(during)
        return _cpu_seconds(self.pid) - before

    def close(self) -> None:
        # The agent first, then whoever it leaves behind; all are descendants until it is gone.
        doomed = [self.pid, *_descendants(self.pid)]
        for pid in doomed:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        self.socket.close()


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _descendants(pid: int) -> Iterator[int]:
    with suppress(FileNotFoundError, ProcessLookupError):
        for child in map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()):
            yield child
            yield from _descendants(child)


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and was not waited for does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def wait_for(met: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


@contextmanager
def agent_on_host(**options: Any) -> Iterator[AgentOnHost]:
    agent = AgentOnHost(**options)
    try:
        agent.begin()
        yield agent
        assert agent.process.poll() is None, "the agent must outlive whatever the host asks for"
    finally:
        agent.close()
