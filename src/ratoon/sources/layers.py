"""An image as umoci takes it: layers that are gzip or plain, for it knows nothing else."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import json
import lzma
import sys
import zlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, BinaryIO

from ratoon.errors import Corrupt, InvalidInput
from ratoon.sources import blobs
from ratoon.sources.disk import too_large

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

PLAIN = "application/vnd.oci.image.layer.v1.tar"
ZSTD = f"{PLAIN}+zstd"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
CHUNK = 1024 * 1024

_Open = Callable[[BinaryIO], AbstractContextManager[Any]]
_OPENERS: dict[bytes, _Open] = {
    b"\x1f\x8b": lambda file: gzip.GzipFile(fileobj=file),
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ\0": lzma.LZMAFile,
    b"\x5d\0\0": lzma.LZMAFile,
    b"\x28\xb5\x2f\xfd": zstd.ZstdFile,
}


def lay_out(manifest_digest: str, layout: Path, limit: int, name: str) -> list[str]:
    """Make an OCI layout of an image in the cache; the digests of its layers in the cache.

    Layers with zstd are unpacked, up to `limit` bytes of all. InvalidInput: too large, or no image.
    """
    manifest = blobs.read_document(manifest_digest)
    layers = manifest.get("layers")
    config = manifest.get("config")
    if not isinstance(layers, list) or not isinstance(config, dict):
        raise InvalidInput(f"image {name} has no layers: it is of another kind")
    ours = layout / "blobs/sha256"
    ours.mkdir(parents=True)
    digests, taken = [], []
    for layer in layers:
        path = blobs.blob_path(layer.get("digest") if isinstance(layer, dict) else None)
        digests.append(layer["digest"])
        if layer.get("mediaType") == ZSTD:
            with path.open("rb") as source:
                taken.append(_plain_blob(source, ours, limit, name))
            limit -= taken[-1]["size"]
        else:
            taken.append(layer)
            _link(ours, path)
    _link(ours, blobs.blob_path(config["digest"]))
    _finish(layout, config, taken)
    return digests


def lay_out_tarball(source: BinaryIO, layout: Path, limit: int, name: str) -> None:
    """Make an OCI layout of one layer: a tarball, as it is or with one of the usual compressions.

    InvalidInput: it is larger than `limit` bytes, or cannot be read.
    """
    ours = layout / "blobs/sha256"
    ours.mkdir(parents=True)
    layer = _plain_blob(source, ours, limit, name)
    document = {
        "architecture": "amd64",
        "os": "linux",
        "config": {},
        "rootfs": {"type": "layers", "diff_ids": [layer["digest"]]},
        "history": [{"created_by": name}],
    }
    _finish(layout, _write(ours, document, CONFIG), [layer])


def _finish(layout: Path, config: dict[str, Any], layers: list[dict[str, Any]]) -> None:
    """Write the manifest, and what a layout has besides blobs."""
    manifest = {"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": layers}
    described = _write(layout / "blobs/sha256", manifest, MANIFEST)
    described["annotations"] = {"org.opencontainers.image.ref.name": "image"}
    (layout / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    (layout / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [described]}))


def _plain_blob(source: BinaryIO, directory: Path, limit: int, name: str) -> dict[str, Any]:
    """The descriptor of a new blob, with what `source` is without its compression."""
    new = directory / "new"
    digest, size = hashlib.sha256(), 0
    try:
        with _opened(source) as plain, new.open("xb") as target:
            while data := plain.read(CHUNK):
                size += len(data)
                if size > limit:
                    raise too_large(name, limit)
                digest.update(data)
                target.write(data)
    except (EOFError, OSError, zlib.error, lzma.LZMAError, zstd.ZstdError) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        raise Corrupt(f"image {name}: a layer cannot be unpacked: {error}") from None
    new.rename(directory / digest.hexdigest())
    return {"mediaType": PLAIN, "digest": f"sha256:{digest.hexdigest()}", "size": size}


def _opened(source: BinaryIO) -> AbstractContextManager[Any]:
    beginning = source.read(8)
    source.seek(0)
    for magic, opener in _OPENERS.items():
        if beginning.startswith(magic):
            return opener(source)
    return source


def _link(directory: Path, blob: Path) -> None:
    link = directory / blob.name
    if not link.is_symlink():  # an image may have a layer twice
        link.symlink_to(blob)


def _write(directory: Path, document: dict[str, Any], media_type: str) -> dict[str, Any]:
    data = json.dumps(document).encode()
    digest = hashlib.sha256(data).hexdigest()
    (directory / digest).write_bytes(data)
    return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(data)}
