"""The routes of a guest's files. Every path is in the query, byte for byte, percent-encoded.

Answers have names as JSON text; a byte that is not UTF-8 is a lone surrogate in it, as Python's
`os.fsdecode` makes it.
"""

from __future__ import annotations

from contextlib import AsyncExitStack
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request, Response

from ratoon.api import files as api
from ratoon.api.http_only import Written
from ratoon.daemon.context import TheDaemon
from ratoon.daemon.models.common import Word
from ratoon.daemon.models.files import Extracted, FileInfo
from ratoon.daemon.problems import error_responses
from ratoon.daemon.requests import draining, raw_parameter, while_connected
from ratoon.daemon.responses import AsciiJson, Pieces
from ratoon.machine.guest.files import GuestFiles

router = APIRouter(tags=["files"])

BYTES = "application/octet-stream"
TAR = "application/x-tar"
#: A body of any length: it is passed on, not held.
UNBOUNDED = 1 << 62
Responses = dict[int | str, dict[str, Any]]

_REFUSALS = error_responses(400, 404, 409, 507)
_BINARY = {"schema": {"type": "string", "format": "binary"}}


def content(media_type: str, refusals: Responses = _REFUSALS) -> Responses:
    """For OpenAPI: answers with such content."""
    return {**refusals, 200: {"content": {media_type: _BINARY}, "description": "The content."}}


#: What a route needs to take a body of any kind and length.
UPLOAD: dict[str, Any] = {
    "openapi_extra": {"requestBody": {"content": {BYTES: _BINARY}, "required": True}},
    "max_body_size": UNBOUNDED,
}


async def _path(
    request: Request, path: Annotated[str, Query(description="In the guest, from `/` on.")]
) -> str:
    return raw_parameter(request, "path")


async def _to(
    request: Request, to: Annotated[str, Query(description="The new path, in the guest.")]
) -> str:
    return raw_parameter(request, "to")


async def _files(sandbox_id: str, daemon: TheDaemon) -> GuestFiles:
    return GuestFiles(daemon.engine.get(sandbox_id))


Files = Annotated[GuestFiles, Depends(_files)]
Path = Annotated[str, Depends(_path)]
To = Annotated[str, Depends(_to)]
Number = Annotated[int, Query(ge=0, lt=1 << 32)]
Size = Annotated[int, Query(ge=0, lt=1 << 63)]
Whose = Annotated[
    Word | None,
    Query(description="Whose new things are; by default of who runs commands there."),
]
Mode = Annotated[
    str, Query(pattern=r"^[0-7]{3,5}$", description="Permission bits in octal, such as 644.")
]


@router.get("/v1/sandboxes/{sandbox_id}/files", response_class=Response, responses=content(BYTES))
async def read_file(
    files: Files, path: Path, offset: Size = 0, length: Size | None = None
) -> Response:
    """The content of a regular file, or a part of it, as fast as it is taken."""
    async with AsyncExitStack() as held:
        reading = files.reading(path, offset=offset, length=length)
        pieces = await held.enter_async_context(reading)
        return await Pieces.begin(pieces, held, media_type=BYTES)
    raise AssertionError


@router.put("/v1/sandboxes/{sandbox_id}/files", responses=_REFUSALS, **UPLOAD)
async def write_file(
    files: Files,
    path: Path,
    request: Request,
    mode: Mode | None = None,
    uid: Number | None = None,
    gid: Number | None = None,
    user: Whose = None,
    parents: bool = False,
    append: bool = False,
    in_place: bool = False,
) -> Written:
    """Make the body the file's content, once all of it has come; or `append` it, as it comes.

    `in_place` overwrites a file that cannot be replaced, such as a setting in /proc.
    """
    async with draining(request) as body:
        if append:
            size = await files.append(path, body, user=user)
        else:
            size = await files.write(
                path,
                body,
                mode=_bits(mode),
                uid=uid,
                gid=gid,
                user=user,
                parents=parents,
                in_place=in_place,
            )
    return Written(size_bytes=size)


