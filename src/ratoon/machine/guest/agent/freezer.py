"""Whoever runs in the guest stands still while it is captured, and in a fork until it is reborn.

The freezer of cgroup v2 stops a group with all that is below it. But groups are root's to make and
to enter, and root is who runs in a sandbox: what is to be stopped may be in a group beside the
sandbox's, in the root group, which cannot be frozen, or in those of the agent and its helpers,
which must not be. So all are looked through, again and again, until nothing that runs is found.
"""

from __future__ import annotations

import os
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

TOP = "/sys/fs/cgroup"
#: Groups that are not frozen, made by init; what is below them is.
UNFROZEN = ("", "agent", "volumes")
#: Made by init as well, and one that is made where the first takes nobody.
SANDBOX, BESIDE = "sandbox", "sandbox-too"
#: How many groups there are but for those below the sandbox's, while init has made all of them.
MADE = len(UNFROZEN)  # with the sandbox's for the root group
#: Seconds between two looks: while something runs, and when nothing was found.
HURRY, LEISURE = 0.0005, 0.01
#: Seconds that something may run until kernel threads are looked for: their groups never freeze.
PATIENCE = 0.1
#: A pid below is not given a second time (kernel/pid.c).
RESERVED_PIDS = 300
PAGE = 4096
PF_KTHREAD = 0x00200000  # include/linux/sched.h


