"""`ratoon events`: what happens, as it happens."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from typing import TYPE_CHECKING

from ratoon.cli.app import Json
from ratoon.cli.connect import client_command
from ratoon.cli.showing import printable

if TYPE_CHECKING:
    from ratoon.client.aio.client import AsyncClient


@client_command("events")
async def events(client: AsyncClient, as_json: Json = False) -> None:
    """Show what happens to sandboxes and snapshots.

    Until this is interrupted, or the daemon ends. With --json, an object in each line.
    """
    async with client.events() as events:
        async for event in events:
            if as_json:
                print(json.dumps(asdict(event)), flush=True)
                continue
            what = " ".join(each for each in (event.sandbox, event.snapshot) if each)
            why = f": {printable(event.reason)}" if event.reason else ""
            at = time.strftime("%H:%M:%S", time.localtime(event.at_unix))
            print(f"{at}  {event.kind:16}  {what}{why}", flush=True)
