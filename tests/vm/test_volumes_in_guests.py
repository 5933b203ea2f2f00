"""Volumes in real guests: files go both ways, and survive what happens to sandboxes."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from vm_helpers import FOR_EVER, sh, until

from ratoon.engine.sandbox.engine import Engine
from ratoon.engine.sandbox.options import SandboxOptions, Volume
from ratoon.engine.sandbox.sandbox import Sandbox
from ratoon.errors import Conflict, InvalidInput, NotFound
from ratoon.units import MIB


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the module's sandbox has as /mnt/shared, to write to."""
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="module")
async def sandbox(engine: Engine, shared: Path) -> AsyncIterator[Sandbox]:
    async with await engine.fork_one("base", volumes(writable=shared)) as sandbox:
        yield sandbox


def volumes(writable: Path | None = None, read_only: Path | None = None) -> SandboxOptions:
    """/mnt/shared to write to, and /mnt/given to read."""
    wanted = []
    if writable:
        wanted.append(Volume(source=str(writable), target="/mnt/shared"))
    if read_only:
        wanted.append(Volume(source=str(read_only), target="/mnt/given", read_only=True))
    return SandboxOptions(volumes=tuple(wanted))


async def test_files_go_both_ways(sandbox: Sandbox, shared: Path) -> None:
    (shared / "from-host").write_text("of the host\n")
    assert await sh(sandbox, "cat /mnt/shared/from-host") == "of the host\n"
    await sh(
        sandbox,
        """
cd /mnt/shared; mkdir made; echo one >made/one; mv made/one made/two; ln -s two made/link
ln made/two made/hard; chmod 640 made/two; chown 12:34 made/two; touch -d @1000000000 made/two
mkdir emptied; touch emptied/file; rm emptied/file; rmdir emptied; echo more >>from-host
""",
    )
    made = shared / "made"
    assert {path.name for path in made.iterdir()} == {"hard", "link", "two"}
    assert made.joinpath("link").readlink() == Path("two")
    found = made.joinpath("two").stat()
    assert (found.st_mode & 0o7777, found.st_uid, found.st_gid) == (0o640, 12, 34)
    assert (found.st_nlink, found.st_mtime) == (2, 1000000000)
    assert made.joinpath("hard").read_text() == "one\n"
    assert shared.joinpath("from-host").read_text() == "of the host\nmore\n"
    assert not (shared / "emptied").exists()


async def test_a_large_file_is_whole_on_both_sides(sandbox: Sandbox, shared: Path) -> None:
    script = """
cd /mnt/shared; head -c 67108864 /dev/urandom >large; sync large; sha256sum <large
echo 3 >/proc/sys/vm/drop_caches; sha256sum <large
"""
    before, after = (line.split()[0] for line in (await sh(sandbox, script)).splitlines())
    data = (shared / "large").read_bytes()
    assert len(data) == 64 * MIB
    assert before == after == hashlib.sha256(data).hexdigest()
    (shared / "large").unlink()


async def test_many_small_files(sandbox: Sandbox, shared: Path) -> None:
    script = """
mkdir /mnt/shared/many; cd /mnt/shared/many; for n in $(seq 60); do echo $n >file-$n; done
echo 3 >/proc/sys/vm/drop_caches; ls | wc -l; cat * | sort -n | tail -n 1
"""
    assert (await sh(sandbox, script)).split() == ["60", "60"]
    names = {path.name for path in (shared / "many").iterdir()}
    assert names == {f"file-{number}" for number in range(1, 61)}
    assert (shared / "many/file-57").read_text() == "57\n"


async def test_users_of_the_guest_have_the_rights_that_modes_give(
    sandbox: Sandbox, shared: Path
) -> None:
    shared.chmod(0o755)
    (shared / "secret").write_text("s")
    (shared / "secret").chmod(0o600)
    (shared / "open").mkdir()
    (shared / "open").chmod(0o777)
    as_nobody = "setpriv --reuid 65534 --regid 65534 --clear-groups sh -c '{}'"
    result = await sandbox.exec(
        ["sh", "-c", as_nobody.format("cat /mnt/shared/secret")], timeout=FOR_EVER
    )
    assert result.exit_code == 1
    assert b"Permission denied" in result.stderr
    await sh(sandbox, as_nobody.format("echo mine >/mnt/shared/open/file"))
    found = (shared / "open/file").stat()
    assert (found.st_uid, found.st_gid) == (65534, 65534)
    # What the host takes away, the guest's kernel may believe in for 3 s.
    look = "until ! cat /mnt/shared/open/file; do sleep 0.1; done >/dev/null 2>&1"
    (shared / "open/file").write_text("no longer his")
    os.chown(shared / "open/file", 0, 0)
    (shared / "open/file").chmod(0o600)
    await sh(sandbox, as_nobody.format(look))
    denied = "! touch /mnt/shared/file && ! rm /mnt/shared/secret && ! chmod 777 /mnt/shared"
    await sh(sandbox, as_nobody.format(denied))


