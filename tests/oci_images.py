"""Images made by hand, as small as they can be: layers of single entries, in an OCI layout."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Entry = tuple[tarfile.TarInfo, bytes]


@dataclass(frozen=True)
class Packed:
    """A layer that is compressed already, and the digest of what it was before."""

    data: bytes
    diff_id: str


Descriptor = dict[str, Any]

INDEX = "application/vnd.oci.image.index.v1+json"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar"


# What is in a layer -------------------------------------------------------------------------------


def entry(
    name: str,
    kind: bytes,
    data: bytes = b"",
    *,
    mode: int = 0o755,
    uid: int = 0,
    gid: int = 0,
    target: str = "",
    device: tuple[int, int] = (0, 0),
    xattrs: Mapping[str, str] | None = None,
) -> Entry:
    info = tarfile.TarInfo(name)
    info.type, info.size, info.mode = kind, len(data), mode
    info.uid, info.gid, info.linkname = uid, gid, target
    info.devmajor, info.devminor = device
    info.mtime = 1_000_000_000
    info.pax_headers = {f"SCHILY.xattr.{key}": value for key, value in (xattrs or {}).items()}
    return info, data


def file(name: str, data: bytes = b"", mode: int = 0o644, **more: Any) -> Entry:
    return entry(name, tarfile.REGTYPE, data, mode=mode, **more)


def directory(name: str, mode: int = 0o755, **more: Any) -> Entry:
    return entry(name, tarfile.DIRTYPE, mode=mode, **more)


def symlink(name: str, target: str) -> Entry:
    return entry(name, tarfile.SYMTYPE, mode=0o777, target=target)


def hard_link(name: str, target: str) -> Entry:
    return entry(name, tarfile.LNKTYPE, target=target)


def device(name: str, kind: bytes, major: int, minor: int, mode: int = 0o666) -> Entry:
    return entry(name, kind, mode=mode, device=(major, minor))


def layer(entries: Iterable[Entry]) -> bytes:
    """A layer's tar, as it is before compression; xattrs may have any bytes, as latin-1."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for info, data in entries:
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


# The image ----------------------------------------------------------------------------------------


def digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


class Layout:
    """An OCI image layout that is being made in the directory `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.blobs = path / "blobs/sha256"
        self.blobs.mkdir(parents=True, exist_ok=True)
        (path / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
        self._manifests: list[Descriptor] = []

    def blob(self, data: bytes, media_type: str, **more: Any) -> Descriptor:
        name = digest(data)
        self.blob_path(name).write_bytes(data)
        return {"mediaType": media_type, "digest": name, "size": len(data), **more}

    def blob_path(self, name: str) -> Path:
        return self.blobs / name.removeprefix("sha256:")

    def add(
        self,
        layers: Sequence[bytes | Packed],
        config: Mapping[str, Any] | None = None,
        *,
        ref: str = "latest",
        platform: tuple[str, str] = ("amd64", "linux"),
        suffix: str = "+gzip",
        compress: Any = lambda data: gzip.compress(data, 1, mtime=0),
    ) -> dict[str, Any]:
        """Add an image of these layers under the name `ref`; its manifest."""
        packed = [
            each if isinstance(each, Packed) else Packed(compress(each), digest(each))
            for each in layers
        ]
        described = [self.blob(each.data, f"{LAYER}{suffix}") for each in packed]
        document = {
            "architecture": platform[0],
            "os": platform[1],
            "config": dict(config or {}),
            "rootfs": {"type": "layers", "diff_ids": [each.diff_id for each in packed]},
            "history": [{"created_by": f"layer {number}"} for number in range(len(layers))],
        }
        manifest = {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": self.blob(json.dumps(document).encode(), CONFIG),
            "layers": described,
        }
        self.name(self.blob(json.dumps(manifest).encode(), MANIFEST), ref)
        return manifest

    def name(self, descriptor: Descriptor, ref: str) -> None:
        annotations = {"org.opencontainers.image.ref.name": ref}
        self._manifests.append({**descriptor, "annotations": annotations})
        index = {"schemaVersion": 2, "mediaType": INDEX, "manifests": self._manifests}
        (self.path / "index.json").write_text(json.dumps(index))

    def reference(self, ref: str = "latest") -> str:
        return f"oci:{self.path}:{ref}"
