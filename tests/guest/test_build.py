"""What the guest is built of: packages as apt resolves them, and an archive in the right order."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from blake3 import blake3

from ratoon.artifacts import run
from ratoon.errors import HostError
from ratoon.machine.guest import build, packages
from ratoon.machine.guest.packages import Package

#: As `apt-get download --print-uris` of Debian 12 writes them, one a line.
POOL = "http://deb.debian.org/debian/pool/main"
URIS = f"""\
'{POOL}/z/zlib/zlib1g_1.2.13.dfsg-1_amd64.deb' \
zlib1g_1%3a1.2.13.dfsg-1_amd64.deb 86700 SHA256:{"d7dd" * 16}
'{POOL}/g/glibc/libc6_2.36-9%2bdeb12u9_amd64.deb' \
libc6_2.36-9+deb12u9_amd64.deb 2757092 SHA256:{"f20a" * 16}
"""

DEPENDS = """\
linux-image-cloud-amd64
  Depends: linux-image-6.1.0-37-cloud-amd64
  Depends: linux-image-of-a-mirror-that-ends-elsewhere (= 6.1)
"""


class Host:
    """Stands in for apt: has one answer, and remembers the questions."""

    def __init__(self, output: str) -> None:
        self.output = output
        self.commands: list[list[str]] = []

    def __call__(self, command: Sequence[str]) -> str:
        self.commands.append([*command])
        return self.output


def answer(monkeypatch: pytest.MonkeyPatch, output: str) -> Host:
    host = Host(output)
    monkeypatch.setattr(packages, "ask", host)
    return host


def test_packages_in_the_order_they_were_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    host = answer(monkeypatch, URIS)
    libc, zlib = packages.resolve(["libc6", "zlib1g"])
    assert host.commands == [["apt-get", "download", "--print-uris", "libc6", "zlib1g"]]
    assert (libc.name, zlib.name) == ("libc6", "zlib1g")
    assert zlib == Package("zlib1g", "zlib1g_1%3a1.2.13.dfsg-1_amd64.deb", "d7dd" * 16)


@pytest.mark.parametrize("output", ["", URIS])
def test_packages_that_apt_does_not_offer(monkeypatch: pytest.MonkeyPatch, output: str) -> None:
    answer(monkeypatch, output)
    with pytest.raises(HostError, match=r"no package busybox-static, mc; try `apt-get update`"):
        packages.resolve(["busybox-static", "mc"])


def test_the_kernel_behind_the_meta_package(monkeypatch: pytest.MonkeyPatch) -> None:
    host = answer(monkeypatch, DEPENDS)
    found = packages.dependency("linux-image-cloud-amd64", r"linux-image-\S+")
    assert found == "linux-image-6.1.0-37-cloud-amd64"
    assert host.commands == [["apt-cache", "depends", "--important", "linux-image-cloud-amd64"]]


@pytest.mark.parametrize("output", ["", "linux-image-cloud-amd64\n", "  Depends: base-files\n"])
def test_no_such_dependency(monkeypatch: pytest.MonkeyPatch, output: str) -> None:
    answer(monkeypatch, output)
    with pytest.raises(HostError, match=r"no dependency like linux.*; try `apt-get update`"):
        packages.dependency("linux-image-cloud-amd64", r"linux-image-\S+")


def test_a_tree_in_a_fixed_order_directories_first(tmp_path: Path) -> None:
    for name in ("b/c/file", "b/a", "a-b/file", "a/file", "z"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "y").symlink_to("b")
    (tmp_path / "empty").mkdir()
    walked = [str(path.relative_to(tmp_path)) for path in build._walk(tmp_path)]
    assert walked == [
        *("a", "a/file", "a-b", "a-b/file", "b", "b/a", "b/c", "b/c/file"),
        *("empty", "y", "z"),
    ]


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Package]:
    """Packages that hold a kernel and next to nothing else, in a cache of the test's own."""
    found = [Package("linux", "linux_1_amd64.deb", "00")]
    tree = tmp_path / "tree"
    (tree / "boot").mkdir(parents=True)
    (tree / "boot/vmlinuz-6.1").write_bytes(b"kernel")

    def lay_out(_: Path, root: Path) -> None:
        (root / "ratoon/guest").mkdir(parents=True)
        (root / "init").write_text("#!/bin/sh")
        (root / "ratoon/guest/agent.py").touch()

    monkeypatch.setenv("RATOON_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "_lay_out", lay_out)
    monkeypatch.setattr(packages, "dependency", lambda name, pattern: "linux")
    monkeypatch.setattr(packages, "resolve", lambda names: found)
    monkeypatch.setattr(packages, "unpacked", lambda sources, progress: tree)
    return found


def test_the_guest_and_its_digests(sources: list[Package]) -> None:
    guest = build.build_guest()
    assert guest.kernel.read_bytes() == b"kernel"
    assert guest.kernel_digest == blake3(b"kernel").hexdigest()
    assert guest.initramfs_digest == blake3(guest.initramfs.read_bytes()).hexdigest()
    listing = run(["cpio", "--list", "--quiet"], stdin=guest.initramfs.read_bytes())
    assert listing.decode().split() == ["init", "ratoon", "ratoon/guest", "ratoon/guest/agent.py"]
    assert not (guest.initramfs.parent / "root").exists()


def test_the_guest_is_built_once_for_its_packages_and_its_agent(
    sources: list[Package], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build.build_guest()
    assert build.build_guest() == first
    sources.append(Package("busybox-static", "busybox-static_1_amd64.deb", "00"))
    second = build.build_guest()
    monkeypatch.setattr(build, "SOURCE", tmp_path)
    for part in build.PARTS:
        (tmp_path / part).mkdir()
    (tmp_path / "agent/port.py").write_text("# another agent")
    third = build.build_guest()
    (tmp_path / "shared/wire.py").write_text("# other frames")
    fourth = build.build_guest()
    assert len({guest.kernel.parent for guest in (first, second, third, fourth)}) == 4
    assert all(re.fullmatch(r"[0-9a-f]{64}", guest.kernel_digest) for guest in (first, third))


def test_the_end_of_the_memory_is_the_firmwares(sources: list[Package], tmp_path: Path) -> None:
    """As to boot ROMs that read the header of a kernel; whatever is none stays as it is."""
    usual, lower = (f"{address:08x}" for address in (0x7FFFFFFF, 0x7FFEFFFF))
    for magic, end, then in (
        (b"HdrS", usual, lower),
        (b"HdrS", "37ffffff", "37ffffff"),
        (b"none", usual, usual),
    ):
        header = bytearray(0x300)
        header[0x202:0x206] = magic
        header[0x22C:0x230] = bytes.fromhex(end)[::-1]
        kernel = tmp_path / "vmlinuz"
        kernel.write_bytes(header)
        guest = build.with_kernel(build.build_guest(), kernel)
        header[0x22C:0x230] = bytes.fromhex(then)[::-1]
        assert kernel.read_bytes() == header
        assert guest.kernel_digest == blake3(header).hexdigest()
