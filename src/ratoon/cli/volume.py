"""`ratoon volume`: named volumes."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ratoon.cli.app import Json, print_json, say
from ratoon.cli.connect import all_of, client_command
from ratoon.errors import InvalidInput
from ratoon.units import MIB

if TYPE_CHECKING:
    from ratoon.client.aio.client import AsyncClient


@client_command("volume")
async def volume(
    client: AsyncClient,
    what: Annotated[Literal["ls", "create", "rm"], typer.Argument(help="What to do.")] = "ls",
    names: Annotated[list[str] | None, typer.Argument(help="The volumes.")] = None,
    as_json: Json = False,
) -> None:
    """List named volumes, make them, or remove them with all their files.

    `-v NAME:TARGET` makes one, too, where there is none.
    """
    if (what == "ls") != (not names):
        raise InvalidInput("write `volume ls`, `volume create NAME…` or `volume rm NAME…`")

    async def remove(name: str) -> None:
        await client.volumes.remove(name)
        say(f"removed {name}")

    if what == "rm":
        await all_of(remove(name) for name in names or ())
        return
    for name in names or ():
        await client.volumes.create(name)
    found = [each for each in await client.volumes.list() if not names or each.name in names]
    if as_json:
        print_json([asdict(each) for each in found])
        return
    print(f"{'VOLUME':24}  {'MIB':>8}  PATH")
    for each in found:
        print(f"{each.name:24}  {each.bytes / MIB:8.1f}  {each.path}")
