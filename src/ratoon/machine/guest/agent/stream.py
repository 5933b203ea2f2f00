"""One conversation of the host with the agent, as the agent sees it; and what it may be about."""

from __future__ import annotations

import json

from ..shared import wire
from .loop import call

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from typing import Any, Protocol, TypeVar

    from .loop import Watcher

    class Speaker(Watcher, Protocol):
        """The agent, as its streams see it: it lets them speak."""

        congested: bool

        def send(self, number: int, kind: int, payload: bytes) -> None: ...
        def forget(self, stream: Stream) -> None: ...
        def wait_for_room(self, stream: Stream) -> None: ...
        def work(self, stream: Stream, generator: Generator[None, None, None]) -> None: ...

    Request = dict[str, Any]
    S = TypeVar("S", bound="type[Stream]")

#: What one write to the port takes, as a frame: output in pieces of this size costs the least.
CHUNK = 32 * 1024 - wire.HEADER.size

#: What a request's "op" may be, and the stream that answers it. Modules add theirs on import.
operations: dict[str, type[Stream]] = {}


def operation(name: str) -> Callable[[S], S]:
    """Decorates the class that answers requests of this name."""

    def register(answer: S) -> S:
        operations[name] = answer
        return answer

    return register


class Refusal(Exception):
    """What was asked for cannot be done; `kind` is a short word for programs to tell it by."""

    def __init__(self, text: str, kind: str = "") -> None:
        super().__init__(text)
        self.kind = kind


class Stream:
    """A request, what goes to and fro, and the reply that ends it.

    Subclasses override `start` and the hooks `on_…`; what these raise refuses the stream. Output
    must fit `room`. Where there is none, `wait_for_room`, or let a generator send it (`work`).
    """

    def __init__(self, agent: Speaker, number: int) -> None:
        self.agent = agent
        self.number = number
        #: Bytes of output that the host still takes.
        self.window = wire.OUTPUT_WINDOW
        self.ended = False

    @property
    def room(self) -> int:
        """How many bytes of output may be sent now: CHUNK or none."""
        return CHUNK if self.window >= CHUNK and not self.agent.congested else 0

    # What the agent says ------------------------------------------------------------------------

    def send(self, kind: int, data: bytes) -> None:
        """Output, at most `room` bytes of it. Empty: no more of this kind will come."""
        if not self.ended:
            self.window -= len(data)
            self.agent.send(self.number, kind, data)

    def started(self, **fields: Any) -> None:
        """Tell the host that what it asked for has begun; at most once."""
        if not self.ended:
            self.agent.send(self.number, wire.STARTED, json.dumps(fields).encode())

    def taken(self, count: int) -> None:
        """Give credit back for `count` bytes of input."""
        if not self.ended:
            self.agent.send(self.number, wire.STDIN_TAKEN, wire.CREDIT.pack(count))

    def reply(self, **fields: Any) -> None:
        """The last word: the stream ends."""
        if self.ended:
            return
        message = json.dumps(fields).encode()
        if len(message) > wire.MAX_MESSAGE:
            message = b'{"error": "the answer is too large", "kind": "too-large"}'
        self.agent.send(self.number, wire.REPLY, message)
        self.detach()

    def refuse(self, text: str, kind: str = "") -> None:
        """The last word: it cannot be done. At most 2,000 characters of it are sent."""
        self.reply(error=text[:2000], **({"kind": kind} if kind else {}))

    def fail(self, error: Exception) -> None:
        """Refuse because of what was raised."""
        if isinstance(error, Refusal):
            self.refuse(str(error), error.kind)
        else:
            self.refuse(f"{type(error).__name__}: {error}")

    def detach(self) -> None:
        """Nobody listens any more: it was replied, or a new session has begun."""
        if not self.ended:
            self.ended = True
            self.agent.forget(self)
            call(self.on_end)

    def wait_for_room(self) -> None:
        """Have `on_room` called, once, when there is room."""
        self.agent.wait_for_room(self)

    def work(self, generator: Generator[None, None, None]) -> None:
        """Run `generator` beside everything else: from `yield` to `yield`, whenever there is room.

        It is closed where the stream ends first.
        """
        self.agent.work(self, generator)

    # What it is told ----------------------------------------------------------------------------

    def start(self, request: Request) -> None:
        raise NotImplementedError

    def on_input(self, data: bytes) -> None:
        self.taken(len(data))

    def on_input_end(self) -> None:
        pass

    def on_cancel(self) -> None:
        """Nobody wants the reply any more; there must be one all the same."""
        self.refuse("cancelled", "cancelled")

    def on_resize(self, rows: int, columns: int) -> None:
        pass

    def on_signal(self, number: int) -> None:
        pass

    def on_room(self) -> None:
        pass

    def on_end(self) -> None:
        """The stream is over, however; called once. Let go of what it held."""
