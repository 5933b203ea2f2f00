"""What was made with a QEMU that is too old by now: named, kept as it is, and of no use."""

from __future__ import annotations

from pathlib import Path

import pytest
from vm_helpers import processes_of

from ratoon.engine.sandbox import compatible
from ratoon.engine.sandbox.engine import Engine
from ratoon.engine.sandbox.sweep import sweep
from ratoon.errors import Incompatible
from ratoon.store.snapshot import manifest


@pytest.fixture
async def left(engine: Engine) -> list[str]:
    """Two sandboxes of an engine that is gone: one runs, one is in standby."""
    async with Engine.open(engine.store.home, keep=True) as owner:
        running, waiting = await owner.fork_one("base"), await owner.fork_one("base")
        await owner.standby(waiting)
        return [running.id, waiting.id]


def content(directory: Path) -> dict[str, tuple[int, bytes]]:
    """All that lies in it, but for what its machine writes."""
    return {
        str(path.relative_to(directory)): (path.stat().st_ino, path.read_bytes())
        for path in directory.rglob("*")
        if path.is_file() and not path.name.startswith(("log", "disk"))
    }


async def test_sandboxes_are_kept_as_they_are(
    engine: Engine,
    left: list[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    sandboxes = engine.store.sandboxes
    machines = processes_of(sandboxes)
    before = content(sandboxes)
    with monkeypatch.context() as newer:
        newer.setattr(manifest, "OLDEST_QEMU", (999, 0))
        for _ in range(2):  # two of the newer Ratoon, one after the other
            async with Engine.open(engine.store.home, keep=True) as following:
                assert [following.get(name).state for name in left] == ["outdated"] * 2
                assert all(name in caplog.text for name in left)
                running, waiting = (following.get(name) for name in left)
                for action in (
                    running.exec(["true"]),
                    waiting.exec(["true"]),
                    following.resume(waiting),
                    following.standby(running),
                    following.reset(running),
                    following.branch(running, "made"),
                    following.fork_sandbox(running),
                ):
                    with pytest.raises(Incompatible, match=r"QEMU \d+\.\d+.*kept as it is"):
                        await action
        assert sweep(engine.store, Path("/nowhere")) == []
        assert processes_of(sandboxes) == machines
        assert content(sandboxes) == before

    async with Engine.open(engine.store.home, keep=True) as as_before:
        for name in left:
            async with as_before.get(name) as sandbox:
                if sandbox.state == "standby":
                    await as_before.resume(sandbox)
                assert (await sandbox.exec(["true"])).exit_code == 0


async def test_they_can_be_killed(
    engine: Engine, left: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest, "OLDEST_QEMU", (999, 0))
    assert processes_of(engine.store.sandboxes)
    async with Engine.open(engine.store.home, keep=True) as following:
        for name in left:
            await following.get(name).kill()
        assert not following.sandboxes
        assert processes_of(engine.store.sandboxes) == []
        assert not list(engine.store.sandboxes.iterdir())


async def test_another_qemu_leaves_it_in_standby(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not so old, but it is not that of its device state: nobody tries to load that."""
    async with await engine.fork_one("base") as sandbox:
        await engine.standby(sandbox)
        with monkeypatch.context() as elsewhere:
            elsewhere.setattr(compatible, "qemu_version", lambda: "999.0.1")
            with pytest.raises(Incompatible, match=r"this host has 999\.0\.1"):
                await engine.resume(sandbox)
            with pytest.raises(Incompatible, match=r"this host has 999\.0\.1"):
                await engine.fork_one("base")
        assert sandbox.state == "standby"
        await engine.resume(sandbox)
        assert (await sandbox.exec(["true"])).exit_code == 0
