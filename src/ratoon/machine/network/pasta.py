"""pasta, of passt.top: makes an ordinary user's connections of the packets of a network namespace.

What it is told here holds for its versions from 2023 on.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from contextlib import suppress
from ipaddress import IPv4Address
from pathlib import Path

from ratoon.jail.tree import DYING_WITH_PARENT

#: Its interface in the namespace.
EDGE = "out0"
#: It passes on to the host's nameserver what is asked of this, where nothing else gets to that, as
#: it is on the host. Of a block from which nobody is given addresses (RFC 6890).
RESOLVER = IPv4Address("192.0.0.53")
#: It copies the address and the routes of the host's default interface, lets nobody in, and takes
#: no address for that of the host.
_WORDS = (
    *("--foreground", "--quiet", "--ipv4-only", "--config-net", "--ns-ifname", EDGE),
    *("-t", "none", "-u", "none", "-T", "none", "-U", "none"),
    *("--no-map-gw", "--no-dhcp", "--no-dhcpv6", "--no-ndp", "--no-ra", "--netns-only", "--netns"),
)
#: With this, what the nameserver answers comes from RESOLVER, whomever one has asked.
_FORWARD = ("--dns-forward", str(RESOLVER))
#: What it makes its interface by.
TUN = Path("/dev/net/tun")
#: Its first version says this of each line of its own, where there is no syslog.
_NOISE = "to syslog"


def remedy() -> str | None:
    """What root has to run so that users can open what pasta takes; None: nothing."""
    if not TUN.exists():
        return "modprobe tun"
    if not os.access(TUN, os.R_OK | os.W_OK):
        return f"chmod 0666 {TUN}"
    return None


def trouble() -> str | None:
    """Why it cannot be had here, for the person; None: it can, as far as this tells."""
    if shutil.which("pasta") is None:
        return "pasta is not installed; `ratoon setup` says how to have it"
    if command := remedy():
        return f"pasta cannot open {TUN}; as root: {command}"
    return None


class Pasta:
    """One that runs at the edge of the namespace that `path` is the name of.

    It is killed when the thread ends that has started it. It opens no namespace by /proc.
    """

    def __init__(self, path: Path, *, forward: bool) -> None:
        """`forward`: whether RESOLVER is the host's nameserver."""
        # Nobody need read what it says: what there is no room for it does not say.
        self._said, words = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._process = subprocess.Popen(
            [*DYING_WITH_PARENT, "pasta", *(_FORWARD if forward else ()), *_WORDS, path],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=words,
        )
        os.close(words)
        self._end = os.pidfd_open(self._process.pid)

    def fileno(self) -> int:
        """Of a descriptor that can be read when it has ended."""
        return self._end

    @property
    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def said(self) -> str:
        """What it has complained about."""
        words = b""
        with suppress(BlockingIOError):
            words = os.read(self._said, 2000)
        lines = [each for each in words.decode(errors="replace").splitlines() if each.strip()]
        return "; ".join(each for each in lines if not each.endswith(_NOISE))

    def close(self) -> None:
        """It is gone then."""
        self._process.kill()
        self._process.wait()
        os.close(self._end)
        os.close(self._said)
