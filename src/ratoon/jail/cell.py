"""Starting a program in a cell: by a thread that gives up all it has, starts it, and ends.

Namespaces, credentials and filters belong to a thread, and are inherited by what it starts. So no
helper program stands between the daemon and the process: it is the daemon's own child.
"""

from __future__ import annotations

import gc
import os
import random
import resource
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TypeVar

from ratoon import syscalls
from ratoon.errors import HostError
from ratoon.jail import user_namespace
from ratoon.jail.steps import ROOT, STEPS, Going
from ratoon.jail.tree import DYING_WITH_PARENT, LIBRARIES, NULL
from ratoon.syscalls import (
    CLONE_FILES,
    CLONE_FS,
    CLONE_NEWNS,
    MOUNT_ATTR_NODEV,
    MOUNT_ATTR_NOEXEC,
    MOUNT_ATTR_NOSUID,
    MOUNT_ATTR_RDONLY,
    MS_BIND,
    MS_NODEV,
    MS_NOSUID,
    MS_PRIVATE,
    MS_RDONLY,
    MS_REC,
    MS_REMOUNT,
)

T = TypeVar("T")

#: How files are mounted that are given by their descriptors: to be written, to be read.
LENT = MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC
GIVEN = LENT | MOUNT_ATTR_RDONLY
#: What no program in a cell needs more of. Tasks: a thread for each processor, those that read and
#: write disks (64 at most), and some of its own.
LIMITS = {
    resource.RLIMIT_NOFILE: 4096,
    resource.RLIMIT_NPROC: 256,
    resource.RLIMIT_CORE: 0,
    resource.RLIMIT_MEMLOCK: 0,
    resource.RLIMIT_MSGQUEUE: 0,
    resource.RLIMIT_SIGPENDING: 1024,
}
#: The system's: who runs in this process may have seeded Python's, and count on it.
_random = random.SystemRandom()
#: How often, before all are gone through.
_DRAWS = 64
_NOSUID_NODEV = MS_NOSUID | MS_NODEV
_PR_SET_DUMPABLE = 4


@dataclass(frozen=True)
class Inmate:
    """A program that is to run in a cell; its path is the one that it has there.

    `mounts`: files, by where they are mounted to be read; `lent`, to be written: they belong to it
    from then on. `descriptors` are inherited; `input`, `output` and `errors` are its standard
    streams: /dev/null, and the same for both, unless they are given. `network`: a network
    namespace, None for an empty one. `limits`: of setrlimit(2), soft and hard, where they are not
    those of LIMITS. All files are descriptors. Unless it `survives`, it dies with this process.
    `name` is its host name, by which it can be found (see `inmates`).
    """

    words: Sequence[str]
    output: int
    errors: int | None = None
    input: int | None = None
    mounts: Mapping[str, int] = field(default_factory=dict)
    lent: Mapping[str, int] = field(default_factory=dict)
    descriptors: Sequence[int] = ()
    network: int | None = None
    limits: Mapping[int, int] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    survives: bool = True
    name: str = "cell"


