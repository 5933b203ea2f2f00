"""`ratoon inspect`: all that there is to know of one thing."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ratoon.cli.app import Json, print_json
from ratoon.cli.connect import client_command
from ratoon.cli.naming import find, known_ids, known_tags
from ratoon.cli.showing import print_fields
from ratoon.errors import NotFound

if TYPE_CHECKING:
    from ratoon.client.aio.client import AsyncClient


def _known(incomplete: str) -> list[str]:
    return known_ids(incomplete) + known_tags(incomplete)


@client_command("inspect")
async def inspect(
    client: AsyncClient,
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="A sandbox's id or name, or else a snapshot's tag.",
            autocompletion=_known,
        ),
    ],
    as_json: Json = False,
) -> None:
    """Show all about a sandbox, or a snapshot.

    Of a sandbox's process also which layers of the jail hold (`layers`).
    """
    found = await _found(client, name)
    if as_json:
        print_json(found)
    else:
        print_fields(found)


async def _found(client: AsyncClient, name: str) -> dict[str, Any]:
    try:
        return asdict((await find(client, name)).info)
    except NotFound:
        pass
    try:
        return asdict(await client.snapshots.info(name))
    except NotFound as error:
        raise NotFound(f"no sandbox and no snapshot is called {name}") from error
