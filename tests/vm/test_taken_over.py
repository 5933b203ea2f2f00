"""Sandboxes that outlive their engine, which is killed at any step of what it does with one.

The next engine has it: whole, and as it was before that step, or after it.
"""

from __future__ import annotations

import asyncio
import signal
import sys
import textwrap

import pytest
from vm_helpers import CHECK, COUNT, WRITE, Counter, assert_whole, processes_of, sh, tags

from ratoon.engine.sandbox.engine import Engine

OWNER = """
import asyncio, os, signal, sys
from pathlib import Path
from ratoon.engine.sandbox import branch, layer, memory_images, standby, start
from ratoon.engine.sandbox.directory import SandboxDirectory
from ratoon.engine.sandbox.engine import Engine
from ratoon.engine.sandbox.incarnation import Incarnation
from ratoon.engine.sandbox.sandbox import Sandbox
from ratoon.store.snapshot.staging import Staging
from ratoon.machine.vmm.qemu import QemuMachine

def die(*arguments, **options):
    os.kill(os.getpid(), signal.SIGKILL)

def once_done(owner, name):
    work = getattr(owner, name)
    def then_die(*arguments, **options):
        work(*arguments, **options)
        die()
    setattr(owner, name, then_die)

def no_space(*arguments):
    raise OSError(28, "No space left on device")

async def main():
    async with Engine.open(Path(sys.argv[1]), keep=True) as engine:
        sandbox = await engine.fork_one("base")
        print(sandbox.id, flush=True)
        result = await sandbox.exec(["sh", "-c", sys.stdin.read()])
        assert result.exit_code == 0, result
        sys.stdout.buffer.write(result.stdout)
        sys.stdout.flush()
{steps}
    raise SystemExit("it should have died")

asyncio.run(main())
"""

BRANCH = "await engine.branch(sandbox, 'taken')"
STANDBY = "await engine.standby(sandbox)"
RESUME = f"{STANDBY}; await engine.resume(sandbox)"
RESET = f"{BRANCH}; await engine.reset(sandbox)"
FORK = "await engine.fork_sandbox(sandbox)"

#: What the owner does, the step at which it dies, and what the sandbox is then. `make test` tries
#: every third, `make soak` all.
DEATHS = [
    (BRANCH, "QemuMachine.pause = die", "running"),
    (BRANCH, "QemuMachine.save_state = die", "running"),
    (BRANCH, "QemuMachine.switch_overlay = die", "running"),
    (BRANCH, "branch.thaw = die", "running"),
    (BRANCH, "layer.writing_page_set = die", "running"),
    (BRANCH, "Staging.publish = die", "running"),
    (BRANCH, "once_done(Staging, 'publish')", "running"),
    (BRANCH, "SandboxDirectory._replace_parent = die", "running"),
    (BRANCH, "once_done(SandboxDirectory, 'stand_on')", "running"),
    (BRANCH, "once_done(Sandbox, 'persist')", "running"),
    (STANDBY, "QemuMachine.save_state = die", "running"),
    (STANDBY, "layer.writing_page_set = die", "running"),
    (STANDBY, "once_done(Staging, 'publish')", "running"),
    (STANDBY, "once_done(Sandbox, '_write_down')", "standby"),
    (STANDBY, "once_done(SandboxDirectory, 'stand_on_itself')", "standby"),
    (STANDBY, "Incarnation.end = die", "standby"),
    (STANDBY, "SandboxDirectory.forget_overlays = die", "standby"),
    (RESUME, "memory_images.write_patch = start.write_patch = die", "standby"),
    (RESUME, "QemuMachine.load_state = die", "standby"),
    (RESUME, "start.rebirth = die", "standby"),
    (RESET, "QemuMachine.load_state = die", "running"),
    (FORK, "once_done(Staging, 'publish')", "running"),
    (FORK, "once_done(SandboxDirectory, 'stand_on_itself')", "running"),
    (FORK, "QemuMachine.start = die", "running"),
]


#: What follows the reset of a sandbox that was branched, and stood by since; whether it is too late
#: for all to be as it was before.
RESETS = [
    ("once_done(Sandbox, 'become')", True),
    ("QemuMachine.load_state = die", False),
    ("Incarnation.end = die", True),
    ("standby.go_back = die", True),
    ("SandboxDirectory._replace_parent = die", True),
    ("once_done(SandboxDirectory, 'go_back')", True),
    ("Sandbox.persist = die", True),
    ("SandboxDirectory.forget_overlays = die", True),
]


