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
    assert programs.missing(lambda name: None, programs.PACKAGES_OF_NETWORKS) == ["ip", "nft"]


def test_what_is_too_old(tmp_path: Path) -> None:
    """QEMU says so on stdout, mke2fs on stderr, and others say more of themselves."""
    says = {
        "qemu-system-x86_64": "echo 'QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)'",
        "mke2fs": "echo 'mke2fs 1.47.0 (5-Feb-2023)' >&2",
    }
    for name, script in says.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    assert programs.outdated(lambda name: str(tmp_path / name)) == {
        "qemu-system-x86_64": "qemu-system-x86_64 7.2.22 is too old: 8.2 or later is needed",
        "mke2fs": "mke2fs 1.47.0 is too old: 1.47.1 or later is needed",
    }
    (tmp_path / "qemu-system-x86_64").write_text("#!/bin/sh\necho version 10.0.2\n")
    (tmp_path / "mke2fs").write_text("#!/bin/sh\necho mke2fs 1.47.1\n")
    assert programs.outdated(lambda name: str(tmp_path / name)) == {}
    assert programs.outdated(lambda name: None) == {}
    assert programs.outdated() == {}, "of this host, too"


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
        (["nft", "pasta"], FEDORA, "dnf install -y nftables passt"),
        (["qemu-img"], MINT, f"{APT} qemu-utils"),
        (["qemu-img", "mmdebstrap"], FEDORA, "dnf install -y qemu-img"),
        (["mmdebstrap"], FEDORA, None),
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
