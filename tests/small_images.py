"""Layers of real programs, as few as will do, from Debian's packages and from PyPI."""

from __future__ import annotations

import gzip
import hashlib
import io
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from oci_images import Entry, Packed, directory, file, layer, symlink
from ratoon.artifacts import build_once
from ratoon.machine.guest.build import PYTHON_PACKAGES
from ratoon.machine.guest.packages import Lock, locked, unpacked
from ratoon.units import MIB

BUSYBOX = Path("/bin/busybox")
APPLETS = ("sh", "cat", "id", "env", "sleep", "stat", "pwd", "tail", "ls", "true", "touch", "chmod")
#: A mebibyte that compresses well.
PIECE = (b"ratoon " * MIB)[: MIB - 1] + b"\n"
#: What nobody runs.
_IDLE = ("usr/share", "bin/busybox", "usr/lib/x86_64-linux-gnu/gconv", "usr/lib/python3.11/test")


def debian(*names: str) -> Path:
    """A tree with packages of Debian's that tests use, and guests do not; in the cache."""
    return unpacked(Lock.load(Path(__file__).with_name("packages.json")).named(names))


def busybox() -> list[Entry]:
    """One static program under many names; nothing else at all."""
    program = file("bin/busybox", BUSYBOX.read_bytes(), 0o755)
    return [directory("bin"), program, *(symlink(f"bin/{name}", "busybox") for name in APPLETS)]


def python() -> bytes:
    """Debian's libc and Python; no shell."""
    root = unpacked(locked().named(PYTHON_PACKAGES))
    return _packed(root, _is_used) + layer([symlink("usr/bin/python3", "python3.11")])


def bash() -> bytes:
    """Debian's libc and bash; neither Python nor any other program."""
    return _packed(_bash(), _is_used)


def bash_program() -> bytes:
    return (_bash() / "bin/bash").read_bytes()


def musl() -> list[Entry]:
    """musl, and a program that is linked with it: ninja, as PyPI has it."""
    root = debian("musl")
    (libc,) = root.rglob("libc.so")
    library = file("lib/ld-musl-x86_64.so.1", libc.read_bytes(), 0o755)
    link = symlink("lib/libc.musl-x86_64.so.1", "ld-musl-x86_64.so.1")
    return [directory("lib"), library, link, file("bin/ninja", _ninja(), 0o755)]


def repeated(name: str, size: int) -> Packed:
    """A layer with one file of `size` bytes, a multiple of MiB, which hardly grows it."""
    info = tarfile.TarInfo(name)
    info.size = size
    pieces = [info.tobuf(tarfile.PAX_FORMAT), *[PIECE] * (size // MIB), bytes(1024)]
    digest, packed = hashlib.sha256(), io.BytesIO()
    with gzip.GzipFile(fileobj=packed, mode="wb", compresslevel=1, mtime=0) as compressor:
        for each in pieces:
            digest.update(each)
            compressor.write(each)
    return Packed(packed.getvalue(), f"sha256:{digest.hexdigest()}")


def _bash() -> Path:
    return debian("bash", "libtinfo6", "libc6")


def _is_used(name: str) -> bool:
    return not name.startswith(_IDLE)


def _packed(root: Path, wanted: Callable[[str], bool]) -> bytes:
    """All of a tree that is wanted, without the end of a tar: more may follow."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for path in sorted(root.rglob("*")):
            name = str(path.relative_to(root))
            if wanted(name):
                archive.add(path, name, recursive=False)
        end = archive.offset
    return buffer.getvalue()[:end]


def _ninja() -> bytes:
    def build(room: Path) -> None:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(room)]
        only = ["--only-binary=:all:", "--platform=musllinux_1_2_x86_64", "ninja==1.13.0"]
        subprocess.run([*pip, *only], check=True)

    (wheel,) = build_once("wheels", {"ninja": "1.13.0"}, build).glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("scripts/ninja"))
        return archive.read(name)
