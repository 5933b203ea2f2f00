"""The verbs that move a snapshot, with its whole chain, from one store to another."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from ratoon import paths
from ratoon.cli.app import Json, app, print_json
from ratoon.cli.screen import answers, notes
from ratoon.store.pack.pack import pack
from ratoon.store.pack.unpack import unpack
from ratoon.store.snapshot.progress import ByteProgress
from ratoon.store.snapshot.store import Store
from ratoon.units import format_mib

WARNING = (
    "A pack holds a guest's memory and device state, which QEMU will parse: "
    "unpack only what comes from somebody you trust."
)


@app.command("pack")
def pack_snapshot(
    tag: Annotated[str, typer.Option("--tag", help="The snapshot to pack.")],
    out: Annotated[Path, typer.Option("--out", help="The file to make, NAME.tar.zst.")],
    force: Annotated[bool, typer.Option("--force", help="Replace the file.")] = False,
) -> None:
    """Write a snapshot and its whole chain into one file, for another store."""
    store = Store.open(paths.home())
    with _progress(f"packing {tag}") as progress:
        packed = pack(store, tag, out, force=force, progress=progress)
    notes.print(
        f"packed {tag}: {format_mib(packed.content)}, {format_mib(packed.size)} in {out}",
        style="dim",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


@app.command("unpack")
def unpack_snapshot(
    file: Annotated[Path, typer.Argument(help="The pack.", metavar="F")],
    tag: Annotated[
        str | None, typer.Option("--tag", help="Another name for the snapshot than its own.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the snapshot that has the name.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Verify a pack, and make the snapshot in it one of the store."""
    notes.print(WARNING, style="yellow", highlight=False)
    store = Store.open(paths.home())
    with _progress(f"unpacking {file.name}") as progress:
        unpacked = unpack(store, file, tag, force=force, progress=progress)
    manifest = unpacked.snapshot.manifest
    if as_json:
        print_json(
            {
                "tag": manifest.tag,
                "dir": str(unpacked.snapshot.path),
                "chain_depth": unpacked.snapshot.depth,
                "memory_root": manifest.memory_root,
                "stored_bytes": unpacked.stored,
                "shared_bytes": unpacked.shared,
            }
        )
        return
    answers.print(
        f"{manifest.tag}: depth {unpacked.snapshot.depth}, {format_mib(unpacked.stored)} of "
        f"layers stored, {format_mib(unpacked.shared)} were here already",
        highlight=False,
        soft_wrap=True,
    )


@contextmanager
def _progress(what: str) -> Iterator[ByteProgress]:
    """A bar on stderr, if that is a terminal. SIGTERM cleans up as Ctrl-C does."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
    )
    with Progress(
        *columns, console=notes, transient=True, disable=not notes.is_terminal
    ) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
