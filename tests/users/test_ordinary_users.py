"""Without root: the daemon of an ordinary user, with his own id alone and with subordinate ones."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path

import httpx2
import pytest

import small_images
from daemon_kills import kill_under_load
from daemon_process import daemon
from network_lab import HOST, LOOPBACK, METADATA, OTHER, WORLD, Service, ip, opened_lab, reaches
from oci_images import Layout, file, layer
from ratoon import paths
from ratoon.machine.guest.build import build_guest

pytestmark = [
    pytest.mark.vm,
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else"),
]

FOR_EVER = 300
LAUNCHER = Path(__file__).parents[1] / "ordinary_user.py"
RATOON = Path(sys.executable).with_name("ratoon")
LENT = 65535
#: Of this run alone: another one has others.
UID = 0x60000000 + os.getpid() % 4096 * (LENT + 1)
#: In a guest, with whoever is at the other end.
TALK = "echo hello; read -r line; echo heard $line >&2"
LOCK = ".local/share/ratoon/daemon.lock"
COUNTS = {0: [1], LENT: [1, LENT]}


class User:
    """Who has a home, and runs `ratoon` there."""

    def __init__(self, home: Path, lent: int) -> None:
        self.home, self.lent = home, lent
        #: A resolv.conf of his own.
        self.nameservers: Path | None = None

    @property
    def launcher(self) -> list[str | Path]:
        """What runs a program as this user."""
        launcher = (sys.executable, LAUNCHER, str(UID), self.home, str(self.lent), "--")
        if self.nameservers:
            script = 'mount --bind "$0" /etc/resolv.conf; exec "$@"'
            return ["unshare", "--mount", "sh", "-c", script, self.nameservers, *launcher]
        return [*launcher]

    def run(self, *argv: str | Path) -> subprocess.CompletedProcess[str]:
        # The PATH that Debian gives one: without root's programs.
        clean = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": str(self.home), "LANG": "C.UTF-8"}
        clean["XDG_RUNTIME_DIR"] = str(self.home / "run")
        return subprocess.run(
            [*self.launcher, *argv],
            check=False,
            env=clean,
            capture_output=True,
            text=True,
            timeout=FOR_EVER,
        )

    def ratoon(self, *words: str | Path) -> str:
        """What it prints; it must succeed."""
        done = self.run(RATOON, *words)
        assert done.returncode == 0, (words, done.stdout, done.stderr)
        return done.stdout.strip()

    def fails(self, *words: str) -> str:
        """What it says of why."""
        done = self.run(RATOON, *words)
        assert done.returncode, (words, done.stdout)
        return " ".join(done.stderr.split())

    @property
    def daemon(self) -> int:
        (lock,) = self.home.glob(LOCK)
        return int(lock.read_text())


def processes() -> list[int]:
    """Those of the user and of his subordinate ids."""
    found = []
    for place in Path("/proc").iterdir():
        if place.name.isdecimal():
            try:
                uid = place.stat().st_uid
            except FileNotFoundError:
                continue
            if UID <= uid <= UID + LENT:
                found.append(int(place.name))
    return found


@pytest.fixture(scope="module", params=[0, LENT], ids=["own id", "subordinate ids"])
def user(request: pytest.FixtureRequest) -> Iterator[User]:
    """Who has a base, made of an image of busybox alone; nothing of his is left in the end."""
    assert processes() == []
    with tempfile.TemporaryDirectory(prefix="rt-") as name:
        home = Path(name)
        user = User(home, request.param)
        (home / "run").mkdir()
        layout = Layout(home / "image")
        users = b"root:x:0:0::/:/bin/sh\nnobody:x:65534:65534::/:/bin/sh\n"
        layout.add([layer([*small_images.busybox(), file("etc/passwd", users)])])
        build_guest()  # what all guests need is to be read by whoever there is
        (home / ".cache/ratoon").mkdir(parents=True)
        for kind in ("guest", "packages"):
            (home / ".cache/ratoon" / kind).symlink_to(paths.cache() / kind)
        for place in (home, *home.rglob("*")):
            os.chown(place, UID, UID, follow_symlinks=False)
        try:
            image = layout.reference()
            user.ratoon("from-image", image, "--tag", "base", "--mem-size-mib", "160")
            yield user
        finally:
            for pid in processes():
                os.kill(pid, signal.SIGKILL)
            until(lambda: processes() == [])


def test_whole_life(user: User) -> None:
    """Also of a daemon that is killed: the next one has its sandboxes."""
    sandbox = user.ratoon("run", "-d", "base", "--", "sleep", "1000")
    ids = Path(f"/proc/{user.daemon}/uid_map").read_text().split()
    assert [int(count) for count in ids[2::3]] == COUNTS[user.lent]
    assert user.ratoon("exec", sandbox, "sh", "-c", "echo hello; id -u") == "hello\n0"
    assert user.ratoon("exec", "-u", "nobody", sandbox, "id", "-u") == "65534"
    user.ratoon("exec", sandbox, "busybox", "touch", "/kept")
    user.ratoon("snapshot", "--from-sandbox", sandbox, "--tag", "kept")
    user.ratoon("standby", sandbox)
    user.ratoon("resume", sandbox)
    user.ratoon("exec", sandbox, "busybox", "rm", "/kept")
    user.ratoon("reset", sandbox)
    assert user.ratoon("exec", sandbox, "busybox", "ls", "/kept") == "/kept"
    assert user.ratoon("run", "kept", "--", "busybox", "ls", "/kept") == "/kept"
    os.kill(user.daemon, signal.SIGKILL)
    assert user.ratoon("exec", sandbox, "busybox", "ls", "/kept") == "/kept"
    (socket,) = user.home.glob("run/ratoon/*/daemon.sock")
    with httpx2.Client(transport=httpx2.HTTPTransport(uds=str(socket))) as api:
        layers = api.get(f"http://ratoon/v1/sandboxes/{sandbox}").json()["layers"]
    missing = [name for name, holds in layers.items() if not holds]
    assert missing == ([] if user.lent else ["user"])
    user.ratoon("kill", sandbox)


async def test_networks(user: User) -> None:
    """Also of a daemon that is killed; published ports are the host's. Then nothing is left."""
    out, over_there = Service(WORLD, 80), Service(OTHER, 80)
    asked, second = Service("127.0.0.53", 53, "udp"), Service("192.0.2.77", 80)
    home = [Service(HOST, 80), second, Service(METADATA, 80)]
    user.nameservers = user.home / "resolv.conf"
    user.nameservers.write_text("nameserver 127.0.0.53\n")
    await end_daemon(user)
    try:
        async with opened_lab() as lab, AsyncExitStack() as offers:
            ip("address add 192.0.2.77/24 dev eth0")
            for namespace, services in (
                (lab.host, [asked, *home[:2]]),
                (lab.world, [out, over_there, home[2]]),
            ):
                await offers.enter_async_context(lab.offering(namespace, *services))

            async def ratoon(*words: str) -> str:
                return await asyncio.to_thread(user.ratoon, *words)

            async def answers(sandbox: str, service: Service, patience: int = FOR_EVER) -> bool:
                talk = f"nc {service.address} {service.port} -e sh -c '{TALK}'"
                limited = f"busybox timeout {patience} busybox {talk} 2>&1 || true"
                return "heard hello" in await ratoon("exec", sandbox, "sh", "-c", limited)

            async def ask_for_a_name(sandbox: str) -> None:
                words = "busybox timeout 5 busybox nslookup example.org 10.0.2.3 || true"
                await ratoon("exec", sandbox, "sh", "-c", words)

            free = await ratoon(
                *("run", "-d", "--network", "outbound", "-p", "8080:80", "base", "--"),
                *("busybox", "nc", "-ll", "-p", "80", "-e", "cat"),
            )
            bound = await ratoon(
                *("run", "-d", "--network", f"allow:{OTHER}:80", "base", "--", "sleep", "1000")
            )
            for _ in range(2):
                assert await answers(free, out)
                while not lab.heard[asked]:  # UDP may get lost
                    await ask_for_a_name(free)
                assert await answers(bound, over_there)
                lab.heard.clear()
                for service in home:
                    assert not await answers(free, service, 3)
                for service in (*home, out):
                    assert not await answers(bound, service, 3)
                await ask_for_a_name(bound)
                assert not lab.heard
                assert await reaches(lab.host, Service(LOOPBACK, 8080))
                os.kill(user.daemon, signal.SIGKILL)
            await ratoon("kill", free, bound)
            checks = json.loads(await ratoon("doctor", "--quick", "--json"))
            assert [each["state"] for each in checks if each["name"] == "network"] == ["ok"]
            await end_daemon(user)
            assert processes() == []
            assert not [*user.home.glob("run/ratoon/*/world")]
    finally:
        user.nameservers = None


