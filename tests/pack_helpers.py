"""Packs of a small chain, taken apart and put together wrongly."""

from __future__ import annotations

import io
import json
import sys
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ratoon.store.disk.qcow2 import disk_root
from ratoon.store.pack.packfile import Contents, PackedFile, tar_header
from ratoon.store.snapshot.snapshot import Snapshot
from ratoon.store.snapshot.store import Store
from small_snapshots import digest, publish

if sys.version_info >= (3, 14):
    from compression import zstd as zstd
else:
    from backports import zstd as zstd

#: A pack's members by name, `pack.json` first.
Members = dict[str, bytes]


def publish_chain(store: Store) -> list[Snapshot]:
    """base, L1 and L2; each with pages of its own, pages of zeros and pages that it covers."""
    base = publish(store, "base", {n: n % 7 for n in range(40)})
    first = publish(store, "L1", {3: 9, 5: 0, 200: 4}, base)
    return [base, first, publish(store, "L2", {3: 1, 255: 8}, first)]


def content_of(snapshot: Snapshot) -> dict[str, bytes]:
    """All files of a snapshot directory but the cache, by their names in it."""
    return {
        str(path.relative_to(snapshot.path)): path.read_bytes()
        for path in sorted(snapshot.path.rglob("*"))
        if path.is_file() and path.name != "verified.json"
    }


def state_of(store: Store) -> dict[str, Any]:
    """Every name in the store, with the inode and the times of what it names."""
    found = {}
    for path in sorted(store.home.rglob("*")):
        st = path.lstat()
        times = () if path.is_dir() else (st.st_mtime_ns, st.st_size)
        found[str(path.relative_to(store.home))] = (st.st_ino, st.st_mode, *times)
    return found


def members_of(path: Path) -> Members:
    """The members of a sound pack, as another program reads them."""
    raw = zstd.decompress(path.read_bytes())
    with tarfile.open(fileobj=io.BytesIO(raw)) as archive:
        return {member.name: _content(archive, member) for member in archive}


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    assert file
    return file.read()


def archive_of(members: Members | list[tuple[str, bytes]]) -> bytes:
    """A tar stream in a pack's own way, its end included."""
    pairs = members.items() if isinstance(members, dict) else members
    return b"".join(member(name, content) for name, content in pairs) + bytes(1024)


def member(name: str, content: bytes) -> bytes:
    return tar_header(name, len(content)) + content + bytes(-len(content) % 512)


def write_pack(path: Path, archive: bytes) -> Path:
    path.write_bytes(zstd.compress(archive))
    return path


def sealed(members: Members, **changes: Any) -> Members:
    """The same members with a `pack.json` that fits them; `changes` are to that document."""
    files = [
        PackedFile(name=name, size=len(content), digest=digest(content))
        for name, content in members.items()
        if name not in ("pack.json", "pack.sig")
    ]
    tag = json.loads(members["pack.json"])["tag"]
    contents = Contents(tag=tag, files=tuple(files)).model_dump(mode="json")
    return {**members, "pack.json": json.dumps({**contents, **changes}).encode()}


def with_manifest(members: Members, document: Any) -> Members:
    """The same members with another manifest, and all digests made to fit it."""
    raw = json.dumps(document).encode()
    changed = {"manifest.json": raw, "manifest.b3": digest(raw).encode() + b"\n"}
    return sealed({**members, **changed})


def with_files(members: Members, files: Mapping[str, bytes]) -> Members:
    """The same members with other disks or device state, whose maker has made all digests fit."""
    manifest = json.loads(members["manifest.json"])
    for name, content in files.items():
        reference = {"digest": digest(content), "size": len(content)}
        if name == "vmstate":
            manifest["vmstate"] = reference
        else:
            manifest["layers"][_layer(name)]["disk"] = reference
    layers = manifest["layers"]
    manifest["disk_root"] = disk_root([layer["disk"]["digest"] for layer in layers])
    return with_manifest({**members, **files}, manifest)


def _layer(name: str) -> int:
    _, *number = name.split("/")
    return int(number[0]) if number else -1
