"""What programs find in a sandbox is what a container on a current Docker host gives them."""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from vm_helpers import FOR_EVER, fork_of_image, sh

from oci_images import Layout, directory, file, layer
from ratoon.engine.sandbox.engine import Engine
from ratoon.engine.sandbox.sandbox import Sandbox
from small_images import busybox

#: A row of the table of settings: what it is called, and its value.
ROW = re.compile(r"^\| `(?P<name>[^`]+)` \| `(?P<value>[^`]+)` \|", re.MULTILINE)
TABLE = Path(__file__).parents[2] / "docs/guest.md"
USERS = ["root", "nobody"]

#: A root of its own, as bubblewrap and rootless runtimes make it: new namespaces, mounts, pivot.
OWN_ROOT = """
set -e
mount -t tmpfs none /mnt
mkdir /mnt/usr /mnt/proc /mnt/old
mount --bind /usr /mnt/usr
mount -t proc proc /mnt/proc
for each in bin lib lib64; do ln -s usr/$each /mnt/$each; done
cd /mnt
pivot_root . old
umount -l old
cd /
echo $$ $(id -u) $(ls /)
"""
#: With the pipes that it is given, and by names, as an image's logs are often linked.
REOPEN = """
echo out >/dev/stdout; echo err >/dev/stderr; echo fd >/dev/fd/1; echo linked >/tmp/log
exec 3</dev/stdin; cat <&3
"""
#: What is added by hand: all that a fork, a resume and a reset must leave as it was.
LOOK = """
unshare -U -r true && cat /tmp/kept /run/mine/kept && stat -c '%u %a' /run/mine
ulimit -Sn; ulimit -Hn; cat /proc/sys/net/ipv4/ip_unprivileged_port_start
"""
LOOKED = "tmp\nrun\n1 700\n1024\n524288\n0\n"


async def run_as(sandbox: Sandbox, user: str, script: str, stdin: bytes = b"") -> tuple[str, str]:
    """What it prints to stdout and stderr; it must succeed."""
    result = await sandbox.exec(["sh", "-c", script], user=user, stdin=stdin, timeout=FOR_EVER)
    assert result.exit_code == 0, result
    return result.stdout.decode(), result.stderr.decode()


@pytest.mark.parametrize("user", USERS)
async def test_user_namespaces(sandbox: Sandbox, user: str) -> None:
    assert await run_as(sandbox, user, "unshare -U -r id -u") == ("0\n", "")
    script = f"unshare -U -r -m -p -f sh -c '{OWN_ROOT}'"
    assert await run_as(sandbox, user, script) == ("1 0 bin lib lib64 old proc usr\n", "")


async def test_the_sandboxs_root_is_the_root_of_all_mounts(sandbox: Sandbox) -> None:
    """As it is to who enters the namespace of process 1, and to the kernel."""
    assert await sh(sandbox, "nsenter -t 1 -m -- ls /etc/debian_version") == "/etc/debian_version\n"
    mounts = (await sh(sandbox, "cat /proc/1/mountinfo")).splitlines()
    assert [line.split()[4] for line in mounts].count("/") == 1


@pytest.mark.parametrize("user", USERS)
async def test_its_own_pipes_opened_by_name(sandbox: Sandbox, user: str) -> None:
    await run_as(sandbox, user, "ln -sf /dev/stdout /tmp/log")
    out = "out\nfd\nlinked\ninput"
    assert await run_as(sandbox, user, REOPEN, b"input") == (out, "err\n")
    await run_as(sandbox, user, "rm /tmp/log")


async def test_settings_and_limits(sandbox: Sandbox) -> None:
    """Each row of the table in docs/guest.md, for a user: root has no others."""
    rows = dict(ROW.findall(TABLE.read_text()))
    assert len(rows) > 30
    ask = [
        name if name.startswith("ulimit ") else f"cat /proc/sys/{name.replace('.', '/')}"
        for name in rows
    ]
    found, _ = await run_as(sandbox, "nobody", f"bash -c '{'; '.join(ask)}'")
    values = [" ".join(line.split()) for line in found.splitlines()]
    assert dict(zip(rows, values, strict=True)) == rows


