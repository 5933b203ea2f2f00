"""Which packages bring the programs that a host lacks."""

from __future__ import annotations

from pathlib import Path

import pytest

from ratoon.machine.host import programs

BOOKWORM = {"ID": "debian", "VERSION_CODENAME": "bookworm"}
TRIXIE = {"ID": "debian", "VERSION_CODENAME": "trixie"}
MINT = {"ID": "linuxmint", "ID_LIKE": "ubuntu debian"}
FEDORA = {"ID": "fedora"}
APT = "apt-get update && apt-get install -y --no-install-recommends"


def test_what_is_missing() -> None:
    assert programs.missing(lambda name: name) == []
    assert programs.missing(lambda name: None) == [*programs.PACKAGES]
    assert programs.missing(lambda name: None, programs.PACKAGES_OF_USERS) == ["newuidmap"]


def test_programs_and_libraries_are_found() -> None:
    assert programs.find("sh") is not None
    assert programs.find("libc.so.6") is not None
    assert programs.find("no-such-program") is programs.find("libnone.so.1") is None


@pytest.mark.parametrize(
    ("wanted", "release", "command"),
    [
        (["skopeo"], BOOKWORM, f"{APT} skopeo"),
        (["mke2fs", "e2fsck", "skopeo"], TRIXIE, f"{APT} e2fsprogs skopeo"),
        (["libarchive.so.13", "newuidmap"], TRIXIE, f"{APT} libarchive13 uidmap"),
        (["qemu-img"], MINT, f"{APT} qemu-utils"),
        (["qemu-img", "mmdebstrap"], FEDORA, "dnf install -y qemu-img"),
        (["skopeo"], {"ID": "plan9"}, None),
        (["skopeo"], {}, None),
    ],
)
def test_the_command(wanted: list[str], release: dict[str, str], command: str | None) -> None:
    assert programs.command_for(wanted, release) == command


def test_debian_12_takes_some_from_its_backports() -> None:
    command = programs.command_for(["qemu-img"], BOOKWORM)
    assert command is not None
    script, rest = command.removeprefix("sh ").split(" add && ")
    assert "bookworm-backports" in Path(script).read_text()
    assert rest == f"{APT} qemu-utils"
