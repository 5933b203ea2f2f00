"""Commands in a guest: what goes in, what comes out, and many at once."""

from __future__ import annotations

import asyncio
import os
import time
from hashlib import sha256

import pytest
from vm_helpers import sh

from ratoon.engine.sandbox.sandbox import Sandbox
from ratoon.units import MIB


async def test_streams_and_exit_code(sandbox: Sandbox) -> None:
    result = await sandbox.exec(["sh", "-c", "printf out; printf err >&2; exit 7"])
    assert (result.exit_code, result.stdout, result.stderr) == (7, b"out", b"err")
    assert not result.timed_out
    assert result.error is None


async def test_bytes_pass_unchanged(sandbox: Sandbox) -> None:
    data = bytes(range(256)) * 16 + b"\xff\xfe\x00not UTF-8\r\n"
    result = await sandbox.exec(["sh", "-c", "tee /dev/stderr"], stdin=data)
    assert result.stdout == result.stderr == data


async def test_megabytes_through_stdin_and_back(sandbox: Sandbox) -> None:
    data = os.urandom(4 * MIB)
    result = await sandbox.exec(["cat"], stdin=data)
    assert result.exit_code == 0
    assert result.stdout == data


async def test_stdin_ends_when_there_is_none(sandbox: Sandbox) -> None:
    assert (await sandbox.exec(["cat"])).stdout == b""


@pytest.mark.parametrize("command", ["true", "head -c 10 >/dev/null", "exec <&-; sleep 0.2"])
async def test_stdin_that_nobody_reads_holds_nothing_up(sandbox: Sandbox, command: str) -> None:
    result = await sandbox.exec(["sh", "-c", command], stdin=bytes(2 * MIB), timeout=60)
    assert result.exit_code == 0


async def test_output_of_20_mb_is_complete(sandbox: Sandbox) -> None:
    result = await sandbox.exec(["seq", "2700000"])
    expected = sha256(b"".join(b"%d\n" % n for n in range(1, 2700001)))
    assert len(result.stdout) > 20_000_000
    assert sha256(result.stdout).digest() == expected.digest()
    assert not result.truncated


async def test_output_left_in_an_enlarged_pipe(sandbox: Sandbox) -> None:
    script = """
import fcntl, os
fcntl.fcntl(1, fcntl.F_SETPIPE_SZ, 1 << 20)
os.write(1, b"x" * 1000000)
os._exit(0)
"""
    flood = asyncio.create_task(sandbox.exec(["head", "-c", str(30 * MIB), "/dev/zero"]))
    result = await sandbox.exec(["python3", "-c", script])
    assert (result.exit_code, len(result.stdout)) == (0, 1000000), result.stderr
    assert len((await flood).stdout) == 30 * MIB


async def test_arguments_are_not_interpreted(sandbox: Sandbox) -> None:
    arguments = ["", "a b", "$HOME", "ü\n", "\udcff", "-n"]
    result = await sandbox.exec(["printf", "%s|", *arguments])
    assert result.stdout == b"|a b|$HOME|\xc3\xbc\n|\xff|-n|"


async def test_environment(sandbox: Sandbox) -> None:
    result = await sandbox.exec(["env", "-0"], env={"NAME": "a b\nü", "HOME": "/tmp"})
    env = dict(line.split(b"=", 1) for line in result.stdout.rstrip(b"\0").split(b"\0"))
    assert env[b"NAME"] == "a b\nü".encode()
    assert env[b"HOME"] == b"/tmp"
    assert b"/usr/bin" in env[b"PATH"].split(b":")


async def test_programs_start_at_the_same_addresses_where_they_are_translated(
    sandbox: Sandbox,
) -> None:
    assert sandbox.parent
    emulated = sandbox.parent.manifest.machine.accelerator == "tcg"
    maps = [(await sandbox.exec(["cat", "/proc/self/maps"])).stdout for _ in range(2)]
    assert (maps[0] == maps[1]) == emulated


async def test_working_directory(sandbox: Sandbox) -> None:
    assert (await sandbox.exec(["pwd"])).stdout == b"/\n"
    assert (await sandbox.exec(["pwd"], cwd="/usr/lib")).stdout == b"/usr/lib\n"


@pytest.mark.parametrize(
    ("argv", "cwd", "exit_code", "error"),
    [
        (["no-such-program"], None, 127, "cannot execute no-such-program: No such file"),
        (["/no/such/program"], None, 127, "cannot execute /no/such/program: No such file"),
        (["/etc/passwd"], None, 126, "cannot execute /etc/passwd: .*Permission denied"),
        (["/usr"], None, 126, "cannot execute /usr: .*Permission denied"),
        (
            ["true"],
            "/no/such/place",
            127,
            "cannot enter the directory /no/such/place: No such file",
        ),
        (["true"], "/etc/passwd", 126, "cannot enter the directory /etc/passwd: .*Not a dir"),
    ],
)
async def test_what_cannot_be_started(
    sandbox: Sandbox, argv: list[str], cwd: str | None, exit_code: int, error: str
) -> None:
    result = await sandbox.exec(argv, cwd=cwd)
    assert (result.exit_code, result.stdout, result.stderr) == (exit_code, b"", b"")
    with pytest.raises(AssertionError, match=error):
        raise AssertionError(result.error)


async def test_a_program_that_exits_with_127_has_started(sandbox: Sandbox) -> None:
    result = await sandbox.exec(["sh", "-c", "exit 127"])
    assert (result.exit_code, result.error) == (127, None)


async def test_slow_commands_do_not_wait_for_each_other(sandbox: Sandbox) -> None:
    async def took(count: int) -> float:
        began = time.perf_counter()
        await asyncio.gather(*(sh(sandbox, "sleep 1") for _ in range(count)))
        return time.perf_counter() - began

    assert await took(2) < 1.8 * await took(1)


async def test_a_flood_of_output_does_not_silence_the_others(sandbox: Sandbox) -> None:
    flood = asyncio.create_task(sandbox.exec(["head", "-c", str(50 * MIB), "/dev/zero"]))
    for n in range(3):
        assert await sh(sandbox, f"echo {n}") == f"{n}\n"
    assert not flood.done()
    assert len((await flood).stdout) == 50 * MIB


async def test_twenty_at_once(sandbox: Sandbox) -> None:
    async def run(n: int) -> None:
        data = bytes([n]) * 100_000
        result = await sandbox.exec(["sh", "-c", f"cat; echo {n} >&2; exit {n}"], stdin=data)
        assert (result.exit_code, result.stderr) == (n, b"%d\n" % n)
        assert result.stdout == data

    await asyncio.gather(*(run(n) for n in range(20)))
