"""Volumes: directories of the host that are mounted in the sandbox, over NFS from a relay.

The host says which there are to be, in an operation of its own after each rebirth. A fork has its
source's mounts in its kernel; those that it is not to have are taken away. The modules that this
takes are loaded when the first volume is mounted, so that guests without any have nothing of it.

What is written reaches the host within a second, as the kernel is told to hurry for as long as
there is a volume to write to, and at once before the machine is captured or ended (`sync`).
"""

from __future__ import annotations

import errno
import os
import signal
import socket
import struct
import time

from . import libc, relay
from .loop import report
from .port import find_port
from .stream import Refusal, Stream, operation

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import NoReturn, Protocol

    from .freezer import Freezer
    from .loop import Loop
    from .stream import Request, Speaker

    #: What is mounted: the root's handle; whether it is read-only; whether only this writes to it.
    What = tuple[bytes, bool, bool]

    class HasVolumes(Speaker, Protocol):
        """The agent, as the stream here sees it."""

        volumes: Volumes
        freezer: Freezer


MODULES = "/modules/volumes"
CGROUP = "/sys/fs/cgroup/volumes"
#: Seconds until a relay that has died is started again.
RESTART = 0.5
#: For how long what was written may wait in memory, and how often that is looked for, in hundredths
#: of a second (Documentation/admin-guide/sysctl/vm.rst). Nobody looks while there is nothing.
PACE = {"dirty_expire_centisecs": b"30", "dirty_writeback_centisecs": b"60"}
#: Seconds for a fork to be rid of what its source has not written.
_PATIENCE = 5.0

# include/uapi/linux/nfs_mount.h: TCP, version 3, no lock daemon, no ACLs, nothing shared between
# mounts (two of one directory may differ in being read-only).
_FLAGS = 0x40 | 0x80 | 0x200 | 0x800 | 0x8000
_TRANSFER = 256 * 1024
#: Tenths of a second, and repetitions, until the kernel complains of a server that is not there.
_TIMEO, _RETRANS = 600, 2
#: Seconds that attributes are believed, at least and at most: the host changes files, too.
_ATTRIBUTES = (1, 3, 1, 3)
#: Of a volume that is written to by nobody else: they are believed for as long, also when a file is
#: opened (nocto), which else is a call each time.
_OWN_FLAGS, _OWN_ATTRIBUTES = 0x10, (3, 3, 3, 3)
#: struct nfs_mount_data, version 6: until `addr`, from there to `root`, and after it.
_MOUNT = struct.Struct("=ii32siiiiiiiii")
_AUTH_SYS = 1


