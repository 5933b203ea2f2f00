"""`kill -9` of a process that owns sandboxes, at any moment of a branch: nothing of it is left."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import textwrap
from pathlib import Path

import pytest
from vm_helpers import leaves_nothing, sh, tags, until

from processes import is_running
from ratoon import paths
from ratoon.engine.sandbox.engine import Engine
from ratoon.engine.sandbox.sandbox import Sandbox

OWNER = """
import asyncio, os, signal, sys
from pathlib import Path
from ratoon.store.memory import cache
from ratoon.engine.sandbox import capture, layer, start
from ratoon.engine.sandbox.engine import Engine
from ratoon.engine.sandbox.directory import SandboxDirectory
from ratoon.engine.sandbox.sandbox import Sandbox
from ratoon.store.snapshot.staging import Staging
from ratoon.machine.vmm.qemu import QemuMachine

def die(*arguments, **options):
    os.kill(os.getpid(), signal.SIGKILL)

async def main():
    async with Engine.open(Path(sys.argv[1])) as engine:
        sandbox = await engine.fork_one("base")
        await sandbox.exec(["sh", "-c", "echo by the owner >/root/note; seq 200000 >/dev/shm/f"])
        print(sandbox.pid, flush=True)
        {death}
        await engine.branch(sandbox, "orphan")
        {after}
    raise SystemExit("it should have died")

asyncio.run(main())
"""


async def run_owner(home: Path, death: str, after: str = "die()") -> list[int]:
    """Run a process that forks, branches and kills itself; the machines it had started."""
    script = textwrap.dedent(OWNER.format(death=death, after=after))
    owner = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, str(home), stdout=asyncio.subprocess.PIPE
    )
    output, _ = await owner.communicate()
    assert owner.returncode == -signal.SIGKILL
    return [int(word) for word in output.split()]


async def assert_gone(pids: list[int]) -> None:
    assert pids
    for pid in pids:
        await until(lambda pid=pid: not is_running(pid), f"the end of QEMU {pid}")  # type: ignore[misc]


async def reopened(engine: Engine, bystander: Sandbox) -> None:
    """Whoever opens the store next cleans up, spares what is held, and can fork."""
    async with Engine.open(engine.store.home) as next_owner:
        with leaves_nothing(engine):
            async with await next_owner.fork_one("base") as fork:
                assert await sh(fork, "echo works") == "works\n"
    held = {sandbox.id for sandbox in engine.sandboxes}
    assert {path.name for path in engine.store.sandboxes.iterdir()} == held
    assert {path.name for path in paths.runtime(engine.store.home).iterdir()} == held
    assert list(engine.store.staging.iterdir()) == []
    assert list(engine.store.images.glob(".*.tmp")) == []
    assert await sh(bystander, "echo spared") == "spared\n"


@pytest.mark.parametrize(
    "death",
    [
        "QemuMachine.pause = die",
        "QemuMachine.switch_overlay = die",
        "QemuMachine.resume = die",
        "capture.read_into = die",
        "layer.writing_page_set = die",
        "layer.file_digest = die",
        "Staging.publish = die",
        "os.fsync = die",
        "Path.rename = die",
    ],
)
async def test_killed_before_it_is_published(engine: Engine, sandbox: Sandbox, death: str) -> None:
    before = tags(engine)
    await assert_gone(await run_owner(engine.store.home, death))
    assert tags(engine) == before
    assert len([*engine.store.sandboxes.iterdir()]) == len(engine.sandboxes) + 1
    await reopened(engine, sandbox)
    await engine.branch(sandbox, "orphan")  # the tag is free


@pytest.mark.parametrize("death", ["SandboxDirectory.stand_on = die", "pass"])
async def test_killed_once_it_is_published(engine: Engine, sandbox: Sandbox, death: str) -> None:
    await assert_gone(await run_owner(engine.store.home, death))
    assert "orphan" in tags(engine)
    await reopened(engine, sandbox)
    async with await engine.fork_one("orphan") as fork:
        assert await sh(fork, "cat /root/note; tail -n 1 /dev/shm/f") == "by the owner\n200000\n"


@pytest.mark.parametrize(
    ("death", "after"),
    [
        ("", "cache.fsync_path = die; await engine.fork('orphan', 2)"),
        ("", "start.rebirth = die; await engine.fork_one('base')"),
        ("", "start.QemuMachine.load_state = die; await engine.fork_one('orphan')"),
        ("", "import shutil; shutil.rmtree = die; await sandbox.kill()"),
    ],
)
async def test_killed_in_a_fork_or_at_its_end(
    engine: Engine, sandbox: Sandbox, death: str, after: str
) -> None:
    await assert_gone(await run_owner(engine.store.home, death or "pass", after))
    await reopened(engine, sandbox)
    async with await engine.fork_one("orphan") as fork:
        assert await sh(fork, "cat /root/note") == "by the owner\n"


async def test_killed_while_booting(engine: Engine, sandbox: Sandbox) -> None:
    death = "from ratoon.engine.sandbox import boot; boot.Channel.connect = die;"
    death += "await engine.bases.from_image('debian', 'half', ram_bytes=192 << 20)"
    await assert_gone(await run_owner(engine.store.home, death))
    assert "half" not in tags(engine)
    await reopened(engine, sandbox)


async def test_stopped_by_a_signal(engine: Engine, sandbox: Sandbox) -> None:
    """An owner that is stopped, not killed, still holds what is its own."""
    script = OWNER.format(death="os.kill(os.getpid(), signal.SIGSTOP)", after="die()")
    owner = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, str(engine.store.home), stdout=asyncio.subprocess.PIPE
    )
    assert owner.stdout
    pid = int(await owner.stdout.readline())
    await until(lambda: " T " in Path(f"/proc/{owner.pid}/stat").read_text(), "its stop")
    async with Engine.open(engine.store.home):
        assert is_running(pid)
        assert len([*engine.store.sandboxes.iterdir()]) == len(engine.sandboxes) + 1
    os.kill(owner.pid, signal.SIGCONT)
    assert await owner.wait() == -signal.SIGKILL
    await assert_gone([pid])
    assert "orphan" in tags(engine)
    await reopened(engine, sandbox)
