"""Programs that people bring: each has a task in a sandbox, is forked at it, and goes on.

They start namespaces, control groups, file systems and firewalls of their own, or are process 1.
Images are built from Debian's packages.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
from vm_helpers import base_of

from ratoon.engine.sandbox.engine import Engine
from ratoon.engine.sandbox.sandbox import Sandbox
from ratoon.machine.guest import commands
from ratoon.units import MIB

Check = Callable[[Sandbox], Awaitable[None]]

#: Seconds for a step: a browser or a container starts, under emulation, on a busy host.
LONG = 900
#: Counts in a file, and goes on from there; as a program, `count FILE`.
COUNT = b"""#!/bin/sh
n=0; test -e $1 && n=$(wc -l <$1)
while :; do n=$((n+1)); echo $n >>$1; sleep 0.05; done
"""
#: Waits until there is more in such a file: nothing was left out, and nothing counted twice.
COUNTED = """
n=$(wc -l <$1); until [ $(wc -l <$1) -gt $n ]; do sleep 0.1; done
n=$(wc -l <$1); seq $n >/tmp/expected; head -n $n $1 | cmp - /tmp/expected
"""


@asynccontextmanager
async def fork_of(engine: Engine, tag: str) -> AsyncIterator[Sandbox]:
    """One that can count."""
    async with await engine.fork_one(tag) as sandbox:
        await sh(sandbox, "cd /usr/local/bin; cat >count; chmod +x count", stdin=COUNT)
        yield sandbox


async def sh(
    sandbox: Sandbox, script: str, *arguments: str, user: str = "root", stdin: bytes = b""
) -> str:
    """What a script prints, no step of which may fail."""
    argv = ["sh", "-ec", script, "sh", *arguments]
    result = await sandbox.exec(argv, user=user, cwd="/tmp", stdin=stdin, timeout=LONG)
    assert result.exit_code == 0, (script, result.stdout[-2000:], result.stderr[-2000:])
    return result.stdout.decode()


async def begin(
    sandbox: Sandbox, argv: list[str], *, user: str = "root", first: bool = False
) -> int:
    """Start a program in the background that says `begun` in a line; its pid. `first`: as that."""
    async with commands.start(
        sandbox, argv, user=user, cwd="/tmp", background=True, own_pids=first
    ) as command:
        said = b""
        while b"begun\n" not in said:
            piece = await asyncio.wait_for(command.read(), LONG)
            assert piece is not None, (said, await command.wait())
            said += piece[1]
        assert command.pid is not None
        return command.pid
    raise AssertionError


async def end(sandbox: Sandbox, pid: int, number: int) -> int:
    """Send a signal to what has begun, which ends by it; its exit code."""
    async with commands.attach(sandbox, pid) as command:
        command.signal(number)
        return (await asyncio.wait_for(command.wait(), LONG)).exit_code


def counts(path: str) -> Check:
    """What counts in a file goes on."""

    async def check(sandbox: Sandbox) -> None:
        await sh(sandbox, COUNTED, path)

    return check


@asynccontextmanager
async def forked_at_work(engine: Engine, source: Sandbox) -> AsyncIterator[list[Sandbox]]:
    """A sandbox, a fork of it at work, and a fork of a branch of it."""
    (fork,) = await engine.fork_sandbox(source)
    assert isinstance(fork, Sandbox)
    async with fork:
        await engine.branch(source, "at-work")
        async with await engine.fork_one("at-work") as other:
            yield [source, fork, other]


async def in_all(engine: Engine, source: Sandbox, check: Check) -> None:
    """`check` holds in a sandbox before it is forked, and in all three then."""
    await check(source)
    async with forked_at_work(engine, source) as sandboxes:
        for sandbox in sandboxes:
            await check(sandbox)


# Those of every run -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
async def small(engine: Engine) -> AsyncIterator[str]:
    async with base_of(engine, "debian+bubblewrap+s6") as tag:
        yield tag


WRAPPED = """
mkdir /tmp/room; cd /tmp/room
exec bwrap --unshare-all --die-with-parent --hostname bubble --ro-bind /usr /usr \
    --symlink usr/bin /bin --symlink usr/lib64 /lib64 --symlink usr/lib /lib \
    --proc /proc --dev /dev --tmpfs /root --bind . /room --chdir /room sh -ec '
        test -w /dev/null; test ! -e /etc/passwd; touch /root/own
        ls -d /proc/[0-9]* | wc -l >seen; hostname >>seen; id -u >>seen
        echo begun; exec count /room/count'
