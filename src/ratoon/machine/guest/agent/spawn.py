"""Starting a program: as whom, where, with what for input and output."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import subprocess

from ..shared import wire

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .users import User

NOT_EXECUTABLE, NOT_FOUND = 126, 127
ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "USER": "root",
    "LOGNAME": "root",
    "SHELL": "/bin/sh",
    "LANG": "C.UTF-8",
}
# include/uapi/asm-generic/ioctls.h; the module `termios` would be loaded for them alone.
TIOCSCTTY = 0x540E
TIOCSWINSZ = 0x5414


#: Programs whose `-c` has a script for its argument.
SHELLS = ("ash", "bash", "dash", "ksh", "sh", "zsh")
#: Characters of one argument, whatever they are: the kernel takes 128 KiB (MAX_ARG_STRLEN), and of
#: all together a quarter of the stack.
PIECE = 32 * 1024 - 1
JOINED = "ratoon_script"


class StartError(Exception):
    """The program could not be started; `exit_code` is a shell's for this case, 126 or 127.

    `nowhere`: it is the directory that it was to start in which cannot be entered.
    """

    def __init__(self, program: str, cwd: str, error: OSError) -> None:
        self.errno = error.errno
        self.exit_code = NOT_FOUND if isinstance(error, FileNotFoundError) else NOT_EXECUTABLE
        self.nowhere = error.filename == cwd
        what = f"cannot enter the directory {cwd}" if self.nowhere else f"cannot execute {program}"
        way_out = ""
        if error.errno == errno.E2BIG:
            way_out = " (of one 128 KiB, of all 2 MiB): give it more in a file, or as input"
        super().__init__(f"{what}: {error.strerror}{way_out}")


class Started:
    """A program that runs, and the agent's ends of what it reads from and writes to.

    The descriptors are whoever's who has this; none of them blocks.
    """

    def __init__(
        self, pid: int, stdin: int | None, outputs: list[tuple[int, int]], slave: int | None
    ) -> None:
        self.pid = pid
        self.stdin = stdin
        #: Descriptors, and the kind of frame that each feeds.
        self.outputs = outputs
        #: The program's own end of its terminal, where it has one; the others are the other end.
        #: Kept open while it runs: a terminal that nobody has open reads as ended.
        self.slave = slave


def start(
    argv: list[str],
    *,
    env: dict[str, str],
    cwd: str,
    user: User | None,
    with_stdin: bool,
    terminal: tuple[int, int] | None,
    first: Callable[[], None] | None = None,
) -> Started:
    """Start `argv`; raises StartError if the program is missing or cannot be executed.

    `terminal`: rows and columns of a new one, for input and output. `first`: what the child does
    beforehand, as root.
    """
    prepare, becomes = (_take_terminal if terminal is not None else None), user
    if first is not None:
        prepare, becomes = _all_of_it(first, prepare, user), None
    ours: list[int] = []
    theirs: list[int] = []
    slave = None
    try:
        if terminal is not None:
            master, slave = os.openpty()
            ours += [master, slave]
            ours.append(os.dup(master))
            resize(master, *terminal)
            if user is not None:
                os.fchown(slave, user.uid, user.gid)
            pid = _start(argv, env, cwd, becomes, [slave, slave, slave], prepare)
            outputs = [(master, wire.STDOUT)]
            stdin: int | None = ours[2]
        else:
            for _ in ("stdout", "stderr"):
                read, write = os.pipe2(os.O_CLOEXEC)
                ours.append(read)
                theirs.append(write)
            read = subprocess.DEVNULL
            if with_stdin:
                read, write = os.pipe2(os.O_CLOEXEC)
                ours.append(write)
                theirs.append(read)
            if user is not None:  # by name they can be opened by who owns them: /dev/stdout
                for fd in theirs:
                    os.fchown(fd, user.uid, user.gid)
            pid = _start(argv, env, cwd, becomes, [read, *theirs[:2]], prepare)
            outputs = [(ours[0], wire.STDOUT), (ours[1], wire.STDERR)]
            stdin = ours[2] if with_stdin else None
    except BaseException as error:
        for fd in ours:
            os.close(fd)
        if isinstance(error, OSError):
            raise StartError(argv[0], cwd, error) from None
        raise
    finally:
        for fd in theirs:
            os.close(fd)
    for fd in ours:
        if fd != slave:  # which is the program's as well
            os.set_blocking(fd, False)
    return Started(pid, stdin, outputs, slave)


def resize(terminal: int, rows: int, columns: int) -> None:
    fcntl.ioctl(terminal, TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


def _start(
    argv: list[str],
    env: dict[str, str],
    cwd: str,
    user: User | None,
    stdio: list[int],
    prepare: Callable[[], None] | None,
) -> int:
    try:
        return _execute(argv, env, cwd, user, stdio, prepare)
    except OSError as error:
        pieces = in_pieces(argv) if error.errno == errno.E2BIG else None
        if pieces is None:
            raise
        return _execute(pieces, env, cwd, user, stdio, prepare)


def in_pieces(argv: list[str]) -> list[str] | None:
    """The same for a shell whose script is longer than an argument can be; None if it is no such.

    The script comes in several arguments, and what puts it together leaves nothing of that.
    """
    if os.path.basename(argv[0]) not in SHELLS or len(argv) < 3 or not _is_script(argv[1]):
        return None
    shell, option, script, *others = argv
    pieces = [script[at : at + PIECE] for at in range(0, len(script), PIECE)]
    numbers = "".join(f"${{{number}}}" for number in range(1, len(pieces) + 1))
    join = f'{JOINED}={numbers}; shift {len(pieces)}; eval "unset {JOINED}; ${JOINED}"'
    name, *others = others or [shell]
    return [shell, option, join, name, *pieces, *others]


def _is_script(option: str) -> bool:
    return option[:1] == "-" and option[1:].isalpha() and option.endswith("c")


def _execute(
    argv: list[str],
    env: dict[str, str],
    cwd: str,
    user: User | None,
    stdio: list[int],
    prepare: Callable[[], None] | None,
) -> int:
    # Nothing is inherited that is not meant to be, and so vfork will do: a fork would make every
    # page of the agent copied on write, here and then in each fork of the sandbox. Another user or
    # a terminal take a fork all the same.
    started = subprocess.Popen(
        argv,
        stdin=stdio[0],
        stdout=stdio[1],
        stderr=stdio[2],
        cwd=cwd,
        env={**ENVIRONMENT, **env},
        start_new_session=True,
        close_fds=False,
        user=user.uid if user else None,
        group=user.gid if user else None,
        extra_groups=user.groups if user else None,
        preexec_fn=prepare,  # noqa: PLW1509  there is one thread
    )
    started.returncode = 0  # it is the loop that waits for it, as for all children
    return started.pid


def _take_terminal() -> None:
    """In the child: the terminal becomes its session's, for signals and job control."""
    fcntl.ioctl(0, TIOCSCTTY, 0)


def _all_of_it(
    first: Callable[[], None], then: Callable[[], None] | None, user: User | None
) -> Callable[[], None]:
    """What a child does that has work to do as root: `Popen` would make it the user before."""

    def prepare() -> None:
        first()
        if then is not None:
            then()
        if user is not None:
            os.setgroups(user.groups)
            os.setgid(user.gid)
            os.setuid(user.uid)

    return prepare
