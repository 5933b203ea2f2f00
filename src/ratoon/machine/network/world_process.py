"""Keeps a world for the daemon of an ordinary user: a process of its own, as that may be killed.

    python -m ratoon.machine.network.world_process LISTENER PATH

A world is a network namespace with pasta at its edge, which connects as any process of this user
does. So what is in there must not reach this host either: what the kernel has as the host's own
addresses is refused, and followed when that changes.

Who connects to the socket LISTENER (a descriptor, bound to PATH) is given the namespace, or told
why there is none. The world is there while somebody is connected, or an uplink is laid in it; then
this ends, and pasta with it, as it does should this be killed. Little is imported here, for it all
stays in memory.
"""

from __future__ import annotations

import json
import selectors
import socket
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

from ratoon import syscalls
from ratoon.artifacts import run
from ratoon.errors import HostError
from ratoon.machine.network.nameserver import (
    INTERVAL,
    RESOLV_CONF,
    first_resolver,
    is_out_of_reach,
)
from ratoon.machine.network.netns import FORWARDING, inside, new_namespace
from ratoon.machine.network.pasta import EDGE, Pasta
from ratoon.syscalls import CLONE_NEWNS, MS_BIND, MS_PRIVATE, MS_REC

#: What a daemon is sent with the namespace.
WELCOME = b"\n"
#: Where the namespace gets a name, for pasta takes no other. The first is where pasta's AppArmor
#: profile lets it have one; the other every host has.
PLACES = (Path("/run/user"), Path("/sys"))
NAME = "0/netns/world"
#: Seconds for pasta to begin, on a busy host.
PATIENCE = 60.0
#: Seconds between attempts at what has failed; and after a change of the host, lest one whose
#: routes change all the time keep this busy.
PAUSE, REST = 1.0, 0.1
#: Of linux/rtnetlink.h: to hear of interfaces, and of routes.
RTMGRP_LINK, RTMGRP_IPV4_ROUTE = 1, 0x40


def rules(host: Iterable[IPv4Network]) -> str:
    """For the world, before those of its uplinks; `host`: addresses that are the host's own.

    Old pastas send segments of TCP without ACK, which are invalid to conntrack: the world would
    take them for its own, and reset the connection.
    """
    refused = ", ".join(str(network) for network in sorted(host))
    return f"""
table inet world
delete table inet world
table inet world {{
    set host {{
        type ipv4_addr; flags interval; auto-merge
        elements = {{ {refused} }}
    }}
    chain prerouting {{
        type filter hook prerouting priority mangle - 1;
        ct state invalid drop
        iifname != "{EDGE}" ip daddr @host goto refuse
    }}
    chain refuse {{
        meta l4proto tcp reject with tcp reset
        reject with icmpx admin-prohibited
    }}
}}
"""


def own_addresses() -> set[IPv4Network]:
    """What the network of this thread takes for itself, broadcasts as well."""
    routes = json.loads(run(["ip", "-json", "-4", "route", "show", "table", "local"]))
    places = {each["dst"] for each in routes if each.get("type", "unicast") != "unicast"}
    return {
        IPv4Network("127.0.0.0/8"),
        *(IPv4Network("0.0.0.0/0" if each == "default" else each) for each in places),
    }


