"""Options that cannot be right: who wrote them reads of them, not of fields of a request."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from ratoon.cli.app import explain
from ratoon.cli.options import as_options, fork_options, image_options, published
from ratoon.client.aio.client import AsyncClient
from ratoon.errors import InvalidInput, NotFound
from ratoon.store.snapshot.store import Store
from small_snapshots import publish


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store that has base."""
    store = Store.open(tmp_path_factory.mktemp("options") / "home")
    publish(store, "base")
    return store.home


def refusal(home: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> str:
    """What the command line shows of options that a daemon refuses."""
    monkeypatch.setenv("RATOON_RUNTIME", str(home.with_name("run")))

    async def asked() -> None:
        async with AsyncClient.embedded(home) as client:
            await client.run_image("tar:/absent", ["true"], **options)

    with pytest.raises(InvalidInput) as caught:
        asyncio.run(asked())
    return explain(caught.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (image_options(mem_size_mib=5).options, "--mem-size-mib: Input should be "),
        (image_options(disk_size_mib=5).options, "--disk-size-mib: Input should be "),
        (image_options(health="ftp://:1/").options, "--health: 'ftp://:1/': write http://"),
        (image_options(health_log="(").options, "--health-log: '(' is no regular expression"),
        (image_options(health="http://:1/", health_within=0).options, "--health-within: "),
        (fork_options(memory=64), "--memory: 64 MiB are too few; use 128 MiB or more (HTTP 400)"),
        (fork_options(cpus=0.001), "--cpus: 0.001 CPUs: use 0.05 or more"),
        (fork_options(volumes=["named:data"]), "--volume: 'data' is no absolute path"),
        (fork_options(volumes=["a:/x", "b:/x"]), "two volumes have the same target (HTTP 400)"),
        (fork_options(publish=[(99999, None)]), "--publish: Input should be "),
    ],
)
def test_what_a_daemon_refuses_is_said_of_the_option(
    home: Path, monkeypatch: pytest.MonkeyPatch, options: Any, said: str
) -> None:
    assert refusal(home, monkeypatch, **options).startswith(said)


def test_what_is_no_field_stays() -> None:
    assert as_options("body.n: too many; body.ram_mib: bad; x: y") == (
        "body.n: too many; --mem-size-mib: bad; x: y"
    )
    assert as_options("'target: x' is no name") == "'target: x' is no name"
    assert explain(NotFound("target: it is gone")) == "target: it is gone"


def test_options_are_called_what_they_were_written_as() -> None:
    given = image_options(mem_size_mib=200, no_cache=True)
    assert given.written == ("--mem-size-mib", "--no-cache")
    assert given.options == {"ram_mib": 200, "cache": False}


@pytest.mark.parametrize("text", ["99999", "0", "80:70000", "0:80"])
def test_ports_are_in_their_range(text: str) -> None:
    with pytest.raises(Exception, match="1 to 65535"):
        published(text)