"""


@pytest.mark.parametrize(("user", "uid"), [("root", "0"), ("nobody", "65534")])
async def test_bubblewrap(engine: Engine, small: str, user: str, uid: str) -> None:
    """In namespaces of all kinds, with a /proc and a /dev of its own, and little of the disk."""
    async with fork_of(engine, small) as sandbox:
        await begin(sandbox, ["sh", "-ec", WRAPPED], user=user)
        processes, *seen = (await sh(sandbox, "cat room/seen")).split()
        assert (int(processes) < 6, seen) == (True, ["bubble", uid])
        await in_all(engine, sandbox, counts("/tmp/room/count"))


S6 = """
test $$ = 1
mkdir -p /srv/s6/counter /srv/s6/.s6-svscan; cd /srv/s6
printf '#!/bin/sh\nexec count /srv/count\n' >counter/run; chmod +x counter/run
printf '#!/bin/sh\necho finished\nexit 0\n' >.s6-svscan/finish; chmod +x .s6-svscan/finish
echo begun; exec s6-svscan /srv/s6
"""
S6_RESTARTS = """
cat /proc/1/comm; s6-svwait -u /srv/s6/counter
before=$(s6-svstat -o pid /srv/s6/counter); kill -9 $before
until now=$(s6-svstat -o pid /srv/s6/counter); [ $now -gt $before ]; do sleep 0.1; done
"""


async def test_s6_as_process_1(engine: Engine, small: str) -> None:
    """It supervises what counts, starts it anew when it has died, and ends when it is told to."""

    async def supervises(sandbox: Sandbox) -> None:
        assert await sh(sandbox, S6_RESTARTS) == "s6-svscan\n"
        await sh(sandbox, COUNTED, "/srv/count")

    async with fork_of(engine, small) as sandbox:
        pid = await begin(sandbox, ["sh", "-ec", S6], first=True)
        await in_all(engine, sandbox, supervises)
        assert await end(sandbox, pid, 15) == 0
        assert await sh(sandbox, "cat /proc/[0-9]*/comm | grep -c s6- || :") == "0\n"


# Those of the long runs ---------------------------------------------------------------------------


UNIT = """
mkdir -p /etc/systemd/system/multi-user.target.wants; cd /etc/systemd/system
printf '[Service]\nExecStart=count /srv/count\nRestart=always\nRestartSec=0\n' >counter.service
ln -s ../counter.service multi-user.target.wants
"""
SYSTEMD = "echo begun; exec /lib/systemd/systemd"
SYSTEMD_IS_UP = """
until systemctl is-system-running 2>/dev/null | grep -E 'running|degraded'; do sleep 0.3; done
systemctl list-units --failed --no-legend
"""
SYSTEMD_RESTARTS = """
cat /proc/1/comm; systemctl is-active counter; test -d /run/ratoon/modules
before=$(systemctl show -P MainPID counter); kill -9 $before
until now=$(systemctl show -P MainPID counter); [ $now -gt $before ]; do sleep 0.1; done
journalctl --sync; journalctl -u counter | grep -q 'Main process exited'
"""


@pytest.mark.soak
async def test_systemd_as_process_1(engine: Engine) -> None:
    """It is up with nothing failed, restarts what has died, and powers off when it is told to."""

    async def supervises(sandbox: Sandbox) -> None:
        assert await sh(sandbox, SYSTEMD_RESTARTS) == "systemd\nactive\n"
        await sh(sandbox, COUNTED, "/srv/count")

    async with (
        base_of(engine, "debian+systemd") as tag,
        fork_of(engine, tag) as sandbox,
    ):
        await sh(sandbox, UNIT)
        pid = await begin(sandbox, ["sh", "-c", SYSTEMD], first=True)
        assert await sh(sandbox, SYSTEMD_IS_UP) == "running\n"
        await in_all(engine, sandbox, supervises)
        # SIGRTMIN+4: power off. In a namespace of pids, the kernel has process 1 killed for that.
        assert await end(sandbox, pid, 38) == 128 + 2
        assert (
            await sh(sandbox, "cat /proc/[0-9]*/comm | grep -c -e systemd -e count || :") == "0\n"
        )


CONTAINERS = "debian+busybox-static+docker.io+fuse-overlayfs+iptables+podman+slirp4netns+uidmap"
#: The root of a container, in /tmp/tree; and a user.
TREE = """
mkdir -p tree/bin tree/tmp; cp /bin/busybox /usr/local/bin/count tree/bin; cd tree/bin
for name in cat echo httpd id mkdir sh sleep wc wget; do ln -s busybox $name; done
useradd -m app
"""
WEB = "mkdir /www; echo from a container >/www/index.html; exec httpd -f -h /www"
#: Asks for a page of the guest's loopback.
ASK = "import sys, urllib.request as u; print(u.urlopen(sys.argv[1]).read().decode().strip())"

DOCKERD = """
dockerd >/var/log/dockerd 2>&1 &
until docker version >/dev/null 2>&1; do sleep 0.3; done
tar -C tree -c . | docker import - tree >/dev/null
printf 'FROM tree\nRUN echo built >/built\nCMD ["cat", "/built"]\n' | docker build -q -t built -
docker run -d --name counter -m 32m -v /srv/docker:/kept tree count /kept/count
docker run -d --name web -p 8080:80 tree sh -c "$0"
echo begun; wait
"""
DOCKERD_WORKS = """
docker run --rm built
docker run --rm tree wget -qO- http://$(docker inspect -f '{{.NetworkSettings.IPAddress}}' web)/
python3 -c "$1" http://127.0.0.1:8080/
docker exec counter cat /sys/fs/cgroup/memory.max
"""

PODMAN = """
cd; tar -C /tmp/tree -c . | podman import -q - tree >/dev/null
podman run -d --name counter -v $HOME:/kept tree count /kept/count
podman run -d --name web -p 8081:80 tree sh -c "$0"
echo begun
"""
PODMAN_WORKS = """
cd; podman run --rm tree id -u
podman exec counter cat /proc/self/uid_map | head -n 1
python3 -c "$1" http://127.0.0.1:8081/
"""
#: By a driver of storage: as which file system a container has its root.
STORAGES = {
    'driver = "overlay"': "overlay",
    'driver = "overlay"\n[storage.options.overlay]\nmount_program = "/usr/bin/fuse-overlayfs"': (
        "fuse.fuse-overlayfs"
    ),
}
PODMAN_STORES = """
cd; mkdir -p .config/containers; printf '[storage]\n%s\n' "$1" >.config/containers/storage.conf
tar -C /tmp/tree -c . | podman import -q - tree >/dev/null
podman run --rm tree sh -c 'read -r _ _ kind _ </proc/mounts; echo $kind'
podman system reset -f >/dev/null 2>&1; rm .config/containers/storage.conf
"""


@asynccontextmanager
async def with_tree(engine: Engine) -> AsyncIterator[Sandbox]:
    """One that has dockerd, Podman, and what containers are made of."""
    async with (
        base_of(engine, CONTAINERS, ram=1024, disk=2048) as tag,
        fork_of(engine, tag) as sandbox,
    ):
        await sh(sandbox, TREE)
        yield sandbox


@pytest.mark.soak
async def test_dockerd(engine: Engine) -> None:
    """Containers on a bridge, with a published port, a limit and a volume; an image is built."""

    async def works(sandbox: Sandbox) -> None:
        said = await sh(sandbox, DOCKERD_WORKS, ASK)
        web = "from a container"
        assert said.splitlines() == ["built", web, web, str(32 * MIB)]
        await sh(sandbox, COUNTED, "/srv/docker/count")

    async with with_tree(engine) as sandbox:
        await begin(sandbox, ["sh", "-ec", DOCKERD, WEB])
        await in_all(engine, sandbox, works)


@pytest.mark.soak
async def test_podman(engine: Engine) -> None:
    """Containers of a user's, who is root in them; on each kind of file system that they have."""

    async def works(sandbox: Sandbox) -> None:
        first, mapped, web = (await sh(sandbox, PODMAN_WORKS, ASK, user="app")).splitlines()
        assert (first, mapped.split(), web) == ("0", ["0", "1000", "1"], "from a container")
        await sh(sandbox, COUNTED, "/home/app/count")

    async with with_tree(engine) as sandbox:
        for storage, kind in STORAGES.items():
            assert await sh(sandbox, PODMAN_STORES, storage, user="app") == f"{kind}\n"
        await begin(sandbox, ["sh", "-ec", PODMAN, WEB], user="app")
        await in_all(engine, sandbox, works)


