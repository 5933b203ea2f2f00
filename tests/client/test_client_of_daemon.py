"""Both libraries and a daemon in a process of its own: TLS, tokens, and a daemon that goes away."""

from __future__ import annotations

import signal
import ssl
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from both_libraries import Libraries
from daemon_process import DaemonProcess, daemon
from ratoon.client.address import Known, parse
from ratoon.client.aio.connection import AsyncConnection
from ratoon.errors import NotFound, Unauthorized, Unreachable
from ratoon.store.snapshot.store import Store
from small_snapshots import publish

TOKEN = "0123456789abcdef"


@dataclass(frozen=True)
class Secured:
    daemon: DaemonProcess
    context: ssl.SSLContext


@pytest.fixture
def secured(tmp_path: Path) -> Iterator[Secured]:
    """A daemon on TLS that wants a token; its store has base."""
    publish(Store.open(tmp_path / "home"), "base")
    key, certificate, token = (tmp_path / name for name in ("key.pem", "cert.pem", "token"))
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1"),
            *("-keyout", key, "-out", certificate, "-subj", "/CN=localhost"),
            *("-addext", "subjectAltName=IP:127.0.0.1"),
        ],
        check=True,
        capture_output=True,
    )
    token.write_text(TOKEN)
    with daemon(
        *(tmp_path / "home", tmp_path / "run", "--bind", "127.0.0.1:0"),
        *("--tls-cert", str(certificate), "--tls-key", str(key), "--token-file", str(token)),
    ) as running:
        yield Secured(running, ssl.create_default_context(cafile=str(certificate)))


@pytest.mark.parametrize("kind", ["asyncio", "threads"])
async def test_tls_and_tokens(secured: Secured, kind: str) -> None:
    library, url = Libraries(kind), secured.daemon.url
    assert url.startswith("https")
    async with library.AsyncClient(url, token=TOKEN, tls=secured.context) as client:
        assert [each.tag for each in await client.snapshots.list()] == ["base"]
        async with client.events() as events:
            await client.snapshots.delete("base")
            assert (await anext(aiter(events))).snapshot == "base"
    async with library.AsyncClient(url, token="wrong" * 5, tls=secured.context) as client:
        with pytest.raises(Unauthorized, match="invalid bearer token") as refused:
            await client.snapshots.list()
        assert refused.value.answered == 401
    async with library.AsyncClient(url, token=TOKEN) as client:
        with pytest.raises(Unreachable, match="certificate"):
            await client.snapshots.list()


async def test_a_stream_is_refused_as_a_request_is(secured: Secured) -> None:
    address = parse(secured.daemon.url, "wrong" * 5, secured.context)
    connection = AsyncConnection(Known(address))
    with pytest.raises(Unauthorized, match="invalid bearer token"):
        async with connection.converse("/v1/sandboxes/sb-1/exec/stream"):
            pass
    await connection.close()
    connection = AsyncConnection(Known(parse(secured.daemon.url, TOKEN, secured.context)))
    async with connection.converse("/v1/sandboxes/sb-1/exec/stream") as talk:
        await talk.send_json(argv=["true"])
        with pytest.raises(NotFound, match="sb-1"):
            await talk.receive()
    await connection.close()


@pytest.mark.parametrize("kind", ["asyncio", "threads"])
async def test_a_daemon_that_goes_away(tmp_path: Path, kind: str) -> None:
    with daemon(tmp_path / "home", tmp_path / "run", "--bind", "127.0.0.1:0") as running:
        async with Libraries(kind).AsyncClient(running.url) as client:
            async with client.events() as events:
                running.stop(signal.SIGKILL)
                with pytest.raises(Unreachable, match="cut short"):
                    await anext(aiter(events))
            with pytest.raises(Unreachable, match=f"no daemon answers at {running.url}"):
                await client.version()
