"""A daemon that is started because it is needed. Real ones, on empty stores; no machine runs."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from both_libraries import Libraries
from ratoon import Client, paths
from ratoon.client.local import LOG, LocalDaemon
from ratoon.errors import HostError
from ratoon.store.snapshot.store import Store

FOR_EVER = 120


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty place for a store; the daemon that is started for it ends with the test."""
    for name in ("RATOON_URL", "FORKD_URL", "RATOON_TOKEN", "FORKD_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RATOON_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("RATOON_RUNTIME", str(tmp_path / "run"))
    yield tmp_path / "home"
    if (lock := paths.daemon_lock(tmp_path / "home")).exists():
        stop(int(lock.read_text()))


def stop(pid: int) -> None:
    """End a daemon, which is nobody's child."""
    os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + FOR_EVER
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < deadline, "the daemon does not end"
        time.sleep(0.05)


def test_the_daemon_of_another_store_is_not_asked(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It listens where this store's would, as RATOON_RUNTIME names one place for both."""
    LocalDaemon(None).find()
    other = home.with_name("other")
    monkeypatch.setenv("RATOON_HOME", str(other))
    for _ in range(2):  # also once there is a store
        with pytest.raises(
            HostError, match=rf"another store .* another RATOON_RUNTIME for {other}"
        ):
            LocalDaemon(None).find()
        Store.open(other)
    monkeypatch.setenv("RATOON_HOME", str(home))
    LocalDaemon(None).find()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_none_is_started_in_a_store_of_somebody_else(home: Path) -> None:
    """Root's own files in it would be in that user's way."""
    home.mkdir()
    os.chown(home, 54321, 54321)
    with pytest.raises(HostError, match=r"home belongs to another user, 54321: run this as 54321"):
        LocalDaemon(None).find()
    assert [*home.iterdir()] == []


@pytest.mark.parametrize("kind", ["asyncio", "threads"])
async def test_one_is_started_for_all_who_need_it_at_once(home: Path, kind: str) -> None:
    async def ask() -> str:
        async with Libraries(kind).AsyncClient() as client:
            return str(await client.version())

    versions = await asyncio.gather(*(ask() for _ in range(5)))
    assert len({*versions}) == 1
    pid = int(paths.daemon_lock(home).read_text())
    assert Path(f"/proc/{pid}").exists()
    assert Path(f"/proc/{pid}/cwd").readlink() == Path("/")
    assert os.getsid(pid) != os.getsid(0)
    assert await ask() in versions
    assert int(paths.daemon_lock(home).read_text()) == pid
    assert (home / LOG).read_text().count("serving on") == 1


def test_it_is_said_once(home: Path) -> None:
    told: list[str] = []
    for _ in range(2):
        with Client.of(LocalDaemon(None, told.append)) as client:
            client.version()
    (message,) = told
    assert str(home) in message
    assert LOG in message
    assert f"process {paths.daemon_lock(home).read_text().strip()}," in message


def test_why_it_does_not_start_is_said(home: Path) -> None:
    home.mkdir()
    (home / "store.json").write_text("{}")
    with (
        Client() as client,
        pytest.raises(HostError, match="did not start") as failed,
    ):
        client.version()
    assert "ratoon serve" in str(failed.value)
    assert "store.json" in str(failed.value)
    assert not paths.daemon_socket(home).exists()
