"""Whose the files are that are made from outside: who runs commands there, or who is named."""

from __future__ import annotations

import io
import tarfile
from collections.abc import AsyncIterator

import pytest
from vm_helpers import sh

from ratoon.engine.sandbox.engine import Engine
from ratoon.engine.sandbox.options import SandboxOptions
from ratoon.engine.sandbox.sandbox import Sandbox
from ratoon.errors import InvalidInput
from ratoon.machine.guest.files import GuestFiles


@pytest.fixture(scope="module")
async def sandbox(engine: Engine) -> AsyncIterator[Sandbox]:
    """Its commands are of `nobody`, who is in `nogroup`."""
    async with await engine.fork_one("base", SandboxOptions(user="nobody")) as sandbox:
        yield sandbox


async def archive() -> AsyncIterator[bytes]:
    """A file in a directory that has no entry of its own, a link, and an owner of theirs."""
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode="w") as tar:
        for name, kind in (("in/file", tarfile.REGTYPE), ("link", tarfile.SYMTYPE)):
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname, entry.uid, entry.gid = kind, "in", 7, 8
            tar.addfile(entry)
    yield written.getvalue()


async def owners(sandbox: Sandbox, directory: str) -> dict[str, str]:
    """Of all that is in it, and of itself."""
    found = await sh(sandbox, f"cd {directory} && find . -printf '%P %u:%g\\n'")
    return dict(line.rsplit(" ", 1) for line in found.splitlines())


async def make(files: GuestFiles, top: str, user: str | None) -> None:
    await files.write(f"{top}/deep/written", b"", user=user, parents=True)
    await files.append(f"{top}/appended", b"", user=user)
    await files.mkdir(f"{top}/made/below", user=user, parents=True)
    await files.symlink(f"{top}/link", "nowhere", user=user)
    await files.extract(f"{top}/tree", archive(), user=user)


MADE = ("", "deep", "deep/written", "appended", "made", "made/below", "link")
TREE = ("tree", "tree/in", "tree/in/file", "tree/link")


@pytest.mark.parametrize(
    ("user", "whose"),
    [(None, "nobody:nogroup"), ("root", "root:root"), ("daemon:games", "daemon:games")],
)
async def test_what_is_made_is_the_users(sandbox: Sandbox, user: str | None, whose: str) -> None:
    top = f"/srv/{whose}"
    await make(GuestFiles(sandbox), top, user)
    assert await owners(sandbox, top) == dict.fromkeys((*MADE, *TREE), whose)


async def test_what_says_whose_it_is_and_what_is_there_stays_so(sandbox: Sandbox) -> None:
    files = GuestFiles(sandbox)
    await files.mkdir("/srv/said")
    await files.write("/srv/said/both", b"", uid=7, gid=8)
    await files.write("/srv/said/half", b"", uid=7)
    await files.write("/srv/said/roots", b"", user="root")
    await files.write("/srv/said/roots", b"again")
    await files.append("/srv/said/roots", b"and again")
    await files.extract("/srv/said/tree", archive(), owners=True)
    found = await sh(sandbox, "cd /srv/said && find both half roots tree/in/file -printf '%U:%G '")
    assert found == "7:8 7:65534 0:0 7:8 "


async def test_where_its_commands_have_no_say_all_the_same(sandbox: Sandbox) -> None:
    """It is written as root, whoever it is for."""
    files = GuestFiles(sandbox)
    await files.write("/etc/of-nobody", b"")
    assert (await files.stat("/etc/of-nobody")).uid == 65534


async def test_nobody_of_that_name(sandbox: Sandbox) -> None:
    files = GuestFiles(sandbox)
    with pytest.raises(InvalidInput, match="no user 'stranger'"):
        await files.write("/srv/strange", b"", user="stranger")
    with pytest.raises(InvalidInput, match="no user 'stranger'"):
        await files.mkdir("/srv/strange", user="stranger")
