"""The daemon is killed at any moment under load; the next one has what the first has told of."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from daemon_kills import kill_under_load
from daemon_process import daemon

pytest_plugins = ["daemon_plugin"]


def test_kill_under_load(place: tuple[Path, Path], soak: bool) -> None:
    kill_under_load(partial(daemon, *place), 50 if soak else 2)
