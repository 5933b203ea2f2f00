"""The agent's part in what is written to volumes: when it reaches the host, and what it tells."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn, cast

import pytest
from agent_on_host import agent_on_host

from ratoon.machine.guest.agent.loop import Loop
from ratoon.machine.guest.agent.volumes import PACE, Volumes


class Ends:
    """In place of the agent's loop, whose signals would be this process's."""

    def on_exit(self, pid: int, callback: object) -> None:
        os.waitpid(pid, 0)


@pytest.fixture
def volumes(tmp_path: Path) -> Iterator[Volumes]:
    """Those of an agent whose kernel's settings are files."""
    volumes = Volumes(cast("Loop", Ends()), set())
    for name in PACE:
        (tmp_path / name).write_text("3000\n")
        volumes._settings[name] = os.open(tmp_path / name, os.O_RDWR)
    yield volumes
    for fd in (*volumes._settings.values(), *volumes._written.values()):
        os.close(fd)


def test_a_sync_is_asked_of_the_kernel_and_its_failure_told(
    volumes: Volumes, tmp_path: Path
) -> None:
    assert volumes.sync(5) is None
    volumes._written["/mnt"] = os.open(tmp_path, os.O_RDONLY)
    assert volumes.sync(60) is None
    volumes._written["/gone"] = os.open(tmp_path, os.O_PATH)  # which cannot be synced
    assert volumes.sync(60) == "Bad file descriptor"


def hang(*arguments: object) -> NoReturn:
    time.sleep(1)
    os._exit(0)


def test_one_that_takes_too_long_is_left_alone(
    volumes: Volumes, monkeypatch: pytest.MonkeyPatch
) -> None:
    volumes._written["/mnt"] = os.open("/", os.O_PATH)
    monkeypatch.setattr("ratoon.machine.guest.agent.volumes._sync", hang)
    assert volumes.sync(0.1) == "it was not done within 0.1 s"


def test_the_kernel_is_told_to_hurry_and_not_to(volumes: Volumes, tmp_path: Path) -> None:
    def settings() -> list[int]:
        return [int((tmp_path / name).read_text().split()[0]) for name in PACE]

    volumes._hurry(True)
    volumes._hurry(True)
    assert settings() != [3000, 3000]
    volumes._hurry(False)
    assert settings() == [3000, 3000]


def test_without_volumes_there_is_nothing_to_be_done() -> None:
    with agent_on_host() as agent:
        assert agent.reply(agent.request("sync", halt=False)) == {"unsynced": None}
