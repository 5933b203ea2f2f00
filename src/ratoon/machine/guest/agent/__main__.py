"""The agent: process 1 of the guest, the host's hands inside it.

One thread, one epoll, one virtio-serial port. It lives in the initramfs with a Python of its own
and the standard library alone, loaded before it enters the sandbox's root file system; so any image
works, with or without Python in it.
"""

from __future__ import annotations

import gc
import json
import os
import select

from ..shared import wire
from . import dial, files, transfers, watching  # noqa: F401  they answer requests
from .evaluator import Evaluator
from .freezer import Freezer
from .groups import Groups
from .libc import enter_root
from .loop import Loop, call
from .modules import Modules
from .namespaces import Namespaces
from .port import find_port
from .processes import Processes
from .rebirth import Identity
from .stream import Stream, operation, operations
from .victims import Victims
from .volumes import Volumes

TYPE_CHECKING = False
if TYPE_CHECKING:  # `typing` itself would cost start-up time
    from collections.abc import Generator
    from typing import Any

    Request = dict[str, Any]

PORT_NAME = "ratoon.agent"
#: Where init has mounted the sandbox's root file system.
SYSROOT = "/sysroot"
CHUNK = 32 * 1024
#: With this many bytes waiting for the port no stream has room: what they read from fills up.
OUTPUT_LIMIT = 256 * 1024


class Agent(Loop):
    """Hears the host's frames, and lets streams answer them."""

    def __init__(self, port: int) -> None:
        super().__init__()
        self.freezer = Freezer()
        groups = Groups(self.freezer)
        self.processes = Processes(self, groups, Victims(), Namespaces(), self._tell_command)
        self.evaluator = Evaluator(self, self.processes)
        self.identity = Identity(self.evaluator, self.freezer, groups)
        self.volumes = Volumes(self, self.freezer.spared)
        #: The port does not keep up: nothing but short answers until it does.
        self.congested = False
        self._port = port
        self._decoder = wire.Decoder()
        self._out = bytearray()
        self._streams: dict[int, Stream] = {}
        self._waiting: set[Stream] = set()
        self._work: dict[Stream, Generator[None, None, None]] = {}
        self._stepping: Stream | None = None

    # The loop ------------------------------------------------------------------------------------

    def run(self) -> None:
        # Edge-triggered: a port whose host is away reports a hang-up for as long as it is away.
        self.watch(self._port, self._port_ready, select.EPOLLIN | select.EPOLLOUT | select.EPOLLET)
        while True:
            self.turn(wait=not self._work or not any(stream.room for stream in self._work))
            if self._waiting:
                for stream in [stream for stream in self._waiting if stream.room]:
                    self._waiting.discard(stream)
                    call(stream.on_room)
            if self._work:
                self._step()

    def _step(self) -> None:
        for stream, generator in list(self._work.items()):
            if stream.room:
                self._stepping = stream
                try:
                    next(generator)
                except StopIteration:
                    self._work.pop(stream, None)
                except Exception as error:
                    stream.fail(error)
        self._stepping = None

    def wait_for_room(self, stream: Stream) -> None:
        if not stream.ended:
            self._waiting.add(stream)

    def work(self, stream: Stream, generator: Generator[None, None, None]) -> None:
        if stream.ended:
            generator.close()
        else:
            self._work[stream] = generator

    def forget(self, stream: Stream) -> None:
        """It has ended."""
        if self._streams.get(stream.number) is stream:
            del self._streams[stream.number]
        self._waiting.discard(stream)
        generator = self._work.pop(stream, None)
        if generator is not None and stream is not self._stepping:  # else it ends by itself
            call(generator.close)

    # Hearing -------------------------------------------------------------------------------------

    def _port_ready(self) -> None:
        self._flush()
        while data := self._read_port():
            self._decoder.feed(data)
            nonce = self._decoder.sync()
            if nonce is not None:
                self._begin_session(nonce)
            try:
                for number, kind, payload in self._decoder.frames():
                    self._dispatch(number, kind, payload)
            except wire.ProtocolError:
                self._decoder.discard()

    def _read_port(self) -> bytes:
        try:
            return os.read(self._port, CHUNK)  # b"": no host is there
        except BlockingIOError:
            return b""

    def _begin_session(self, nonce: bytes) -> None:
        """A host has connected: what was being said belongs to the past."""
        for stream in list(self._streams.values()):
            call(stream.detach)
        self._out = bytearray(wire.MARKER + nonce)
        self._flush()

    def _dispatch(self, number: int, kind: int, payload: bytes) -> None:
        if kind == wire.REQUEST:
            stream = Stream(self, number)
            try:
                request = json.loads(payload)
                stream = operations[request["op"]](self, number)
                self._streams[number] = stream
                stream.start(request)
            except Exception as error:
                stream.fail(error)
            return
        if kind == wire.REBIRTH:
            stream = Stream(self, number)
            try:
                self.identity.rebirth(payload)
                if self.processes.main is not None:
                    self.processes.reborn(payload[0] & ~wire.ONLINE == wire.RESUME)
                stream.reply(**({"volumes": True} if self.volumes.relayed else {}))
            except Exception as error:
                stream.fail(error)
            return
        heard = self._streams.get(number)
        if heard is None:
            return  # it has ended meanwhile
        try:
            _hear(heard, kind, payload)
        except Exception as error:
            heard.fail(error)

    # Sending -------------------------------------------------------------------------------------

    def send(self, number: int, kind: int, payload: bytes) -> None:
        frames = wire.encode(number, kind, payload)
        if not self._out:
            frames = frames[self._write(frames) :]
        if frames:  # else, mostly, it went as it is: copies are what output costs
            self._out += frames
            self._flush()

    def _tell_command(self, how: dict[str, Any]) -> None:
        self.send(0, wire.COMMAND, json.dumps(how).encode())

    def _flush(self) -> None:
        while self._out:
            written = self._write(self._out[:CHUNK])
            if not written:
                break
            del self._out[:written]
        if len(self._out) > OUTPUT_LIMIT:
            self.congested = True
        elif len(self._out) < OUTPUT_LIMIT // 2:
            self.congested = False

    def _write(self, data: bytes | bytearray) -> int:
        try:
            return os.write(self._port, data)  # 0: no host is there
        except BlockingIOError:
            return 0