class Cell:
    """A mount namespace that has a tree (see `tree`) and nothing else. HostError: not to be made.

    Each program that is started in it has a copy of that namespace.
    """

    def __init__(self, tree: Path) -> None:
        try:
            self._namespace = in_own_thread(lambda: _namespace_of(tree))
        except OSError as error:
            raise HostError(
                f"no cell can be made for programs ({error.strerror}): without root, run `ratoon "
                "serve`, and use its daemon; in a container have CAP_SYS_ADMIN"
            ) from error

    def __enter__(self) -> Cell:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Nothing more is started in it; what was, stays as it is."""
        os.close(self._namespace)

    def start(self, inmate: Inmate) -> subprocess.Popen[bytes]:
        """Start a program; blocks for some milliseconds.

        LostName: a file that is to be mounted was removed meanwhile. HostError: all users are
        taken, or files cannot be lent. OSError.
        """
        with ExitStack() as held:
            mounts, uid = {}, _unused_uid()
            for files, attributes in ((inmate.mounts, GIVEN), (inmate.lent, LENT)):
                for place, fd in files.items():
                    mounts[place] = syscalls.detached_mount(fd, attributes)
                    held.callback(os.close, mounts[place])
            if uid is not None:
                for place, fd in inmate.lent.items():
                    _lend(place, fd, uid)
            going = Going(self._namespace, mounts, inmate.network, uid, inmate.name)
            started: Future[subprocess.Popen[bytes]] = Future()
            thread = threading.Thread(
                target=_Entry(going, inmate, started).run, name="cell", daemon=True
            )
            with _collector.held():
                thread.start()
                try:
                    return started.result()
                finally:
                    if inmate.survives:
                        thread.join()


class _Entry:
    """The thread that goes in."""

    def __init__(
        self, going: Going, inmate: Inmate, started: Future[subprocess.Popen[bytes]]
    ) -> None:
        self._going = going
        self._inmate = inmate
        self._started = started

    def run(self) -> None:
        try:
            process = self._start()
        except BaseException as error:
            self._started.set_exception(error)
            return
        pid = process.pid
        _close_all_but()
        self._started.set_result(process)
        if not self._inmate.survives:
            # What a process asks for with PR_SET_PDEATHSIG is the end of the thread it is from.
            # This calls for nothing that Python's collector would look at, so it does not run here.
            with suppress(ChildProcessError):  # it has been waited for
                os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)

    def _start(self) -> subprocess.Popen[bytes]:
        inmate = self._inmate
        syscalls.unshare(CLONE_FS | CLONE_FILES)
        standard = inmate.input, inmate.output, inmate.errors
        null = os.open("/dev/null", os.O_RDWR)
        for step in STEPS:
            step.take(self._going)
        # The table of descriptors is this thread's own by now.
        _close_all_but(null, *(fd for fd in standard if fd is not None), *inmate.descriptors)
        for fd in inmate.descriptors:
            os.set_inheritable(fd, True)
        process = subprocess.Popen(
            [*([] if inmate.survives else DYING_WITH_PARENT), *inmate.words],
            stdin=null if inmate.input is None else inmate.input,
            stdout=inmate.output,
            stderr=inmate.output if inmate.errors is None else inmate.errors,
            close_fds=False,
            start_new_session=True,
            env={"PATH": "/usr/bin", "LD_LIBRARY_PATH": LIBRARIES, **inmate.environment},
            # SIGXFSZ stays ignored, as Python has it: a write beyond the limit of a file fails
            # then, instead of ending the program.
            restore_signals=False,
        )
        try:
            limits = {**LIMITS, **inmate.limits}
            if self._going.uid is None:
                del limits[resource.RLIMIT_NPROC]  # all of this user's would count
            for limit, most in limits.items():
                _limit(process.pid, limit, most)
        except BaseException:
            process.kill()
            process.wait()
            raise
        # Of the memory that all threads share: a change of user has taken it from them.
        syscalls.prctl(_PR_SET_DUMPABLE, 1)
        return process


def limit_process(pid: int, limit: int, most: int) -> None:
    """Give one that runs a limit, which it can have lower than it is. ProcessLookupError.

    As the user that it is: others take a capability for that which root may lack.
    """

    def change() -> None:
        uid = int(Path(f"/proc/{pid}/status").read_text().partition("\nUid:\t")[2].split()[0])
        if uid:
            syscalls.become(uid, uid)
        _limit(pid, limit, most)
        syscalls.prctl(_PR_SET_DUMPABLE, 1)

    try:
        in_own_thread(change)
    except FileNotFoundError:
        raise ProcessLookupError(f"no process {pid}") from None


def _limit(pid: int, limit: int, most: int) -> None:
    """Soft and hard, unless it is less already."""
    _, hard = resource.prlimit(pid, limit)
    least = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.prlimit(pid, limit, (least, least))


def _lend(place: str, fd: int, uid: int) -> None:
    try:
        os.fchown(fd, uid, uid)
    except OSError as error:  # such as NFS, whose server has never heard of that user
        raise HostError(
            f"{place} cannot be lent to a program with a user of its own ({error.strerror}): set "
            "RATOON_HOME to a directory of a local file system"
        ) from error


def _unused_uid() -> int | None:
    """None: there is nobody but root, in a user namespace of one id. HostError: all are in use."""
    free = user_namespace.free_ids()
    if not free:
        return None
    # At random, so that two who look at the same time do not take the same; in order at last.
    for uid in chain((_random.choice(free) for _ in range(_DRAWS)), free):
        try:
            os.getpriority(os.PRIO_USER, uid)
        except ProcessLookupError:
            return uid
    raise HostError(
        f"all {len(free)} user ids that programs can have here are in use: end some sandboxes, or "
        "have root give this user more subordinate ids (`usermod --add-subuids`)"
    )


def _namespace_of(tree: Path) -> int:
    """A descriptor of a mount namespace in which ROOT is the tree; of a thread of its own."""
    syscalls.unshare(CLONE_FS)
    syscalls.unshare(CLONE_NEWNS)
    namespace = os.open("/proc/thread-self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    try:
        syscalls.mount("none", "/", None, MS_REC | MS_PRIVATE)
        place, root = "/sys", Path(f"/sys{ROOT}")  # any directory that every host has
        syscalls.mount("cell", place, "tmpfs", 0, "mode=555,size=4k")
        root.mkdir()
        syscalls.mount(str(tree), str(root), None, MS_BIND)
        syscalls.mount("none", str(root), None, MS_BIND | MS_REMOUNT | MS_RDONLY | _NOSUID_NODEV)
        syscalls.mount("/dev/null", f"{root}/{NULL}", None, MS_BIND)
        syscalls.mount("none", place, None, MS_REMOUNT | MS_RDONLY | _NOSUID_NODEV)
        os.chdir(place)
        syscalls.leave_root()
    except BaseException:
        os.close(namespace)
        raise
    return namespace


def in_own_thread(function: Callable[[], T]) -> T:
    """What it returns or raises, in a thread that ends then, whatever has become of that."""
    done: Future[T] = Future()

    def run() -> None:
        try:
            done.set_result(function())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return done.result()


def _close_all_but(*kept: int) -> None:
    """In this thread's own table; its standard streams stay."""
    below = 2
    for fd in sorted({*kept, os.sysconf("SC_OPEN_MAX")}):
        os.closerange(below + 1, fd)
        below = max(fd, below)


class _Collector:
    """Python's collector of cycles, held back while somebody needs it to be."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holders = 0
        self._was_on = False

    @contextmanager
    def held(self) -> Iterator[None]:
        with self._lock:
            if not self._holders:
                self._was_on = gc.isenabled()
                gc.disable()
            self._holders += 1
        try:
            yield
        finally:
            with self._lock:
                self._holders -= 1
                if not self._holders and self._was_on:
                    gc.enable()


#: What is freed closes its files: not while a thread has a table of descriptors of its own.
_collector = _Collector()
