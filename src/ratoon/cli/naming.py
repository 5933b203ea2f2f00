"""Sandboxes, snapshots and images as people name them, and as the shell completes them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ratoon.errors import AlreadyExists, Conflict, NotFound

if TYPE_CHECKING:
    from ratoon.client.aio.client import AsyncClient, AsyncSandbox

#: The metadata that a name is kept in.
NAME = "name"

_ID = re.compile(r"sb-[0-9a-f]{8}-[0-9a-f]{4}")

#: What an image can be.
IMAGE = (
    "debian[:SUITE][+PACKAGE…], a name in a registry such as python:3.12-slim, "
    "oci:DIRECTORY[:REF], oci-archive:FILE, docker-archive:FILE, tar:FILE or dir:DIRECTORY."
)
_IMAGE_ON_HOST = re.compile(r"(oci|oci-archive|docker-archive|tar|dir):(.+)", re.DOTALL)


def known_ids(incomplete: str) -> list[str]:
    """Ids of the store here that begin so, for the shell: nobody is asked."""
    return _names("sandboxes", incomplete)


def known_tags(incomplete: str) -> list[str]:
    """Tags of the store here that begin so, for the shell."""
    return _names("snapshots", incomplete)


def _names(directory: str, incomplete: str) -> list[str]:
    from ratoon import paths
    from ratoon.client.address import url_of_environment

    place = paths.home() / directory
    if url_of_environment() or not place.is_dir():
        return []
    return sorted(each.name for each in place.iterdir() if each.name.startswith(incomplete))


Sandbox = Annotated[
    str,
    typer.Argument(metavar="SANDBOX", help="Its id or its name.", autocompletion=known_ids),
]
Sandboxes = Annotated[
    list[str],
    typer.Argument(metavar="SANDBOX", help="Their ids or names.", autocompletion=known_ids),
]


def located(image: str) -> str:
    """An image's name for a daemon, which is in another directory than this."""
    match = _IMAGE_ON_HOST.fullmatch(image)
    return f"{match[1]}:{Path(match[2]).absolute()}" if match else image


async def find(client: AsyncClient, name: str) -> AsyncSandbox:
    """The sandbox of this id or name; NotFound. Conflict: several have the name."""
    if _ID.fullmatch(name):
        return await client.sandbox(name)
    found = await client.sandboxes(metadata={NAME: name})
    if not found:
        raise NotFound(f"no sandbox {name}; `ratoon ls` lists those there are")
    if len(found) > 1:
        ids = ", ".join(each.id for each in found)
        raise Conflict(f"several sandboxes are called {name}: say which by its id, {ids}")
    return await client.sandbox(found[0].id)


async def require_free(client: AsyncClient, name: str) -> None:
    """AlreadyExists: a sandbox is called that."""
    if found := await client.sandboxes(metadata={NAME: name}):
        raise AlreadyExists(f"sandbox {found[0].id} is called {name} already")
