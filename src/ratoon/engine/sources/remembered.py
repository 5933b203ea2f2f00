"""What references were found to be: `references/KEY.json` in the cache, for people to read."""

from __future__ import annotations

from pathlib import Path

from blake3 import blake3

from ratoon import paths
from ratoon.documents import Document
from ratoon.engine.sources.image import Image
from ratoon.store.snapshot.image_config import ImageConfig


class _Found(Document):
    """`stamp` tells whether what the image came from is still the same."""

    name: str
    stamp: str
    digest: str
    config: ImageConfig


def recall(name: str, stamp: str = "") -> Image | None:
    """What was remembered last of `name`; None: nothing, or of another stamp."""
    found = _Found.load_or_none(_path(name))
    if found is None or (found.name, found.stamp) != (name, stamp):
        return None
    return Image(found.name, found.digest, found.config)


def remember(image: Image, stamp: str = "") -> None:
    found = _Found(name=image.name, stamp=stamp, digest=image.digest, config=image.config)
    path = _path(image.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    found.save(path)


def _path(name: str) -> Path:
    return paths.cache() / "references" / f"{blake3(name.encode()).hexdigest()[:24]}.json"
