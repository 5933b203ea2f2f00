"""Where a daemon is: what is understood, and what is refused and how."""

from __future__ import annotations

from pathlib import Path

import pytest

from ratoon import AsyncClient, Client
from ratoon.client.address import parse, token_of_environment, url_of_environment
from ratoon.errors import InvalidInput, Unreachable

TOKEN = "0123456789abcdef"


@pytest.mark.parametrize(
    ("url", "shown", "socket"),
    [
        (
            "unix:///run/ratoon/daemon.sock",
            "unix:///run/ratoon/daemon.sock",
            "/run/ratoon/daemon.sock",
        ),
        ("unix:///a%20place/sock", "unix:///a place/sock", "/a place/sock"),
        ("http://127.0.0.1:8889", "http://127.0.0.1:8889", None),
        ("http://localhost/", "http://localhost", None),
        ("http://[::1]:8889", "http://[::1]:8889", None),
        ("http://fòrks.example:80", "http://xn--frks-lqa.example:80", None),
        ("https://forks.example:443", "https://forks.example:443", None),
    ],
)
def test_what_is_understood(url: str, shown: str, socket: str | None) -> None:
    address = parse(url, TOKEN)
    assert (str(address), address.socket) == (shown, socket)
    assert address.headers == {"authorization": f"Bearer {TOKEN}"}
    assert (address.tls is not None) == url.startswith("https")
    assert TOKEN not in repr(address)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "127.0.0.1:8889",
        "ftp://127.0.0.1",
        "unix:relative.sock",
        "unix://host/socket",
        "http://",
        "http://host:port",
        "http://host:99999",
        "http://host/v1",
        "http://[::1",
        "http://forks..example",
    ],
)
def test_what_is_refused(url: str) -> None:
    with pytest.raises(InvalidInput, match=r"unix:///PATH"):
        parse(url, None)


@pytest.mark.parametrize("token", ["a\nb", "schlüssel", "a\0b"])
def test_a_token_that_no_header_can_have(token: str) -> None:
    with pytest.raises(InvalidInput, match="RATOON_TOKEN"):
        parse("http://localhost", token)


def test_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RATOON_URL", "FORKD_URL", "RATOON_TOKEN", "FORKD_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    assert (url_of_environment(), token_of_environment()) == (None, None)
    monkeypatch.setenv("FORKD_URL", "http://theirs")
    monkeypatch.setenv("FORKD_TOKEN", "theirs")
    assert (url_of_environment(), token_of_environment()) == ("http://theirs", "theirs")
    monkeypatch.setenv("RATOON_URL", "http://ours")
    monkeypatch.setenv("RATOON_TOKEN", "ours")
    assert (url_of_environment(), token_of_environment()) == ("http://ours", "ours")


def test_nobody_is_there(tmp_path: Path) -> None:
    path = tmp_path / "daemon.sock"
    with (
        Client(f"unix://{path}") as client,
        pytest.raises(Unreachable, match=r"no daemon answers at unix://.*No such file.*RATOON_URL"),
    ):
        client.version()


async def test_nobody_is_there_for_asyncio(tmp_path: Path) -> None:
    path = tmp_path / "daemon.sock"
    async with AsyncClient(f"unix://{path}") as client:
        with pytest.raises(Unreachable, match=r"no daemon answers at unix://.*No such file"):
            await client.version()
