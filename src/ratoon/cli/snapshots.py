"""The verbs that make, show, use and delete snapshots."""

from __future__ import annotations

import asyncio
import shlex
import sys
import time
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.table import Table

from ratoon import paths
from ratoon.cli.app import Json, answers, app, notes, print_json, run, say
from ratoon.errors import InvalidInput, RatoonError
from ratoon.guest.commands import ExecResult
from ratoon.sandbox.engine import DISK_BYTES, EXEC_TIMEOUT, MIB, RAM_BYTES, Built, Engine
from ratoon.snapshot.snapshot import Snapshot
from ratoon.snapshot.store import Store
from ratoon.snapshot.usage import snapshot_usage

#: Ratoon's own failure in a verb that gives the guest's exit code.
OWN_FAILURE = 125

Tag = Annotated[str, typer.Option("--tag", help="The new snapshot's name.")]


@app.command("from-image")
def from_image(
    image: Annotated[str, typer.Argument(help="The root image: debian.")],
    tag: Tag,
    mem_size_mib: Annotated[int, typer.Option(help="RAM in MiB.")] = RAM_BYTES // MIB,
    vcpus: Annotated[int, typer.Option(help="Virtual CPUs.")] = 1,
    disk_size_mib: Annotated[int, typer.Option(help="Disk in MiB.")] = DISK_BYTES // MIB,
    as_json: Json = False,
) -> None:
    """Boot an image cold and publish it as a base snapshot."""

    async def build() -> Built:
        async with Engine.open() as engine:
            return await engine.from_image(
                image,
                tag,
                ram_bytes=mem_size_mib * MIB,
                vcpus=vcpus,
                disk_bytes=disk_size_mib * MIB,
                progress=say,
            )

    _show_built(run(build()), as_json)


@app.command("snapshot-diff")
def snapshot_diff(
    parent: Annotated[str, typer.Option("--from", help="The snapshot to fork.")],
    tag: Tag,
    command: Annotated[str, typer.Option("--exec", help="The command to run in the fork.")],
    exec_timeout_secs: Annotated[float, typer.Option(help="Seconds it may take.")] = EXEC_TIMEOUT,
    as_json: Json = False,
) -> None:
    """Fork a snapshot, run a command in the fork, publish the result as a diff snapshot."""
    argv = _split(command)

    async def build() -> Built:
        async with Engine.open() as engine:
            return await engine.snapshot_diff(
                parent, tag, argv, timeout=exec_timeout_secs, progress=say
            )

    _show_built(run(build()), as_json)


@app.command("run")
def run_command(
    tag: Annotated[str, typer.Argument(help="The snapshot to fork.")],
    command: Annotated[list[str], typer.Argument(help="The command and its arguments.")],
    interactive: Annotated[
        bool, typer.Option("--interactive", "-i", help="Give it all of stdin.")
    ] = False,
    timeout_secs: Annotated[float | None, typer.Option(help="Seconds it may take.")] = None,
    as_json: Json = False,
) -> None:
    """Fork a snapshot, run one command in the fork, and end with its exit code.

    The fork is deleted afterwards. 124: the command timed out; 125: Ratoon itself failed;
    126, 127: it could not be executed, or was not found.
    """

    async def fork_and_run() -> tuple[ExecResult, dict[str, float]]:
        stdin = await asyncio.to_thread(sys.stdin.buffer.read) if interactive else b""
        async with Engine.open() as engine, await engine.fork_one(tag) as sandbox:
            result = await sandbox.exec(command, stdin=stdin, timeout=timeout_secs)
            return result, {**sandbox.stages, "fork": sandbox.fork_ms}

    try:
        result, stages = run(fork_and_run())
    except RatoonError as error:
        notes.print(f"ratoon: {error}", style="red", highlight=False, markup=False)
        raise typer.Exit(OWN_FAILURE) from None
    if as_json:
        texts = {
            "stdout": result.stdout.decode(errors="replace"),
            "stderr": result.stderr.decode(errors="replace"),
        }
        print_json({**asdict(result), **texts, "stages_ms": stages})
    else:
        sys.stdout.buffer.write(result.stdout)
        sys.stdout.flush()
        sys.stderr.buffer.write(result.stderr)
        if result.error:
            say(f"ratoon: {result.error}")
    raise typer.Exit(result.exit_code)


