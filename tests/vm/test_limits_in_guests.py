"""Control groups of version 2, as a guest's kernel has them: this host may have version 1 alone."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from vm_helpers import FOR_EVER, sh

import ratoon
from ratoon.engine.sandbox.engine import Engine
from ratoon.engine.sandbox.sandbox import Sandbox

#: What the control groups need; it is the standard library's alone.
MODULES = (
    "errors.py",
    "paths.py",
    "syscalls.py",
    "units.py",
    "jail/__init__.py",
    "jail/user_namespace.py",
    "machine/__init__.py",
    "machine/host/__init__.py",
    "machine/host/cgroups.py",
    "machine/host/hierarchies.py",
)

#: Runs in the guest. `beside`: another process is in the group that it starts in. `user`: it is an
#: ordinary user's, in his user namespace, and so are those that it limits.
SCRIPT = """
import json, os, subprocess, sys, time
from pathlib import Path
from types import SimpleNamespace
sys.path.insert(0, "/tmp/library")
from ratoon import syscalls
from ratoon.machine.host.cgroups import Cgroups, remove
from ratoon.units import MIB
from ratoon.machine.host.hierarchies import hierarchies

def be_a_user():
    ready, told = os.pipe()
    go, tell = os.pipe()
    if pid := os.fork():  # root, who stays outside, as newuidmap does
        Path("/sys/fs/cgroup/cgroup.procs").write_text(str(os.getpid()))
        os.read(ready, 1)
        for name in "uid_map", "gid_map":
            Path(f"/proc/{pid}/{name}").write_text("0 1000 1\\n1 100000 65535")
        os.write(tell, b"x")
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    syscalls.become(1000, 1000)
    syscalls.unshare(syscalls.CLONE_NEWUSER)
    os.write(told, b"x")
    os.read(go, 1)
    syscalls.unshare(syscalls.CLONE_NEWNS)

user = sys.argv[1] == "user"
if user:
    be_a_user()
beside = sys.argv[1] == "beside"
if beside:  # of process 1, not of this one
    subprocess.run("sleep 1000 & ", shell=True)
limits = SimpleNamespace(memory_bytes=64 * MIB, cpus=0.5, pids=40, disk_bytes=None)
before = Path("/proc/self/cgroup").read_text().strip()
sandbox = Path("/tmp") / f"sb-{os.getpid()}"
sandbox.mkdir()
cgroup = Cgroups("store", hierarchies()).create(sandbox, limits)
(group,) = cgroup.groups

def inside(script):
    process = subprocess.Popen(
        [sys.executable, "-c", "import sys, threading, time; sys.stdin.readline()\\n" + script],
        stdin=subprocess.PIPE, stderr=subprocess.PIPE, **({"user": 20000} if user else {}),
    )
    cgroup.add(process.pid)
    return process

answer = {
    "before": before,
    "after": Path("/proc/self/cgroup").read_text().strip(),
    "group": str(group.directory),
    "no cause": cgroup.cause_of_death(),
}
threads = inside("wait = threading.Event().wait\\n"
                 "for _ in range(80): threading.Thread(target=wait, daemon=True).start()")
answer["threads"] = "can't start new thread" in threads.communicate(b"go\\n")[1].decode()
answer["pids cause"] = cgroup.cause_of_death()
busy = inside("while True: pass")
busy.stdin.write(b"go\\n")
busy.stdin.flush()
while group.count("cpu.stat", "nr_throttled") < 3:
    time.sleep(0.01)
(group.directory / "cpu.max").write_text("max")
greedy = inside("x = b'x' * (1 << 27)")
greedy.communicate(b"go\\n")
answer["greedy"] = greedy.returncode
answer["memory cause"] = cgroup.cause_of_death()
remove(sandbox)
answer["busy"] = busy.wait()
answer["left"] = [str(path) for path in Path("/sys/fs/cgroup").rglob("sb-*")]
print(json.dumps(answer))
"""


@pytest.fixture
async def guest(engine: Engine) -> AsyncIterator[Sandbox]:
    """A sandbox with this library, and with control groups whose controllers are handed down."""
    archive = io.BytesIO()
    root = Path(ratoon.__file__).parent
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for name in MODULES:
            tar.add(root / name, f"ratoon/{name}")
    async with await engine.fork_one("base") as sandbox:
        script = """
        mount -t cgroup2 cgroup2 /sys/fs/cgroup
        echo +memory +cpu +pids >/sys/fs/cgroup/cgroup.subtree_control
        mkdir /tmp/library; tar x -C /tmp/library; : >/tmp/library/ratoon/__init__.py
        echo "blake3 = None" >/tmp/library/blake3.py  # is imported there, and not used
        """
        await sh(sandbox, script, stdin=archive.getvalue())
        yield sandbox


async def limited(guest: Sandbox, how: str, *, own: str = "") -> dict[str, Any]:
    """What the script finds, started in the group `own`, or where the guest's programs are."""
    enter = f"group=/sys/fs/cgroup{own}; mkdir -p $group; echo $$ >$group/cgroup.procs"
    start = f'{enter if own else ":"}; exec python3 -c "$0" {how}'
    result = await guest.exec(["sh", "-c", start, SCRIPT], timeout=FOR_EVER)
    assert result.exit_code == 0, result
    answer: dict[str, Any] = json.loads(result.stdout)
    assert answer["no cause"] is None
    assert answer["threads"]
    if how != "user":
        assert answer["pids cause"] == "it could not start a thread: 40 are its limit"
    assert answer["greedy"] == -9
    assert answer["memory cause"] == (
        "the kernel killed it at its memory limit of 64.0 MiB; give it a higher one"
    )
    assert answer["busy"] == -9
    assert answer["left"] == []
    return answer


async def test_below_a_group_of_its_own(guest: Sandbox) -> None:
    """It moves down, and makes room for the sandboxes' groups beside it."""
    answer = await limited(guest, "alone", own="/own")
    own = answer["before"].removeprefix("0::")
    assert answer["after"] == f"0::{own}/ratoon-engine"
    assert answer["group"].startswith(f"/sys/fs/cgroup{own}/ratoon/store/sb-")


async def test_below_the_top_where_others_are_in_its_group(guest: Sandbox) -> None:
    answer = await limited(guest, "beside")
    assert answer["after"] == answer["before"]
    assert answer["group"].startswith("/sys/fs/cgroup/ratoon/store/sb-")


async def test_of_an_ordinary_user(guest: Sandbox) -> None:
    """What systemd gives a user: a group of his, here without `pids`, below one that is not."""
    give = """
    cd /sys/fs/cgroup; mkdir -p user/own
    echo +memory +cpu >user/cgroup.subtree_control
    chown 1000:1000 user/own user/own/cgroup.procs user/own/cgroup.subtree_control
    """
    await sh(guest, give)
    answer = await limited(guest, "user", own="/user/own")
    assert answer["after"] == "0::/user/own/ratoon-engine"
    assert answer["group"].startswith("/sys/fs/cgroup/user/own/ratoon/store/sb-")
