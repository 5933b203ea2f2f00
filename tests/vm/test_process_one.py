"""An image's command is process 1 of its own processes, as in a container."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from vm_helpers import sh

from ratoon.engine.sandbox.engine import Engine
from ratoon.engine.sandbox.options import SandboxOptions, Volume
from ratoon.engine.sandbox.sandbox import Sandbox
from ratoon.errors import Conflict
from ratoon.machine.guest import commands
from ratoon.machine.guest.commands import Command
from ratoon.machine.guest.shared import wire

#: Says who it is, waits for orphans and says so, counts, and heeds SIGTERM.
INIT = """
import os, signal, sys, time
def end(*_):  # the print below may be what it interrupts
    os.write(1, b"told to end\\n")
    sys.exit(3)
signal.signal(signal.SIGTERM, end)
print(os.getpid(), os.getppid(), os.readlink("/proc/self"), os.getuid(), flush=True)
count = 0
while True:
    count += 1
    with open("/tmp/count.new", "w") as file:
        file.write(str(count))
    os.rename("/tmp/count.new", "/tmp/count")
    try:
        found, status = os.waitpid(-1, os.WNOHANG)
        if found:
            print("buried", os.waitstatus_to_exitcode(status), flush=True)
    except ChildProcessError:
        pass
    time.sleep(0.01)