@app.command("images")
def images(as_json: Json = False) -> None:
    """List the snapshots."""
    entries = Store.open(paths.home()).list()
    if as_json:
        print_json([summarise(e) if isinstance(e, Snapshot) else _broken(e) for e in entries])
        return
    table = Table(box=None, pad_edge=False)
    for name in ("TAG", "PARENT", "DEPTH", "RAM", "LAYER", "ACCELERATOR", "CREATED"):
        table.add_column(name)
    for entry in entries:
        if not isinstance(entry, Snapshot):
            table.add_row(entry.tag, "damaged: see `ratoon snapshot-info`", style="red")
            continue
        summary = summarise(entry)
        table.add_row(
            summary["tag"],
            summary["parent_tag"] or "-",
            str(summary["chain_depth"]),
            f"{summary['ram_bytes'] // MIB} MiB",
            f"{summary['layer_bytes'] / MIB:.1f} MiB",
            summary["accelerator"],
            time.strftime("%Y-%m-%d %H:%M", time.localtime(summary["created_at_unix"])),
        )
    answers.print(table)


@app.command("snapshot-info")
def snapshot_info(tag: str, as_json: Json = False) -> None:
    """Show all about one snapshot."""
    store = Store.open(paths.home())
    detail = asdict(store.info(tag))
    used = snapshot_usage(store, tag)
    detail |= {"own_bytes": used.own, "shared_bytes": used.shared, "total_bytes": used.total}
    if as_json:
        print_json({key: value for key, value in detail.items() if value is not None})
        return
    width = max(map(len, detail))
    for key, value in detail.items():
        shown = ", ".join(value) or "-" if isinstance(value, tuple) else value
        answers.print(f"{key:{width}}  {'-' if shown is None else shown}", soft_wrap=True)


@app.command("rmi")
def remove(
    tags: Annotated[list[str], typer.Argument(help="The snapshots to delete.")],
    cascade: Annotated[
        bool, typer.Option("--cascade", help="Delete what was made from them too, leaves first.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Delete them alone; what was made from them stays.")
    ] = False,
) -> None:
    """Delete snapshots and their images; without a flag, those that nothing was made from."""

    async def delete() -> None:
        async with Engine.open() as engine:
            gone: set[str] = set()
            for tag in tags:
                if tag in gone:  # a cascade has come by
                    continue
                deleted = await engine.delete(tag, force=force, cascade=cascade)
                gone.update(deleted)
                say(f"deleted {', '.join(deleted)}")

    run(delete())


def _split(command: str) -> list[str]:
    try:
        argv = shlex.split(command)
    except ValueError as error:
        raise InvalidInput(f"--exec {command!r}: {error}") from None
    if not argv:
        raise InvalidInput("--exec: the command is empty")
    return argv


def _show_built(built: Built, as_json: bool) -> None:
    branched = built.branched
    summary = summarise(branched.snapshot)
    if as_json:
        print_json(
            {
                **summary,
                "pause_ms": branched.pause_ms,
                "stages_ms": built.stages,
                "branch_stages_ms": branched.stages,
                "total_ms": built.total_ms,
            }
        )
        return
    stages = ", ".join(f"{name} {ms:.0f}" for name, ms in built.stages.items())
    answers.print(
        f"{summary['tag']}: depth {summary['chain_depth']}, {summary['pages']} pages, "
        f"{summary['layer_bytes'] / MIB:.1f} MiB; {built.total_ms / 1e3:.2f} s ({stages} ms)",
        highlight=False,
        soft_wrap=True,
    )


def summarise(snapshot: Snapshot) -> dict[str, Any]:
    """What the verbs that list or make snapshots print of one."""
    manifest = snapshot.manifest
    memory = manifest.layers[-1].memory
    return {
        "tag": manifest.tag,
        "dir": str(snapshot.path),
        "created_at_unix": int(manifest.created_at_unix),
        "parent_tag": manifest.parent.tag if manifest.parent else None,
        "chain_depth": snapshot.depth,
        "memory_root": manifest.memory_root,
        "ram_bytes": manifest.machine.ram_bytes,
        "accelerator": manifest.machine.accelerator,
        "pages": memory.entries,
        "layer_bytes": memory.size,
        "warning": manifest.warning,
    }


def _broken(entry: Any) -> dict[str, Any]:
    return {"tag": entry.tag, "error": str(entry.error)}
