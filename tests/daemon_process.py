"""`ratoon serve` as a process of its own, started and stopped by tests."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

#: Seconds after which a daemon has hung.
FOR_EVER = 120


@dataclass
class DaemonProcess:
    """A daemon that listens, and a client of its unix socket."""

    process: subprocess.Popen[str]
    api: httpx2.Client
    socket: Path
    #: What it said until it listened.
    said: str

    @property
    def url(self) -> str:
        """Where it listens on TCP."""
        return self.said.rsplit(" and ", 1)[1].strip()

    def stop(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        """Its exit code, and what it said after it had begun to listen."""
        self.process.send_signal(number)
        _, said = self.process.communicate(timeout=FOR_EVER)
        return self.process.returncode, said


def environment(home: Path, runtime: Path) -> dict[str, str]:
    return {**os.environ, "RATOON_HOME": str(home), "RATOON_RUNTIME": str(runtime)}


def run_serve(
    home: Path,
    runtime: Path,
    *arguments: str,
    by: Sequence[str | Path] = (),
    more: Mapping[str, str] | None = None,
) -> subprocess.Popen[str]:
    """`by`: what starts it, if another program does; `more`: besides this environment."""
    program = Path(sys.executable).with_name("ratoon")
    return subprocess.Popen(
        [*by, program, "serve", *arguments],
        env={**environment(home, runtime), **(more or {})},
        stderr=subprocess.PIPE,
        text=True,
    )


@contextmanager
def daemon(home: Path, runtime: Path, *arguments: str, **started: Any) -> Iterator[DaemonProcess]:
    """A daemon that listens. If it still runs when the block is left, it is told to end.

    `started`: how it is, as for `run_serve`.
    """
    process = run_serve(home, runtime, *arguments, **started)
    path = runtime / "daemon.sock"
    try:
        assert process.stderr is not None
        said = ""
        while not (line := process.stderr.readline()).startswith("serving on"):
            assert line, f"the daemon has ended: {said}"
            said += line
        with httpx2.Client(
            transport=httpx2.HTTPTransport(uds=str(path)),
            base_url="http://ratoon",
            timeout=FOR_EVER,
        ) as api:
            yield DaemonProcess(process, api, path, said + line)
    finally:
        process.terminate()
        process.communicate(timeout=FOR_EVER)
