"""An image as umoci takes it: layers that are gzip or plain, for it knows nothing else."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import json
import lzma
import zlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, BinaryIO

from ratoon.compression import zstd
from ratoon.engine.sources import blobs
from ratoon.engine.sources.disk import too_large
from ratoon.errors import Corrupt, InvalidInput

PLAIN = "application/vnd.oci.image.layer.v1.tar"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
CHUNK = 1024 * 1024

_Open = Callable[[BinaryIO], AbstractContextManager[Any]]


def _as_it_is(file: BinaryIO) -> AbstractContextManager[Any]:
    return file


GZIP = b"\x1f\x8b"
_OPENERS: dict[bytes, _Open] = {
    GZIP: lambda file: gzip.GzipFile(fileobj=file),
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ\0": lzma.LZMAFile,
    b"\x5d\0\0": lzma.LZMAFile,
    b"\x28\xb5\x2f\xfd": zstd.ZstdFile,
}


def lay_out(manifest_digest: str, layout: Path, limit: int, name: str) -> list[str]:
    """Make an OCI layout of an image in the cache; the digests of its layers in the cache.

    Layers of other compressions are unpacked, up to `limit` bytes of all. What a layer is, its
    first bytes tell: manifests may be wrong. InvalidInput: too large, or no image. Corrupt.
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
        with path.open("rb") as source:
            magic = _magic(source)
            if magic in (None, GZIP):
                _link(ours, path)
                taken.append({**layer, "mediaType": f"{PLAIN}+gzip" if magic else PLAIN})
                continue
            digest, size = write_plain(source, ours / "new", limit, name)
        (ours / "new").rename(ours / digest)
        taken.append({"mediaType": PLAIN, "digest": f"sha256:{digest}", "size": size})
        limit -= size
    _link(ours, blobs.blob_path(config.get("digest")))
    document = {"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": taken}
    data = json.dumps(document).encode()
    digest = hashlib.sha256(data).hexdigest()
    (ours / digest).write_bytes(data)
    described = {
        "mediaType": MANIFEST,
        "digest": f"sha256:{digest}",
        "size": len(data),
        "annotations": {"org.opencontainers.image.ref.name": "image"},
    }
    (layout / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    (layout / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [described]}))
    return digests


def write_plain(source: BinaryIO, target: Path, limit: int, name: str) -> tuple[str, int]:
    """Write what `source` is without its compression; the SHA-256, hex, and size of that.

    InvalidInput: it is larger than `limit` bytes. Corrupt: it cannot be unpacked.
    """
    opener = _OPENERS.get(_magic(source) or b"", _as_it_is)
    digest, size = hashlib.sha256(), 0
    try:
        with opener(source) as plain, target.open("wb") as file:
            while data := plain.read(CHUNK):
                size += len(data)
                if size > limit:
                    raise too_large(name, limit)
                digest.update(data)
                file.write(data)
    except (EOFError, OSError, zlib.error, lzma.LZMAError, zstd.ZstdError) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        raise Corrupt(f"image {name}: a layer cannot be unpacked: {error}") from None
    return digest.hexdigest(), size


def _magic(source: BinaryIO) -> bytes | None:
    """What the compression of a file begins with; None: it has none."""
    beginning = source.read(8)
    source.seek(0)
    return next((magic for magic in _OPENERS if beginning.startswith(magic)), None)


def _link(directory: Path, blob: Path) -> None:
    link = directory / blob.name
    if not link.is_symlink():  # an image may have a layer twice
        link.symlink_to(blob)