class Freezer:
    """Made before the agent enters the sandbox's root.

    Files are held open: they are out of the sandbox's reach, and a fork has no time to look them
    up. The agent is in a group of its own; what it starts begins there and is admitted to the
    sandbox's.
    """

    def __init__(self) -> None:
        self._proc = os.open("/proc", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self._unfrozen = [Unfrozen(os.path.join(TOP, name)) for name in UNFROZEN]
        self._root, self._agent = self._unfrozen[:2]
        self._sandbox = Group(SANDBOX, self._root.directory)
        self._members = _open(f"{SANDBOX}/cgroup.procs", os.O_WRONLY, self._root.directory)
        self._stats = [
            _open(f"{name}/cgroup.stat", os.O_RDONLY, self._root.directory)
            for name in (SANDBOX, ".")
        ]
        #: By inode; those that the sandbox has made are known from a freeze until the thaw.
        self._inode = os.stat(SANDBOX, dir_fd=self._root.directory).st_ino
        self._groups = {self._inode: self._sandbox}
        #: What was frozen here, and not by the sandbox itself.
        self._frozen: list[Group] = []
        #: Processes that go on: the agent, and its helpers.
        self.spared = {os.getpid()}
        self._kernel_threads: set[int] = set()
        self._is_first = False
        self._agent.take(os.getpid())

    def admit(self, pid: int) -> None:
        """Move a process that the agent has started to the sandbox's group, or to one beside it.

        Mostly it has a group of its own there: see `groups.py`.
        """
        try:
            move(pid, self._members)
        except OSError:  # it was removed, or has controllers for the groups below: it is for them
            self._take_beside(pid)

    def newcomers(self) -> Iterator[int]:
        """What a process that the agent has started has started itself, before it was moved."""
        return self._strays(self._agent)

    def freeze(self, deadline: float, still: float = 0) -> bool:
        """Stop all processes; whether nothing has run for `still` seconds.

        False: something ran at `deadline` (monotonic), and stops when it can. In either case what
        was frozen remains so until `thaw`, and it may be called again.
        """
        self._kernel_threads = {pid for pid in self._kernel_threads if pid < RESERVED_PIDS}
        if os.getpid() not in self._agent.threads():  # it would stop itself
            self._agent.take(os.getpid())
        begun = since = time.monotonic()
        released = False
        try:
            while True:
                quiet = self._look()
                now = time.monotonic()
                if quiet and now >= since + still:
                    return True
                if not quiet:
                    since = now
                    if now > deadline:
                        return False
                    if now > begun + PATIENCE and not released:
                        released = True
                        self._release_kernel_threads()
                time.sleep(LEISURE if quiet else HURRY)
        finally:
            self._be_one_of_many()

    def thaw(self) -> None:
        """Let everything go on that was frozen here."""
        for group in self._frozen:
            group.thaw()
        self._frozen.clear()
        if len(self._groups) > 1:
            del self._groups[self._inode]
            for group in self._groups.values():
                group.close()
            self._groups = {self._inode: self._sandbox}

    def _look(self) -> bool:
        """Stop what is found to run; whether nothing was.

        That is to be so for a while. Who moves from group to group may be missed by one look; and a
        group with members and with groups below says that it is frozen as soon as those are.
        """
        quiet = True
        for inode, name, parent in self._groups_there():
            quiet &= self._stop(inode, name, parent)
        for place in list(self._unfrozen):
            for pid in self._strays(place):
                quiet = False
                self._be_first()
                self._capture(pid)
        return quiet

    def _groups_there(self) -> Iterator[tuple[int, str, int]]:
        """All that can be frozen, but for those below another one: inode, name, parent's fd."""
        made_none = len(self._unfrozen) == len(UNFROZEN) and self._sandbox.exists()
        if made_none:
            below_sandbox, all_of_them = (_descendants(stat) for stat in self._stats)
            if all_of_them - below_sandbox == MADE:
                yield self._inode, SANDBOX, self._root.directory
                return
        going_on = [place.inode for place in self._unfrozen]
        for place in self._unfrozen:
            for inode, name in place.below():
                if inode not in going_on:
                    yield inode, name, place.directory

    def _stop(self, inode: int, name: str, parent: int) -> bool:
        """Freeze a group; whether that was so already."""
        try:
            group = self._groups.get(inode)
            if group is None:
                self._be_first()
                group = self._groups[inode] = Group(name, parent)
            if group.is_to_stop():
                return group.has_stopped()
            if group not in self._frozen:
                self._frozen.append(group)
            group.freeze()
        except OSError:  # it is gone; or else it is met again
            pass
        return False

    def _strays(self, place: Unfrozen) -> Iterator[int]:
        """Threads in an unfrozen group that are not to go on."""
        try:
            threads = place.threads()
        except OSError:  # the sandbox has removed it
            self._unfrozen.remove(place)
            return
        for thread in threads - self.spared - self._kernel_threads:
            if self._is_kernel_thread(thread):
                self._kernel_threads.add(thread)
            else:
                yield thread

    def _capture(self, pid: int) -> None:
        """Move a stray where it is stopped; not where the sandbox has done so: it would stay so."""
        try:
            if self._sandbox in self._frozen:
                self.admit(pid)
            else:
                self._take_beside(pid)
        except OSError:  # met again, if it is still there
            pass

    def _take_beside(self, pid: int) -> None:
        try:
            os.mkdir(BESIDE, dir_fd=self._root.directory)
        except FileExistsError:
            pass
        members = _open(f"{BESIDE}/cgroup.procs", os.O_WRONLY, self._root.directory)
        try:
            move(pid, members)
        finally:
            os.close(members)

    def _is_kernel_thread(self, pid: int) -> bool:
        """Or one that has ended."""
        try:
            stat = _open(f"{pid}/stat", os.O_RDONLY, self._proc)
            try:
                fields = os.read(stat, 4096).rpartition(b")")[2].split()
            finally:
                os.close(stat)
        except (FileNotFoundError, ProcessLookupError):
            return True
        return bool(int(fields[6]) & PF_KTHREAD)

    def _release_kernel_threads(self) -> None:
        """Give the root group back what some take from it, with all else that is in it."""
        for path, _, _, directory in os.fwalk(".", dir_fd=self._root.directory):
            if path == ".":
                continue
            try:
                threads = _open("cgroup.threads", os.O_RDONLY, directory)
                try:
                    found = numbers(threads)
                finally:
                    os.close(threads)
                for thread in filter(self._is_kernel_thread, found):
                    self._root.take(thread)
            except OSError:  # it is gone
                continue
        for group in self._frozen:  # the next look freezes it, and then it is counted anew
            group.thaw()

    def _be_first(self) -> None:
        """Let nobody run while this looks: a fork bomb, or who keeps moving, would be ahead of it.

        It has a timer of the kernel run in each fork, and so it is for those who need it.
        """
        if not self._is_first:
            os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
            self._is_first = True

    def _be_one_of_many(self) -> None:
        if self._is_first:
            os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
            self._is_first = False


class Unfrozen:
    """A group whose members go on, as far as they are to be there, and nothing below it does."""

    def __init__(self, path: str) -> None:
        self.directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self.inode = os.fstat(self.directory).st_ino
        # Not `cgroup.procs`: that has those of threaded groups below as well, or cannot be read.
        self._threads = _open("cgroup.threads", os.O_RDONLY, self.directory)
        self._members = _open("cgroup.procs", os.O_WRONLY, self.directory)

    def below(self) -> list[tuple[int, str]]:
        """The inodes and names of the groups in it."""
        try:
            with os.scandir(self.directory) as entries:
                return [(entry.inode(), entry.name) for entry in entries if entry.is_dir()]
        except OSError:  # it was removed
            return []

    def threads(self) -> set[int]:
        return numbers(self._threads)

    def take(self, pid: int) -> None:
        move(pid, self._members)


class Group:
    """A group that can be frozen, with all below it."""

    def __init__(self, name: str, parent: int) -> None:
        self._freeze = _open(f"{name}/cgroup.freeze", os.O_RDWR, parent)
        try:
            self._events = _open(f"{name}/cgroup.events", os.O_RDONLY, parent)
        except BaseException:
            os.close(self._freeze)
            raise

    def exists(self) -> bool:
        try:
            return bool(os.pread(self._freeze, 1, 0))
        except OSError:
            return False

    def is_to_stop(self) -> bool:
        return os.pread(self._freeze, 1, 0) == b"1"

    def has_stopped(self) -> bool:
        return b"frozen 1" in os.pread(self._events, 4096, 0)

    def freeze(self) -> None:
        os.write(self._freeze, b"1")

    def thaw(self) -> None:
        try:
            os.write(self._freeze, b"0")
        except OSError:  # it was removed
            pass

    def close(self) -> None:
        os.close(self._freeze)
        os.close(self._events)


def _open(path: str, flags: int, directory: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC, dir_fd=directory)


def numbers(fd: int) -> set[int]:
    """All in a list of the kernel's."""
    read = b""
    while True:
        more = os.pread(fd, 65536, len(read))
        read += more
        if len(more) < PAGE - 32:  # one read gives a page at most, and whole lines
            return set(map(int, read.split()))


def _descendants(stat: int) -> int:
    """How many groups are below one, by its `cgroup.stat`."""
    return int(os.pread(stat, 64, 0).split(maxsplit=2)[1])


def move(pid: int, members: int) -> None:
    try:
        os.write(members, str(pid).encode())
    except ProcessLookupError:  # it has ended already
        pass
