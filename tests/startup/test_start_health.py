"""Health checks: what they may be, and what they wait for."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from ratoon.engine.startup.health import Output, Wait, status_of
from ratoon.engine.startup.spec import CommandHealth, HttpHealth, LogHealth
from ratoon.errors import NotHealthy
from ratoon.machine.guest.commands import Ended
from ratoon.machine.guest.shared import wire


@pytest.mark.parametrize(
    ("url", "canonical", "target"),
    [
        ("http://:8000/", "http://:8000/", "/"),
        ("http://:8000", "http://:8000/", "/"),
        ("http://localhost:80/up?x=1", "http://:80/up?x=1", "/up?x=1"),
        ("http://127.0.0.1/", "http://:80/", "/"),
    ],
)
def test_urls_of_the_guest(url: str, canonical: str, target: str) -> None:
    health = HttpHealth(url=url)
    assert (health.url, health.target) == (canonical, target)


@pytest.mark.parametrize(
    "url",
    [
        *("https://:8000/", "http://elsewhere:80/", "http://:0/", "http://:70000/", "nonsense", ""),
        *("http://:80/a b", "http://:80/\r\nX: 1", "http://:80/\u20ac", "http://u@localhost:80/"),
        *("http://:80/#part", "http://[", "http://:80/" + "x" * 3000),
    ],
)
def test_urls_that_no_guest_is_asked(url: str) -> None:
    with pytest.raises(ValidationError):
        HttpHealth(url=url)


@given(st.text(max_size=40))
def test_any_text_is_a_url_or_refused(url: str) -> None:
    try:
        health = HttpHealth(url=url)
    except ValidationError:
        return
    assert 0 < health.port < 1 << 16
    assert health.target.startswith("/")
    assert HttpHealth(url=health.url) == health


@pytest.mark.parametrize("pattern", ["(", r"(?=x)y", r"(a)\1", "(a{1000}){1000}", "", "x" * 2000])
def test_patterns_that_are_none(pattern: str) -> None:
    with pytest.raises(ValidationError):
        LogHealth(pattern=pattern)


def test_no_pattern_takes_for_ever() -> None:
    health = LogHealth(pattern="(a+)+$")
    began = time.thread_time()
    assert not health.is_in("a" * 4000 + "b")
    assert time.thread_time() - began < 10  # Python's own would take the age of the universe


@given(st.lists(st.sampled_from([b"I am", b" ", b"up", b"\n", b"not "]), max_size=12))
def test_a_line_is_found_however_it_arrives(pieces: list[bytes]) -> None:
    output = Output(LogHealth(pattern="I am up"))
    for piece in pieces:
        output.add(wire.STDERR, piece)
    assert output.found.is_set() == (b"I am up" in b"".join(pieces))


def test_a_line_is_not_pieced_together_from_two_outputs() -> None:
    output = Output(LogHealth(pattern="I am up"))
    output.add(wire.STDOUT, b"I am ")
    output.add(wire.STDERR, b"up")
    assert not output.found.is_set()
    output.add(wire.STDOUT, b"up")
    assert output.found.is_set()


def test_what_is_shown_moves_no_terminal() -> None:
    output = Output(None)
    output.add(wire.STDOUT, b"\x1b[2Jbad\nlast")
    assert output.shown == "\n--- what it wrote last ---\n\ufffd[2Jbad\nlast"
    assert Output(None).shown == "; it wrote nothing"


@given(st.binary(max_size=60))
def test_any_bytes_are_an_answer_or_none(answer: bytes) -> None:
    status = status_of(answer)
    assert status is None or 0 <= status <= 999


def test_the_status_of_an_answer() -> None:
    assert status_of(b"HTTP/1.0 204 No Content\r\n\r\n") == 204
    assert status_of(b"SSH-2.0-OpenSSH\r\n") is None


class Running:
    """A command that writes these, and then ends, or never does."""

    def __init__(self, *pieces: bytes, code: int | None = None) -> None:
        self._pieces = [*pieces]
        self._code = code

    async def read(self) -> tuple[int, bytes] | None:
        if self._pieces:
            return wire.STDOUT, self._pieces.pop(0)
        if self._code is None:
            await asyncio.get_running_loop().create_future()
        return None

    async def wait(self) -> Ended:
        assert self._code is not None
        return Ended(self._code)


class Agent:
    """A guest whose commands end with these, one after the other."""

    name = "guest"

    def __init__(self, *codes: int) -> None:
        self.codes = [*codes]

    @asynccontextmanager
    async def open(self, op: str, **fields: Any) -> AsyncIterator[Any]:
        assert (op, fields["argv"]) == ("exec", ["check"])
        yield self

    async def read(self) -> None:
        return None

    async def result(self) -> dict[str, Any]:
        return {"exit_code": self.codes.pop(0)}


async def test_it_waits_for_the_line() -> None:
    wait = Wait(Agent(), "server", LogHealth(pattern="up$"))  # type: ignore[arg-type]
    await wait.until_healthy(Running(b"starting\n", b"up\n"))  # type: ignore[arg-type]


async def test_it_tries_until_the_command_succeeds() -> None:
    agent = Agent(1, 1, 0)
    health = CommandHealth(argv=("check",), interval_seconds=0.001)
    await Wait(agent, "server", health).until_healthy(Running())  # type: ignore[arg-type]
    assert agent.codes == []


async def test_a_command_that_ends_is_told_with_what_it_wrote() -> None:
    wait = Wait(Agent(), "server", LogHealth(pattern="up"))  # type: ignore[arg-type]
    with pytest.raises(NotHealthy, match=r"(?s)exited with 3.*no port") as failed:
        await wait.until_healthy(Running(b"no port\n", code=3))  # type: ignore[arg-type]
    assert failed.value.status == 3


async def test_a_command_that_is_never_up() -> None:
    health = LogHealth(pattern="^up", within_seconds=0.01)
    wait = Wait(Agent(), "server", health)  # type: ignore[arg-type]
    with pytest.raises(NotHealthy, match=r"(?s)within 0.01 s: no line.*\^up.*still here"):
        await wait.until_healthy(Running(b"still here"))  # type: ignore[arg-type]


async def test_an_attempt_that_hangs_is_told_as_that() -> None:
    class Hanging(Agent):
        async def result(self) -> dict[str, Any]:
            return await asyncio.get_running_loop().create_future()  # type: ignore[no-any-return]

    health = CommandHealth(argv=("check",), within_seconds=0.01)
    wait = Wait(Hanging(), "server", health)  # type: ignore[arg-type]
    with pytest.raises(NotHealthy, match=r"within 0.01 s: the first attempt had not ended; it"):
        await wait.until_healthy(Running())  # type: ignore[arg-type]
