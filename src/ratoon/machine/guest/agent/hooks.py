"""What a sandbox does itself to become a new individual: new host keys, and its hooks.

All of it runs while the sandbox's other processes stand still.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import time

from .spawn import ENVIRONMENT
from .stream import Refusal

HOOKS = "/etc/ratoon/rebirth.d"
HOST_KEYS = "/etc/ssh"
#: Seconds for one program; a key takes as long as its prime numbers.
HOOK_TIMEOUT = 10.0
KEY_TIMEOUT = 50.0
#: Bytes of a program's stderr that are told of, if it fails.
STDERR_KEPT = 1000
CHUNK = 64 * 1024


def find_hooks(directory: str = HOOKS) -> list[str]:
    """The executables in `directory`, in the order of their names."""
    paths = [os.path.join(directory, name) for name in _names(directory)]
    return [path for path in paths if os.path.isfile(path) and os.access(path, os.X_OK)]


def find_host_keys(directory: str = HOST_KEYS) -> list[str]:
    """The private host keys of an ssh server."""
    return [
        os.path.join(directory, name)
        for name in _names(directory)
        if name.startswith("ssh_host_") and name.endswith("_key")
    ]


def _names(directory: str) -> list[str]:
    try:
        return sorted(os.listdir(directory))
    except OSError:  # there is none
        return []


def renew_host_keys(keys: list[str], host: str) -> None:
    """Remove the keys and make new ones of the same types, where the sandbox has `ssh-keygen`."""
    for key in keys:
        for path in (key, f"{key}.pub"):
            try:
                os.unlink(path)
            except FileNotFoundError:
                pass
    for key in keys:
        kind = os.path.basename(key)[len("ssh_host_") : -len("_key")]
        argv = ["ssh-keygen", "-q", "-t", kind, "-N", "", "-C", f"root@{host}", "-f", key]
        try:
            run(argv, f"ssh-keygen -t {kind}", {}, KEY_TIMEOUT)
        except FileNotFoundError:
            return


def run_hooks(hooks: list[str], variables: dict[str, str], seconds: float = HOOK_TIMEOUT) -> None:
    """Run one after the other, each to its end; the first that fails is the last."""
    for hook in hooks:
        try:
            run([hook], f"rebirth hook {hook}", variables, seconds)
        except OSError as error:
            raise Refusal(f"rebirth hook {hook}: {error.strerror}", "hook-failed") from None


def run(argv: list[str], name: str, variables: dict[str, str], seconds: float) -> None:
    """Run `argv` and wait; Refusal with the end of its stderr if it fails, or takes longer."""
    stderr, write = os.pipe2(os.O_CLOEXEC)
    try:
        started = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=write,
            cwd="/",
            env={**ENVIRONMENT, **variables},
            start_new_session=True,
            close_fds=False,
        )
    except BaseException:
        os.close(stderr)
        raise
    finally:
        os.close(write)
    ended = os.pidfd_open(started.pid)
    try:
        said, in_time = _listen(ended, stderr, time.monotonic() + seconds)
        if not in_time:
            os.killpg(started.pid, signal.SIGKILL)
        code = started.wait()
    finally:
        os.close(ended)
        os.close(stderr)
    if in_time and not code:
        return
    if not in_time:
        problem = f"took longer than {seconds:g} s"
    else:
        problem = f"was killed by signal {-code}" if code < 0 else f"exited with {code}"
    reason = said.decode(errors="replace").strip()
    raise Refusal(f"{name} {problem}" + (f": {reason}" if reason else ""), "hook-failed")


def _listen(ended: int, stderr: int, deadline: float) -> tuple[bytes, bool]:
    """The end of what a program writes until it ends, and whether that is before `deadline`.

    Not until the end of its stderr: a child that goes on may hold it.
    """
    os.set_blocking(stderr, False)
    poll = select.poll()
    for fd in (ended, stderr):
        poll.register(fd, select.POLLIN)
    tail = b""
    while True:
        left = deadline - time.monotonic()
        ready = dict(poll.poll(left * 1e3)) if left > 0 else {}
        if stderr in ready or ended in ready:
            try:
                data = os.read(stderr, CHUNK)
            except BlockingIOError:
                data = b""
            tail = (tail + data)[-STDERR_KEPT:]
        if ended in ready or not ready:
            return tail, ended in ready
        if not data:  # nobody writes any more
            poll.unregister(stderr)