#: Counts, one request for each number; and is not loaded until there is a file /tmp/go.
PAGE = """
import http.server, os, time
PAGE = b'''<p id=n>0</p><img src=/held><script>
(async () => { for (let n = 1; ; ++n) {
    await fetch("/" + n); document.getElementById("n").textContent = n } })()
</script>'''
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        name = self.path[1:]
        if name == "held":
            print("held", flush=True)
            while not os.path.exists("/tmp/go"): time.sleep(0.05)
        elif name.isdigit():
            with open("/tmp/count", "a") as file: file.write(name + "\\n")
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        if not name: self.wfile.write(PAGE)
    def log_message(self, *_): pass
http.server.ThreadingHTTPServer(("127.0.0.1", 8000), Handler).serve_forever()
"""
CHROMIUM = """
useradd -m app
python3 -c "$0" >held &
su app -c 'cd; exec chromium --headless --disable-gpu --dump-dom http://127.0.0.1:8000/ \
    >/tmp/dom 2>/tmp/problems' &
until grep -s held held; do sleep 0.3; done
echo begun; wait
"""
#: Of each renderer: its namespaces of users and of pids are not those outside, and seccomp's mode.
RENDERERS = """
for each in /proc/[0-9]*; do
    tr '\\0' ' ' <$each/cmdline | grep -q "type=[r]enderer" || continue
    for kind in user pid; do
        test $(readlink $each/ns/$kind) != $(readlink /proc/self/ns/$kind)
    done
    grep Seccomp: $each/status
done
"""
DUMPED = """
touch go; while [ -e /proc/$1 ] && ! grep -q '</html>' dom; do sleep 0.3; done
grep -o '<p id="n">[0-9]*' dom
"""


@pytest.mark.soak
async def test_chromium(engine: Engine) -> None:
    """With its own sandbox: it is forked while it loads a page, and the page counts on."""

    async def dumps(sandbox: Sandbox) -> None:
        await sh(sandbox, COUNTED, "/tmp/count")
        counted = int(await sh(sandbox, "wc -l <count"))
        dumped = await sh(sandbox, DUMPED, str(pid))
        assert int(dumped.partition(">")[2]) >= counted - 1

    async with (
        base_of(engine, "debian+chromium", ram=1024, disk=2048) as tag,
        fork_of(engine, tag) as sandbox,
    ):
        pid = await begin(sandbox, ["sh", "-ec", CHROMIUM, PAGE])
        renderers = (await sh(sandbox, RENDERERS)).splitlines()
        assert {*renderers} == {"Seccomp:\t2"}
        await sh(sandbox, COUNTED, "/tmp/count")
        async with forked_at_work(engine, sandbox) as sandboxes:
            for each in sandboxes:
                await dumps(each)