@router.delete("/v1/sandboxes/{sandbox_id}/files", status_code=204, responses=_REFUSALS)
async def remove_file(files: Files, path: Path, recursive: bool = False) -> None:
    """Remove a file, a link or a directory; `recursive`: one that is not empty too."""
    await files.remove(path, recursive=recursive)


@router.get("/v1/sandboxes/{sandbox_id}/files/stat", response_model=FileInfo, responses=_REFUSALS)
async def stat_file(files: Files, path: Path, follow: bool = True) -> Response:
    """What is there; `follow`: what a link leads to."""
    return AsciiJson(_info(await files.stat(path, follow_symlinks=follow)))


@router.get(
    "/v1/sandboxes/{sandbox_id}/files/list", response_model=list[FileInfo], responses=_REFUSALS
)
async def list_files(
    request: Request, files: Files, path: Path, depth: Annotated[int, Query(ge=1, le=1000)] = 1
) -> Response:
    """What a directory holds, and directories in it, `depth` of them deep."""
    found = await while_connected(request, files.list(path, depth=depth))
    return AsciiJson([_info(each) for each in found])


@router.post("/v1/sandboxes/{sandbox_id}/files/mkdir", status_code=204, responses=_REFUSALS)
async def make_directory(
    files: Files,
    path: Path,
    mode: Mode | None = None,
    user: Whose = None,
    parents: bool = False,
    exist_ok: bool = False,
) -> None:
    """Make a directory; `parents`: and those above it."""
    await files.mkdir(path, mode=_bits(mode), user=user, parents=parents, exist_ok=exist_ok)


@router.post("/v1/sandboxes/{sandbox_id}/files/rename", status_code=204, responses=_REFUSALS)
async def rename_file(files: Files, path: Path, to: To, replace: bool = False) -> None:
    """Move within a file system; `replace` what is at `to`."""
    await files.rename(path, to, replace=replace)


@router.post("/v1/sandboxes/{sandbox_id}/files/change", status_code=204, responses=_REFUSALS)
async def change_file(
    files: Files,
    path: Path,
    mode: Mode | None = None,
    uid: Number | None = None,
    gid: Number | None = None,
    mtime_ns: Size | None = None,
) -> None:
    """Set permissions, owner, group and modification time: those that are given."""
    await files.change(path, mode=_bits(mode), uid=uid, gid=gid, mtime_ns=mtime_ns)


@router.post("/v1/sandboxes/{sandbox_id}/files/symlink", status_code=204, responses=_REFUSALS)
async def make_symlink(files: Files, path: Path, to: To, user: Whose = None) -> None:
    """Make a symbolic link at `path` that says `to`."""
    await files.symlink(path, to, user=user)


@router.get("/v1/sandboxes/{sandbox_id}/files/tar", response_class=Response, responses=content(TAR))
async def read_tree(files: Files, path: Path, owners: bool = False) -> Response:
    """A file, or a directory with all in it, as a tar archive.

    Devices, sockets and pipes are left out. What a guest sends is not to be trusted: unpack it with
    something that knows this.
    """
    async with AsyncExitStack() as held:
        pieces = await held.enter_async_context(files.archive(path, owners=owners))
        return await Pieces.begin(pieces, held, media_type=TAR)
    raise AssertionError


@router.put("/v1/sandboxes/{sandbox_id}/files/tar", responses=_REFUSALS, **UPLOAD)
async def write_tree(
    files: Files,
    path: Path,
    request: Request,
    merge: bool = False,
    owners: bool = False,
    user: Whose = None,
    parents: bool = False,
) -> Extracted:
    """Unpack a tar archive at `path`; `merge`: into a directory that is there already."""
    async with draining(request) as body:
        how = {"merge": merge, "owners": owners, "parents": parents}
        done = await files.extract(path, body, user=user, **how)
    return Extracted(**asdict(done))


def _bits(mode: str | None) -> int | None:
    return None if mode is None else int(mode, 8)


def _info(status: api.FileInfo) -> dict[str, Any]:
    return {**asdict(status), "mode": f"{status.mode:04o}"}
