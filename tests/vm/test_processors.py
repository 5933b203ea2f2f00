"""A guest's processor is that of its base, whatever starts it and however often."""

from __future__ import annotations

from pathlib import Path

import pytest
from vm_helpers import forget, leaves_nothing, sh

from ratoon.engine.sandbox.engine import Engine
from ratoon.engine.sandbox.options import SandboxOptions
from ratoon.engine.sandbox.sandbox import Sandbox
from ratoon.engine.startup.key import Booted
from ratoon.engine.startup.runner import Runner
from ratoon.engine.startup.spec import RunSpec
from ratoon.errors import Incompatible, InvalidInput
from ratoon.machine.vmm.cpu import LEVELS, describe
from ratoon.units import MIB

LEVEL = "x86-64-v2"
SMALL = 192 * MIB


async def assert_is_of_the_level(sandbox: Sandbox) -> None:
    """So it says of itself, and so QEMU was told."""
    model = sandbox.parent.manifest.machine.cpu
    assert describe(model).startswith(LEVEL)
    words = Path(f"/proc/{sandbox.pid}/cmdline").read_bytes().decode().split("\0")
    assert words[words.index("-cpu") + 1] == f"{model},enforce"
    info = await sh(sandbox, "cat /proc/cpuinfo")
    assert LEVEL in info
    assert " sse4_2 " in info
    assert " avx2 " not in info


async def test_forks_resumes_and_resets_have_the_processor_of_their_base(engine: Engine) -> None:
    await engine.bases.from_image("debian", "level", ram_bytes=SMALL, cpu=LEVEL)
    await engine.pool.keep(engine.store.get("level"), 1)
    await engine.pool.filled()
    async with await engine.fork_one("level", SandboxOptions(spare=True)) as sandbox:
        await assert_is_of_the_level(sandbox)
        await sandbox.spare.settle()
        await engine.reset(sandbox)
        await assert_is_of_the_level(sandbox)
        await engine.standby(sandbox)
        await engine.resume(sandbox)
        await assert_is_of_the_level(sandbox)
        await engine.branch(sandbox, "level-diff")
    async with await engine.fork_one("level-diff") as sandbox:
        await assert_is_of_the_level(sandbox)
    await engine.pool.drop("level")


async def test_what_this_host_lacks_is_named_before_anything_boots(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The emulator has no transactions, and processors no 3DNow! any more."""
    monkeypatch.setitem(LEVELS, "x86-64-v9", "qemu64,+3dnow,+hle")
    with leaves_nothing(engine), pytest.raises(Incompatible, match=r"it lacks (hle|3dnow);"):
        await engine.bases.from_image("debian", "never", ram_bytes=SMALL, cpu="x86-64-v9")


async def test_a_name_of_nothing_is_refused_before_anything_is_looked_up(engine: Engine) -> None:
    with pytest.raises(InvalidInput, match="no processor 'i486dx'"):
        await engine.bases.from_image("no/such/image", "never", cpu="i486dx")
    with pytest.raises(InvalidInput, match="no processor 'i486dx'"):
        await Runner(engine).run(RunSpec(image="no/such/image", cpu="i486dx"))


async def test_a_run_with_another_processor_is_another_start(engine: Engine) -> None:
    runner = Runner(engine)
    spec = RunSpec(image="debian", command=("true",), ram_bytes=SMALL, cpu=LEVEL)
    run = await runner.run(spec, start=False)
    async with run.sandbox as sandbox:
        await assert_is_of_the_level(sandbox)
    (entry,) = runner.cache.entries()
    assert isinstance(entry.document, Booted)
    assert entry.document.cpu == LEVEL
    again = await runner.run(spec, start=False)  # process 1 takes all with it when it ends
    async with again.sandbox as sandbox:
        assert again.tier == 1
        await assert_is_of_the_level(sandbox)
    runner.cache.remove(entry.document.key)
    forget(engine, entry.snapshot.tag)
