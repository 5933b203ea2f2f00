"""Loops in a guest that count by host name, in whatever control groups they have moved to."""

from __future__ import annotations

import asyncio
import struct

from vm_helpers import sh

from ratoon.engine.sandbox.sandbox import Sandbox
from ratoon.errors import GuestFileNotFound

#: Counts, for each host name, how often it has looked at it, in memory that it shares with a file.
LOOP = r"""
import ctypes, itertools, mmap, os, socket, struct, subprocess, sys, threading, time

TOP = "/mnt/groups"
SLOT = struct.Struct("56sQ")
case, *groups = sys.argv[1:]
with open(f"/dev/shm/{case}", "w+b") as file:
    file.truncate(4096)
    memory = mmap.mmap(file.fileno(), 4096)

def move(group, file="cgroup.procs", who="0"):
    with open(f"{group}/{file}", "w") as members:
        members.write(who)

def make(group):
    os.makedirs(group, exist_ok=True)
    return group

def count():
    name = socket.gethostname().encode()
    at = 0
    while True:
        known, counted = SLOT.unpack_from(memory, at)
        if known.rstrip(b"\0") in (name, b""):
            SLOT.pack_into(memory, at, name, counted + 1)
            return
        at += SLOT.size

def count_for_ever():
    while True:
        count()

def clone_into(group):
    # struct clone_args: CLONE_INTO_CGROUP, SIGCHLD
    fields = (1 << 33, 0, 0, 0, 17, 0, 0, 0, 0, 0, group)
    arguments = struct.pack("11Q", *fields)
    return ctypes.CDLL(None).syscall(435, arguments, len(arguments))

if case == "mover":
    for group in itertools.cycle(groups):
        move(group)
        count()
elif case == "maker":
    for number in itertools.count():
        move(make(f"{TOP}/made-{number}"))
        if number:
            os.rmdir(f"{TOP}/made-{number - 1}")
        count()
elif case == "namespace":
    move(TOP)
    ctypes.CDLL(None).unshare(0x02000000)  # CLONE_NEWCGROUP
    own = make("/mnt/own")
    subprocess.run(["mount", "-t", "cgroup2", "none", own], check=True)
    move(make(f"{own}/elsewhere"))
    count_for_ever()
elif case == "thread":
    move(TOP)
    move(make(f"{TOP}/threaded"), "cgroup.type", "threaded")
    def run():
        move(f"{TOP}/threaded", "cgroup.threads")
        count_for_ever()
    threading.Thread(target=run).start()
elif case == "descent":
    fds = [os.open(make(group), os.O_RDONLY) for group in groups]
    for fd in itertools.cycle(fds):
        if clone_into(fd):
            os._exit(0)
        for _ in range(20):
            count()
else:
    for group in groups:
        move(make(group))
    count_for_ever()
"""

#: What runs, and where it goes.
CASES = {
    "nested": "/mnt/groups/sandbox/nested",
    "beside": "/mnt/groups/beside",
    "below-beside": "/mnt/groups/above/below",
    "root": "/mnt/groups",
    "agent": "/mnt/groups/agent",
    "relay": "/mnt/groups/volumes",
    "below-agent": "/mnt/groups/agent/below",
    "namespace": "",
    "thread": "",
    "maker": "",
    "mover": "/mnt/groups /mnt/groups/agent /mnt/groups/beside /mnt/groups/volumes",
    "descent": "/mnt/groups /mnt/groups/sandbox /mnt/groups/agent",
}


async def start(sandbox: Sandbox, *cases: str) -> None:
    """Have them run, and each be where it goes."""
    await sandbox.files.write("/root/loop.py", LOOP.encode())
    await sh(sandbox, "mkdir -p /mnt/groups; mount -t cgroup2 none /mnt/groups")
    for case in cases:
        command = f"setsid python3 /root/loop.py {case} {CASES[case]}"
        await sh(sandbox, f"{command} </dev/null >/root/{case}.log 2>&1 &")
    await sh(sandbox, "mkdir -p /mnt/groups/beside")
    await until_counting(sandbox, *cases)


async def counts(sandbox: Sandbox, case: str) -> dict[str, int]:
    """By host name, how often it was looked at."""
    try:
        memory = await sandbox.files.read(f"/dev/shm/{case}")
    except GuestFileNotFound:
        return {}
    slots = (struct.unpack_from("56sQ", memory, at) for at in range(0, len(memory) - 63, 64))
    return {name.rstrip(b"\0").decode(): count for name, count in slots if count}


async def until_counting(sandbox: Sandbox, *cases: str) -> None:
    """Wait until each has counted on under the name that the sandbox has."""
    for case in cases:
        before = (await counts(sandbox, case)).get(sandbox.id, 0)
        for _ in range(2400):
            if (await counts(sandbox, case)).get(sandbox.id, 0) > before:
                break
            await asyncio.sleep(0.05)
        else:
            log = await sandbox.files.read(f"/root/{case}.log")
            raise AssertionError(f"{case} does not run: {log.decode()}")