class WorldProcess:
    """The world, and what keeps it. HostError, OSError: there is none to be had."""

    def __init__(self, listener: socket.socket, path: Path) -> None:
        self._listener, self._path = listener, path
        self._bound = path.stat().st_ino
        self._lines: set[socket.socket] = set()
        self._parting: list[socket.socket] = []
        self._selector = selectors.DefaultSelector()
        #: Whether what is refused is what the host has.
        self._is_current = False
        self._namespace = new_namespace()
        inside(self._namespace, _open)
        routes = _netlink(RTMGRP_IPV4_ROUTE)
        links = inside(self._namespace, partial(_netlink, RTMGRP_LINK))
        self._watch(routes, partial(self._host_changed, routes))
        self._watch(links, partial(_drain, links))
        self._refuse_host()
        self._name = _named(self._namespace)
        self._pasta: Pasta | None = None
        #: For whom it has a stand-in.
        self._nameserver: IPv4Address | None = None
        self._begin()

    def _begin(self) -> None:
        pasta = self._start_pasta()
        end = time.monotonic() + PATIENCE
        while not inside(self._namespace, _has_default_route):
            if pasta.has_ended or time.monotonic() > end:
                raise HostError(f"pasta does not begin: {pasta.said() or 'it says nothing'}")
            time.sleep(0.005)

    def keep(self) -> None:
        """Until nobody has a use for it; then remove what there is."""
        self._watch(self._listener, self._welcome)
        self._welcome()  # who started this has connected before
        while self._is_of_use():
            while self._parting:
                self._parting.pop().close()
            for key, _ in self._selector.select(INTERVAL if self._tend() else PAUSE):
                key.data()
        with suppress(FileNotFoundError):
            if self._path.stat().st_ino == self._bound:
                self._path.unlink()
        if self._pasta:
            self._pasta.close()

    def _is_of_use(self) -> bool:
        return bool(self._lines or inside(self._namespace, _uplinks))

    def _tend(self) -> bool:
        """Whether all is as it should be, made so by now if need be."""
        try:
            if self._pasta and _out_of_reach() != self._nameserver:
                self._pasta_ended()  # it has read resolv.conf when it began
            if self._pasta is None:
                time.sleep(PAUSE)
                self._start_pasta()
            if not self._is_current:
                self._refuse_host()
                time.sleep(REST)
        except (HostError, OSError):  # what it takes may be there again later
            return False
        return True

    def _watch(self, file: socket.socket | Pasta, heard: Callable[[], None]) -> None:
        self._selector.register(file, selectors.EVENT_READ, heard)

    def _start_pasta(self) -> Pasta:
        self._nameserver = _out_of_reach()
        self._pasta = Pasta(self._name, forward=self._nameserver is not None)
        self._watch(self._pasta, self._pasta_ended)
        return self._pasta

    def _pasta_ended(self) -> None:
        assert self._pasta
        self._selector.unregister(self._pasta)
        self._pasta.close()
        self._pasta = None

    def _host_changed(self, routes: socket.socket) -> None:
        _drain(routes)
        self._is_current = False

    def _refuse_host(self) -> None:
        text = rules(own_addresses()).encode()
        inside(self._namespace, lambda: run(["nft", "-f", "-"], stdin=text))
        self._is_current = True

    def _welcome(self) -> None:
        line, _ = self._listener.accept()
        self._lines.add(line)
        self._watch(line, partial(self._bid_farewell, line))
        with suppress(OSError):
            socket.send_fds(line, [WELCOME], [self._namespace])

    def _bid_farewell(self, line: socket.socket) -> None:
        """Nobody says anything: it has hung up. It may wait for the end, should this be it."""
        self._selector.unregister(line)
        self._lines.remove(line)
        self._parting.append(line)


def _open() -> None:
    FORWARDING.write_text("1\n")
    run(["ip", "link", "set", "lo", "up"])


def _named(namespace: int) -> Path:
    """A name for it in a mount namespace of this process, which is gone with that."""
    syscalls.unshare(CLONE_NEWNS)
    syscalls.mount("none", "/", None, MS_REC | MS_PRIVATE)
    place = next(each for each in PLACES if each.is_dir())
    syscalls.mount("world", str(place), "tmpfs", 0, "mode=700,size=64k")
    path = place / NAME
    path.parent.mkdir(parents=True)
    path.touch()
    syscalls.mount(f"/proc/self/fd/{namespace}", str(path), None, MS_BIND)
    return path


def _out_of_reach() -> IPv4Address | None:
    """The host's nameserver, if it is reached as another alone."""
    try:
        first = first_resolver(RESOLV_CONF.read_text(errors="replace"))
    except OSError:  # it is being replaced, or there is none
        return None
    return first if first and is_out_of_reach(first) else None


def _has_default_route() -> bool:
    return "\t00000000\t" in Path("/proc/thread-self/net/route").read_text()


def _uplinks() -> set[str]:
    return {name for _, name in socket.if_nameindex()} - {"lo", EDGE}


def _netlink(groups: int) -> socket.socket:
    """A socket on which the changes of this thread's network are heard (netlink(7))."""
    changes = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
    changes.setblocking(False)
    changes.bind((0, groups))
    return changes


def _drain(changes: socket.socket) -> None:
    """What it was is not looked at; and some may be lost, for want of room."""
    while True:
        try:
            changes.recv(65536)
        except BlockingIOError:
            return
        except OSError:  # ENOBUFS
            continue


def main() -> None:
    listener = socket.socket(fileno=int(sys.argv[1]))
    try:
        world = WorldProcess(listener, Path(sys.argv[2]))
    except (HostError, OSError) as error:
        line, _ = listener.accept()
        line.sendall(str(error).encode())
        raise SystemExit(1) from None
    world.keep()


if __name__ == "__main__":
    main()
