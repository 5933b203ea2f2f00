"""What references were found to be: `references/KEY.json` in the cache, for people to read."""

from __future__ import annotations

from pathlib import Path

from blake3 import blake3
from pydantic import BaseModel, ConfigDict, ValidationError

from ratoon import files, paths
from ratoon.sources.image import Image, ImageConfig


class _Found(BaseModel):
    """`stamp` tells whether what the image came from is still the same."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: str
    stamp: str
    digest: str
    config: ImageConfig


def recall(name: str, stamp: str = "") -> Image | None:
    """What was remembered last of `name`; None: nothing, or of another stamp."""
    try:
        found = _Found.model_validate_json(_path(name).read_bytes())
    except (FileNotFoundError, ValidationError):
        return None
    if (found.name, found.stamp) != (name, stamp):
        return None
    return Image(found.name, found.digest, found.config)


def remember(image: Image, stamp: str = "") -> None:
    found = _Found(name=image.name, stamp=stamp, digest=image.digest, config=image.config)
    path = _path(image.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_durable(path, found.model_dump_json(indent=2).encode() + b"\n")


def _path(name: str) -> Path:
    return paths.cache() / "references" / f"{blake3(name.encode()).hexdigest()[:24]}.json"