@pytest.mark.parametrize("user", USERS)
async def test_ping_and_low_ports(sandbox: Sandbox, user: str) -> None:
    script = """
import socket
socket.socket(socket.AF_INET, socket.SOCK_DGRAM, socket.IPPROTO_ICMP)
socket.socket().bind(("127.0.0.1", 81))
"""
    result = await sandbox.exec(["python3", "-c", script], user=user, timeout=FOR_EVER)
    assert result.exit_code == 0, result


async def test_tmp_and_run_are_on_the_disk(sandbox: Sandbox) -> None:
    assert await sh(sandbox, "stat -c '%a' /tmp; stat -f -c %T /tmp /run") == (
        "1777\next2/ext3\next2/ext3\n"
    )
    await run_as(sandbox, "nobody", "echo theirs >/tmp/theirs")
    await sandbox.files.append("/tmp/theirs", b"mine\n")
    assert await sh(sandbox, "cat /tmp/theirs; rm /tmp/theirs") == "theirs\nmine\n"


async def test_in_forks_and_after_a_resume_and_a_reset(engine: Engine) -> None:
    make = "mkdir -m 700 /run/mine; echo run >/run/mine/kept; chown -R 1 /run/mine"
    async with await engine.fork_one("base") as first:
        await sh(first, f"{make}; echo tmp >/tmp/kept")
        await engine.branch(first, "made")
        await engine.reset(first)
        assert await sh(first, LOOK) == LOOKED
        await engine.standby(first)
        await engine.resume(first)
        assert await sh(first, LOOK) == LOOKED
        (second,) = await engine.fork_sandbox(first)
        assert isinstance(second, Sandbox)
        async with second:
            assert await sh(second, LOOK) == LOOKED
            await run_as(second, "nobody", "unshare -U -r true")


@pytest.fixture
async def image(engine: Engine, tmp_path: Path) -> AsyncIterator[Sandbox]:
    """A fork of an image of busybox alone, which has something in /tmp, /run and /var/run."""
    layout = Layout(tmp_path)
    there = [
        directory("run", mode=0o775, gid=7),
        directory("run/postgresql", mode=0o2775, uid=999, gid=999),
        directory("tmp", mode=0o1777),
        file("tmp/of-the-image", b"there\n", uid=5),
        directory("var/run/sshd", mode=0o711),
        file("etc/passwd", b"root:x:0:0::/root:/bin/sh\nnobody:x:65534:65534::/:/bin/sh\n"),
    ]
    layout.add([layer([*busybox(), *there])])
    async with fork_of_image(engine, layout.reference(), ram=160, disk=128) as sandbox:
        yield sandbox


async def test_an_image_without_anything(image: Sandbox) -> None:
    """What it has in /run and /tmp stays, and the rest holds as well."""
    stat = "stat -c '%n %a %u %g' /run /run/postgresql /tmp /tmp/of-the-image /var/run/sshd"
    assert (await sh(image, stat)).splitlines() == [
        "/run 775 0 7",
        "/run/postgresql 2775 999 999",
        "/tmp 1777 0 0",
        "/tmp/of-the-image 644 5 0",
        "/var/run/sshd 711 0 0",
    ]
    # A kind of device that the kernel has to load, with no modprobe of the image's own.
    add = "/bin/busybox ip link add test type dummy && cat /sys/class/net/test/mtu"
    assert await sh(image, add) == "1500\n"
    for user in USERS:
        assert await run_as(
            image, user, "/bin/busybox unshare -U -r true; echo x >/dev/stdout"
        ) == ("x\n", "")


async def test_content_of_proc_and_sys(sandbox: Sandbox) -> None:
    for name in ("/proc/version", "/proc/cpuinfo", "/sys/class/net/lo/mtu", "/proc/sys/kernel/sem"):
        expected = await sh(sandbox, f"cat {name}")
        assert (await sandbox.files.read(name)).decode() == expected
        assert await archived(sandbox, name) == {Path(name).name: expected.encode()}
    tree = await archived(sandbox, "/proc/sys/kernel")
    assert tree["sem"] == (await sh(sandbox, "cat /proc/sys/kernel/sem")).encode()


async def archived(sandbox: Sandbox, path: str) -> dict[str, bytes]:
    """The content of all files that are copied with `path`, by their names."""
    async with sandbox.files.archive(path) as pieces:
        packed = b"".join([piece async for piece in pieces])
    with tarfile.open(fileobj=io.BytesIO(packed)) as tar:
        files = {each.name: tar.extractfile(each) for each in tar if each.isfile()}
        return {name: file.read() for name, file in files.items() if file}
