"""Where uplinks are laid: the network of this host, if it is ours to change, or one beside it.

An ordinary user's daemon is in the host's network, and may change nothing there. So it has a
namespace in which it may, with a process that keeps it (`world_process`). To what is laid in there,
and by the same code, it is what the host's network is for root.
"""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from ipaddress import IPv4Address
from pathlib import Path
from typing import TypeVar

from ratoon.errors import HostError
from ratoon.machine.network import netns, pasta
from ratoon.machine.network.world_process import WELCOME

T = TypeVar("T")

#: Of the socket in the runtime directory by which a world is found again.
SOCKET = "world"
#: Seconds for its process to begin, or to end; a busy host is slow.
PATIENCE = 90.0
_ROOM = 4096


class World:
    """The host's own network."""

    #: Who is asked for names in place of a nameserver that is out of reach, if somebody is.
    resolver: IPv4Address | None = None

    def run(self, work: Callable[[], T]) -> T:
        """What `work` returns or raises; it is done there, and what it starts is there too."""
        return work()

    def is_there(self) -> bool:
        """Whether it still leads anywhere."""
        return True

    def leave(self) -> None:
        """Have nothing more to do with it: it stays while there are uplinks in it."""

    def close(self) -> None:
        """Leave it, with no uplink in it any more, and wait until what has kept it is gone."""


class KeptWorld(World):
    """One that a process keeps while `line` is open. `child`: it, if this process started it."""

    resolver = pasta.RESOLVER

    def __init__(
        self, namespace: int, line: socket.socket, child: subprocess.Popen[bytes] | None = None
    ) -> None:
        self._namespace = namespace
        self._line = line
        self._child = child

    def run(self, work: Callable[[], T]) -> T:
        return netns.inside(self._namespace, work)

    def is_there(self) -> bool:
        hung_up = select.poll()
        hung_up.register(self._line, select.POLLRDHUP)
        return not hung_up.poll(0)

    def leave(self) -> None:
        self._line.close()
        os.close(self._namespace)

    def close(self) -> None:
        os.close(self._namespace)
        with self._line as line, suppress(OSError):  # it is gone already, or hangs
            line.shutdown(socket.SHUT_WR)
            line.recv(1)
        if self._child:
            self._child.kill()
            self._child.wait()


def find(directory: Path) -> World | None:
    """The world that there is: the host's, or what a daemon before this one has left in use.

    `directory`: the runtime directory of its store.
    """
    if netns.is_ours():
        return World()
    line = _line()
    try:
        line.connect(str(directory / SOCKET))
        namespace, _ = _receive(line)
    except OSError:  # nobody is there
        namespace = None
    if namespace is None:
        line.close()
        return None
    world = KeptWorld(namespace, line)
    try:
        world.run(lambda: None)
    except PermissionError:  # it is of another user namespace, and ends with that
        world.leave()
        return None
    return world


def make(directory: Path) -> World:
    """A world for who is not root, until it is closed. HostError: what is missing for that."""
    if trouble := pasta.trouble():
        raise HostError(trouble)
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = directory / SOCKET
    path.unlink(missing_ok=True)
    line = _line()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        line.connect(str(path))
        program = [sys.executable, "-P", "-m", "ratoon.machine.network.world_process"]
        child = subprocess.Popen(
            [*program, str(listener.fileno()), path],
            pass_fds=[listener.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            cwd="/",
        )
    try:
        namespace, said = _receive(line)
    except OSError as error:
        namespace, said = None, f"its process has not begun: {error}"
    if namespace is None:
        line.close()
        child.kill()
        child.wait()
        path.unlink(missing_ok=True)
        raise HostError(said or "its process ended without a word")
    return KeptWorld(namespace, line, child)


def _line() -> socket.socket:
    line = socket.socket(socket.AF_UNIX)
    line.settimeout(PATIENCE)
    return line


def _receive(line: socket.socket) -> tuple[int | None, str]:
    """The namespace, or what is said instead."""
    said, fds, _, _ = socket.recv_fds(line, _ROOM, 1, socket.MSG_CMSG_CLOEXEC)
    return (fds[0], "") if said == WELCOME and fds else (None, said.decode(errors="replace"))
