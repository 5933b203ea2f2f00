"""The verbs that keep a store small: pruning snapshots, and compressing their memory layers."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from ratoon.cli.app import Json, app, print_json, say
from ratoon.cli.connect import client_command
from ratoon.cli.naming import known_tags
from ratoon.cli.options import byte_count, seconds
from ratoon.cli.showing import age
from ratoon.errors import RatoonError
from ratoon.units import MIB, format_mib

if TYPE_CHECKING:
    from ratoon.api.upkeep import CompressedLayer, PruneReport
    from ratoon.client.aio.client import AsyncClient


@client_command("prune", start=False)
async def prune(
    client: AsyncClient,
    keep_last: Annotated[
        int | None, typer.Option(metavar="N", help="Keep the N newest of each lineage.")
    ] = None,
    keep_within: Annotated[
        float | None,
        typer.Option(parser=seconds, metavar="TIME", help="Keep what is not older: 12h, 7d."),
    ] = None,
    max_bytes: Annotated[
        int | None,
        typer.Option(
            parser=byte_count,
            metavar="SIZE",
            help="Of the rest, delete the oldest until a lineage holds no more: 500m, 20g.",
        ),
    ] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(metavar="TAG", help="Keep this one, or these: 'release-*'. Repeatable."),
    ] = None,
    lineage: Annotated[
        str | None,
        typer.Option(metavar="TAG", help="Only this one's lineage.", autocompletion=known_tags),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would go, and why; delete nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Delete the snapshots that no rule keeps.

    The rules are for each lineage: a base and all that descends from it. Whatever one of them keeps
    is kept, and so is what a sandbox or a workspace needs, and what any of those was made from. The
    rest goes; with --max-bytes only for as long as a lineage holds more than that, the oldest
    first, and its newest snapshot stays.
    """
    report = await client.snapshots.prune(
        keep_last=keep_last,
        keep_within=keep_within,
        max_bytes=max_bytes,
        keep=keep or [],
        lineage=lineage,
        dry_run=dry_run,
    )
    if as_json:
        print_json(asdict(report))
    else:
        _show_plan(report)
    failed = [each for each in report.snapshots if each.error]
    for each in failed:
        say(f"{each.tag} was not deleted: {each.error}")
    if failed:
        raise typer.Exit(RatoonError.exit_code)


def _show_plan(report: PruneReport) -> None:
    from ratoon.cli.screen import answers, columns, show

    table = columns("TAG", "LINEAGE", "AGE", "WHAT")
    table.add_column("FREES MiB", justify="right")
    table.add_column("WHY")
    for each in report.snapshots:
        gone = each.deleted or (report.dry_run and not each.keep)
        table.add_row(
            each.tag,
            each.lineage or "-",
            age(time.time() - each.created_at_unix) if each.created_at_unix else "-",
            "keep" if each.keep else "delete" if gone else "failed",
            "-" if each.keep else f"{each.frees_bytes / MIB:.1f}",
            each.reason,
        )
    show(table)
    for lineage in report.lineages:
        if lineage.excess_bytes:
            say(
                f"lineage {lineage.lineage}: {format_mib(lineage.excess_bytes)} above its "
                "budget, as all that is left is kept"
            )
    verb = "would free" if report.dry_run else "freed"
    count = sum(not each.keep and not each.error for each in report.snapshots)
    answers.print(
        f"{count} of {len(report.snapshots)} snapshots {verb} {format_mib(report.freed_bytes)}",
        highlight=False,
    )


@app.command("compress")
def compress(
    tags: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[TAG]...", help="Their chains; all if none.", autocompletion=known_tags
        ),
    ] = None,
    older_than: Annotated[
        float | None,
        typer.Option(
            parser=seconds, metavar="TIME", help="Only snapshots that were made before: 7d."
        ),
    ] = None,
    level: Annotated[int, typer.Option(min=1, max=19, help="zstd's; higher is slower.")] = 3,
    undo: Annotated[bool, typer.Option("--undo", help="Have them plain again.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Compress, measure, and throw it away.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Compress the memory layers of snapshots where they lie; everything works as before.

    Nothing but the first fork of a snapshot reads its layers, and that is slower then. Snapshots in
    use can be compressed, and others use them meanwhile. What hardly gets smaller stays plain.
    """
    from ratoon import paths
    from ratoon.store.snapshot.compress import rewrite_layers
    from ratoon.store.snapshot.store import Store

    began = time.monotonic()
    done = rewrite_layers(
        Store.open(paths.home()),
        "plain" if undo else "compressed",
        tags or (),
        older_than=older_than,
        level=level,
        dry_run=dry_run,
        progress=say,
    )
    if as_json:
        print_json({"dry_run": dry_run, "layers": [asdict(each) for each in done]})
    else:
        _show_layers(done, time.monotonic() - began, dry_run=dry_run)
    if any(each.outcome == "failed" for each in done):
        raise typer.Exit(RatoonError.exit_code)


def _show_layers(done: tuple[CompressedLayer, ...], took: float, *, dry_run: bool) -> None:
    from ratoon.cli.screen import answers, columns, show

    table = columns("LAYER OF", "WHAT")
    for name in ("BEFORE MiB", "AFTER MiB", "NAMES"):
        table.add_column(name, justify="right")
    for each in done:
        sizes = [f"{size / MIB:.1f}" for size in (each.bytes_before, each.bytes_after)]
        table.add_row(each.tag, each.outcome, *sizes, str(each.names))
    show(table)
    changed = [each for each in done if each.outcome in ("compressed", "plain")]
    before = sum(each.bytes_before for each in changed)
    after = sum(each.bytes_after for each in changed)
    would = "would take" if dry_run else "take"
    answers.print(
        f"{len(changed)} layers {would} {format_mib(after)} in the place of {before / MIB:.1f}; "
        f"{took:.1f} s",
        highlight=False,
    )
