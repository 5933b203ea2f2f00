"""The verbs that make and delete snapshots, through the daemon where one runs."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ratoon.api.defaults import DISK_MIB, RAM_MIB
from ratoon.cli.app import Json, print_json, say
from ratoon.cli.connect import Asked, client_command
from ratoon.cli.naming import IMAGE, find, known_tags, located
from ratoon.cli.options import Cpu
from ratoon.concurrency import run_alongside
from ratoon.errors import AlreadyExists, CommandFailed, InvalidInput, NotFound
from ratoon.units import format_mib

if TYPE_CHECKING:
    from ratoon.api.snapshots import SnapshotInfo
    from ratoon.client.aio.client import AsyncClient

Tag = Annotated[str, typer.Option("--tag", help="The new snapshot's name.")]


@client_command("from-image", start=False)
async def from_image(
    client: AsyncClient,
    image: Annotated[str, typer.Argument(help=IMAGE)],
    tag: Tag,
    mem_size_mib: Annotated[
        int | None, typer.Option(help=f"RAM in MiB; {RAM_MIB} if not said.")
    ] = None,
    vcpus: Annotated[int | None, typer.Option(help="Virtual CPUs; 1 if not said.")] = None,
    disk_size_mib: Annotated[
        int | None, typer.Option(help=f"Disk in MiB; {DISK_MIB} if not said.")
    ] = None,
    cpu: Cpu = None,
    refresh: Annotated[
        bool, typer.Option("--refresh", help="Look the image up again, or build it anew.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Boot an image cold and publish it as a base snapshot."""
    began = time.monotonic()

    def make() -> Asked[SnapshotInfo]:
        return client.snapshots.from_image(
            located(image),
            tag,
            ram_mib=mem_size_mib,
            vcpus=vcpus,
            disk_mib=disk_size_mib,
            cpu=cpu,
            refresh=refresh,
        )

    made = await _with_progress(client, tag, make)
    _show(made, began, {}, as_json)


@client_command("snapshot-diff", start=False)
async def snapshot_diff(
    client: AsyncClient,
    parent: Annotated[
        str, typer.Option("--from", help="The snapshot to fork.", autocompletion=known_tags)
    ],
    tag: Tag,
    command: Annotated[str, typer.Option("--exec", help="The command to run in the fork.")],
    exec_timeout_secs: Annotated[float, typer.Option(help="Seconds it may take.")] = 600.0,
    as_json: Json = False,
) -> None:
    """Fork a snapshot, run a command there, publish the result as a diff."""
    argv = _split(command)
    began = time.monotonic()
    await _require_free(client, tag)
    from ratoon.client.aio.client import AsyncSandbox

    say(f"forking {parent}")
    stages: dict[str, float] = {}
    async with await AsyncSandbox.create(parent, client=client) as sandbox:
        stages["fork"] = sandbox.info.fork_ms
        say(f"running {command[:60]}")
        at = time.monotonic()
        try:
            await sandbox.commands.run(argv, timeout=exec_timeout_secs)
        except CommandFailed as error:
            raise CommandFailed(f"snapshot {tag} was not made: {error}") from None
        stages["exec"] = (time.monotonic() - at) * 1e3
        say(f"taking snapshot {tag}")
        at = time.monotonic()
        made = await sandbox.branch(tag)
        stages["branch"] = (time.monotonic() - at) * 1e3
    _show(made, began, stages, as_json)


