"""The guest's files, as whoever uses a sandbox sees them."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, cast, get_args

from ratoon.api.files import FileEvent, FileInfo, FileType, Transfer
from ratoon.concurrency import run_alongside
from ratoon.errors import GuestError, GuestFileNotFound, InvalidInput
from ratoon.machine.guest import transfers, watching
from ratoon.machine.guest.channel import Agent, GuestStream
from ratoon.machine.guest.file_requests import (
    GuestPath,
    ask,
    conversation,
    guest_path,
    lines,
    output,
)

Content = bytes | AsyncIterable[bytes]

#: Bytes that `read` gives at most, and things that `list` names, unless told otherwise.
READ_LIMIT = 64 * 1024**2
LIST_LIMIT = 100_000


class GuestFiles:
    """Files in a guest. Relative paths are relative to `/`, where commands start too.

    Names are bytes on Linux, and any of them may be used: see `GuestPath`. What the guest's system
    says no to raises a GuestFileError, or one of its kinds, with the path in its message.
    """

    def __init__(self, agent: Agent) -> None:
        self._agent = agent

    # What is there --------------------------------------------------------------------------------

    async def stat(self, path: GuestPath, *, follow_symlinks: bool = True) -> FileInfo:
        """What `path` is; with `follow_symlinks`, what it leads to."""
        reply = await ask(self._agent, "files.stat", path, follow=follow_symlinks)
        return _status(reply)

    async def list(
        self, path: GuestPath, *, depth: int = 1, limit: int = LIST_LIMIT
    ) -> list[FileInfo]:
        """What a directory holds, and directories in it, down to `depth`; each before its content.

        Links are named, not followed. GuestError: there is more than `limit`.
        """
        found: list[FileInfo] = []
        async with conversation(self._agent, "files.list", path, depth=depth) as stream:
            async for line in lines(stream):
                if len(found) >= limit:
                    raise GuestError(
                        f"{guest_path(path)} in {stream.name} holds more than {limit} things; "
                        "list it in parts, or raise the limit"
                    )
                found.append(_status(line))
        return found

    # Content --------------------------------------------------------------------------------------

    async def read(
        self,
        path: GuestPath,
        *,
        offset: int = 0,
        length: int | None = None,
        limit: int = READ_LIMIT,
    ) -> bytes:
        """The content of a regular file, or `length` bytes of it from `offset` on.

        GuestError: that is more than `limit` bytes; `reading` has none.
        """
        content = bytearray()
        async with self.reading(path, offset=offset, length=length) as pieces:
            async for piece in pieces:
                content += piece
                if len(content) > limit:
                    raise GuestError(
                        f"{guest_path(path)} in the guest has more than {limit} bytes; "
                        "download it, read it in parts, or raise the limit"
                    )
        return bytes(content)

    @asynccontextmanager
    async def reading(
        self, path: GuestPath, *, offset: int = 0, length: int | None = None
    ) -> AsyncIterator[AsyncIterator[bytes]]:
        """The same piece by piece, as fast as it is taken; for content of any size."""
        if offset < 0 or (length is not None and length < 0):
            raise InvalidInput("a file has no bytes before its beginning")
        fields = {"offset": offset, "length": length}
        async with conversation(self._agent, "files.read", path, **fields) as stream:
            yield output(stream)

    async def write(
        self,
        path: GuestPath,
        content: Content,
        *,
        mode: int | None = None,
        uid: int | None = None,
        gid: int | None = None,
        user: str | None = None,
        parents: bool = False,
        in_place: bool = False,
    ) -> int:
        """Make `content` the file's, and return its size in bytes.

        The file is replaced at once when all of it has come; until then, and if that never happens,
        the old one is there as it was. `in_place` overwrites the file itself, whoever has it open:
        for those that cannot be replaced, such as settings in /proc. Permissions and owner stay as
        they were, unless given; a new file is 0644, and the `user`'s, as `exec` takes one, by
        default of who runs commands there. So are directories that are made for it by `parents`.
        """
        how = "in-place" if in_place else "replace"
        fields: dict[str, Any] = {"mode": mode, "uid": uid, "gid": gid, "user": user}
        fields |= {"parents": parents, "how": how}
        return await self._write(path, content, fields)

    async def append(self, path: GuestPath, content: Content, *, user: str | None = None) -> int:
        """Add `content` at the file's end, as it comes; make the file if there is none."""
        fields: dict[str, Any] = {"mode": None, "uid": None, "gid": None, "user": user}
        fields |= {"parents": False, "how": "append"}
        return await self._write(path, content, fields)

    async def _write(self, path: GuestPath, content: Content, fields: dict[str, Any]) -> int:
        async with conversation(self._agent, "files.write", path, **fields) as stream:
            reply = await run_alongside(stream.result(), _feed(stream, content))
        return _number(reply, "size")

    # Trees ----------------------------------------------------------------------------------------

    @asynccontextmanager
    async def archive(
        self, path: GuestPath, *, owners: bool = False
    ) -> AsyncIterator[AsyncIterator[bytes]]:
        """A file, or a directory with all in it, as a tar, piece by piece; not to be trusted.

        Other file systems mounted in it are left out, and so are devices, sockets and pipes.
        """
        async with conversation(self._agent, "files.pack", path, owners=owners) as stream:
            yield output(stream)

    async def extract(
        self,
        path: GuestPath,
        archive: AsyncIterable[bytes],
        *,
        merge: bool = False,
        owners: bool = False,
        user: str | None = None,
        parents: bool = False,
    ) -> Transfer:
        """Unpack a tar at `path`: POSIX or GNU, whoever made it.

        Permissions, times and links are kept; with `owners`, the numbers of owners and groups too,
        else everything is the `user`'s, by default of who runs commands there. `path` gets it whole
        or not at all. If it is a directory that is there already, `merge` must say that it may be
        written into; then each file is whole or not there, and what else is in it stays.
        `parents`: make the directories above it.
        """
        return await transfers.extract(
            self._agent, path, archive, merge=merge, owners=owners, user=user, parents=parents
        )

    # Changes --------------------------------------------------------------------------------------

    async def mkdir(
        self,
        path: GuestPath,
        *,
        mode: int | None = None,
        user: str | None = None,
        parents: bool = False,
        exist_ok: bool = False,
    ) -> None:
        """Make a directory, which is the `user`'s, by default of who runs commands there.

        A `mode` is given to it alone, and only if it is new.
        """
        fields = {"mode": mode, "user": user, "parents": parents, "exist_ok": exist_ok}
        await ask(self._agent, "files.mkdir", path, **fields)

    async def remove(
        self, path: GuestPath, *, recursive: bool = False, missing_ok: bool = False
    ) -> None:
        """Remove a file, a link or a directory; with `recursive`, one that is not empty too."""
        fields = {"recursive": recursive}
        try:
            async with conversation(self._agent, "files.remove", path, **fields) as stream:
                await stream.result()
        except GuestFileNotFound:
            if not missing_ok:
                raise

    async def rename(self, path: GuestPath, to: GuestPath, *, replace: bool = False) -> None:
        """Move within a file system. GuestFileExists: there is something; `replace` it if asked."""
        await ask(self._agent, "files.rename", path, to=guest_path(to), replace=replace)

    async def change(
        self,
        path: GuestPath,
        *,
        mode: int | None = None,
        uid: int | None = None,
        gid: int | None = None,
        mtime_ns: int | None = None,
    ) -> None:
        """Set permission bits, owner, group and modification time: those that are given."""
        fields = {"mode": mode, "uid": uid, "gid": gid, "mtime_ns": mtime_ns}
        await ask(self._agent, "files.change", path, **fields)

    async def symlink(self, path: GuestPath, target: GuestPath, *, user: str | None = None) -> None:
        """Make a symbolic link at `path` that says `target`."""
        await ask(self._agent, "files.symlink", path, target=guest_path(target), user=user)

    def watch(
        self, path: GuestPath, *, recursive: bool = False
    ) -> AbstractAsyncContextManager[AsyncIterator[FileEvent]]:
        """What happens in a directory from now on; within the block, iterate over the events.

        `recursive`: and in those below it, on the same file system, new ones included. Events come
        until the block is left or the directory itself is gone. Who takes them too slowly gets one
        of kind "overflow" in place of those that were lost.
        """
        return watching.watch(self._agent, path, recursive=recursive)


async def _feed(stream: GuestStream, content: Content) -> None:
    if isinstance(content, bytes):
        await stream.write(content)
    else:
        async for piece in content:
            await stream.write(piece)
    stream.end_input()


def _status(fields: dict[str, Any]) -> FileInfo:
    """What the guest said, if it makes sense."""
    path, type_, target = fields.get("path"), fields.get("type"), fields.get("target")
    known = type_ in get_args(FileType)
    if not isinstance(path, str) or not known or not isinstance(target, str | None):
        raise GuestError("the guest's agent described a file in a way that makes no sense")
    return FileInfo(
        path,
        cast("FileType", type_),
        size_bytes=_number(fields, "size"),
        mode=_number(fields, "mode"),
        uid=_number(fields, "uid"),
        gid=_number(fields, "gid"),
        mtime_ns=_number(fields, "mtime_ns"),
        target=target,
    )


def _number(fields: dict[str, Any], name: str) -> int:
    number = fields.get(name)
    if type(number) is not int:
        raise GuestError(f"the guest's agent gave no {name}")
    return number