async def test_no_device_and_no_set_user_id(sandbox: Sandbox, shared: Path) -> None:
    script = """
cd /mnt/shared; cp /bin/true suid; chmod 4755 suid; stat -c %a suid
mknod device c 1 3 || echo no device; mkfifo pipe || echo no pipe
"""
    assert (await sh(sandbox, script)).splitlines() == ["755", "no device", "no pipe"]
    assert (shared / "suid").stat().st_mode & 0o7777 == 0o755


async def test_a_link_leads_nowhere_but_in_the_guest(sandbox: Sandbox, shared: Path) -> None:
    (shared / "escape").symlink_to("/etc/hostname")
    (shared / "up").symlink_to("../../../../etc")
    here = await sh(sandbox, "cat /mnt/shared/escape; hostname; ls /mnt/shared/up/debian_version")
    in_guest, hostname, _ = here.splitlines()
    assert in_guest == (await sh(sandbox, "cat /etc/hostname")).strip()
    assert hostname == sandbox.id
    await sh(sandbox, "ln -s /etc/shadow /mnt/shared/made-there; cp /mnt/shared/up/os-release /tmp")
    assert (shared / "made-there").readlink() == Path("/etc/shadow")


async def test_the_agent_uses_a_volume_while_a_command_writes_to_it(
    sandbox: Sandbox, shared: Path
) -> None:
    """It must not wait for itself: what carries the volume is another process."""
    writing = asyncio.create_task(
        sh(sandbox, "dd if=/dev/zero of=/mnt/shared/busy bs=1M count=12 conv=fsync 2>&1")
    )
    for number in range(10):
        await sandbox.files.write(f"/mnt/shared/agent-{number}", b"a" * 100_000)
        assert await sandbox.files.read(f"/mnt/shared/agent-{number}") == b"a" * 100_000
    await sandbox.exec(["pwd"], cwd="/mnt/shared", timeout=FOR_EVER)
    await writing
    assert (shared / "busy").stat().st_size == 12 * MIB
    assert (shared / "agent-9").read_bytes() == b"a" * 100_000


async def test_the_relay_is_started_again_when_it_was_killed(
    sandbox: Sandbox, shared: Path
) -> None:
    script = "read pid rest </sys/fs/cgroup/volumes/cgroup.procs; kill -9 $pid; echo $pid"
    pid = (await sh(sandbox, f"mount -t cgroup2 none /sys/fs/cgroup; {script}")).strip()
    await sh(sandbox, "umount /sys/fs/cgroup")
    (shared / "after").write_text("the kernel has connected again")
    assert await sh(sandbox, "cat /mnt/shared/after") == "the kernel has connected again"
    assert pid.isdecimal()


# What happens to sandboxes ------------------------------------------------------------------------

#: Writes lines to an open file of a volume, one by one; prints its pid.
WRITE = """
setsid sh -c 'exec 3>>/mnt/shared/lines; n=0
while :; do n=$((n+1)); echo $n >&3 || echo $n >>/tmp/failed; sleep 0.05; done' \
</dev/null >/dev/null 2>&1 &
echo $!
"""


async def until_lines(path: Path, count: int) -> None:
    await until(lambda: path.exists() and len(path.read_text().split()) >= count, "lines")


def assert_counted(path: Path) -> None:
    lines = path.read_text().split()
    assert lines == [str(number) for number in range(1, len(lines) + 1)]


async def test_an_open_file_is_written_on_after_standby_and_in_branches(
    engine: Engine, tmp_path: Path
) -> None:
    given = tmp_path / "given"
    given.mkdir()
    (given / "file").write_text("given")
    lines = tmp_path / "lines"
    async with await engine.fork_one("base", volumes(tmp_path, given)) as sandbox:
        pid = (await sh(sandbox, WRITE)).strip()
        await until_lines(lines, 3)
        await engine.standby(sandbox)
        before = len(lines.read_text().split())
        with pytest.raises(Conflict, match=f"held by sandbox {sandbox.id}"):
            await engine.fork_one("base", volumes(tmp_path))
        await engine.resume(sandbox)
        await until_lines(lines, before + 3)
        await engine.branch(sandbox, "writing")
        await until_lines(lines, len(lines.read_text().split()) + 3)
        assert_counted(lines)

        # A fork has the mounts in its kernel, but not the volumes.
        async with await engine.fork_one("writing", volumes(read_only=given)) as fork:
            assert await sh(fork, "ls /mnt/shared; cat /mnt/given/file") == "given"
            await sh(fork, "until [ -s /tmp/failed ]; do sleep 0.05; done")
            await sh(fork, f"kill -9 {pid}; while [ -e /proc/{pid} ]; do sleep 0.05; done")
        assert_counted(lines)
        [outcome] = await engine.fork_sandbox(sandbox)
        assert isinstance(outcome, Conflict)
        assert f"held by sandbox {sandbox.id}" in str(outcome)

        # Its own branch is what it is reset to, and it has its volumes again.
        await engine.reset(sandbox)
        await sh(sandbox, f"kill {pid}; echo reset >/mnt/shared/reset")
        assert (tmp_path / "reset").read_text() == "reset\n"

    # Nobody holds it any more; a fork that names it goes on with the mount it has.
    async with await engine.fork_one("writing", volumes(tmp_path, given)) as fork:
        await sh(fork, f"kill {pid}; echo again >/mnt/shared/again")
        assert (tmp_path / "again").read_text() == "again\n"


