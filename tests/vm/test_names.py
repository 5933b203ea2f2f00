"""A guest's own name and localhost are answered at once, in every fork, to whoever asks."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from vm_helpers import FOR_EVER, fork_of_image, sh

import small_images
from oci_images import Entry, Layout, directory, file, layer, symlink
from ratoon import paths
from ratoon.engine.sandbox.engine import Engine
from ratoon.engine.sandbox.sandbox import Sandbox
from ratoon.store.snapshot.diff import diff

#: Seconds that all of ASK may take under emulation. One question to a nameserver takes 5 or more.
AT_ONCE = 2.5
#: As glibc answers, in all the ways that programs ask: what is found, and how long it took. To
#: it, what has ::1 in /etc/hosts has 127.0.0.1 besides, where only IPv4 is asked for.
ASK = """
import socket, time
began = time.monotonic()
name = socket.gethostname()
def found(asked, family):
    return sorted({each[4][0] for each in socket.getaddrinfo(asked, 80, family)})
print(name, socket.getfqdn(), socket.gethostbyaddr("127.0.1.1")[0])
print(socket.gethostbyname(name) in found(name, socket.AF_INET))
print(found(name, socket.AF_UNSPEC), found(name, socket.AF_INET), found(name, socket.AF_INET6))
print(found("localhost", socket.AF_UNSPEC), found("localhost", socket.AF_INET6))
for family in (socket.AF_INET, socket.AF_INET6):
    with socket.socket(family) as server, socket.socket(family) as client:
        server.bind((name, 0))
        server.listen()
        client.connect((name, server.getsockname()[1]))
print(time.monotonic() - began)
"""
ANSWERS = (
    "{0} {0} {0}\n"
    "True\n"
    "['127.0.1.1', '::1'] ['127.0.0.1', '127.0.1.1'] ['::1']\n"
    "['127.0.0.1', '::1'] ['::1']\n"
)


async def assert_knows_itself(sandbox: Sandbox, *, user: str | None = None) -> None:
    """All that asks for names is told the sandbox's, at once; `user` asks."""
    result = await sandbox.exec(["python3", "-c", ASK], user=user, timeout=FOR_EVER)
    assert result.exit_code == 0, result
    *answers, took = result.stdout.decode().splitlines(keepends=True)
    assert "".join(answers) == ANSWERS.format(sandbox.id)
    assert float(took) < AT_ONCE
    assert await sh(sandbox, "hostname -f; cat /etc/hostname") == f"{sandbox.id}\n" * 2


async def hosts(sandbox: Sandbox) -> str:
    return (await sandbox.files.read("/etc/hosts")).decode()


def expected(sandbox: Sandbox, *others: str) -> str:
    own = f"127.0.1.1\t{sandbox.id}\n::1\t{sandbox.id}\n"
    localhost = "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n"
    return own + localhost + "".join(f"{line}\n" for line in others)


@pytest.mark.parametrize("user", [None, "nobody"])
async def test_a_fork_knows_itself(sandbox: Sandbox, user: str | None) -> None:
    assert await hosts(sandbox) == expected(sandbox)
    await assert_knows_itself(sandbox, user=user)


async def test_so_do_forks_of_forks_after_resume_and_reset(engine: Engine) -> None:
    """What a user has added is in them as well."""
    async with await engine.fork_one("base") as first:
        await sh(first, "echo 192.0.2.1 mine >>/etc/hosts")
        await engine.branch(first, "first")
        await sh(first, "echo 192.0.2.2 late >>/etc/hosts")
        assert await hosts(first) == expected(first, "192.0.2.1 mine", "192.0.2.2 late")
        await engine.reset(first)
        assert await hosts(first) == expected(first, "192.0.2.1 mine")
        await assert_knows_itself(first)
        await sh(first, "echo 192.0.2.3 later >>/etc/hosts")
        await engine.standby(first)
        await engine.resume(first)
        assert await hosts(first) == expected(first, "192.0.2.1 mine", "192.0.2.3 later")
        await assert_knows_itself(first)
    async with await engine.fork_one("first") as second:
        assert await hosts(second) == expected(second, "192.0.2.1 mine")
        (third,) = await engine.fork_sandbox(second)
        assert isinstance(third, Sandbox)
        async with third:
            assert await hosts(third) == expected(third, "192.0.2.1 mine")
            await assert_knows_itself(third, user="nobody")
        assert await hosts(second) == expected(second, "192.0.2.1 mine")


