"""Connections made inside the guest: what the host writes goes there, what comes is output."""

from __future__ import annotations

import errno
import os
import select
import socket

from ..shared import wire
from .sink import Sink
from .stream import Refusal, Stream, operation

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from .stream import Request

#: Where a server of the guest's own may listen, in the order in which it is looked for.
LOOPBACK = ("127.0.0.1", "::1")
KINDS = {
    errno.ECONNREFUSED: "refused",
    errno.ENOENT: "refused",  # of a path
    errno.EHOSTUNREACH: "unreachable",
    errno.ENETUNREACH: "unreachable",
    errno.ETIMEDOUT: "timed-out",
    errno.ECONNRESET: "reset",
    errno.EPIPE: "reset",
}


@operation("dial")
class Dial(Stream):
    """Connect to `port` of `host`, an address of digits, or to the socket at `path`.

    Without a `host` it is one of the loopback's. Either side may end its half; the reply comes when
    both have.
    """

    #: Families and addresses.
    _untried: list[tuple[int, Any]]
    _socket: socket.socket | None = None
    _sink: Sink | None = None
    _where = ""
    _watched = False
    _heard_all = False

    def start(self, request: Request) -> None:
        path, host = request.get("path"), request.get("host")
        if path:
            self._untried = [(socket.AF_UNIX, path)]
            self._where = path
        else:
            port = request["port"]
            hosts = LOOPBACK if host is None else [host]
            self._untried = [(_family(each), (each, port)) for each in hosts]
            self._where = f"{'localhost' if host is None else host}, port {port}"
        self._try()

    def _try(self) -> None:
        """Connect to the next address."""
        family, address = self._untried.pop(0)
        self._socket = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        problem = self._socket.connect_ex(address)
        if problem == errno.EINPROGRESS:
            self._watched = True
            self.agent.watch(self._socket.fileno(), self._connected, select.EPOLLOUT)
        else:
            self._begin(problem)

    def _connected(self) -> None:
        assert self._socket is not None
        self._unwatch()
        self._begin(self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))

    def _begin(self, problem: int) -> None:
        assert self._socket is not None
        if problem and self._untried:
            self._socket.close()
            self._try()
            return
        if problem:
            self._lose(problem)
            return
        # A descriptor of its own: each direction is watched when it has something to wait for.
        writer = os.dup(self._socket.fileno())
        self._sink = Sink(self.agent, writer, self.taken, lambda: self._said_all(writer))
        self.started()
        self.on_room()

    def _lose(self, problem: int) -> None:
        text = f"{self._where}: {os.strerror(problem)}"
        self.refuse(text, KINDS.get(problem, errno.errorcode.get(problem, "")))

    # From there ---------------------------------------------------------------------------------

    def on_room(self) -> None:
        if self._socket is not None and not self._watched and not self._heard_all:
            self._watched = True
            self.agent.watch(self._socket.fileno(), self._readable)

    def _readable(self) -> None:
        assert self._socket is not None
        if not self.room:
            self._unwatch()
            self.wait_for_room()
            return
        try:
            data = self._socket.recv(self.room)
        except BlockingIOError:
            return
        except OSError as error:
            self._lose(error.errno or 0)
            return
        self.send(wire.STDOUT, data)
        if not data:
            self._heard_all = True
            self._unwatch()
            self._end_if_over()

    # To there -----------------------------------------------------------------------------------

    def on_input(self, data: bytes) -> None:
        if self._sink is None:
            raise Refusal("input before the connection is there", "invalid")
        self._sink.write(data)

    def on_input_end(self) -> None:
        if self._sink is not None:
            self._sink.end()

    def _said_all(self, writer: int) -> None:
        """All is written, or nobody reads it."""
        if self._socket is not None:
            try:
                self._socket.shutdown(socket.SHUT_WR)
            except OSError:  # it is over there too
                pass
        os.close(writer)
        self._end_if_over()

    # The end ------------------------------------------------------------------------------------

    def _end_if_over(self) -> None:
        if self._heard_all and self._sink is not None and self._sink.closed:
            if self._sink.problem:
                self._lose(self._sink.problem)
            else:
                self.reply()

    def on_end(self) -> None:
        self._unwatch()
        if self._sink is not None:
            self._sink.close()
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _unwatch(self) -> None:
        if self._watched:
            assert self._socket is not None
            self._watched = False
            self.agent.unwatch(self._socket.fileno())


def _family(host: str) -> int:
    """Refusal: it is a name, which somebody would have to look up."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.inet_pton(family, host)
    except OSError:
        raise Refusal(f"{host!r} is no address of digits", "invalid") from None
    return family
