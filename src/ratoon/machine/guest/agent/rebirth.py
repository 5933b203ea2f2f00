"""What makes a fork an individual: randomness, clock and names, before anything else runs."""

from __future__ import annotations

import fcntl
import os
import struct
import time

from ..shared import wire
from .bound import ROOM, make_room
from .connections import Connections, destroy
from .hooks import find_hooks, find_host_keys, renew_host_keys, run_hooks
from .names import Names
from .network import Network

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .evaluator import Evaluator
    from .freezer import Freezer
    from .groups import Groups

#: Seconds for the kernel to be done with what has just exited (RCU): each fork would do it again.
SETTLE = 0.02

# include/uapi/linux/random.h
RNDADDENTROPY = 0x40085203
RNDRESEEDCRNG = 0x5207


class Identity:
    """Who this guest is.

    Made before the agent enters the sandbox's root. Every file is held open: they are out of the
    sandbox's reach, and a fork has no time to look them up.
    """

    def __init__(self, evaluator: Evaluator, freezer: Freezer, groups: Groups) -> None:
        self._evaluator = evaluator
        self._freezer = freezer
        self._groups = groups
        self._random = _open("/dev/random", os.O_WRONLY)
        self._connections = Connections()
        #: What a fork of this state has to do besides, as was found when it was frozen.
        self._chores: Chores | None = None

    def move_in(self) -> None:
        """In the sandbox's root: what it finds there of who it is, and of where it leads."""
        make_room()
        self._instance_id = _open(f"{ROOM}/instance-id", os.O_WRONLY | os.O_CREAT)
        self._names = Names()
        self._network = Network()

    def rebirth(self, message: bytes) -> None:
        """Do as `message` says (see wire.REBIRTH_FIELDS), then let processes run.

        They stay frozen for a rehearsal, and if it fails: Refusal names the hook, or what it was.
        """
        what, unix_ns, machine_id, entropy = wire.REBIRTH_FIELDS.unpack_from(message)
        kind, online = what & ~wire.ONLINE, bool(what & wire.ONLINE)
        pool = struct.pack("ii", len(entropy) * 8, len(entropy)) + entropy
        fcntl.ioctl(self._random, RNDADDENTROPY, pool)
        fcntl.ioctl(self._random, RNDRESEEDCRNG)
        self.set_clock(unix_ns)
        if online != self._network.online:
            self._network.switch(online)
        if self._chores is not None and self._chores.lost:
            destroy(self._chores.lost)
        if kind != wire.RESUME:
            self._become(message[wire.REBIRTH_FIELDS.size :], machine_id, kind)
        if kind != wire.REHEARSAL:
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
            for pid in self._freezer.newcomers():  # what they have left running
                self._freezer.admit(pid)
        self._evaluator.reborn(*chores.interpreter)

    def freeze(self, timeout: float) -> bool:
        """Stop all processes; False if some still ran after `timeout` seconds, or run again."""
        deadline = time.monotonic() + timeout
        self._groups.prepare()
        if not self._freezer.freeze(deadline):
            return False
        self._chores = Chores(self._evaluator, self._names)
        if self._network.online:
            self._chores.lost = self._connections.look()
        return self._freezer.freeze(deadline, SETTLE)

    def thaw(self) -> None:
        self._chores = None
        self._freezer.thaw()


class Chores:
    """What only some forks have to do, found out beforehand: in most of them it is nothing."""

    def __init__(self, evaluator: Evaluator, names: Names) -> None:
        names.look()
        self.host_keys = find_host_keys()
        self.hooks = find_hooks()
        self.interpreter = evaluator.look()
        #: Connections that it has not; nor has a resume.
        self.lost: list[bytes] = []


def _open(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC)
