"""Misuse of the sockets that it holds."""

from __future__ import annotations

import os
import select
import socket
import struct
from collections.abc import Callable

from ratoon.jail.attack.attempts import Denied, attempt, register, try_each
from ratoon.jail.attack.calls import call
from ratoon.jail.attack.sockets import connect_unix
from ratoon.jail.attack.targets import MAIN_PARENT, T


def held_sockets(one: Callable[[socket.socket], str | None]) -> str:
    def named(name: str) -> str | None:
        return one(socket.socket(fileno=os.dup(T.sockets[name])))

    return try_each(T.sockets, named)


def next_peer(held: socket.socket) -> socket.socket:
    """The peer of a held socket: itself if it is connected, else who connects within a moment."""
    if not held.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        return held
    if not select.select([held], [], [], 0.1)[0]:
        raise Denied("nobody connected")
    held.setblocking(False)
    return held.accept()[0]


def send_rights(what: str, descriptors: Callable[[], list[int]]) -> None:
    def one(held: socket.socket) -> str:
        peer = next_peer(held)
        peer.settimeout(0.5)
        fds = descriptors()
        if not fds:
            raise Denied("not tried: there is no such descriptor")
        socket.send_fds(peer, [b"\n"], fds[:1])
        return "sent to the peer"

    register("sockets", f"pass a descriptor to the daemon: {what}", lambda: held_sockets(one))


def directory_descriptor() -> list[int]:
    return [os.open("/", os.O_RDONLY | os.O_DIRECTORY)]


send_rights("a layer", lambda: T.layers)
send_rights("the root directory", directory_descriptor)
send_rights("a socket", lambda: [socket.socketpair()[0].detach()])


@attempt("sockets", "pass forged credentials to the daemon (SCM_CREDENTIALS)")
def _() -> str:
    def one(held: socket.socket) -> str:
        peer = next_peer(held)
        forged = struct.pack("=iII", 1, 0, 0)
        peer.sendmsg([b"\n"], [(socket.SOL_SOCKET, 2, forged)])
        return "sent"

    return held_sockets(one)


@attempt("sockets", "forge credentials at all (SCM_CREDENTIALS to itself)")
def _() -> str:
    here, there = socket.socketpair()
    there.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)

    def one(forged: tuple[int, int, int]) -> str:
        here.sendmsg([b"x"], [(socket.SOL_SOCKET, 2, struct.pack("=iII", *forged))])
        return "sent"

    me = (os.getpid(), os.getuid(), os.getgid())
    forgeries = [(MAIN_PARENT or 1, *me[1:]), (me[0], 0 if me[1] else 1, me[2])]
    forgeries += [(pid, *me[1:]) for pid in T.pids[:3]]
    return try_each(forgeries, one)


@attempt("sockets", "turn a held socket to another address (connect, bind again)")
def _() -> str:
    targets: list[str | bytes] = [*T.unix_sockets, b"\0standin-again"]

    def one(held: socket.socket) -> str:
        def move(target: str | bytes) -> str:
            try:
                held.connect(target)
            except OSError:
                held.bind(target)
            return "done"

        return try_each(targets, move)

    return held_sockets(one)


@attempt("sockets", "reach its own listening sockets as a client by their path")
def _() -> str:
    def one(held: socket.socket) -> str:
        name = held.getsockname()
        if not name:
            raise Denied("it has no name")
        return f"{name!r}: {connect_unix(name)}"

    return held_sockets(one)


@attempt("sockets", "read the names and makers of held sockets (a host path, a host pid)")
def _() -> str:
    def one(held: socket.socket) -> str:
        pid, uid, gid = struct.unpack(
            "=iII", held.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        )
        return f"named {held.getsockname()!r}, made by pid {pid} uid {uid} gid {gid}"

    return held_sockets(one)


@attempt("sockets", "get a pidfd of the peer of a held socket (SO_PEERPIDFD)")
def _() -> str:
    def one(held: socket.socket) -> str:
        answer = held.getsockopt(socket.SOL_SOCKET, 77, 4)
        fd = struct.unpack("=i", answer)[0]
        call("pidfd_send_signal", fd, 0, None, 0)
        return "a pidfd that takes signals"

    return held_sockets(one)