async def test_files_that_a_user_has_rewritten(engine: Engine) -> None:
    """The new name is there whatever became of the old one; all else is the user's."""
    async with await engine.fork_one("base") as source:
        await sh(
            source,
            "echo 192.0.2.1 only >/etc/hosts; echo a-very-long-name-of-the-users >/etc/hostname; "
            "hostname a-very-long-name-of-the-users; echo 127.0.1.1 $(hostname) >>/etc/hosts",
        )
        await engine.branch(source, "rewritten")
        async with await engine.fork_one("rewritten") as fork:
            own = f"127.0.1.1\t{fork.id}\n::1\t{fork.id}\n"
            kept = "192.0.2.1 only\n127.0.1.1 a-very-long-name-of-the-users\n"
            assert await hosts(fork) == own + kept
            assert await sh(fork, "hostname -f; cat /etc/hostname") == f"{fork.id}\n" * 2
            await sh(fork, f"printf '# mine\\n{own}{kept}' >/etc/hosts; echo x >/etc/hostname")
            await engine.branch(fork, "moved")
    async with await engine.fork_one("moved") as last:
        own = f"127.0.1.1\t{last.id}\n::1\t{last.id}\n"
        assert await hosts(last) == f"{own}# mine\n{kept}"
        assert await sh(last, "hostname -f; cat /etc/hostname") == f"{last.id}\n" * 2


async def test_a_fork_writes_its_names_to_no_disk(engine: Engine, sandbox: Sandbox) -> None:
    await sh(sandbox, "sync")
    await engine.branch(sandbox, "named")
    async with await engine.fork_one("named") as fork:
        await sh(fork, "sync")
        await engine.branch(fork, "renamed")
    difference = diff(engine.store, "named", "renamed")
    assert difference.changed_pages
    assert not difference.changed_disk_bytes


# Images -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What these images are made into goes with them; what all guests need is that of always."""
    own = tmp_path_factory.mktemp("cache")
    for kind in ("guest", "packages", "accelerators"):
        (own / kind).symlink_to(paths.cache() / kind)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RATOON_CACHE", str(own))
        yield


APPLETS = ("hostname", "nc", "httpd", "timeout", "time", "mount", "rm", "grep")
#: By whatever libc busybox is linked with: connects to itself by its name.
BUSYBOX = """
mkdir -p /tmp/www; echo served >/tmp/www/file
httpd -f -p 127.0.1.1:8000 -h /tmp/www & server=$!
sleep 0.5
for name in $(hostname); do printf 'GET /file HTTP/1.0\\r\\n\\r\\n' | timeout 20 nc $name 8000; done
kill $server
"""


@asynccontextmanager
async def running(engine: Engine, room: Path, *entries: Entry) -> AsyncIterator[Sandbox]:
    """A fork of an image of busybox and what is in `entries`."""
    layout = Layout(room)
    links = [symlink(f"bin/{name}", "busybox") for name in APPLETS]
    layout.add([layer([*small_images.busybox(), *links, *entries])])
    async with fork_of_image(engine, layout.reference(), ram=160, disk=256) as sandbox:
        yield sandbox


async def test_an_image_without_any_such_file(engine: Engine, tmp_path: Path) -> None:
    async with running(engine, tmp_path) as sandbox:
        assert await hosts(sandbox) == expected(sandbox)
        assert await sh(sandbox, "hostname -f; cat /etc/hostname") == f"{sandbox.id}\n" * 2
        assert "served" in await sh(sandbox, BUSYBOX)


async def test_the_lines_of_an_image_stay(engine: Engine, tmp_path: Path) -> None:
    own = b"# of the image\n127.0.0.1 localhost here\n192.0.2.7\tdatabase\n"
    etc = [directory("etc"), file("etc/hosts", own), file("etc/hostname", b"build-host\n")]
    async with running(engine, tmp_path, *etc) as sandbox:
        names = f"127.0.1.1\t{sandbox.id}\n::1\t{sandbox.id}\n"
        v6 = "::1\tlocalhost ip6-localhost ip6-loopback\n"
        assert await hosts(sandbox) == names + v6 + own.decode()
        assert await sh(sandbox, "hostname -f; cat /etc/hostname") == f"{sandbox.id}\n" * 2


async def test_files_that_are_links(engine: Engine, tmp_path: Path) -> None:
    """To a file it stays one, and its lines are read; one that leads nowhere becomes a file."""
    links = [
        *(directory("etc"), directory("usr"), directory("usr/etc")),
        *(symlink("etc/hosts", "/usr/etc/hosts"), symlink("etc/hostname", "/run/none/hostname")),
        file("usr/etc/hosts", b"192.0.2.7\tdatabase\n"),
    ]
    async with running(engine, tmp_path, *links) as sandbox:
        assert await hosts(sandbox) == expected(sandbox, "192.0.2.7\tdatabase")
        assert await sh(sandbox, "hostname -f; cat /etc/hostname") == f"{sandbox.id}\n" * 2
