"""Volumes on the command line, and a real daemon."""

from __future__ import annotations

import asyncio
import os
import sys
from asyncio.subprocess import PIPE
from pathlib import Path

from served_daemon import Served
from vm_helpers import FOR_EVER

pytest_plugins = ["daemon_plugin"]

PROGRAM = Path(sys.executable).with_name("ratoon")


async def ratoon(served: Served, *arguments: str) -> tuple[int, str]:
    """The exit code, and all that was printed."""
    process = await asyncio.create_subprocess_exec(
        str(PROGRAM),
        *arguments,
        stdout=PIPE,
        stderr=PIPE,
        env={**os.environ, "RATOON_URL": f"unix://{served.socket}"},
    )
    out, err = await asyncio.wait_for(process.communicate(), FOR_EVER)
    assert process.returncode is not None
    return process.returncode, (out + err).decode()


async def test_directories_and_named_volumes(forked: Served, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real/given").write_text("given\n")
    (tmp_path / "link").symlink_to("real")
    given = "-v", f"{tmp_path}/link:/mnt/given:ro"
    script = "cat /mnt/given/given; echo kept >/mnt/kept/file; touch /mnt/given/new"
    run = "run", *given, "-v", "kept:/mnt/kept", "base", "--", "sh", "-c", script
    code, said = await ratoon(forked, *run)
    assert code == 1
    assert "given\n" in said
    assert "Read-only file system" in said
    code, said = await ratoon(forked, "volume", "ls")
    assert (code, "kept" in said) == (0, True)
    code, said = await ratoon(forked, "run", "-d", "-v", "kept:/mnt/kept", "base")
    sandbox = said.split()[0]
    assert code == 0, said
    code, said = await ratoon(forked, "volume", "rm", "kept")
    assert (code, f"held by sandbox {sandbox}" in said) == (4, True), said
    code, said = await ratoon(forked, "fork", sandbox)
    assert (code, f"held by sandbox {sandbox}" in said) == (4, True), said
    code, said = await ratoon(forked, "fork", "--no-volumes", "-v", "other:/mnt/kept", sandbox)
    assert (code, "--no-volumes and -v" in said) == (2, True), said
    code, said = await ratoon(forked, "fork", "--no-volumes", sandbox)
    assert code == 0, said
    fork = said.split()[0]
    assert forked.engine.get(fork).options.volumes == ()
    code, said = await ratoon(forked, "exec", fork, "--", "cat", "/mnt/kept/file")
    assert (code, "No such file" in said) == (1, True), said
    code, said = await ratoon(forked, "exec", sandbox, "--", "cat", "/mnt/kept/file")
    assert (code, said) == (0, "kept\n")
    assert (await ratoon(forked, "kill", sandbox))[0] == 0
    assert (await ratoon(forked, "volume", "rm", "kept"))[0] == 0
    code, said = await ratoon(forked, "run", "-v", f"{tmp_path}/no:/mnt", "base", "--", "true")
    assert (code, "no directory" in said) == (125, True), said
