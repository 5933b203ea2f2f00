"""Commands in a guest as they run: terminals, users, floods, the background, and connections."""

from __future__ import annotations

import asyncio
import signal
from hashlib import sha256

import pytest
from vm_helpers import FOR_EVER, sh, until_gone

from ratoon.engine.sandbox.engine import Engine
from ratoon.engine.sandbox.sandbox import Sandbox
from ratoon.errors import GuestError, InvalidInput
from ratoon.machine.guest import commands
from ratoon.machine.guest.commands import Command, Ended
from ratoon.machine.guest.shared import wire
from ratoon.units import MIB

SIZE = (24, 80)


async def read_until(command: Command, end: bytes) -> bytes:
    """What it writes to stdout or its terminal, until that ends so."""
    data = b""
    async with asyncio.timeout(FOR_EVER):
        while not data.endswith(end):
            piece = await command.read()
            assert piece is not None, f"it ended after {data!r}"
            data += piece[1]
    return data


# Terminals and users --------------------------------------------------------------------------


async def test_a_shell_on_a_terminal(sandbox: Sandbox) -> None:
    argv, env = ["bash", "--norc", "-i"], {"PS1": "$ ", "TERM": "dumb"}
    async with commands.start(sandbox, argv, terminal=SIZE, env=env) as shell:
        await read_until(shell, b"$ ")
        await shell.write(b"tty; stty size\r")
        assert b"\r\n/dev/pts/" in (said := await read_until(shell, b"$ "))
        assert b"24 80\r\n" in said
        shell.resize(50, 132)
        await shell.write(b"stty size\r")
        said = b""
        while b"50 132\r\n" not in said:  # for the new width, the shell draws its line anew first
            said += await read_until(shell, b"$ ")
        await shell.write(b"sh -c 'echo started; exec sleep 1000'\r")
        await read_until(shell, b"started\r\n")
        await shell.write(b"\x03")  # the shell's job, not the shell, is interrupted
        await read_until(shell, b"$ ")
        await shell.write(b"exit 5\r")
        assert await shell.wait() == Ended(5)


WHO = "id -un; id -gn; id -Gn; echo $HOME $USER $LOGNAME $SHELL; grep CapEff /proc/self/status"


async def test_another_user(sandbox: Sandbox) -> None:
    await sh(sandbox, "useradd -m -s /bin/bash ann && groupadd crew && usermod -a -G crew ann")
    result = await sandbox.exec(["sh", "-c", WHO], user="ann")
    who = ["ann", "ann", "ann crew", "/home/ann ann ann /bin/bash", "CapEff:\t" + "0" * 16]
    assert result.stdout.decode().splitlines() == who
    crew = (await sh(sandbox, "getent group crew")).split(":")[2]
    result = await sandbox.exec(["sh", "-c", "id -u; id -g; id -G; echo $HOME"], user="4242:crew")
    assert result.stdout.decode().split() == ["4242", crew, crew, "/"]
    assert (await sandbox.exec(["cat", "/etc/shadow"], user="ann")).exit_code == 1
    assert (await sandbox.exec(["touch", "/home/ann/mine"], user="ann")).exit_code == 0
    assert await sh(sandbox, "stat -c %U:%G /home/ann/mine") == "ann:ann\n"
    own_terminal = ["sh", "-c", "echo >$(tty)"]
    async with commands.start(sandbox, own_terminal, user="ann", terminal=SIZE) as command:
        assert await command.wait() == Ended(0)
    with pytest.raises(InvalidInput, match="the sandbox has no user 'bert'"):
        await sandbox.exec(["true"], user="bert")


# Floods ---------------------------------------------------------------------------------------


AGENT_KIB = "grep VmHWM /proc/1/status | tr -cd 0-9"


async def test_a_flood_of_which_nobody_reads_holds_up_itself_alone(sandbox: Sandbox) -> None:
    """More than any buffer in between: what is not read stays with who writes it."""
    size = 20 * MIB
    before = int(await sh(sandbox, AGENT_KIB))
    flood = ["sh", "-c", f"head -c {size} /dev/zero; echo done >/dev/shm/flooded"]
    async with commands.start(sandbox, flood) as slow, commands.start(sandbox, flood) as quick:
        digest, count = sha256(), 0
        while (piece := await quick.read()) is not None:
            digest.update(piece[1])
            count += len(piece[1])
        assert await quick.wait() == Ended(0)
        assert count == size
        assert digest.digest() == sha256(bytes(size)).digest()
        (unread,) = await commands.processes(sandbox)
        assert (unread.pid, unread.exit_code) == (slow.pid, None)
        heard = 0
        while (piece := await slow.read()) is not None:
            heard += len(piece[1])
        assert heard == size
    after = int(await sh(sandbox, AGENT_KIB))
    assert after - before < 4 * 1024


