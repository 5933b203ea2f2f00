"""The warm interpreter in a real guest: its state goes with a snapshot, its randomness does not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from vm_helpers import FOR_EVER, sh

from ratoon.engine.sandbox.engine import Engine
from ratoon.engine.sandbox.sandbox import Sandbox
from ratoon.errors import NoPython
from ratoon.machine.guest.evaluation import evaluate


async def value(sandbox: Sandbox, code: str) -> str | None:
    """The result of code that must succeed."""
    result = await evaluate(sandbox, code, timeout=FOR_EVER)
    assert (result.error, result.exit_code) == (None, 0)
    return result.result


@asynccontextmanager
async def two_forks(engine: Engine, tag: str) -> AsyncIterator[list[Sandbox]]:
    async with await engine.fork_one(tag) as one, await engine.fork_one(tag) as two:
        yield [one, two]


async def test_state_goes_into_forks_and_stays_apart(engine: Engine, sandbox: Sandbox) -> None:
    await value(sandbox, "import decimal; seen = ['before']; exact = decimal.Decimal(1) / 3")
    await engine.branch(sandbox, "with-state")
    await value(sandbox, "seen.append('source')")
    async with two_forks(engine, "with-state") as forks:
        for number, fork in enumerate(forks):
            assert await value(fork, f"seen.append({number}); seen") == str(["before", number])
            assert await value(fork, "str(exact)") == repr("0." + "3" * 28)
    assert await value(sandbox, "seen") == "['before', 'source']"


async def test_output_errors_and_an_interrupt(sandbox: Sandbox) -> None:
    heard: list[bytes] = []

    async def listen(data: bytes) -> None:
        heard.append(data)

    code = "import sys\nprint('x' * 1_000_000)\nsys.stderr.write('err')\nkept = 1\n1 / 0"
    result = await evaluate(sandbox, code, on_stdout=listen, timeout=FOR_EVER)
    assert b"".join(heard) == b"x" * 1_000_000 + b"\n"
    assert (result.stdout, result.stderr, result.exit_code) == (b"", b"err", 1)
    assert (result.error or "").endswith("ZeroDivisionError: division by zero\n")
    result = await evaluate(sandbox, "while True: pass", timeout=0.5)
    assert (result.exit_code, result.timed_out, result.state_lost) == (124, True, False)
    assert await value(sandbox, "kept") == "1"


async def test_a_cancelled_evaluation_is_interrupted(sandbox: Sandbox) -> None:
    await value(sandbox, "import signal")
    task = asyncio.create_task(evaluate(sandbox, "open('/run/began', 'w'); signal.pause()"))
    await sh(sandbox, "until [ -e /run/began ]; do sleep 0.05; done; rm /run/began")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await value(sandbox, "1") == "1"


async def test_an_interpreter_that_is_killed(engine: Engine) -> None:
    async with await engine.fork_one("base") as sandbox:
        for others in ("", "for python in $(which -a python3); do mv $python $python.gone; done"):
            pid = await value(sandbox, "import os; os.getpid()")
            await sh(
                sandbox, f"{others}\nkill -9 {pid}; while [ -e /proc/{pid} ]; do sleep 0.05; done"
            )
            result = await evaluate(sandbox, "1", timeout=FOR_EVER)
            assert result.state_lost
            assert (result.error or "").startswith("the interpreter was killed by signal 9")
        with pytest.raises(
            NoPython, match=f"agent of {sandbox.id} refused eval: the sandbox has no"
        ):
            await evaluate(sandbox, "1", timeout=FOR_EVER)


# Randomness -----------------------------------------------------------------------------------

#: All of them have drawn before; `random` from a known seed, so that equal draws are no accident.
DRAW = """
import os, random, secrets, ssl, time, uuid
def draw():
    return [
        random.random(), random.gauss(0, 1), ssl.RAND_bytes(16).hex(), uuid.uuid4().hex,
        secrets.token_hex(), os.urandom(16).hex(), os.getrandom(16).hex(),
        open('/proc/sys/kernel/random/uuid').read(),
    ]