async def orphan(engine: Engine, work: str, *, script: str) -> list[str]:
    """Have an owner fork `base`, run a script in the sandbox, and die at its work; what it said."""
    steps = textwrap.indent(work, " " * 8)
    owner = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", OWNER.replace("{steps}", steps), str(engine.store.home)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    output, _ = await owner.communicate(script.encode())
    assert owner.returncode == -signal.SIGKILL, output
    return output.decode().split()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    step = 1 if metafunc.config.getoption("--soak") else 3
    if "state" in metafunc.fixturenames:
        metafunc.parametrize(("work", "death", "state"), DEATHS[::step])
    elif "is_back" in metafunc.fixturenames:
        metafunc.parametrize(("death", "is_back"), RESETS[::step])


async def test_killed_at_any_step(engine: Engine, work: str, death: str, state: str) -> None:
    first, _, then = work.rpartition("; ")
    script = WRITE.format("before") + COUNT
    said = await orphan(engine, f"{first}\n{death}\n{then}", script=script)
    async with Engine.open(engine.store.home, keep=True) as following:
        (sandbox,) = following.sandboxes
        async with sandbox:
            assert (sandbox.id, sandbox.state) == (said[0], state)
            running = processes_of(sandbox.directory.path)
            assert len(running) == (state == "running")
            if state == "standby":
                await following.resume(sandbox)
            await sh(sandbox, CHECK)
            await Counter(*said[1:]).assert_counts(sandbox)
            if "taken" in tags(engine):
                assert sandbox.snapshot_tag == "taken"
                await engine.delete("taken", force=True)
            else:
                assert sandbox.snapshot_tag == "base"
            await assert_whole(following, sandbox)
            names = {path.name.rstrip("0123456789-") for path in sandbox.directory.path.iterdir()}
            assert not names & {"standby", "standby.new", "parent.new", "parent.old"}
    assert processes_of(engine.store.sandboxes) == []


async def test_a_reset_is_cut_short(engine: Engine, death: str, is_back: bool) -> None:
    """It stands on itself, and its new machine on the branch; the next engine tells which it is."""
    since = f"{BRANCH}; await sandbox.exec(['touch', '/root/since']); {RESUME}"
    work = f"{since}\n{death}\nawait engine.reset(sandbox)"
    await orphan(engine, work, script=WRITE.format("before"))
    async with Engine.open(engine.store.home, keep=True) as following:
        (sandbox,) = following.sandboxes
        async with sandbox:
            assert processes_of(sandbox.directory.path) == [sandbox.pid]
            await sh(sandbox, f"{CHECK}; {'!' if is_back else ''} ls /root/since")
            for _ in range(2):
                await sh(sandbox, WRITE.format("later"))
                await following.standby(sandbox)
                await following.resume(sandbox)
                await following.reset(sandbox)
                await sh(sandbox, f"{CHECK}; ! ls /root/since /root/later")
            assert sandbox.snapshot_tag == "taken"
            await assert_whole(following, sandbox)
            assert following.store.info("next").ancestors == ["base", "taken"]
            names = {path.name.rstrip("0123456789-") for path in sandbox.directory.path.iterdir()}
            assert not names & {"origin", "standby", "standby.new", "parent.new", "parent.old"}


async def test_branches_that_were_not_written_down(engine: Engine) -> None:
    """The record is of the time before the first of them; the disk was full ever since."""
    work = "Sandbox._write_down = no_space\n"
    work += "".join(f"await engine.branch(sandbox, 'unwritten{n}')\n" for n in range(3))
    await orphan(engine, f"{work}die()", script=WRITE.format("before"))
    async with Engine.open(engine.store.home, keep=True) as following:
        (sandbox,) = following.sandboxes
        async with sandbox:
            assert sandbox.snapshot_tag == "unwritten2"
            await sh(sandbox, CHECK)
            await assert_whole(following, sandbox)
            assert following.store.info("next").ancestors[1:] == [f"unwritten{n}" for n in range(3)]


@pytest.mark.parametrize("group", ["", "/beside"])
async def test_what_had_left_its_group_goes_on_after_a_branch(engine: Engine, group: str) -> None:
    script = f"""mkdir /mnt/groups; mount -t cgroup2 none /mnt/groups
    mkdir -p /mnt/groups{group}; echo $$ >/mnt/groups{group}/cgroup.procs"""
    script += WRITE.format("before") + COUNT
    said = await orphan(engine, f"branch.thaw = die\n{BRANCH}", script=script)
    async with Engine.open(engine.store.home, keep=True) as following:
        (sandbox,) = following.sandboxes
        async with sandbox:
            await Counter(*said[1:]).assert_counts(sandbox)
            await assert_whole(following, sandbox)
