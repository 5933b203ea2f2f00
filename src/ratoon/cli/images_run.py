"""`ratoon run IMAGE`: what is not as with a snapshot."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Coroutine
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ratoon.cli.app import print_json, say
from ratoon.cli.naming import located
from ratoon.cli.showing import printable
from ratoon.concurrency import beside
from ratoon.errors import InvalidInput, NotFound, RegistryError

if TYPE_CHECKING:
    from ratoon.cli.options import ImageWish
    from ratoon.cli.run import Wish
    from ratoon.client.aio.client import AsyncClient
    from ratoon.client.aio.sandbox import AsyncSandbox
    from ratoon.client.options import Options
    from ratoon.client.runs import RunOptions

#: Seconds after which somebody who waits wants to hear of it.
PATIENCE = 0.7

_TAG = re.compile(r"[A-Za-z0-9_-]{1,64}")


async def is_snapshot(client: AsyncClient, name: str) -> bool:
    """Whether there is a snapshot of that name; else it is an image's."""
    if not _TAG.fullmatch(name):
        return False
    try:
        await client.snapshots.get(name)
    except NotFound:
        return False
    return True


async def started(
    client: AsyncClient,
    name: str,
    wish: Wish,
    image: ImageWish,
    options: Options,
    *,
    detach: bool,
) -> AsyncSandbox:
    """The sandbox of an image that is run; a line says where it came from.

    What is waited for, or left running, is started there; the rest is for who follows it.
    """
    name, start = located(name), image.waits or detach
    if image.waits and (wish.interactive or wish.tty):
        raise InvalidInput("with -i or -t nothing can be kept of a command: leave the check out")
    if start and wish.timeout is not None:
        raise InvalidInput("--timeout-secs is for who waits for the end: use --ttl here")
    given: Any = {**options, **image.options, "start": start}
    if start:
        given |= {"env": wish.env, "user": wish.user, "workdir": wish.cwd}
    run_options: RunOptions = given
    command = wish.argv or None
    try:
        sandbox = await _patiently(client, name, client.run_image(name, command, **run_options))
    except (NotFound, RegistryError):
        if _TAG.fullmatch(name):
            say(f"there is no snapshot {name}, and as an image:")
        if (place := Path(name)).exists():
            kind = "dir" if place.is_dir() else "tar"
            say(printable(f"if what is called {name} here is meant, write {kind}:{name}"))
        raise
    run = sandbox.run
    assert run is not None
    tag = sandbox.info.snapshot_tag
    kept = (
        "the image was booted",
        f"started from tier 1, {tag}, the booted image",
        f"started from tier 2, {tag}, where it was up",
    )[run.tier]
    missed = f"; {'; '.join(run.missed)}" if run.missed else ""
    say(printable(f"{name}: {kept}{missed}"))
    return sandbox


def argv_of(sandbox: AsyncSandbox) -> list[str] | None:
    """All of the command, with the image's entrypoint, if there is one."""
    assert sandbox.run is not None
    return sandbox.run.argv or None


def told(sandbox: AsyncSandbox) -> dict[str, Any]:
    """How an image was run, for JSON; nothing if it was a snapshot."""
    if sandbox.run is None:
        return {}
    return {"run": asdict(sandbox.run)}


async def followed(sandbox: AsyncSandbox, *, as_json: bool) -> int:
    """Show what a command that was started has written, and writes, until it ends; its code."""
    from ratoon.cli.session import follow

    assert sandbox.run is not None
    assert sandbox.run.pid is not None
    async with await sandbox.commands.connect(sandbox.run.pid) as running:
        if not as_json:
            return await follow(running, stdin=False, on_terminal=False)
        result = await running.wait(check=False)
    print_json(
        {
            "sandbox": sandbox.id,
            "exit_code": result.exit_code,
            "stdout": result.stdout,
            "stderr": result.stderr,
            "error": result.reason,
            "truncated": result.truncated,
            **told(sandbox),
        }
    )
    return result.exit_code


async def _patiently(
    client: AsyncClient, image: str, work: Coroutine[Any, Any, AsyncSandbox]
) -> AsyncSandbox:
    """What `work` gives; if it takes long, how far it is is said meanwhile."""

    async def tell() -> None:
        await asyncio.sleep(PATIENCE)
        async with client.events() as events:
            async for event in events:
                if event.kind == "progress" and event.snapshot == image and event.reason:
                    say(printable(event.reason))

    return await beside(work, tell())