random.seed(1)
"""


def assert_all_differ(draws: list[str | None]) -> None:
    kinds = zip(*(eval(draw or "") for draw in draws), strict=True)
    assert [len(set(kind)) for kind in kinds] == [len(draws)] * 8


async def test_forks_draw_what_no_other_draws(engine: Engine, sandbox: Sandbox) -> None:
    await value(sandbox, f"{DRAW}\ndraw()")
    await engine.branch(sandbox, "drawn")
    async with two_forks(engine, "drawn") as forks:
        assert_all_differ([await value(each, "draw()") for each in (sandbox, *forks)])
        again = [await value(each, "draw()") for each in forks]
        await engine.branch(forks[0], "drawn-again")
        async with two_forks(engine, "drawn-again") as deeper:
            assert_all_differ([*again, *[await value(each, "draw()") for each in deeper]])


#: Draws once there is /run/go, and leaves it in /run/drawn.
LATER = """
def later():
    while not os.path.exists('/run/go'): time.sleep(0.001)
    with open('/run/drawn.new', 'w') as file: file.write(str(draw()))
    os.rename('/run/drawn.new', '/run/drawn')
"""
#: Not before the signal that reseeds has arrived: on a busy host, processor time comes late.
GO = """
sleep 2; touch /run/go
until [ -e /run/drawn ]; do sleep 0.05; done; cat /run/drawn; rm /run/go /run/drawn
"""


@pytest.mark.parametrize(
    "code", ["later()", "import threading; threading.Thread(target=later).start()"]
)
async def test_code_that_runs_at_the_branch_draws_its_own_in_each_fork(
    engine: Engine, sandbox: Sandbox, code: str
) -> None:
    await value(sandbox, f"{DRAW}{LATER}\ndraw()")
    running = asyncio.create_task(evaluate(sandbox, f"open('/run/began', 'w')\n{code}"))
    await sh(sandbox, "until [ -e /run/began ]; do sleep 0.05; done; rm /run/began")
    if "threading" in code:
        await running
    await engine.branch(sandbox, "running")
    async with two_forks(engine, "running") as forks:
        draws: list[str | None] = [await sh(each, GO) for each in (sandbox, *forks)]
        assert_all_differ(draws)
        assert len({await value(each, "random.random()") for each in (sandbox, *forks)}) == 3
    assert (await running).exit_code == 0


# TLS ------------------------------------------------------------------------------------------

CERTIFICATE = """
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 3650 \
    -subj /CN=localhost -addext subjectAltName=DNS:localhost \
    -keyout /root/key.pem -out /root/cert.pem 2>/dev/null
"""
HANDSHAKE = """
import socket, ssl, threading
def serve(listener):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain('/root/cert.pem', '/root/key.pem')
    with context.wrap_socket(listener.accept()[0], server_side=True) as connection:
        connection.sendall(connection.recv(100).upper())
with socket.create_server(('127.0.0.1', 0)) as listener:
    threading.Thread(target=serve, args=(listener,)).start()
    context = ssl.create_default_context()
    context.load_verify_locations('/root/cert.pem')
    with socket.create_connection(listener.getsockname()) as plain:
        with context.wrap_socket(plain, server_hostname='localhost') as connection:
            connection.sendall(b'hello')
            answer = connection.version(), connection.recv(100)
answer
"""


async def test_a_fresh_fork_speaks_tls_at_once(engine: Engine, sandbox: Sandbox) -> None:
    await sh(sandbox, CERTIFICATE)
    await value(sandbox, "import ssl")
    await engine.branch(sandbox, "certified")
    async with await engine.fork_one("certified") as fork:
        assert await value(fork, HANDSHAKE) == "('TLSv1.3', b'HELLO')"
