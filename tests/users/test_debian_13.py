"""From a wheel, on another Debian than this one, with its Python."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import debian13
import small_images
from debian13 import Space
from oci_images import Layout, layer
from ratoon import paths
from ratoon.machine.guest.build import build_guest

pytestmark = [
    pytest.mark.vm,
    pytest.mark.skipif(os.geteuid() != 0, reason="only root makes another user space"),
]

LENT = 65535
#: Of this run alone: another one has others.
UID = 0x60000000 + os.getpid() % 4096 * (LENT + 1)
HOMES = {0: "/root", UID: "/home/anna"}
#: What guests boot from, and what it is made of.
CACHED = [paths.cache() / kind for kind in ("guest", "packages")]


@dataclass(frozen=True)
class Installed:
    """Ratoon for Debian 13's Python, and what root is to run there, as an ordinary user reads."""

    home: Path
    command: str

    @property
    def ratoon(self) -> Path:
        return self.home / "venv/bin/ratoon"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """In an empty one, from a wheel of this checkout."""
    home = tmp_path_factory.mktemp("wheel")
    for place in (home, *home.parents[:2]):  # pytest's own are for who runs it
        place.chmod(0o755)
    with debian13.space(debian13.root(), home, debian13.wheels()) as empty:
        debian13.install(empty, home)
        empty.add_user("anna", UID, LENT)
        done = empty.try_to_run(home / "venv/bin/ratoon", "setup", uid=UID, HOME=HOMES[UID])
        assert done.returncode == 1, done
        (command,) = done.stdout.splitlines()
        assert command.startswith("apt-get update && apt-get install -y")
        return Installed(home, command)


@pytest.fixture(scope="module")
def debian(installed: Installed) -> Iterator[Space]:
    """One in which root has run what `ratoon setup` named."""
    build_guest()  # which is the same there
    tree = debian13.root(installed.command)
    image = Layout(installed.home / "image")
    image.add([layer(small_images.busybox())])
    with debian13.space(tree, installed.home, *CACHED) as space:
        space.add_user("anna", UID, LENT)
        yield space


@pytest.mark.parametrize("uid", [0, UID], ids=["root", "user"])
def test_from_a_wheel(debian: Space, installed: Installed, uid: int) -> None:
    def ratoon(*words: str) -> str:
        return debian.run(installed.ratoon, *words, uid=uid, HOME=HOMES[uid])

    cache = paths.cache() if uid == 0 else f"{HOMES[uid]}/.cache/ratoon"
    debian.run("mkdir", "-p", cache, uid=uid)
    if uid:
        debian.run("ln", "-s", *CACHED, cache, uid=uid)
    assert ratoon("setup") == ""
    image = f"oci:{installed.home}/image:latest"
    ratoon("from-image", image, "--tag", "base", "--mem-size-mib", "160")
    assert ratoon("run", "base", "--", "sh", "-c", "echo hello") == "hello"
    sandbox = ratoon("run", "-d", "base", "--", "sleep", "1000")
    ratoon("exec", sandbox, "touch", "/lost")
    ratoon("reset", sandbox)
    there = ratoon("exec", sandbox, "sh", "-c", "ls /lost 2>/dev/null; id -u")
    assert there == "0"
    ratoon("kill", sandbox)


@pytest.mark.soak
@pytest.mark.parametrize("uid", [0, UID], ids=["root", "user"])
def test_from_nothing(installed: Installed, uid: int) -> None:
    """All that is downloaded is downloaded; how long each step takes is printed."""
    with debian13.space(debian13.root(installed.command), installed.home) as debian:
        debian.add_user("anna", UID, LENT)

        def timed(*words: str) -> str:
            begun = time.monotonic()
            said = debian.run(installed.ratoon, *words, uid=uid, HOME=HOMES[uid])
            print(f"{words}: {time.monotonic() - begun:.1f} s")
            return said

        assert timed("setup") == ""
        assert timed("run", "debian", "--", "echo", "hello") == "hello"
        assert timed("run", "debian", "--", "echo", "hello") == "hello"
