"""Debian's packages as files: a `.deb` (deb(5)) is unpacked, and nothing of it is run."""

from __future__ import annotations

import gzip
import io
import lzma
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

from ratoon.compression import zstd
from ratoon.errors import Corrupt

_MAGIC = b"!<arch>\n"
#: The header of a member of an ar(5): its name, then what nobody here asks, and its size.
_HEADER, _NAME, _SIZE = 60, slice(0, 16), slice(48, 58)
_READERS: dict[str, Callable[[io.BytesIO], Any]] = {
    "data.tar.xz": lzma.LZMAFile,
    "data.tar.zst": zstd.ZstdFile,
    "data.tar.gz": lambda packed: gzip.GzipFile(fileobj=packed),
}


def unpack(deb: bytes, root: Path) -> None:
    """Add the files of a package to the tree `root`, as whoever runs this. Corrupt.

    `deb`: its content. Owners, devices and the bits of set-uid are left out.
    """
    reader, packed = _data_of(deb)
    try:
        with reader(packed) as raw, tarfile.open(fileobj=raw, mode="r|") as archive:
            for member in archive:
                _put(archive, member, root)
    except (tarfile.TarError, lzma.LZMAError, zstd.ZstdError, EOFError) as error:
        raise Corrupt(f"a package cannot be unpacked: {error}") from error


def _data_of(deb: bytes) -> tuple[Callable[[io.BytesIO], Any], io.BytesIO]:
    """The member with the files, and what reads it."""
    content = io.BytesIO(deb)
    if content.read(len(_MAGIC)) == _MAGIC:
        while len(header := content.read(_HEADER)) == _HEADER:
            name, size = header[_NAME].decode().strip().rstrip("/"), int(header[_SIZE])
            if name in _READERS:
                return _READERS[name], io.BytesIO(content.read(size))
            content.seek(size + size % 2, io.SEEK_CUR)
    raise Corrupt("this is no package of Debian's, or one of a kind that is not known")


def _put(archive: tarfile.TarFile, member: tarfile.TarInfo, root: Path) -> None:
    """By hand: Python's own filters are not in Debian 12's, 3.11.2, and refuse absolute links."""
    path = _below(root, member.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    if member.isdir():
        path.mkdir(exist_ok=True)
    elif member.issym():
        path.symlink_to(member.linkname)
    elif member.islnk():
        path.hardlink_to(_below(root, member.linkname))
    elif content := archive.extractfile(member):
        with path.open("xb") as file:
            shutil.copyfileobj(content, file)
        path.chmod(member.mode & 0o777)


def _below(root: Path, name: str) -> Path:
    if ".." in PurePosixPath(name).parts or name.startswith("/"):
        raise tarfile.TarError(f"{name} is outside of it")
    return root / name
