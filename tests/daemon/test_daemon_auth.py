"""Who may talk to the daemon."""

from __future__ import annotations

from pathlib import Path

import httpx2
import pytest
from app_client import application

from ratoon.daemon.auth import is_loopback, read_token
from ratoon.daemon.settings import Settings
from ratoon.daemon.sockets import tcp_socket
from ratoon.engine.sandbox.engine import Engine
from ratoon.errors import InvalidInput

pytest_plugins = ["app_fixtures"]

TOKEN = "0123456789abcdef"


@pytest.mark.parametrize("raw", [TOKEN, f"  {TOKEN}\n", "ä" * 8, "x" * 500])
def test_a_token_is_what_the_file_holds_trimmed(tmp_path: Path, raw: str) -> None:
    (tmp_path / "token").write_text(raw)
    assert read_token(tmp_path / "token") == raw.strip()


@pytest.mark.parametrize(
    "raw",
    [
        *("", "short", "0123456789abcde", " " * 20, "two lines of\na token, long"),
        *("REPLACE_ME_with_a_token", "CHANGE_ME_0123456789"),
    ],
)
def test_what_cannot_be_a_token_is_refused(tmp_path: Path, raw: str) -> None:
    (tmp_path / "token").write_text(raw)
    with pytest.raises(InvalidInput, match="token"):
        read_token(tmp_path / "token")


@pytest.mark.parametrize("raw", [None, b"\xff" * 20])
def test_a_token_file_that_cannot_be_read_is_named(tmp_path: Path, raw: bytes | None) -> None:
    if raw is not None:
        (tmp_path / "token").write_bytes(raw)
    with pytest.raises(InvalidInput, match=str(tmp_path)):
        read_token(tmp_path / "token")


async def test_with_a_token_everything_but_health_needs_it(bare_engine: Engine) -> None:
    async with application(bare_engine, Settings(token=TOKEN)) as client:
        assert (await client.get("/healthz")).json() == {"ok": True}
        for method, path in (
            *(("GET", "/version"), ("GET", "/metrics"), ("GET", "/v1/snapshots")),
            *(("GET", "/openapi.json"), ("POST", "/healthz"), ("GET", "/nonsense")),
            *(("POST", "/v1/sandboxes"), ("DELETE", "/v1/snapshots/base")),
        ):
            answer = await client.request(method, path)
            assert (answer.status_code, answer.json()["error"]) == (401, "missing bearer token")
            wrong = await client.request(method, path, headers={"Authorization": "Bearer x"})
            assert (wrong.status_code, wrong.json()["error"]) == (401, "invalid bearer token")
        assert bare_engine.store.get("base")
        for given in (f"Bearer {TOKEN}", f"bearer  {TOKEN} "):
            headers = {"Authorization": given}
            assert (await client.get("/v1/snapshots", headers=headers)).status_code == 200


async def test_a_token_may_have_any_letters(bare_engine: Engine) -> None:
    token = "ключ" * 5
    async with application(bare_engine, Settings(token=token)) as client:
        right = {b"Authorization": f"Bearer {token}".encode()}
        assert (await client.get("/version", headers=right)).status_code == 200
        wrong = {b"Authorization": f"Bearer {token}x".encode()}
        assert (await client.get("/version", headers=wrong)).status_code == 401


@pytest.mark.parametrize(
    ("host", "origin", "status"),
    [
        ("127.0.0.1:8889", None, 200),
        ("localhost:8889", None, 200),
        ("[::1]:8889", None, 200),
        ("localhost:8889", "http://localhost:3000", 200),
        ("evil.example:8889", None, 403),
        ("127.0.0.1.evil.example", None, 403),
        ("[", None, 403),
        ("localhost:8889", "http://evil.example", 403),
        ("localhost:8889", "null", 403),
    ],
)
async def test_without_a_token_a_web_page_cannot_use_it(
    api: httpx2.AsyncClient, host: str, origin: str | None, status: int
) -> None:
    """A page of another site can have a browser send requests to localhost, by its own name too."""
    headers = {"Host": host, **({"Origin": origin} if origin else {})}
    answer = await api.get("http://127.0.0.1:8889/version", headers=headers)
    assert answer.status_code == status
    assert (await api.get("http://127.0.0.1:8889/healthz", headers=headers)).status_code == 200


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        *(("localhost", True), ("127.0.0.1", True), ("127.9.9.9", True), ("::1", True)),
        *(("0.0.0.0", False), ("::", False), ("192.0.2.1", False), ("", False)),
        *(("localhost.example", False), ("127.0.0.1.example", False)),
    ],
)
def test_loopback(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback


def test_other_machines_need_a_token() -> None:
    with (
        pytest.raises(InvalidInput, match="--token-file"),
        tcp_socket("0.0.0.0:0", has_token=False),
    ):
        raise AssertionError
    with tcp_socket("0.0.0.0:0", has_token=True) as listener:
        assert listener.getsockname()[1]
    for bind in ("127.0.0.1:0", "localhost:0"):
        with tcp_socket(bind, has_token=False) as listener:
            assert listener.getsockname()[0] in ("127.0.0.1", "::1")


@pytest.mark.parametrize("bind", ["", "8889", "127.0.0.1", "127.0.0.1:x", "127.0.0.1:65536", ":1"])
def test_what_is_no_address_is_refused(bind: str) -> None:
    with pytest.raises(InvalidInput, match="HOST:PORT"), tcp_socket(bind, has_token=True):
        raise AssertionError
