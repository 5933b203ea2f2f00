"""The files of a sandbox."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal, overload

from ratoon.api.answers import read
from ratoon.api.files import FileEvent, FileInfo, Transfer
from ratoon.client.aio import trees
from ratoon.client.aio.connection import AsyncConnection, begun
from ratoon.client.aio.conversations import AsyncConversation
from ratoon.client.files import GuestPath, OnBytes, guest_path, octal
from ratoon.errors import GuestFileNotFound, GuestNotADirectory

Content = str | bytes | AsyncIterable[bytes]
FileInfos = list[FileInfo]


class AsyncFiles:
    """The files of one sandbox: `sandbox.files`. Relative paths are relative to `/`.

    Names are bytes on Linux, and any of them may be used: text stands for its UTF-8, and what
    `os.fsdecode` makes of other bytes for those. What the guest's system says no to raises a
    GuestFileError, or one of its kinds, which name the path.
    """

    def __init__(self, connection: AsyncConnection, path: str) -> None:
        self._connection = connection
        self._path = f"{path}/files"

    # Content --------------------------------------------------------------------------------------

    @overload
    async def read(
        self,
        path: GuestPath,
        format: Literal["text"] = "text",
        *,
        offset: int = 0,
        length: int | None = None,
    ) -> str: ...

    @overload
    async def read(
        self,
        path: GuestPath,
        format: Literal["bytes"],
        *,
        offset: int = 0,
        length: int | None = None,
    ) -> bytes: ...

    async def read(
        self,
        path: GuestPath,
        format: Literal["text", "bytes"] = "text",
        *,
        offset: int = 0,
        length: int | None = None,
    ) -> str | bytes:
        """The content of a regular file, or `length` bytes of it from `offset` on.

        Text is UTF-8; UnicodeDecodeError if it is none.
        """
        content = bytearray()
        async with self.reading(path, offset=offset, length=length) as pieces:
            async for piece in pieces:
                content += piece
        return content.decode() if format == "text" else bytes(content)

    @asynccontextmanager
    async def reading(
        self, path: GuestPath, *, offset: int = 0, length: int | None = None
    ) -> AsyncIterator[AsyncIterator[bytes]]:
        """The same piece by piece, as fast as it is taken: for content of any size."""
        query = {"path": guest_path(path), "offset": offset, "length": length}
        async with self._connection.pieces(self._path, query=query) as pieces:
            yield pieces

    async def write(
        self,
        path: GuestPath,
        content: Content,
        *,
        mode: int | None = None,
        uid: int | None = None,
        gid: int | None = None,
        user: str | None = None,
        parents: bool = True,
        in_place: bool = False,
    ) -> int:
        """Make `content` the file's, and return its size in bytes. Text is written as UTF-8.

        The file is replaced at once when all of it has come; until then the old one is there.
        `in_place` overwrites the file itself, whoever has it open: for those that cannot be
        replaced, such as settings in /proc. Permissions and owner stay as they were, unless given;
        a new file is 0644, and the `user`'s, as commands take one, by default of who runs commands
        there. So are missing directories that are made for it with `parents`.
        """
        return await self._write(
            path,
            content,
            mode=octal(mode),
            uid=uid,
            gid=gid,
            user=user,
            parents=parents,
            in_place=in_place,
        )

    async def append(self, path: GuestPath, content: Content, *, user: str | None = None) -> int:
        """Add `content` at the file's end, as it comes; make the file if there is none."""
        return await self._write(path, content, user=user, append=True)

    async def _write(self, path: GuestPath, content: Content, **how: object) -> int:
        sent = content.encode() if isinstance(content, str) else content
        query = {"path": guest_path(path), **how}
        answer = await self._connection.ask("PUT", self._path, query=query, content=sent)
        return int(answer["size_bytes"])

    # What is there --------------------------------------------------------------------------------

    async def stat(self, path: GuestPath, *, follow_symlinks: bool = True) -> FileInfo:
        """What `path` is; with `follow_symlinks`, what it leads to."""
        return read(FileInfo, await self._ask("GET", "stat", path, follow=follow_symlinks))

    async def exists(self, path: GuestPath) -> bool:
        """Whether there is something at `path`; not so for a link that leads nowhere."""
        try:
            await self.stat(path)
        except (GuestFileNotFound, GuestNotADirectory):
            return False
        return True

    async def list(self, path: GuestPath, *, depth: int = 1) -> FileInfos:
        """What a directory holds, and directories in it, down to `depth`; each before its content.

        Links are named, not followed.
        """
        return read(FileInfos, await self._ask("GET", "list", path, depth=depth))

    @asynccontextmanager
    async def watch(
        self, path: GuestPath, *, recursive: bool = False
    ) -> AsyncIterator[AsyncIterator[FileEvent]]:
        """What happens in a directory from now on; within the block, iterate over the events.

        `recursive`: and in those below it, on the same file system, new ones included. Events come
        until the block is left or the directory itself is gone. Who takes them too slowly gets one
        of kind `overflow` in place of those that were lost.
        """
        query = {"path": guest_path(path), "recursive": recursive}
        async with self._connection.converse(f"{self._path}/watch", query=query) as talk:
            await begun(talk)
            yield _events(talk)

    # Changes --------------------------------------------------------------------------------------

    async def make_dir(
        self,
        path: GuestPath,
        *,
        mode: int | None = None,
        user: str | None = None,
        parents: bool = True,
        exist_ok: bool = True,
    ) -> None:
        """Make a directory, which is the `user`'s, by default of who runs commands there.

        A `mode` is given to it alone, and only if it is new.
        """
        how = {"mode": octal(mode), "user": user, "parents": parents, "exist_ok": exist_ok}
        await self._ask("POST", "mkdir", path, **how)

    async def remove(
        self, path: GuestPath, *, recursive: bool = False, missing_ok: bool = False
    ) -> None:
        """Remove a file, a link or a directory; with `recursive`, one that is not empty too."""
        query = {"path": guest_path(path), "recursive": recursive}
        try:
            await self._connection.ask("DELETE", self._path, query=query)
        except GuestFileNotFound:
            if not missing_ok:
                raise

    async def rename(self, path: GuestPath, to: GuestPath, *, replace: bool = False) -> None:
        """Move within a file system. GuestFileExists: there is something; `replace` it if asked."""
        await self._ask("POST", "rename", path, to=guest_path(to), replace=replace)

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
        how = {"mode": octal(mode), "uid": uid, "gid": gid, "mtime_ns": mtime_ns}
        await self._ask("POST", "change", path, **how)

    async def symlink(self, path: GuestPath, target: GuestPath, *, user: str | None = None) -> None:
        """Make a symbolic link at `path` that says `target`."""
        await self._ask("POST", "symlink", path, to=guest_path(target), user=user)

    async def _ask(self, method: str, what: str, path: GuestPath, **query: object) -> Any:
        whole = {"path": guest_path(path), **query}
        return await self._connection.ask(method, f"{self._path}/{what}", query=whole)

    # Trees ----------------------------------------------------------------------------------------

    async def upload(
        self,
        local: Path | str,
        path: GuestPath,
        *,
        merge: bool = False,
        owners: bool = False,
        user: str | None = None,
        parents: bool = True,
        on_bytes: OnBytes = lambda count: None,
    ) -> Transfer:
        """Copy a file, or a directory with all in it, from this host to `path` in the guest.

        Content, permissions, times and links are kept; with `owners`, the numbers of owners and
        groups too, else everything is the `user`'s, by default of who runs commands there. `path`
        gets it whole or not at all. If it is a directory that is there already, `merge` says that
        it may be written into. `parents`: make the directories above it. `on_bytes` is told how
        many have been sent.

        NotFound, HostError: of this host's files.
        """
        local = Path(local)
        if local.is_dir():
            query = {"path": guest_path(path), "merge": merge, "user": user, "parents": parents}
            return await trees.upload(
                self._connection, self._path, local, query, on_bytes, owners=owners
            )
        sent, size, entry = trees.reading(local, on_bytes)
        await self.write(path, sent, mode=entry.st_mode & 0o7777, user=user, parents=parents)
        owner = {"uid": entry.st_uid, "gid": entry.st_gid} if owners else {}
        await self.change(path, mtime_ns=entry.st_mtime_ns, **owner)
        return Transfer(1, size, [], 0)

    async def download(
        self,
        path: GuestPath,
        local: Path | str,
        *,
        merge: bool = False,
        owners: bool = False,
        on_bytes: OnBytes = lambda count: None,
    ) -> Transfer:
        """Copy a file, or a directory with all in it, to `local` on this host.

        As `upload`, the other way. Links that lead out of the tree, devices, sockets and pipes are
        left out. UnsafeArchive: what came would have done harm; nothing of it was kept.
        """
        return await trees.download(
            self._connection,
            self._path,
            guest_path(path),
            Path(local),
            merge=merge,
            owners=owners,
            on_bytes=on_bytes,
        )


async def _events(talk: AsyncConversation) -> AsyncIterator[FileEvent]:
    while isinstance(message := await talk.receive(), dict):
        yield read(FileEvent, message["event"])
