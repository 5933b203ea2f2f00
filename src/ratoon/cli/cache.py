"""`ratoon cache`: what is kept of images that were run."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ratoon.cli.app import Json, print_json, say
from ratoon.cli.connect import client_command
from ratoon.cli.options import seconds
from ratoon.cli.showing import age, printable
from ratoon.errors import InvalidInput
from ratoon.units import format_mib

if TYPE_CHECKING:
    from ratoon.api.starts import StartInfo
    from ratoon.client.aio.client import AsyncClient

#: Digits of a key that are shown.
_SHOWN = 12


class Action(StrEnum):
    LS = "ls"
    EXPLAIN = "explain"
    PRUNE = "prune"


@client_command("cache", start=False)
async def cache(
    client: AsyncClient,
    action: Annotated[Action, typer.Argument(help="What to do.")],
    starts: Annotated[
        list[str] | None,
        typer.Argument(metavar="[START [OTHER]]", help="explain: the first digits of their keys."),
    ] = None,
    older_than: Annotated[
        float | None,
        typer.Option(
            parser=seconds, metavar="TIME", help="prune: also what was not used for so long."
        ),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="prune: all of it.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="prune: say what would go, and leave it.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show or remove what is kept of images that were run, or explain a miss.

    ls: the starts that are kept. explain START [OTHER]: in which fields they differ; without OTHER,
    from the start that is most like it. prune: remove what no run can use.
    """
    names = starts or []
    if action is not Action.EXPLAIN and names:
        raise InvalidInput(f"cache {action}: it takes no names")
    if action is not Action.PRUNE and (older_than is not None or everything or dry_run):
        raise InvalidInput("--older-than, --all and --dry-run are for `cache prune`")
    if action is Action.LS:
        await _list(client, as_json)
    elif action is Action.PRUNE:
        await _prune(client, older_than, everything, dry_run, as_json)
    else:
        if not 1 <= len(names) <= 2:
            raise InvalidInput("cache explain: name one start, or two; see `ratoon cache ls`")
        await _explain(client, as_json, *names)


async def _list(client: AsyncClient, as_json: bool) -> None:
    found = await client.starts.list()
    if as_json:
        print_json([asdict(each) for each in found])
        return
    from ratoon.cli.screen import columns, show

    table = columns("KEY", "TIER", "IMAGE", "COMMAND", "LAYER", "CREATED", "USED")
    now = time.time()
    for each in found:
        table.add_row(
            each.key[:_SHOWN],
            "-" if each.tier is None else str(each.tier),
            printable(each.image) or "-",
            _command(each),
            "-" if each.layer_bytes is None else format_mib(each.layer_bytes),
            "-" if each.created_at_unix is None else age(now - each.created_at_unix),
            age(now - each.used_at_unix),
            style="red" if each.unusable else None,
        )
    show(table)
    for each in found:
        if each.unusable:
            say(f"{each.key[:_SHOWN]} cannot be used: {printable(each.unusable)}")


def _command(each: StartInfo) -> str:
    import shlex

    text = printable(shlex.join(each.command))
    return (text if len(text) <= 60 else text[:59] + "…") or "-"


async def _explain(client: AsyncClient, as_json: bool, one: str, other: str | None = None) -> None:
    found = await client.starts.explain(one, other)
    if as_json:
        print_json(asdict(found))
        return
    if not found.differences:
        print(f"{found.one[:_SHOWN]} and {found.other[:_SHOWN]} are the same")
        return
    from ratoon.cli.screen import columns, show

    table = columns("FIELD", found.one[:_SHOWN], found.other[:_SHOWN])
    for each in found.differences:
        table.add_row(printable(each.field), _value(each.one), _value(each.other))
    show(table)


def _value(value: Any) -> str:
    if value is None:
        return "-"
    return printable(value if isinstance(value, str) else json.dumps(value))


async def _prune(
    client: AsyncClient, older_than: float | None, everything: bool, dry_run: bool, as_json: bool
) -> None:
    gone = await client.starts.prune(older_than=older_than, everything=everything, dry_run=dry_run)
    if as_json:
        print_json([asdict(each) for each in gone])
        return
    for each in gone:
        print(f"{each.snapshot_tag}: {printable(each.why)}")
    say(f"{len(gone)} {'would be' if dry_run else 'were'} removed")
