"""The cache's blobs: layers, configurations and manifests of OCI images, by their SHA-256.

`oci/blobs` is the directory of that name of every OCI layout here: so no blob is there twice, and
whoever fetches an image skips those that are there.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from ratoon import paths
from ratoon.errors import Corrupt, InvalidInput

#: Bytes of a manifest or configuration; containers/image reads no more of a manifest either.
LIMIT = 4 * 1024 * 1024
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


def directory() -> Path:
    """Where blobs and what fetches them lie; it is made. Images may be private."""
    place = paths.cache() / "oci"
    place.mkdir(parents=True, exist_ok=True, mode=0o700)
    (place / "blobs/sha256").mkdir(parents=True, exist_ok=True)
    return place


def blob_path(digest: Any) -> Path:
    """Where a blob is, if it is here. InvalidInput: that is no digest."""
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
        raise InvalidInput(f"{str(digest)[:80]!r} is no SHA-256 digest of a blob")
    return directory() / "blobs/sha256" / digest.removeprefix("sha256:")


def read_document(digest: Any) -> dict[str, Any]:
    """A blob that is a JSON object. FileNotFoundError: it is not here. Corrupt; InvalidInput."""
    path = blob_path(digest)
    with path.open("rb") as file:
        data = file.read(LIMIT + 1)
    if len(data) > LIMIT:
        raise InvalidInput(f"{digest} is no manifest or configuration: it is too large")
    if hashlib.sha256(data).hexdigest() != path.name:
        path.unlink(missing_ok=True)  # the next fetch brings it again
        raise Corrupt(f"blob {digest} in {path.parent} was damaged, and is removed; try again")
    return parse(data, str(digest))


def is_whole(manifest: str) -> bool:
    """Whether an image is here with its configuration and its layers."""
    try:
        document = read_document(manifest)
        parts = [document["config"], *document["layers"]]
        return all(blob_path(part["digest"]).exists() for part in parts)
    except (FileNotFoundError, Corrupt, InvalidInput, KeyError, TypeError):
        return False


def parse(data: bytes, name: str) -> dict[str, Any]:
    """A JSON object; InvalidInput, calling it `name`, if it is none."""
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict):
        raise InvalidInput(f"{name} is no manifest or configuration: it is not a JSON object")
    return document


def remove_damaged(digests: list[str]) -> list[str]:
    """Remove those blobs whose content is not what they are called; which they were."""
    damaged = []
    for digest in digests:
        path = blob_path(digest)
        if not path.exists():
            continue
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != path.name:
            path.unlink(missing_ok=True)
            damaged.append(digest)
    return damaged