def _hear(stream: Stream, kind: int, payload: bytes) -> None:
    if kind == wire.STDIN:
        stream.on_input(payload)
    elif kind == wire.STDIN_END:
        stream.on_input_end()
    elif kind == wire.OUTPUT_TAKEN:
        stream.window += wire.CREDIT.unpack(payload)[0]
    elif kind == wire.CANCEL:
        stream.on_cancel()
    elif kind == wire.RESIZE:
        stream.on_resize(*wire.SIZE.unpack(payload))
    elif kind == wire.SIGNAL:
        stream.on_signal(payload[0])


@operation("hello")
class Hello(Stream):
    agent: Agent

    def start(self, request: Request) -> None:
        volumes = self.agent.volumes.relayed
        self.agent.processes.tell()
        self.reply(version=wire.VERSION, pid=os.getpid(), volumes=volumes)


@operation("freeze")
class Freeze(Stream):
    agent: Agent

    def start(self, request: Request) -> None:
        frozen = self.agent.identity.freeze(request["seconds"])
        unsynced = self.agent.volumes.sync(request["sync_seconds"])
        self.reply(frozen=frozen, unsynced=unsynced)


@operation("thaw")
class Thaw(Stream):
    agent: Agent

    def start(self, request: Request) -> None:
        self.agent.identity.set_clock(request["unix_ns"])
        self.agent.identity.thaw()
        self.reply()


def main() -> None:
    port = os.open(find_port(PORT_NAME), os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    agent = Agent(port)
    agent.volumes.prepare()
    modules = Modules()
    enter_root(SYSROOT)
    agent.identity.move_in()
    modules.move_in()
    # What start-up made stays; leaving it out of collections keeps its pages shared between forks.
    gc.freeze()
    agent.run()


if __name__ == "__main__":
    main()
