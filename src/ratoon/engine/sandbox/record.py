"""What is written down of a sandbox, so that another process can take it over: `state.json`.

It is replaced whole, and before what it announces: whoever reads it after a crash finds what was
true, or was about to be.
"""

from __future__ import annotations

import os
import secrets
import time
from pathlib import Path
from typing import Literal

from ratoon.api.answers import MainCommand, PublishedPort
from ratoon.documents import Document
from ratoon.engine.sandbox.directory import PARENT
from ratoon.engine.sandbox.incarnation import Incarnation
from ratoon.engine.sandbox.memory_images import MappedMemory
from ratoon.engine.sandbox.options import SandboxOptions
from ratoon.files import write_durable
from ratoon.jail.inmates import inmates, name_for
from ratoon.machine.vmm.process import started_at
from ratoon.store.snapshot.snapshot import Snapshot

NAME = "state.json"


class RunRecord(Document, strict=False):
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


class Record(Document, strict=False):
    """A sandbox. `run` is None in standby."""

    format: Literal[1] = 1
    id: str
    created_at_unix: float
    machine_id: str
    options: SandboxOptions
    run: RunRecord | None
    #: It resumes when it is used.
    wakes: bool
    #: How its main command was when it went to standby.
    command: MainCommand | None = None
    #: The published snapshot that it was forked from.
    forked_from: str | None = None
    #: How many snapshots were made of it, and where the memory of the last one is.
    branch_count: int
    last_branch_memory: Path | None
    ports: tuple[PublishedPort, ...] = ()


def new_machine_id() -> str:
    """As in /etc/machine-id: machine-id(5)."""
    return secrets.token_hex(16)


def new_record(
    sandbox_id: str, machine_id: str, options: SandboxOptions, parent: Snapshot
) -> Record:
    """Of a sandbox that begins now, on `parent`."""
    return Record(
        id=sandbox_id,
        created_at_unix=time.time(),
        machine_id=machine_id,
        options=options,
        run=None,
        wakes=False,
        forked_from=parent.manifest.reference.tag,
        branch_count=0,
        last_branch_memory=None,
    )


def boot_id() -> str:
    """Which start of this host it is: process numbers begin anew with each."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def record_of(run: Incarnation, parent: Snapshot, directory: Path) -> RunRecord:
    """Of a run, in a sandbox's directory, on `parent`. ProcessLookupError: its process is gone."""
    stands_on = None if parent.path == directory / PARENT else parent.manifest.id
    return RunRecord(
        boot_id=boot_id(),
        pid=run.machine.pid,
        started=started_at(run.machine.pid),
        memory=run.memory,
        overlay=run.overlay,
        runtime=run.runtime,
        uplink=run.namespace.uplink,
        stands_on=stands_on,
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
    return Record.load_or_none(directory / NAME)


def forget_record(directory: Path) -> None:
    """From now on nobody takes the sandbox over."""
    (directory / NAME).unlink(missing_ok=True)


def is_alive(run: RunRecord) -> bool:
    """Whether its process is still there, and not another one with its number."""
    try:
        return run.boot_id == boot_id() and started_at(run.pid) == run.started
    except ProcessLookupError:
        return False


def processes_of(directory: Path) -> set[int]:
    """The machines that were started for a sandbox's directory, recorded or not."""
    found = {*inmates(name_for(directory))}
    # Those that an older Ratoon started have no such name; their command line names their files.
    mark = os.fsencode(directory) + b"/"
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                command = (process / "cmdline").read_bytes()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if b"qemu" in command.partition(b"\0")[0] and mark in command:
                found.add(int(process.name))
    return found
