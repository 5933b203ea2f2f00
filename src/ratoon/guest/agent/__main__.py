"""The agent: process 1 of the guest, the host's hands inside it.

One thread, one epoll, one virtio-serial port. It lives in the initramfs with a Python of its own
and the standard library alone, loaded before it enters the sandbox's root file system; so any image
works, with or without Python in it.
"""

from __future__ import annotations

import fcntl
import gc
import json
import os
import select
import signal
import time

from . import wire
from .process import Process, StartError
from .rebirth import SYSROOT, Identity

TYPE_CHECKING = False
if TYPE_CHECKING:  # `typing` itself would cost start-up time
    from collections.abc import Callable
    from typing import Any

    Request = dict[str, Any]

PORT_NAME = "ratoon.agent"
CHUNK = 32 * 1024
#: Above this many bytes waiting for the host, no process output is read: its pipes fill up instead.
OUTPUT_LIMIT = 256 * 1024


class Agent:
    def __init__(self, port: int) -> None:
        self._port = port
        self._identity = Identity()
        self._epoll = select.epoll()
        self._handlers: dict[int, Callable[[], None]] = {}
        self._decoder = wire.Decoder()
        self._out = bytearray()
        self._held_back: set[int] = set()
        self._streams: dict[int, Process] = {}
        #: Every process started and not yet reaped; those of an older session have no stream.
        self._processes: dict[int, Process] = {}
        self._operations: dict[str, Callable[[int, Request], None]] = {
            "hello": self._hello,
            "exec": self._exec,
            "freeze": self._freeze,
            "thaw": self._thaw,
        }

    # The loop ------------------------------------------------------------------------------------

    def run(self) -> None:
        wakeup, child_exited = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(child_exited, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self._handlers[wakeup] = lambda: self._reap(wakeup)
        self._epoll.register(wakeup, select.EPOLLIN)
        # Edge-triggered: a port whose host is away reports a hang-up for as long as it is away.
        edges = select.EPOLLIN | select.EPOLLOUT | select.EPOLLET
        self._handlers[self._port] = self._port_ready
        self._epoll.register(self._port, edges)
        while True:
            for fd, _ in self._epoll.poll(self._until_next_deadline()):
                handler = self._handlers.get(fd)
                if handler is not None:
                    handler()
            self._kill_overdue()

    def _port_ready(self) -> None:
        self._flush()
        while data := _read(self._port):
            self._decoder.feed(data)
            nonce = self._decoder.sync()
            if nonce is not None:
                self._begin_session(nonce)
            try:
                for stream, kind, payload in self._decoder.frames():
                    self._dispatch(stream, kind, payload)
            except wire.ProtocolError:
                self._decoder.discard()

    def _begin_session(self, nonce: bytes) -> None:
        """A host has connected: what was being said belongs to the past."""
        for process in self._streams.values():
            process.detach()
        self._streams.clear()
        self._out = bytearray(wire.MARKER + nonce)
        self._flush()

    def _dispatch(self, stream: int, kind: int, payload: bytes) -> None:
        if kind in (wire.REBIRTH, wire.REQUEST):
            try:
                if kind == wire.REBIRTH:
                    self._identity.rebirth(payload)
                    self._send(stream, wire.REPLY, b"{}")
                else:
                    request = json.loads(payload)
                    self._operations[request["op"]](stream, request)
            except Exception as error:
                self._reply(stream, error=f"{type(error).__name__}: {error}")
            return
        process = self._streams.get(stream)
        if process is None:
            return
        if kind == wire.STDIN:
            process.write_stdin(payload)
        elif kind == wire.STDIN_END:
            process.end_stdin()
        elif kind == wire.CANCEL:
            process.kill()

    # Sending -------------------------------------------------------------------------------------

    def _send(self, stream: int, kind: int, payload: bytes) -> None:
        self._out += wire.encode(stream, kind, payload)
        self._flush()

    def _reply(self, stream: int, **fields: Any) -> None:
        self._send(stream, wire.REPLY, json.dumps(fields).encode())

    def _flush(self) -> None:
        while self._out:
            try:
                written = os.write(self._port, self._out[:CHUNK])
            except BlockingIOError:
                break
            if not written:
                break
            del self._out[:written]
        if len(self._out) < OUTPUT_LIMIT // 2:
            for fd in self._held_back:
                self._epoll.register(fd, select.EPOLLIN)
            self._held_back.clear()

    # Processes -----------------------------------------------------------------------------------

    def _exec(self, stream: int, request: Request) -> None:
        try:
            process = Process.start(
                request["argv"],
                env=request.get("env") or {},
                cwd=request.get("cwd") or "/",
                with_stdin=bool(request.get("stdin")),
                timeout=request.get("timeout"),
            )
        except StartError as error:
            self._reply(stream, exit_code=error.exit_code, error=str(error))
            return
        self._identity.admit(process.pid)
        process.on_output = lambda kind, data: self._send(stream, kind, data)
        process.on_stdin_taken = lambda count: self._send(
            stream, wire.STDIN_TAKEN, count.to_bytes(4, "big")
        )
        process.stream = stream
        self._streams[stream] = process
        self._processes[process.pid] = process
        for fd, kind in process.outputs.items():
            self._watch_output(process, fd, kind)
        if process.stdin is not None:
            process.on_stdin_blocked = self._watch_stdin

    def _watch(self, fd: int, handler: Callable[[], None], events: int = select.EPOLLIN) -> None:
        self._handlers[fd] = handler
        self._epoll.register(fd, events)

    def _unwatch(self, fd: int) -> None:
        del self._handlers[fd]
        if fd in self._held_back:
            self._held_back.remove(fd)
        else:
            self._epoll.unregister(fd)

    def _watch_output(self, process: Process, fd: int, kind: int) -> None:
        self._watch(fd, lambda: self._output_ready(process, fd, kind))

    def _watch_stdin(self, process: Process) -> None:
        fd = process.stdin
        assert fd is not None

        def writable() -> None:
            self._unwatch(fd)
            process.pump_stdin()

        if fd not in self._handlers:
            self._watch(fd, writable, select.EPOLLOUT)

    def _output_ready(self, process: Process, fd: int, kind: int) -> None:
        if len(self._out) > OUTPUT_LIMIT and not process.detached:
            self._held_back.add(fd)
            self._epoll.unregister(fd)
            return
        data = _read(fd)
        if data is None:
            return
        if data:
            process.on_output(kind, data)
        else:
            self._close_output(process, fd)

    def _close_output(self, process: Process, fd: int) -> None:
        self._unwatch(fd)
        del process.outputs[fd]
        os.close(fd)

    def _reap(self, wakeup: int) -> None:
        os.read(wakeup, 4096)
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            process = self._processes.pop(pid, None)
            if process is not None:
                self._finish(process, status)

    def _finish(self, process: Process, status: int) -> None:
        """Deliver what the process wrote before it exited, then its exit code.

        A pipe that a child of it still holds open is drained from here on, unheard.
        """
        for fd, kind in list(process.outputs.items()):
            # All that a process can have left behind; a child may write for ever.
            left = fcntl.fcntl(fd, fcntl.F_GETPIPE_SZ)
            while left > 0 and (data := _read(fd)):
                process.on_output(kind, data)
                left -= len(data)
            if data == b"":
                self._close_output(process, fd)
        if process.stdin is not None and process.stdin in self._handlers:
            self._unwatch(process.stdin)
        process.close_stdin()
        if process.detached:
            return
        del self._streams[process.stream]
        self._reply(process.stream, **process.outcome(status))
        process.detach()

    def _until_next_deadline(self) -> float:
        deadlines = [p.deadline for p in self._processes.values() if p.deadline is not None]
        return max(0.0, min(deadlines) - time.monotonic()) if deadlines else -1

    def _kill_overdue(self) -> None:
        now = time.monotonic()
        for process in self._processes.values():
            if process.deadline is not None and process.deadline <= now:
                process.expire()

    # Operations ----------------------------------------------------------------------------------

    def _hello(self, stream: int, request: Request) -> None:
        self._reply(stream, version=wire.VERSION, pid=os.getpid())

    def _freeze(self, stream: int, request: Request) -> None:
        self._reply(stream, frozen=self._identity.freeze(request["seconds"]))

    def _thaw(self, stream: int, request: Request) -> None:
        self._identity.thaw()
        self._reply(stream)


def _read(fd: int) -> bytes | None:
    """What can be read now: b"" at the end (or with no host on the port), None if nothing yet."""
    try:
        return os.read(fd, CHUNK)
    except BlockingIOError:
        return None


def _find_port() -> str:
    """The virtio-serial port of our name; the driver may still be probing."""
    while True:
        for entry in os.listdir("/sys/class/virtio-ports"):
            with open(f"/sys/class/virtio-ports/{entry}/name") as name:
                if name.read().strip() == PORT_NAME:
                    return f"/dev/{entry}"
        time.sleep(0.01)


def main() -> None:
    port = os.open(_find_port(), os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    agent = Agent(port)
    os.chroot(SYSROOT)
    os.chdir("/")
    # What start-up made stays; leaving it out of collections keeps its pages shared between forks.
    gc.freeze()
    agent.run()


if __name__ == "__main__":
    main()
