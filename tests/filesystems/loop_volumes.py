"""Mounted file systems as values, for the fixtures and the tests that take them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Volume:
    """A mounted file system."""

    kind: str
    root: Path


#: Mounts a new one, of a kind and a size in bytes, until the tests of the module are over.
Mount = Callable[[str, int], Volume]
