"""What makes a fork an individual: randomness, clock and names, before anything else runs."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import time

from . import wire

#: Where the sandbox's root file system is, seen from the initramfs.
SYSROOT = "/sysroot"
CGROUPS = "/sys/fs/cgroup"

#: Seconds for the kernel to be done with what has just exited (RCU): each fork would do it again.
SETTLE = 0.02

# include/uapi/linux/random.h
RNDADDENTROPY = 0x40085203
RNDRESEEDCRNG = 0x5207


class Identity:
    """Who this guest is, and whether its processes run.

    Made before the agent enters the sandbox's root. Every file is held open: they are out of the
    sandbox's reach, and a fork has no time to look them up. The agent is in a cgroup of its own;
    what it starts begins there and is moved to the sandbox's, which can be frozen.
    """

    def __init__(self) -> None:
        self._random = _open("/dev/random", os.O_WRONLY)
        # Files in memory, made by init; the first is bound over the sandbox's /etc/machine-id.
        self._machine_id = _open(f"{SYSROOT}/run/ratoon/machine-id", os.O_WRONLY)
        self._instance_id = _open(f"{SYSROOT}/run/ratoon/instance-id", os.O_WRONLY)
        self._freeze = _open(f"{CGROUPS}/sandbox/cgroup.freeze", os.O_WRONLY)
        self._events = _open(f"{CGROUPS}/sandbox/cgroup.events", os.O_RDONLY)
        self._members = _open(f"{CGROUPS}/sandbox/cgroup.procs", os.O_WRONLY)
        self._newcomers = _open(f"{CGROUPS}/agent/cgroup.procs", os.O_RDWR)
        os.write(self._newcomers, b"0")

    def rebirth(self, message: bytes) -> None:
        """Take on the identity in `message` (see wire.REBIRTH_FIELDS), then let processes run."""
        unix_ns, machine_id, entropy = wire.REBIRTH_FIELDS.unpack_from(message)
        name = message[wire.REBIRTH_FIELDS.size :]
        pool = struct.pack("ii", len(entropy) * 8, len(entropy)) + entropy
        fcntl.ioctl(self._random, RNDADDENTROPY, pool)
        fcntl.ioctl(self._random, RNDRESEEDCRNG)
        time.clock_settime_ns(time.CLOCK_REALTIME, unix_ns)
        socket.sethostname(name.decode())
        os.pwrite(self._machine_id, machine_id + b"\n", 0)
        os.pwrite(self._instance_id, name + b"\n", 0)
        self.thaw()

    def admit(self, pid: int) -> None:
        """Move a process that the agent has started to the sandbox's cgroup."""
        try:
            os.write(self._members, str(pid).encode())
        except ProcessLookupError:  # it has ended already
            pass

    def freeze(self, timeout: float) -> bool:
        """Stop the sandbox's processes; False if not all had stopped within `timeout` seconds."""
        os.write(self._freeze, b"1")
        deadline = time.monotonic() + timeout
        while self._admit_newcomers() or b"frozen 1" not in os.pread(self._events, 4096, 0):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.0005)
        time.sleep(SETTLE)
        return True

    def thaw(self) -> None:
        os.write(self._freeze, b"0")

    def _admit_newcomers(self) -> bool:
        """Move what a process started before it was admitted itself; False if there was nothing."""
        pids = os.pread(self._newcomers, 65536, 0).split()
        strays = [int(pid) for pid in pids if int(pid) != os.getpid()]
        for pid in strays:
            self.admit(pid)
        return bool(strays)


def _open(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC)
