"""What the kernel has not loaded is loaded when asked for, whoever asks, in any image."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from vm_helpers import FOR_EVER, sh

from ratoon.engine.sandbox.engine import Engine
from ratoon.engine.sandbox.sandbox import Sandbox

#: Made by root: network devices, whose kinds the kernel looks for; file systems; a loop device.
DEVICES = """
set -e
for kind in dummy bridge ifb; do ip link add test-$kind type $kind; done
ip link add one type veth peer name other
ip link add test-vxlan type vxlan id 1 dstport 4789
ip link add test-macvlan link one type macvlan
ip link add test-vlan link one type vlan id 7
ip link add test-wireguard type wireguard
ls /sys/class/net | grep -c -e test- -e one -e other
"""
FILE_SYSTEMS = """
set -e
cd /root
mkdir lower upper work merged; echo below >lower/file
mount -t overlay -o lowerdir=lower,upperdir=upper,workdir=work overlay merged
echo above >>merged/file; cat upper/file
head -c 4000000 /dev/zero >disk; mkfs.ext4 -q disk; mount -o loop disk lower; umount lower
for each in squashfs iso9660 vfat fuse; do
    mount -t $each disk lower 2>/dev/null || grep -q -w $each /proc/filesystems; echo $each
done
"""
MOUNTED = "below\nabove\nsquashfs\niso9660\nvfat\nfuse\n"
#: nf_tables over netlink, as `nft add table ip t` has it: begin, the table, end.
TABLE = """
import socket, struct
def message(kind, flags, family, resource, attributes=b""):
    body = struct.pack(">BBH", family, 0, resource) + attributes
    return struct.pack("=IHHII", 16 + len(body), kind, 1 | flags, 1, 0) + body
NAME = struct.pack("=HH", 6, 1) + b"t\\0" + bytes(2)
with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12) as kernel:
    kernel.send(message(16, 0, 0, 10) + message(10 << 8, 0x404, 2, 0, NAME) + message(17, 0, 0, 10))
    answer = kernel.recv(4096)
    print(struct.unpack_from("=i", answer, 16)[0])
"""
OPEN = 'import os; [os.open(name, os.O_RDWR) for name in ("/dev/fuse", "/dev/net/tun")]'
#: In namespaces of a user's own, where the kernel loads modules for him as well.
AS_A_USER = """
set -e
ip link add one type veth peer name other; ip link add bridge type bridge
mkdir /tmp/own; mount -t tmpfs none /tmp/own; cd /tmp/own; mkdir lower upper work merged
mount -t overlay -o lowerdir=lower,upperdir=upper,workdir=work overlay merged
echo $(ip -o link | wc -l) $(stat -f -c %T merged)
"""


@pytest.fixture
async def fork(engine: Engine) -> AsyncIterator[Sandbox]:
    """One in which nothing is loaded yet."""
    async with await engine.fork_one("base") as sandbox:
        yield sandbox


async def python(sandbox: Sandbox, script: str, user: str = "root") -> str:
    result = await sandbox.exec(["python3", "-c", script], user=user, timeout=FOR_EVER)
    assert result.exit_code == 0, result
    return result.stdout.decode()


async def test_for_root(fork: Sandbox) -> None:
    assert await sh(fork, DEVICES) == "9\n"
    assert await sh(fork, FILE_SYSTEMS) == MOUNTED
    assert await python(fork, TABLE) == "0\n"
    loaded = await sh(
        fork, "/lib/modules/$(uname -r)/modprobe -a zram xt_conntrack; cat /proc/modules"
    )
    assert {"zram", "xt_conntrack", "nf_tables"} <= {
        line.split()[0] for line in loaded.splitlines()
    }


async def test_for_a_user(fork: Sandbox) -> None:
    await python(fork, OPEN, "nobody")
    result = await fork.exec(
        ["unshare", "-Urnm", "sh", "-c", AS_A_USER], user="nobody", timeout=FOR_EVER
    )
    assert (result.stdout, result.exit_code) == (b"4 overlayfs\n", 0), result


async def test_in_forks_and_after_a_resume_and_a_reset(engine: Engine, fork: Sandbox) -> None:
    """What was loaded stays so in forks; what was not is found there as well."""
    add = "ip link add {0} type {0} && grep -c -w -e ^dummy -e ^ifb -e ^veth /proc/modules"
    assert await sh(fork, add.format("dummy")) == "1\n"
    await engine.branch(fork, "loaded")
    await engine.standby(fork)
    await engine.resume(fork)
    assert await sh(fork, add.format("ifb")) == "2\n"
    (other,) = await engine.fork_sandbox(fork)
    assert isinstance(other, Sandbox)
    async with other:
        assert await sh(other, add.format("veth")) == "3\n"
    await engine.reset(fork)
    assert await sh(fork, add.format("veth")) == "2\n"
