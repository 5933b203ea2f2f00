"""Making the attempts, each in a child, and printing how they went."""

from __future__ import annotations

import fcntl
import importlib
import json
import os
import select
import signal
import sys
import time
from typing import Any

from ratoon.jail.attack.attempts import ATTEMPTS, Attempt, Denied, error_name, reason_of
from ratoon.jail.attack.calls import HANG_SECONDS
from ratoon.jail.attack.targets import AT_START, T

PARENT_SECONDS = 7

#: The modules that have attempts, in the order in which these are made.
MODULES = (
    *("host_files", "new_files", "descriptors", "processes", "namespaces", "credentials"),
    *("sockets", "held_sockets", "kernel", "exhaustion", "own"),
)


def say(line: dict[str, Any]) -> None:
    data = (json.dumps(line) + "\n").encode()
    while data:
        try:
            data = data[os.write(1, data) :]
        except BlockingIOError:
            select.select([], [1], [])


def outcome(one: Attempt) -> tuple[str, str]:
    try:
        return "allowed", one.run() or "done"
    except Exception as error:
        return "denied", reason_of(error)


def reap() -> None:
    """Orphans come to us where we are process 1."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except OSError:
        pass


def in_fork(one: Attempt) -> tuple[str, str]:
    """Run an attempt in a child; how it ends says what it did not."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        signal.alarm(HANG_SECONDS)
        answer = json.dumps(outcome(one)).encode() + b"\n"
        os.write(writer, answer)
        os._exit(0)
    os.close(writer)
    data = b""
    end = time.monotonic() + PARENT_SECONDS
    while not data.endswith(b"\n"):
        left = end - time.monotonic()
        if left <= 0 or not select.select([reader], [], [], left)[0]:
            break
        part = os.read(reader, 1 << 16)
        if not part:
            break
        data += part
    os.close(reader)
    if not data.endswith(b"\n") and time.monotonic() >= end:
        os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    reap()
    if data.endswith(b"\n"):
        got, how = json.loads(data)
        return got, how
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number in (signal.SIGALRM, signal.SIGKILL) and time.monotonic() > end - 3:
            return "denied", "hung"
        return "denied", f"killed by {signal.Signals(number).name}"
    return "denied", f"ended with {os.WEXITSTATUS(status)} and no answer"


def on_signal(number: int, _frame: object) -> None:
    if number == signal.SIGALRM:
        raise Denied("hung")
    raise Denied(f"stopped by {signal.Signals(number).name}")


def in_process(one: Attempt) -> tuple[str, str]:
    """Without fork: a kill ends everything, so say on stderr what is being tried."""
    try:
        os.write(2, f"trying: {one.name}\n".encode())
    except OSError:
        pass
    signal.alarm(HANG_SECONDS)
    try:
        return outcome(one)
    finally:
        signal.alarm(0)
        before = -1
        for fd in [*AT_START, 110_000]:  # close what the attempt left open
            if fd > before + 1:  # an empty range would close everything
                os.closerange(before + 1, fd)
            before = fd


def can_fork() -> str:
    """Empty if a child can be made, else why not."""
    try:
        pid = os.fork()
    except OSError as error:
        return error_name(error.errno)
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return ""


def main() -> None:
    """Make them; the first argument of the command line says what they aim at."""
    T.take(json.loads(sys.argv[1]))
    for module in MODULES:
        importlib.import_module(f"ratoon.jail.attack.{module}")
    for fd in range(4096):
        try:
            fcntl.fcntl(fd, fcntl.F_GETFD)
        except OSError:
            continue
        AT_START.append(fd)
    chosen = [one for one in ATTEMPTS if not T.only or one.name in T.only]
    chosen = [one for one in chosen if one.name not in T.skip]
    why = "asked for" if T.in_process else can_fork()
    if why:
        for number in (signal.SIGALRM, signal.SIGSYS):
            signal.signal(number, on_signal)
        chosen.sort(key=lambda one: (one.sticky, one.group == "namespaces"))
    for one in chosen:
        got, how = in_process(one) if why else in_fork(one)
        say({"group": one.group, "name": one.name, "got": got, "how": how[:400]})
    say({"done": True, "in_process": why} if why else {"done": True})
