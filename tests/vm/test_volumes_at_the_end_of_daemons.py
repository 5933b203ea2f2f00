"""Volumes at the end of sandboxes, over HTTP, in the library and on the command line."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from served_daemon import Served
from vm_helpers import FOR_EVER, until
from volume_writer import WRITER, Host, Writer

from ratoon.client.aio.client import AsyncClient
from ratoon.engine.sandbox.sandbox import Sandbox
from ratoon.machine.guest.commands import processes

pytest_plugins = ["daemon_plugin"]

PROGRAM = Path(sys.executable).with_name("ratoon")
WHY = "did not answer sync within"


async def started(served: Served, *arguments: str) -> Process:
    return await asyncio.create_subprocess_exec(
        str(PROGRAM),
        *arguments,
        stdout=PIPE,
        stderr=PIPE,
        env={**os.environ, "RATOON_URL": f"unix://{served.socket}"},
    )


async def ratoon(served: Served, *arguments: str) -> tuple[int | None, str]:
    """The exit code, and what was said on stderr."""
    process = await started(served, *arguments)
    _, err = await asyncio.wait_for(process.communicate(), FOR_EVER)
    return process.returncode, err.decode()


async def deleted(served: Served, sandbox: Sandbox) -> None:
    answer = await served.api.delete(f"/v1/sandboxes/{sandbox.id}")
    assert (answer.status_code, answer.headers.get("ratoon-unsynced")) == (204, None)


async def reset(served: Served, sandbox: Sandbox) -> None:
    answer = await served.api.post(f"/v1/sandboxes/{sandbox.id}/reset")
    assert (answer.status_code, answer.json()["unsynced"]) == (200, None)


async def killed(served: Served, sandbox: Sandbox) -> None:
    code, said = await ratoon(served, "kill", sandbox.id)
    assert (code, "lack" in said) == (0, False)


async def all_killed(served: Served, sandbox: Sandbox) -> None:
    code, said = await ratoon(served, "kill", "--all")
    assert (code, "lack" in said) == (0, False)


@pytest.mark.parametrize("end", [deleted, reset, killed, all_killed])
async def test_what_was_written_is_there(
    forked: Served, tmp_path: Path, end: Callable[[Served, Sandbox], Awaitable[None]]
) -> None:
    (name,) = await forked.fork(volumes=[{"source": str(tmp_path), "target": "/mnt/shared"}])
    writer = await Writer.begin(forked.engine.get(name), tmp_path)
    written = await writer.written()
    await end(forked, writer.sandbox)
    print(f"{end.__name__}: of {written} lines, lost {writer.lost(written)}")
    assert writer.lost(written) == (0, 0)


@pytest.mark.parametrize("end", ["suspend", "delete"])
async def test_workspaces(forked: Served, tmp_path: Path, end: str) -> None:
    volume = {"source": str(tmp_path), "target": "/mnt/shared"}
    request = {"name": "w", "snapshot_tag": "base", "volumes": [volume]}
    made = await forked.api.post("/v1/workspaces", json=request)
    writer = await Writer.begin(forked.engine.get(made.json()["live_sandbox_id"]), tmp_path)
    written = await writer.written()
    if end == "suspend":
        answer = await forked.api.post("/v1/workspaces/w/suspend", json={"diff": True})
        assert (answer.status_code, answer.json().get("unsynced")) == (200, None)
        print(f"{end}: of {written} lines, lost {writer.lost(written)}")
        assert writer.lost(written) == (0, 0)
    answer = await forked.api.delete("/v1/workspaces/w")
    assert (answer.status_code, answer.headers.get("ratoon-unsynced")) == (204, None)
    print(f"workspace, {end}: of {written} lines, lost {writer.lost(written)}")
    assert writer.lost(written) == (0, 0)


@pytest.mark.parametrize("interrupted", [False, True])
async def test_the_end_of_a_run(forked: Served, tmp_path: Path, interrupted: bool) -> None:
    """It leaves a program behind that writes on; and Ctrl-C."""
    writing = 'setsid python3 -c "$0" </dev/null >/dev/null 2>&1 &'
    wait = "until [ 0$(cat /dev/shm/count) -ge 10 ]; do sleep 0.1; done; echo $(cat /dev/shm/count)"
    script = f"{writing} {wait}" + ("; sleep 1000" if interrupted else "")
    run = await started(
        *(forked, "run", "-v", f"{tmp_path}:/mnt/shared", "base", "--"),
        *("sh", "-c", script, WRITER),
    )
    assert run.stdout is not None
    if interrupted:
        said = await asyncio.wait_for(run.stdout.readuntil(b"\n"), FOR_EVER)
        run.send_signal(signal.SIGINT)
    else:
        said = await asyncio.wait_for(run.stdout.read(), FOR_EVER)
    await asyncio.wait_for(run.communicate(), FOR_EVER)
    written, lost = int(said), Host(tmp_path).lost(int(said))
    print(f"run, interrupted {interrupted}: of {written} lines, lost {lost}")
    assert lost == (0, 0)


async def test_it_is_told_where_it_cannot_be_had(forked: Served, tmp_path: Path) -> None:
    """Over HTTP, in the library, on the command line; and `now` asks nobody."""
    names = []
    for each in ("http", "library", "cli", "now"):
        (tmp_path / each).mkdir()
        volume = {"source": str(tmp_path / each), "target": "/mnt/shared"}
        names += await forked.fork(volumes=[volume])
    for name in names:
        os.kill(forked.engine.get(name).pid, signal.SIGSTOP)
    http, library, cli, now = names

    answer = await forked.api.delete(f"/v1/sandboxes/{http}")
    assert answer.status_code == 204
    assert WHY in answer.headers["ratoon-unsynced"]

    async with AsyncClient(f"unix://{forked.socket}") as client:
        sandbox = await client.sandbox(library)
        await sandbox.reset()
        assert WHY.replace("sync", "freeze") in (sandbox.unsynced or "")
        assert await sandbox.kill()
        assert sandbox.unsynced is None

    code, said = await ratoon(forked, "kill", cli)
    assert code == 0
    assert f"ratoon: {cli}: its volumes may lack data:" in said
    assert WHY in said

    code, said = await ratoon(forked, "kill", "--now", now)
    assert (code, "lack" in said) == (0, False)
    assert forked.engine.sandboxes == ()


async def test_a_run_whose_guest_hangs_in_the_end_says_so(forked: Served, tmp_path: Path) -> None:
    run = await started(
        *(forked, "run", "-v", f"{tmp_path}:/mnt/shared", "base", "--", "sleep", "1000")
    )
    await until(lambda: bool(forked.engine.sandboxes), "its sandbox")
    (sandbox,) = forked.engine.sandboxes
    while not await processes(sandbox):
        await asyncio.sleep(0.1)
    os.kill(sandbox.pid, signal.SIGSTOP)
    run.send_signal(signal.SIGHUP)  # the others are the command's
    _, err = await asyncio.wait_for(run.communicate(), FOR_EVER)
    assert f"ratoon: {sandbox.id}: its volumes may lack data:".encode() in err
