"""This host's own daemon: on the unix socket of its store, and started if it is not running."""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from ratoon import files, paths
from ratoon.client import address
from ratoon.client.address import Address
from ratoon.errors import HostError

#: In the store: what daemons that were started from here say. Held by whoever starts one.
LOG = "daemon.log"
#: Seconds for a daemon to listen: it first takes over the sandboxes of the one before.
START_TIMEOUT = 300.0
#: Seconds between two looks at a daemon that is starting.
_POLL = 0.02
#: So many before a daemon that listens, and is not this store's, is taken for another's.
_LOOKS = 50
#: Bytes of the log that an error shows at most.
_TAIL = 4096


class LocalDaemon:
    """The daemon of the store of the environment; `on_start` is told of one that is started."""

    def __init__(
        self, token: str | None, on_start: Callable[[str], object] = lambda message: None
    ) -> None:
        self._token = token
        self._on_start = on_start

    def find(self) -> Address:
        """Its address; it is started if it is not there. HostError: it does not start."""
        home = paths.home()
        path = paths.daemon_socket(home)
        if not serves(home, path):
            _start(home, path, self._on_start)
        return address.local(str(path), self._token)

    def close(self) -> None:
        pass


def listens(path: Path) -> bool:
    """Whether somebody listens on the unix socket `path`."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
    return True


def serves(home: Path, path: Path) -> bool:
    """Whether the daemon of the store `home` listens on `path`. HostError: another store's does."""
    for _ in range(_LOOKS):
        if not listens(path):
            return False
        if files.is_locked(paths.daemon_lock(home)):
            return True
        time.sleep(_POLL)  # one that is killed lets go of the one a little before the other
    raise HostError(
        f"on {path} the daemon of another store listens: set another RATOON_RUNTIME for {home}"
    )


def _start(home: Path, path: Path, on_start: Callable[[str], object]) -> None:
    """Start a daemon for the store `home`, and wait until it listens; one, whoever else does so."""
    try:
        home.mkdir(parents=True, exist_ok=True)
        files.require_own(home)
        log = home / LOG
        with files.locked(log):
            if serves(home, path):
                return
            began = log.stat().st_size
            if not _spawn(home, path, log):
                raise HostError(
                    f"the daemon of {home} did not start; `ratoon serve` shows more\n"
                    f"--- end of {log} ---\n{_tail(log, began)}"
                )
            on_start(
                f"started a daemon for {home}, process {_listener(path)}, which logs to {log}; "
                "it goes on, and sandboxes outlive it"
            )
    except OSError as error:
        raise HostError(f"cannot start a daemon: {files.describe(error)}") from None


def _spawn(home: Path, path: Path, log: Path) -> bool:
    """Start it, as nobody's child; whether it listens in the end."""
    alive, held = os.pipe()  # the daemon holds the other end as long as it lives
    environment = {**os.environ, "RATOON_HOME": str(home), "RATOON_CACHE": str(paths.cache())}
    environment["RATOON_RUNTIME"] = str(path.parent)
    with closing(os.fdopen(alive)), log.open("ab") as output:
        try:
            subprocess.run(
                ["setsid", "--fork", sys.executable, "-m", "ratoon", "serve"],
                check=True,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd="/",
                env=environment,
                pass_fds=[held],
            )
        finally:
            os.close(held)
        deadline = time.monotonic() + START_TIMEOUT
        while not listens(path):
            if select.select([alive], [], [], _POLL)[0] or time.monotonic() > deadline:
                return listens(path)
    return True


def _listener(path: Path) -> int:
    """The process that listens on the unix socket `path`."""
    from ratoon.syscalls import peer_credentials  # here: few need it, and it takes ctypes

    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.connect(str(path))
        return peer_credentials(probe)[0]


def _tail(log: Path, since: int) -> str:
    with log.open("rb") as file:
        file.seek(max(since, log.stat().st_size - _TAIL))
        return file.read().decode(errors="replace").strip()
