"""Images that are run twice, on real machines: what is kept, what is not, and why it was missed.

The booted image that they start from is the base of all tests.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from vm_helpers import FOR_EVER, leaves_nothing, tags

from ratoon.engine.sandbox.accelerator import choose_accelerator
from ratoon.engine.sandbox.engine import Engine
from ratoon.engine.sandbox.options import SandboxOptions, Volume
from ratoon.engine.sandbox.sandbox import Sandbox
from ratoon.engine.sources.resolve import resolve
from ratoon.engine.startup.key import Started, booted
from ratoon.engine.startup.prune import prune
from ratoon.engine.startup.runner import Run, Runner
from ratoon.engine.startup.spec import CommandHealth, HttpHealth, LogHealth, RunSpec
from ratoon.errors import InvalidInput, NotHealthy
from ratoon.machine.guest import commands
from ratoon.machine.guest.build import build_guest
from ratoon.machine.guest.shared import wire
from ratoon.machine.volumes.named import directory

#: Answers each request with the value of $WHO, and counts them.
SERVER = """
import os, socket
count, server = 0, socket.create_server(("127.0.0.1", 8000))
print("listening", flush=True)
while True:
    client, _ = server.accept()
    client.recv(4096)
    count += 1
    body = f"{os.environ.get('WHO')} {count}"
    client.sendall(f"HTTP/1.0 200 OK\\r\\n\\r\\n{body}".encode())
    client.close()
"""
SERVE = ("python3", "-c", SERVER)
UP = HttpHealth(url="http://:8000/", interval_seconds=0.05, within_seconds=FOR_EVER)


def spec(*command: str, **fields: Any) -> RunSpec:
    return RunSpec(image="debian", command=command, **fields)


async def ask(sandbox: Sandbox) -> str:
    """What the server in it says."""
    answer = b""
    async with sandbox.dial(8000) as stream:
        await stream.write(b"GET / HTTP/1.0\r\n\r\n")
        while (piece := await stream.read()) is not None and piece[1]:
            answer += piece[1]
    return answer.partition(b"\r\n\r\n")[2].decode()


@pytest.fixture
async def runner(engine: Engine) -> AsyncIterator[Runner]:
    """One to which the tests' base is the booted image."""
    runner = Runner(engine)
    image = await asyncio.to_thread(resolve, "debian")
    guest = await asyncio.to_thread(build_guest)
    probe = await choose_accelerator(guest)
    document = booted(image, spec(), guest, probe)
    runner.cache.write(document, engine.store.get("base"), image="debian", pid=None, stages_ms={})
    yield runner
    shutil.rmtree(runner.cache.directory)


async def test_the_second_run_starts_where_the_first_was_up(engine: Engine, runner: Runner) -> None:
    wanted, me = spec(*SERVE, health=UP), SandboxOptions(env={"WHO": "me"})
    first = await runner.run(wanted, me)
    async with first.sandbox as sandbox:
        assert (first.tier, len(first.missed)) == (1, 1)
        assert await ask(sandbox) == "me 2"  # the check was the first
    second = await runner.run(wanted, me)
    async with second.sandbox as sandbox:
        assert (second.tier, second.missed, second.pid) == (2, (), first.pid)
        assert sandbox.snapshot_tag == f"start-{runner.cache.everything()[0].key[:24]}"
        assert await ask(sandbox) == "me 2"
        async with commands.attach(sandbox, second.pid or 0) as running:
            assert await running.read() == (wire.STDOUT, b"listening\n")
            running.signal(15)  # process 1 has no handler for it, and so it is nothing
            assert await ask(sandbox) == "me 3"
            running.signal(9)
            assert (await running.wait()).exit_code == 128 + 9
    other = await runner.run(wanted, SandboxOptions(env={"WHO": "you"}))
    async with other.sandbox as sandbox:
        assert other.tier == 1
        assert "environment.WHO is me there, you here" in other.missed[0]
        assert await ask(sandbox) == "you 2"
    assert len(await prune(engine, runner.cache, everything=True)) == 3
    assert tags(engine) == {"base"}


async def test_a_start_is_of_what_its_volumes_hold(
    engine: Engine, runner: Runner, tmp_path: Path
) -> None:
    (tmp_path / "name").write_text("one")
    options = SandboxOptions(
        volumes=(
            Volume(source=str(tmp_path), target="/conf", read_only=True),
            Volume(source="kept", target="/kept"),
        )
    )
    # What it writes itself as it starts is of the start too.
    script = 'export WHO=$(cat /conf/name); date >>/kept/starts; exec python3 -c "$1"'
    wanted = spec("sh", "-c", script, "sh", SERVER, health=UP)
    for name, tiers in (("one", [1, 2]), ("two", [1, 2])):
        (tmp_path / "name").write_text(name)
        for tier in tiers:
            run = await runner.run(wanted, options)
            async with run.sandbox as sandbox:
                assert run.tier == tier, run.missed
                assert await ask(sandbox) == f"{name} 2"
        assert [each.document.tier for each in runner.cache.entries()] == [2, 1]
    shutil.rmtree(directory(engine.store.home) / "kept")
    await prune(engine, runner.cache, everything=True)


