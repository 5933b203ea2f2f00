"""What the guest is built of, and an archive in the right order."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from blake3 import blake3

import small_images
from debian_mirror import lock_of
from ratoon import paths
from ratoon.artifacts import run
from ratoon.machine.guest import build, packages
from ratoon.machine.guest.packages import Package


def package(name: str) -> Package:
    path = f"pool/main/{name}_1_amd64.deb"
    return Package(name=name, version="1", archive="debian", path=path, size=1, sha256="00" * 32)


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Package]:
    """Packages that hold a kernel and next to nothing else, in a cache of the test's own."""
    found = [package("linux")]
    tree = tmp_path / "tree"
    (tree / "boot").mkdir(parents=True)
    (tree / "boot/vmlinuz-6.1").write_bytes(b"kernel")

    def lay_out(_: Path, root: Path) -> None:
        (root / "ratoon/guest").mkdir(parents=True)
        (root / "init").write_text("#!/bin/sh")
        (root / "ratoon/guest/agent.py").touch()

    monkeypatch.setenv("RATOON_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "_lay_out", lay_out)
    monkeypatch.setattr(packages, "locked", lambda: lock_of(*found))
    monkeypatch.setattr(packages, "unpacked", lambda lock, progress, directory: tree)
    return found


def test_the_guest_and_its_digests(sources: list[Package]) -> None:
    guest = build.build_guest()
    assert guest.kernel.read_bytes() == b"kernel"
    assert guest.kernel_digest == blake3(b"kernel").hexdigest()
    assert guest.initramfs_digest == blake3(guest.initramfs.read_bytes()).hexdigest()
    listing = run([small_images.BUSYBOX, "cpio", "-t"], stdin=guest.initramfs.read_bytes())
    assert listing.decode().split() == ["init", "ratoon", "ratoon/guest", "ratoon/guest/agent.py"]
    assert not (guest.initramfs.parent / "root").exists()


def test_the_guest_is_built_once_for_its_packages_and_its_agent(
    sources: list[Package], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build.build_guest()
    assert build.build_guest() == first
    sources.append(package("busybox-static"))
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


def test_nothing_of_this_host_is_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither its apt nor any other program of its is run, and of its umask nothing is seen."""
    before = build.build_guest()  # and its packages, which are in the cache then
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "packages").symlink_to(paths.cache() / "packages")
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("apt-get", "apt-cache", "apt", "dpkg", "dpkg-deb", "cpio", "depmod", "python3"):
        program = programs / name
        program.write_text(f"#!/bin/sh\n: >{tmp_path}/called-{name}\nexit 1\n")
        program.chmod(0o755)
    (programs / "env").symlink_to("/usr/bin/env")
    monkeypatch.setenv("RATOON_CACHE", str(cache))
    monkeypatch.setenv("PATH", str(programs))
    umask = os.umask(0o077)
    try:
        again = build.build_guest()
    finally:
        os.umask(umask)
    assert again.kernel != before.kernel
    assert again.kernel_digest == before.kernel_digest
    assert again.initramfs_digest == before.initramfs_digest
    assert [*tmp_path.glob("called-*")] == []