async def end_daemon(user: User) -> None:
    """Until it is gone, if there is one."""
    if [*user.home.glob(LOCK)] and user.daemon in processes():
        os.kill(user.daemon, signal.SIGTERM)
    async with asyncio.timeout(FOR_EVER):
        while processes():
            await asyncio.sleep(0.05)


def test_doctor_tells_what_there_is(user: User) -> None:
    done = user.run(RATOON, "doctor", "--quick", "--json")
    assert done.returncode == 0  # sandboxes can run
    found = {each["name"]: each for each in json.loads(done.stdout)}
    state = "ok" if user.lent else "warn"
    assert (found["user"]["state"], found["jail"]["state"]) == (state, state)
    assert ("usermod --add-subuids=" in found["user"]["todo"]) == (not user.lent)
    # Of what control groups hold, none is this user's.
    assert found["limits"]["state"] == "warn"
    assert found["limits"]["found"].startswith("pids, by the users") == bool(user.lent)


def test_volumes(user: User) -> None:
    """What is the user's is root's in the guest; other ids there are his subordinate ones."""
    shared = user.home / "shared"
    shared.mkdir(mode=0o755)
    (shared / "file").write_text("of the host\n")
    for place in shared, shared / "file":
        os.chown(place, UID, UID)
    options = ("-v", f"{shared}:/shared", "-v", "named:/named")
    sandbox = user.ratoon("run", "-d", *options, "base", "--", "sleep", "1000")

    def sh(script: str, *options: str) -> str:
        script = f"{{ {script}; }} 2>&1 || true"
        return user.ratoon("exec", *options, sandbox, "sh", "-c", script)

    assert sh("busybox stat -c '%u %g' /shared /shared/file /named") == "0 0\n" * 2 + "0 0"
    assert sh("read x </shared/file; echo $x", "-u", "nobody") == (
        "of the host" if user.lent else "sh: can't open /shared/file: Permission denied"
    )
    sh("echo of the guest >/shared/new; busybox mkdir /shared/open; busybox chmod 777 /shared/open")
    assert (shared / "new").stat().st_uid == UID
    said = sh("busybox chown 1000:1000 /shared/new")
    assert said == ("" if user.lent else "chown: /shared/new: Operation not permitted")
    assert (shared / "new").stat().st_uid == UID + (1000 if user.lent else 0)
    sh("umask 333; echo mine >/shared/open/mine", "-u", "nobody")  # with a mode that denies it
    made = [(each.stat().st_uid, each.read_text()) for each in (shared / "open").iterdir()]
    assert made == ([(UID + 65534, "mine\n")] if user.lent else [])
    # What is another's of the host seems to be nobody's in the guest, and is not.
    (shared / "theirs").write_text("not for nobody\n")
    os.chown(shared / "theirs", 0, UID)
    (shared / "theirs").chmod(0o640)
    assert sh("busybox stat -c %u /shared/theirs") == "65534"
    assert sh("read x </shared/theirs; echo $x") == "not for nobody"
    assert "Permission denied" in sh("read x </shared/theirs", "-u", "nobody")
    # Whoever has a file open goes on with it, whatever becomes of its name and of the daemon.
    writes = "exec 3>>/shared/open/log; while echo x >&3; do busybox sleep 0.1; done"
    user.ratoon("exec", "-d", sandbox, "sh", "-c", writes)
    grows(shared / "open/log")
    os.kill(user.daemon, signal.SIGKILL)
    (shared / "open").rename(shared / "renamed")
    user.ratoon("ls")  # another daemon
    grows(shared / "renamed/log")
    assert sh("echo kept >/named/file; read x </named/file; echo $x") == "kept"
    user.ratoon("kill", sandbox)
    read = ("sh", "-c", "read x </named/file; echo $x")
    assert user.ratoon("run", "-v", "named:/named:ro", "base", "--", *read) == "kept"
    user.ratoon("volume", "rm", "named")