async def test_read_only_ones_are_shared_and_cannot_be_written(
    engine: Engine, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("x")
    async with (
        await engine.fork_one("base", volumes(read_only=tmp_path)) as one,
        await engine.fork_one("base", volumes(read_only=tmp_path)) as other,
    ):
        for sandbox in one, other:
            script = """
echo y >/mnt/given/file; mount -o remount,rw /mnt/given; echo z >/mnt/given/file
touch /mnt/given/new; rm /mnt/given/file; cat /mnt/given/file
"""
            result = await sandbox.exec(["sh", "-c", script], timeout=FOR_EVER)
            assert result.stdout == b"x"
            assert result.stderr.count(b"Read-only file system") >= 2, result
            assert result.stderr.count(b"\n") == 4, result
    assert (tmp_path / "file").read_text() == "x"


async def test_what_can_be_no_volume(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/etc")
    with pytest.raises(NotFound, match="no directory"):
        await engine.fork_one("base", volumes(tmp_path / "missing"))
    with pytest.raises(InvalidInput, match="leads to /etc"):
        await engine.fork_one("base", volumes(tmp_path / "link"))
    taken = Volume(source=str(tmp_path), target="/etc/hostname/below")
    with pytest.raises(InvalidInput, match="cannot be mounted"):
        await engine.fork_one("base", SandboxOptions(volumes=(taken,)))
    async with await engine.fork_one("base", volumes(tmp_path)):
        pass  # who failed holds nothing


async def test_a_named_volume_outlives_its_sandboxes(engine: Engine) -> None:
    options = SandboxOptions(volumes=(Volume(source="cache", target="/mnt/cache"),))
    async with await engine.fork_one("base", options) as sandbox:
        await sh(sandbox, "echo kept >/mnt/cache/file")
    async with await engine.fork_one("base", options) as sandbox:
        assert await sh(sandbox, "cat /mnt/cache/file") == "kept\n"


#: An engine with a sandbox that writes to a volume; it is killed, and the sandbox lives on.
OWNER = """
import asyncio, os, signal, sys
from pathlib import Path
from ratoon.engine.sandbox.engine import Engine
from ratoon.engine.sandbox.options import SandboxOptions, Volume

async def main():
    home, shared, script = sys.argv[1:]
    options = SandboxOptions(volumes=(Volume(source=shared, target="/mnt/shared"),))
    async with Engine.open(Path(home), keep=True) as engine:
        sandbox = await engine.fork_one("base", options)
        result = await sandbox.exec(["sh", "-c", script])
        assert result.exit_code == 0, result
        lines = Path(shared, "lines")
        while not lines.exists() or len(lines.read_text().split()) < 3:
            await asyncio.sleep(0.05)
        os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""


async def test_the_next_engine_serves_the_volumes_of_a_sandbox_that_it_takes_over(
    engine: Engine, tmp_path: Path
) -> None:
    home = str(engine.store.home)
    owner = await asyncio.create_subprocess_exec(
        sys.executable, "-c", OWNER, home, str(tmp_path), WRITE
    )
    assert await owner.wait() == -signal.SIGKILL
    lines = tmp_path / "lines"
    before = len(lines.read_text().split())
    async with Engine.open(engine.store.home, keep=True) as following:
        (sandbox,) = following.sandboxes
        async with sandbox:
            await until_lines(lines, before + 3)
            assert_counted(lines)
            with pytest.raises(Conflict, match=f"held by sandbox {sandbox.id}"):
                await following.fork_one("base", volumes(tmp_path))
            assert await sh(sandbox, "echo here >/mnt/shared/file; cat /tmp/failed || true") == ""
    assert (tmp_path / "file").read_text() == "here\n"