"""
PYTHON_INIT = ("python3", "-c", INIT)
DEAF = ("python3", "-c", "import time; print('there', flush=True); time.sleep(1e6)")
#: What /proc has, and what the program of its process 1 is.
SEEN = "echo /proc/[0-9]* | wc -w; cat /proc/1/comm"
#: Waits until so many sleep.
SLEEPS = "until [ $(cat /proc/[0-9]*/comm 2>/dev/null | grep -c sleep) = {} ]; do sleep 0.1; done"
GOES_ON = """
n=$(cat /tmp/count); until [ $(cat /tmp/count) -gt $n ]; do sleep 0.05; done
cat /proc/1/comm
"""


@asynccontextmanager
async def main_command(sandbox: Sandbox, *argv: str, **how: Any) -> AsyncIterator[Command]:
    """One that is process 1; in the foreground, it ends with the block."""
    async with commands.start(sandbox, [*argv], own_pids=True, **how) as command:
        yield command


async def line(command: Command) -> str:
    piece = await command.read()
    assert piece is not None
    assert piece[0] == wire.STDOUT, piece
    return piece[1].decode().strip()


async def test_it_is_one_and_waits_for_orphans(sandbox: Sandbox) -> None:
    async with main_command(sandbox, *PYTHON_INIT) as command:
        assert await line(command) == "1 0 1 0"
        await sh(sandbox, "(sh -c 'exit 4' &)")
        assert await line(command) == "buried 4"
        command.signal(15)
        assert await line(command) == "told to end"
        assert (await command.wait()).exit_code == 3


async def test_commands_are_beside_it_while_it_runs(sandbox: Sandbox) -> None:
    """As those of `docker exec`; before and afterwards the agent is process 1."""
    python = ["python3", "-c", "import os; print(open('/proc/1/comm').read(), os.getuid())"]
    before = (await sh(sandbox, SEEN)).split()
    async with main_command(sandbox, *PYTHON_INIT) as command:
        await line(command)
        count, *name = (await sh(sandbox, SEEN)).split()
        assert (int(count) < 10, name) == (True, ["python3"])
        result = await sandbox.exec(python, user="nobody", cwd="/tmp")
        assert result.stdout.split() == [b"python3", b"65534"]
        async with commands.start(sandbox, ["cat", "/proc/1/comm"], terminal=(24, 80)) as shown:
            assert await line(shown) == "python3"
        missing = await sandbox.exec(["/no/such/program"])
        assert missing.exit_code == 127
        with pytest.raises(Conflict, match="has a main command"):
            async with main_command(sandbox, *PYTHON_INIT):
                pass
    assert (await sh(sandbox, SEEN)).split()[1:] == before[1:] != name


async def test_signals_are_as_for_any_process_1(sandbox: Sandbox) -> None:
    """What it has no handler for is nothing to it, and they are for it alone."""
    script = "trap 'echo heard' USR1; sleep 1000 & echo there; while :; do wait; done"
    async with main_command(sandbox, "sh", "-c", script) as command:
        assert await line(command) == "there"
        for number in (15, 1, 10):
            command.signal(number)
        assert await line(command) == "heard"
        await sh(sandbox, SLEEPS.format(1))
        command.signal(9)
        assert (await command.wait()).exit_code == 128 + 9


async def test_all_ends_with_it(sandbox: Sandbox) -> None:
    """What has left its session, and commands beside it."""
    script = "setsid sleep 4321 & echo there; read line; exit 5"
    async with (
        main_command(sandbox, "sh", "-c", script, stdin=True) as command,
        commands.start(sandbox, ["sleep", "4321"]) as beside,
    ):
        assert await line(command) == "there"
        await sh(sandbox, SLEEPS.format(2))
        await command.write(b"\n")
        assert (await command.wait()).exit_code == 5
        assert (await beside.wait()).exit_code == 128 + 9
    assert await sh(sandbox, "cat /proc/[0-9]*/cmdline | tr '\\0' ' ' | grep -c 4321; :") == "1\n"


async def test_as_a_user_on_a_terminal(sandbox: Sandbox) -> None:
    how: dict[str, Any] = {"user": "nobody", "cwd": "/tmp", "terminal": (24, 80)}
    script = "id -u; pwd; echo $$; echo x >/dev/stdout; test -w /etc/passwd || tty -s && echo tty"
    async with main_command(sandbox, "bash", "-c", script, **how) as command:
        written = b""
        while (piece := await command.read()) is not None:
            written += piece[1]
        assert written.split() == [b"65534", b"/tmp", b"1", b"x", b"tty"]
        assert (await command.wait()).exit_code == 0


async def test_what_cannot_be_started_leaves_the_agent_where_it_was(sandbox: Sandbox) -> None:
    async with main_command(sandbox, "/no/such/program") as command:
        assert (command.pid, (await command.wait()).exit_code) == (None, 127)
    for _ in range(5):  # that one has ended before anybody can ask about it
        async with main_command(sandbox, "true") as command:
            assert (await command.wait()).exit_code == 0
    assert int((await sh(sandbox, SEEN)).split()[0]) > 10


async def test_its_time_may_be_over(sandbox: Sandbox) -> None:
    async with main_command(sandbox, *DEAF, timeout=3) as command:
        assert (await command.wait()).exit_code == 124


async def test_it_goes_on_in_forks_and_after_a_resume_and_a_reset(
    engine: Engine, tmp_path: Path
) -> None:
    """And volumes of forks are there, until one has none."""
    (tmp_path / "file").write_text("of the host")
    volume = SandboxOptions(volumes=(Volume(source=str(tmp_path), target="/mnt/given"),))
    async with await engine.fork_one("base") as source:
        async with main_command(source, *PYTHON_INIT, background=True) as command:
            await line(command)
            pid = command.pid
        assert pid is not None
        await engine.branch(source, "first")
        assert await sh(source, GOES_ON) == "python3\n"
        async with await engine.fork_one("first", volume) as fork:
            assert await sh(fork, GOES_ON) == "python3\n"
            assert await sh(fork, "cat /mnt/given/file; echo x >/mnt/given/x") == "of the host"
            assert (tmp_path / "x").read_text() == "x\n"
            (without,) = await engine.fork_sandbox(fork, options=SandboxOptions())
            assert isinstance(without, Sandbox)
            async with without:
                assert await sh(without, "ls /mnt/given") == ""
                assert await sh(without, "hostname; cat /etc/hostname") == f"{without.id}\n" * 2
                async with commands.attach(without, pid) as command:
                    command.signal(15)
                    assert (await command.wait()).exit_code == 3
        await engine.standby(source)
        await engine.resume(source)
        assert await sh(source, GOES_ON) == "python3\n"
        async with commands.attach(source, pid) as command:
            command.signal(9)
            await command.wait()
        await engine.reset(source)
        assert await sh(source, GOES_ON) == "python3\n"
