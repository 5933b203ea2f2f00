"""`ratoon cp`: files and trees, to and fro."""

from __future__ import annotations

import os
import posixpath
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ratoon.cli.app import say
from ratoon.cli.connect import client_command
from ratoon.cli.naming import find
from ratoon.cli.showing import Meter, printable
from ratoon.errors import GuestFileNotFound, GuestNotADirectory, InvalidInput
from ratoon.units import format_mib

if TYPE_CHECKING:
    from ratoon.api.files import Transfer
    from ratoon.client.aio.client import AsyncClient
    from ratoon.client.aio.files import AsyncFiles

#: Things that were left out and are named one by one.
_SHOWN = 10


@client_command("cp")
async def copy(
    client: AsyncClient,
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="SANDBOX:PATH, or a path here.")],
    target: Annotated[str, typer.Argument(metavar="TARGET", help="The same; one is in a sandbox.")],
    owners: Annotated[
        bool, typer.Option("--archive", "-a", help="Keep the numbers of owners and groups.")
    ] = False,
    user: Annotated[
        str | None,
        typer.Option("--user", "-u", metavar="NAME|UID[:GROUP]", help="Whose it is in a sandbox."),
    ] = None,
) -> None:
    """Copy files and directories between a sandbox and this host.

    If TARGET is a directory, SOURCE gets into it under its own name; its content does if SOURCE
    ends with `/.`. What is in a directory already stays, unless it has the same name. A path here
    that has a colon is written as `./NAME`. In a sandbox all is of who runs commands there.
    """
    from_guest, to_guest = _split(source), _split(target)
    if from_guest and to_guest:
        raise InvalidInput("both are in sandboxes: copy to this host first")
    with Meter() as meter:

        def on_bytes(count: int) -> None:
            meter.show(format_mib(count))

        how: dict[str, Any] = {"merge": True, "owners": owners, "on_bytes": on_bytes}
        if from_guest and user:
            raise InvalidInput("-u: what comes to this host is of whoever copies it")
        if from_guest:
            sandbox, path = from_guest
            carried = await _download((await find(client, sandbox)).files, path, target, how)
        elif to_guest:
            sandbox, path = to_guest
            how["user"] = user
            carried = await _upload((await find(client, sandbox)).files, source, path, how)
        else:
            raise InvalidInput("neither is in a sandbox: write SANDBOX:PATH for one that is")
    for line in carried.left_out[:_SHOWN]:
        say(f"left out: {printable(line)}")
    if carried.left_out_count > _SHOWN:
        say(f"left out: {carried.left_out_count - _SHOWN} more")
    say(f"copied {carried.entries} things, {format_mib(carried.size_bytes)}")


async def _upload(files: AsyncFiles, source: str, path: str, how: dict[str, Any]) -> Transfer:
    if not _is_content(source) and await _is_directory(files, path):
        path = posixpath.join(path, Path(source).resolve().name)
    return await files.upload(Path(source), path, **how)


async def _download(files: AsyncFiles, path: str, target: str, how: dict[str, Any]) -> Transfer:
    local = Path(target)
    if not _is_content(path) and (local.is_dir() or target.endswith("/")):
        local /= posixpath.basename(posixpath.normpath(path))
    return await files.download(path, local, **how)


def _split(text: str) -> tuple[str, str] | None:
    """The sandbox and the path in it, if it is in one."""
    sandbox, colon, path = text.partition(":")
    if not colon or "/" in sandbox or not sandbox:
        return None
    return sandbox, path or "/"


def _is_content(source: str) -> bool:
    return source.endswith(("/.", os.sep + os.curdir)) or source == "."


async def _is_directory(files: AsyncFiles, path: str) -> bool:
    if path.endswith("/"):
        return True
    try:
        return (await files.stat(path)).type == "directory"
    except (GuestFileNotFound, GuestNotADirectory):
        return False
