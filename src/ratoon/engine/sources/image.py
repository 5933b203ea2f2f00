"""What an image is: what it is called, which it is exactly, and how its programs are to be run."""

from __future__ import annotations

from dataclasses import dataclass

from ratoon.store.snapshot.image_config import ImageConfig


@dataclass(frozen=True)
class Image:
    """An image that was found; `name` is what the user said, in full.

    `digest`: `sha256:…` of its manifest, or `blake3:…` of what it is made of.
    """

    name: str
    digest: str
    config: ImageConfig