class Volumes:
    """The sandbox's mounts, and the relay that they need. It is the agent's; used by no other."""

    def __init__(self, loop: Loop, spared: set[int]) -> None:
        """`spared`: the processes that go on while all others stand still, for its own."""
        self._loop = loop
        self._spared = spared
        #: Of the initramfs, out of the sandbox's reach; None: there is none.
        self._modules: int | None = None
        self._cgroup: int | None = None
        self._listener: socket.socket | None = None
        #: The kernel's settings of PACE, and what they were before it had to hurry.
        self._settings: dict[str, int] = {}
        self._unhurried: dict[str, bytes] | None = None
        #: The last sync failed: a fork of this has in memory what its source has yet to write.
        self._unsynced = False
        self.mounted: dict[str, What] = {}
        #: Those that are written to, as open directories, wherever they are mounted by now; what
        #: could not be written since the last sync is told by the next one: errseq_t.
        self._written: dict[str, int] = {}

    @property
    def relayed(self) -> bool:
        """Whether anything may wait for the host: a mount, or a file of one that was taken away."""
        return self._listener is not None

    def prepare(self) -> None:
        """Before the agent enters the sandbox's root."""
        self._modules = os.open(MODULES, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self._cgroup = os.open(f"{CGROUP}/cgroup.procs", os.O_WRONLY | os.O_CLOEXEC)
        for name in PACE:
            self._settings[name] = os.open(f"/proc/sys/vm/{name}", os.O_RDWR | os.O_CLOEXEC)

    def become(self, wanted: dict[str, What], *, stale: bool = False) -> None:
        """Have these mounts and no others. Refusal, OSError: one cannot be made, or taken away.

        `stale`: what the kernel knows of them may be older than they are.
        """
        gone = [known for known, what in self.mounted.items() if wanted.get(known) != what]
        if gone and self._unsynced:
            self._sync(_PATIENCE)  # it is answered with errors, and nothing is left then
            self._unsynced = False
        for target in list(self.mounted):
            if any(target == old or target.startswith(f"{old}/") for old in gone):
                del self.mounted[target]
                if target in self._written:
                    os.close(self._written.pop(target))
                _umount(target)
        if stale:
            for target in [known for known, (_, _, own) in self.mounted.items() if own]:
                self._forget(target)
        for target, what in wanted.items():
            if target not in self.mounted:
                self._start()
                try:
                    self._mount(target, *what)
                    if not what[1]:
                        self._written[target] = os.open(target, os.O_RDONLY | os.O_CLOEXEC)
                except OSError as error:
                    raise Refusal(f"{target}: {error.strerror}", "target") from None
                self.mounted[target] = what
        self._hurry(bool(self._written))

    def sync(self, seconds: float) -> str | None:
        """Have the host know all that was written; what went wrong, if anything did.

        A snapshot has nothing then that a fork would write once more, over what is newer.
        """
        problem = self._sync(seconds) if self._written else None
        self._unsynced = problem is not None
        return problem

    def _sync(self, seconds: float) -> str | None:
        pid, deadline = self._start_sync(), time.monotonic() + seconds
        while True:
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                self._spared.discard(pid)
                return _outcome(status)
            if time.monotonic() > deadline:
                self._loop.on_exit(pid, lambda status: self._spared.discard(pid))
                return f"it was not done within {seconds:g} s"
            time.sleep(0.001)

    def begin_sync(self, done: Callable[[str | None], None]) -> None:
        """As `sync`, beside everything else; `done` is told what went wrong."""
        if not self._written:
            done(None)
            return
        pid = self._start_sync()

        def ended(status: int) -> None:
            self._spared.discard(pid)
            done(_outcome(status))

        self._loop.on_exit(pid, ended)

    def _start_sync(self) -> int:
        pid = os.fork()
        if not pid:
            _sync(list(self._written.values()))
        self._spared.add(pid)
        return pid

    def _hurry(self, wanted: bool) -> None:
        """Have the kernel write back soon, or as it did before there was a volume."""
        if wanted and self._unhurried is None:
            before = {name: os.pread(fd, 32, 0) for name, fd in self._settings.items()}
            self._set(PACE)
            self._unhurried = before
        elif not wanted and self._unhurried is not None:
            self._set(self._unhurried)
            self._unhurried = None

    def _set(self, values: dict[str, bytes]) -> None:
        for name, fd in self._settings.items():
            os.pwrite(fd, values[name], 0)

    def _mount(self, target: str, root: bytes, read_only: bool, own: bool) -> None:
        assert self._listener is not None
        os.makedirs(target, exist_ok=True)
        port: int = self._listener.getsockname()[1]
        flags = libc.MS_NOSUID | libc.MS_NODEV | (libc.MS_RDONLY if read_only else 0)
        libc.mount(b"ratoon:/", target, b"nfs", flags, _mount_data(root, port, own))

    def _forget(self, target: str) -> None:
        """Have the kernel ask anew for all of a mount; it does so soon if somebody uses it."""
        held = self._written.pop(target)
        device = os.fstat(held).st_dev
        os.close(held)
        try:
            if os.stat(target).st_dev == device:  # else somebody has mounted something over it
                libc.unmount(target)
                del self.mounted[target]
                return
        except OSError:
            pass
        self._written[target] = os.open(target, os.O_RDONLY | os.O_CLOEXEC)

    # The relay ------------------------------------------------------------------------------------

    def _start(self) -> None:
        """Have modules, a port and a relay; they stay."""
        if self._listener is not None:
            return
        if self._modules is None:
            raise Refusal("this guest has no modules for volumes", "unsupported")
        _load(self._modules)
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        listener.bind(("127.0.0.1", 0))
        listener.listen(4)
        self._listener = listener
        self._start_relay()

    def _start_relay(self) -> None:
        assert self._listener is not None
        pid = os.fork()
        if not pid:
            _relay(self._listener, self._cgroup)
        self._spared.add(pid)
        self._loop.on_exit(pid, lambda status: self._relay_died(pid))

    def _relay_died(self, pid: int) -> None:
        self._spared.discard(pid)
        self._loop.after(RESTART, self._start_relay)


def _relay(listener: socket.socket, cgroup: int | None) -> NoReturn:
    """In the child: nothing of the agent is left but this."""
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        if cgroup is not None:
            os.write(cgroup, b"0")
        os.setsid()
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("-1000")
        kept = listener.fileno()
        os.closerange(3, kept)
        os.closerange(kept + 1, os.sysconf("SC_OPEN_MAX"))
        port = os.open(find_port(relay.PORT_NAME), os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        relay.Relay(port, listener).run()
    except BaseException as error:
        report(error)
    finally:
        os._exit(1)


def _sync(roots: list[int]) -> NoReturn:
    """In a child: if the host does not answer, it is not the agent who waits for ever."""
    number = 0
    try:
        for fd in roots:
            try:
                libc.sync_file_system(fd)
            except OSError as error:
                number = error.errno or errno.EIO
    except BaseException:
        number = errno.EIO
    finally:
        os._exit(number)


def _outcome(status: int) -> str | None:
    """What went wrong with a sync, by the status of its process."""
    code = os.waitstatus_to_exitcode(status)
    return os.strerror(code) if code > 0 else f"it got signal {-code}" if code else None


def _load(directory: int) -> None:
    """Load the modules, in the order of the names that they were given."""
    import zlib  # not before it is needed: it takes pages of every guest

    def opener(name: str, flags: int) -> int:
        return os.open(name, flags, dir_fd=directory)

    with open("order", opener=opener) as order:
        names = order.read().split()
    for name in names:
        with open(name, "rb", opener=opener) as file:
            module = zlib.decompress(file.read())
        try:
            libc.load_module(module, name)
        except FileExistsError:
            pass


def _mount_data(root: bytes, port: int, own: bool) -> bytes:
    flags = _FLAGS | _OWN_FLAGS if own else _FLAGS
    attributes = _OWN_ATTRIBUTES if own else _ATTRIBUTES
    address = struct.pack("=H", socket.AF_INET) + struct.pack(">H", port) + bytes([127, 0, 0, 1])
    numbers = (flags, _TRANSFER, _TRANSFER, _TIMEO, _RETRANS, *attributes)
    return (
        _MOUNT.pack(6, -1, b"", *numbers)
        + address.ljust(16, b"\0")
        + b"host".ljust(256, b"\0")
        + struct.pack("=iI", 255, 0)
        + struct.pack("=H", len(root))
        + root.ljust(64, b"\0")
        + bytes(2)
        + struct.pack("=i", _AUTH_SYS)
        + bytes(260)
    )


def _umount(target: str) -> None:
    """What has files there open keeps them; OSError: nothing is mounted there."""
    try:
        libc.detach(target)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.EINVAL):  # somebody in the guest was sooner
            raise


@operation("volumes")
class Mount(Stream):
    """Have the volumes that the request lists mounted, and no others."""

    agent: HasVolumes

    def start(self, request: Request) -> None:
        wanted = {}
        for volume in request["volumes"]:
            root = bytes.fromhex(volume["root"])
            wanted[volume["target"]] = root, bool(volume["read_only"]), bool(volume["own"])
        self.agent.volumes.become(wanted, stale=request["stale"])
        self.reply()


@operation("sync")
class Sync(Stream):
    """Have the host know what was written to volumes. `halt`: nothing needs to run any more."""

    agent: HasVolumes

    def start(self, request: Request) -> None:
        if request["halt"]:
            self.agent.freezer.freeze(deadline=0)  # tells them, and does not wait
        self.agent.volumes.begin_sync(lambda problem: self.reply(unsynced=problem))