# Nothing is left ------------------------------------------------------------------------------


HELD = """
import os
from pathlib import Path
tables = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/status")]
print(len(os.listdir("/proc/1/fd")), sum(b"PPid:\\t2\\n" not in table for table in tables))
"""


async def test_nothing_is_left_of_streams_that_were_cancelled(sandbox: Sandbox) -> None:
    async def held() -> tuple[int, ...]:
        """What the agent has open, and the processes there are, without the kernel's own."""
        result = await sandbox.exec(["python3", "-c", HELD], timeout=FOR_EVER)
        return tuple(map(int, result.stdout.split()))

    before = await held()
    tasks = len(asyncio.all_tasks())

    async def leave(number: int) -> None:
        argv = [["yes"], ["cat"], ["sleep", "1000"], ["sh", "-c", "sleep 1000 & wait"]][number % 4]
        terminal = SIZE if number % 3 == 0 else None
        async with commands.start(sandbox, argv, stdin=True, terminal=terminal) as command:
            await command.write(b"line\n" * (number % 5))
            if number % 2:
                await command.read()

    async def cancelled(number: int) -> None:
        task = asyncio.create_task(leave(number))
        await asyncio.sleep(0.01 * number)
        task.cancel()
        await asyncio.wait({task})

    await asyncio.gather(*(leave(number) for number in (0, 1, 4, 6, 8, 9)))
    await asyncio.gather(*(cancelled(number) for number in range(12)))
    async with asyncio.timeout(FOR_EVER):
        while await commands.processes(sandbox):
            await asyncio.sleep(0.05)
        while await held() != before:
            await asyncio.sleep(0.05)
    assert len(asyncio.all_tasks()) == tasks


# In the background, here and in forks ---------------------------------------------------------


async def test_a_fork_finds_what_the_source_was_running(engine: Engine) -> None:
    script = "echo begun; while read line; do echo $line; done; exit 7"
    async with (
        await engine.fork_one("base") as source,
        commands.start(source, ["sh", "-c", script], stdin=True) as command,
    ):
        await command.write(b"before\n")
        await read_until(command, b"before\n")
        await engine.branch(source, "midway")
        async with await engine.fork_one("midway") as fork:
            (found,) = await commands.processes(fork)
            assert (found.pid, found.attached, found.exit_code) == (command.pid, False, None)
            assert found.argv == ["sh", "-c", script]
            async with commands.attach(fork, found.pid) as again:
                await again.write(b"in the fork\n")
                assert await read_until(again, b"fork\n") == b"begun\nbefore\nin the fork\n"
                again.end_input()
                assert await again.wait() == Ended(7)
            (found,) = await commands.processes(fork)
            assert found.exit_code == 7
        await command.write(b"in the source\n")
        assert await read_until(command, b"\n") == b"in the source\n"


async def test_one_in_the_background_of_a_terminal(sandbox: Sandbox) -> None:
    script = "trap 'exit 3' USR1; i=0; while :; do i=$((i+1)); echo line $i; done"
    argv = ["sh", "-c", script]
    async with commands.start(sandbox, argv, terminal=SIZE, background=True) as command:
        pid = command.pid or 0
    assert await sh(sandbox, "echo others go on") == "others go on\n"
    async with commands.attach(sandbox, pid) as command:
        assert await read_until(command, b"\r\n")
    await commands.signal(sandbox, pid, signal.SIGUSR1)
    async with commands.attach(sandbox, pid) as command:
        assert await command.wait() == Ended(3)
    await until_gone(sandbox, str(pid))


# Connections ----------------------------------------------------------------------------------

SERVER = """
import socket, sys
listener = socket.create_server((sys.argv[1], 0), family=getattr(socket, sys.argv[2]))
print(listener.getsockname()[1], flush=True)
connection, _ = listener.accept()
data = b""
while piece := connection.recv(65536):
    data += piece
connection.sendall(data[::-1])
"""


@pytest.mark.parametrize(("host", "family"), [("127.0.0.1", "AF_INET"), ("::1", "AF_INET6")])
async def test_a_connection_to_a_server_in_the_guest(
    sandbox: Sandbox, host: str, family: str
) -> None:
    data = bytes(range(256)) * 4000
    async with commands.start(sandbox, ["python3", "-c", SERVER, host, family]) as server:
        port = int(await read_until(server, b"\n"))
        async with commands.dial(sandbox, port, host=host) as stream:
            await stream.write(data)
            stream.end_input()
            answer = b""
            while (piece := await stream.read()) is not None:
                assert piece[0] == wire.STDOUT
                answer += piece[1]
            assert answer == data[::-1]
            assert await stream.result() == {}
        assert await server.wait() == Ended(0)
    with pytest.raises(GuestError, match="Connection refused") as caught:
        async with commands.dial(sandbox, port, host=host):
            pass
    assert caught.value.kind == "refused"
