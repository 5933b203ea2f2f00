"""The names by which a guest finds itself: /etc/hosts, /etc/hostname, /etc/machine-id.

Every look-up of its own name, or of localhost, is answered by a file then, in whatever way the
programs of an image read it. Without that it would be a question to a nameserver.
"""

from __future__ import annotations

import socket

from .bound import BoundFile

#: A name of its own has an address on the loopback, as on Debian: that is there under each network
#: policy, whatever becomes of eth0. The lines come first, because of ::1 the first name counts, and
#: who asks for the full name (getfqdn) asks what ::1 is called.
_OWN = b"127.0.1.1\t%(name)b\n::1\t%(name)b\n"
_LOCALHOST = (
    (b"127.0.0.1", b"localhost"),
    (b"::1", b"localhost ip6-localhost ip6-loopback"),
)


class Names:
    """The files, in the sandbox's root."""

    def __init__(self) -> None:
        self._machine_id = BoundFile("/etc/machine-id")
        self._hostname = BoundFile("/etc/hostname")
        self._hosts = BoundFile("/etc/hosts")
        found = self._hosts.content
        self._hosts.become(_missing(found) + found)

    def look(self) -> None:
        """See what users have made of the files; nothing changes them until the next name."""
        self._machine_id.look()
        self._hostname.look()
        self._hosts.look()

    def become(self, name: bytes, machine_id: bytes) -> None:
        socket.sethostname(name.decode())
        self._machine_id.become(machine_id + b"\n")
        self._hostname.become(name + b"\n")
        self._hosts.begin_with(_OWN % {b"name": name})


def _missing(hosts: bytes) -> bytes:
    """The lines about localhost that `hosts` lacks: twice would be two addresses of one name."""
    known = [line.partition(b"#")[0].split() for line in hosts.splitlines()]
    return b"".join(
        b"%b\t%b\n" % (address, names)
        for address, names in _LOCALHOST
        if not any(words[:1] == [address] and b"localhost" in words[1:] for words in known)
    )
