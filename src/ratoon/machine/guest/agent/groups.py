"""A control group for each command, below the sandbox's: what it has started can end with it.

Whatever session or process group that is in, and however fast it forks. A group whose command has
ended is used again once it is empty: to make one takes longer than to enter it. One is kept ready,
so that no fork has to make its first, and no more, as each takes descriptors of the agent's.
"""

from __future__ import annotations

import os

from .freezer import PAGE, SANDBOX, TOP, move, numbers

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .freezer import Freezer

#: As the kernel describes a group in which nothing is, and that takes what it is given.
EMPTY = b"populated 0\nfrozen 0\n"

#: How often it is looked for what a command has started before it was in its group: mostly once.
PASSES = 100


class Groups:
    """Made before the agent enters the sandbox's root, where its files are out of reach."""

    def __init__(self, freezer: Freezer) -> None:
        self._freezer = freezer
        self._directory = os.open(f"{TOP}/{SANDBOX}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._made = 0
        #: Empty, for the next command.
        self._ready: Group | None = None
        #: Their commands have ended; what those have left running may be in them.
        self._left: list[Group] = []

    def admit(self, pid: int) -> Group | None:
        """Give a group to what was just started, and to what that has started before it was in it.

        None: the sandbox has seen to it that none can be had. It is among all the others then.
        """
        for find in (self._find, self._make):
            try:
                group = find()
            except OSError:  # there are to be no more
                break
            try:
                group.take(pid)
                for _ in range(PASSES):  # what is not in it yet may start others meanwhile
                    newcomers = [*self._freezer.newcomers()]
                    for each in newcomers:
                        group.take(each)
                    if not newcomers:
                        break
            except OSError:  # it was removed, or is to have groups alone
                group.remove()
                continue
            return group
        self._freezer.admit(pid)
        return None

    def give_back(self, group: Group) -> None:
        """Its command has ended."""
        self._left.append(group)

    def prepare(self) -> None:
        """Have one ready, and no more: forks take over all that there are."""
        self._sort()
        if self._ready is None:
            try:
                self._ready = self._make()
            except OSError:  # there are to be none
                pass

    def _find(self) -> Group:
        if self._ready is None:
            self._sort()
        found, self._ready = self._ready, None
        return found or self._make()

    def _sort(self) -> None:
        """Of those that are empty by now, keep one."""
        left, self._left = self._left, []
        for group in left:
            try:
                in_use, of_use = not group.is_empty(), self._ready is None
            except OSError:  # it was removed
                in_use = of_use = False
            if in_use:
                self._left.append(group)
            elif of_use:
                self._ready = group
            else:
                group.remove()

    def _make(self) -> Group:
        while True:
            self._made += 1
            try:
                return Group(f"command-{self._made}", self._directory)
            except FileExistsError:  # the sandbox has one of that name
                continue


class Group:
    """A command's."""

    def __init__(self, name: str, parent: int) -> None:
        os.mkdir(name, dir_fd=parent)
        self._name = name
        self._parent = parent
        self._members = self._open("cgroup.procs", os.O_WRONLY)
        self._events = self._open("cgroup.events", os.O_RDONLY)

    def take(self, pid: int) -> None:
        move(pid, self._members)

    def kill(self) -> None:
        """End all that is in it, and in groups below it, for good (since Linux 5.14)."""
        try:
            fd = self._open("cgroup.kill", os.O_WRONLY)
            try:
                os.write(fd, b"1")
            finally:
                os.close(fd)
        except OSError:  # it was removed
            pass

    def signal(self, number: int) -> None:
        """Send a signal to all that is in it, and in groups below it."""
        try:
            for _, _, _, directory in os.fwalk(self._name, dir_fd=self._parent):
                for pid in _members(directory):
                    try:
                        os.kill(pid, number)
                    except ProcessLookupError:  # it has ended
                        pass
        except OSError:  # it was removed
            pass

    def is_gone(self) -> bool:
        """Whether nothing is in it; nor is it there, if the sandbox has removed it."""
        try:
            return b"populated 0" in os.pread(self._events, PAGE, 0)
        except OSError:
            return True

    def is_empty(self) -> bool:
        """Whether it is fit for another command."""
        return os.pread(self._events, len(EMPTY) + 1, 0) == EMPTY

    def remove(self) -> None:
        os.close(self._members)
        os.close(self._events)
        try:
            os.rmdir(self._name, dir_fd=self._parent)
        except OSError:  # it was removed, or has others in it
            pass

    def _open(self, name: str, flags: int) -> int:
        return os.open(f"{self._name}/{name}", flags | os.O_CLOEXEC, dir_fd=self._parent)


def _members(directory: int) -> set[int]:
    """The processes in a group; none where it is gone, or they count as another one's."""
    try:
        fd = os.open("cgroup.procs", os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory)
        try:
            return numbers(fd)
        finally:
            os.close(fd)
    except OSError:
        return set()
