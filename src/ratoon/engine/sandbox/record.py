"""What is written down of a sandbox, so that another process can take it over: `state.json`.

It is replaced whole, and before what it announces: whoever reads it after a crash finds what was
true, or was about to be.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from ratoon.api.answers import PublishedPort
from ratoon.engine.sandbox.directory import PARENT
from ratoon.engine.sandbox.incarnation import Incarnation
from ratoon.engine.sandbox.memory_images import MappedMemory
from ratoon.engine.sandbox.options import SandboxOptions
from ratoon.files import write_durable
from ratoon.machine.vmm.process import started_at
from ratoon.store.snapshot.snapshot import Snapshot

NAME = "state.json"


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class RunRecord(_Model):
    """An incarnation: its process, by number and start (clock ticks since the boot), and files."""

    boot_id: str
    pid: int
    started: int
    memory: MappedMemory
    overlay: Path
    runtime: Path
    #: The way out of its network namespace, if it has one.
    uplink: str | None
    #: The id of what it stands on, where that is not what its directory says.
    stands_on: str | None = None


class Record(_Model):
    """A sandbox. `run` is None in standby."""

    format: Literal[1] = 1
    id: str
    created_at_unix: float
    machine_id: str
    options: SandboxOptions
    run: RunRecord | None
    #: It resumes when it is used.
    wakes: bool
    forked_from: str | None = None
    branch_count: int
    last_branch_memory: Path | None
    ports: tuple[PublishedPort, ...] = ()


def boot_id() -> str:
    """Which start of this host it is: process numbers begin anew with each."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def record_of(run: Incarnation, parent: Snapshot | None, directory: Path) -> RunRecord:
    """Of a run, in a sandbox's directory, on `parent`. ProcessLookupError: its process is gone."""
    elsewhere = parent if parent and parent.path != directory / PARENT else None
    return RunRecord(
        boot_id=boot_id(),
        pid=run.machine.pid,
        started=started_at(run.machine.pid),
        memory=run.memory,
        overlay=run.overlay,
        runtime=run.runtime,
        uplink=run.namespace.uplink,
        stands_on=elsewhere.manifest.id if elsewhere else None,
    )


def write_record(directory: Path, record: Record) -> None:
    """Replace the record in a sandbox's directory; readers see the old one or the new."""
    older = None if record.run and record.run.stands_on else {"run": {"stands_on"}}
    # What older Ratoons do not know they refuse.
    raw = record.model_dump_json(indent=2, exclude=older).encode()
    if record.run is None:  # it is to survive a power loss
        write_durable(directory / NAME, raw)
        return
    temporary = directory / f"{NAME}.new"
    temporary.write_bytes(raw)
    temporary.rename(directory / NAME)


def read_record(directory: Path) -> Record | None:
    """The record, or None where there is none that makes sense."""
    try:
        return Record.model_validate_json((directory / NAME).read_bytes())
    except (FileNotFoundError, ValidationError):
        return None


def forget_record(directory: Path) -> None:
    """From now on nobody takes the sandbox over."""
    (directory / NAME).unlink(missing_ok=True)


def is_alive(run: RunRecord) -> bool:
    """Whether its process is still there, and not another one with its number."""
    try:
        return run.boot_id == boot_id() and started_at(run.pid) == run.started
    except ProcessLookupError:
        return False


def processes_of(directory: Path) -> list[int]:
    """The machines that were started with files of a sandbox's directory, recorded or not."""
    mark = os.fsencode(directory) + b"/"
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                command = (process / "cmdline").read_bytes()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if b"qemu" in command.partition(b"\0")[0] and mark in command:
                found.append(int(process.name))
    return found