def grows(file: Path) -> None:
    before = file.stat().st_size if file.exists() else 0
    until(lambda: file.exists() and file.stat().st_size > before)


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + FOR_EVER
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_the_jail_holds(user: User) -> None:
    """A program in QEMU's place gets what is listed, and no more."""
    found = json.loads(user.run(RATOON, "doctor", "--attack", "--json").stdout)
    assert found["surprises"] == []
    assert sum(row["denied"] for row in found["groups"]) > 300


def test_an_engine_in_a_process_of_ones_own(user: User) -> None:
    script = "from ratoon.client.sync.client import Client; Client.embedded().fork('base')"
    said = user.run(sys.executable, "-c", script).stderr
    assert "HostError" in said
    assert "without root, run `ratoon serve`" in said


def test_a_daemon_that_is_killed_under_load(user: User, soak: bool) -> None:
    """With it the machines, which are what holds the user namespace."""
    user.ratoon("ls")  # it has a daemon
    os.kill(user.daemon, signal.SIGKILL)
    (runtime,) = user.home.glob("run/ratoon/*")
    store = user.home / ".local/share/ratoon"
    starts = partial(daemon, store, runtime, by=user.launcher, more={"HOME": str(user.home)})
    kill_under_load(starts, 50 if soak else 1, store)
    assert [*(store / "sandboxes").iterdir(), *(store / "staging").iterdir()] == []
    until(lambda: processes() == [])