async def test_without_a_health_check_there_is_the_booted_image_alone(
    engine: Engine, runner: Runner
) -> None:
    for start in (True, False):
        run = await runner.run(spec("sleep", "1000"), start=start)
        async with run.sandbox as sandbox:
            assert (run.tier, run.missed, run.argv) == (1, (), ("sleep", "1000"))
            listed = [each.pid for each in await commands.processes(sandbox)]
            assert listed == ([run.pid] if start else [])
    assert tags(engine) == {"base"}


async def test_an_init_takes_the_place_of_process_1(engine: Engine, runner: Runner) -> None:
    for init in (True, False):
        run = await runner.run(spec("sleep", "1000", init=init))
        assert run.pid is not None
        async with run.sandbox as sandbox, commands.attach(sandbox, run.pid) as running:
            one = await sandbox.exec(["cat", "/proc/1/comm"])
            assert (one.stdout == b"sleep\n") is not init
            running.signal(15)
            if init:
                assert (await running.wait()).exit_code == 128 + 15
            else:
                again = await sandbox.exec(["cat", "/proc/1/comm"])
                assert again.stdout == one.stdout


async def test_equal_runs_at_once_are_made_once(engine: Engine, runner: Runner) -> None:
    another = Runner(engine)  # as if of another process: nothing but files is shared
    wanted = spec(*SERVE, health=LogHealth(pattern="^listening$", within_seconds=FOR_EVER))
    runs: list[Run] = await asyncio.gather(*(each.run(wanted) for each in (runner, another)))
    try:
        assert sorted(each.tier for each in runs) == [1, 2]
        assert [await ask(each.sandbox) for each in runs] == ["None 1", "None 1"]
    finally:
        await asyncio.gather(*(each.sandbox.kill() for each in runs))


async def test_what_is_never_up_leaves_nothing(engine: Engine, runner: Runner) -> None:
    with leaves_nothing(engine):
        dying = spec("sh", "-c", "echo no port; exit 3", health=UP)
        with pytest.raises(NotHealthy, match=r"(?s)exited with 3.*no port") as failed:
            await runner.run(dying)
        assert failed.value.status == 3
        health = UP.model_copy(update={"within_seconds": 0.5})
        with pytest.raises(NotHealthy, match=r"(?s)not healthy within 0.5 s:.*refused"):
            await runner.run(spec("sleep", "1000", health=health))
        never = CommandHealth(argv=("false",), within_seconds=0.5)
        with pytest.raises(NotHealthy, match=r"not healthy within 0.5 s"):
            await runner.run(spec("sleep", "1000", health=never))
        with pytest.raises(InvalidInput, match="no-such-program"):
            await runner.run(spec("no-such-program", health=UP))
        with pytest.raises(InvalidInput, match="no command of its own"):
            await runner.run(spec(health=UP))


async def test_a_start_that_is_gone_or_of_another_qemu_is_made_anew(
    engine: Engine, runner: Runner
) -> None:
    wanted = spec("sleep", "1000", health=CommandHealth(argv=("true",)))
    await (await runner.run(wanted)).sandbox.kill()
    (entry,) = (each for each in runner.cache.entries() if each.document.tier == 2)
    await engine.delete(entry.snapshot.tag)
    second = await runner.run(wanted)
    await second.sandbox.kill()
    gone = f"tier 2: its snapshot {entry.snapshot.tag} is gone"
    assert (second.tier, second.missed) == (1, (gone,))
    (entry,) = (each for each in runner.cache.entries() if isinstance(each.document, Started))
    assert isinstance(entry.document, Started)
    below = entry.document.booted.model_copy(update={"qemu_version": "10.0.0"})
    snapshot = engine.store.get(entry.snapshot.tag)
    runner.cache.remove(entry.key)
    older = entry.document.model_copy(update={"booted": below})
    runner.cache.write(older, snapshot, image="debian", pid=1, stages_ms={})
    third = await runner.run(wanted)
    await third.sandbox.kill()
    assert third.tier == 1
    assert "booted.qemu_version is 10.0.0 there" in third.missed[0]


async def test_a_run_without_the_cache_leaves_nothing(engine: Engine, runner: Runner) -> None:
    with leaves_nothing(engine):
        before = runner.cache.everything()
        run = await runner.run(spec(*SERVE, health=UP), cache=False)
        async with run.sandbox as sandbox:
            assert run.tier == 0
            assert await ask(sandbox) == "None 2"
        assert runner.cache.everything() == before
