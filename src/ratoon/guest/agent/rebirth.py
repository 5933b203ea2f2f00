"""What makes a fork an individual: randomness, clock and names, before anything else runs."""

from __future__ import annotations

import fcntl
import os
import struct
import time

from . import wire
from .hooks import find_hooks, find_host_keys, renew_host_keys, run_hooks
from .names import Names
from .network import Network

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .evaluator import Evaluator

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

    def __init__(self, evaluator: Evaluator) -> None:
        self._evaluator = evaluator
        self._random = _open("/dev/random", os.O_WRONLY)
        # A file in memory, made by init.
        self._instance_id = _open(f"{SYSROOT}/run/ratoon/instance-id", os.O_WRONLY)
        self._freeze = _open(f"{CGROUPS}/sandbox/cgroup.freeze", os.O_WRONLY)
        self._events = _open(f"{CGROUPS}/sandbox/cgroup.events", os.O_RDONLY)
        self._members = _open(f"{CGROUPS}/sandbox/cgroup.procs", os.O_WRONLY)
        self._newcomers = _open(f"{CGROUPS}/agent/cgroup.procs", os.O_RDWR)
        #: What a fork of this state has to do besides, as was found when it was frozen.
        self._chores: Chores | None = None
        os.write(self._newcomers, b"0")

    def move_in(self) -> None:
        """In the sandbox's root: what it finds there of who it is, and of where it leads."""
        self._names = Names()
        self._network = Network()

    def rebirth(self, message: bytes) -> None:
        """Do as `message` says (see wire.REBIRTH_FIELDS), then let processes run.

        They stay frozen if it fails: Refusal names the hook, or what else it was.
        """
        what, unix_ns, machine_id, entropy = wire.REBIRTH_FIELDS.unpack_from(message)
        kind, online = what & ~wire.ONLINE, bool(what & wire.ONLINE)
        pool = struct.pack("ii", len(entropy) * 8, len(entropy)) + entropy
        fcntl.ioctl(self._random, RNDADDENTROPY, pool)
        fcntl.ioctl(self._random, RNDRESEEDCRNG)
        self.set_clock(unix_ns)
        if online != self._network.online:
            self._network.switch(online)
        if kind != wire.RESUME:
            self._become(message[wire.REBIRTH_FIELDS.size :], machine_id, kind)
        self.thaw()

    def set_clock(self, unix_ns: int) -> None:
        """It stood still while the machine was paused, or was a snapshot."""
        time.clock_settime_ns(time.CLOCK_REALTIME, unix_ns)

    def _become(self, name: bytes, machine_id: bytes, kind: int) -> None:
        """Be another one than the snapshot was of."""
        chores = self._chores or Chores(self._evaluator, self._names)
        self._names.become(name, machine_id)
        os.pwrite(self._instance_id, name + b"\n", 0)
        if kind == wire.FORK and (chores.host_keys or chores.hooks):
            renew_host_keys(chores.host_keys, name.decode())
            ids = {"RATOON_INSTANCE_ID": name.decode(), "RATOON_MACHINE_ID": machine_id.decode()}
            run_hooks(chores.hooks, ids)
            self._admit_newcomers()  # what they have left running
        self._evaluator.reborn(*chores.interpreter)

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
        self._chores = Chores(self._evaluator, self._names)
        time.sleep(SETTLE)
        return True

    def thaw(self) -> None:
        self._chores = None
        os.write(self._freeze, b"0")

    def _admit_newcomers(self) -> bool:
        """Move what a process started before it was admitted itself; False if there was nothing."""
        pids = os.pread(self._newcomers, 65536, 0).split()
        strays = [int(pid) for pid in pids if int(pid) != os.getpid()]
        for pid in strays:
            self.admit(pid)
        return bool(strays)


class Chores:
    """What only some forks have to do, found out beforehand: in most of them it is nothing."""

    def __init__(self, evaluator: Evaluator, names: Names) -> None:
        names.look()
        self.host_keys = find_host_keys()
        self.hooks = find_hooks()
        self.interpreter = evaluator.look()


def _open(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC)
