"""`ratoon pool`: machines that wait for forks."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from ratoon.cli.app import Json, print_json
from ratoon.cli.connect import client_command
from ratoon.errors import InvalidInput
from ratoon.units import MIB

if TYPE_CHECKING:
    from ratoon.client.aio.client import AsyncClient


@client_command("pool")
async def pool(
    client: AsyncClient,
    tag: Annotated[str | None, typer.Argument(help="The snapshot.")] = None,
    size: Annotated[
        int | None, typer.Argument(min=0, max=1000, help="How many machines shall wait.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show or set how many machines wait for forks of a snapshot.

    A fork that finds one is quicker by the start of a machine, and so is its first command: what
    it takes was done before. Each holds memory while it waits.
    """
    if (tag is None) != (size is None):
        raise InvalidInput("give TAG and SIZE to set it, or none of them to see it")
    if tag is None or size is None:
        found = await client.pool()
    else:
        found = await client.keep(tag, size)
    if as_json:
        print_json([asdict(each) for each in found])
        return
    print(f"{'SNAPSHOT':24}  {'WANTED':>6}  {'READY':>6}  {'MIB':>8}")
    for each in found:
        mib = each.private_bytes / MIB
        print(f"{each.tag:24}  {each.wanted:6}  {each.ready:6}  {mib:8.1f}")