@client_command("snapshot", start=True)
async def snapshot(
    client: AsyncClient,
    sandbox: Annotated[
        str, typer.Option("--from-sandbox", metavar="SANDBOX", help="Its id or its name.")
    ],
    tag: Annotated[
        str | None, typer.Option("--tag", help="The new snapshot's name; one is made if none.")
    ] = None,
    diff: Annotated[
        bool, typer.Option("--diff", help="Store what changed since its last branch or its fork.")
    ] = False,
    live: Annotated[
        bool, typer.Option("--live", help="As --diff; it hardly stands still meanwhile.")
    ] = False,
    no_wait: Annotated[
        bool, typer.Option("--no-wait", help="With --live: do not wait until it is written.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Publish the state of a running sandbox; it goes on.

    Without --diff or --live, all of it is stored, and the snapshot stands on no other.
    """
    if diff and live:
        raise InvalidInput("--diff and --live: give one of them")
    if no_wait and not live:
        raise InvalidInput("--no-wait is for --live: the others are not written by the way")
    began = time.monotonic()
    chosen = await find(client, sandbox)
    made = await chosen.branch(
        tag, mode="diff" if diff else "live" if live else "full", wait=not no_wait
    )
    _show(made, began, {}, as_json)


@client_command("snapshot-compact", start=False)
async def snapshot_compact(
    client: AsyncClient,
    tag: Annotated[
        str,
        typer.Option(
            "--from", help="The snapshot to compact; it stays.", autocompletion=known_tags
        ),
    ],
    to: Annotated[str, typer.Option("--to", help="The new snapshot's name.")],
    as_json: Json = False,
) -> None:
    """Make an equal snapshot that stands on no other.

    It has one memory layer and one disk layer; what it was made from stays.
    """
    began = time.monotonic()
    made = await _with_progress(client, to, lambda: client.snapshots.compact(tag, to))
    _show(made, began, {}, as_json)


@client_command("rmi", start=False)
async def remove(
    client: AsyncClient,
    tags: Annotated[
        list[str], typer.Argument(help="The snapshots to delete.", autocompletion=known_tags)
    ],
    cascade: Annotated[
        bool, typer.Option("--cascade", help="Delete what was made from them too, leaves first.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Delete them alone; what was made from them stays.")
    ] = False,
) -> None:
    """Delete snapshots and their images.

    Without a flag, one that others were made from is refused.
    """
    left = {each.tag for each in await client.snapshots.list()}
    gone: set[str] = set()
    for tag in tags:
        if tag in gone:  # a cascade has come by
            continue
        await client.snapshots.delete(tag, cascade=cascade, force=force)
        still = {each.tag for each in await client.snapshots.list()}
        say(f"deleted {', '.join(sorted(left - still))}")
        gone, left = gone | (left - still), still


async def _with_progress(
    client: AsyncClient, tag: str, make: Callable[[], Asked[SnapshotInfo]]
) -> SnapshotInfo:
    """What `make` gives; meanwhile, say how far the making of snapshot `tag` is."""
    async with client.events() as events:

        async def tell() -> None:
            async for event in events:
                if event.kind == "progress" and event.snapshot == tag and event.reason:
                    say(event.reason)

        return await run_alongside(make(), tell())
    raise AssertionError


async def _require_free(client: AsyncClient, tag: str) -> None:
    from ratoon.store.snapshot.manifest import check_tag

    check_tag(tag)
    try:
        await client.snapshots.get(tag)
    except NotFound:
        return
    raise AlreadyExists(f"there is a snapshot {tag} already; choose another tag, or delete it")


def _split(command: str) -> list[str]:
    try:
        argv = shlex.split(command)
    except ValueError as error:
        raise InvalidInput(f"--exec {command!r}: {error}") from None
    if not argv:
        raise InvalidInput("--exec: the command is empty")
    return argv


def _show(made: SnapshotInfo, began: float, stages: dict[str, float], as_json: bool) -> None:
    total_ms = (time.monotonic() - began) * 1e3
    if as_json:
        known: dict[str, Any] = {
            key: value for key, value in asdict(made).items() if value is not None
        }
        if stages:
            known |= {"branch_stages_ms": made.stages_ms, "stages_ms": stages}
        print_json({**known, "total_ms": total_ms})
        return
    if made.status == "writing":
        print(f"{made.tag}: being written; `ratoon images` shows when it is there")
        return
    pages, size = made.pages or 0, made.layer_bytes or 0
    shown = ", ".join(f"{name} {ms:.0f}" for name, ms in (stages or made.stages_ms or {}).items())
    print(
        f"{made.tag}: depth {made.chain_depth}, {pages} pages, {format_mib(size)}; "
        f"{total_ms / 1e3:.2f} s ({shown} ms)"
    )
